#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/matrix_unit_tiles.h"

HFH_NAMESPACE_BEGIN

namespace {

using cpu::PaddedImages;

int64_t whole_steps(int64_t size) { return (size + kStep - 1) / kStep * kStep; }

/// The transpose of kTile rows of `size` floats, or the inverse, by squares.
void turn(const float* source, int64_t source_stride, int64_t source_step, float* target,
          int64_t target_stride, int64_t target_step, int64_t size) {
  for (int64_t i = 0; i < size; i += kTile) {
    transpose_square(source + i * source_step, source_stride, target + i * target_step,
                     target_stride);
  }
}

/// Images of which kTile channels are laid out with their zeros, one image at a time.
class Padded {
 public:
  Padded(const PaddedImages& images, float* scratch)
      : images_(images), size_(whole_steps(images.image_pixels() + kTile)), scratch_(scratch) {}

  /// Pixels of an image and zeros behind it.
  int64_t size() const { return size_; }

  /// Channel by channel, `size()` floats each.
  const float* channel_rows(int64_t image, int64_t channel, float* target) {
    if (images_.pixel_step == 1) {
      read_rows(image, channel, target);
    } else {
      read_pixels(image, channel, scratch_);
      turn(scratch_, kTile, kTile, target, size_, 1, size_);
    }
    return target;
  }

  /// Pixel by pixel, kTile floats each.
  const float* pixel_rows(int64_t image, int64_t channel, float* target) {
    if (images_.pixel_step != 1) {
      read_pixels(image, channel, target);
    } else {
      read_rows(image, channel, scratch_);
      turn(scratch_, size_, 1, target, kTile, kTile, size_);
    }
    return target;
  }

 private:
  void read_rows(int64_t image, int64_t channel, float* target) const {
    std::fill_n(target, kTile * size_, 0.0f);
    const int64_t count = std::min(kTile, images_.channels - channel);
    for (int64_t c = 0; c < count; ++c) {
      const float* source =
          images_.data + image * images_.image_step + (channel + c) * images_.channel_step;
      float* row = target + c * size_ + images_.top * images_.pitch + images_.left;
      for (int64_t y = 0; y < images_.height; ++y) {
        for (int64_t x = 0; x < images_.width; x += kTile) {
          const __mmask16 lanes = first_lanes(images_.width - x);
          _mm512_mask_storeu_ps(row + x, lanes, (__m512)load_lanes(lanes, source + x));
        }
        source += images_.row_step;
        row += images_.pitch;
      }
    }
  }

  void read_pixels(int64_t image, int64_t channel, float* target) const {
    std::fill_n(target, kTile * size_, 0.0f);
    const __mmask16 lanes = first_lanes(images_.channels - channel);
    const float* source = images_.data + image * images_.image_step + channel;
    for (int64_t y = 0; y < images_.height; ++y) {
      float* row = target + ((images_.top + y) * images_.pitch + images_.left) * kTile;
      for (int64_t x = 0; x < images_.width; ++x) {
        store(row + x * kTile,
              load_lanes(lanes, source + y * images_.row_step + x * images_.pixel_step));
      }
    }
  }

  const PaddedImages& images_;
  int64_t size_;
  float* scratch_;
};

/// The first and the second elements of an image's pairs, kTile for each pixel.
struct Halves {
  const float *first, *second;
};

/// Packs a row of pairs for each pixel, image by image, and zeros behind the last.
template <class F>
void pack_pairs(const PaddedImages& images, void* packed, const F& halves_of) {
  const int64_t piece_bytes = cpu::MatrixUnit::piece_bytes(images);
  auto* target = static_cast<char*>(packed);
  for (int64_t image = 0; image < images.num_images; ++image) {
    const Halves halves = halves_of(image);
    for (int64_t i = 0; i < images.image_pixels() * kTile; i += kTile, target += kRowBytes) {
      const Pairs pairs =
          split(load<FloatVector>(halves.first + i), load<FloatVector>(halves.second + i));
      for (int p = 0; p < kPieces; ++p) store(target + p * piece_bytes, pairs.piece[p]);
    }
  }
  char* end = static_cast<char*>(packed) + piece_bytes;
  for (int p = 0; p < kPieces; ++p) std::fill(target + p * piece_bytes, end + p * piece_bytes, 0);
}

/// Sixteen floats `step` apart, those of the lanes.
FloatVector gather_lanes(__mmask16 lanes, const float* source, int64_t step) {
  if (step == 1) return load_lanes(lanes, source);
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_mullo_epi32(first, _mm512_set1_epi32(static_cast<int>(step)));
  return (FloatVector)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, index, source, 4);
}

}  // namespace

