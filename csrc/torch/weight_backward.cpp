#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>

#include "torch/gemm.h"
#include "torch/matrix_unit.h"
#include "torch/matrix_unit_convolution.h"
#include "torch/packed_convolution.h"
#include "torch/panels.h"
#include "torch/parallel.h"
#include "torch/pool_gradient.h"
#include "torch/slot_products.h"

namespace hfh::torch_ops {

namespace {

using cpu::kernels;
using cpu::TileBounds;

// Tiles of the weight's gradient; where they list what they add to the pool, the list's bound.
constexpr int64_t kTileCols = cpu::GradientTile::kCols, kTileRows = cpu::GradientTile::kRows;
constexpr int64_t kContributionBytes = 5 << 17;

DType kernel_dtype(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? DType::kBFloat16
         : dtype == at::kFloat  ? DType::kFloat32
                                : DType::kFloat64;
}

/// One tile in flight, with its gradient where that is a product.
struct TileWork : PoolWork {
  at::Tensor gradient;
};

/// Where tiles of a weight's gradient come from: the gradient itself.
class GivenGradient {
 public:
  explicit GivenGradient(const at::Tensor& gradient) : matrix_(matrix_of(gradient)) {}

  at::ScalarType dtype() const { return matrix_.dtype; }
  int64_t tile_cols() const { return kTileCols; }
  bool is_product() const { return false; }
  void select_columns(int64_t, int64_t) {}
  Matrix tile(const TileBounds& tile, at::Tensor&) {
    return matrix_.slice(tile.row, tile.rows, tile.col, tile.cols);
  }

 private:
  Matrix matrix_;
};

/// grad_output^T input, through the platform's GEMM.
class ProductGradient {
 public:
  ProductGradient(const at::Tensor& grad_output, const at::Tensor& input)
      : grad_output_(matrix_of(grad_output)), input_(matrix_of(input)) {}

  at::ScalarType dtype() const { return input_.dtype; }
  int64_t tile_cols() const { return kTileCols; }
  bool is_product() const { return true; }
  void select_columns(int64_t, int64_t) {}
  Matrix tile(const TileBounds& tile, at::Tensor& storage) {
    const Matrix product = matrix_of(storage).slice(0, tile.rows, 0, tile.cols);
    gemm(grad_output_.slice(0, input_.rows, tile.row, tile.rows).transposed(),
         input_.slice(0, input_.rows, tile.col, tile.cols), product, false);
    return product;
  }

 private:
  Matrix grad_output_, input_;
};

/// grad_output^T input of bfloat16, in float32.
class BFloat16Product {
 public:
  BFloat16Product(const at::Tensor& grad_output, const at::Tensor& input)
      : args_{static_cast<const BFloat16*>(grad_output.const_data_ptr()),
              static_cast<const BFloat16*>(input.const_data_ptr()), input.size(0),
              grad_output.size(1), input.size(1)} {}

  at::ScalarType dtype() const { return at::kFloat; }
  int64_t tile_cols() const { return kTileCols; }
  bool is_product() const { return true; }
  void select_columns(int64_t, int64_t) {}
  Matrix tile(const TileBounds& tile, at::Tensor& storage) {
    const Matrix product = matrix_of(storage).slice(0, tile.rows, 0, tile.cols);
    kernels().weight_gradient_bfloat16(
        args_, tile, static_cast<float*>(product.data), product.row_stride,
        Scratch<Purpose::kPanels>::get(kernels().bfloat16_scratch()));
    return product;
  }

 private:
  cpu::BFloat16Gradient args_;
};

/// grad_output^T input, on the matrix unit.
class MatrixUnitProduct {
 public:
  MatrixUnitProduct(const at::Tensor& grad_output, const at::Tensor& input)
      : plain_(grad_output, input),
        unit_(grad_output.const_data_ptr<float>(), grad_output.size(1),
              input.const_data_ptr<float>(), input.size(1), input.size(0)) {}

  at::ScalarType dtype() const { return at::kFloat; }
  int64_t tile_cols() const { return kTileCols; }
  bool is_product() const { return true; }
  void select_columns(int64_t col, int64_t cols) { unit_.select_columns(col, cols); }
  Matrix tile(const TileBounds& tile, at::Tensor& storage) {
    const Matrix product = matrix_of(storage).slice(0, tile.rows, 0, tile.cols);
    const bool done =
        unit_.multiply(tile.row, tile.rows, static_cast<float*>(product.data), product.row_stride);
    return done ? product : plain_.tile(tile, storage);
  }

 private:
  ProductGradient plain_;
  MatrixUnitGradient unit_;
};

/// A convolution's, on the matrix unit.
class ConvolutionProduct {
 public:
  explicit ConvolutionProduct(ConvolutionGradient unit) : unit_(std::move(unit)) {}

