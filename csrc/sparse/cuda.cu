// Sparse codes on CUDA devices; what is computed stands in cpu.inl. Gathers bound by memory: 16-byte loads, several in
// flight, sums in a fixed order.

#include "core/launch.cuh"
#include "core/sort.cuh"
#include "sparse/kernels.h"

namespace isthmus::cuda {
namespace {

constexpr int block_threads = 256;

__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x) % warp_size; }

// ---- decode --------------------------------------------------------------------------------------------------------

// What multiplies a gathered row: the entries of `values`; with a gradient, the gradient before the activation.
template <class T>
struct Coefficients {
  const T* factors;
  const T* values;  // factors count only where these are positive; null: everywhere

  __device__ __forceinline__ Compute<T> operator()(int64_t entry) const {
    if (values != nullptr && !(to_compute(__ldg(values + entry)) > 0)) return 0;
    return to_compute(__ldg(factors + entry));
  }
};

__global__ void __launch_bounds__(block_threads)
    check_indices_kernel(const int64_t* indices, int64_t count, int64_t features) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (i < count && (indices[i] < 0 || indices[i] >= features)) {
    printf("isthmus: indices holds %lld; expected 0 <= index < %lld\n", static_cast<long long>(indices[i]),
           static_cast<long long>(features));
    __trap();
  }
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
  if constexpr (sizeof(T) * N == 16) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(p));
    return *reinterpret_cast<const Pack<T, N>*>(&bits);
  } else {
    return {{__ldg(p)}};
  }
}

// A thread makes N neighbouring columns of one row; neighbours in a warp, neighbouring packs.
template <class T, int N>
__global__ void __launch_bounds__(block_threads)
    decode_kernel(SparseDecode args, Coefficients<T> coefficients, int64_t packs) {
  using C = Compute<T>;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  const int64_t row = thread / packs, col = thread % packs * N;
  if (row >= args.rows) return;
  C sum[N] = {};
  if (args.bias != nullptr) {
    const auto bias = load_pack<T, N>(static_cast<const T*>(args.bias) + col);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = to_compute(bias.values[i]);
  }
  const T* weight = static_cast<const T*>(args.weight) + col;
#pragma unroll 8
  for (int64_t j = 0; j < args.k; ++j) {
    const int64_t entry = row * args.k + j;
    const auto direction = load_pack<T, N>(weight + __ldg(args.indices + entry) * args.cols);
    const C coefficient = coefficients(entry);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += coefficient * to_compute(direction.values[i]);
  }
  Pack<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out.values[i] = from_compute<T>(sum[i]);
  *reinterpret_cast<Pack<T, N>*>(static_cast<T*>(args.out) + row * args.cols + col) = out;
}

// Calls f<N>() with the elements of a 16-byte access if all rows of `cols` elements start on one, else with 1.
template <class T, class F, class... Pointers>
void dispatch_pack(int64_t cols, F&& f, const Pointers*... pointers) {
  constexpr int n = 16 / sizeof(T);
  const bool aligned = cols % n == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
  if (aligned) {
    f.template operator()<n>();
  } else {
    f.template operator()<1>();
  }
}

template <class T>
void decode_rows(const SparseDecode& args, const Coefficients<T>& coefficients, void* stream) {
  dispatch_pack<T>(
      args.cols,
      [&]<int N>() {
        const int64_t packs = args.cols / N;
        launch("sparse_decode", decode_kernel<T, N>, divide_up(args.rows * packs, block_threads), block_threads, 0,
               stream, args, coefficients, packs);
      },
      args.weight, args.bias, args.out);
}

// ---- gradients -----------------------------------------------------------------------------------------------------

// grad_values[entry] = grad[row] · weight[index]: one warp an entry.
template <class T, int N>
__global__ void __launch_bounds__(block_threads) grad_values_kernel(SparseDecodeBackward args) {
  using C = Compute<T>;
  const int64_t entry = (static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x) / warp_size;
  if (entry >= args.rows * args.k) return;
  const T* grad = static_cast<const T*>(args.grad) + entry / args.k * args.cols;
  const T* weight = static_cast<const T*>(args.weight) + args.indices[entry] * args.cols;
  C sum = 0;
#pragma unroll 4
  for (int64_t c = lane_of_thread() * N; c < args.cols; c += warp_size * N) {
    const auto a = load_pack<T, N>(grad + c), b = load_pack<T, N>(weight + c);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += to_compute(a.values[i]) * to_compute(b.values[i]);
  }
  sum = warp_sum(sum);
  if (lane_of_thread() == 0) static_cast<T*>(args.grad_values)[entry] = from_compute<T>(sum);
}

