// Linear layers with Gaussian weights on CUDA devices.
//
//     weight: out = x Wᵀ + b, W = mean + s · noise        local: out = x meanᵀ + bias_mean + √(x² (s²)ᵀ + s_b²) · noise
//
// One kernel computes every product, forward and backward (the formulas are in cpu.inl): a block of 256 threads owns
// 128 × 64 results, 8 × 4 a thread, and walks the depth in steps through shared memory. The operands are what differs:
// a weight is generated while its tile is loaded, four neighbours from one Philox block, and exists nowhere else; the
// noise of an output is generated when it is stored. Two products of the same shape (mean and variance) share a pass.
//
// Sums run along the depth within one thread: results are bitwise repeatable, and there are no atomics.

#include <type_traits>

#include "bayes/kernels.h"
#include "core/launch.cuh"
#include "core/normal.cuh"
#include "core/philox.h"

namespace isthmus::cuda {
namespace {

constexpr int threads_per_block = 256;
constexpr int quad = 4;  // neighbouring elements that a thread loads, generates or stores together
constexpr int block_rows = 128, block_cols = 64;
constexpr int rows_per_thread = block_rows * block_cols / threads_per_block / quad;
template <class C>
constexpr int block_depth = sizeof(C) == sizeof(double) ? 8 : 16;  // two terms fit into 48 KB

// ---- noise ---------------------------------------------------------------------------------------------------------

struct Key {
  uint64_t seed, offset;
  __device__ __forceinline__ explicit Key(const int64_t* words)
      : seed(static_cast<uint64_t>(words[0])), offset(static_cast<uint64_t>(words[1])) {}

  // fold_in(key, 1): block 1 of the key's own words.
  __device__ __forceinline__ Key child() const {
    const Words w = philox(seed, offset + 1);
    return {w.w[0] | static_cast<uint64_t>(w.w[1]) << 32, w.w[2] | static_cast<uint64_t>(w.w[3]) << 32};
  }

 private:
  __device__ __forceinline__ Key(uint64_t seed_, uint64_t offset_) : seed(seed_), offset(offset_) {}
};

// Normals first, first + 1, … of the key. If they begin within a Philox block, one block more is needed. A call costs
// little beside some 250 instructions, which inlined into every row of a block would make the kernels huge.
template <class C>
__device__ __noinline__ void normals(const Key& key, int64_t first, C (&out)[quad]) {
  constexpr int per_block = 16 / sizeof(C), blocks = quad / per_block + 1;
  const int shift = static_cast<int>(first % per_block);
  C values[blocks][per_block];
#pragma unroll
  for (int b = 0; b < blocks; ++b) {
    if (b + 1 < blocks || shift != 0) {
      normal_block(key.seed, key.offset + static_cast<uint64_t>(first / per_block + b), values[b]);
    }
  }
#pragma unroll
  for (int s = 0; s < per_block; ++s) {
    if (shift == s) {
#pragma unroll
      for (int i = 0; i < quad; ++i) out[i] = values[(i + s) / per_block][(i + s) % per_block];
    }
  }
}

// ---- scales --------------------------------------------------------------------------------------------------------

// The scale type is a run-time value here: the branch is the same for all threads and its cost that of a comparison,
// while every kernel, large as they are, is compiled once instead of four times.
template <class C>
__device__ __forceinline__ C std_of(ScaleType type, C scale) {
  switch (type) {
    case ScaleType::logvar:
      return std_of<ScaleType::logvar>(scale);
    case ScaleType::std:
      return std_of<ScaleType::std>(scale);
    case ScaleType::softplus:
      return std_of<ScaleType::softplus>(scale);
    case ScaleType::square:
      return std_of<ScaleType::square>(scale);
  }
  return C(0);
}

template <class C>
__device__ __forceinline__ C std_slope(ScaleType type, C scale) {
  switch (type) {
    case ScaleType::logvar:
      return std_slope<ScaleType::logvar>(scale);
    case ScaleType::std:
      return std_slope<ScaleType::std>(scale);
    case ScaleType::softplus:
      return std_slope<ScaleType::softplus>(scale);
    case ScaleType::square:
      return std_slope<ScaleType::square>(scale);
  }
  return C(0);
}

// ---- operands ------------------------------------------------------------------------------------------------------

// A row-major [lines, length] matrix. As an operand of a product its lines run along the depth, or across it.
template <class T>
struct Matrix {
  using C = Compute<T>;

