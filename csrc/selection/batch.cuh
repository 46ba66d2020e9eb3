// The largest scores of a whole batch.
//
// A histogram of lower bounds gives a bar that as many scores as are wanted are sure to reach; what may reach it is
// scored in float64. The last score that is selected is found digit by digit, in histograms of the scores' bits. Then
// every row knows its entries, and where they go. Histograms count, so their atomics are exact in any order.
#pragma once

#include "selection/kernels.h"
#include "selection/rows.cuh"
#include "topk/lists.cuh"
#include "topk/screen.cuh"

namespace isthmus::cuda {
namespace {

using Count = unsigned long long;

constexpr int bound_bins = 4096, bound_shift = 20;  // by the highest 12 bits of an ordered float
constexpr int digit_bits = 11, digits = 1 << digit_bits;
constexpr Count no_key = ~Count{0};

// Ordered like the scores.
__device__ __forceinline__ Count key_of(double score) {
  return static_cast<Count>(to_ordered(score)) ^ (Count{1} << 63);
}
__device__ __forceinline__ double score_of(Count key) {
  return from_ordered(static_cast<long long>(key ^ (Count{1} << 63)));
}

// What the steps tell each other.
struct BatchState {
  float bar;           // in screened scores
  int64_t candidates;  // in all rows
  Count broken;        // rows with a NaN among their scores
  int64_t wanted;      // of the scores that are still to be told apart, how many are to be selected
  int shift;           // of the key's digits below this one, nothing is known yet
  bool decided;
  Count limit;   // scores with a key of at least this are selected,
  int64_t ties;  // but of those with this key only the first so many
  Count least;   // key of a selected score
};

template <class T>
struct BatchPlan {
  Screen<T> screen;
  int64_t capacity;  // of scores; more candidates than that are scored whenever they are needed
  BatchState* state;
  Count* bound_counts;  // [bound_bins]
  Count* digit_counts;  // [digits]
  uint32_t* mask;       // [rows, words]
  int64_t* starts;      // [rows]: of the candidates of a row among all
  bool* broken;         // [rows]
  int64_t* found;       // [rows]: entries above the limit
  int64_t* tied;        // [rows]: and at the limit
  int64_t* fillers;     // [rows]: and at the floor
  double* scores;       // [capacity]

  BatchPlan(const BatchTopkEncode& args, Arena& arena)
      : screen({args.rows, args.cols, args.features, 1, args.x, args.weight, args.bias, nullptr}, all_rows, arena),
        capacity(2 * args.entries + (1 << 16)),
        state(arena.take<BatchState>(1)),
        bound_counts(arena.take<Count>(bound_bins)),
        digit_counts(arena.take<Count>(digits)),
        mask(arena.take<uint32_t>(screen.chunk_rows() * screen.words())),
        starts(arena.take<int64_t>(args.rows)),
        broken(arena.take<bool>(args.rows)),
        found(arena.take<int64_t>(args.rows)),
        tied(arena.take<int64_t>(args.rows)),
        fillers(arena.take<int64_t>(args.rows)),
        scores(arena.take<double>(capacity)) {}

  __host__ __device__ int64_t words() const { return (screen.shape.features + slots_per_word - 1) / slots_per_word; }
  __device__ __forceinline__ uint32_t* mask_of(int64_t row) const { return mask + row * screen.words(); }
};

// ---- the bar -------------------------------------------------------------------------------------------------------

// Counts the lower bounds above the floor. Rows and features without a bound have none.
struct BoundHistogram {
  float floor;
  Count* total;

