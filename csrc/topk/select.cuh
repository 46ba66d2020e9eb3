// From screened scores to the best of each row: the bar that candidates have to reach, then their float64 scores.
#pragma once

#include "topk/candidates.cuh"
#include "topk/lists.cuh"
#include "topk/screen.cuh"

namespace isthmus::cuda {
namespace {

// What a candidate of a row and a group has to reach: the bar, and behind the slot `last` more than that.
struct Cut {
  float bar;
  int32_t last;
};

// Memory and layout of an encode.
template <class T>
struct EncodePlan {
  int64_t group_k;   // features of each group
  int64_t capacity;  // of a list
  Screen<T> screen;
  float* maxima;   // [chunk rows, slots / 8]
  Cut* cuts;       // [chunk rows, groups]
  uint32_t* mask;  // [chunk rows, words]
  List lists;      // [chunk rows, capacity]

  EncodePlan(const TopkEncode& args, Arena& arena)
      : group_k(args.k / args.groups),
        capacity(2 * group_k + warp_size),
        screen({args.rows, args.cols, args.features, args.groups, args.x, args.weight, args.bias, args.among},
               rows_at_once(args), arena) {
    const int64_t rows = screen.chunk_rows();
    maxima = arena.take<float>(rows * maxima_stride());
    cuts = arena.take<Cut>(rows * args.groups);
    mask = arena.take<uint32_t>(rows * screen.words());
    lists = {arena.take<double>(rows * capacity), arena.take<int32_t>(rows * capacity)};
  }

  __host__ __device__ int64_t maxima_stride() const { return screen.slots / slots_per_group; }

 private:
  // Rows for which 64 MiB suffice: of maxima, a mask, an operand, cuts and a list for each.
  int64_t rows_at_once(const TopkEncode& args) const {
    constexpr int64_t chunk_bytes = 64 << 20;
    const int64_t slots = args.features + args.groups * slots_per_word;
    return chunk_bytes / (slots / 8 * 5 + 2 * args.cols + 8 * args.groups + 12 * capacity);
  }
};

// ---- the bar -------------------------------------------------------------------------------------------------------

// A warp takes a row and a group. Of the k highest maxima each stands for a feature that reaches the lowest of them;
// where that one is tied, the first of the tied count. What does not exceed it behind the last of those is no
// candidate.
template <class T>
__global__ void __launch_bounds__(walk_threads) cut_kernel(EncodePlan<T> plan, Ranks ranks, int64_t rows) {
  const Screen<T>& screen = plan.screen;
  const int64_t groups = screen.shape.groups, row = walk_number() / groups, group = walk_number() % groups;
  if (row >= rows) return;
  const int64_t first_slot = group * screen.group_slots;
  const int64_t count = (screen.group_counts[group] + slots_per_group - 1) / slots_per_group, k = plan.group_k;
  const float* maxima = plan.maxima + row * plan.maxima_stride() + first_slot / slots_per_group;
  const auto at = [&](int64_t i) { return fmaxf(maxima[i], ranks.floor); };
  Cut cut = {-infinity<float>(), 0x7fffffff};
  if (count >= k) {
    const float reached = cut_value<float>(at, count, k);
    float lowest = infinity<float>();
    for (int64_t i = walk_lane(); i < count; i += warp_size) {
      if (at(i) >= reached) lowest = fminf(lowest, at(i));
    }
#pragma unroll
    for (int offset = warp_size / 2; offset > 0; offset /= 2) {
      lowest = fminf(lowest, __shfl_xor_sync(full_warp, lowest, offset));
    }
    int64_t ties = k - count_where(at, count, [=](float value) { return value > lowest; });
    cut.bar = lowest;
    for (int64_t base = 0; base < count && ties > 0 && lowest > -infinity<float>(); base += warp_size) {
      const int64_t i = base + walk_lane();
      unsigned tied = __ballot_sync(full_warp, i < count && at(i) == lowest);
      for (; tied != 0 && ties > 0; tied &= tied - 1, --ties) {
        cut.last = static_cast<int32_t>(first_slot + (base + __ffs(static_cast<int>(tied))) * slots_per_group - 1);
      }
    }
  }
  if (walk_lane() == 0) plan.cuts[row * groups + group] = cut;
}

struct CutTest {
  Ranks ranks;
  const Cut* cuts;
  int64_t groups;

