// The candidates of a row, 32 at a time: the bits of a mask, in order of slots.
#pragma once

#include "topk/operands.cuh"

namespace isthmus::cuda {
namespace {

constexpr int walk_warps = 4;  // of a block that walks over masks, a warp for each row
constexpr int walk_threads = walk_warps * warp_size;

__device__ __forceinline__ int walk_lane() { return threadIdx.x % warp_size; }
__device__ __forceinline__ int64_t walk_number() {
  return static_cast<int64_t>(blockIdx.x) * walk_warps + threadIdx.x / warp_size;
}
inline int64_t walk_blocks(int64_t rows) { return divide_up(rows, walk_warps); }

// How much the lanes before this one hold, and all of them.
template <class Number>
__device__ __forceinline__ Number warp_prefix(Number count, Number& total) {
  Number sum = count;
#pragma unroll
  for (int offset = 1; offset < warp_size; offset *= 2) {
    const Number before = __shfl_up_sync(0xffffffffu, sum, offset);
    if (walk_lane() >= offset) sum += before;
  }
  total = __shfl_sync(0xffffffffu, sum, warp_size - 1);
  return sum - count;
}

// Slots that wait until there are 32 of them.
struct SlotQueues {
  int32_t slots[walk_warps][warp_size * slots_per_word + warp_size];
};

// Calls f(slot of this lane, count) with up to 32 slots, in the lanes before `count`, for the words first … last - 1 of
// a row's mask. Where f returns false the walk ends. The whole warp calls it, and sees the same results of f.
template <class F>
__device__ __forceinline__ void each_candidate(const uint32_t* mask, int64_t first, int64_t last, SlotQueues& queues,
                                               F&& f) {
  int32_t* queue = queues.slots[threadIdx.x / warp_size];
  int waiting = 0;
  __syncwarp();  // the queue is no longer read
  for (int64_t word = first; word < last; word += warp_size) {
    uint32_t bits = word + walk_lane() < last ? mask[word + walk_lane()] : 0;
    int found;
    int place = waiting + warp_prefix(__popc(bits), found);
    for (; bits != 0; bits &= bits - 1) {
      queue[place++] = static_cast<int32_t>((word + walk_lane()) * slots_per_word) + __ffs(static_cast<int>(bits)) - 1;
    }
    waiting += found;
    __syncwarp();
    int done = 0;
    for (; done + warp_size <= waiting; done += warp_size) {
      if (!f(queue[done + walk_lane()], warp_size)) return;
    }
    waiting -= done;
    const int32_t left = walk_lane() < waiting ? queue[done + walk_lane()] : 0;
    __syncwarp();  // the rest is read before it is overwritten
    if (walk_lane() < waiting) queue[walk_lane()] = left;
    __syncwarp();
  }
  if (waiting > 0) f(walk_lane() < waiting ? queue[walk_lane()] : -1, waiting);
}

// The float64 scores of the features in up to 32 slots, that of this lane's slot in this lane; 0 without a slot.
template <class T>
__device__ __forceinline__ double score_slots(const Screen<T>& screen, int64_t row, int32_t slot, int count) {
  const int32_t feature = slot < 0 ? -1 : screen.features[slot];
  return score_features(
      screen.x(row), screen.shape.cols, count,
      [&](int i) { return screen.weight(__shfl_sync(0xffffffffu, feature, i)); },
      [&](int) { return screen.bias(feature); });
}

}  // namespace
}  // namespace isthmus::cuda
