// The float64 score x · w + b that exact searches compare, in the operations of core/score.h: the same bits as on the
// CPU. Its sixteen partial sums are those of sixteen lanes: half a warp scores a feature, with neighbouring loads.
#pragma once

#include "core/launch.cuh"

namespace isthmus::cuda {
namespace {

constexpr int score_sums = 16;

template <class T>
__device__ __forceinline__ double widen(T value) {
  return static_cast<double>(to_compute(value));
}

// sums[i] + this lane's share of x · weights[i], for Count features at once.
template <int Count, class T>
__device__ __forceinline__ void add_products(const T* x, const T* const (&weights)[Count], int64_t cols,
                                             double (&sums)[Count]) {
#pragma unroll 2
  for (int64_t k = threadIdx.x % score_sums; k < cols; k += score_sums) {
    const double component = widen(x[k]);
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      if constexpr (std::is_same_v<T, double>) {
        sums[i] = __dadd_rn(sums[i], __dmul_rn(component, weights[i][k]));
      } else {
        sums[i] += component * widen(weights[i][k]);  // exact products: fused or not, the same
      }
    }
  }
}

// What sixteen lanes have summed, in all of them.
__device__ __forceinline__ double fold(double sum) {
#pragma unroll
  for (int half = score_sums / 2; half > 0; half /= 2) {
    sum = __dadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, half));
  }
  return sum;
}

// The scores of `count` <= 32 features, that of the i-th in lane i. weight_of(i), bias_of(i): of the i-th; they are
// called for i < count. The whole warp calls it.
template <class T, class WeightOf, class BiasOf>
__device__ __forceinline__ double score_features(const T* x, int64_t cols, int count, const WeightOf& weight_of,
                                                 const BiasOf& bias_of) {
  constexpr int at_once = 4;
  const int lane = threadIdx.x % warp_size, half = lane / score_sums;
  double score = 0;
  for (int first = 0; first < count; first += 2 * at_once) {
    const T* weights[at_once];
    double sums[at_once] = {};
#pragma unroll
    for (int i = 0; i < at_once; ++i) {
      const int feature = first + 2 * i + half;
      weights[i] = weight_of(feature < count ? feature : first);
    }
    add_products(x, weights, cols, sums);
#pragma unroll
    for (int i = 0; i < at_once; ++i) {
      const double sum = __shfl_sync(0xffffffffu, fold(sums[i]), lane % 2 * score_sums);
      if (lane / 2 == first / 2 + i) score = sum;
    }
  }
  return lane < count ? __dadd_rn(score, bias_of(lane)) : 0;
}

// Rounded once. On the way to a half type the float is rounded to odd, so that it cannot land on a midpoint the score
// is not on.
template <class T>
__device__ __forceinline__ T round_score(double score) {
  if constexpr (sizeof(T) == 2) {
    const float cut = __double2float_rz(score);
    if (static_cast<double>(cut) == score || score != score) return from_compute<T>(cut);
    return from_compute<T>(__int_as_float(__float_as_int(cut) | 1));
  } else {
    return static_cast<T>(score);
  }
}

}  // namespace
}  // namespace isthmus::cuda
