#include "cpu/patches.h"

#include <algorithm>

#include "cpu/declarations.h"
#include "cpu/multiply.h"

HFH_NAMESPACE_BEGIN

namespace {

using cpu::Axis;
using cpu::PatchBlock;
using cpu::Patches;
using cpu::TapRange;

/// One row: where its kernel lies.
struct Placement {
  int64_t corner;  // of the kernel; outside the image where the padding is
  TapRange y, x;

  Placement(const Patches& patches, int64_t image, int64_t row, int64_t col)
      : corner(image * patches.image_step + row * patches.height.step + col * patches.width.step),
        y(patches.height, row),
        x(patches.width, col) {}
  bool is_inside(const Patches& patches) const {
    return y.begin == 0 && x.begin == 0 && y.end == patches.height.kernel &&
           x.end == patches.width.kernel;
  }
};

Placement placement_of(const Patches& patches, int64_t row) {
  const int64_t x = row % patches.width.positions, line = row / patches.width.positions;
  const int64_t y = line % patches.height.positions, image = line / patches.height.positions;
  return {patches, image, patches.height.first(y), patches.width.first(x)};
}

/// Calls `inside(element, pixel)` or `outside(element)` for each element of whole channels of a
/// row; `kWidth` is the kernel's width where that is worth a loop of its own, else 0.
template <bool kInside, int kWidth, class Inside, class Outside>
HFH_HOST_DEVICE void walk_channels(const Patches& patches, const Placement& place,
                                   int64_t channel_begin, int64_t channel_end, Inside inside,
                                   Outside outside) {
  const int64_t width = kWidth > 0 ? kWidth : patches.width.kernel;
  const int64_t tap_step = patches.width.dilation * patches.width.step;
  const int64_t line_step = patches.height.dilation * patches.height.step;
  int64_t element = 0;
  for (int64_t channel = channel_begin; channel < channel_end; ++channel) {
    const int64_t pixel = place.corner + channel * patches.channel_step;
    for (int64_t y = 0; y < patches.height.kernel; ++y) {
      for (int64_t x = 0; x < width; ++x, ++element) {
        if (kInside || (place.y.contains(y) && place.x.contains(x))) {
          inside(element, pixel + y * line_step + x * tap_step);
        } else {
          outside(element);
        }
      }
    }
  }
}

/// The same for any columns [col, col + cols).
template <class Inside, class Outside>
HFH_HOST_DEVICE void walk_row(const Patches& patches, int64_t row, int64_t col, int64_t cols,
                              Inside inside, Outside outside) {
  const Placement place = placement_of(patches, row);
  const int64_t taps = patches.taps(), end = col + cols;
  const int64_t whole_begin = std::min(end, (col + taps - 1) / taps * taps);
  const int64_t whole_end = std::max(whole_begin, end / taps * taps);
  const auto walk_part = [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t channel = k / taps, y = k % taps / patches.width.kernel,
                    x = k % patches.width.kernel;
      if (place.y.contains(y) && place.x.contains(x)) {
        inside(k - col, place.corner + channel * patches.channel_step +
                            y * patches.height.dilation * patches.height.step +
                            x * patches.width.dilation * patches.width.step);
      } else {
        outside(k - col);
      }
    }
  };
  walk_part(col, whole_begin);
  const int64_t first = whole_begin / taps, last = whole_end / taps, shift = whole_begin - col;
  const auto shifted_inside = [&](int64_t k, int64_t pixel) { inside(k + shift, pixel); };
  const auto shifted_outside = [&](int64_t k) { outside(k + shift); };
  if (!place.is_inside(patches)) {
    walk_channels<false, 0>(patches, place, first, last, shifted_inside, shifted_outside);
  } else if (patches.width.kernel == 3) {
    walk_channels<true, 3>(patches, place, first, last, shifted_inside, shifted_outside);
  } else if (taps == 1) {
    walk_channels<true, 1>(patches, place, first, last, shifted_inside, shifted_outside);
  } else {
    walk_channels<true, 0>(patches, place, first, last, shifted_inside, shifted_outside);
  }
  walk_part(whole_end, end);
}

/// Whether rows of one image are neighbours in memory and columns planes of it: the matrix is then
/// a transposed one.
bool is_transposed(const Patches& patches) {
  const Axis &height = patches.height, &width = patches.width;
  return patches.taps() == 1 && width.step == 1 && height.step == width.size &&
         height.stride == 1 && width.stride == 1 && height.padding == 0 && width.padding == 0;
}

