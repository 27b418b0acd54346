#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/kernels.h"

namespace hfh::cpu {

const Kernels& kernels_baseline();
#ifdef HFH_HAS_AVX2
const Kernels& kernels_avx2();
#endif
#ifdef HFH_HAS_AVX512
const Kernels& kernels_avx512();
#endif
#ifdef HFH_HAS_AVX512_BF16
const Kernels& kernels_avx512_bf16();
#endif

#ifdef HFH_HAS_AVX512_AMX
const MatrixUnit& amx();
#endif

namespace {

#ifdef HFH_HAS_AVX512_AMX
/// The system must grant a process the use of the tile registers.
bool machine_has_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of a component
  return __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("avx512bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

const Kernels& kernels_avx512_amx() {
  static const Kernels table = [] {
    Kernels kernels = kernels_avx512_bf16();
    kernels.capability = "avx512_amx";
    kernels.matrix_unit = &amx();
    return kernels;
  }();
  return table;
}
#endif

struct Capability {
  const char* name;
  bool (*machine_has)();
  const Kernels& (*kernels)();
};

// Plainest first. `__builtin_cpu_supports` also asks whether the system saves the wide registers.
const Capability kCapabilities[] = {
    {"baseline", [] { return true; }, kernels_baseline},
#ifdef HFH_HAS_AVX2
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     kernels_avx2},
#endif
#ifdef HFH_HAS_AVX512
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     },
     kernels_avx512},
#endif
#ifdef HFH_HAS_AVX512_BF16
    {"avx512_bf16",
     [] { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16"); },
     kernels_avx512_bf16},
#endif
#ifdef HFH_HAS_AVX512_AMX
    {"avx512_amx", machine_has_amx, kernels_avx512_amx},
#endif
};

const Kernels& select() {
  const char* limit = std::getenv("HFH_CPU_CAPABILITY");
  if (limit != nullptr && *limit == '\0') limit = nullptr;
  const Kernels* best = nullptr;
  bool limit_known = limit == nullptr;
  for (const Capability& capability : kCapabilities) {
    if (capability.machine_has()) best = &capability.kernels();
    if (limit != nullptr && std::strcmp(limit, capability.name) == 0) {
      limit_known = true;
      break;
    }
  }
  if (!limit_known) {
    throw std::invalid_argument(std::string("HFH_CPU_CAPABILITY must be one of ") +
                                built_capabilities() + ", received '" + limit + "'");
  }
  return *best;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& selected = select();
  return selected;
}

const char* built_capabilities() {
  static const std::string names = [] {
    std::string joined;
    for (const Capability& capability : kCapabilities) {
      joined += (joined.empty() ? "" : ",") + std::string(capability.name);
    }
    return joined;
  }();
  return names.c_str();
}

}  // namespace hfh::cpu