  static __device__ __forceinline__ unsigned* counts() {
    __shared__ unsigned of_block[bound_bins];
    return of_block;
  }
  __device__ __forceinline__ void begin() const {
    for (int bin = threadIdx.x; bin < bound_bins; bin += mma_threads) counts()[bin] = 0;
  }
  __device__ __forceinline__ void tile(const ScreenedTile& tile, WarpProducts& products) const {
    each_score(tile, products, [&](int, int, int, int, float score, float margin) {
      const float lower = score - margin;
      if (lower > floor) atomicAdd(counts() + ((to_ordered(lower) ^ 0x80000000u) >> bound_shift), 1u);
    });
  }
  __device__ __forceinline__ void finish() const {
    __syncthreads();
    for (int bin = threadIdx.x; bin < bound_bins; bin += mma_threads) {
      if (counts()[bin] > 0) atomicAdd(total + bin, static_cast<Count>(counts()[bin]));
    }
  }
};

// Where in a histogram, from the top, the sum reaches `wanted`; `above` becomes the sum over higher bins. -1: nowhere.
template <int Bins>
__device__ int reach(const Count* counts, int64_t wanted, int64_t& above) {
  int64_t sum = 0;
  for (int top = Bins; top > 0; top -= warp_size) {
    const int bin = top - 1 - walk_lane();
    int64_t total;
    const int64_t before = sum + warp_prefix(static_cast<int64_t>(counts[bin]), total);
    const unsigned reached = __ballot_sync(full_warp, before + static_cast<int64_t>(counts[bin]) >= wanted);
    if (reached != 0) {
      const int lane = __ffs(static_cast<int>(reached)) - 1;
      above = __shfl_sync(full_warp, before, lane);
      return top - 1 - lane;
    }
    sum += total;
  }
  return -1;
}

template <class T>
__global__ void __launch_bounds__(warp_size) bar_kernel(BatchTopkEncode args, BatchPlan<T> plan) {
  int64_t above;
  const int bin = *plan.screen.wild != 0 ? -1 : reach<bound_bins>(plan.bound_counts, args.entries, above);
  const unsigned edge = static_cast<unsigned>(bin) << bound_shift;
  if (walk_lane() > 0) return;
  *plan.state = {};
  plan.state->bar = bin < 0 ? -infinity<float>() : from_ordered(static_cast<int>(edge ^ 0x80000000u));
  plan.state->least = no_key;
}

struct BarTest {
  float floor;
  const BatchState* state;

