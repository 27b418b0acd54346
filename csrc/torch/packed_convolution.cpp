#include "torch/packed_convolution.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

namespace hfh::torch_ops {

namespace {

using cpu::DepthRange;
using cpu::kernels;
using cpu::PackedProduct;
using cpu::PatchPart;
using cpu::RowGroup;
using cpu::TapRange;
using cpu::WeightPart;

constexpr int64_t kCols = PackedProduct::kCols;
// Rows of patches that a thread packs at once, which stay in a second-level cache beside what they
// meet. Up to the second number of them in all, each thread packs them for itself, and what it
// takes of the weight, kColsAtOnce columns at once, never leaves its cache.
constexpr int64_t kRowsAtOnce = 96, kFewRows = 208;
constexpr int64_t kColsAtOnce = 128;
// Of the weight, packed for all rows.
constexpr int64_t kPanelBytes = 4 << 20;
constexpr int64_t kPanelCols = 512;

// To pack a vector of patches takes as long as some ten vectors of a product, and it serves one for
// each channel of the target, or for each row of the weight's gradient. Measured against products
// with patches and against the platform's convolution: level at these numbers, and at twice as
// many.
constexpr int64_t kMinChannels = 32, kMinRows = 128;

int64_t times_as_many(const Convolution& convolution, at::ScalarType dtype) {
  return prefers_platform(convolution, dtype) ? 2 : 1;
}

/// Groups have too few channels each.
bool can_pack(const Convolution& convolution, at::ScalarType dtype) {
  const int64_t taps = convolution.kernel_size[0] * convolution.kernel_size[1];
  const int64_t channels = std::max(convolution.input_size[1], convolution.out_channels);
  return dtype == at::kFloat && kernels().matrix_unit == nullptr && convolution.groups == 1 &&
         taps <= PackedProduct::kMaxTaps &&
         channels * taps * kCols * static_cast<int64_t>(sizeof(float)) <= kPanelBytes;
}

template <Purpose purpose>
float* float_scratch(int64_t count) {
  return static_cast<float*>(Scratch<purpose>::get(count * sizeof(float)));
}

/// Rows of patches in groups that have the same taps in the image: what meets the padding is left
/// out. It is a tenth of the product for 3 x 3 taps on images of 14 x 14.
class GroupedRows {
 public:
  GroupedRows(const cpu::Patches& patches, int64_t first, int64_t count)
      : place_(count), row_(count) {
    std::vector<Taps> kinds;
    std::vector<size_t> kind(count);
    const auto &height = patches.height, &width = patches.width;
    for (int64_t i = 0; i < count;) {
      const int64_t line = (first + i) / width.positions, begin = (first + i) % width.positions;
      const TapRange y(height, height.first(line % height.positions));
      for (int64_t x = begin; x < width.positions && i < count; ++x, ++i) {
        const Taps taps = taps_of(patches, y, TapRange(width, width.first(x)));
        if (i > 0 && kinds[kind[i - 1]] == taps) {
          kind[i] = kind[i - 1];
        } else {
          kind[i] = std::find(kinds.begin(), kinds.end(), taps) - kinds.begin();
          if (kind[i] == kinds.size()) kinds.push_back(taps);
        }
        ++kinds[kind[i]].rows;
      }
    }
    ranges_.resize(kinds.size());
    int64_t row = 0;
    for (size_t i = 0; i < kinds.size(); ++i) {
      ranges_[i] = ranges_of(patches, kinds[i]);
      groups_.push_back(
          {row, kinds[i].rows, ranges_[i].data(), static_cast<int64_t>(ranges_[i].size())});
      row += std::exchange(kinds[i].rows, row);
    }
    for (int64_t i = 0; i < count; ++i) {
      place_[i] = kinds[kind[i]].rows++;
      row_[place_[i]] = i;
    }
  }

  const std::vector<RowGroup>& groups() const { return groups_; }
  /// Where each row is among them, and which row is at each place.
  const int64_t* place() const { return place_.data(); }
  const int64_t* row() const { return row_.data(); }

 private:
  struct Taps {
    int64_t top, bottom, left, right, rows;

    bool operator==(const Taps& x) const {
      return top == x.top && bottom == x.bottom && left == x.left && right == x.right;
    }
  };

