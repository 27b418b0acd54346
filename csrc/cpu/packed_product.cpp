#include "cpu/packed_product.h"

#include <algorithm>

#include "cpu/declarations.h"
#include "cpu/multiply.h"

HFH_NAMESPACE_BEGIN

namespace {

using cpu::Axis;
using cpu::DepthRange;
using cpu::PackedProduct;
using cpu::Patches;
using cpu::PatchPart;
using cpu::RowGroup;
using cpu::TapRange;
using cpu::WeightPart;

static_assert(PackedProduct::kCols % kTileCols == 0);

/// Where row `k`, column `col` of a right operand lies: in tiles of kTileCols columns.
HFH_HOST_DEVICE int64_t right_place(int64_t depth, int64_t k, int64_t col) {
  return col / kTileCols * depth * kTileCols + k * kTileCols + col % kTileCols;
}

void copy(const float* source, int64_t count, float* target) {
  int64_t i = 0;
  for (; i + kFloatLanes <= count; i += kFloatLanes) {
    store(target + i, load<FloatVector>(source + i));
  }
  for (; i < count; ++i) target[i] = source[i];
}

void fill_zeros(int64_t count, float* target) {
  for (int64_t i = 0; i < count; ++i) target[i] = 0.0f;
}

/// target[j * target_stride + i] = source[i * row_step + j * col_step]
void transpose(int64_t rows, int64_t cols, const float* source, int64_t row_step, int64_t col_step,
               float* target, int64_t target_stride) {
  constexpr int64_t kSquare = kFloatLanes;
  for (int64_t j = 0; j < cols; j += kSquare) {
    for (int64_t i = 0; i < rows; i += kSquare) {
      const float* from = source + i * row_step + j * col_step;
      float* to = target + j * target_stride + i;
      if (col_step == 1 && i + kSquare <= rows && j + kSquare <= cols) {
        transpose_square(from, row_step, to, target_stride);
        continue;
      }
      for (int64_t x = 0; x < std::min(kSquare, cols - j); ++x) {
        for (int64_t y = 0; y < std::min(kSquare, rows - i); ++y) {
          to[x * target_stride + y] = from[y * row_step + x * col_step];
        }
      }
    }
  }
}

/// Pixels [begin, end) of an axis that positions [first, last] read.
struct Reach {
  int64_t begin, end;

  Reach(const Axis& axis, int64_t first, int64_t last)
      : begin(std::clamp<int64_t>(axis.first(first), 0, axis.size)),
        end(std::clamp<int64_t>(axis.first(last) + axis.dilation * (axis.kernel - 1) + 1, begin,
                                axis.size)) {}
  int64_t size() const { return end - begin; }
};

/// Some pixels of an image, with their channels.
struct Pixels {
  const float* data;  // of the first channel of pixel (0, 0), which need not be among them
  int64_t row_step, pixel_step, channel_step;

