// Items grouped by an integer index on CUDA: what core/sort.h does on the CPU, by CUB's stable radix sort. Sums over a
// group run in item order, in chunks of a fixed size: the same bits every time, without float atomics.
//
// Items of index -1 belong to no group. Nothing waits for the device. An index out of range stops it with a message, as
// torch's own indexing does.
#pragma once

#include <cstdio>
#include <cub/device/device_radix_sort.cuh>

#include "core/arena.cuh"

namespace isthmus::cuda {
namespace {

constexpr int sort_threads = 128;

// Stops the device at an index outside [lowest, end).
__device__ __forceinline__ void check_index(int64_t index, int64_t lowest, int64_t end) {
  if (index >= lowest && index < end) return;
  printf("isthmus: indices holds %lld; expected %lld <= index < %lld\n", static_cast<long long>(index),
         static_cast<long long>(lowest), static_cast<long long>(end));
  __trap();
}

__global__ void __launch_bounds__(sort_threads)
    number_items_kernel(const int64_t* index, int64_t num_items, int64_t lowest, int64_t groups, int64_t* numbers) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * sort_threads + threadIdx.x;
  if (i >= num_items) return;
  check_index(index[i], lowest, groups);
  numbers[i] = i;
}

// starts[g] = the first position whose key is at least g, for g = 0 … groups.
__global__ void __launch_bounds__(sort_threads)
    find_starts_kernel(const uint64_t* keys, int64_t num_items, int64_t groups, int64_t* starts) {
  const int64_t g = static_cast<int64_t>(blockIdx.x) * sort_threads + threadIdx.x;
  if (g > groups) return;
  int64_t low = 0, high = num_items;  // keys before low are below g, keys from high on are not
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (keys[middle] < static_cast<uint64_t>(g)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  starts[g] = low;
}

// Group g holds items[starts[g]] … items[starts[g + 1] - 1], ascending; keys[p] is the group of the item at position p.
// Keys have no sign: the items of no group, of index -1, come last, from starts[count] on.
struct Groups {
  int64_t count, num_items;
  int64_t *numbers, *items, *starts;
  uint64_t* keys;
  void* temporary;
  size_t temporary_bytes = 0;

  // Lays out the memory; nothing is launched.
  Groups(int64_t num_items_, int64_t count_, Arena& arena) : count(count_), num_items(num_items_) {
    numbers = arena.take<int64_t>(num_items);
    keys = arena.take<uint64_t>(num_items);
    items = arena.take<int64_t>(num_items);
    starts = arena.take<int64_t>(count + 1);
    radix_sort(nullptr, nullptr, temporary_bytes, nullptr);
    temporary = arena.take<char>(static_cast<int64_t>(temporary_bytes));
  }

  // lowest: of the indices, 0 or -1.
  void sort(const int64_t* index, int64_t lowest, void* stream) {
    launch("number_items", number_items_kernel, divide_up(num_items, sort_threads), sort_threads, 0, stream, index,
           num_items, lowest, count, numbers);
    if (num_items > 0) radix_sort(index, temporary, temporary_bytes, stream);
    launch("find_starts", find_starts_kernel, divide_up(count + 1, sort_threads), sort_threads, 0, stream, keys,
           num_items, count, starts);
  }

 private:
  // With null memory it stores the size it needs.
  void radix_sort(const int64_t* index, void* memory, size_t& bytes, void* stream) {
    int end_bit = 1;  // the lowest bits of -1 are more than those of any group
    while (end_bit < 63 && (int64_t{1} << end_bit) <= count) ++end_bit;
    check(cub::DeviceRadixSort::SortPairs(memory, bytes, reinterpret_cast<const uint64_t*>(index), keys, numbers, items,
                                          num_items, 0, end_bit, static_cast<cudaStream_t>(stream)),
          "radix sort");
  }
};

// ---- sums over groups ----------------------------------------------------------------------------------------------

// Items in a sorted order: group g has the positions starts[g] … starts[g + 1] - 1, items[p] is the item at position p
// and index its group.
struct SortedItems {
  int64_t count, num_items;  // of groups; of items, whether in a group or in none
  const int64_t *items, *starts, *index;

  __device__ __forceinline__ int64_t group_at(int64_t position) const { return index[items[position]]; }
};

// What run_sums needs of the caller, on the device and by value; columns go in packs:
//     using Number = …;
//     static constexpr int pack = …;
//     void add(int64_t position, int64_t group, int64_t column, Number (&sum)[pack])
//     void write(int64_t group, int64_t column, const Number (&sum)[pack])     once for each sum; zeros for no items
template <class C>
struct SumsLayout {
  int64_t width, items_per_chunk, chunks;
  int threads;  // that share a chunk, a pack of columns each at a time; a power of two
  C* partial;   // [chunks][2][width]: sums of the group that a chunk enters in the middle, and of the one it breaks off

  SumsLayout(int64_t num_items, int64_t width_, int pack, Arena& arena)
      : width(width_),
        items_per_chunk(chunk_size(num_items, width_)),
        chunks(divide_up(num_items, items_per_chunk)),
        threads(1),
        partial(arena.take<C>(2 * chunks * width)) {
    while (threads < sort_threads && threads * pack < width) threads *= 2;
  }

 private:
  // Chunks grow with the items: partial sums take memory for enough chunks to fill the device, not for each 32 items.
  static int64_t chunk_size(int64_t num_items, int64_t width) {
    constexpr int64_t min_items = 32, min_chunks = 8192, min_numbers = 1 << 20;
    const int64_t narrow = width < 1 ? min_numbers : min_numbers / width;
    const int64_t size = divide_up(num_items, narrow > min_chunks ? narrow : min_chunks);
    return size > min_items ? size : min_items;
  }
};

// The pack of columns from `column` on; partial sums need not be aligned.
template <class C, int N>
__device__ __forceinline__ void store_partial(C* sums, int64_t column, const C (&values)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) sums[column + j] = values[j];
}

template <class C, class Body>
__global__ void __launch_bounds__(sort_threads) sum_chunks_kernel(SortedItems groups, SumsLayout<C> layout, Body body) {
  constexpr int n = Body::pack;
  const int64_t teams = sort_threads / layout.threads;
  const int64_t chunk = blockIdx.x * teams + threadIdx.x / layout.threads;
  if (chunk >= layout.chunks) return;
  const int64_t first = chunk * layout.items_per_chunk, limit = first + layout.items_per_chunk;
  const int64_t grouped = groups.starts[groups.count], last = limit < grouped ? limit : grouped;
  C* head = layout.partial + 2 * chunk * layout.width;
  C* tail = head + layout.width;
  for (int64_t k = threadIdx.x % layout.threads * n; k < layout.width; k += layout.threads * n) {
    for (int64_t i = first; i < last;) {
      const int64_t g = groups.group_at(i), begin = groups.starts[g], end = groups.starts[g + 1];
      const bool enters = begin<first, leaves = end> last;
      const int64_t stop = leaves ? last : end;
      C sum[n] = {};
#pragma unroll 4
      for (; i < stop; ++i) body.add(i, g, k, sum);
      if (enters) {
        store_partial(head, k, sum);
      } else if (leaves) {
        store_partial(tail, k, sum);
      } else {
        body.write(g, k, sum);
      }
    }
  }
}

// Groups that lie in several chunks, and those that are empty.
template <class C, class Body>
__global__ void __launch_bounds__(sort_threads) sum_rest_kernel(SortedItems groups, SumsLayout<C> layout, Body body) {
  constexpr int n = Body::pack;
  const int64_t teams = sort_threads / layout.threads;
  const int64_t g = blockIdx.x * teams + threadIdx.x / layout.threads;
  if (g >= groups.count) return;
  const int64_t begin = groups.starts[g], end = groups.starts[g + 1];
  const bool empty = begin == end;
  const int64_t first = begin / layout.items_per_chunk, last = empty ? first : (end - 1) / layout.items_per_chunk;
  if (!empty && first == last) return;  // written by sum_chunks_kernel
  for (int64_t k = threadIdx.x % layout.threads * n; k < layout.width; k += layout.threads * n) {
    C sum[n] = {};
    const auto add = [&](const C* sums) {
#pragma unroll
      for (int j = 0; j < n; ++j) sum[j] += sums[k + j];
    };
    if (!empty) add(layout.partial + (2 * first + 1) * layout.width);
#pragma unroll 4
    for (int64_t c = first + 1; c <= last; ++c) add(layout.partial + 2 * c * layout.width);
    body.write(g, k, sum);
  }
}

template <class C, class Body>
void run_sums(const SortedItems& groups, const SumsLayout<C>& layout, const Body& body, void* stream) {
  static_assert(std::is_same_v<typename Body::Number, C>);
  const int64_t teams = sort_threads / layout.threads;
  launch("sum_chunks", sum_chunks_kernel<C, Body>, divide_up(layout.chunks, teams), sort_threads, 0, stream, groups,
         layout, body);
  launch("sum_rest", sum_rest_kernel<C, Body>, divide_up(groups.count, teams), sort_threads, 0, stream, groups, layout,
         body);
}

// A body column by column, for the items themselves:
//     Number share(int64_t item, int64_t group, int64_t column)       what an item adds to its group
//     void write(int64_t group, int64_t column, Number sum)
template <class Body>
struct ItemShares {
  using Number = typename Body::Number;
  static constexpr int pack = 1;
  Body body;
  const int64_t* items;

  __device__ __forceinline__ void add(int64_t position, int64_t group, int64_t column, Number (&sum)[1]) const {
    sum[0] += body.share(items[position], group, column);
  }
  __device__ __forceinline__ void write(int64_t group, int64_t column, const Number (&sum)[1]) const {
    body.write(group, column, sum[0]);
  }
};

// Lays out its memory when made; run() sorts and sums.
template <class C>
struct GroupSums {
  Groups groups;
  SumsLayout<C> layout;

  GroupSums(int64_t num_items, int64_t count, int64_t width, Arena& arena)
      : groups(num_items, count, arena), layout(num_items, width, 1, arena) {}

  // lowest: of the indices, 0 or -1.
  template <class Body>
  void run(const int64_t* index, int64_t lowest, const Body& body, void* stream) {
    groups.sort(index, lowest, stream);
    const SortedItems sorted{groups.count, groups.num_items, groups.items, groups.starts, index};
    run_sums(sorted, layout, ItemShares<Body>{body, groups.items}, stream);
  }
};

}  // namespace
}  // namespace isthmus::cuda