  /// Corners count as the edges above and below: groups of a row or two would take as long.
  static Taps taps_of(const cpu::Patches& patches, const TapRange& y, const TapRange& x) {
    if (y.end - y.begin < patches.height.kernel)
      return {y.begin, y.end, 0, patches.width.kernel, 0};
    return {y.begin, y.end, x.begin, x.end, 0};
  }
  static std::vector<DepthRange> ranges_of(const cpu::Patches& patches, const Taps& taps) {
    const int64_t kernel = patches.width.kernel;
    if (taps.right - taps.left == kernel) return {{taps.top * kernel, taps.bottom * kernel}};
    std::vector<DepthRange> ranges;
    for (int64_t y = taps.top; y < taps.bottom; ++y) {
      ranges.push_back({y * kernel + taps.left, y * kernel + taps.right});
    }
    return ranges;
  }

  std::vector<int64_t> place_, row_;
  std::vector<std::vector<DepthRange>> ranges_;
  std::vector<RowGroup> groups_;
};

/// The positions among [first, first + count) at which a tap lies in the image, from the first on.
std::vector<DepthRange> positions_of_tap(const cpu::Patches& patches, int64_t tap, int64_t first,
                                         int64_t count) {
  const auto &height = patches.height, &width = patches.width;
  const int64_t tap_y = tap / width.kernel, tap_x = tap % width.kernel;
  const auto is_inside = [](const cpu::Axis& axis, int64_t position, int64_t tap) {
    return TapRange(axis, axis.first(position)).contains(tap);
  };
  int64_t left = 0, right = width.positions;
  while (left < right && !is_inside(width, left, tap_x)) ++left;
  while (left < right && !is_inside(width, right - 1, tap_x)) --right;
  std::vector<DepthRange> ranges;
  for (int64_t line = first / width.positions; line * width.positions < first + count; ++line) {
    if (!is_inside(height, line % height.positions, tap_y)) continue;
    const int64_t begin = std::max<int64_t>(line * width.positions + left - first, 0);
    const int64_t end = std::min(line * width.positions + right - first, count);
    if (begin >= end) continue;
    if (!ranges.empty() && ranges.back().end == begin) {
      ranges.back().end = end;
    } else {
      ranges.push_back({begin, end});
    }
  }
  return ranges;
}

/// target = patches V^T + bias or, with V transposed, patches V.
class PackedPass {
 public:
  PackedPass(const CheckedWeight& weight, bool is_transposed, const PatchMatrix& patches,
             const at::Tensor& bias, const PatchMatrix& target)
      : weight_(weight.get()),
        is_transposed_(is_transposed),
        patches_(patches.patches()),
        images_(static_cast<const float*>(patches.data())),
        bias_(bias.defined() ? bias.const_data_ptr<float>() : nullptr),
        target_(target),
        view_(target.view()),
        slice_(PackedProduct::channels_at_once(patches_.taps())) {}

  void run() {
    const int64_t rows = patches_.rows(), cols = target_.cols();
    if (rows <= kFewRows) {
      at::parallel_for(0, ceil_divide(cols, kCols), 1, [&](int64_t begin, int64_t end) {
        const int64_t stop = std::min(cols, end * kCols);
        for (int64_t col = begin * kCols; col < stop; col += kPanelCols) {
          multiply({0, rows}, {col, std::min(kPanelCols, stop - col)}, nullptr);
        }
      });
      return;
    }
    const int64_t col_bytes = patches_.cols() * static_cast<int64_t>(sizeof(float));
    const int64_t at_once = std::clamp(kPanelBytes / col_bytes / kCols * kCols, kCols, kPanelCols);
    float* panel = float_scratch<Purpose::kPackedBatch>(
        PackedProduct::right_floats(patches_.cols(), std::min(at_once, cols)));
    for (int64_t col = 0; col < cols; col += at_once) {
      const Stretch part{col, std::min(at_once, cols - col)};
      pack_panel(part, panel);
      at::parallel_for(0, rows, kGrainRows, [&](int64_t begin, int64_t end) {
        const int64_t blocks = ceil_divide(end - begin, kRowsAtOnce);
        for (int64_t i = 0; i < blocks; ++i) {
          const int64_t first = begin + i * (end - begin) / blocks;
          multiply({first, begin + (i + 1) * (end - begin) / blocks - first}, part, panel);
        }
      });
    }
  }

 private:
  // Rows that a thread should get before another is woken.
  static constexpr int64_t kGrainRows = 12;

  struct Stretch {
    int64_t first, count;
  };