  const T* data;
  int64_t lines, length;
  bool aligned;  // quads can be loaded in one access

  Matrix(const void* data_, int64_t lines_, int64_t length_)
      : data(static_cast<const T*>(data_)),
        lines(lines_),
        length(length_),
        aligned(length % quad == 0 && reinterpret_cast<uintptr_t>(data) % sizeof(Pack<T, quad>) == 0) {}

  __device__ __forceinline__ bool inside(int64_t line, int64_t at) const { return line < lines && at < length; }

  // Zeros outside of the matrix.
  __device__ __forceinline__ void load(int64_t line, int64_t at, C (&out)[quad]) const {
    const T* from = data + line * length + at;
    if (aligned && inside(line, at)) {
      const auto pack = *reinterpret_cast<const Pack<T, quad>*>(from);
#pragma unroll
      for (int i = 0; i < quad; ++i) out[i] = to_compute(pack.values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < quad; ++i) out[i] = inside(line, at + i) ? to_compute(from[i]) : C(0);
    }
  }
};

template <class T, bool AlongDepth>
struct Values {
  static constexpr bool along_depth = AlongDepth;
  Matrix<T> matrix;

  __device__ __forceinline__ void load(int64_t line, int64_t at, Compute<T> (&out)[quad]) const {
    matrix.load(line, at, out);
  }
};

template <class T, bool AlongDepth>
struct Squares {
  static constexpr bool along_depth = AlongDepth;
  Matrix<T> matrix;

  __device__ __forceinline__ void load(int64_t line, int64_t at, Compute<T> (&out)[quad]) const {
    matrix.load(line, at, out);
#pragma unroll
    for (int i = 0; i < quad; ++i) out[i] *= out[i];
  }
};

// W = mean + s · noise
template <class T, bool AlongDepth>
struct Weights {
  static constexpr bool along_depth = AlongDepth;
  Matrix<T> mean, scale;
  ScaleType scale_type;
  const int64_t* key;

  __device__ __forceinline__ void load(int64_t line, int64_t at, Compute<T> (&out)[quad]) const {
    mean.load(line, at, out);
    if (!mean.inside(line, at)) return;
    Compute<T> s[quad], noise[quad];
    scale.load(line, at, s);
    normals(Key(key), line * mean.length + at, noise);
#pragma unroll
    for (int i = 0; i < quad; ++i) {
      if (mean.inside(line, at + i)) out[i] += std_of(scale_type, s[i]) * noise[i];
    }
  }
};

// s²
template <class T, bool AlongDepth>
struct Variances {
  static constexpr bool along_depth = AlongDepth;
  Matrix<T> scale;
  ScaleType scale_type;

