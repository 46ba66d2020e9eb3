// Scalar codebooks on CUDA devices; what is computed stands in latent.inl. The gradient of an entry is a sum over the
// rows that chose it: a block writes digits and amounts of its rows to shared memory, where one thread for each
// dimension adds them up in row order, and a second kernel adds the blocks. No atomics.
#pragma once

#include "scalar/rows.cuh"

namespace isthmus::cuda {
namespace {

// Rows that share partial sums: so many that these are small beside the data.
struct SumBlocks {
  int64_t rows, count;

  SumBlocks(int64_t all_rows, int64_t dims, int64_t entries)
      : rows(divide_up(divide_up(4 * entries, dims), rows_per_block) * rows_per_block),
        count(divide_up(all_rows, rows)) {}
};

// row(r, digits, amounts) fills in one row; a row that adds nothing has zero amounts.
template <class C, class Row>
__device__ void sum_by_digit(const Levels& levels, int64_t rows, int64_t block_rows, double* partial, Row&& row) {
  extern __shared__ double memory[];
  C* amounts = reinterpret_cast<C*>(memory);
  int32_t* digits = reinterpret_cast<int32_t*>(amounts + rows_per_block * levels.dims);
  const int64_t begin = blockIdx.x * block_rows, end = begin + block_rows < rows ? begin + block_rows : rows;
  int64_t entries = 0, start = 0;
  for (int d = 0; d < levels.dims; ++d) {
    if (d < static_cast<int>(threadIdx.x)) start += levels.size[d];
    entries += levels.size[d];
  }
  double* own = partial + blockIdx.x * entries + start;
  const bool adds = threadIdx.x < levels.dims;
  for (int64_t l = 0; adds && l < levels.size[threadIdx.x]; ++l) own[l] = 0;
  for (int64_t first = begin; first < end; first += rows_per_block) {
    const int64_t r = first + threadIdx.x, place = static_cast<int64_t>(threadIdx.x) * levels.dims;
    if (r < end) row(r, digits + place, amounts + place);
    __syncthreads();
    const int64_t count = end - first < rows_per_block ? end - first : rows_per_block;
    for (int64_t i = 0; adds && i < count; ++i) {
      own[digits[i * levels.dims + threadIdx.x]] += static_cast<double>(amounts[i * levels.dims + threadIdx.x]);
    }
    __syncthreads();
  }
}

template <class C>
size_t digit_memory(int dims) {
  return static_cast<size_t>(rows_per_block * dims) * (sizeof(C) + sizeof(int32_t));
}

template <class C>
struct Choice {
  C value;
  int32_t digit;
};

template <class T>
__device__ __forceinline__ Choice<Compute<T>> nearest(const T* codebook, int64_t size, Compute<T> x) {
  using C = Compute<T>;
  Choice<C> best{to_compute(codebook[0]), 0};
  C distance = abs(x - best.value);
  for (int64_t l = 1; l < size; ++l) {
    const C value = to_compute(codebook[l]), other = abs(x - value);
    if (other < distance) {
      distance = other;
      best = {value, static_cast<int32_t>(l)};
    }
  }
  return best;
}

template <class T>
__global__ void __launch_bounds__(rows_per_block) latent_kernel(LatentQuantize args) {
  using C = Compute<T>;
  const int64_t row = own_row(), first = row * args.levels.dims;
  if (row >= args.rows) return;
  const bool out = excluded(args.mask, row);
  const T *x = static_cast<const T*>(args.x) + first, *codebook = static_cast<const T*>(args.codebooks);
  T* quantized = static_cast<T*>(args.quantized) + first;
  int64_t index = 0, stride = 1;
  C error = 0;
  for (int d = 0; d < args.levels.dims; ++d) {
    const C v = to_compute(x[d]);
    const Choice<C> choice = nearest(codebook, args.levels.size[d], v);
    quantized[d] = from_compute<T>(out ? C(0) : v == v ? choice.value : v);
    index += stride * choice.digit;
    stride *= args.levels.size[d];
    error += (v - choice.value) * (v - choice.value);
    codebook += args.levels.size[d];
  }
  args.indices[row] = out ? -1 : index;
  static_cast<C*>(args.error)[row] = out ? C(0) : error;
}

// digits and amounts may be null.
template <class T>
__device__ void latent_gradients(const LatentBackward& args, int64_t row, int32_t* digits, Compute<T>* amounts) {
  using C = Compute<T>;
  const int64_t first = row * args.levels.dims;
  const bool out = excluded(args.mask, row);
  const T *x = static_cast<const T*>(args.x) + first, *codebook = static_cast<const T*>(args.codebooks);
  const C grad_error = out ? C(0) : static_cast<const C*>(args.grad_error)[row];
  for (int d = 0; d < args.levels.dims; codebook += args.levels.size[d++]) {
    const C v = to_compute(x[d]);
    const Choice<C> choice = nearest(codebook, args.levels.size[d], v);
    const C pull = grad_error * (v - choice.value);
    const C through = to_compute(static_cast<const T*>(args.grad_quantized)[first + d]);
    const C slope = through + static_cast<C>(2 * args.commitment_weight) * pull;
    static_cast<T*>(args.grad_x)[first + d] = from_compute<T>(out ? C(0) : slope);
    if (digits == nullptr) continue;
    digits[d] = choice.digit;
    amounts[d] = out ? C(0) : C(-2) * pull;
  }
}

template <class T>
__global__ void __launch_bounds__(rows_per_block) latent_backward_kernel(LatentBackward args) {
  const int64_t row = own_row();
  if (row < args.rows) latent_gradients<T>(args, row, nullptr, nullptr);
}

template <class T>
__global__ void __launch_bounds__(rows_per_block) latent_sums_kernel(LatentBackward args, int64_t block_rows) {
  using C = Compute<T>;
  sum_by_digit<C>(args.levels, args.rows, block_rows, static_cast<double*>(args.workspace),
                  [&](int64_t row, int32_t* digits, C* amounts) { latent_gradients<T>(args, row, digits, amounts); });
}

template <class T>
__global__ void __launch_bounds__(rows_per_block) latent_decode_kernel(LatentDecode args, uint64_t codes) {
  const int64_t row = own_row();
  if (row >= args.rows) return;
  const int64_t index = args.indices[row];
  check_index(index, -1, codes);
  T* out = static_cast<T*>(args.out) + row * args.levels.dims;
  const T* codebook = static_cast<const T*>(args.codebooks);
  each_digit(args.levels, false, index < 0 ? 0 : index, [&](int d, int64_t digit) {
    out[d] = index < 0 ? from_compute<T>(0) : codebook[digit];
    codebook += args.levels.size[d];
  });
}

template <class T>
__global__ void __launch_bounds__(rows_per_block)
    latent_decode_sums_kernel(LatentDecodeBackward args, int64_t block_rows, uint64_t codes) {
  using C = Compute<T>;
  sum_by_digit<C>(args.levels, args.rows, block_rows, static_cast<double*>(args.workspace),
                  [&](int64_t row, int32_t* digits, C* amounts) {
                    const int64_t index = args.indices[row];
                    check_index(index, -1, codes);
                    const T* grad = static_cast<const T*>(args.grad) + row * args.levels.dims;
                    each_digit(args.levels, false, index < 0 ? 0 : index, [&](int d, int64_t digit) {
                      digits[d] = static_cast<int32_t>(digit);
                      amounts[d] = index < 0 ? C(0) : to_compute(grad[d]);
                    });
                  });
}

}  // namespace
}  // namespace isthmus::cuda