  __device__ __forceinline__ const BarTest& of_group(int64_t) const { return *this; }
  // Whatever is not a number passes.
  __device__ __forceinline__ bool passes(int64_t, int64_t, float score, float margin) const {
    const float upper = score + margin;
    return !(upper < state->bar) && !(upper <= floor);
  }
};

// ---- candidates ----------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(walk_threads) count_candidates_kernel(BatchTopkEncode args, BatchPlan<T> plan) {
  const int64_t row = walk_number();
  if (row >= args.rows) return;
  int64_t count = 0;
  for (int64_t word = walk_lane(); word < plan.words(); word += warp_size) count += __popc(plan.mask_of(row)[word]);
  count = warp_total(count);
  if (walk_lane() == 0) plan.starts[row] = count;
}

template <class T>
__global__ void __launch_bounds__(scan_threads) starts_kernel(BatchTopkEncode args, BatchPlan<T> plan) {
  const int64_t total = scan_rows(
      args.rows, [&](int64_t row) { return plan.starts[row]; },
      [&](int64_t row, int64_t before) { plan.starts[row] = before; });
  if (threadIdx.x == 0) plan.state->candidates = total;
}

// A warp takes a row: scores its candidates and finds out whether one is not a number.
template <class T>
__global__ void __launch_bounds__(walk_threads) score_kernel(BatchTopkEncode args, BatchPlan<T> plan) {
  __shared__ SlotQueues queues;
  const int64_t row = walk_number();
  if (row >= args.rows) return;
  const bool stored = plan.state->candidates <= plan.capacity;
  bool broken = false;
  int64_t place = plan.starts[row] + walk_lane();
  each_candidate(plan.mask_of(row), 0, plan.words(), queues, [&](int32_t slot, int count) {
    const double score = score_slots(plan.screen, row, slot, count);
    if (stored && walk_lane() < count) plan.scores[place] = score;
    place += warp_size;
    broken = __any_sync(full_warp, score != score);
    return !broken;
  });
  if (walk_lane() > 0) return;
  plan.broken[row] = broken;
  if (broken) atomicAdd(&plan.state->broken, Count{1});
}

// Calls f(slot, key, in use) for the candidates of a row that is not broken, 32 at a time. Those at the floor are none.
template <class T, class F>
__device__ __forceinline__ void each_score_of_row(const BatchPlan<T>& plan, int64_t row, double floor,
                                                  SlotQueues& queues, F&& f) {
  const bool stored = plan.state->candidates <= plan.capacity;
  int64_t place = plan.starts[row] + walk_lane();
  each_candidate(plan.mask_of(row), 0, plan.words(), queues, [&](int32_t slot, int count) {
    double score = floor;
    if (!stored) {
      score = score_slots(plan.screen, row, slot, count);
    } else if (walk_lane() < count) {
      score = plan.scores[place];
    }
    place += warp_size;
    f(slot, key_of(score), walk_lane() < count && score > floor);
    return true;
  });
}

// ---- the limit -----------------------------------------------------------------------------------------------------

constexpr int64_t digit_blocks = 1024;  // each has a histogram of its own

// Of the scores that agree with the limit in all digits known so far, counts the next digit.
template <class T>
__global__ void __launch_bounds__(walk_threads)
    digit_kernel(BatchTopkEncode args, BatchPlan<T> plan, double floor, int shift) {
  __shared__ SlotQueues queues;
  __shared__ unsigned counts[digits];
  const BatchState state = *plan.state;
  if (state.decided) return;
  for (int digit = threadIdx.x; digit < digits; digit += walk_threads) counts[digit] = 0;
  __syncthreads();
  const int64_t step = static_cast<int64_t>(gridDim.x) * walk_warps;
  for (int64_t row = walk_number(); row < args.rows; row += step) {
    if (plan.broken[row]) continue;
    each_score_of_row(plan, row, floor, queues, [&](int32_t, Count key, bool in_use) {
      const bool agrees = state.shift == 0 || key >> state.shift == state.limit >> state.shift;
      if (in_use && agrees) atomicAdd(counts + (key >> shift) % digits, 1u);
    });
  }
  __syncthreads();
  for (int digit = threadIdx.x; digit < digits; digit += walk_threads) {
    if (counts[digit] > 0) atomicAdd(plan.digit_counts + digit, static_cast<Count>(counts[digit]));
  }
}

// Which digit the limit has there. Where a digit leaves no choice, what follows it does not matter.
template <class T>
__global__ void __launch_bounds__(warp_size) limit_kernel(BatchTopkEncode args, BatchPlan<T> plan, int shift) {
  BatchState& state = *plan.state;
  if (state.decided) return;
  const int64_t broken = static_cast<int64_t>(state.broken), entries = args.entries;
  const int64_t wanted = state.shift == 0 ? entries - (broken < entries ? broken : entries) : state.wanted;
  int64_t above = 0;
  const int digit = wanted == 0 ? digits : reach<digits>(plan.digit_counts, wanted, above);
  const int64_t of_digit = digit < 0 || digit == digits ? 0 : static_cast<int64_t>(plan.digit_counts[digit]);
  __syncwarp();
  for (int d = walk_lane(); d < digits; d += warp_size) plan.digit_counts[d] = 0;
  if (walk_lane() > 0) return;
  if (digit == digits) state.limit = no_key;  // nothing is selected
  if (digit >= 0 && digit < digits) state.limit |= static_cast<Count>(digit) << shift;
  state.wanted = wanted - above;
  state.shift = shift;
  state.ties = state.wanted;
  state.decided = digit < 0 || digit == digits || of_digit == state.wanted;
  if (state.decided) state.ties = INT64_MAX;
}

// ---- entries -------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(walk_threads)
    count_entries_kernel(BatchTopkEncode args, BatchPlan<T> plan, double floor) {
  __shared__ SlotQueues queues;
  const int64_t row = walk_number();
  if (row >= args.rows) return;
  const Count limit = plan.state->limit;
  int64_t above = 0, tied = 0;
  Count least = no_key;
  if (!plan.broken[row]) {
    each_score_of_row(plan, row, floor, queues, [&](int32_t, Count key, bool in_use) {
      above += in_use && key > limit;
      tied += in_use && key == limit;
      if (in_use && key > limit && key < least) least = key;
    });
  }
  above = warp_total(above);
  tied = warp_total(tied);
  if (least != no_key) atomicMin(&plan.state->least, least);
  if (walk_lane() > 0) return;
  plan.found[row] = above;
  plan.tied[row] = tied;
}

// Ties go to the first rows. What the scores leave goes to one entry for each broken row, to the floor elsewhere, and
// at last to all there is of the broken rows.
template <class T>
__global__ void __launch_bounds__(scan_threads) layout_kernel(BatchTopkEncode args, BatchPlan<T> plan, double floor) {
  const int64_t rows = args.rows, ties = plan.state->ties;
  const int64_t all_tied = scan_rows(
      rows, [&](int64_t row) { return plan.tied[row]; },
      [&](int64_t row, int64_t before) {
        const int64_t left = ties > before ? ties - before : 0;
        if (left < plan.tied[row]) plan.tied[row] = left;
        plan.fillers[row] = 0;
      });
  int64_t left =
      args.entries -
      scan_rows(rows, [&](int64_t row) { return plan.found[row] + plan.tied[row]; }, [](int64_t, int64_t) {});
  // Fills rows in order up to `most` entries, as long as there are entries left; returns how many were given.
  const auto give = [&](bool to_broken, int64_t most, int64_t* to) {
    const auto room = [&](int64_t row) {
      return plan.broken[row] == to_broken ? most - plan.found[row] - plan.tied[row] : 0;
    };
    const int64_t available = left;
    const int64_t total = scan_rows(rows, room, [&](int64_t row, int64_t before) {
      const int64_t remains = available > before ? available - before : 0;
      to[row] += room(row) < remains ? room(row) : remains;
    });
    const int64_t given = total < left ? total : left;
    left -= given;
    return given;
  };
  give(true, 1, plan.found);
  const int64_t filled = give(false, args.features, plan.fillers);
  give(true, args.features, plan.found);
  const int64_t entries = scan_rows(
      rows, [&](int64_t row) { return plan.found[row] + plan.tied[row] + plan.fillers[row]; },
      [&](int64_t row, int64_t before) { args.offsets[row] = before; });
  if (threadIdx.x > 0) return;
  args.offsets[rows] = entries;
  Count least = plan.state->least;
  if (all_tied > 0 && ties > 0 && plan.state->limit < least) least = plan.state->limit;
  const double lowest = filled > 0 ? floor : least == no_key ? infinity<double>() : score_of(least);
  static_cast<Compute<T>*>(args.threshold)[0] = static_cast<Compute<T>>(lowest);
}

// A warp takes a row. A score of which i others come before it, in order of features, leaves room for the fillers among
// the features that it follows: it is entry i + fillers there are before it.
template <class T>
__global__ void __launch_bounds__(walk_threads)
    write_batch_kernel(BatchTopkEncode args, BatchPlan<T> plan, double floor) {
  __shared__ SlotQueues queues;
  const int64_t row = walk_number();
  if (row >= args.rows) return;
  T* values = static_cast<T*>(args.values) + args.offsets[row];
  int64_t* indices = args.indices + args.offsets[row];
  const auto set = [&](int64_t place, double value, int64_t feature) {
    values[place] = round_score<T>(value);
    indices[place] = feature;
  };
  if (plan.broken[row]) {
    for (int64_t i = walk_lane(); i < plan.found[row]; i += warp_size) set(i, static_cast<double>(NAN), 0);
    return;
  }
  const Count limit = plan.state->limit;
  const int64_t fillers = plan.fillers[row];
  uint32_t* mask = plan.mask_of(row);
  int64_t ties = plan.tied[row], before = 0;
  each_score_of_row(plan, row, floor, queues, [&](int32_t slot, Count key, bool in_use) {
    const unsigned tied = __ballot_sync(full_warp, in_use && key == limit);
    const bool kept = in_use && (key > limit || (key == limit && lanes_below(tied) < ties));
    const unsigned keepers = __ballot_sync(full_warp, kept);
    const int64_t i = before + lanes_below(keepers), features_before = slot - i;
    if (kept) set(i + (fillers < features_before ? fillers : features_before), score_of(key), slot);
    if (slot >= 0 && !kept) clear_bit(mask, slot);
    ties -= __popc(tied);
    before += __popc(keepers);
  });
  if (fillers == 0) return;
  // What is left of the mask are the entries. Of the other features, the lowest fill up.
  __syncwarp();
  before = 0;
  for (int64_t base = 0; base < plan.words() && base * slots_per_word - before < fillers; base += warp_size) {
    const int64_t word = base + walk_lane();
    const uint32_t bits = word < plan.words() ? __ldcg(mask + word) : 0;
    int64_t total, kept = before + warp_prefix(static_cast<int64_t>(__popc(bits)), total);
    for (int bit = 0; bit < slots_per_word; ++bit) {
      const int64_t feature = word * slots_per_word + bit;
      if (bits >> bit & 1) {
        ++kept;
      } else if (feature < args.features && feature - kept < fillers) {
        set(feature, floor, feature);
      }
    }
    before += total;
  }
}

template <class T>
__global__ void __launch_bounds__(mma_threads) no_entries_kernel(BatchTopkEncode args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * mma_threads + threadIdx.x;
  if (row <= args.rows) args.offsets[row] = 0;
  if (row == 0) static_cast<Compute<T>*>(args.threshold)[0] = infinity<Compute<T>>();
}

template <class T>
void batch_topk_encode(const BatchTopkEncode& args, void* stream) {
  if (args.entries == 0) {
    return launch("no_entries", no_entries_kernel<T>, divide_up(args.rows + 1, mma_threads), mma_threads, 0, stream,
                  args);
  }
  Arena arena(args.workspace);
  const BatchPlan<T> plan(args, arena);
  const Screen<T>& screen = plan.screen;
  const double floor = args.activation == Activation::relu ? 0 : -INFINITY;
  const float screen_floor = static_cast<float>(floor);
  const int64_t blocks = walk_blocks(args.rows);
  const auto clear = [&](Count* counts, int64_t bins) {
    check(cudaMemsetAsync(counts, 0, static_cast<size_t>(bins) * sizeof(Count), static_cast<cudaStream_t>(stream)),
          "batch_topk_encode");
  };
  clear(plan.bound_counts, bound_bins);
  clear(plan.digit_counts, digits);
  prepare_columns(screen, stream);
  const int64_t tiles = prepare_rows(screen, 0, stream);
  run_screen(screen, tiles, BoundHistogram{screen_floor, plan.bound_counts}, stream);
  launch("bar", bar_kernel<T>, 1, warp_size, 0, stream, args, plan);
  run_screen(screen, tiles, CandidateBits<BarTest>(screen, {screen_floor, plan.state}, plan.mask), stream);
  launch("count_candidates", count_candidates_kernel<T>, blocks, walk_threads, 0, stream, args, plan);
  launch("starts", starts_kernel<T>, 1, scan_threads, 0, stream, args, plan);
  launch("score", score_kernel<T>, blocks, walk_threads, 0, stream, args, plan);
  for (int bits = 64; bits > 0; bits -= digit_bits) {
    const int shift = bits > digit_bits ? bits - digit_bits : 0;
    launch("digit", digit_kernel<T>, blocks < digit_blocks ? blocks : digit_blocks, walk_threads, 0, stream, args, plan,
           floor, shift);
    launch("limit", limit_kernel<T>, 1, warp_size, 0, stream, args, plan, shift);
  }
  launch("count_entries", count_entries_kernel<T>, blocks, walk_threads, 0, stream, args, plan, floor);
  launch("layout", layout_kernel<T>, 1, scan_threads, 0, stream, args, plan, floor);
  launch("write", write_batch_kernel<T>, blocks, walk_threads, 0, stream, args, plan, floor);
}

}  // namespace
}  // namespace isthmus::cuda
