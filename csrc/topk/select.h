// What selections are made of: numbers in order, short lists, heaps.
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

// ---- lists and heaps -----------------------------------------------------------------------------------------------

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
ISTHMUS_INLINE int64_t count_at_least(const Candidates<C>& list, C bound) {
  const Vec<C> bounds = splat(bound);
  int64_t total = 0;
  each_vector<C>(list.count, [&](int64_t i, uint32_t inside) {
    total += __builtin_popcount(lane_bits<C>(load(list.values + i) >= bounds) & inside);
  });
  return total;
}

// A value that at least `wanted` entries reach and, unless many are equal, at most `most`.
template <class C>
inline C cut_value(const Candidates<C>& list, int64_t wanted, int64_t most) {
  Vec<C> least = splat(list.values[0]), greatest = least;
  each_vector<C>(list.count, [&](int64_t i, uint32_t) {
    const Vec<C> part =
        i + lanes<C> <= list.count ? load(list.values + i) : load_first(list.values + i, list.count - i);
    least = part < least ? part : least;
    greatest = greater(part, greatest);
  });
  Ordered<C> low = to_ordered(C(0) - largest_lane<C>(Vec<C>{} - least)), high = to_ordered(largest_lane<C>(greatest));
  while (low < high) {
    const Ordered<C> middle = (low | high) - ((low ^ high) >> 1);  // rounded up, without overflow
    const int64_t count = count_at_least(list, from_ordered<C>(middle));
    if (count < wanted) {
      high = middle - 1;
    } else {
      low = middle;
      if (count <= most) break;
    }
  }
  return from_ordered<C>(low);
}

// A binary heap in two arrays; Order::before(value, note, other value, other note) tells what is nearer to the root.
template <class C, class Order>
struct Heap {
  C* values;
  int32_t* notes;
  int64_t count;

  // Fills the hole at i: entries below it that come before move up.
  ISTHMUS_INLINE void sift_down(int64_t i, C value, int32_t note) const {
    for (int64_t child = 2 * i + 1; child < count; child = 2 * i + 1) {
      const int64_t other = child + 1 < count ? child + 1 : child;
      child = Order::before(values[other], notes[other], values[child], notes[child]) ? other : child;
      if (!Order::before(values[child], notes[child], value, note)) break;
      values[i] = values[child];
      notes[i] = notes[child];
      i = child;
    }
    values[i] = value;
    notes[i] = note;
  }

  void push(C value, int32_t note) {
    int64_t i = count++;
    for (int64_t parent = (i - 1) / 2; i > 0 && Order::before(value, note, values[parent], notes[parent]);
         parent = (i - 1) / 2) {
      values[i] = values[parent];
      notes[i] = notes[parent];
      i = parent;
    }
    values[i] = value;
    notes[i] = note;
  }

  void pop() {
    --count;
    sift_down(0, values[count], notes[count]);
  }
};

}  // namespace
}  // namespace isthmus
