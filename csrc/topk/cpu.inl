// The top-k encoder on the CPU.
//
// A matrix product whose result is never stored: a register tile of pre-activations (core/product.h) is
// compared with the running k-th best of each row, and the few that pass join that row's short list of candidates
// (sparse/select.h). About k · (1 + log(F / k)) of the F features of a row ever pass, so selection hides behind the
// product.
//
// Extra memory: for each thread a block of x (about 1 MB), a panel of weights and the lists of its rows; and
// what each range of features kept of each row, 8 bytes (12 in float64) for each of rows · ranges · k.

#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/product.h"
#include "topk/kernels.h"
#include "topk/select.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An item of work is a block of rows and a range of features. Selection is exact, so the cut changes nothing but speed.
// Every block packs the weights it meets again, so blocks are large; ranges supply the parallelism. Neighbouring ranges
// that fall to the same thread run as one, with one list of candidates.
template <class C>
struct EncodePlan {
  static constexpr int64_t block_bytes = 1024 * 1024, list_bytes = 4 * 1024 * 1024;
  static constexpr int64_t wanted_items = 32, least_range = 512;

  int64_t block_rows, blocks, range, ranges, capacity;

  explicit EncodePlan(const TopkEncode& args) {
    const int64_t row_bytes = larger(args.cols, 1) * int64_t(sizeof(C)), entry_bytes = sizeof(C) + sizeof(int32_t);
    capacity = smaller(2 * args.k, args.features) + panel_width<C>;
    const int64_t fitting = smaller(block_bytes / row_bytes, list_bytes / (capacity * entry_bytes));
    const int64_t most_rows = larger(divide_up(fitting, tile_rows), 8) * tile_rows;
    blocks = divide_up(args.rows, most_rows);
    block_rows = divide_up(divide_up(args.rows, blocks), tile_rows) * tile_rows;
    // Ranges are whole panels, no shorter than a few times k; the last one takes the rest.
    const int64_t target = larger(args.features * blocks / wanted_items, larger(least_range, 8 * args.k));
    range = target / panel_width<C> * panel_width<C>;
    ranges = larger(args.features / range, 1);
  }

  int64_t items() const { return blocks * ranges; }
  int64_t first_feature(int64_t r, int64_t features) const { return r == ranges ? features : r * range; }
};

// What the ranges of a block found: the k best of each row, in feature order. A NaN in the first place marks a row with
// a NaN in that range.
template <class C>
struct Survivors {
  const int64_t ranges, k;
  Buffer<C> values;         // [rows, ranges, k]
  Buffer<int32_t> indices;  // [rows, ranges, k]
  Buffer<bool> present;     // [blocks, ranges]; false if an earlier range took this one along

  Survivors(const EncodePlan<C>& plan, int64_t rows, int64_t k_)
      : ranges(plan.ranges), k(k_), values(rows * ranges * k), indices(rows * ranges * k), present(plan.items()) {}

  int64_t position(int64_t row, int64_t range) const { return (row * ranges + range) * k; }
};

