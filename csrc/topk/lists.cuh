// The best of a list, by one warp.
#pragma once

#include "core/launch.cuh"

namespace isthmus::cuda {
namespace {

constexpr unsigned full_warp = 0xffffffffu;

__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x) % warp_size; }
__device__ __forceinline__ int lanes_below(unsigned mask) { return __popc(mask & ((1u << lane_of_thread()) - 1)); }

// Integers that sort like the numbers they stand for; the map is its own inverse.
__device__ __forceinline__ int flip(int bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
__device__ __forceinline__ long long flip(long long bits) { return bits ^ ((bits >> 63) & 0x7fffffffffffffffll); }
__device__ __forceinline__ int to_ordered(float value) { return flip(__float_as_int(value)); }
__device__ __forceinline__ long long to_ordered(double value) { return flip(__double_as_longlong(value)); }
__device__ __forceinline__ float from_ordered(int ordered) { return __int_as_float(flip(ordered)); }
__device__ __forceinline__ double from_ordered(long long ordered) { return __longlong_as_double(flip(ordered)); }

// How many of the numbers at(0) … at(count - 1) are what is(number) says.
template <class At, class Is>
__device__ __forceinline__ int64_t count_where(const At& at, int64_t count, const Is& is) {
  int64_t found = 0;
  for (int64_t i = lane_of_thread(); i < count; i += warp_size) found += is(at(i));
  return warp_total(found);
}

// A value with at least k of the numbers at or above it and at most k above: bisection over all numbers of the type.
// None is a NaN.
template <class C, class At>
__device__ C cut_value(const At& at, int64_t count, int64_t k) {
  auto low = to_ordered(-infinity<C>()), high = to_ordered(infinity<C>());
  while (low < high) {
    const auto middle = (low | high) - ((low ^ high) >> 1);  // rounded up, without overflow
    const C bound = from_ordered(middle);
    const int64_t found = count_where(at, count, [=](C value) { return value >= bound; });
    if (found == k) return bound;
    if (found > k) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return from_ordered(low);
}

// A list in global memory that belongs to one warp: ranks, and what each belongs to.
struct List {
  double* ranks;
  int32_t* notes;
};

// Moves the k best of count entries to the front, in their old order; of equals, the first stay. Nothing that comes
// later belongs among them unless it is above the value returned.
__device__ inline double keep_best(const List& list, int64_t count, int64_t k) {
  const auto at = [&](int64_t i) { return list.ranks[i]; };
  const double cut = cut_value<double>(at, count, k);
  const int64_t above = count_where(at, count, [=](double rank) { return rank > cut; });
  int64_t ties = k - above, kept = 0;
  for (int64_t base = 0; base < count; base += warp_size) {
    const int64_t i = base + lane_of_thread();
    const double rank = i < count ? list.ranks[i] : -infinity<double>();
    const int32_t note = i < count ? list.notes[i] : 0;
    const unsigned tied = __ballot_sync(full_warp, i < count && rank == cut);
    const bool keep = i < count && (rank > cut || (rank == cut && lanes_below(tied) < ties));
    const unsigned keepers = __ballot_sync(full_warp, keep);
    __syncwarp();  // entries are read before any is overwritten
    if (keep) {
      list.ranks[kept + lanes_below(keepers)] = rank;
      list.notes[kept + lanes_below(keepers)] = note;
    }
    ties -= __popc(tied);
    kept += __popc(keepers);
  }
  __syncwarp();
  return cut;
}

// Where in a descending run [begin, end) the entries that precede `rank` end: those above it, or not below it.
__device__ inline int64_t preceding(const double* ranks, int64_t begin, int64_t end, double rank, bool equals_too) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    const bool precedes = ranks[middle] > rank || (equals_too && ranks[middle] == rank);
    if (precedes) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Stable merge sort, largest first; every entry finds its place in the merged run by a search in the other one. Ends in
// `list` or in `spare` and returns which.
__device__ inline List sort_descending(List list, List spare, int64_t count) {
  for (int64_t run = 1; run < count; run *= 2) {
    for (int64_t i = lane_of_thread(); i < count; i += warp_size) {
      const int64_t begin = i / (2 * run) * (2 * run);
      const int64_t middle = begin + run < count ? begin + run : count;
      const int64_t end = middle + run < count ? middle + run : count;
      const double rank = list.ranks[i];
      // An entry of the left run goes behind the greater ones of the right run; one of the right run also behind
      // equals.
      const int64_t to = i < middle ? i + preceding(list.ranks, middle, end, rank, false) - middle
                                    : i - middle + preceding(list.ranks, begin, middle, rank, true);
      spare.ranks[to] = rank;
      spare.notes[to] = list.notes[i];
    }
    __syncwarp();
    const List sorted = spare;
    spare = list;
    list = sorted;
  }
  return list;
}

}  // namespace
}  // namespace isthmus::cuda