/// target[j * target_stride + i] = source[i * source_stride + j] for i < rows, j < cols.
template <class T>
void transpose(int64_t rows, int64_t cols, const T* source, int64_t source_stride, T* target,
               int64_t target_stride) {
  constexpr int64_t kSquare = kFloatLanes;
  for (int64_t i = 0; i < rows; i += kSquare) {
    for (int64_t j = 0; j < cols; j += kSquare) {
      const T* from = source + i * source_stride + j;
      T* to = target + j * target_stride + i;
      if constexpr (sizeof(T) == sizeof(float)) {
        if (i + kSquare <= rows && j + kSquare <= cols) {
          transpose_square(reinterpret_cast<const float*>(from), source_stride,
                           reinterpret_cast<float*>(to), target_stride);
          continue;
        }
      }
      for (int64_t y = 0; y < std::min(kSquare, rows - i); ++y) {
        for (int64_t x = 0; x < std::min(kSquare, cols - j); ++x) {
          to[x * target_stride + y] = from[y * source_stride + x];
        }
      }
    }
  }
}

/// Calls `f(rows, block, pixel)` for the stretches of the block's rows that lie in one image:
/// `block` is the first row's position in it.
template <class F>
void by_image(const Patches& patches, const PatchBlock& block, const F& f) {
  const int64_t rows_of_image = patches.height.positions * patches.width.positions;
  for (int64_t row = block.row; row < block.row + block.rows;) {
    const int64_t image = row / rows_of_image, position = row % rows_of_image;
    const int64_t rows = std::min(rows_of_image - position, block.row + block.rows - row);
    f(rows, (row - block.row) * block.stride,
      image * patches.image_step + block.col * patches.channel_step + position);
    row += rows;
  }
}

template <class T>
void gather(const Patches& patches, const T* images, const PatchBlock& block) {
  auto* data = static_cast<T*>(block.data);
  if (is_transposed(patches)) {
    return by_image(patches, block, [&](int64_t rows, int64_t element, int64_t pixel) {
      transpose(block.cols, rows, images + pixel, patches.channel_step, data + element,
                block.stride);
    });
  }
  for (int64_t r = 0; r < block.rows; ++r) {
    T* out = data + r * block.stride;
    walk_row(
        patches, block.row + r, block.col, block.cols,
        [&](int64_t k, int64_t pixel) { out[k] = images[pixel]; },
        [&](int64_t k) { out[k] = T{}; });
  }
}

template <class T>
void scatter_positions(const Patches& patches, const PatchBlock& block, T* images) {
  const auto* data = static_cast<const T*>(block.data);
  if (is_transposed(patches)) {
    return by_image(patches, block, [&](int64_t rows, int64_t element, int64_t pixel) {
      transpose(rows, block.cols, data + element, block.stride, images + pixel,
                patches.channel_step);
    });
  }
  for (int64_t r = 0; r < block.rows; ++r) {
    const T* from = data + r * block.stride;
    walk_row(
        patches, block.row + r, block.col, block.cols,
        [&](int64_t k, int64_t pixel) { images[pixel] = from[k]; }, [](int64_t) {});
  }
}

template <class T>
void add_patches(const Patches& patches, const PatchBlock& block, T* images) {
  for (int64_t r = 0; r < block.rows; ++r) {
    const T* from = static_cast<const T*>(block.data) + r * block.stride;
    walk_row(
        patches, block.row + r, block.col, block.cols,
        [&](int64_t k, int64_t pixel) { images[pixel] += from[k]; }, [](int64_t) {});
  }
}

/// Calls `f` with a number type of the element's size: for what only moves elements.
template <class F>
void with_element_type(int element_size, const F& f) {
  if (element_size == 2) return f(uint16_t{});
  if (element_size == 4) return f(uint32_t{});
  f(uint64_t{});
}

}  // namespace

void gather_patches_kernel(const Patches& patches, const void* images, int element_size,
                           const PatchBlock& block) {
  with_element_type(element_size,
                    [&]<class T>(T) { gather(patches, static_cast<const T*>(images), block); });
}

void scatter_positions_kernel(const Patches& patches, const PatchBlock& block, int element_size,
                              void* images) {
  with_element_type(element_size, [&]<class T>(T) {
    scatter_positions(patches, block, static_cast<T*>(images));
  });
}

void add_patches_kernel(const Patches& patches, const PatchBlock& block, DType dtype,
                        void* images) {
  if (dtype == DType::kFloat64) {
    add_patches(patches, block, static_cast<double*>(images));
  } else {
    add_patches(patches, block, static_cast<float*>(images));
  }
}

HFH_NAMESPACE_END