void pack_channel_pairs(const PaddedImages& images, int64_t channel, void* packed, float* scratch) {
  Padded padded(images, scratch);
  const int64_t half = kTile * padded.size();
  float* pixels = scratch + half;
  pack_pairs(images, packed, [&](int64_t image) {
    padded.pixel_rows(image, channel, pixels);
    padded.pixel_rows(image, channel + kTile, pixels + half);
    return Halves{pixels, pixels + half};
  });
}

void pack_pixel_pairs(const PaddedImages& images, int64_t channel, void* packed, float* scratch) {
  Padded padded(images, scratch);
  float* pixels = scratch + kTile * padded.size();
  // What follows an image counts as zero: only pixels that do not matter have more behind them.
  pack_pairs(images, packed, [&](int64_t image) {
    padded.pixel_rows(image, channel, pixels);
    return Halves{pixels, pixels + kTile * kTile};
  });
}

void pack_pixels(const PaddedImages& images, int64_t image, int64_t channel, void* packed,
                 float* scratch) {
  Padded padded(images, scratch);
  const float* rows = padded.channel_rows(image, channel, scratch + kTile * padded.size());
  auto* target = static_cast<char*>(packed);
  for (int64_t k = 0; k < images.image_pixels(); k += kStep, target += kPieces * kTileBytes) {
    const auto load_row = [&](int64_t row, int half) {
      return load<FloatVector>(rows + row * padded.size() + k + half * kTile);
    };
    pack_tile<false>(load_row, target);
  }
}

void pack_taps(bool is_transposed, const float* source, int64_t stride, int64_t cols,
               int64_t channels, int64_t taps, void* packed) {
  alignas(64) float turned[kStep * cpu::MatrixUnit::kMaxTaps * kTile];
  auto* target = static_cast<char*>(packed);
  for (int64_t c = 0; c < channels; c += kStep) {
    const int64_t count = std::min(kStep, channels - c);
    if (!is_transposed) turn(source + c * taps, stride, 1, turned, kTile, kTile, count * taps);
    for (int64_t tap = 0; tap < taps; ++tap, target += kPieces * kTileBytes) {
      const auto load_row = [&](int64_t row, int half) {
        const int64_t channel = row + half * kTile;
        if (channel >= count) return FloatVector{};
        return is_transposed
                   ? gather_lanes(first_lanes(cols), source + (c + channel) * stride + tap, taps)
                   : load<FloatVector>(turned + (channel * taps + tap) * kTile);
      };
      pack_tile<false>(load_row, target);
    }
  }
}

void transpose(const float* source, int64_t rows, int64_t cols, float* target, int64_t stride) {
  alignas(64) float square[kTile][kTile], turned[kTile][kTile];
  for (int64_t i = 0; i < rows; i += kTile) {
    for (int64_t j = 0; j < cols; j += kTile) {
      const __mmask16 down = first_lanes(rows - i), across = first_lanes(cols - j);
      for (int64_t k = 0; k < kTile; ++k) {
        store(square[k], load_lanes(i + k < rows ? across : 0, source + (i + k) * cols + j));
      }
      transpose_square(square[0], kTile, turned[0], kTile);
      for (int64_t k = 0; k < kTile && j + k < cols; ++k) {
        _mm512_mask_storeu_ps(target + (j + k) * stride + i, down, _mm512_load_ps(turned[k]));
      }
    }
  }
}

HFH_NAMESPACE_END
