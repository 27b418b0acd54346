#include <bit>
#include <cstdint>

#include "cuda/ptx.h"
#include "hfh/params.h"
#include "scheduler.h"

// What the lanes of a warp do together.

namespace cuda_emulator {

namespace {

struct ShuffleArgument {
  uint64_t value;
  int source;
  uint64_t result;
};

void operate_shuffle(void* const* arguments, uint32_t lanes) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    auto* argument = static_cast<ShuffleArgument*>(arguments[lane]);
    const auto* source = static_cast<const ShuffleArgument*>(arguments[argument->source]);
    argument->result = source == nullptr ? ~uint64_t{0} : source->value;
  }
}

struct VoteArgument {
  bool predicate;
  uint32_t votes, lanes;
};

void operate_vote(void* const* arguments, uint32_t lanes) {
  uint32_t votes = 0;
  const auto each = [&](const auto& f) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (lanes >> lane & 1) f(lane, *static_cast<VoteArgument*>(arguments[lane]));
    }
  };
  each([&](int lane, const VoteArgument& argument) {
    votes |= uint32_t{argument.predicate} << lane;
  });
  each([&](int, VoteArgument& argument) {
    argument.votes = votes;
    argument.lanes = lanes;
  });
}

struct MultiplyArgument {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

/// The fragments are described in csrc/cuda/ptx.h.
template <class Number, int kDepth>
void operate_multiply_add(void* const* arguments, uint32_t) {
  float a[16][kDepth], b[kDepth][8], d[16][8];
  const auto each = [&](const auto& f) {
    for (int lane = 0; lane < kLanes; ++lane) {
      f(lane / 4, 2 * (lane % 4), *static_cast<const MultiplyArgument*>(arguments[lane]));
    }
  };
  const auto unpack = [](uint32_t packed, float& low, float& high) {
    hfh::cuda::unpack<Number>(packed, low, high);
  };
  each([&](int m, int q, const MultiplyArgument& part) {
    for (int i = 0; i < kDepth / 4; ++i) {
      float* at = &a[m + 8 * (i % 2)][q + 8 * (i / 2)];
      unpack(part.a[i], at[0], at[1]);
    }
    for (int i = 0; i < kDepth / 8; ++i) {
      unpack(part.b[i], b[q + 8 * i][m], b[q + 8 * i + 1][m]);
    }
    for (int i = 0; i < 4; ++i) d[m + 8 * (i / 2)][q + i % 2] = part.d[i];
  });
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int col = 0; col < 8; ++col) d[row][col] += a[row][k] * b[k][col];
    }
  }
  each([&](int m, int q, const MultiplyArgument& part) {
    for (int i = 0; i < 4; ++i) part.d[i] = d[m + 8 * (i / 2)][q + i % 2];
  });
}

}  // namespace

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int operand, int width) {
  static const Collective kCollectives[] = {
      {"__shfl_sync", false, operate_shuffle},
      {"__shfl_up_sync", false, operate_shuffle},
      {"__shfl_down_sync", false, operate_shuffle},
      {"__shfl_xor_sync", false, operate_shuffle},
  };
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const int begin = lane / width * width;
  int source = lane;
  switch (kind) {
    case Shuffle::kIndex:
      source = begin + operand % width;
      break;
    case Shuffle::kUp:
      if (lane - operand >= begin) source = lane - operand;
      break;
    case Shuffle::kDown:
      if (lane + operand < begin + width) source = lane + operand;
      break;
    case Shuffle::kXor:
      if ((lane ^ operand) < begin + width) source = lane ^ operand;
      break;
  }
  ShuffleArgument argument{value, source, 0};
  meet(kCollectives[static_cast<int>(kind)], mask, &argument);
  return argument.result;
}

uint32_t vote(Vote kind, uint32_t mask, bool predicate) {
  static const Collective kCollectives[] = {
      {"__ballot_sync", false, operate_vote},
      {"__any_sync", false, operate_vote},
      {"__all_sync", false, operate_vote},
  };
  VoteArgument argument{predicate, 0, 0};
  meet(kCollectives[static_cast<int>(kind)], mask, &argument);
  switch (kind) {
    case Vote::kAny:
      return argument.votes != 0;
    case Vote::kAll:
      return argument.votes == argument.lanes;
    default:
      return argument.votes;
  }
}

void synchronize_warp(uint32_t mask) {
  static const Collective kCollective{"__syncwarp", false, [](void* const*, uint32_t) {}};
  meet(kCollective, mask, nullptr);
}

void multiply_add(Format format, int depth, float* d, const uint32_t* a, const uint32_t* b) {
  static const Collective kCollectives[2][2] = {
      {{"mma m16n8k8 bf16", true, operate_multiply_add<hfh::BFloat16, 8>},
       {"mma m16n8k16 bf16", true, operate_multiply_add<hfh::BFloat16, 16>}},
      {{"mma m16n8k8 f16", true, operate_multiply_add<hfh::Float16, 8>},
       {"mma m16n8k16 f16", true, operate_multiply_add<hfh::Float16, 16>}},
  };
  MultiplyArgument argument{d, a, b};
  meet(kCollectives[format == Format::kFloat16][depth == 16], ~uint32_t{0}, &argument);
}

}  // namespace cuda_emulator
