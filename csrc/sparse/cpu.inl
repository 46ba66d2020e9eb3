// Sparse codes on the CPU: decoding, and the gradients of decoders and encoders. All are gathers: memory bound, rows
// prefetched ahead of their use.

#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/sort.h"
#include "sparse/kernels.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- decode --------------------------------------------------------------------------------------------------------

constexpr int64_t prefetch_ahead = 8;  // entries

// Columns held in registers while the rows pass: 16 accumulators of 32 registers, or 8 of 16.
#if defined(__AVX512F__)
constexpr int block_vectors = 16;
#else
constexpr int block_vectors = 8;
#endif

// out[c] = bias[c] + Σ_j values[j] · weight[indices[j]][c] for the `cols` columns that Vectors vectors hold; only a
// single vector may be less than full. Of the indices, k are used and those up to `known` may be prefetched: towards
// the end of a row, what it fetches are the same columns for the next one.
template <int Vectors, class T>
inline void decode_columns(const T* values, const int64_t* indices, int64_t k, int64_t known, const T* weight,
                           int64_t stride, const T* bias, int64_t cols, T* out) {
  using C = Compute<T>;
  const auto read = [&](const T* row, int v) {
    return Vectors == 1 ? load_first(row, cols) : load(row + v * lanes<C>);
  };
  Vec<C> acc[Vectors];
#pragma GCC unroll 16
  for (int v = 0; v < Vectors; ++v) acc[v] = bias != nullptr ? read(bias, v) : Vec<C>{};
  for (int64_t j = 0; j < k; ++j) {
    const char* ahead =
        reinterpret_cast<const char*>(weight + indices[smaller(j + prefetch_ahead, known - 1)] * stride);
    for (size_t byte = 0; byte < Vectors * lanes<C> * sizeof(T); byte += 64) __builtin_prefetch(ahead + byte);
    const T* row = weight + indices[j] * stride;
    const C value = load_one(values + j);
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) acc[v] += value * read(row, v);
  }
#pragma GCC unroll 16
  for (int v = 0; v < Vectors; ++v) {
    Vectors == 1 ? store_first(out, acc[v], cols) : store(out + v * lanes<C>, acc[v]);
  }
}

template <class T>
inline void decode_row(const T* values, const int64_t* indices, int64_t k, int64_t known, const T* weight,
                       const T* bias, int64_t cols, T* out) {
  int64_t c = 0;
  const auto pass = [&]<int Vectors>() {
    constexpr int64_t width = Vectors * lanes<Compute<T>>;
    for (; Vectors == 1 ? c < cols : c + width <= cols; c += width) {
      decode_columns<Vectors>(values, indices, k, known, weight + c, cols, bias != nullptr ? bias + c : bias, cols - c,
                              out + c);
    }
  };
  pass.template operator()<block_vectors>();
  pass.template operator()<4>();
  pass.template operator()<1>();
}

// Rows that make a second thread worth its start.
inline int64_t row_grain(int64_t k, int64_t cols) { return 32 * 1024 / (k * cols + 1) + 1; }

template <class T, class Args>
void decode_rows(const Args& args, const T* values, const T* bias, T* out) {
  const T* weight = static_cast<const T*>(args.weight);
  parallel_for(args.rows, row_grain(args.k, args.cols), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      decode_row(values + row * args.k, args.indices + row * args.k, args.k, (end - row) * args.k, weight, bias,
                 args.cols, out + row * args.cols);
    }
  });
}

void decode(const SparseDecode& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    decode_rows(args, static_cast<const T*>(args.values), static_cast<const T*>(args.bias), static_cast<T*>(args.out));
  });
}

// ---- gradients -----------------------------------------------------------------------------------------------------

// sum += coefficient · row
template <class T>
inline void add_scaled(Compute<T>* sum, Compute<T> coefficient, const T* row, int64_t cols) {
  using C = Compute<T>;
  int64_t c = 0;
  for (; c + lanes<C> <= cols; c += lanes<C>) store(sum + c, load(sum + c) + coefficient * load(row + c));
  const int64_t left = cols - c;
  if (left > 0) store_first(sum + c, load_first(sum + c, left) + coefficient * load_first(row + c, left), left);
}

template <class T>
inline void round_row(const Compute<T>* from, int64_t cols, T* to) {
  using C = Compute<T>;
  for (int64_t c = 0; c < cols; c += lanes<C>) store_first(to + c, load_first(from + c, cols - c), cols - c);
}

