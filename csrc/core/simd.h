// Vectors for kernel bodies: one source, compiled once per instruction set (cmake/Isa.cmake).
//
// Built on the vector extensions of GCC and Clang, so arithmetic, comparison and `mask ? a : b` are plain operators,
// and a fused multiply-add is formed by the compiler from a * b + c. Only what they lack is an intrinsic here.
//
// Everything lives in an anonymous namespace: each kernel file keeps its own copy, compiled for its own level.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ISTHMUS_INLINE inline __attribute__((always_inline))

namespace isthmus {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <class T>
constexpr int lanes = vector_bytes / int(sizeof(T));

typedef float f32v __attribute__((vector_size(vector_bytes)));
typedef double f64v __attribute__((vector_size(vector_bytes)));
typedef int32_t i32v __attribute__((vector_size(vector_bytes)));
typedef uint32_t u32v __attribute__((vector_size(vector_bytes)));
typedef int64_t i64v __attribute__((vector_size(vector_bytes)));
typedef uint64_t u64v __attribute__((vector_size(vector_bytes)));
typedef uint16_t u16h __attribute__((vector_size(vector_bytes / 2)));  // one u16 for each f32 lane
typedef uint16_t u16v __attribute__((vector_size(vector_bytes)));

// Compute<T>: what an element type computes and accumulates in. Vec<C>: vector of C. Mask<C>: result of a comparison.
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

template <class C>
struct VecOf;
template <>
struct VecOf<float> {
  using type = f32v;
  using mask = i32v;
};
template <>
struct VecOf<double> {
  using type = f64v;
  using mask = i64v;
};
template <class C>
using Vec = typename VecOf<C>::type;
template <class C>
using Mask = typename VecOf<C>::mask;

template <class C>
ISTHMUS_INLINE Vec<C> splat(C value) {
  return value - Vec<C>{};  // unlike +, keeps a negative zero and costs nothing
}

// 0, 1, 2, … in the integer type of the comparison masks.
template <class C>
ISTHMUS_INLINE Mask<C> iota() {
  Mask<C> result;
  for (int i = 0; i < lanes<C>; ++i) result[i] = i;
  return result;
}

// True in the first `count` lanes.
template <class C>
ISTHMUS_INLINE Mask<C> first_lanes(int64_t count) {
  using Int = decltype(+Mask<C>{}[0]);
  return iota<C>() < static_cast<Int>(count);
}

// ---- half types ----------------------------------------------------------------------------------------------------

ISTHMUS_INLINE f32v widen(const BFloat16* p) {
  u16h raw;
  std::memcpy(&raw, p, sizeof raw);
  return (f32v)(__builtin_convertvector(raw, u32v) << 16);
}

// Round to nearest even; a NaN stays a (quiet) NaN.
ISTHMUS_INLINE void narrow(BFloat16* p, f32v value) {
  const u32v bits = (u32v)value;
  const u32v rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u32v quiet = (bits >> 16) | 0x40u;
  const u16h raw = __builtin_convertvector((value == value) ? rounded : quiet, u16h);
  std::memcpy(p, &raw, sizeof raw);
}

#if defined(__AVX512F__)
ISTHMUS_INLINE f32v widen(const Half* p) {
  return (f32v)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
ISTHMUS_INLINE void narrow(Half* p, f32v value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
ISTHMUS_INLINE f32v widen(const Half* p) {
  return (f32v)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
ISTHMUS_INLINE void narrow(Half* p, f32v value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Without F16C: move exponent and mantissa into place and let one multiplication by 2^112 rebias normal and
// subnormal numbers alike; infinities and NaNs get their exponent restored.
ISTHMUS_INLINE f32v widen(const Half* p) {
  u16h raw;
  std::memcpy(&raw, p, sizeof raw);
  const u32v bits = __builtin_convertvector(raw, u32v);
  const u32v magnitude = (bits & 0x7fffu) << 13;
  const u32v scaled = (u32v)((f32v)magnitude * 0x1p112f);
  const u32v special = magnitude | 0x7f800000u;
  return (f32v)(((magnitude >= 0x0f800000u) ? special : scaled) | ((bits & 0x8000u) << 16));
}
ISTHMUS_INLINE void narrow(Half* p, f32v value) {
  const u32v bits = (u32v)value;
  const u32v sign = (bits >> 16) & 0x8000u;
  const u32v magnitude = bits & 0x7fffffffu;
  // Normal results: rebias and round the 13 dropped bits to even. A carry may roll over into infinity, as it should.
  const u32v normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 aligns the units of the last place, so the adder itself rounds.
  const u32v subnormal = (u32v)((f32v)magnitude + 0.5f) - 0x3f000000u;
  const u32v special = (magnitude > 0x7f800000u) ? (u32v{} + 0x7e00u) : (u32v{} + 0x7c00u);
  u32v result = (magnitude < 0x38800000u) ? subnormal : normal;
  result = (magnitude >= 0x477ff000u) ? special : result;
  const u16h raw = __builtin_convertvector(result | sign, u16h);
  std::memcpy(p, &raw, sizeof raw);
}
#endif

// ---- loads and stores ----------------------------------------------------------------------------------------------

ISTHMUS_INLINE f32v load(const float* p) {
  f32v v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
ISTHMUS_INLINE f64v load(const double* p) {
  f64v v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
ISTHMUS_INLINE f32v load(const BFloat16* p) { return widen(p); }
ISTHMUS_INLINE f32v load(const Half* p) { return widen(p); }

ISTHMUS_INLINE void store(float* p, f32v v) { std::memcpy(p, &v, sizeof v); }
ISTHMUS_INLINE void store(double* p, f64v v) { std::memcpy(p, &v, sizeof v); }
ISTHMUS_INLINE void store(BFloat16* p, f32v v) { narrow(p, v); }
ISTHMUS_INLINE void store(Half* p, f32v v) { narrow(p, v); }

// Two neighbouring vectors, for which halves need fewer instructions than for one and one.
template <class T>
ISTHMUS_INLINE void load_pair(const T* p, Vec<Compute<T>> (&v)[2]) {
  v[0] = load(p);
  v[1] = load(p + lanes<Compute<T>>);
}
template <class T>
ISTHMUS_INLINE void store_pair(T* p, const Vec<Compute<T>> (&v)[2]) {
  store(p, v[0]);
  store(p + lanes<Compute<T>>, v[1]);
}
#if defined(__AVX512F__)
ISTHMUS_INLINE void load_pair(const BFloat16* p, f32v (&v)[2]) {
  const __m512i raw = _mm512_loadu_si512(p);
  u16v place;  // each half goes to the upper half of its lane
  for (int i = 0; i < 2 * lanes<float>; ++i) place[i] = static_cast<uint16_t>(i / 2);
  constexpr __mmask32 upper = 0xaaaaaaaa;
  v[0] = (f32v)_mm512_maskz_permutexvar_epi16(upper, (__m512i)place, raw);
  v[1] = (f32v)_mm512_maskz_permutexvar_epi16(upper, (__m512i)(place + uint16_t(lanes<float>)), raw);
}

// What narrow() makes of a vector, in the upper half of each lane.
ISTHMUS_INLINE __m512i rounded_upper_halves(f32v value) {
  const __m512i bits = (__m512i)value;
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 not_a_number = _mm512_cmp_ps_mask((__m512)value, (__m512)value, _CMP_UNORD_Q);
  __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_add_epi32(rounded, odd, rounded, _mm512_set1_epi32(1));
  return _mm512_mask_or_epi32(rounded, not_a_number, bits, _mm512_set1_epi32(0x400000));
}
ISTHMUS_INLINE void store_pair(BFloat16* p, const f32v (&v)[2]) {
  u16v upper;
  for (int i = 0; i < 2 * lanes<float>; ++i) upper[i] = static_cast<uint16_t>(2 * i + 1);
  _mm512_storeu_si512(
      p, _mm512_permutex2var_epi16(rounded_upper_halves(v[0]), (__m512i)upper, rounded_upper_halves(v[1])));
}
#endif

// The first `count` lanes; the rest are zero and the memory behind them is not touched. count may exceed the vector.
template <class T>
ISTHMUS_INLINE Vec<Compute<T>> load_first(const T* p, int64_t count) {
  constexpr int width = lanes<Compute<T>>;
  if (count >= width) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (f32v)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
  } else if constexpr (sizeof(T) == 8) {
    return (f64v)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p);
  }
#endif
  T padded[width] = {};
  std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(T));
  return load(padded);
}

template <class T>
ISTHMUS_INLINE void store_first(T* p, Vec<Compute<T>> v, int64_t count) {
  constexpr int width = lanes<Compute<T>>;
  if (count >= width) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
  } else if constexpr (sizeof(T) == 8) {
    return _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1), (__m512d)v);
  }
#endif
  T padded[width];
  store(padded, v);
  std::memcpy(p, padded, static_cast<size_t>(count) * sizeof(T));
}

// One element, through the vector conversions, so scalar and vector code agree.
template <class T>
ISTHMUS_INLINE Compute<T> load_one(const T* p) {
  if constexpr (sizeof(T) == sizeof(Compute<T>)) {
    return *p;
  } else {
    return load_first(p, 1)[0];
  }
}
template <class T>
ISTHMUS_INLINE void store_one(T* p, Compute<T> value) {
  if constexpr (sizeof(T) == sizeof(Compute<T>)) {
    *p = value;
  } else {
    store_first(p, splat(value), 1);
  }
}

// ---- what operators cannot say -------------------------------------------------------------------------------------

ISTHMUS_INLINE f32v sqrt(f32v x) {
#if defined(__AVX512F__)
  return (f32v)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (f32v)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (f32v)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < lanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
ISTHMUS_INLINE f64v sqrt(f64v x) {
#if defined(__AVX512F__)
  return (f64v)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  return (f64v)_mm256_sqrt_pd((__m256d)x);
#elif defined(__SSE2__)
  return (f64v)_mm_sqrt_pd((__m128d)x);
#else
  for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

template <class V>
ISTHMUS_INLINE V abs(V x) {
  return x < 0 ? -x : x;
}

// Any lane of a comparison set?
template <class M>
ISTHMUS_INLINE bool any(M mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#else
  for (size_t i = 0; i < sizeof(M) / sizeof(mask[0]); ++i) {
    if (mask[i]) return true;
  }
  return false;
#endif
}

// One bit for each lane of a comparison.
ISTHMUS_INLINE unsigned lane_bits(i32v mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps((__m256)mask));
#elif defined(__SSE2__)
  return static_cast<unsigned>(_mm_movemask_ps((__m128)mask));
#else
  unsigned bits = 0;
  for (int i = 0; i < lanes<float>; ++i) bits |= (mask[i] & 1u) << i;
  return bits;
#endif
}
ISTHMUS_INLINE unsigned lane_bits(i64v mask) {
#if defined(__AVX512F__)
  return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_pd((__m256d)mask));
#elif defined(__SSE2__)
  return static_cast<unsigned>(_mm_movemask_pd((__m128d)mask));
#else
  unsigned bits = 0;
  for (int i = 0; i < lanes<double>; ++i) bits |= static_cast<unsigned>(mask[i] & 1) << i;
  return bits;
#endif
}

// The greater of two; the second where either is not a number.
ISTHMUS_INLINE f32v greater(f32v a, f32v b) {
#if defined(__AVX512F__)
  return (f32v)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (f32v)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (f32v)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
ISTHMUS_INLINE f64v greater(f64v a, f64v b) {
#if defined(__AVX512F__)
  return (f64v)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (f64v)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(__SSE2__)
  return (f64v)_mm_max_pd((__m128d)a, (__m128d)b);
#else
  return a > b ? a : b;
#endif
}

// The largest lane, of numbers.
template <class C, int Step = lanes<C> / 2>
ISTHMUS_INLINE C largest_lane(Vec<C> v) {
  Mask<C> partner;
  for (int i = 0; i < lanes<C>; ++i) partner[i] = i ^ Step;
  const Vec<C> larger = greater(__builtin_shuffle(v, partner), v);
  if constexpr (Step == 1) {
    return larger[0];
  } else {
    return largest_lane<C, Step / 2>(larger);
  }
}

// Sum of the lanes, pairwise: a fixed order for each level.
template <class C, class V = Vec<C>>
ISTHMUS_INLINE C sum_lanes(V v) {
  C parts[lanes<C>];
  std::memcpy(parts, &v, sizeof v);
  for (int half = lanes<C> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  }
  return parts[0];
}

// Product of the low 32 bits of each 64-bit lane.
ISTHMUS_INLINE u64v multiply_low_halves(u64v a, u64v b) {
#if defined(__AVX512F__)
  return (u64v)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (u64v)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (u64v)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Makes a product a rounded number: the compiler may not fuse it into a later addition.
template <class V>
ISTHMUS_INLINE V rounded(V x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

}  // namespace
}  // namespace isthmus