  __device__ __forceinline__ CutTest of_group(int64_t group) const { return {ranks, cuts + group, groups}; }

  // Whatever is not a number passes.
  __device__ __forceinline__ bool passes(int64_t row, int64_t slot, float score, float margin) const {
    const Cut cut = cuts[row * groups];
    const float bound = ranks.rank(score) + margin, upper = bound < ranks.floor ? ranks.floor : bound;
    return !(upper < cut.bar) && !(upper == cut.bar && slot > cut.last);
  }
};

// ---- the best ------------------------------------------------------------------------------------------------------

// The best features of a row and a group so far. Slots come in ascending order and keep it, so of equals the first
// stay.
struct Best {
  const Activation activation;
  const int64_t k;
  const List list;
  int64_t count = 0;
  double bar = static_cast<double>(NAN);  // nothing is known yet

  // The scores of the lanes in use. A feature of negative score that ranks by its magnitude is noted as ~slot.
  __device__ __forceinline__ void meet(double score, int32_t slot, bool in_use) {
    const bool flips = activation == Activation::abs && score < 0;
    const double rank = flips ? -score : activation == Activation::relu && !(score > 0) ? 0 : score;
    const bool passes = in_use && !(rank <= bar);
    const unsigned passing = __ballot_sync(full_warp, passes);
    if (passes) {
      list.ranks[count + lanes_below(passing)] = rank;
      list.notes[count + lanes_below(passing)] = flips ? ~slot : slot;
    }
    count += __popc(passing);
    __syncwarp();
    if (count > 2 * k) cut_down();
  }

  __device__ __forceinline__ void cut_down() {
    bar = keep_best(list, count, k);
    count = k;
  }

  // Best first.
  __device__ __forceinline__ List sorted() {
    if (count > k) cut_down();
    return sort_descending(list, {list.ranks + k, list.notes + k}, count);
  }
};

// A warp takes a row.
template <class T>
__global__ void __launch_bounds__(walk_threads) select_kernel(TopkEncode args, EncodePlan<T> plan, int64_t first_row) {
  __shared__ SlotQueues queues;
  const Screen<T>& screen = plan.screen;
  const int64_t chunk_row = walk_number(), row = first_row + chunk_row;
  if (chunk_row >= screen.chunk_rows() || row >= args.rows) return;
  const uint32_t* mask = plan.mask + chunk_row * screen.words();
  const List list = {plan.lists.ranks + chunk_row * plan.capacity, plan.lists.notes + chunk_row * plan.capacity};
  T* values = static_cast<T*>(args.values) + row * args.k;
  int64_t* indices = args.indices + row * args.k;
  const auto set = [&](int64_t place, double value, int64_t index) {
    values[place] = round_score<T>(value);
    indices[place] = index;
  };
  bool broken = false;  // whether there is a NaN among the scores
  for (int64_t group = 0; group < args.groups && !broken; ++group) {
    Best best{args.activation, plan.group_k, list};
    const int64_t first = group * screen.group_slots / slots_per_word;
    const int64_t words = (screen.group_counts[group] + slots_per_word - 1) / slots_per_word;
    each_candidate(mask, first, first + words, queues, [&](int32_t slot, int count) {
      const double score = score_slots(screen, row, slot, count);
      broken = __any_sync(full_warp, score != score);
      if (!broken) best.meet(score, slot, walk_lane() < count);
      return !broken;
    });
    if (broken) break;
    const List sorted = best.sorted();
    for (int64_t j = walk_lane(); j < plan.group_k; j += warp_size) {
      const bool found = j < best.count;
      const int32_t note = found ? sorted.notes[j] : 0;
      const double rank = found ? sorted.ranks[j] : 0;
      set(group * plan.group_k + j, note < 0 ? -rank : rank, found ? screen.features[note < 0 ? ~note : note] : -1);
    }
    __syncwarp();  // the list is read before the next group fills it
  }
  for (int64_t j = walk_lane(); broken && j < args.k; j += warp_size) set(j, static_cast<double>(NAN), 0);
}

}  // namespace
}  // namespace isthmus::cuda
