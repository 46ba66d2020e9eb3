// Top-k sparse codes on CUDA devices; what is computed stands in cpu.inl.
//
// Encode: each block multiplies 128 rows of x with the weights of a range of features, tile by tile (core/product.cuh).
// A tile goes through shared memory, where a warp takes a row, compares it with the row's running k-th best and appends
// the few that pass to a list in global memory; a full list is cut down to its k best, which raises the threshold.
// Lists are filled in order of feature and keep their order, so ties go to the lowest index and no atomics are needed.
// Few rows do not fill the device: then the features are cut into ranges for different blocks. A second kernel, one
// warp a row, brings the ranges together and sorts.
//
// Arithmetic bounds encode: 2·N·F·D operations on the FMA units. The [N, F] scores never exist; lists take 2k + 128
// entries for each row and range. Decode and gradients are gathers bound by memory: 16-byte loads, several in flight,
// sums in a fixed order.

#include "core/product.cuh"
#include "core/sort.cuh"
#include "sparse/kernels.h"

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

// ---- decode --------------------------------------------------------------------------------------------------------

// What multiplies a gathered row: the entries of `values`; with a gradient, the gradient before the activation.
template <class T>
struct Coefficients {
  const T* factors;
  const T* values;  // factors count only where these are positive; null: everywhere

  __device__ __forceinline__ Compute<T> operator()(int64_t entry) const {
    if (values != nullptr && !(to_compute(__ldg(values + entry)) > 0)) return 0;
    return to_compute(__ldg(factors + entry));
  }
};

__global__ void __launch_bounds__(block_threads)
    check_indices_kernel(const int64_t* indices, int64_t count, int64_t features) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (i < count && (indices[i] < 0 || indices[i] >= features)) {
    printf("isthmus: indices holds %lld; expected 0 <= index < %lld\n", static_cast<long long>(indices[i]),
           static_cast<long long>(features));
    __trap();
  }
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
  if constexpr (sizeof(T) * N == 16) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(p));
    return *reinterpret_cast<const Pack<T, N>*>(&bits);
  } else {
    return {{__ldg(p)}};
  }
}

// A thread makes N neighbouring columns of one row; neighbours in a warp, neighbouring packs.
template <class T, int N>
__global__ void __launch_bounds__(block_threads)
    decode_kernel(SparseDecode args, Coefficients<T> coefficients, int64_t packs) {
  using C = Compute<T>;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  const int64_t row = thread / packs, col = thread % packs * N;
  if (row >= args.rows) return;
  C sum[N] = {};
  if (args.bias != nullptr) {
    const auto bias = load_pack<T, N>(static_cast<const T*>(args.bias) + col);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = to_compute(bias.values[i]);
  }
  const T* weight = static_cast<const T*>(args.weight) + col;
#pragma unroll 8
  for (int64_t j = 0; j < args.k; ++j) {
    const int64_t entry = row * args.k + j;
    const auto direction = load_pack<T, N>(weight + __ldg(args.indices + entry) * args.cols);
    const C coefficient = coefficients(entry);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += coefficient * to_compute(direction.values[i]);
  }
  Pack<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out.values[i] = from_compute<T>(sum[i]);
  *reinterpret_cast<Pack<T, N>*>(static_cast<T*>(args.out) + row * args.cols + col) = out;
}

// Calls f<N>() with the elements of a 16-byte access if all rows of `cols` elements start on one, else with 1.
template <class T, class F, class... Pointers>
void dispatch_pack(int64_t cols, F&& f, const Pointers*... pointers) {
  constexpr int n = 16 / sizeof(T);
  const bool aligned = cols % n == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
  if (aligned) {
    f.template operator()<n>();
  } else {
    f.template operator()<1>();
  }
}