  at::ScalarType dtype() const { return at::kFloat; }
  int64_t tile_cols() const { return unit_.tile_cols(); }
  bool is_product() const { return true; }
  void select_columns(int64_t col, int64_t cols) { unit_.select_columns(col, cols); }
  Matrix tile(const TileBounds& tile, at::Tensor& storage) {
    const Matrix product = matrix_of(storage).slice(0, tile.rows, 0, tile.cols);
    if (!unit_.multiply(tile.row, tile.rows, static_cast<float*>(product.data),
                        product.row_stride)) {
      finite_ = false;
    }
    return product;
  }
  bool finite() const { return finite_; }

 private:
  ConvolutionGradient unit_;
  std::atomic<bool> finite_ = true;
};

/// The same of a 1 x 1 convolution of many images: summed over all of them before what follows,
/// which would else be done for each stretch of images.
class SummedConvolution {
 public:
  SummedConvolution(const Convolution& convolution, const at::Tensor& grad_output,
                    const at::Tensor& input)
      : convolution_(convolution),
        grad_output_(grad_output),
        input_(input),
        sum_(at::empty({grad_output.size(1), input.size(1)}, at::dtype(at::kFloat))) {}

  static bool fits(const Convolution& convolution, const at::Tensor& input) {
    const auto& kernel = convolution.kernel_size;
    return kernel[0] * kernel[1] == 1 && convolution.out_channels * input.size(1) <= kSumElements;
  }

  at::ScalarType dtype() const { return at::kFloat; }
  int64_t tile_cols() const { return input_.size(1); }
  bool is_product() const { return false; }
  void select_columns(int64_t col, int64_t cols) {
    const Matrix sum = matrix_of(sum_.zero_());
    const int64_t at_once = ConvolutionGradient::images_at_once(convolution_, input_);
    for (int64_t image = 0; image < input_.size(0); image += at_once) {
      const int64_t count = std::min(at_once, input_.size(0) - image);
      ConvolutionGradient part(convolution_, grad_output_.narrow(0, image, count),
                               input_.narrow(0, image, count));
      part.select_columns(col, cols);
      parallel_stretches(sum_.size(0), kTileRows, [&](int64_t begin, int64_t end) {
        const Matrix rows = sum.slice(begin, end - begin, 0, cols);
        if (!part.add_product(begin, end - begin, static_cast<float*>(rows.data),
                              rows.row_stride)) {
          finite_ = false;
        }
      });
    }
  }
  Matrix tile(const TileBounds& tile, at::Tensor&) {
    return matrix_of(sum_).slice(tile.row, tile.rows, tile.col, tile.cols);
  }
  bool finite() const { return finite_; }

 private:
  // A megabyte.
  static constexpr int64_t kSumElements = 1 << 18;

  const Convolution& convolution_;
  at::Tensor grad_output_, input_, sum_;
  std::atomic<bool> finite_ = true;
};

/// A convolution's, in packed products.
class PackedConvolution {
 public:
  explicit PackedConvolution(PackedGradient gradient) : gradient_(std::move(gradient)) {}

  at::ScalarType dtype() const { return at::kFloat; }
  int64_t tile_cols() const { return gradient_.cols_at_once(); }
  bool is_product() const { return false; }
  void select_columns(int64_t col, int64_t cols) {
    gradient_.select_columns(col, cols);
    cols_ = cols;
  }
  Matrix tile(const TileBounds& tile, at::Tensor&) {
    return {gradient_.sum() + tile.row * cols_, tile.rows, cols_, cols_, 1, at::kFloat};
  }

 private:
  PackedGradient gradient_;
  int64_t cols_ = 0;
};

/// The tiles of a weight's gradient, and the work on each of them: those of one column of tiles at
/// a time, for whatever a source of tiles prepares for them all.
template <class Source>
class BackwardTiles {
 public:
  using Work = TileWork;

  BackwardTiles(const CheckedWeight& weight, Source& source)
      : weight_(weight), source_(source), tile_cols_(std::min(source.tile_cols(), weight.cols())) {
    const int64_t threads = at::get_num_threads();
    tile_rows_ = std::min(kTileRows, (weight.rows() + threads - 1) / threads);
  }

  /// Makes tiles that list what they add to the pool.
  void list_contributions() {
    kernels().contribution_bounds(weight_.get(), {0, 1, 0, tile_cols_}, &row_entries_,
                                  &row_values_);
    const int64_t row_bytes = row_entries_ * static_cast<int64_t>(sizeof(uint32_t)) +
                              row_values_ * element_size(weight_.compute_dtype());
    tile_rows_ = std::min(tile_rows_, std::max<int64_t>(1, kContributionBytes / row_bytes));
  }

  int64_t num_columns() const { return (weight_.cols() + tile_cols_ - 1) / tile_cols_; }
  /// Of each column.
  int64_t count() const { return (weight_.rows() + tile_rows_ - 1) / tile_rows_; }

  void select_column(int64_t column) {
    col_ = column * tile_cols_;
    cols_ = std::min(tile_cols_, weight_.cols() - col_);
    source_.select_columns(col_, cols_);
  }

  ListBounds bounds() const { return {tile_rows_ * row_entries_, tile_rows_ * row_values_}; }