  const float* at(int64_t y, int64_t x) const { return data + y * row_step + x * pixel_step; }
};

/// The pixels that positions [begin, end) of an image read, with channels side by side: in
/// `scratch` where they are not so in the image. Positions past the first row are whole rows apart.
Pixels pixels_of(const Patches& patches, const float* image, int64_t channels, int64_t begin,
                 int64_t end, float* scratch) {
  const Axis &height = patches.height, &width = patches.width;
  const Pixels in_place{image, height.step, width.step, patches.channel_step};
  if (patches.channel_step == 1) return in_place;
  const int64_t top = begin / width.positions, bottom = (end - 1) / width.positions;
  const Reach rows(height, top, bottom);
  const Reach cols = top == bottom
                         ? Reach(width, begin % width.positions, (end - 1) % width.positions)
                         : Reach(width, 0, width.positions - 1);
  if (rows.size() * cols.size() * channels > PackedProduct::kPixelFloats) return in_place;
  const float* first = image + rows.begin * height.step + cols.begin * width.step;
  if (height.step == cols.size() * width.step) {
    transpose(channels, rows.size() * cols.size(), first, patches.channel_step, width.step, scratch,
              channels);
  } else {
    for (int64_t y = 0; y < rows.size(); ++y) {
      transpose(channels, cols.size(), first + y * height.step, patches.channel_step, width.step,
                scratch + y * cols.size() * channels, channels);
    }
  }
  return {scratch - (rows.begin * cols.size() + cols.begin) * channels, cols.size() * channels,
          channels, 1};
}

/// Calls `f(image, begin, end, row)` for the positions [begin, end) of each image among rows.
template <class F>
void by_image(const Patches& patches, const PatchPart& part, const F& f) {
  const int64_t positions = patches.height.positions * patches.width.positions;
  for (int64_t row = 0; row < part.rows;) {
    const int64_t image = (part.row + row) / positions, begin = (part.row + row) % positions;
    const int64_t end = std::min(positions, begin + part.rows - row);
    f(image, begin, end, row);
    row += end - begin;
  }
}

/// Elements that follow each other in the operand; zeros where there is no pixel.
void copy_channels(const float* pixel, int64_t channel_step, int64_t count, float* target) {
  if (pixel == nullptr) {
    fill_zeros(count, target);
  } else if (channel_step == 1) {
    copy(pixel, count, target);
  } else {
    for (int64_t i = 0; i < count; ++i) target[i] = pixel[i * channel_step];
  }
}

/// Calls `f(image, begin, end, row)` for positions of each image among the part's rows, with the
/// pixels of its channels.
template <class F>
void by_pixels(const Patches& patches, const float* images, const PatchPart& part, float* scratch,
               const F& f) {
  by_image(patches, part, [&](int64_t image, int64_t begin, int64_t end, int64_t row) {
    const float* first = images + image * patches.image_step + part.channel * patches.channel_step;
    f(pixels_of(patches, first, part.channels, begin, end, scratch), begin, end, row);
  });
}

/// Of (column, channel, tap).
void pack_weight_columns(const VirtualWeight& weight, const WeightPart& part, float* packed,
                         float* scratch) {
  const int64_t depth = part.channels * part.taps;
  float square[kFloatLanes][kFloatLanes];
  for (int64_t col = 0; col < part.cols; col += kFloatLanes) {
    const int64_t count = std::min<int64_t>(kFloatLanes, part.cols - col);
    reconstruct_kernel(weight, {part.col + col, count, part.channel * part.taps, depth}, scratch,
                       PackedProduct::kLeftStride);
    float* target = packed + right_place(depth, 0, col);
    int64_t channel = 0, tap = 0;
    for (int64_t k = 0; k < depth; k += kFloatLanes) {
      transpose_square(scratch + k, PackedProduct::kLeftStride, square[0], kFloatLanes);
      for (int64_t i = 0; i < std::min<int64_t>(kFloatLanes, depth - k); ++i) {
        store(target + (tap * part.channels + channel) * kTileCols, load<FloatVector>(square[i]));
        if (++tap == part.taps) {
          tap = 0;
          ++channel;
        }
      }
    }
  }
}

/// Of (channel, column, tap), the taps backwards.
void pack_weight_channels(const VirtualWeight& weight, const WeightPart& part, float* packed,
                          float* scratch) {
  constexpr int64_t kRows = 16;
  const int64_t taps = part.taps, depth = part.channels * taps;
  const int64_t cols_at_once =
      std::max<int64_t>(PackedProduct::kDepth / taps / kTileCols, 1) * kTileCols;
  const int64_t stride = cols_at_once * taps + 16;
  for (int64_t first = 0; first < part.cols; first += cols_at_once) {
    const int64_t cols = std::min(cols_at_once, part.cols - first);
    for (int64_t channel = 0; channel < part.channels; channel += kRows) {
      const int64_t rows = std::min(kRows, part.channels - channel);
      reconstruct_kernel(weight,
                         {part.channel + channel, rows, (part.col + first) * taps, cols * taps},
                         scratch, stride);
      for (int64_t row = 0; row < rows; ++row) {
        const float* source = scratch + row * stride;
        for (int64_t col = 0; col < cols; col += kTileCols) {
          const int64_t count = std::min<int64_t>(kTileCols, cols - col);
          for (int64_t tap = 0; tap < taps; ++tap) {
            float* target =
                packed +
                right_place(depth, (taps - 1 - tap) * part.channels + channel + row, first + col);
            const float* from = source + col * taps + tap;
            if (taps == 1) {
              copy(from, count, target);
            } else {
              for (int64_t i = 0; i < count; ++i) target[i] = from[i * taps];
            }
          }
        }
      }
    }
  }
}

/// Where sums belong: row i of an operand at row `row[i]`, of which the first `cols` are wanted.
struct SumRows {
  float* data;
  const int64_t* row;
  int64_t stride, cols;
};

/// Adds kRows rows of a product, from `row` on.
template <int kRows>
HFH_HOST_DEVICE void add_tile(const RowGroup& group, int64_t row, int64_t unit, const float* left,
                              const float* right, const SumRows& out) {
  FloatVector sum[kRows][kTileVectors] = {};
  for (int64_t range = 0; range < group.num_ranges; ++range) {
    const int64_t begin = group.ranges[range].begin * unit, end = group.ranges[range].end * unit;
    add_tile_products<FloatElements, kRows, PackedProduct::kLeftStride>(
        left + begin, right + begin * kTileCols, kTileCols, end - begin, sum);
  }
  for (int i = 0; i < kRows; ++i) {
    float* target = out.data + out.row[row + i] * out.stride;
    if (out.cols == kTileCols) {
      for (int v = 0; v < kTileVectors; ++v) {
        float* part = target + v * kFloatLanes;
        store(part, load<FloatVector>(part) + sum[i][v]);
      }
    } else {
      float whole[kTileCols];
      for (int v = 0; v < kTileVectors; ++v) store(whole + v * kFloatLanes, sum[i][v]);
      for (int64_t j = 0; j < out.cols; ++j) target[j] += whole[j];
    }
  }
}

template <int kRows = kTileRows>
HFH_HOST_DEVICE void add_ragged_tile(int64_t rows, const RowGroup& group, int64_t row, int64_t unit,
                                     const float* left, const float* right, const SumRows& out) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return add_tile<kRows>(group, row, unit, left, right, out);
    add_ragged_tile<kRows - 1>(rows, group, row, unit, left, right, out);
  }
}

