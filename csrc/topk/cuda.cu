// The top-k encoder on CUDA devices; what is computed stands in cpu.inl.
//
// Each block multiplies 128 rows of x with the weights of a range of features, tile by tile (core/product.cuh).
// A tile goes through shared memory, where a warp takes a row, compares it with the row's running k-th best and appends
// the few that pass to a list in global memory; a full list is cut down to its k best, which raises the threshold.
// Lists are filled in order of feature and keep their order, so ties go to the lowest index and no atomics are needed.
// Few rows do not fill the device: then the features are cut into ranges for different blocks. A second kernel, one
// warp a row, brings the ranges together and sorts.
//
// Arithmetic bounds encode: 2·N·F·D operations on the FMA units. The [N, F] scores never exist; lists take 2k + 128
// entries for each row and range.

#include "core/product.cuh"
#include "core/sort.cuh"
#include "topk/kernels.h"

namespace isthmus::cuda {
namespace {

constexpr unsigned full_warp = 0xffffffffu;

__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x) % warp_size; }
__device__ __forceinline__ int lanes_below(unsigned mask) { return __popc(mask & ((1u << lane_of_thread()) - 1)); }

// ---- selection, by one warp ----------------------------------------------------------------------------------------

// Integers that sort like the numbers they stand for; the map is its own inverse.
__device__ __forceinline__ int flip(int bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
__device__ __forceinline__ long long flip(long long bits) { return bits ^ ((bits >> 63) & 0x7fffffffffffffffll); }
__device__ __forceinline__ int to_ordered(float value) { return flip(__float_as_int(value)); }
__device__ __forceinline__ long long to_ordered(double value) { return flip(__double_as_longlong(value)); }
__device__ __forceinline__ float from_ordered(int ordered) { return __int_as_float(flip(ordered)); }
__device__ __forceinline__ double from_ordered(long long ordered) { return __longlong_as_double(flip(ordered)); }

// A list in global memory that belongs to one warp; it never holds a NaN.
template <class C>
struct Candidates {
  C* values;
  int* indices;
};

template <class C>
__device__ int64_t count_at_least(const Candidates<C>& list, int64_t count, C bound) {
  int64_t found = 0;
  for (int64_t i = lane_of_thread(); i < count; i += warp_size) found += list.values[i] >= bound;
#pragma unroll
  for (int offset = warp_size / 2; offset > 0; offset /= 2) found += __shfl_xor_sync(full_warp, found, offset);
  return found;
}

// A value with at least k entries at or above it and at most k above: bisection over all numbers of the type.
template <class C>
__device__ C cut_value(const Candidates<C>& list, int64_t count, int64_t k) {
  auto low = to_ordered(-infinity<C>()), high = to_ordered(infinity<C>());
  while (low < high) {
    const auto middle = (low | high) - ((low ^ high) >> 1);  // rounded up, without overflow
    const int64_t found = count_at_least(list, count, from_ordered(middle));
    if (found == k) return from_ordered(middle);
    if (found > k) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return from_ordered(low);
}

// Moves the k best of count entries to the front, in their old order; of equals, the first stay. Nothing that comes
// later belongs among them unless it is above the value returned.
template <class C>
__device__ C keep_best(const Candidates<C>& list, int64_t count, int64_t k) {
  const C cut = cut_value(list, count, k);
  int64_t above = 0;
  for (int64_t base = 0; base < count; base += warp_size) {
    const int64_t i = base + lane_of_thread();
    above += __popc(__ballot_sync(full_warp, i < count && list.values[i] > cut));
  }
  int64_t ties = k - above, kept = 0;
  for (int64_t base = 0; base < count; base += warp_size) {
    const int64_t i = base + lane_of_thread();
    const C value = i < count ? list.values[i] : -infinity<C>();
    const int index = i < count ? list.indices[i] : 0;
    const unsigned tied = __ballot_sync(full_warp, i < count && value == cut);
    const bool keep = i < count && (value > cut || (value == cut && lanes_below(tied) < ties));
    const unsigned keepers = __ballot_sync(full_warp, keep);
    __syncwarp();  // entries are read before any is overwritten
    if (keep) {
      list.values[kept + lanes_below(keepers)] = value;
      list.indices[kept + lanes_below(keepers)] = index;
    }
    ties -= __popc(tied);
    kept += __popc(keepers);
  }
  __syncwarp();
  return cut;
}

// Where in a descending run [begin, end) the entries that precede `value` end: those above it, or not below it.
template <class C>
__device__ int64_t preceding(const C* values, int64_t begin, int64_t end, C value, bool equals_too) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    const bool precedes = values[middle] > value || (equals_too && values[middle] == value);
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
template <class C>
__device__ Candidates<C> sort_descending(Candidates<C> list, Candidates<C> spare, int64_t count) {
  for (int64_t run = 1; run < count; run *= 2) {
    for (int64_t i = lane_of_thread(); i < count; i += warp_size) {
      const int64_t begin = i / (2 * run) * (2 * run);
      const int64_t middle = begin + run < count ? begin + run : count;
      const int64_t end = middle + run < count ? middle + run : count;
      const C value = list.values[i];
      // An entry of the left run goes behind the greater ones of the right run; one of the right run also behind
      // equals.
      const int64_t to = i < middle ? i + preceding(list.values, middle, end, value, false) - middle
                                    : i - middle + preceding(list.values, begin, middle, value, true);
      spare.values[to] = value;
      spare.indices[to] = list.indices[i];
    }
    __syncwarp();
    const Candidates<C> sorted = spare;
    spare = list;
    list = sorted;
  }
  return list;
}

// ---- encode --------------------------------------------------------------------------------------------------------

// How encode is cut into blocks, and its memory. Depends on the problem alone.
template <class C>
struct EncodePlan {
  int64_t row_tiles, range, ranges, capacity;
  C* values;     // [rows, ranges, capacity]
  int* indices;  // [rows, ranges, capacity]

  EncodePlan(const TopkEncode& args, Arena& arena) {
    constexpr int64_t enough_blocks = 512, tile = tile_size<C>;
    row_tiles = divide_up(args.rows, tile);
    // Ranges are whole tiles, no shorter than a few times k. A last one of fewer than k features joins its neighbour.
    int64_t features = divide_up(args.features * row_tiles, enough_blocks);
    if (features < 2 * tile) features = 2 * tile;
    if (features < 8 * args.k) features = 8 * args.k;
    range = divide_up(features, tile) * tile;
    ranges = divide_up(args.features, range);
    if (args.features - (ranges - 1) * range < args.k) --ranges;
    capacity = 2 * args.k + tile;
    values = arena.take<C>(args.rows * ranges * capacity);
    indices = arena.take<int>(args.rows * ranges * capacity);
  }

  __device__ Candidates<C> list(int64_t row, int64_t r) const {
    const int64_t first = (row * ranges + r) * capacity;
    return {values + first, indices + first};
  }
};

constexpr int block_warps = block_threads / warp_size;
constexpr int64_t broken = -1;  // the count of a row in which a NaN was met

// The rows of a block. A tile is filtered in two halves, so that the scores fit where the slices were.
template <class C>
struct EncodeMemory {
  static constexpr int half = tile_size<C> / 2, rows_of_warp = half / block_warps;
  union {
    ProductSlices<C> slices;
    C scores[half][tile_stride<C>];
  };
  // Of each row: what a candidate has to exceed, and how many there are. A row belongs to one warp throughout.
  C thresholds[tile_size<C>];
  int64_t counts[tile_size<C>];
};

// One warp, one row, one tile of scores: those above the threshold join the list.
template <class C>
__device__ void filter(const TopkEncode& args, const Candidates<C>& list, const C* scores, int64_t first, int64_t end,
                       C& threshold, int64_t& count) {
  int64_t found = count;
  for (int j = lane_of_thread(); j < tile_size<C>; j += warp_size) {
    C score = scores[j];
    // Not `score > threshold`: a NaN must pass, and so must everything while the threshold itself is still NaN.
    const bool passes = first + j < end && !(score <= threshold);
    const unsigned passing = __ballot_sync(full_warp, passes);
    if (passing == 0) continue;
    if (__any_sync(full_warp, passes && score != score)) {
      found = broken;
      break;
    }
    if (args.activation == Activation::relu && !(score > 0)) score = 0;
    if (passes) {
      list.values[found + lanes_below(passing)] = score;
      list.indices[found + lanes_below(passing)] = static_cast<int>(first + j);
    }
    found += __popc(passing);
  }
  __syncwarp();
  C cut = threshold;
  if (found > 2 * args.k) {
    cut = keep_best(list, found, args.k);
    found = args.k;
  }
  __syncwarp();  // every lane has read threshold and count
  if (lane_of_thread() == 0) {
    threshold = cut;
    count = found;
  }
  __syncwarp();
}

template <class T>
__global__ void __launch_bounds__(block_threads, 2) encode_kernel(TopkEncode args, EncodePlan<Compute<T>> plan) {
  using C = Compute<T>;
  using Memory = EncodeMemory<C>;
  constexpr int n = per_thread<C>, v = vector_size<C>;
  __shared__ Memory memory;
  const int x = threadIdx.x % block_side, y = threadIdx.x / block_side, warp = threadIdx.x / warp_size;
  const int64_t first_row = blockIdx.x / plan.ranges * tile_size<C>, range = blockIdx.x % plan.ranges;
  const int64_t begin = range * plan.range, end = range == plan.ranges - 1 ? args.features : begin + plan.range;
  const T *weight = static_cast<const T*>(args.weight), *bias = static_cast<const T*>(args.bias);
  const MatrixRows<T> rows{static_cast<const T*>(args.x), first_row, args.rows, args.cols};

  for (int r = threadIdx.x; r < tile_size<C>; r += block_threads) {
    memory.thresholds[r] = static_cast<C>(NAN);
    memory.counts[r] = 0;
  }
  __syncthreads();

  // Calls f(row of the tile, row of the half) for the rows of this warp that exist.
  const auto each_row = [&](int half, auto&& f) {
    for (int i = 0; i < Memory::rows_of_warp; ++i) {
      const int in_half = warp * Memory::rows_of_warp + i, r = half * Memory::half + in_half;
      if (first_row + r < args.rows) f(r, in_half);
    }
  };

  for (int64_t first = begin; first < end; first += tile_size<C>) {
    C scores[n][n];
#pragma unroll
    for (int c = 0; c < n; ++c) {
      const int64_t feature = first + place<C>(x, c);
      const C start = bias != nullptr && feature < end ? to_compute(bias[feature]) : C(0);
#pragma unroll
      for (int r = 0; r < n; ++r) scores[r][c] = start;
    }
    multiply_tiles(rows, MatrixRows<T>{weight, first, end, args.cols}, memory.slices, scores);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // place(y, half · v … half · v + v - 1) are this thread's rows of the half.
#pragma unroll
      for (int r = 0; r < v; ++r) {
#pragma unroll
        for (int c = 0; c < n; ++c) memory.scores[y * v + r][place<C>(x, c)] = scores[half * v + r][c];
      }
      __syncthreads();
      each_row(half, [&](int r, int in_half) {
        if (memory.counts[r] == broken) return;
        filter(args, plan.list(first_row + r, range), memory.scores[in_half], first, end, memory.thresholds[r],
               memory.counts[r]);
      });
      __syncthreads();
    }
  }

  for (int half = 0; half < 2; ++half) {
    each_row(half, [&](int r, int) {
      const Candidates<C> list = plan.list(first_row + r, range);
      if (memory.counts[r] == broken) {
        list.values[0] = static_cast<C>(NAN);
      } else if (memory.counts[r] > args.k) {
        keep_best(list, memory.counts[r], args.k);
      }
    });
  }
}

// One warp a row: the k best of all ranges, sorted.
template <class T>
__global__ void __launch_bounds__(block_threads) finish_kernel(TopkEncode args, EncodePlan<Compute<T>> plan) {
  using C = Compute<T>;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x) / warp_size, k = args.k;
  if (row >= args.rows) return;
  T* values = static_cast<T*>(args.values) + row * k;
  int64_t* indices = args.indices + row * k;
  bool is_broken = false;
  for (int64_t r = 0; r < plan.ranges; ++r) is_broken |= isnan(plan.list(row, r).values[0]);
  if (is_broken) {
    for (int64_t j = lane_of_thread(); j < k; j += warp_size) {
      values[j] = from_compute<T>(static_cast<C>(NAN));
      indices[j] = 0;
    }
    return;
  }
  // Move the lists together. Each has room for more than 2k entries, so source and destination are apart.
  Candidates<C> list = plan.list(row, 0);
  for (int64_t r = 1; r < plan.ranges; ++r) {
    const Candidates<C> from = plan.list(row, r);
    for (int64_t j = lane_of_thread(); j < k; j += warp_size) {
      list.values[r * k + j] = from.values[j];
      list.indices[r * k + j] = from.indices[j];
    }
  }
  __syncwarp();
  if (plan.ranges > 1) keep_best(list, plan.ranges * k, k);
  list = sort_descending(list, Candidates<C>{list.values + k, list.indices + k}, k);
  for (int64_t j = lane_of_thread(); j < k; j += warp_size) {
    values[j] = from_compute<T>(list.values[j]);
    indices[j] = list.indices[j];
  }
}

template <template <class> class Plan, class Args>
int64_t measure(const Args& args) {
  Arena arena(nullptr);
  dispatch_dtype(args.dtype, [&]<class T>() { Plan<Compute<T>>(args, arena); });
  return arena.used;
}

}  // namespace

int64_t topk_workspace(const TopkEncode& args) { return measure<EncodePlan>(args); }

void topk_encode(const TopkEncode& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    Arena arena(args.workspace);
    const EncodePlan<Compute<T>> plan(args, arena);
    launch("topk_encode", encode_kernel<T>, plan.row_tiles * plan.ranges, block_threads, 0, stream, args, plan);
    launch("topk_encode", finish_kernel<T>, divide_up(args.rows * warp_size, block_threads), block_threads, 0, stream,
           args, plan);
  });
}

}  // namespace isthmus::cuda
