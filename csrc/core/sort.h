// Items grouped by an integer index: the one sort behind every gradient and statistic that is scattered by code or by
// feature. Sums over a group then run in item order, so they are the same numbers every time, without atomics.
#pragma once

#include <cstdint>

#include "core/buffer.h"
#include "core/parallel.h"
#include "core/tiles.h"

namespace isthmus {
namespace {

// Position of the first index outside [lowest, groups), or -1. Only a block that holds one is looked at twice: in the
// rest an index costs three vector operations, as its own sign or that of its distance from the last one tells.
inline int64_t find_outside(const int64_t* index, int64_t count, int64_t groups, int64_t lowest = 0) {
  constexpr int64_t block = 1024;
  for (int64_t first = 0; first < count; first += block) {
    const int64_t end = first + block < count ? first + block : count;
    uint64_t signs = 0;
    for (int64_t i = first; i < end; ++i) {
      const uint64_t value = static_cast<uint64_t>(index[i]);
      signs |= (value - static_cast<uint64_t>(lowest)) | (static_cast<uint64_t>(groups - 1) - value);
    }
    if (signs >> 63 == 0) continue;
    for (int64_t i = first; i < end; ++i) {
      if (index[i] < lowest || index[i] >= groups) return i;
    }
  }
  return -1;
}

// Stable counting sort. Every index lies in [0, count), or is negative: then its item belongs to no group. Group g
// gets items[starts[g]] … items[starts[g + 1] - 1], ascending, of starts [count + 1] and items [num_indices]; places
// behind starts[count] are not written. O(indices + groups) time and memory.
inline void sort_by_group(const int64_t* index, int64_t num_indices, int64_t count, int64_t* starts, int64_t* items) {
  // Chunks of items count and place independently. Their histograms together are no larger than the index itself.
  const int64_t chunk = count > 16 * 1024 ? count : 16 * 1024, chunks = (num_indices + chunk - 1) / chunk;
  Buffer<int64_t> places(chunks * count);  // [chunk][group]: first how many items, then where the next one goes
  const auto each_chunk = [&](auto&& visit) {
    parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t last = (c + 1) * chunk < num_indices ? (c + 1) * chunk : num_indices;
        visit(places.data + c * count, c * chunk, last);
      }
    });
  };
  each_chunk([&](int64_t* place, int64_t first, int64_t last) {
    for (int64_t g = 0; g < count; ++g) place[g] = 0;
    for (int64_t i = first; i < last; ++i) {
      if (index[i] >= 0) ++place[index[i]];
    }
  });
  int64_t next = 0;
  for (int64_t g = 0; g < count; ++g) {
    starts[g] = next;
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t found = places.data[c * count + g];
      places.data[c * count + g] = next;
      next += found;
    }
  }
  starts[count] = next;
  each_chunk([&](int64_t* place, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (index[i] >= 0) items[place[index[i]]++] = i;
    }
  });
}

// Items in the order that sort_by_group gives them.
struct SortedItems {
  int64_t count;  // of groups
  const int64_t* starts;
  const int64_t* items;

  int64_t num_items() const { return starts[count]; }

  // The group of the item at a sorted position.
  int64_t group_at(int64_t position) const {
    int64_t low = 0, high = count;  // starts[low] <= position < starts[high]
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (starts[middle] <= position ? low : high) = middle;
    }
    return low;
  }
};

// Sorts items into memory of its own.
struct Groups {
  const int64_t count;
  Buffer<int64_t> starts;  // [count + 1]
  Buffer<int64_t> items;   // those that belong to a group come first

  Groups(const int64_t* index, int64_t num_indices, int64_t count_)
      : count(count_), starts(count + 1), items(num_indices) {
    sort_by_group(index, num_indices, count, starts.data, items.data);
  }

  operator SortedItems() const { return {count, starts.data, items.data}; }
};

// The sum of every group, a vector of `width` numbers: sum_run(first, last, group, sum) sets sum[0 … width) to what the
// items at the sorted positions first … last - 1 of a group add up to, write(group, sum) receives each group's sum
// once, zeros for an empty group. Both are called from several threads.
//
// Sorted items are cut into chunks of a fixed size, so threads share the work evenly even if one group holds most of
// the items; a group that crosses a border is put together from its partial sums, in order. The chunks grow with the
// width, so that the partial sums of any problem fit into a few dozen megabytes.
template <class C, class SumRun, class Write>
inline void sum_runs(const SortedItems& groups, int64_t width, SumRun&& sum_run, Write&& write) {
  constexpr int64_t least_chunk = 512, max_partial = 4 << 20;
  const int64_t num_items = groups.num_items(), max_chunks = max_partial / (2 * width + 1) + 1;
  const int64_t fair_chunk = (num_items + max_chunks - 1) / max_chunks;
  const int64_t chunk = fair_chunk < least_chunk ? least_chunk : fair_chunk;
  const int64_t chunks = (num_items + chunk - 1) / chunk;
  const int64_t* starts = groups.starts;
  // What a chunk adds to the group it starts in the middle of (head), and to the one it breaks off (tail).
  Buffer<C> partial(chunks * 2 * width);
  const auto head_of = [&](int64_t c) { return partial.data + 2 * c * width; };
  const auto tail_of = [&](int64_t c) { return partial.data + (2 * c + 1) * width; };

  parallel_for(chunks, grain_elements / (chunk * width + 1) + 1, [&](int64_t begin, int64_t end) {
    Buffer<C> whole(width);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = c * chunk, last = first + chunk < num_items ? first + chunk : num_items;
      int64_t g = groups.group_at(first);
      for (int64_t i = first; i < last; ++g) {
        const bool enters = first > starts[g], leaves = last < starts[g + 1];
        const int64_t stop = leaves ? last : starts[g + 1];
        if (i == stop) continue;
        C* sum = enters ? head_of(c) : leaves ? tail_of(c) : whole.data;
        sum_run(i, stop, g, sum);
        if (!enters && !leaves) write(g, sum);
        i = stop;
      }
    }
  });

  parallel_for(groups.count, 1024, [&](int64_t begin, int64_t end) {
    Buffer<C> sum(width);
    for (int64_t g = begin; g < end; ++g) {
      const bool empty = starts[g] == starts[g + 1];
      const int64_t first = starts[g] / chunk, last = empty ? first : (starts[g + 1] - 1) / chunk;
      if (!empty && first == last) continue;  // written above
      for (int64_t k = 0; k < width; ++k) sum.data[k] = empty ? C(0) : tail_of(first)[k];
      for (int64_t c = first + 1; c <= last; ++c) {
        for (int64_t k = 0; k < width; ++k) sum.data[k] += head_of(c)[k];
      }
      write(g, sum.data);
    }
  });
}

// The same with add(item, group, sum), which adds an item's share to sum[0 … width).
template <class C, class Add, class Write>
inline void sum_groups(const SortedItems& groups, int64_t width, Add&& add, Write&& write) {
  sum_runs<C>(
      groups, width,
      [&](int64_t first, int64_t last, int64_t group, C* sum) {
        for (int64_t k = 0; k < width; ++k) sum[k] = 0;
        for (int64_t i = first; i < last; ++i) add(groups.items[i], group, sum);
      },
      write);
}

}  // namespace
}  // namespace isthmus