void multiply_group(const RowGroup& group, int64_t unit, const float* left, const float* right,
                    const SumRows& out) {
  // Tiles of the same height or nearly: of one or two rows, sums would wait for each other.
  const int64_t tiles = (group.rows + kTileRows - 1) / kTileRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t begin = tile * group.rows / tiles, end = (tile + 1) * group.rows / tiles;
    const int64_t row = group.row + begin;
    add_ragged_tile(end - begin, group, row, unit, left + row * PackedProduct::kLeftStride, right,
                    out);
  }
}

}  // namespace

void pack_patches_left_kernel(const Patches& patches, const float* images, const PatchPart& part,
                              const int64_t* place, float* packed, float* scratch) {
  const Axis &height = patches.height, &width = patches.width;
  by_pixels(patches, images, part, scratch,
            [&](const Pixels& pixels, int64_t begin, int64_t end, int64_t row) {
              // Taps whose pixels follow each other are one stretch.
              const bool follow = width.dilation == 1 && pixels.channel_step == 1 &&
                                  pixels.pixel_step == part.channels;
              const int64_t at_once = follow ? width.kernel : 1;
              int64_t line = begin / width.positions, in_line = begin % width.positions;
              TapRange y(height, height.first(line));
              for (int64_t position = begin; position < end; ++position, ++row, ++in_line) {
                if (in_line == width.positions) {
                  in_line = 0;
                  y = TapRange(height, height.first(++line));
                }
                const int64_t left = width.first(in_line);
                const TapRange x(width, left);
                float* target = packed + place[row] * PackedProduct::kLeftStride;
                const auto pack = [&](const float* pixel, int64_t tap, int64_t taps) {
                  copy_channels(pixel, pixels.channel_step, taps * part.channels,
                                target + tap * part.channels);
                };
                for (int64_t i = 0; i < height.kernel; ++i) {
                  const int64_t tap = i * width.kernel;
                  if (!y.contains(i) || x.begin >= x.end) {
                    pack(nullptr, tap, width.kernel);
                    continue;
                  }
                  const int64_t source_line = height.first(line) + i * height.dilation;
                  pack(nullptr, tap, x.begin);
                  for (int64_t j = x.begin; j < x.end; j += at_once) {
                    pack(pixels.at(source_line, left + j * width.dilation), tap + j,
                         std::min(at_once, x.end - j));
                  }
                  pack(nullptr, tap + x.end, width.kernel - x.end);
                }
              }
            });
}