  int64_t num_slices() const { return ceil_divide(patches_.channels, slice_); }
  Stretch slice(int64_t index) const {
    return {index * slice_, std::min(slice_, patches_.channels - index * slice_)};
  }
  WeightPart weight_part(const Stretch& channels, int64_t col, int64_t cols) const {
    return {is_transposed_, patches_.taps(), channels.first, channels.count, col, cols};
  }
  /// Where a slice's operand is in a panel of so many columns.
  int64_t place_of(const Stretch& channels, int64_t cols) const {
    return PackedProduct::right_floats(channels.first * patches_.taps(), cols);
  }

  void pack_panel(const Stretch& cols, float* panel) const {
    const int64_t col_parts = ceil_divide(cols.count, kCols);
    at::parallel_for(0, num_slices() * col_parts, 1, [&](int64_t begin, int64_t end) {
      float* scratch = float_scratch<Purpose::kPanels>(PackedProduct::kWeightFloats);
      for (int64_t i = begin; i < end; ++i) {
        const Stretch channels = slice(i / col_parts);
        const int64_t col = i % col_parts * kCols;
        kernels().pack_weight(
            weight_, weight_part(channels, cols.first + col, std::min(kCols, cols.count - col)),
            panel + place_of(channels, cols.count) +
                PackedProduct::right_floats(channels.count * patches_.taps(), col),
            scratch);
      }
    });
  }

  /// Some rows and columns of the target; without a panel of these columns, the weight is packed.
  void multiply(const Stretch& rows, const Stretch& cols, const float* panel) const {
    float* left = float_scratch<Purpose::kPatches>(PackedProduct::left_floats(kFewRows) +
                                                   PackedProduct::kPixelFloats);
    float* pixels = left + PackedProduct::left_floats(kFewRows);
    const int64_t stride = view_ ? target_.cols() : cols.count;
    float* out = view_ ? view_->mutable_data_ptr<float>() + rows.first * stride + cols.first
                       : float_scratch<Purpose::kPositions>(rows.count * cols.count);
    start_sums(rows.count, cols, out, stride);
    const GroupedRows grouped(patches_, rows.first, rows.count);
    const auto multiply_packed = [&](int64_t num_cols, const Stretch& channels, const float* right,
                                     float* sums) {
      kernels().multiply_packed(grouped.groups().data(),
                                static_cast<int64_t>(grouped.groups().size()), num_cols,
                                channels.count * patches_.taps(), channels.count, left, right, sums,
                                grouped.row(), stride);
    };
    for (int64_t i = 0; i < num_slices(); ++i) {
      const Stretch channels = slice(i);
      kernels().pack_patches_left(patches_, images_,
                                  {rows.first, rows.count, channels.first, channels.count},
                                  grouped.place(), left, pixels);
      if (panel != nullptr) {
        multiply_packed(cols.count, channels, panel + place_of(channels, cols.count), out);
        continue;
      }
      float* right = float_scratch<Purpose::kPanels>(
          PackedProduct::right_floats(PackedProduct::kDepth, kColsAtOnce) +
          PackedProduct::kWeightFloats);
      float* scratch = right + PackedProduct::right_floats(PackedProduct::kDepth, kColsAtOnce);
      for (int64_t col = 0; col < cols.count; col += kColsAtOnce) {
        const int64_t count = std::min(kColsAtOnce, cols.count - col);
        kernels().pack_weight(weight_, weight_part(channels, cols.first + col, count), right,
                              scratch);
        multiply_packed(count, channels, right, out + col);
      }
    }
    if (!view_) {
      target_.write(rows.first, cols.first,
                    at::from_blob(out, {rows.count, cols.count}, at::dtype(at::kFloat)));
    }
  }

  void start_sums(int64_t rows, const Stretch& cols, float* out, int64_t stride) const {
    for (int64_t row = 0; row < rows; ++row) {
      if (bias_ == nullptr) {
        std::fill_n(out + row * stride, cols.count, 0.0f);
      } else {
        std::copy_n(bias_ + cols.first, cols.count, out + row * stride);
      }
    }
  }