template <class T>
void decode_rows(const SparseDecode& args, const Coefficients<T>& coefficients, void* stream) {
  dispatch_pack<T>(
      args.cols,
      [&]<int N>() {
        const int64_t packs = args.cols / N;
        launch("sparse_decode", decode_kernel<T, N>, divide_up(args.rows * packs, block_threads), block_threads, 0,
               stream, args, coefficients, packs);
      },
      args.weight, args.bias, args.out);
}

// ---- gradients -----------------------------------------------------------------------------------------------------

// grad_values[entry] = grad[row] · weight[index]: one warp an entry.
template <class T, int N>
__global__ void __launch_bounds__(block_threads) grad_values_kernel(SparseDecodeBackward args) {
  using C = Compute<T>;
  const int64_t entry = (static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x) / warp_size;
  if (entry >= args.rows * args.k) return;
  const T* grad = static_cast<const T*>(args.grad) + entry / args.k * args.cols;
  const T* weight = static_cast<const T*>(args.weight) + args.indices[entry] * args.cols;
  C sum = 0;
#pragma unroll 4
  for (int64_t c = lane_of_thread() * N; c < args.cols; c += warp_size * N) {
    const auto a = load_pack<T, N>(grad + c), b = load_pack<T, N>(weight + c);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += to_compute(a.values[i]) * to_compute(b.values[i]);
  }
  sum = warp_sum(sum);
  if (lane_of_thread() == 0) static_cast<T*>(args.grad_values)[entry] = from_compute<T>(sum);
}

// Body of GroupSums: grad_weight[f] = Σ coefficient · row of the matrix over the entries of feature f; in a last column
// of its own the sum of the coefficients, unless grad_bias is null.
template <class T>
struct WeightSums {
  using Number = Compute<T>;
  Coefficients<T> coefficients;
  const T* matrix;
  int64_t k, cols;
  T *grad_weight, *grad_bias;

  __device__ __forceinline__ Number share(int64_t entry, int64_t, int64_t c) const {
    const Number coefficient = coefficients(entry);
    return c < cols ? coefficient * to_compute(__ldg(matrix + entry / k * cols + c)) : coefficient;
  }
  __device__ __forceinline__ void write(int64_t feature, int64_t c, Number sum) const {
    T* to = c < cols ? grad_weight + feature * cols + c : grad_bias + feature;
    *to = from_compute<T>(sum);
  }
};

constexpr int64_t rows_per_chunk = 128;

// Column sums of a matrix [rows, cols], in chunks of rows: partial [chunks, cols].
template <class T>
__global__ void __launch_bounds__(block_threads)
    sum_rows_kernel(const T* matrix, int64_t rows, int64_t cols, Compute<T>* partial) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  const int64_t first = thread / cols * rows_per_chunk, c = thread % cols;
  if (first >= rows) return;
  const int64_t last = first + rows_per_chunk < rows ? first + rows_per_chunk : rows;
  Compute<T> sum = 0;
#pragma unroll 8
  for (int64_t row = first; row < last; ++row) sum += to_compute(__ldg(matrix + row * cols + c));
  partial[thread] = sum;
}

template <class T>
__global__ void __launch_bounds__(block_threads)
    sum_chunks_of_rows_kernel(const Compute<T>* partial, int64_t chunks, int64_t cols, T* out) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (c >= cols) return;
  Compute<T> sum = 0;
#pragma unroll 8
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += __ldg(partial + chunk * cols + c);
  out[c] = from_compute<T>(sum);
}

// The memory of either backward.
template <class C>
struct DecodeBackwardPlan {
  GroupSums<C> sums;
  int64_t chunks;
  C* partial;  // [chunks, cols]

  DecodeBackwardPlan(const SparseDecodeBackward& args, Arena& arena)
      : sums(args.rows * args.k, args.features, args.cols, arena),
        chunks(divide_up(args.rows, rows_per_chunk)),
        partial(arena.take<C>(chunks * args.cols)) {}
};

template <class C>
struct EncodeBackwardPlan {
  GroupSums<C> sums;