void pack_patches_right_kernel(const Patches& patches, const float* images, const PatchPart& part,
                               int64_t first_row, int64_t depth, float* packed, float* scratch) {
  const Axis &height = patches.height, &width = patches.width;
  by_pixels(
      patches, images, part, scratch,
      [&](const Pixels& pixels, int64_t begin, int64_t end, int64_t row) {
        // Columns of a tile for one position after the other: what is written is then one stretch.
        const auto pack_cols = [&](int64_t i, int64_t j, int64_t channel, int64_t count,
                                   float* target) {
          int64_t line = begin / width.positions, in_line = begin % width.positions;
          for (int64_t position = begin; position < end; ++line, in_line = 0) {
            const int64_t y = height.first(line) + i * height.dilation;
            for (; in_line < width.positions && position < end;
                 ++in_line, ++position, target += kTileCols) {
              const int64_t x = width.first(in_line) + j * width.dilation;
              const bool is_inside = y >= 0 && y < height.size && x >= 0 && x < width.size;
              copy_channels(is_inside ? pixels.at(y, x) + channel * pixels.channel_step : nullptr,
                            pixels.channel_step, count, target);
            }
          }
        };
        int64_t col = 0;
        for (int64_t i = 0; i < height.kernel; ++i) {
          for (int64_t j = 0; j < width.kernel; ++j) {
            for (int64_t channel = 0; channel < part.channels;) {
              const int64_t count =
                  std::min<int64_t>(part.channels - channel, kTileCols - col % kTileCols);
              pack_cols(i, j, channel, count, packed + right_place(depth, first_row + row, col));
              channel += count;
              col += count;
            }
          }
        }
      });
}

void pack_channels_kernel(const Patches& pixels, const float* images, const PatchPart& part,
                          float* packed) {
  const Axis &height = pixels.height, &width = pixels.width;
  by_image(pixels, part, [&](int64_t image, int64_t begin, int64_t end, int64_t row) {
    const float* first = images + image * pixels.image_step + part.channel * pixels.channel_step;
    while (begin < end) {
      // As many positions as lie the same step apart.
      const int64_t y = begin / width.positions, x = begin % width.positions;
      const int64_t stop = height.step == width.positions * width.step
                               ? end
                               : std::min(end, (y + 1) * width.positions);
      const float* source = first + y * height.step + x * width.step;
      if (width.step == 1) {
        for (int64_t c = 0; c < part.channels; ++c) {
          copy(source + c * pixels.channel_step, stop - begin,
               packed + c * PackedProduct::kLeftStride + row);
        }
      } else {
        transpose(stop - begin, part.channels, source, width.step, pixels.channel_step,
                  packed + row, PackedProduct::kLeftStride);
      }
      row += stop - begin;
      begin = stop;
    }
  });
}

void pack_weight_kernel(const VirtualWeight& weight, const WeightPart& part, float* packed,
                        float* scratch) {
  if (part.is_transposed) {
    pack_weight_channels(weight, part, packed, scratch);
  } else {
    pack_weight_columns(weight, part, packed, scratch);
  }
}

void multiply_packed_kernel(const RowGroup* groups, int64_t num_groups, int64_t cols, int64_t depth,
                            int64_t unit, const float* left, const float* right, float* out,
                            const int64_t* out_row, int64_t stride) {
  for (int64_t col = 0; col < cols; col += kTileCols) {
    const SumRows sums{out + col, out_row, stride, std::min<int64_t>(kTileCols, cols - col)};
    for (int64_t i = 0; i < num_groups; ++i) {
      multiply_group(groups[i], unit, left, right + col * depth, sums);
    }
  }
}

void order_by_channel_kernel(int64_t rows, int64_t channels, int64_t taps, float* data) {
  float row[PackedProduct::kDepth];
  for (int64_t r = 0; r < rows; ++r) {
    float* target = data + r * channels * taps;
    copy(target, channels * taps, row);
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t channel = 0; channel < channels; ++channel) {
        target[channel * taps + tap] = row[tap * channels + channel];
      }
    }
  }
}

HFH_NAMESPACE_END
