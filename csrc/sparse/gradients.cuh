// Gradients of decoders and encoders. Those of the entries are products of gathered rows, a warp for each; those of the
// latents are sums over the order by latent (core/sort.cuh), in chunks: a latent that is always on is shared by many.
#pragma once

#include "sparse/decode.cuh"

namespace isthmus::cuda {
namespace {

// grad_values[e] = grad[row] · weight[indices[e]]: a block takes a row, a warp every so many of its entries.
template <class T, int N>
__global__ void __launch_bounds__(block_threads) grad_values_kernel(SparseDecodeBackward args) {
  using C = Compute<T>;
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size, warps = blockDim.x / warp_size;
  const int64_t row = blockIdx.x, last = first_entry(args.code, row + 1);
  const T* grad = static_cast<const T*>(args.grad) + row * args.cols;
  for (int64_t e = first_entry(args.code, row) + warp; e < last; e += warps) {
    const int64_t latent = args.code.indices[e];
    const T* weight = static_cast<const T*>(args.weight) + latent * args.cols;
    C sum = 0;
    if (latent >= 0) {
#pragma unroll 4
      for (int64_t c = lane * N; c < args.cols; c += warp_size * N) {
        const auto a = load_pack<T, N>(grad + c), b = load_pack<T, N>(weight + c);
#pragma unroll
        for (int i = 0; i < N; ++i) sum += to_compute(a.values[i]) * to_compute(b.values[i]);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) static_cast<T*>(args.grad_values)[e] = from_compute<T>(sum);
  }
}

// ---- sums over latents ---------------------------------------------------------------------------------------------

// grad_weight[f] = Σ factors[e] · matrix[row of e] over the entries of latent f.
template <class T, int N>
struct WeightSums {
  using Number = Compute<T>;
  static constexpr int pack = N;
  LatentOrder order;
  const T *factors, *matrix;
  int64_t cols;
  T* grad_weight;

  __device__ __forceinline__ void add(int64_t position, int64_t, int64_t column, Number (&sum)[N]) const {
    const Number factor = to_compute(__ldg(factors + __ldg(order.entries + position)));
    const auto row = load_pack<T, N>(matrix + __ldg(order.rows + position) * cols + column);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += factor * to_compute(row.values[i]);
  }
  __device__ __forceinline__ void write(int64_t latent, int64_t column, const Number (&sum)[N]) const {
    store(grad_weight + latent * cols + column, sum);
  }
};

// grad_bias[f] = Σ factors[e]: a single column.
template <class T>
struct BiasSums {
  using Number = Compute<T>;
  static constexpr int pack = 1;
  LatentOrder order;
  const T* factors;
  T* grad_bias;

  __device__ __forceinline__ void add(int64_t position, int64_t, int64_t, Number (&sum)[1]) const {
    sum[0] += to_compute(__ldg(factors + __ldg(order.entries + position)));
  }
  __device__ __forceinline__ void write(int64_t latent, int64_t, const Number (&sum)[1]) const {
    grad_bias[latent] = from_compute<T>(sum[0]);
  }
};

inline SortedItems sorted_items(const LatentOrder& order, const CodeLayout& code, int64_t features) {
  return {features, code.entries, order.entries, order.starts, code.indices};
}

// Of either backward; Arena: its memory, which does not depend on the pack.
template <class T, class Args>
void sum_weights(const Args& args, const void* factors, const void* matrix, Arena arena, void* stream) {
  dispatch_pack<T>(
      args.cols,
      [&]<int N>() {
        const SumsLayout<Compute<T>> layout(args.code.entries, args.cols, N, arena);
        const WeightSums<T, N> body{args.order, static_cast<const T*>(factors), static_cast<const T*>(matrix),
                                    args.cols, static_cast<T*>(args.grad_weight)};
        run_sums(sorted_items(args.order, args.code, args.features), layout, body, stream);
      },
      matrix, args.grad_weight);
}

// ---- column sums ---------------------------------------------------------------------------------------------------

constexpr int64_t rows_per_chunk = 128;

// Column sums of a matrix [rows, cols], in chunks of rows: partial [chunks, cols].
template <class T>
__global__ void __launch_bounds__(block_threads)
    sum_rows_kernel(const T* matrix, int64_t rows, int64_t cols, Compute<T>* partial) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  const int64_t first = thread / cols * rows_per_chunk, c = thread % cols;
  if (first >= rows) return;
  const int64_t last = first + rows_per_chunk < rows ? first + rows_per_chunk : rows;
  Compute<T> sum = 0;
#pragma unroll 8
  for (int64_t row = first; row < last; ++row) sum += to_compute(__ldg(matrix + row * cols + c));
  partial[thread] = sum;
}

template <class T>
__global__ void __launch_bounds__(block_threads)
    sum_chunks_of_rows_kernel(const Compute<T>* partial, int64_t chunks, int64_t cols, T* out) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (c >= cols) return;
  Compute<T> sum = 0;
#pragma unroll 8
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += __ldg(partial + chunk * cols + c);
  out[c] = from_compute<T>(sum);
}

template <class T>
void sum_rows(const T* matrix, int64_t rows, int64_t cols, T* out, Arena arena, void* stream) {
  using C = Compute<T>;
  const int64_t chunks = divide_up(rows, rows_per_chunk);
  C* partial = arena.take<C>(chunks * cols);
  launch("sum_rows", sum_rows_kernel<T>, divide_up(chunks * cols, block_threads), block_threads, 0, stream, matrix,
         rows, cols, partial);
  launch("sum_rows", sum_chunks_of_rows_kernel<T>, divide_up(cols, block_threads), block_threads, 0, stream,
         static_cast<const C*>(partial), chunks, cols, out);
}

// ---- both backwards ------------------------------------------------------------------------------------------------

// The steps follow each other on one stream, so each takes the whole workspace anew: as much as the largest needs.
template <class T>
int64_t workspace(const SparseDecodeBackward& args) {
  Arena sums(nullptr), columns(nullptr);
  if (args.grad_weight != nullptr) SumsLayout<Compute<T>>(args.code.entries, args.cols, 1, sums);
  if (args.grad_bias != nullptr) columns.take<Compute<T>>(divide_up(args.code.rows, rows_per_chunk) * args.cols);
  return sums.used > columns.used ? sums.used : columns.used;
}

template <class T>
int64_t workspace(const SparseEncodeBackward& args) {
  Arena sums(nullptr), bias(nullptr);
  if (args.grad_weight != nullptr) SumsLayout<Compute<T>>(args.code.entries, args.cols, 1, sums);
  if (args.grad_bias != nullptr) SumsLayout<Compute<T>>(args.code.entries, 1, 1, bias);
  return sums.used > bias.used ? sums.used : bias.used;
}

template <class T>
void decode_backward(const SparseDecodeBackward& args, void* stream) {
  check_code(args.code, args.features, stream);
  if (args.grad_values != nullptr) {
    const int64_t rows = args.code.rows, per_row = rows > 0 ? divide_up(args.code.entries, rows) : 0;
    dispatch_pack<T>(
        args.cols,
        [&]<int N>() {
          launch("grad_values", grad_values_kernel<T, N>, rows, threads_for(per_row * warp_size, block_threads), 0,
                 stream, args);
        },
        args.grad, args.weight);
  }
  if (args.grad_weight != nullptr) {
    check_order(args.order, args.code, args.features, stream);
    sum_weights<T>(args, args.values, args.grad, Arena(args.workspace), stream);
  }
  if (args.grad_bias != nullptr) {
    sum_rows(static_cast<const T*>(args.grad), args.code.rows, args.cols, static_cast<T*>(args.grad_bias),
             Arena(args.workspace), stream);
  }
}

template <class T>
void encode_backward(const SparseEncodeBackward& args, void* stream) {
  check_code(args.code, args.features, stream);
  if (args.grad_x != nullptr) {
    const SparseDecode to_x{.dtype = args.dtype,
                            .code = args.code,
                            .cols = args.cols,
                            .features = args.features,
                            .values = args.grad,
                            .weight = args.weight,
                            .bias = nullptr,
                            .target = nullptr,
                            .out = args.grad_x,
                            .squared_error = nullptr};
    decode_rows<T>(to_x, stream);
  }
  if (args.grad_weight == nullptr && args.grad_bias == nullptr) return;
  check_order(args.order, args.code, args.features, stream);
  if (args.grad_weight != nullptr) sum_weights<T>(args, args.grad, args.x, Arena(args.workspace), stream);
  if (args.grad_bias != nullptr) {
    Arena arena(args.workspace);
    const SumsLayout<Compute<T>> layout(args.code.entries, 1, 1, arena);
    const BiasSums<T> body{args.order, static_cast<const T*>(args.grad), static_cast<T*>(args.grad_bias)};
    run_sums(sorted_items(args.order, args.code, args.features), layout, body, stream);
  }
}

// ---- reconstruction ------------------------------------------------------------------------------------------------

template <class T, int N>
__global__ void __launch_bounds__(block_threads) reconstruction_gradient_kernel(ReconstructionGradient args) {
  using C = Compute<T>;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x) * N;
  if (i >= args.rows * args.cols) return;
  const C scale = 2 * __ldg(static_cast<const C*>(args.grad_error) + i / args.cols);
  const auto made = load_pack<T, N>(static_cast<const T*>(args.reconstruction) + i);
  const auto target = load_pack<T, N>(static_cast<const T*>(args.target) + i);
  C sum[N], back[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    sum[j] = scale * (to_compute(made.values[j]) - to_compute(target.values[j]));
    back[j] = -sum[j];
  }
  if (args.grad_target != nullptr) store(static_cast<T*>(args.grad_target) + i, back);
  if (args.grad_reconstruction != nullptr) {
    const auto grad = load_pack<T, N>(static_cast<const T*>(args.grad_reconstruction) + i);
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] += to_compute(grad.values[j]);
  }
  store(static_cast<T*>(args.grad) + i, sum);
}

template <class T>
void reconstruction_gradient(const ReconstructionGradient& args, void* stream) {
  dispatch_pack<T>(
      args.cols,
      [&]<int N>() {
        launch("reconstruction_gradient", reconstruction_gradient_kernel<T, N>,
               divide_up(args.rows * args.cols / N, block_threads), block_threads, 0, stream, args);
      },
      args.grad_reconstruction, args.reconstruction, args.target, args.grad, args.grad_target);
}

}  // namespace
}  // namespace isthmus::cuda
