// The operands of Gaussians on the device, by packs of N neighbouring elements that one thread moves in one access:
// widened, the posterior's scale clamped; and what the mask and the clamp do to results.
//
// A pack never crosses the end of a block or of a row of the mask: where a tensor's layout would have it so, the
// launcher takes packs of one element. Layouts, masks and clamps are told apart at run time, by branches that all
// threads take alike: the kernels wait for memory, not for them.
#pragma once

#include "core/gaussians.h"
#include "core/normal.cuh"
#include "core/packs.cuh"

namespace isthmus::cuda {
namespace {

// ---- access --------------------------------------------------------------------------------------------------------

template <class C, int N>
__device__ __forceinline__ void fill(C value, C (&out)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = value;
}

// Element i of an operand or a result. The first block needs no division, and often is all there is.
template <class Blocks>
__device__ __forceinline__ int64_t place(const Blocks& x, int64_t i) {
  return i < x.block ? i : i / x.block * x.stride + i % x.block;
}

// One number for all elements: packs of it do not lie in memory.
__host__ __device__ __forceinline__ bool is_constant(const Operand& x) { return x.block == 1 && x.stride == 0; }

template <class T, int N>
__device__ __forceinline__ void read(const Operand& x, int64_t i, Compute<T> (&out)[N]) {
  const T* data = static_cast<const T*>(x.data);
  if (is_constant(x)) {
    fill(to_compute(*data), out);
  } else {
    load(data + place(x, i), out);
  }
}

// No-op for a result that is not wanted.
template <class T, int N>
__device__ __forceinline__ void write(const Result& x, int64_t i, const Compute<T> (&values)[N]) {
  if (x.data != nullptr) store(static_cast<T*>(x.data) + place(x, i), values);
}

// ---- clamp and mask ------------------------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ C soft_position(const Clamp& clamp, C x) {
  return tanh((x - C(0.5 * (clamp.low + clamp.high))) / C(0.5 * (clamp.high - clamp.low)));
}

template <class C>
__device__ __forceinline__ C clamped(const Clamp& clamp, C x) {
  if (clamp.mode == Clamp::Mode::none) return x;
  if (clamp.mode == Clamp::Mode::tanh) {
    return C(0.5 * (clamp.low + clamp.high)) + C(0.5 * (clamp.high - clamp.low)) * soft_position(clamp, x);
  }
  const C low = static_cast<C>(clamp.low), high = static_cast<C>(clamp.high);
  const C raised = x < low ? low : x;  // NaN compares false and stays
  return raised > high ? high : raised;
}

// The gradient before the clamp at `x`, given the one behind it.
template <class C>
__device__ __forceinline__ C clamp_gradient(const Clamp& clamp, C x, C grad) {
  if (clamp.mode == Clamp::Mode::tanh) {
    const C t = soft_position(clamp, x);
    return grad * (C(1) - t * t);
  }
  const bool below = x < static_cast<C>(clamp.low);
  const bool above = x > static_cast<C>(clamp.high);
  if (clamp.mode == Clamp::Mode::hard) return below || above ? C(0) : grad;
  return (below && grad >= C(0)) || (above && grad <= C(0)) ? C(0) : grad;
}

// Whether the pack from element i on is to be zero.
__device__ __forceinline__ bool is_masked(const Gaussians& q, int64_t i) {
  return q.mask != nullptr && !q.mask[i / q.mask_cols];
}

// ---- Gaussians -----------------------------------------------------------------------------------------------------

template <class T, Prior P, int N>
struct GaussianPack {
  using C = Compute<T>;
  C mean[N], scale[N], prior_mean[N], prior_scale[N];

  // The means may be left out, where no result depends on them.
  __device__ __forceinline__ GaussianPack(const Gaussians& q, int64_t i, bool with_means = true) {
    read<T>(q.scale, i, scale);
    if (with_means) read<T>(q.mean, i, mean);
    if constexpr (P != Prior::standard) {
      read<T>(q.prior_scale, i, prior_scale);
      if (with_means) read<T>(q.prior_mean, i, prior_mean);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) scale[j] = clamped(q.clamp, scale[j]);
  }