  const VirtualWeight& weight_;
  bool is_transposed_;
  const cpu::Patches& patches_;
  const float *images_, *bias_;
  const PatchMatrix& target_;
  std::optional<at::Tensor> view_;
  int64_t slice_;  // channels of the source
};

}  // namespace

bool prefers_packed_product(const Convolution& convolution, at::ScalarType dtype) {
  return can_pack(convolution, dtype) &&
         std::min(convolution.input_size[1], convolution.out_channels) >=
             times_as_many(convolution, dtype) * kMinChannels;
}

bool prefers_packed_input_gradient(const Convolution& convolution, at::ScalarType dtype) {
  return convolution.stride == std::array<int64_t, 2>{1, 1} &&
         prefers_packed_product(convolution, dtype);
}

bool prefers_packed_weight_gradient(const Convolution& convolution, at::ScalarType dtype) {
  return prefers_packed_product(convolution, dtype) &&
         convolution.out_channels >= times_as_many(convolution, dtype) * kMinRows;
}

void packed_product(const CheckedWeight& weight, bool is_transposed, const PatchMatrix& patches,
                    const at::Tensor& bias, const PatchMatrix& target) {
  PackedPass(weight, is_transposed, patches, bias, target).run();
}

PackedGradient::PackedGradient(const PatchMatrix& grad_output, int64_t row, int64_t rows,
                               const PatchMatrix& patches)
    : grad_pixels_(grad_output.patches()),
      patches_(patches.patches()),
      grad_output_(static_cast<const float*>(grad_output.data())),
      images_(static_cast<const float*>(patches.data())),
      row_(row),
      rows_(rows),
      sum_(float_scratch<Purpose::kPositions>(rows * cols_at_once())) {}

int64_t PackedGradient::cols_at_once() const {
  return PackedProduct::channels_at_once(patches_.taps()) * patches_.taps();
}

void PackedGradient::select_columns(int64_t col, int64_t cols) {
  const int64_t taps = patches_.taps(), positions = patches_.rows();
  const int64_t rounds = ceil_divide(positions, PackedProduct::kDepth);
  for (int64_t i = 0; i < rounds; ++i) {
    const int64_t first = i * positions / rounds, count = (i + 1) * positions / rounds - first;
    add_positions(first, count, {first, count, col / taps, cols / taps}, i == 0, i + 1 == rounds);
  }
}

void PackedGradient::add_positions(int64_t first, int64_t count, const PatchPart& part,
                                   bool is_first, bool is_last) {
  const int64_t taps = patches_.taps(), cols = part.channels * taps;
  constexpr int64_t kGrainPositions = 32, kGrainRows = 12;
  float* right = float_scratch<Purpose::kPackedBatch>(PackedProduct::right_floats(count, cols));
  at::parallel_for(0, count, kGrainPositions, [&](int64_t begin, int64_t end) {
    float* pixels = float_scratch<Purpose::kPanels>(PackedProduct::kPixelFloats);
    kernels().pack_patches_right(patches_, images_,
                                 {first + begin, end - begin, part.channel, part.channels}, begin,
                                 count, right, pixels);
  });
  float* left = float_scratch<Purpose::kPatches>(PackedProduct::left_floats(rows_));
  const std::vector<DepthRange> whole{{0, count}};
  std::vector<std::vector<DepthRange>> tap_ranges;
  for (int64_t tap = 0; tap < taps; ++tap) {
    tap_ranges.push_back(positions_of_tap(patches_, tap, first, count));
  }
  at::parallel_for(0, rows_, kGrainRows, [&](int64_t begin, int64_t end) {
    const int64_t rows = end - begin;
    float* operand = left + PackedProduct::left_floats(begin);
    float* sum = sum_ + begin * cols;
    kernels().pack_channels(grad_pixels_, grad_output_, {first, count, row_ + begin, rows},
                            operand);
    if (is_first) std::fill_n(sum, rows * cols, 0.0f);
    std::vector<int64_t> row(rows);
    std::iota(row.begin(), row.end(), 0);
    // Panels of one tap leave out what meets the padding.
    const int64_t at_once = part.channels % kCols == 0 ? 1 : taps;
    for (int64_t tap = 0; tap < taps; tap += at_once) {
      const int64_t col = tap * part.channels;
      const std::vector<DepthRange>& ranges = at_once == 1 ? tap_ranges[tap] : whole;
      const RowGroup group{0, rows, ranges.data(), static_cast<int64_t>(ranges.size())};
      kernels().multiply_packed(&group, 1, at_once * part.channels, count, 1, operand,
                                right + PackedProduct::right_floats(count, col), sum + col,
                                row.data(), cols);
    }
    if (is_last && taps > 1) kernels().order_by_channel(rows, part.channels, taps, sum);
  });
}

}  // namespace hfh::torch_ops
