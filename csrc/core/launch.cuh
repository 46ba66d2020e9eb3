// What every CUDA kernel file shares: launch with an error check, dtype dispatch with the device's own half types,
// loads of 16 bytes, reductions in a fixed order. Torch-free, so nvcc compiles it on a machine without a GPU.
//
// Indices are int64 throughout; the caller has made the tensor's device current.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/dtype.h"
#include "core/scale_type.h"

namespace isthmus::cuda {
namespace {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("isthmus: ") + what + ": " + cudaGetErrorString(status));
  }
}

// kernel<<<blocks, threads, shared, stream>>>(args...), checked. A grid of zero blocks is no launch at all.
template <class Kernel, class... Args>
inline void launch(const char* name, Kernel kernel, int64_t blocks, int threads, size_t shared, void* stream,
                   Args... args) {
  if (blocks == 0) return;
  constexpr int64_t max_blocks = 0x7fffffff;
  if (blocks > max_blocks) throw std::runtime_error(std::string("isthmus: ") + name + ": the problem is too large");
  constexpr size_t default_shared = 48 * 1024;
  if (shared > default_shared) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), name);
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError(), name);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- element types -------------------------------------------------------------------------------------------------

template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

template <class T>
__device__ __forceinline__ Compute<T> to_compute(T value) {
  return static_cast<Compute<T>>(value);
}
template <class T>
__device__ __forceinline__ T from_compute(Compute<T> value) {
  return static_cast<T>(value);
}

template <class C>
__device__ constexpr C infinity() {
  return static_cast<C>(__builtin_huge_val());
}

template <class F>
inline void dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::f64:
      return f.template operator()<double>();
    case DType::bf16:
      return f.template operator()<__nv_bfloat16>();
    case DType::f16:
      return f.template operator()<__half>();
  }
}

template <class F>
inline void dispatch_scale(ScaleType scale_type, F&& f) {
  switch (scale_type) {
    case ScaleType::logvar:
      return f.template operator()<ScaleType::logvar>();
    case ScaleType::std:
      return f.template operator()<ScaleType::std>();
    case ScaleType::softplus:
      return f.template operator()<ScaleType::softplus>();
    case ScaleType::square:
      return f.template operator()<ScaleType::square>();
  }
}

// N neighbouring elements, moved in accesses of at most 16 bytes, which is the alignment that launchers check.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T values[N];
};

// ---- reductions ----------------------------------------------------------------------------------------------------

constexpr int warp_size = 32;

template <class C>
__device__ __forceinline__ C warp_sum(C value) {
#pragma unroll
  for (int offset = warp_size / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  return value;  // valid in lane 0
}

// The sum over a warp, the same bits in all its lanes. All of them must call it.
template <class C>
__device__ __forceinline__ C warp_total(C value) {
#pragma unroll
  for (int offset = warp_size / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Sum over the block, valid in thread 0. Every thread must call it; blockDim.x is a multiple of 32.
template <class C>
__device__ __forceinline__ C block_sum(C value) {
  __shared__ C sums[warp_size];
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  __syncthreads();  // the previous use of `sums` is over
  value = warp_sum(value);
  if (lane == 0) sums[warp] = value;
  __syncthreads();
  const int warps = blockDim.x / warp_size;
  value = threadIdx.x < warps ? sums[threadIdx.x] : C(0);
  return warp == 0 ? warp_sum(value) : value;
}

}  // namespace
}  // namespace isthmus::cuda