// Asks for the lines of a stretch of memory, to wait in the second-level cache.
template <class T>
inline void prefetch(const T* from, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(from);
  for (int64_t i = 0; i < count * int64_t(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

template <class T>
struct Encoder {
  using C = Compute<T>;
  static constexpr int width = panel_width<C>;
  static constexpr uint32_t all_lanes = (1u << lanes<C>)-1;
  static constexpr int64_t broken = -1;  // the count of a row in which a NaN was met

  const TopkEncode& args;
  const EncodePlan<C>& plan;
  const Survivors<C>& survivors;
  const int64_t list_stride = plan.capacity + lanes<C>;
  Buffer<C> tiles{plan.block_rows * args.cols};
  Buffer<C> panel{width * args.cols};
  Buffer<C> scores{tile_rows * width};
  // Of each row: what a candidate has to exceed, and the candidates so far.
  Buffer<C> thresholds{plan.block_rows};
  Buffer<int64_t> counts{plan.block_rows};
  Buffer<C> values{plan.block_rows * list_stride};
  Buffer<int32_t> indices{plan.block_rows * list_stride};

  Candidates<C> candidates(int64_t row) const {
    return {values.data + row * list_stride, indices.data + row * list_stride, counts.data[row]};
  }

  void pack_block(int64_t first, int64_t rows) const {
    const T* x = static_cast<const T*>(args.x) + first * args.cols;
    for (int64_t r = 0; r < rows; r += tile_rows) {
      pack_rows<tile_rows>(x + r * args.cols, args.cols, smaller(tile_rows, rows - r), args.cols,
                           tiles.data + r * args.cols);
    }
  }

  // scores[r][j] = bias[j] + x[r] · weight[j] for one tile and one panel.
  ISTHMUS_NOINLINE void score(const C* tile, int64_t rows, Vec<C> bias0, Vec<C> bias1) const {
    dispatch_rows(rows, [&]<int Rows>() {
      Vec<C> acc[Rows][2];
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        acc[r][0] = bias0;
        acc[r][1] = bias1;
      }
      multiply_tile(tile, panel.data, args.cols, acc);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        store(scores.data + r * width, acc[r][0]);
        store(scores.data + r * width + lanes<C>, acc[r][1]);
      }
    });
  }

  // The lanes in `bits` become candidates; a full list is cut down to the k best, which raises the threshold.
  ISTHMUS_NOINLINE void append(int64_t row, Vec<C> score, uint32_t bits, int64_t feature) const {
    if ((lane_bits<C>(score != score) & bits) != 0) {
      thresholds.data[row] = static_cast<C>(__builtin_inf());
      counts.data[row] = broken;
      return;
    }
    if (args.activation == Activation::relu) score = score > 0 ? score : Vec<C>{};
    Candidates<C> list = candidates(row);
    list.append(score, indices_from<C>(static_cast<int32_t>(feature)), bits);
    if (list.count + lanes<C> > plan.capacity) thresholds.data[row] = keep_best(list, args.k);
    counts.data[row] = list.count;
  }

  // The scores of one row and panel; bit j of `inside` is set if feature + j exists.
  void filter(int64_t row, const C* row_scores, int64_t feature, uint32_t inside) const {
    for (int j = 0; j < width; j += lanes<C>, inside >>= lanes<C>) {
      const Vec<C> score = load(row_scores + j);
      // Not `score > threshold`: a NaN must pass, and so must everything while the threshold itself is still NaN.
      const uint32_t bits = ~lane_bits<C>(score <= splat(thresholds.data[row])) & inside & all_lanes;
      if (bits != 0) append(row, score, bits, feature + j);
    }
  }

  void encode_features(int64_t rows, int64_t begin, int64_t end) const {
    for (int64_t row = 0; row < rows; ++row) {
      thresholds.data[row] = static_cast<C>(__builtin_nan(""));
      counts.data[row] = 0;
    }
    const T *weight = static_cast<const T*>(args.weight), *bias = static_cast<const T*>(args.bias);
    for (int64_t f = begin; f < end; f += width) {
      const int64_t features = smaller(width, end - f), in_second = features - lanes<C>;
      const uint32_t inside = ~0u >> (32 - features);
      pack_rows<width>(weight + f * args.cols, args.cols, features, args.cols, panel.data);
      Vec<C> bias0 = {}, bias1 = {};
      if (bias != nullptr) bias0 = load_first(bias + f, features);
      if (bias != nullptr && in_second > 0) bias1 = load_first(bias + f + lanes<C>, in_second);
      // Packing reads many rows side by side, too many for the hardware to foresee: fetch the next panel meanwhile.
      const int64_t ahead = smaller(width, end - f - features) * args.cols;
      const int64_t share = divide_up(ahead, divide_up(rows, tile_rows));
      const T* next = weight + (f + width) * args.cols;
      for (int64_t r = 0; r < rows; r += tile_rows) {
        const int64_t tile = smaller(tile_rows, rows - r), fetched = r / tile_rows * share;
        if (fetched < ahead) prefetch(next + fetched, smaller(share, ahead - fetched));
        score(tiles.data + r * args.cols, tile, bias0, bias1);
        for (int64_t i = 0; i < tile; ++i) filter(r + i, scores.data + i * width, f, inside);
      }
    }
  }

  void keep_survivors(int64_t first, int64_t rows, int64_t range) const {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t to = survivors.position(first + row, range);
      Candidates<C> list = candidates(row);
      if (list.count == broken) {
        survivors.values.data[to] = static_cast<C>(__builtin_nan(""));
        continue;
      }
      if (list.count > args.k) keep_best(list, args.k);
      std::memcpy(survivors.values.data + to, list.values, static_cast<size_t>(args.k) * sizeof(C));
      std::memcpy(survivors.indices.data + to, list.indices, static_cast<size_t>(args.k) * sizeof(int32_t));
    }
  }

  void run(int64_t begin, int64_t end) const {
    for (int64_t item = begin; item < end;) {
      const int64_t block = item / plan.ranges, next = smaller(end, (block + 1) * plan.ranges);
      const int64_t first = block * plan.block_rows, rows = smaller(plan.block_rows, args.rows - first);
      const int64_t range = item % plan.ranges, last = range + next - item;
      pack_block(first, rows);
      encode_features(rows, plan.first_feature(range, args.features), plan.first_feature(last, args.features));
      keep_survivors(first, rows, range);
      survivors.present.data[item++] = true;
      while (item < next) survivors.present.data[item++] = false;
    }
  }
};