  __device__ __forceinline__ void load(int64_t line, int64_t at, Compute<T> (&out)[quad]) const {
    scale.load(line, at, out);
#pragma unroll
    for (int i = 0; i < quad; ++i) {
      const auto s = std_of(scale_type, out[i]);
      out[i] = scale.inside(line, at + i) ? s * s : Compute<T>(0);
    }
  }
};

// ---- the product ---------------------------------------------------------------------------------------------------

// left · right; a problem has one term or two.
template <class Left_, class Right_>
struct Term {
  using Left = Left_;
  using Right = Right_;
  Left left;
  Right right;
};

// Padding keeps quads aligned and spreads the columns that a transposing load writes over the banks.
template <class C, int Lines>
using SharedTile = C[block_depth<C>][Lines + quad];

// tile[k][line] = operand at depth first_k + k and line first_line + line.
template <int Lines, class C, class Operand>
__device__ __forceinline__ void load_tile(const Operand& operand, int64_t first_line, int64_t first_k,
                                          SharedTile<C, Lines>& tile) {
  constexpr int depth = block_depth<C>, quads = Lines * depth / quad;
  for (int q = threadIdx.x; q < quads; q += threads_per_block) {
    C values[quad];
    if constexpr (Operand::along_depth) {
      const int line = q / (depth / quad), k = q % (depth / quad) * quad;
      operand.load(first_line + line, first_k + k, values);
#pragma unroll
      for (int i = 0; i < quad; ++i) tile[k + i][line] = values[i];
    } else {
      const int k = q / (Lines / quad), line = q % (Lines / quad) * quad;
      operand.load(first_k + k, first_line + line, values);
#pragma unroll
      for (int i = 0; i < quad; ++i) tile[k][line + i] = values[i];
    }
  }
}

template <class C>
struct SharedTerm {
  SharedTile<C, block_rows> left;
  SharedTile<C, block_cols> right;

  template <class AnyTerm>
  __device__ __forceinline__ void load(const AnyTerm& term, int64_t row, int64_t col, int64_t k) {
    load_tile<block_rows, C>(term.left, row, k, left);
    load_tile<block_cols, C>(term.right, col, k, right);
  }

  __device__ __forceinline__ void multiply(int row, int col, C (&sums)[rows_per_thread][quad]) const {
#pragma unroll 4
    for (int k = 0; k < block_depth<C>; ++k) {
#pragma unroll
      for (int r = 0; r < rows_per_thread; ++r) {
#pragma unroll
        for (int c = 0; c < quad; ++c) sums[r][c] += left[k][row + r] * right[k][col + c];
      }
    }
  }
};

// Problem: C, terms, rows, depth, cols; first and, with two terms, second; columns(col) makes what the results of four
// columns have in common; finish(row, col, columns, values[terms][4]) stores them.
template <class Problem>
__global__ void __launch_bounds__(threads_per_block) multiply(Problem problem) {
  using C = typename Problem::C;
  constexpr int terms = Problem::terms;
  __shared__ __align__(16) SharedTerm<C> shared[terms];
  const int64_t blocks_per_row = (problem.cols + block_cols - 1) / block_cols;
  const int64_t first_row = blockIdx.x / blocks_per_row * block_rows;
  const int64_t first_col = blockIdx.x % blocks_per_row * block_cols;
  const int row = threadIdx.x / (block_cols / quad) * rows_per_thread, col = threadIdx.x % (block_cols / quad) * quad;

  C sums[terms][rows_per_thread][quad] = {};
  for (int64_t k = 0; k < problem.depth; k += block_depth<C>) {
    shared[0].load(problem.first, first_row, first_col, k);
    if constexpr (terms == 2) shared[1].load(problem.second, first_row, first_col, k);
    __syncthreads();
#pragma unroll
    for (int t = 0; t < terms; ++t) shared[t].multiply(row, col, sums[t]);
    __syncthreads();
  }

  if (first_col + col >= problem.cols) return;
  const auto columns = problem.columns(first_col + col);
#pragma unroll
  for (int r = 0; r < rows_per_thread; ++r) {
    if (first_row + row + r >= problem.rows) return;
    C values[terms][quad];
#pragma unroll
    for (int t = 0; t < terms; ++t) {
#pragma unroll
      for (int c = 0; c < quad; ++c) values[t][c] = sums[t][r][c];
    }
    problem.finish(first_row + row + r, first_col + col, columns, values);
  }
}

template <class Problem>
void run(const char* name, const Problem& problem, void* stream) {
  const int64_t blocks = divide_up(problem.rows, block_rows) * divide_up(problem.cols, block_cols);
  launch(name, multiply<Problem>, blocks, threads_per_block, 0, stream, problem);
}

// ---- forward -------------------------------------------------------------------------------------------------------

template <Estimator E, class Weight, class Local>
using Choose = typename std::conditional<E == Estimator::weight, Weight, Local>::type;

// The bias of four features, and its variance for the local estimator.
template <class C>
struct Bias {
  C value[quad], variance[quad];
};

template <class T>
struct BiasParameters {
  const T *mean, *scale;  // null: no bias, or one that is not random
  ScaleType scale_type;
  int64_t features;
  const int64_t* key;

