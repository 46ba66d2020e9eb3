// What a screen of x · weightᵀ + bias multiplies on the tensor cores, and the bound that makes it exact.
//
// Vectors v are rounded to half types, v = v~ + δv, so that
//
//     |x·w - x~·w~| <= |δx| |w| + |x~| |δw|
//
// where the norms of δ are those of the actual errors: half types lose nothing. With γ for the rounding of the sum, a
// screened score s = x~·w~ + b is off by at most
//
//     slope(x) · length(w) + length(x) · error(w) + slack(b),    slope(x) = |δx| + γ (|x| + |δx|), slack(b) = γ |b| + …
//
// An encoder scores in two steps: the screen discards what is provably not wanted, and the rest is scored in float64.
#pragma once

#include "core/arena.cuh"
#include "core/mma_tiles.cuh"
#include "core/score.cuh"

namespace isthmus::cuda {
namespace {

// Slots are places for features on the device: those that take part, group after group, each group from a multiple of
// 32 on. So the 32 columns of a warp (core/mma_tiles.cuh) are of one group.
constexpr int slots_per_word = warp_size;

struct alignas(16) RowBound {
  float slope, length;
  float live;  // 0: the row is all zeros, and its scores are exact; else 1
  float unused;
};
struct alignas(16) FeatureBound {
  float bias, length, error, slack;
};

// What is encoded: of the arguments of an op, those that all encoders share.
struct EncoderShape {
  int64_t rows, cols, features, groups;
  const void *x, *weight, *bias;
  const bool* among;
};

template <class T>
struct Screen {
  using Operand = std::conditional_t<std::is_same_v<T, __half>, __half, __nv_bfloat16>;

  EncoderShape shape;
  int64_t depth;  // of operands: cols, padded with zeros
  int64_t group_features, group_slots;
  int64_t slot_tiles, slots;         // slots: whole tiles of them
  int64_t chunk_tiles;               // of rows, whose operands exist at a time
  int64_t tiles_per_range, ranges;   // of slots: so that few rows fill the device, too
  int32_t* features;                 // [slots]: the feature of each; -1 in the padding
  int* group_counts;                 // [groups]: how many take part
  unsigned long long* slots_in_use;  // behind the last slot that holds a feature
  int* wild;                         // whether a feature has no bound
  Operand* columns;                  // [slots, depth]
  FeatureBound* feature_bounds;      // [slots]
  Operand* rows;                     // [chunk_tiles, mma_tile, depth]
  RowBound* row_bounds;              // [chunk_tiles, mma_tile]

  // most_rows: of a chunk.
  Screen(const EncoderShape& shape_, int64_t most_rows, Arena& arena) : shape(shape_) {
    constexpr int64_t enough_blocks = 512;  // two for each multiprocessor of the largest devices
    depth = divide_up(at_least_one(shape.cols), mma_depth) * mma_depth;
    group_features = shape.features / shape.groups;
    group_slots = divide_up(group_features, slots_per_word) * slots_per_word;
    slot_tiles = divide_up(shape.groups * group_slots, mma_tile);
    slots = slot_tiles * mma_tile;
    const int64_t row_tiles = divide_up(shape.rows, mma_tile);
    const int64_t chunks = divide_up(row_tiles, at_least_one(most_rows / mma_tile));
    chunk_tiles = divide_up(row_tiles, at_least_one(chunks));
    const int64_t wanted = divide_up(enough_blocks, at_least_one(chunk_tiles));
    tiles_per_range = at_least_one(divide_up(slot_tiles, wanted));
    ranges = divide_up(slot_tiles, tiles_per_range);
    features = arena.take<int32_t>(slots);
    group_counts = arena.take<int>(shape.groups);
    slots_in_use = arena.take<unsigned long long>(1);
    wild = arena.take<int>(1);
    columns = arena.take<Operand>(slots * depth);
    feature_bounds = arena.take<FeatureBound>(slots);
    rows = arena.take<Operand>(chunk_tiles * mma_tile * depth);
    row_bounds = arena.take<RowBound>(chunk_tiles * mma_tile);
  }

