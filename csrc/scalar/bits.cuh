// Signs and sampled bits on CUDA devices; what is computed stands in bits.inl. Soft bits are counted in shared memory:
// a block writes those of its rows there and adds up each column, and a second kernel adds the blocks.
#pragma once

#include "scalar/rows.cuh"

namespace isthmus::cuda {
namespace {

template <class C>
struct SoftBit {
  C probability, entropy, variance;

  __device__ __forceinline__ explicit SoftBit(C a) {
    const C m = a < C(0) ? -a : a, e = exp(-m), larger = C(1) / (C(1) + e), smaller = e * larger;
    probability = a < C(0) ? smaller : larger;
    entropy = log1p(e) + m * smaller;
    variance = larger * smaller;
  }
};

// ---- signs ---------------------------------------------------------------------------------------------------------

// A row of one codebook. On the sphere u = length · x.
template <class T>
struct LfqRow {
  using C = Compute<T>;
  const T* x;
  int64_t first, position;  // of its elements; of its index
  C length = 1;

  __device__ __forceinline__ LfqRow(const Lfq& args, int64_t row) {
    position = row * args.codebooks + blockIdx.y;
    first = position * args.bits;
    x = static_cast<const T*>(args.x) + first;
    if (!args.spherical) return;
    C square = 0;
    for (int64_t c = 0; c < args.bits; ++c) square += to_compute(x[c]) * to_compute(x[c]);
    length = square == C(0) ? C(0) : static_cast<C>(args.scale) / sqrt(square);
  }

