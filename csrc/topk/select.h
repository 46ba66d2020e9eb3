// The k best of a short list that keeps its order: where ranks are equal, the earlier entry wins. Lists are filled in
// order of feature, so ties go to the lowest index without an index ever being compared.
#pragma once

#include "core/simd.h"

namespace isthmus {
namespace {

// Bit i is set where lane i of a comparison holds.
template <class C>
ISTHMUS_INLINE uint32_t lane_bits(Mask<C> mask) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(C) == 4) return _mm512_movepi32_mask((__m512i)mask);
  if constexpr (sizeof(C) == 8) return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
  if constexpr (sizeof(C) == 4) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
  if constexpr (sizeof(C) == 8) return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)mask));
#elif defined(__SSE2__)
  if constexpr (sizeof(C) == 4) return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
  if constexpr (sizeof(C) == 8) return static_cast<uint32_t>(_mm_movemask_pd((__m128d)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < lanes<C>; ++i) bits |= mask[i] ? 1u << i : 0u;
  return bits;
#endif
}

// ---- floating-point numbers in order -------------------------------------------------------------------------------

// Integers that sort like the numbers they stand for; the map is its own inverse.
inline int32_t flip(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
inline int64_t flip(int64_t bits) { return bits ^ ((bits >> 63) & 0x7fffffffffffffff); }

template <class C>
using Ordered = decltype(+Mask<C>{}[0]);

template <class C>
ISTHMUS_INLINE Ordered<C> to_ordered(C value) {
  Ordered<C> bits;
  std::memcpy(&bits, &value, sizeof value);
  return flip(bits);
}
template <class C>
ISTHMUS_INLINE C from_ordered(Ordered<C> ordered) {
  const Ordered<C> bits = flip(ordered);
  C value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// ---- selection -----------------------------------------------------------------------------------------------------

template <class C>
struct IndexVecOf {
  typedef int32_t type __attribute__((vector_size(4 * lanes<C>)));
};
// One index for each lane of a Vec<C>.
template <class C>
using IndexVec = typename IndexVecOf<C>::type;

template <class C>
ISTHMUS_INLINE IndexVec<C> load_indices(const int32_t* p) {
  IndexVec<C> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// first, first + 1, …
template <class C>
ISTHMUS_INLINE IndexVec<C> indices_from(int32_t first) {
  return __builtin_convertvector(iota<C>(), IndexVec<C>) + first;
}

// A list as two arrays, with room for one vector behind its end. It never holds a NaN.
template <class C>
struct Candidates {
  C* values;
  int32_t* indices;
  int64_t count;

  // Appends the lanes in `bits`, in their order.
  ISTHMUS_INLINE void append(Vec<C> value, IndexVec<C> index, uint32_t bits) {
#if defined(__AVX512VL__)
    if constexpr (sizeof(C) == 4) {
      const auto mask = static_cast<__mmask16>(bits);
      _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(mask, (__m512)value));
      _mm512_storeu_si512(indices + count, _mm512_maskz_compress_epi32(mask, (__m512i)index));
    } else {
      const auto mask = static_cast<__mmask8>(bits);
      _mm512_storeu_pd(values + count, _mm512_maskz_compress_pd(mask, (__m512d)value));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(indices + count),
                          _mm256_maskz_compress_epi32(mask, (__m256i)index));
    }
    count += __builtin_popcount(bits);
#else
    C lane_values[lanes<C>];
    int32_t lane_indices[lanes<C>];
    std::memcpy(lane_values, &value, sizeof value);
    std::memcpy(lane_indices, &index, sizeof index);
    for (; bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      values[count] = lane_values[lane];
      indices[count++] = lane_indices[lane];
    }
#endif
  }
};

// Calls f(position, inside) for each vector of a list; the bits `inside` are its lanes before the end.
template <class C, class F>
ISTHMUS_INLINE void each_vector(int64_t count, F&& f) {
  constexpr uint32_t all = (1u << lanes<C>)-1;
  int64_t i = 0;
  for (; i + lanes<C> <= count; i += lanes<C>) f(i, all);
  if (i < count) f(i, all >> (lanes<C> - (count - i)));
}

template <class C>
inline int64_t count_at_least(const Candidates<C>& list, C bound) {
  const Vec<C> bounds = splat(bound);
  int64_t total = 0;
  each_vector<C>(list.count, [&](int64_t i, uint32_t inside) {
    total += __builtin_popcount(lane_bits<C>(load(list.values + i) >= bounds) & inside);
  });
  return total;
}

// A value with at least k entries at or above it and at most k above: bisection over all numbers of the type. Each step
// is one vector pass over a list that sits in L1.
template <class C>
inline C cut_value(const Candidates<C>& list, int64_t k) {
  Ordered<C> low = to_ordered(static_cast<C>(-__builtin_inf())), high = to_ordered(static_cast<C>(__builtin_inf()));
  while (low < high) {
    const Ordered<C> middle = (low | high) - ((low ^ high) >> 1);  // rounded up, without overflow
    const int64_t count = count_at_least(list, from_ordered<C>(middle));
    if (count == k) return from_ordered<C>(middle);
    if (count > k) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return from_ordered<C>(low);
}

// Reduces the list to its k best entries, in their old order. Nothing that comes later belongs among them unless it is
// above the value returned.
template <class C>
inline C keep_best(Candidates<C>& list, int64_t k) {
  const C cut = cut_value(list, k);
  const Vec<C> cuts = splat(cut);
  int64_t ties = k;
  each_vector<C>(list.count, [&](int64_t i, uint32_t inside) {
    ties -= __builtin_popcount(lane_bits<C>(load(list.values + i) > cuts) & inside);
  });
  Candidates<C> kept{list.values, list.indices, 0};
  each_vector<C>(list.count, [&](int64_t i, uint32_t inside) {
    const Vec<C> value = load(list.values + i);
    uint32_t keep = lane_bits<C>(value > cuts);
    for (uint32_t tied = lane_bits<C>(value == cuts) & inside; tied != 0 && ties > 0; tied &= tied - 1, --ties) {
      keep |= tied & -tied;
    }
    kept.append(value, load_indices<C>(list.indices + i), keep & inside);
  });
  list = kept;
  return cut;
}

// Merges the sorted runs [0, middle) and [middle, end): larger first, the left one where they are equal.
template <class C>
inline void merge_runs(const Candidates<C>& from, int64_t begin, int64_t middle, int64_t end, Candidates<C>& to) {
  int64_t left = begin, right = middle;
  for (int64_t i = begin; i < end; ++i) {
    const bool take_right = left == middle || (right < end && from.values[right] > from.values[left]);
    const int64_t taken = take_right ? right : left;
    to.values[i] = from.values[taken];
    to.indices[i] = from.indices[taken];
    right += take_right;
    left += !take_right;
  }
}

// Stable merge sort, largest first. Ends in `list` or in `spare` and returns which.
template <class C>
inline Candidates<C> sort_descending(Candidates<C> list, Candidates<C> spare) {
  spare.count = list.count;
  for (int64_t run = 1; run < list.count; run *= 2) {
    for (int64_t begin = 0; begin < list.count; begin += 2 * run) {
      const int64_t middle = begin + run < list.count ? begin + run : list.count;
      const int64_t end = middle + run < list.count ? middle + run : list.count;
      merge_runs(list, begin, middle, end, spare);
    }
    const Candidates<C> sorted = spare;
    spare = list;
    list = sorted;
  }
  return list;
}

}  // namespace
}  // namespace isthmus