  __host__ __device__ int64_t chunk_rows() const { return chunk_tiles * mma_tile; }
  // Words of a row, one bit for each slot.
  __host__ __device__ int64_t words() const { return slots / slots_per_word; }

  __device__ __forceinline__ const T* x(int64_t row) const { return static_cast<const T*>(shape.x) + row * shape.cols; }
  __device__ __forceinline__ const T* weight(int64_t feature) const {
    return static_cast<const T*>(shape.weight) + feature * shape.cols;
  }
  __device__ __forceinline__ double bias(int64_t feature) const {
    return shape.bias == nullptr ? 0 : widen(static_cast<const T*>(shape.bias)[feature]);
  }

 private:
  static int64_t at_least_one(int64_t value) { return value < 1 ? 1 : value; }
};

// ---- slots ---------------------------------------------------------------------------------------------------------

constexpr int map_threads = 256;

// A block takes a group, a thread a stretch of its features: those that take part move together, in order.
template <class T>
__global__ void __launch_bounds__(map_threads) map_features_kernel(Screen<T> screen) {
  __shared__ int counts[map_threads];
  const int64_t group = blockIdx.x, stretch = (screen.group_features + map_threads - 1) / map_threads;
  const int64_t begin = threadIdx.x * stretch;
  const int64_t end = begin + stretch < screen.group_features ? begin + stretch : screen.group_features;
  const int64_t first = group * screen.group_features;
  const auto takes_part = [&](int64_t f) { return screen.shape.among == nullptr || screen.shape.among[first + f]; };
  int count = 0;
  for (int64_t f = begin; f < end; ++f) count += takes_part(f);
  counts[threadIdx.x] = count;
  __syncthreads();
  int before = 0, total = 0;
  for (int t = 0; t < map_threads; ++t) {
    if (t == static_cast<int>(threadIdx.x)) before = total;
    total += counts[t];
  }
  int64_t slot = group * screen.group_slots + before;
  for (int64_t f = begin; f < end; ++f) {
    if (takes_part(f)) screen.features[slot++] = static_cast<int32_t>(first + f);
  }
  if (threadIdx.x > 0) return;
  screen.group_counts[group] = total;
  if (total > 0) atomicMax(screen.slots_in_use, static_cast<unsigned long long>(group * screen.group_slots + total));
}

// ---- operands ------------------------------------------------------------------------------------------------------

constexpr double outward = 1.0001;  // makes up for the evaluation of a bound in float32
constexpr float least_length = 0x1p-100f;
constexpr float wild_length = 0x1p62f;  // no product of two shorter vectors overflows

// What a sum of `depth` products loses if every addition truncates, twice; the excess also covers the float64 score.
__device__ __forceinline__ double rounding(int64_t depth) { return static_cast<double>(depth + 32) * 0x1p-22; }

struct Extent {
  double length, error;  // |v|, |δv|
};

// A warp rounds a vector of `count` numbers, or of none, to `depth` numbers.
template <class Operand, class T>
__device__ __forceinline__ Extent write_operand(const T* v, int64_t count, int64_t depth, Operand* to) {
  constexpr float least_normal = std::is_same_v<Operand, __half> ? 0x1p-14f : 0x1p-126f;
  double square = 0, lost = 0;
  for (int64_t k = threadIdx.x % warp_size; k < depth; k += warp_size) {
    const double value = k < count ? widen(v[k]) : 0;
    Operand narrow = from_compute<Operand>(static_cast<float>(value));
    // Subnormal numbers become 0, and all of them error: whether tensor cores keep them does not matter then.
    if (fabsf(to_compute(narrow)) < least_normal) narrow = Operand(0.0f);
    to[k] = narrow;
    const double error = value - widen(narrow);
    square += value * value;
    lost += error * error;
  }
  return {sqrt(warp_total(square)), sqrt(warp_total(lost))};
}

__device__ __forceinline__ float upward(double length) { return static_cast<float>(outward * length) + least_length; }

// A warp takes a slot.
template <class T>
__global__ void __launch_bounds__(mma_threads) columns_kernel(Screen<T> screen) {
  const int64_t slot = (static_cast<int64_t>(blockIdx.x) * mma_threads + threadIdx.x) / warp_size;
  const int64_t in_use = static_cast<int64_t>(*screen.slots_in_use);
  if (slot / mma_tile * mma_tile >= in_use) return;  // no tile of slots behind the last feature is multiplied
  const int64_t feature = screen.features[slot];
  const Extent extent = write_operand(screen.weight(feature < 0 ? 0 : feature), feature < 0 ? 0 : screen.shape.cols,
                                      screen.depth, screen.columns + slot * screen.depth);
  if (threadIdx.x % warp_size > 0) return;
  const double bias = feature < 0 ? 0 : screen.bias(feature), size = fabs(bias);
  const float start = static_cast<float>(bias);
  const double lost = size < wild_length ? fabs(bias - static_cast<double>(start)) : 0;
  FeatureBound bound;
  bound.bias = feature < 0 ? static_cast<float>(NAN) : start;  // neither a lower bound nor a candidate
  bound.length = upward(extent.length + extent.error);
  bound.error = static_cast<float>(outward * extent.error) + (extent.error > 0 ? least_length : 0);
  bound.slack = static_cast<float>(outward * (rounding(screen.depth) * (size + 0x1p-102) + lost));
  if (!(bound.length < wild_length && size < wild_length)) {
    bound.length = bound.slack = infinity<float>();
    *screen.wild = 1;
  }
  screen.feature_bounds[slot] = bound;
}

// A warp takes a row of the chunk; one that does not exist has no bound.
template <class T>
__global__ void __launch_bounds__(mma_threads) rows_kernel(Screen<T> screen, int64_t first_row) {
  const int64_t chunk_row = (static_cast<int64_t>(blockIdx.x) * mma_threads + threadIdx.x) / warp_size;
  const int64_t row = first_row + chunk_row;
  const bool exists = row < screen.shape.rows;
  const Extent extent = write_operand(screen.x(exists ? row : 0), exists ? screen.shape.cols : 0, screen.depth,
                                      screen.rows + chunk_row * screen.depth);
  if (threadIdx.x % warp_size > 0) return;
  const double length = extent.length + extent.error;
  RowBound bound = {upward(extent.error + rounding(screen.depth) * length), upward(length), 1, 0};
  // A bias of float64 is rounded, and squares of float64 may vanish.
  if (sizeof(T) < 8 && length == 0) bound = {0, 0, 0, 0};
  if (!exists || !(bound.length < wild_length)) bound.slope = infinity<float>();
  screen.row_bounds[chunk_row] = bound;
}

template <class T>
void prepare_columns(const Screen<T>& screen, void* stream) {
  const auto set = [&](void* to, int value, int64_t bytes) {
    check(cudaMemsetAsync(to, value, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)), "prepare columns");
  };
  set(screen.features, 0xff, screen.slots * static_cast<int64_t>(sizeof(int32_t)));
  set(screen.slots_in_use, 0, sizeof(unsigned long long));
  set(screen.wild, 0, sizeof(int));
  launch("map_features", map_features_kernel<T>, screen.shape.groups, map_threads, 0, stream, screen);
  launch("columns", columns_kernel<T>, divide_up(screen.slots * warp_size, mma_threads), mma_threads, 0, stream,
         screen);
}

// The rows first_row … of a chunk; returns how many tiles of them there are.
template <class T>
int64_t prepare_rows(const Screen<T>& screen, int64_t first_row, void* stream) {
  const int64_t left = divide_up(screen.shape.rows - first_row, mma_tile);
  const int64_t tiles = left < screen.chunk_tiles ? left : screen.chunk_tiles;
  launch("rows", rows_kernel<T>, tiles * mma_tile * warp_size / mma_threads, mma_threads, 0, stream, screen, first_row);
  return tiles;
}

}  // namespace
}  // namespace isthmus::cuda