  __device__ __forceinline__ Bias<Compute<T>> load(int64_t feature, bool drawn) const {
    using C = Compute<T>;
    Bias<C> bias;
    C noise[quad] = {};
    if (drawn && scale != nullptr) normals(Key(key).child(), feature, noise);
#pragma unroll
    for (int i = 0; i < quad; ++i) {
      const bool inside = feature + i < features;
      const C s = inside && scale != nullptr ? std_of(scale_type, to_compute(scale[feature + i])) : C(0);
      bias.value[i] = inside && mean != nullptr ? to_compute(mean[feature + i]) : C(0);
      if (drawn) bias.value[i] += s * noise[i];
      bias.variance[i] = s * s;
    }
    return bias;
  }
};

template <class T, Estimator E>
struct Output {
  using C = Compute<T>;
  static constexpr int terms = E == Estimator::weight ? 1 : 2;
  static constexpr bool drawn = E == Estimator::weight;
  using Right = Choose<E, Weights<T, true>, Values<T, true>>;

  int64_t rows, depth, cols;
  const int64_t* key;
  T* out;
  BiasParameters<T> bias;
  Term<Values<T, true>, Right> first;
  Term<Squares<T, true>, Variances<T, true>> second;

  __device__ __forceinline__ Bias<C> columns(int64_t col) const { return bias.load(col, drawn); }

  __device__ __forceinline__ void finish(int64_t row, int64_t col, const Bias<C>& b,
                                         const C (&values)[terms][quad]) const {
    const int64_t element = row * cols + col;
    C noise[quad];
    if constexpr (!drawn) normals(Key(key), element, noise);
#pragma unroll
    for (int i = 0; i < quad; ++i) {
      if (col + i >= cols) return;
      C result = values[0][i] + b.value[i];
      if constexpr (!drawn) result += sqrt(values[terms - 1][i] + b.variance[i]) * noise[i];
      out[element + i] = from_compute<T>(result);
    }
  }
};

// The operand that is the weight: drawn, or its mean.
template <class T, Estimator E, bool AlongDepth, class Args>
auto weight_operand(const Args& args) {
  const Matrix<T> mean(args.weight_mean, args.features, args.inputs);
  const Matrix<T> scale(args.weight_scale, args.features, args.inputs);
  if constexpr (E == Estimator::weight) {
    return Weights<T, AlongDepth>{mean, scale, args.scale_type, args.key};
  } else {
    return Values<T, AlongDepth>{mean};
  }
}

template <class T, bool AlongDepth, class Args>
Variances<T, AlongDepth> variance_operand(const Args& args) {
  return {Matrix<T>(args.weight_scale, args.features, args.inputs), args.scale_type};
}

// ---- backward ------------------------------------------------------------------------------------------------------

struct Nothing {};

// h of the local estimator: what the gradient of an output is to its variance.
template <class T>
struct VarianceGradient {
  using C = Compute<T>;
  static constexpr int terms = 1;

  int64_t rows, depth, cols;
  const int64_t* key;
  const T* grad;
  C* h;
  BiasParameters<T> bias;
  Term<Squares<T, true>, Variances<T, true>> first;

  __device__ __forceinline__ Bias<C> columns(int64_t col) const { return bias.load(col, false); }