// Brings together what the ranges found for each row, and sorts it.
template <class T>
struct Finisher {
  using C = Compute<T>;

  const TopkEncode& args;
  const Survivors<C>& survivors;
  const int64_t room = survivors.ranges * args.k + lanes<C>;
  Buffer<C> values{2 * room};
  Buffer<int32_t> indices{2 * room};

  // False if there was a NaN.
  bool collect(int64_t row, const bool* present, Candidates<C>& list) const {
    for (int64_t range = 0; range < survivors.ranges; ++range) {
      if (!present[range]) continue;
      const C* found = survivors.values.data + survivors.position(row, range);
      const int32_t* where = survivors.indices.data + survivors.position(row, range);
      if (found[0] != found[0]) return false;
      std::memcpy(list.values + list.count, found, static_cast<size_t>(args.k) * sizeof(C));
      std::memcpy(list.indices + list.count, where, static_cast<size_t>(args.k) * sizeof(int32_t));
      list.count += args.k;
    }
    return true;
  }

  void finish(int64_t row, const bool* present) const {
    Candidates<C> list{values.data, indices.data, 0};
    const bool whole = collect(row, present, list);
    if (whole) {
      if (list.count > args.k) keep_best(list, args.k);
      list = sort_descending(list, {values.data + room, indices.data + room, 0});
    }
    T* out_values = static_cast<T*>(args.values) + row * args.k;
    for (int64_t j = 0; j < args.k; ++j) {
      store_one(out_values + j, whole ? list.values[j] : static_cast<C>(__builtin_nan("")));
      args.indices[row * args.k + j] = whole ? list.indices[j] : 0;
    }
  }
};

void encode(const TopkEncode& args) {
  if (args.rows == 0) return;
  dispatch_dtype(args.dtype, [&]<class T>() {
    const EncodePlan<Compute<T>> plan(args);
    const Survivors<Compute<T>> survivors(plan, args.rows, args.k);
    parallel_for(plan.items(), 1,
                 [&](int64_t begin, int64_t end) { Encoder<T>{args, plan, survivors}.run(begin, end); });
    parallel_for(args.rows, 64, [&](int64_t begin, int64_t end) {
      const Finisher<T> finisher{args, survivors};
      for (int64_t row = begin; row < end; ++row) {
        finisher.finish(row, survivors.present.data + row / plan.block_rows * plan.ranges);
      }
    });
  });
}

}  // namespace

extern const TopkKernels topk_table;
const TopkKernels topk_table = {encode};

}  // namespace isthmus::ISTHMUS_LEVEL