  EncodeBackwardPlan(const TopkEncodeBackward& args, Arena& arena)
      : sums(args.rows * args.k, args.features, args.cols + 1, arena) {}
};

template <template <class> class Plan, class Args>
int64_t measure(const Args& args) {
  Arena arena(nullptr);
  dispatch_dtype(args.dtype, [&]<class T>() { Plan<Compute<T>>(args, arena); });
  return arena.used;
}

}  // namespace

int64_t sparse_workspace(const TopkEncode& args) { return measure<EncodePlan>(args); }
int64_t sparse_workspace(const TopkEncodeBackward& args) { return measure<EncodeBackwardPlan>(args); }
int64_t sparse_workspace(const SparseDecodeBackward& args) { return measure<DecodeBackwardPlan>(args); }

void sparse_encode(const TopkEncode& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    Arena arena(args.workspace);
    const EncodePlan<Compute<T>> plan(args, arena);
    launch("topk_encode", encode_kernel<T>, plan.row_tiles * plan.ranges, block_threads, 0, stream, args, plan);
    launch("topk_encode", finish_kernel<T>, divide_up(args.rows * warp_size, block_threads), block_threads, 0, stream,
           args, plan);
  });
}

void sparse_decode(const SparseDecode& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const int64_t entries = args.rows * args.k;
    launch("check_indices", check_indices_kernel, divide_up(entries, block_threads), block_threads, 0, stream,
           args.indices, entries, args.features);
    decode_rows<T>(args, {static_cast<const T*>(args.values), nullptr}, stream);
  });
}

// In both gradients the sums over features come first: they check the indices.
void sparse_encode_backward(const TopkEncodeBackward& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const bool relu = args.activation == Activation::relu;
    const Coefficients<T> coefficients{static_cast<const T*>(args.grad),
                                       relu ? static_cast<const T*>(args.values) : nullptr};
    Arena arena(args.workspace);
    EncodeBackwardPlan<Compute<T>> plan(args, arena);
    const WeightSums<T> body{coefficients, static_cast<const T*>(args.x),     args.k,
                             args.cols,    static_cast<T*>(args.grad_weight), static_cast<T*>(args.grad_bias)};
    plan.sums.run(args.indices, 0, body, stream);
    const SparseDecode to_x{.dtype = args.dtype,
                            .rows = args.rows,
                            .cols = args.cols,
                            .features = args.features,
                            .k = args.k,
                            .values = args.grad,
                            .indices = args.indices,
                            .weight = args.weight,
                            .bias = nullptr,
                            .out = args.grad_x};
    decode_rows<T>(to_x, coefficients, stream);
  });
}

void sparse_decode_backward(const SparseDecodeBackward& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    const T* grad = static_cast<const T*>(args.grad);
    Arena arena(args.workspace);
    DecodeBackwardPlan<C> plan(args, arena);
    const Coefficients<T> coefficients{static_cast<const T*>(args.values), nullptr};
    const WeightSums<T> body{coefficients, grad, args.k, args.cols, static_cast<T*>(args.grad_weight), nullptr};
    plan.sums.run(args.indices, 0, body, stream);
    dispatch_pack<T>(
        args.cols,
        [&]<int N>() {
          launch("grad_values", grad_values_kernel<T, N>, divide_up(args.rows * args.k * warp_size, block_threads),
                 block_threads, 0, stream, args);
        },
        args.grad, args.weight);
    launch("sum_rows", sum_rows_kernel<T>, divide_up(plan.chunks * args.cols, block_threads), block_threads, 0, stream,
           grad, args.rows, args.cols, plan.partial);
    launch("sum_rows", sum_chunks_of_rows_kernel<T>, divide_up(args.cols, block_threads), block_threads, 0, stream,
           static_cast<const C*>(plan.partial), plan.chunks, args.cols, static_cast<T*>(args.grad_bias));
  });
}

}  // namespace isthmus::cuda