  __device__ __forceinline__ void finish(int64_t row, int64_t col, const Bias<C>& b,
                                         const C (&values)[terms][quad]) const {
    const int64_t element = row * cols + col;
    C noise[quad];
    normals(Key(key), element, noise);
#pragma unroll
    for (int i = 0; i < quad; ++i) {
      if (col + i >= cols) return;
      const C variance = values[0][i] + b.variance[i];
      const C slope = C(0.5) * to_compute(grad[element + i]) * noise[i] / sqrt(variance);
      h[element + i] = variance == C(0) ? C(0) : slope;
    }
  }
};

template <class T, Estimator E>
struct InputGradient {
  using C = Compute<T>;
  static constexpr int terms = E == Estimator::weight ? 1 : 2;
  using Right = Choose<E, Weights<T, false>, Values<T, false>>;

  int64_t rows, depth, cols;
  const T* x;
  T* grad_x;
  Term<Values<T, true>, Right> first;
  Term<Values<C, true>, Variances<T, false>> second;

  __device__ __forceinline__ Nothing columns(int64_t) const { return {}; }

  __device__ __forceinline__ void finish(int64_t row, int64_t col, Nothing, const C (&values)[terms][quad]) const {
    const int64_t element = row * cols + col;
#pragma unroll
    for (int i = 0; i < quad; ++i) {
      if (col + i >= cols) return;
      C g = values[0][i];
      if constexpr (terms == 2) g += C(2) * to_compute(x[element + i]) * values[1][i];
      grad_x[element + i] = from_compute<T>(g);
    }
  }
};

template <class T, Estimator E>
struct WeightGradient {
  using C = Compute<T>;
  static constexpr int terms = E == Estimator::weight ? 1 : 2;

  int64_t rows, depth, cols;
  const int64_t* key;
  const T* scale;
  ScaleType scale_type;
  T *grad_mean, *grad_scale;
  Term<Values<T, false>, Values<T, false>> first;
  Term<Values<C, false>, Squares<T, false>> second;

  __device__ __forceinline__ Nothing columns(int64_t) const { return {}; }

  __device__ __forceinline__ void finish(int64_t row, int64_t col, Nothing, const C (&values)[terms][quad]) const {
    const int64_t element = row * cols + col;
    C noise[quad];
    if constexpr (E == Estimator::weight) normals(Key(key), element, noise);
#pragma unroll
    for (int i = 0; i < quad; ++i) {
      if (col + i >= cols) return;
      const C sc = to_compute(scale[element + i]);
      C to_scale = std_slope(scale_type, sc);
      if constexpr (E == Estimator::weight) {
        to_scale *= values[0][i] * noise[i];
      } else {
        to_scale *= C(2) * std_of(scale_type, sc) * values[terms - 1][i];
      }
      grad_mean[element + i] = from_compute<T>(values[0][i]);
      grad_scale[element + i] = from_compute<T>(to_scale);
    }
  }
};

// A warp's lanes are 32 features, its warps share the rows: grad_bias_mean = Σ grad, and with a random bias
// grad_bias_scale = Σ grad · noise · ds/dscale (weight) or Σ h · 2s · ds/dscale (local).
template <class T, Estimator E>
__global__ void __launch_bounds__(threads_per_block)
    sum_bias_gradients(int64_t rows, int64_t features, const int64_t* key, const T* grad, const Compute<T>* h,
                       const T* scale, ScaleType scale_type, T* grad_mean, T* grad_scale) {
  using C = Compute<T>;
  constexpr int warps = threads_per_block / warp_size;
  __shared__ C grad_sums[warps][warp_size], h_sums[warps][warp_size];
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const int64_t feature = static_cast<int64_t>(blockIdx.x) * warp_size + lane;
  const bool inside = feature < features, use_h = E == Estimator::local && scale != nullptr;
  C grad_sum = 0, h_sum = 0;
  if (inside) {
    for (int64_t row = warp; row < rows; row += warps) {
      grad_sum += to_compute(grad[row * features + feature]);
      if (use_h) h_sum += h[row * features + feature];
    }
  }
  grad_sums[warp][lane] = grad_sum;
  h_sums[warp][lane] = h_sum;
  __syncthreads();
  if (warp != 0 || !inside) return;
  for (int w = 1; w < warps; ++w) {
    grad_sum += grad_sums[w][lane];
    h_sum += h_sums[w][lane];
  }
  grad_mean[feature] = from_compute<T>(grad_sum);
  if (scale == nullptr) return;
  const C sc = to_compute(scale[feature]), slope = std_slope(scale_type, sc);
  if constexpr (E == Estimator::local) {
    grad_scale[feature] = from_compute<T>(h_sum * C(2) * std_of(scale_type, sc) * slope);
  } else {
    C noise[quad];
    normals(Key(key).child(), feature, noise);
    grad_scale[feature] = from_compute<T>(grad_sum * noise[0] * slope);
  }
}

// Calls f<T, E>() for the dtype and the estimator of `args`.
template <class Args, class F>
void dispatch(const Args& args, F&& f) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    if (args.estimator == Estimator::weight) return f.template operator()<T, Estimator::weight>();
    f.template operator()<T, Estimator::local>();
  });
}

