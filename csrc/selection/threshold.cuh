// Every score above the threshold of its feature: screened, scored to be counted, and scored again to be written.
#pragma once

#include "selection/kernels.h"
#include "selection/rows.cuh"
#include "topk/screen.cuh"

namespace isthmus::cuda {
namespace {

template <class T>
struct ThresholdPlan {
  Screen<T> screen;
  float* cuts;      // [slots]
  uint32_t* mask;   // [rows, words]
  int64_t* counts;  // [rows]; broken_row for a row with a NaN among its scores
  static constexpr int64_t broken_row = -1;

  ThresholdPlan(const ThresholdEncode& args, Arena& arena)
      : screen({args.rows, args.cols, args.features, 1, args.x, args.weight, args.bias, nullptr}, all_rows, arena),
        cuts(arena.take<float>(screen.slots)),
        mask(arena.take<uint32_t>(screen.chunk_rows() * screen.words())),
        counts(arena.take<int64_t>(args.rows)) {}

  __host__ __device__ int64_t words() const { return (screen.shape.features + slots_per_word - 1) / slots_per_word; }
};

__device__ __forceinline__ double threshold_of(const ThresholdEncode& args, int64_t feature) {
  return args.thresholds[args.one_threshold ? 0 : feature];
}

// Rounded down, and finite above: an infinite bound, behind which a NaN may hide, always exceeds a cut.
template <class T>
__global__ void __launch_bounds__(mma_threads) cuts_kernel(ThresholdEncode args, ThresholdPlan<T> plan) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * mma_threads + threadIdx.x;
  if (slot >= plan.screen.slots) return;
  const double most = 0x1.fffffep127, threshold = slot < args.features ? threshold_of(args, slot) : most;
  plan.cuts[slot] = threshold < most ? __double2float_rd(threshold) : static_cast<float>(most);
}

struct ThresholdTest {
  const float* cuts;

  __device__ __forceinline__ const ThresholdTest& of_group(int64_t) const { return *this; }
  __device__ __forceinline__ bool passes(int64_t, int64_t slot, float score, float margin) const {
    return !(score + margin <= cuts[slot]);
  }
};

// A warp takes a row. What is not above its threshold leaves the mask.
template <class T>
__global__ void __launch_bounds__(walk_threads) count_kernel(ThresholdEncode args, ThresholdPlan<T> plan) {
  __shared__ SlotQueues queues;
  const int64_t row = walk_number();
  if (row >= args.rows) return;
  uint32_t* mask = plan.mask + row * plan.screen.words();
  int64_t found = 0;
  each_candidate(mask, 0, plan.words(), queues, [&](int32_t slot, int count) {
    const double score = score_slots(plan.screen, row, slot, count);
    const bool in_use = walk_lane() < count, above = in_use && score > threshold_of(args, slot);
    if (__any_sync(0xffffffffu, score != score)) {
      found = plan.broken_row;
      return false;
    }
    found += __popc(__ballot_sync(0xffffffffu, above));
    if (in_use && !above) clear_bit(mask, slot);
    return true;
  });
  if (walk_lane() == 0) plan.counts[row] = found;
}

template <class T>
__global__ void __launch_bounds__(scan_threads) offsets_kernel(ThresholdEncode args, ThresholdPlan<T> plan) {
  const int64_t total = scan_rows(
      args.rows, [&](int64_t row) { return plan.counts[row] == plan.broken_row ? 1 : plan.counts[row]; },
      [&](int64_t row, int64_t before) { args.offsets[row] = before; });
  if (threadIdx.x == 0) args.offsets[args.rows] = total;
}

template <class T>
__global__ void __launch_bounds__(walk_threads)
    write_kernel(ThresholdEncode args, ThresholdPlan<T> plan, Entries entries) {
  __shared__ SlotQueues queues;
  const int64_t row = walk_number();
  if (row >= args.rows) return;
  int64_t place = args.offsets[row] + walk_lane();
  const auto set = [&](double value, int64_t feature) {
    static_cast<T*>(entries.values)[place] = round_score<T>(value);
    entries.indices[place] = feature;
  };
  if (plan.counts[row] == plan.broken_row) {
    if (walk_lane() == 0) set(static_cast<double>(NAN), 0);
    return;
  }
  each_candidate(plan.mask + row * plan.screen.words(), 0, plan.words(), queues, [&](int32_t slot, int count) {
    const double score = score_slots(plan.screen, row, slot, count);
    if (walk_lane() < count) set(score, slot);
    place += warp_size;
    return true;
  });
}

template <class T>
void threshold_encode(const ThresholdEncode& args, void* stream) {
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  Arena arena(args.workspace);
  const ThresholdPlan<T> plan(args, arena);
  const Screen<T>& screen = plan.screen;
  prepare_columns(screen, stream);
  launch("cuts", cuts_kernel<T>, divide_up(screen.slots, mma_threads), mma_threads, 0, stream, args, plan);
  const int64_t tiles = prepare_rows(screen, 0, stream);
  run_screen(screen, tiles, CandidateBits<ThresholdTest>(screen, {plan.cuts}, plan.mask), stream);
  launch("count", count_kernel<T>, walk_blocks(args.rows), walk_threads, 0, stream, args, plan);
  launch("offsets", offsets_kernel<T>, 1, scan_threads, 0, stream, args, plan);
  int64_t count = 0;
  check(cudaMemcpyAsync(&count, args.offsets + args.rows, sizeof count, cudaMemcpyDeviceToHost, queue), "entries");
  check(cudaStreamSynchronize(queue), "entries");
  const Entries entries = args.allocate(args.context, count);
  launch("write", write_kernel<T>, walk_blocks(args.rows), walk_threads, 0, stream, args, plan, entries);
}

}  // namespace
}  // namespace isthmus::cuda