  __device__ __forceinline__ C u(int64_t c) const { return to_compute(x[c]) * length; }
};

template <class C>
__device__ __forceinline__ C corner(C u, C value) {
  return u == u ? (u > C(0) ? value : -value) : u;
}

// soft: rows_per_block rows of bits, if there are counts.
template <class T>
__device__ void quantize_row(const LfqQuantize& args, int64_t row, Compute<T>* soft) {
  using C = Compute<T>;
  const LfqRow<T> own(args, row);
  T* quantized = static_cast<T*>(args.quantized) + own.first;
  const bool out = excluded(args.mask, row), counted = args.bit_counts != nullptr;
  uint64_t index = 0;
  C error = 0, entropy = 0;
  for (int64_t c = 0; c < args.bits; ++c) {
    const C u = own.u(c), q = corner(u, static_cast<C>(args.value));
    quantized[c] = from_compute<T>(out ? C(0) : q);
    index = index << 1 | static_cast<uint64_t>(u > C(0));
    error += (u - q) * (u - q);
    if (!counted) continue;
    const SoftBit<C> bit(static_cast<C>(args.sharpness()) * u);
    entropy += bit.entropy;
    soft[c] = out ? C(0) : bit.probability;
  }
  args.indices[own.position] = out ? -1 : static_cast<int64_t>(index);
  static_cast<C*>(args.error)[own.position] = out ? C(0) : error;
  if (counted) static_cast<C*>(args.entropy)[own.position] = out ? C(0) : entropy;
}

template <class T>
__global__ void __launch_bounds__(rows_per_block) lfq_kernel(LfqQuantize args) {
  using C = Compute<T>;
  extern __shared__ double memory[];
  C* soft = reinterpret_cast<C*>(memory);
  const int64_t row = own_row();
  if (row < args.rows) quantize_row<T>(args, row, soft + threadIdx.x * args.bits);
  if (args.bit_counts == nullptr) return;
  __syncthreads();
  if (threadIdx.x >= args.bits) return;
  const int64_t left = args.rows - (row - threadIdx.x), rows = left < rows_per_block ? left : rows_per_block;
  double sum = 0;
  for (int64_t r = 0; r < rows; ++r) sum += static_cast<double>(soft[r * args.bits + threadIdx.x]);
  const int64_t block = static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y;
  static_cast<double*>(args.workspace)[block * args.bits + threadIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(rows_per_block) lfq_backward_kernel(LfqBackward args) {
  using C = Compute<T>;
  const int64_t row = own_row();
  if (row >= args.rows) return;
  const LfqRow<T> own(args, row);
  const T* grad_quantized = static_cast<const T*>(args.grad_quantized) + own.first;
  T* grad_x = static_cast<T*>(args.grad_x) + own.first;
  const C sharpness = static_cast<C>(args.sharpness()), value = static_cast<C>(args.value);
  const C error = static_cast<const C*>(args.grad_error)[own.position];
  const C* counts = static_cast<const C*>(args.grad_bit_counts);
  const C entropy = counts == nullptr ? C(0) : static_cast<const C*>(args.grad_entropy)[own.position];
  const auto gradient = [&](int64_t c) {
    const C u = own.u(c);
    C g = to_compute(grad_quantized[c]) + C(2) * error * (u - corner(u, value));
    if (counts != nullptr) {
      const C a = sharpness * u;
      g += sharpness * SoftBit<C>(a).variance * (counts[blockIdx.y * args.bits + c] - entropy * a);
    }
    return g;
  };
  C along = 0;
  if (args.spherical) {
    for (int64_t c = 0; c < args.bits; ++c) along += own.u(c) * gradient(c);
    along /= static_cast<C>(args.scale * args.scale);
  }
  const bool out = excluded(args.mask, row);
  for (int64_t c = 0; c < args.bits; ++c) {
    grad_x[c] = from_compute<T>(out ? C(0) : own.length * (gradient(c) - own.u(c) * along));
  }
}

// A grid of blocks of rows by codebooks.
template <class Kernel, class Args>
void launch_codebooks(const char* name, Kernel kernel, size_t shared, void* stream, const Args& args) {
  if (args.rows == 0) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), name);
  const dim3 grid(static_cast<unsigned>(divide_up(args.rows, rows_per_block)), static_cast<unsigned>(args.codebooks));
  kernel<<<grid, rows_per_block, shared, static_cast<cudaStream_t>(stream)>>>(args);
  check(cudaGetLastError(), name);
}

// ---- sampled bits --------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(rows_per_block) binary_map_kernel(BinaryMap args) {
  using C = Compute<T>;
  const int64_t row = own_row();
  if (row >= args.rows) return;
  const bool noisy = args.key != nullptr;
  const int64_t none[2] = {0, 0};
  Uniforms<C> noise(noisy ? args.key : none);
  uint64_t index = 0;
  C entropy = 0;
  for (int64_t i = row * args.bits; i < (row + 1) * args.bits; ++i) {
    const C logit = to_compute(static_cast<const T*>(args.logits)[i]);
    const bool one = (noisy ? logit + noise.logistic(i) : logit) > C(0);
    static_cast<T*>(args.out)[i] = from_compute<T>(logit == logit ? C(one) : logit);
    index = index << 1 | static_cast<uint64_t>(one);
    entropy += SoftBit<C>(logit).entropy;
  }
  args.indices[row] = static_cast<int64_t>(index);
  static_cast<C*>(args.entropy)[row] = entropy;
}

template <class T>
__global__ void __launch_bounds__(rows_per_block) binary_map_backward_kernel(BinaryMapBackward args) {
  using C = Compute<T>;
  const int64_t row = own_row();
  if (row >= args.rows) return;
  const bool noisy = args.relaxed && args.key != nullptr;
  const int64_t none[2] = {0, 0};
  Uniforms<C> noise(noisy ? args.key : none);
  const C inverse = static_cast<C>(1 / args.temperature), grad_entropy = static_cast<const C*>(args.grad_entropy)[row];
  for (int64_t i = row * args.bits; i < (row + 1) * args.bits; ++i) {
    const C logit = to_compute(static_cast<const T*>(args.logits)[i]), variance = SoftBit<C>(logit).variance;
    C slope = variance;
    if (args.relaxed) slope = SoftBit<C>((noisy ? logit + noise.logistic(i) : logit) * inverse).variance * inverse;
    const C grad = to_compute(static_cast<const T*>(args.grad_bits)[i]);
    static_cast<T*>(args.grad_logits)[i] = from_compute<T>(grad * slope - grad_entropy * logit * variance);
  }
}

}  // namespace
}  // namespace isthmus::cuda
