// The float64 score x · w + b of one row and one feature, which exact searches compare: the same bits at every level.
//
// Sixteen partial sums, of the components k with equal k mod 16, are folded in halves; the bias comes last. Products of
// float32 numbers are exact in float64, so there it does not matter whether they are fused into the sums.
#pragma once

#include "core/simd.h"

namespace isthmus {
namespace {

constexpr int score_sums = 16;
constexpr int score_parts = score_sums / lanes<double>;

// `count` numbers as float64, zeros behind them.
template <class T>
ISTHMUS_INLINE void load_doubles(const T* p, int64_t count, f64v (&v)[score_parts]) {
  alignas(64) Compute<T> numbers[score_sums];
  for (int i = 0; i < score_sums; i += lanes<Compute<T>>) {
    store(numbers + i, i < count ? load_first(p + i, count - i) : Vec<Compute<T>>{});
  }
#pragma GCC unroll 8
  for (int i = 0; i < score_parts; ++i) {
    typedef Compute<T> Part __attribute__((vector_size(sizeof(Compute<T>) * lanes<double>)));
    Part part;
    std::memcpy(&part, numbers + i * lanes<double>, sizeof part);
    v[i] = __builtin_convertvector(part, f64v);
  }
}
#if defined(__AVX512F__)
ISTHMUS_INLINE void load_doubles(const float* p, f64v (&v)[score_parts]) {
  v[0] = (f64v)_mm512_cvtps_pd(_mm256_loadu_ps(p));
  v[1] = (f64v)_mm512_cvtps_pd(_mm256_loadu_ps(p + 8));
}
#endif
ISTHMUS_INLINE void load_doubles(const double* p, f64v (&v)[score_parts]) { std::memcpy(v, p, sizeof v); }
template <class T>
ISTHMUS_INLINE void load_doubles(const T* p, f64v (&v)[score_parts]) {
  load_doubles(p, score_sums, v);
}

// sums + x · w, component by component.
template <class T>
ISTHMUS_INLINE void add_products(const f64v (&x)[score_parts], const f64v (&w)[score_parts],
                                 f64v (&sums)[score_parts]) {
#pragma GCC unroll 8
  for (int i = 0; i < score_parts; ++i) {
    if constexpr (sizeof(T) == sizeof(double)) {
      sums[i] += rounded(x[i] * w[i]);
    } else {
      sums[i] += x[i] * w[i];
    }
  }
}

ISTHMUS_INLINE double fold(f64v (&sums)[score_parts]) {
#pragma GCC unroll 8
  for (int half = score_parts / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  double folded[lanes<double>];
  std::memcpy(folded, sums, sizeof folded);
#pragma GCC unroll 8
  for (int half = lanes<double> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) folded[i] += folded[i + half];
  }
  return folded[0];
}

// scores[i] = x · weights[i]: as many at a time as registers hold share the work on x, which may be in float64 already.
constexpr int scores_at_once = lanes<double> >= 4 ? lanes<double> / 2 : 1;

template <int Count, class X, class T>
ISTHMUS_INLINE void exact_products(const X* x, const T* const (&weights)[Count], int64_t cols,
                                   double (&scores)[Count]) {
  f64v sums[Count][score_parts], a[score_parts], b[score_parts];
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i) {
#pragma GCC unroll 8
    for (int p = 0; p < score_parts; ++p) sums[i][p] = f64v{};
  }
  int64_t k = 0;
  for (; k + score_sums <= cols; k += score_sums) {
    load_doubles(x + k, a);
#pragma GCC unroll 4
    for (int i = 0; i < Count; ++i) {
      load_doubles(weights[i] + k, b);
      add_products<T>(a, b, sums[i]);
    }
  }
  if (k < cols) {
    load_doubles(x + k, cols - k, a);
#pragma GCC unroll 4
    for (int i = 0; i < Count; ++i) {
      load_doubles(weights[i] + k, cols - k, b);
      add_products<T>(a, b, sums[i]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i) scores[i] = fold(sums[i]);
}

template <class T>
inline double exact_score(const T* x, const T* weight, int64_t cols, double bias) {
  double score[1];
  exact_products<1, T, T>(x, {weight}, cols, score);
  return score[0] + bias;
}

// Rounded once. On the way to a half type the float is rounded to odd, so that it cannot land on a midpoint the score
// is not on.
template <class T>
inline void store_score(T* p, double score) {
  if constexpr (sizeof(T) == sizeof(double)) {
    *p = score;
  } else {
    float value = static_cast<float>(score);
    if (const double back = static_cast<double>(value); sizeof(T) == 2 && back != score && score == score) {
      int32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      if (__builtin_fabs(back) > __builtin_fabs(score)) --bits;
      bits |= 1;
      std::memcpy(&value, &bits, sizeof bits);
    }
    store_one(p, value);
  }
}

}  // namespace
}  // namespace isthmus