  __device__ __forceinline__ Parameters<C> at(int j) const {
    if constexpr (P == Prior::standard) return {mean[j], scale[j], C(0), C(0)};
    return {mean[j], scale[j], prior_mean[j], prior_scale[j]};
  }
};

// Gradients of a pack, as they are behind the clamp.
template <class T, Prior P, int N>
struct GradientPack {
  using C = Compute<T>;
  C mean[N], scale[N], prior_mean[N], prior_scale[N];

  __device__ __forceinline__ void set(int j, const Parameters<C>& grads) {
    mean[j] = grads.mean;
    scale[j] = grads.scale;
    prior_mean[j] = grads.prior_mean;
    prior_scale[j] = grads.prior_scale;
  }

  __device__ __forceinline__ void write(const Gaussians& q, const GaussianGradients& grads, int64_t i) {
    if (q.clamp.mode != Clamp::Mode::none) {
      C raw[N];
      read<T>(q.scale, i, raw);
#pragma unroll
      for (int j = 0; j < N; ++j) scale[j] = clamp_gradient(q.clamp, raw[j], scale[j]);
    }
    cuda::write<T>(grads.mean, i, mean);
    cuda::write<T>(grads.scale, i, scale);
    if constexpr (P != Prior::standard) {
      cuda::write<T>(grads.prior_mean, i, prior_mean);
      cuda::write<T>(grads.prior_scale, i, prior_scale);
    }
  }
};

template <class T, int N>
__device__ __forceinline__ void write_zeros(const GaussianGradients& grads, int64_t i) {
  const Compute<T> zeros[N] = {};
  write<T>(grads.mean, i, zeros);
  write<T>(grads.scale, i, zeros);
  write<T>(grads.prior_mean, i, zeros);
  write<T>(grads.prior_scale, i, zeros);
}

// ---- dispatch ------------------------------------------------------------------------------------------------------

// Calls f<S>() once for a pack: cheaper than a kernel for every scale type.
template <class F>
__device__ __forceinline__ void with_scale_type(ScaleType scale_type, F&& f) {
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

// Calls f<T, P>() for the dtype and the prior of `q`.
template <class F>
void dispatch_gaussians(const Gaussians& q, F&& f) {
  dispatch_dtype(q.dtype, [&]<class T>() {
    switch (q.prior) {
      case Prior::standard:
        return f.template operator()<T, Prior::standard>();
      case Prior::given:
        return f.template operator()<T, Prior::given>();
      case Prior::residual:
        return f.template operator()<T, Prior::residual>();
    }
  });
}

// Whether packs of N elements can be moved in one access each. Absent tensors are no hindrance.
template <class T, int N>
bool packs_fit(const void* contiguous) {
  return reinterpret_cast<uintptr_t>(contiguous) % sizeof(Pack<T, N>) == 0;
}
template <class T, int N, class Blocks>
bool blocks_fit(const Blocks& x) {
  return x.data == nullptr || (packs_fit<T, N>(x.data) && x.block % N == 0 && x.stride % N == 0);
}
template <class T, int N>
bool packs_fit(const Operand& x) {
  return is_constant(x) || blocks_fit<T, N>(x);
}
template <class T, int N>
bool packs_fit(const Gaussians& q) {
  return packs_fit<T, N>(q.mean) && packs_fit<T, N>(q.scale) && packs_fit<T, N>(q.prior_mean) &&
         packs_fit<T, N>(q.prior_scale) && (q.mask == nullptr || q.mask_cols % N == 0);
}
template <class T, int N>
bool packs_fit(const GaussianGradients& grads) {
  return blocks_fit<T, N>(grads.mean) && blocks_fit<T, N>(grads.scale) && blocks_fit<T, N>(grads.prior_mean) &&
         blocks_fit<T, N>(grads.prior_scale);
}

}  // namespace
}  // namespace isthmus::cuda