// Body of GroupSums: grad_weight[f] = Σ coefficient · row of the matrix over the entries of feature f; in a last column
// of its own the sum of the coefficients, unless grad_bias is null.
template <class T>
struct WeightSums {
  using Number = Compute<T>;
  Coefficients<T> coefficients;
  const T* matrix;
  int64_t k, cols;
  T *grad_weight, *grad_bias;

  __device__ __forceinline__ Number share(int64_t entry, int64_t, int64_t c) const {
    const Number coefficient = coefficients(entry);
    return c < cols ? coefficient * to_compute(__ldg(matrix + entry / k * cols + c)) : coefficient;
  }
  __device__ __forceinline__ void write(int64_t feature, int64_t c, Number sum) const {
    T* to = c < cols ? grad_weight + feature * cols + c : grad_bias + feature;
    *to = from_compute<T>(sum);
  }
};

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

// The memory of either backward.
template <class C>
struct DecodeBackwardPlan {
  GroupSums<C> sums;
  int64_t chunks;
  C* partial;  // [chunks, cols]

  DecodeBackwardPlan(const SparseDecodeBackward& args, Arena& arena)
      : sums(args.rows * args.k, args.features, args.cols, arena),
        chunks(divide_up(args.rows, rows_per_chunk)),
        partial(arena.take<C>(chunks * args.cols)) {}
};

template <class C>
struct EncodeBackwardPlan {
  GroupSums<C> sums;

  EncodeBackwardPlan(const TopkEncodeBackward& args, Arena& arena)
      : sums(args.rows * args.k, args.features, args.cols + 1, arena) {}
};

template <template <class> class Plan, class Args>
int64_t measure(const Args& args) {
  Arena arena(nullptr);
  dispatch_dtype(args.dtype, [&]<class T>() { Plan<Compute<T>>(args, arena); });
  return arena.used;
}

}  // namespace

int64_t sparse_workspace(const TopkEncodeBackward& args) { return measure<EncodeBackwardPlan>(args); }
int64_t sparse_workspace(const SparseDecodeBackward& args) { return measure<DecodeBackwardPlan>(args); }

void sparse_decode(const SparseDecode& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const int64_t entries = args.rows * args.k;
    launch("check_indices", check_indices_kernel, divide_up(entries, block_threads), block_threads, 0, stream,
           args.indices, entries, args.features);
    decode_rows<T>(args, {static_cast<const T*>(args.values), nullptr}, stream);
  });
}

// In both gradients the sums over features come first: they check the indices.
void sparse_encode_backward(const TopkEncodeBackward& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const bool relu = args.activation == Activation::relu;
    const Coefficients<T> coefficients{static_cast<const T*>(args.grad),
                                       relu ? static_cast<const T*>(args.values) : nullptr};
    Arena arena(args.workspace);
    EncodeBackwardPlan<Compute<T>> plan(args, arena);
    const WeightSums<T> body{coefficients, static_cast<const T*>(args.x),     args.k,
                             args.cols,    static_cast<T*>(args.grad_weight), static_cast<T*>(args.grad_bias)};
    plan.sums.run(args.indices, 0, body, stream);
    const SparseDecode to_x{.dtype = args.dtype,
                            .rows = args.rows,
                            .cols = args.cols,
                            .features = args.features,
                            .k = args.k,
                            .values = args.grad,
                            .indices = args.indices,
                            .weight = args.weight,
                            .bias = nullptr,
                            .out = args.grad_x};
    decode_rows<T>(to_x, coefficients, stream);
  });
}

void sparse_decode_backward(const SparseDecodeBackward& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    const T* grad = static_cast<const T*>(args.grad);
    Arena arena(args.workspace);
    DecodeBackwardPlan<C> plan(args, arena);
    const Coefficients<T> coefficients{static_cast<const T*>(args.values), nullptr};
    const WeightSums<T> body{coefficients, grad, args.k, args.cols, static_cast<T*>(args.grad_weight), nullptr};
    plan.sums.run(args.indices, 0, body, stream);
    dispatch_pack<T>(
        args.cols,
        [&]<int N>() {
          launch("grad_values", grad_values_kernel<T, N>, divide_up(args.rows * args.k * warp_size, block_threads),
                 block_threads, 0, stream, args);
        },
        args.grad, args.weight);
    launch("sum_rows", sum_rows_kernel<T>, divide_up(plan.chunks * args.cols, block_threads), block_threads, 0, stream,
           grad, args.rows, args.cols, plan.partial);
    launch("sum_rows", sum_chunks_of_rows_kernel<T>, divide_up(args.cols, block_threads), block_threads, 0, stream,
           static_cast<const C*>(plan.partial), plan.chunks, args.cols, static_cast<T*>(args.grad_bias));
  });
}

}  // namespace isthmus::cuda