  TileWork make_work() const {
    TileWork work;
    if (source_.is_product()) {
      work.gradient = at::empty({tile_rows_, tile_cols_}, at::dtype(source_.dtype()));
    }
    return work;
  }

  /// Adds what tile `index` of the column means for the pool to `work.contributions`, and for g to
  /// `work.grad_theta`.
  void run(int64_t index, TileWork& work) const {
    const int64_t row = index * tile_rows_;
    const TileBounds tile{row, std::min(tile_rows_, weight_.rows() - row), col_, cols_};
    const Matrix gradient = source_.tile(tile, work.gradient);
    kernels().backward(weight_.get(), tile, gradient.data, kernel_dtype(source_.dtype()),
                       gradient.row_stride, work.grad_theta.data(), &work.contributions);
  }

 private:
  const CheckedWeight& weight_;
  Source& source_;
  int64_t tile_cols_, tile_rows_, row_entries_ = 0, row_values_ = 0;
  int64_t col_ = 0, cols_ = 0;
};

/// Adds what the gradients of V that `source` has mean for the pool and g.
template <class Source>
void add_backward(const CheckedWeight& weight, Source& source, WeightGradients& result) {
  if (weight.rows() == 0 || weight.cols() == 0) return;
  BackwardTiles<Source> tiles(weight, source);
  add_pool_gradient(weight, tiles, result);
}

}  // namespace

WeightGradients zero_gradients(const CheckedWeight& weight) {
  const HashParams& hash = weight.get().hash;
  const int64_t pool_size = int64_t{hash.num_slots} << hash.log2_block;
  return {at::zeros({pool_size}, at::dtype(weight.compute_dtype())),
          std::vector<double>(weight.theta_size(), 0.0)};
}

void add_weight_backward(const CheckedWeight& weight, const at::Tensor& gradient,
                         WeightGradients& sum) {
  GivenGradient source(gradient);
  add_backward(weight, source, sum);
}

void add_weight_backward(const CheckedWeight& weight, const at::Tensor& grad_output,
                         const at::Tensor& input, WeightGradients& sum) {
  if (input.scalar_type() == at::kFloat) {
    const cpu::LinearBatch args{input.const_data_ptr<float>(),
                                nullptr,
                                nullptr,
                                input.size(0),
                                weight.cols(),
                                weight.rows()};
    if (slot_products_backward_weight(weight.get(), args, grad_output.const_data_ptr<float>(),
                                      sum.pool.mutable_data_ptr<float>(), sum.theta)) {
      return;
    }
  }
  const int64_t batch = input.size(0);
  const bool is_bfloat16 = input.scalar_type() == at::kBFloat16;
  if (is_bfloat16 &&
      prefers_slots_backward_weight_bfloat16(weight.get(), weight.rows(), weight.cols(), batch)) {
    return for_each_float_part(weight, batch, [&](int64_t begin, int64_t end) {
      add_weight_backward(weight, grad_output.slice(0, begin, end).to(at::kFloat),
                          input.slice(0, begin, end).to(at::kFloat), sum);
    });
  }
  if (is_bfloat16 && !prefers_platform_bfloat16(batch)) {
    BFloat16Product source(grad_output, input);
    return add_backward(weight, source, sum);
  }
  if (input.scalar_type() != at::kFloat || !prefers_matrix_unit(batch)) {
    ProductGradient source(grad_output, input);
    return add_backward(weight, source, sum);
  }
  for (int64_t m = 0; m < batch; m += MatrixUnitGradient::kMaxBatch) {
    const int64_t count = std::min(MatrixUnitGradient::kMaxBatch, batch - m);
    MatrixUnitProduct source(grad_output.narrow(0, m, count), input.narrow(0, m, count));
    add_backward(weight, source, sum);
  }
}

bool add_matrix_unit_backward_weight(const Convolution& convolution, const CheckedWeight& weight,
                                     const at::Tensor& grad_output, const at::Tensor& input,
                                     WeightGradients& sum) {
  const int64_t at_once = ConvolutionGradient::images_at_once(convolution, input);
  if (at_once < input.size(0) && SummedConvolution::fits(convolution, input)) {
    SummedConvolution source(convolution, grad_output, input);
    add_backward(weight, source, sum);
    return source.finite();
  }
  for (int64_t image = 0; image < input.size(0); image += at_once) {
    const int64_t count = std::min(at_once, input.size(0) - image);
    ConvolutionProduct source(
        {convolution, grad_output.narrow(0, image, count), input.narrow(0, image, count)});
    add_backward(weight, source, sum);
    if (!source.finite()) return false;
  }
  return true;
}

void add_packed_backward_weight(const WeightSource& source, const PatchMatrix& grad_output,
                                const PatchMatrix& patches, WeightGradients& sum) {
  // Rows whose gradients are held at once.
  constexpr int64_t kRowsAtOnce = 512;
  for (int64_t first = 0; first < grad_output.cols(); first += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, grad_output.cols() - first);
    PackedConvolution gradient({grad_output, first, rows, patches});
    add_backward(source.part(first, 0, rows, patches.cols()), gradient, sum);
  }
}

}  // namespace hfh::torch_ops
