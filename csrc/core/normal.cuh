// core/normal.h for one element on the device: the same forms, CUDA's own exp, log and expm1.
#pragma once

#include "core/gaussians.h"
#include "core/scale_type.h"

namespace isthmus::cuda {
namespace {

template <class C>
__device__ __forceinline__ C softplus(C x) {
  return fmax(x, C(0)) + log1p(exp(-fabs(x)));
}
template <class C>
__device__ __forceinline__ C sigmoid(C x) {
  return C(1) / (C(1) + exp(-x));
}

// expm1(x) - x without cancellation: the series where it converges fast, the difference elsewhere.
__device__ __forceinline__ float expm1mx(float x) {
  if (fabsf(x) > 0.5f) return expm1f(x) - x;
  float sum = 1.0f / 362880;
  sum = fmaf(sum, x, 1.0f / 40320);
  sum = fmaf(sum, x, 1.0f / 5040);
  sum = fmaf(sum, x, 1.0f / 720);
  sum = fmaf(sum, x, 1.0f / 120);
  sum = fmaf(sum, x, 1.0f / 24);
  sum = fmaf(sum, x, 1.0f / 6);
  sum = fmaf(sum, x, 0.5f);
  return x * x * sum;
}
__device__ __forceinline__ double expm1mx(double x) {
  if (fabs(x) > 0.5) return expm1(x) - x;
  double sum = 0;
  double factorial = 6402373705728000.0;  // 18!
  for (int n = 18; n >= 2; --n) {
    sum = sum * x + 1.0 / factorial;
    factorial /= n;
  }
  return x * x * sum;
}

template <ScaleType S, class C>
__device__ __forceinline__ C std_of(C scale) {
  if constexpr (S == ScaleType::logvar) return exp(C(0.5) * scale);
  if constexpr (S == ScaleType::std) return scale;
  if constexpr (S == ScaleType::softplus) return softplus(scale);
  if constexpr (S == ScaleType::square) return scale * scale;
}

template <ScaleType S, class C>
__device__ __forceinline__ C log_std_of(C scale) {
  if constexpr (S == ScaleType::logvar) return C(0.5) * scale;
  if constexpr (S == ScaleType::std) return log(scale);
  if constexpr (S == ScaleType::softplus) return log(softplus(scale));
  if constexpr (S == ScaleType::square) return C(2) * log(fabs(scale));
}

template <ScaleType S, class C>
__device__ __forceinline__ C std_slope(C scale) {
  if constexpr (S == ScaleType::logvar) return C(0.5) * exp(C(0.5) * scale);
  if constexpr (S == ScaleType::std) return C(1);
  if constexpr (S == ScaleType::softplus) return sigmoid(scale);
  if constexpr (S == ScaleType::square) return C(2) * scale;
}

template <ScaleType S, class C>
__device__ __forceinline__ C log_std_slope(C scale) {
  if constexpr (S == ScaleType::logvar) return C(0.5);
  if constexpr (S == ScaleType::std) return C(1) / scale;
  if constexpr (S == ScaleType::softplus) return sigmoid(scale) / softplus(scale);
  if constexpr (S == ScaleType::square) return C(2) / scale;
}

template <ScaleType S, class C>
__device__ __forceinline__ C inverse_std(C scale) {
  if constexpr (S == ScaleType::logvar) return exp(C(-0.5) * scale);
  return C(1) / std_of<S>(scale);
}

// A posterior and its prior, as their tensors give them.
template <class C>
struct Parameters {
  C mean, scale, prior_mean, prior_scale;
};

template <ScaleType S, Prior P, class C>
__device__ __forceinline__ C posterior_std(const Parameters<C>& x) {
  if constexpr (P == Prior::residual) return std_of<S>(x.scale) * std_of<S>(x.prior_scale);
  return std_of<S>(x.scale);
}

// The posterior's mean, seen from the prior's.
template <Prior P, class C>
__device__ __forceinline__ C offset(const Parameters<C>& x) {
  if constexpr (P == Prior::given) return x.mean - x.prior_mean;
  return x.mean;
}

// Its log-scale, seen from the prior's.
template <ScaleType S, Prior P, class C>
__device__ __forceinline__ C log_ratio(const Parameters<C>& x) {
  if constexpr (P == Prior::given) return log_std_of<S>(x.scale) - log_std_of<S>(x.prior_scale);
  return log_std_of<S>(x.scale);
}

template <ScaleType S, Prior P, class C>
__device__ __forceinline__ C kl_of(const Parameters<C>& x) {
  C q = offset<P>(x);
  if constexpr (P != Prior::standard) q *= inverse_std<S>(x.prior_scale);
  const C d = log_ratio<S, P>(x), remainder = expm1mx(d), e = d + remainder;
  return C(0.5) * (q * q + e * e) + remainder;
}

// Slopes of the divergence.
template <ScaleType S, Prior P, class C>
__device__ __forceinline__ Parameters<C> kl_slopes(const Parameters<C>& x) {
  const C e = expm1(log_ratio<S, P>(x)), excess = e * (e + C(2));  // (s / s_prior)² - 1
  const C to_scale = excess * log_std_slope<S>(x.scale);
  if constexpr (P == Prior::standard) {
    return {x.mean, to_scale, C(0), C(0)};
  } else {
    const C inverse = inverse_std<S>(x.prior_scale), q = offset<P>(x) * inverse;
    const C to_prior_log_std = P == Prior::residual ? -q * q : -(q * q + excess);
    return {q * inverse, to_scale, P == Prior::residual ? C(0) : -q * inverse,
            to_prior_log_std * log_std_slope<S>(x.prior_scale)};
  }
}

}  // namespace
}  // namespace isthmus::cuda