template <class T, Estimator E>
void backward(const BayesLinearBackward& args, void* stream) {
  using C = Compute<T>;
  const int64_t rows = args.rows, inputs = args.inputs, features = args.features;
  C* h = static_cast<C*>(args.workspace);
  const T *x = static_cast<const T*>(args.x), *grad = static_cast<const T*>(args.grad);
  const T *scale = static_cast<const T*>(args.weight_scale), *bias_scale = static_cast<const T*>(args.bias_scale);
  const Matrix<T> inputs_matrix(x, rows, inputs), grad_matrix(grad, rows, features);
  const Matrix<C> h_matrix(h, rows, features);
  if constexpr (E == Estimator::local) {
    const VarianceGradient<T> problem{rows,
                                      inputs,
                                      features,
                                      args.key,
                                      grad,
                                      h,
                                      {nullptr, bias_scale, args.scale_type, features, args.key},
                                      {{inputs_matrix}, variance_operand<T, true>(args)}};
    run("bayes_linear_backward: variance", problem, stream);
  }
  run("bayes_linear_backward: input",
      InputGradient<T, E>{rows,
                          features,
                          inputs,
                          x,
                          static_cast<T*>(args.grad_x),
                          {{grad_matrix}, weight_operand<T, E, false>(args)},
                          {{h_matrix}, variance_operand<T, false>(args)}},
      stream);
  run("bayes_linear_backward: weight",
      WeightGradient<T, E>{features,
                           rows,
                           inputs,
                           args.key,
                           scale,
                           args.scale_type,
                           static_cast<T*>(args.grad_weight_mean),
                           static_cast<T*>(args.grad_weight_scale),
                           {{grad_matrix}, {inputs_matrix}},
                           {{h_matrix}, {inputs_matrix}}},
      stream);
  launch("bayes_linear_backward: bias", sum_bias_gradients<T, E>, divide_up(features, warp_size), threads_per_block, 0,
         stream, rows, features, args.key, grad, static_cast<const C*>(h), bias_scale, args.scale_type,
         static_cast<T*>(args.grad_bias_mean), static_cast<T*>(args.grad_bias_scale));
}

}  // namespace

void bayes_linear(const BayesLinear& args, void* stream) {
  dispatch(args, [&]<class T, Estimator E>() {
    const Matrix<T> x(args.x, args.rows, args.inputs);
    const Output<T, E> problem{args.rows,
                               args.inputs,
                               args.features,
                               args.key,
                               static_cast<T*>(args.out),
                               {static_cast<const T*>(args.bias_mean), static_cast<const T*>(args.bias_scale),
                                args.scale_type, args.features, args.key},
                               {{x}, weight_operand<T, E, true>(args)},
                               {{x}, variance_operand<T, true>(args)}};
    run("bayes_linear", problem, stream);
  });
}

void bayes_linear_backward(const BayesLinearBackward& args, void* stream) {
  dispatch(args, [&]<class T, Estimator E>() { backward<T, E>(args, stream); });
}

}  // namespace isthmus::cuda