// grad_weight[f] = Σ coefficients[n, j] · matrix[n] over the places where indices[n, j] = f, in order of n; and
// grad_bias[f], unless null, the sum of the coefficients alone.
template <class T>
void scatter_rows(const T* coefficients, const int64_t* indices, int64_t rows, int64_t k, const T* matrix, int64_t cols,
                  int64_t features, T* grad_weight, T* grad_bias) {
  using C = Compute<T>;
  const Groups groups(indices, rows * k, features);
  sum_groups<C>(
      groups, cols + 1,
      [&](int64_t item, int64_t, C* sum) {
        const C coefficient = load_one(coefficients + item);
        add_scaled(sum, coefficient, matrix + item / k * cols, cols);
        sum[cols] += coefficient;
      },
      [&](int64_t feature, const C* sum) {
        round_row(sum, cols, grad_weight + feature * cols);
        if (grad_bias != nullptr) store_one(grad_bias + feature, sum[cols]);
      });
}

// Sums over chunks of rows, then over the chunks: the same order for any number of threads.
template <class T>
void sum_rows(const T* matrix, int64_t rows, int64_t cols, T* out) {
  using C = Compute<T>;
  constexpr int64_t chunk = 128;
  const int64_t chunks = larger(divide_up(rows, chunk), 1);
  Buffer<C> partial(chunks * cols);
  parallel_for(chunks, row_grain(chunk, cols), [&](int64_t begin, int64_t end) {
    std::memset(partial.data + begin * cols, 0, static_cast<size_t>((end - begin) * cols) * sizeof(C));
    for (int64_t row = begin * chunk; row < smaller(end * chunk, rows); ++row) {
      add_scaled(partial.data + row / chunk * cols, C(1), matrix + row * cols, cols);
    }
  });
  for (int64_t c = 1; c < chunks; ++c) add_scaled(partial.data, C(1), partial.data + c * cols, cols);
  round_row(partial.data, cols, out);
}

// Σ_c a[c] · b[c], while the row `ahead` is on its way.
template <class T>
inline Compute<T> dot(const T* a, const T* b, const T* ahead, int64_t cols) {
  using C = Compute<T>;
  constexpr int64_t step = 4 * lanes<C>;
  Vec<C> acc[4] = {};
  int64_t c = 0;
  for (; c + step <= cols; c += step) {
    for (size_t byte = 0; byte < step * sizeof(T); byte += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(ahead + c) + byte);
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) acc[v] += load(a + c + v * lanes<C>) * load(b + c + v * lanes<C>);
  }
  for (; c < cols; c += lanes<C>) acc[0] += load_first(a + c, cols - c) * load_first(b + c, cols - c);
  return sum_lanes<C>((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

void decode_backward(const SparseDecodeBackward& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const T *grad = static_cast<const T*>(args.grad), *weight = static_cast<const T*>(args.weight);
    const T* values = static_cast<const T*>(args.values);
    T* grad_values = static_cast<T*>(args.grad_values);
    parallel_for(args.rows, row_grain(args.k, args.cols), [&](int64_t begin, int64_t end) {
      const auto feature = [&](int64_t item) { return weight + args.indices[item] * args.cols; };
      for (int64_t item = begin * args.k; item < end * args.k; ++item) {
        const T* ahead = feature(smaller(item + 1, end * args.k - 1));
        store_one(grad_values + item, dot(grad + item / args.k * args.cols, feature(item), ahead, args.cols));
      }
    });
    scatter_rows<T>(values, args.indices, args.rows, args.k, grad, args.cols, args.features,
                    static_cast<T*>(args.grad_weight), nullptr);
    sum_rows(grad, args.rows, args.cols, static_cast<T*>(args.grad_bias));
  });
}

void encode_backward(const TopkEncodeBackward& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const T *grad = static_cast<const T*>(args.grad), *values = static_cast<const T*>(args.values);
    const int64_t items = args.rows * args.k;
    Buffer<T> through(items);  // the gradient before the activation
    for (int64_t i = 0; i < items; ++i) {
      const bool flat = args.activation == Activation::relu && !(load_one(values + i) > 0);
      through.data[i] = flat ? T{} : grad[i];
    }
    decode_rows<T>(args, through.data, nullptr, static_cast<T*>(args.grad_x));
    scatter_rows<T>(through.data, args.indices, args.rows, args.k, static_cast<const T*>(args.x), args.cols,
                    args.features, static_cast<T*>(args.grad_weight), static_cast<T*>(args.grad_bias));
  });
}

}  // namespace

extern const SparseKernels sparse_table;
const SparseKernels sparse_table = {encode_backward, decode, decode_backward};

}  // namespace isthmus::ISTHMUS_LEVEL
