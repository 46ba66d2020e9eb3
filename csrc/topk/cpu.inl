// The top-k encoder on the CPU.
//
//     screen    a matrix product whose result is never stored: a register tile gives upper bounds of the scores of 12
//               rows and 32 features, from words of a byte for each number where the CPU multiplies those (words.inl,
//               screen.inl)
//     choose    bounds above the row's bar, its k-th best score so far, become candidates. When a row has many, or
//               the panels in cache are used up, the most promising are scored exactly, which raises the bar, then
//               those still above it (choose.inl). Where a large part of the features is wanted, one feature after the
//               other is scored with a block of rows (dense.inl)
//     finish    the best are sorted and written (order.inl, finish.inl)
//
// Few rows meet the weights as they lie, without panels (few.inl).
//
// The answer is that of the exact scores: it depends neither on the screen, nor on how the work is cut, nor on the
// level.
//
// Weights come in chunks: all threads write a chunk as panels, then every block of rows meets them. A feature that has
// to be scored is read again while it is still in the third-level cache. Of 24576 features of 768 components 871 become
// candidates for the best 32 of a row, and 392 are scored; of 1229, to find the best 256, 264.
//
// Extra memory: a chunk of panels and the words of some rows, at most about 8 MB each; for each row what is best so
// far, 12 bytes for each of k; for each thread about 2 MB of candidates.

#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/product.h"
#include "core/rounding.h"
#include "core/score.h"
#include "core/tiles.h"
#include "topk/kernels.h"
#include "topk/select.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

#include "topk/features.inl"
#include "topk/screen.inl"
// after features
#include "topk/choose.inl"
// after choose
#include "topk/order.inl"
// after order
#include "topk/dense.inl"

// How the work is cut. Features form lists, equal parts of a group, each with its own best; of every list a *slice* is
// in a chunk. Many rows have one list for a group, as a bar is the higher the more features it has seen; few rows have
// more of them, for the sake of parallelism.
struct Plan {
  static constexpr int64_t wanted_items = 16, least_list = 1024, most_block_rows = 96, least_capacity = 256;
  static constexpr int64_t most_dense = 8192, dense_part = 24;
  static constexpr int64_t batch_bytes = 8 * 1024 * 1024, chunk_bytes = 8 * 1024 * 1024, block_bytes = 1024 * 1024;

  int64_t k;                   // of a group
  int64_t batch_rows;          // rows that share the panels of a chunk
  int64_t block_rows, blocks;  // of a batch
  int64_t parts, lists;        // lists of a group, and in all
  int64_t slice;               // whole panels
  int64_t longest;             // list
  bool dense;                  // whether a large part of a list is wanted, all of which fits into a chunk
  int64_t capacity;            // candidates of a row and list

  // row_bytes: of a row in the screen, of the weights; width: of a panel.
  template <class T>
  Plan(const Features<T>& features, int64_t row_bytes, int64_t weight_bytes, int64_t width) {
    const TopkEncode& args = features.args;
    k = args.k / args.groups;
    const int64_t kept_bytes = 12 * args.k + 16 * args.groups;
    batch_rows = whole_tiles(smaller(args.rows, larger(batch_bytes / larger(row_bytes, kept_bytes), tile_rows)));
    block_rows = whole_tiles(smaller(most_block_rows, divide_up(batch_rows, wanted_items)));
    int64_t largest = 0;
    for (int64_t g = 0; g < args.groups; ++g) {
      largest = larger(largest, features.starts.data[g + 1] - features.starts.data[g]);
    }
    parts = wanted_items / (divide_up(batch_rows, block_rows) * args.groups);
    parts = larger(smaller(parts, largest / larger(least_list, 8 * k)), 1);
    lists = parts * args.groups;
    longest = divide_up(largest, parts);
    slice = smaller(larger(chunk_bytes / larger(weight_bytes, 1) / lists, 4 * k), longest);
    slice = larger(divide_up(slice, width), 1) * width;
    dense = parts == 1 && longest <= smaller(slice, most_dense) && longest < dense_part * k;
    if (dense) block_rows = smaller(block_rows, BlockChooser<T>::most_rows);
    capacity = (dense ? slice : smaller(larger(least_capacity, 4 * k), slice)) + width;
    block_rows = smaller(block_rows, whole_tiles(larger(block_bytes / (capacity * 12), tile_rows)));
    blocks = divide_up(batch_rows, block_rows);
  }

  static int64_t whole_tiles(int64_t rows) { return divide_up(rows, tile_rows) * tile_rows; }
  // Where list l begins; behind the last one, where the features end.
  template <class T>
  int64_t begin(const Features<T>& features, int64_t list) const {
    const int64_t group = list / parts, part = list % parts, first = features.starts.data[group];
    return part == 0 ? first : first + (features.starts.data[group + 1] - first) * part / parts;
  }
};

template <class T, class Words>
struct BlockScan;

// A batch of rows, and the panels of the current chunk.
template <class T, class Words>
struct Encoder {
  using C = Compute<T>;
  static constexpr int width = panel_width<C>;

  const TopkEncode& args;
  const Features<T>& features;
  const Plan& plan;
  const Best& best;
  const Screen<Words> screen{args.cols, args.activation == Activation::abs};
  const int64_t depth = screen.depth, panels = plan.slice / width;  // of a list
  Buffer<C> words{plan.batch_rows * depth};
  Buffer<C> units{plan.batch_rows}, lengths{plan.batch_rows}, slopes{plan.batch_rows / tile_rows};
  Buffer<C> panel_words{plan.lists * panels * width * depth};
  Buffer<C> panel_terms{plan.lists * panels * width * Panel<C>::terms};

  RowTile<C> tile(int64_t r) const {
    return {words.data + r * depth, units.data + r, lengths.data + r, slopes.data[r / tile_rows]};
  }
  Panel<C> panel(int64_t p) const {
    return {panel_words.data + p * width * depth, panel_terms.data + p * width * Panel<C>::terms};
  }
  int64_t first_of(int64_t list, int64_t chunk) const { return plan.begin(features, list) + chunk * plan.slice; }
  int64_t in_slice(int64_t list, int64_t chunk) const {
    return smaller(plan.slice, plan.begin(features, list + 1) - first_of(list, chunk));
  }

  void write_rows(int64_t first, int64_t rows) const {
    parallel_for(divide_up(rows, tile_rows), 1, [&](int64_t begin, int64_t end) {
      const Buffer<C> scratch(tile_rows * screen.padded);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t r = t * tile_rows;
        slopes.data[t] = screen.pack_tile(features.row(first + r), smaller(tile_rows, rows - r), words.data + r * depth,
                                          units.data + r, lengths.data + r, scratch.data);
      }
    });
  }

  void write_panels(int64_t chunk) const {
    parallel_for(plan.lists * panels, 1, [&](int64_t begin, int64_t end) {
      const Buffer<C> scratch(width * screen.padded);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t list = p / panels, from = p % panels * width, count = in_slice(list, chunk) - from;
        if (count <= 0) continue;
        const int64_t first = first_of(list, chunk) + from;
        screen.pack_panel([&](int64_t i) { return features.weight(first + i); },
                          [&](int64_t i) { return features.bias(first + i); }, smaller(width, count), panel(p),
                          scratch.data);
      }
    });
  }

  // The batch of `rows` rows from `first`.
  void run(int64_t first, int64_t rows) const {
    write_rows(first, rows);
    best.clear();
    for (int64_t chunk = 0; chunk * plan.slice < plan.longest; ++chunk) {
      write_panels(chunk);
      parallel_for(plan.blocks * plan.lists, 1, [&](int64_t begin, int64_t end) {
        const BlockScan<T, Words> scan{*this};
        for (int64_t item = begin; item < end; ++item) {
          const int64_t r = item / plan.lists * plan.block_rows, list = item % plan.lists;
          scan.meet(first, r, smaller(plan.block_rows, rows - r), list, chunk);
        }
      });
    }
  }
};

// The scratch of one thread.
template <class T, class Words>
struct BlockScan {
  using C = Compute<T>;
  static constexpr int width = panel_width<C>;

  const Encoder<T, Words>& encoder;
  const Plan& plan = encoder.plan;
  CandidateLists<T> lists{encoder.features, encoder.best, plan.block_rows, plan.capacity};
  BlockChooser<T> chooser{encoder.features, encoder.best, plan.block_rows, plan.dense ? plan.slice : 0};
  Buffer<C> scores{tile_rows * width};
  Buffer<uint32_t> passed{tile_rows};

  // Rows r … r + rows - 1 of the batch that begins at row `first`.
  void meet(int64_t first, int64_t r, int64_t rows, int64_t list, int64_t chunk) const {
    const int64_t count = encoder.in_slice(list, chunk), position = encoder.first_of(list, chunk);
    const auto place = [&](int64_t i) { return (r + i) * plan.lists + list; };
    for (int64_t i = 0; i < rows; ++i) lists.begin(i, place(i));
    for (int64_t f = 0; f < count; f += width) {
      const uint32_t inside = ~0u >> (32 - smaller(width, count - f));
      for (int64_t t = 0; t < rows; t += tile_rows) {
        const int64_t in_tile = smaller(tile_rows, rows - t);
        encoder.screen.meet(encoder.tile(r + t), in_tile, encoder.panel(list * encoder.panels + f / width),
                            lists.bars.data + t, scores.data, passed.data);
        for (int64_t i = 0; i < in_tile; ++i) {
          const uint32_t bits = passed.data[i] & inside;
          if (bits == 0) continue;
          append(t + i, scores.data + i * width, position + f, bits);
          if (!lists.has_room(t + i, width)) lists.settle(t + i, place(t + i), first + r + t + i);
        }
      }
    }
    if (plan.dense) return chooser.settle(lists, first + r, rows, position, count, place);
    for (int64_t i = 0; i < rows; ++i) lists.settle(i, place(i), first + r + i);
  }

  ISTHMUS_INLINE void append(int64_t i, const C* bounds, int64_t position, uint32_t bits) const {
    for (int j = 0; j < width; j += lanes<C>, bits >>= lanes<C>) {
      lists.append(i, load(bounds + j), position + j, bits & ((1u << lanes<C>)-1));
    }
  }
};

#include "topk/few.inl"
#include "topk/finish.inl"

template <class T>
void encode_few(const Features<T>& features) {
  const TopkEncode& args = features.args;
  const Plan plan(features, 1, 1, FewRows<T>::size);
  const Best best(args.rows * plan.lists, plan.k, args.activation);
  FewRows<T>{features, plan, best}.run();
  finish_rows(features, plan, best, 0, args.rows);
}

template <class T, class Words>
void encode_many(const Features<T>& features) {
  using C = Compute<T>;
  const TopkEncode& args = features.args;
  const int64_t word_bytes = Words::depth(args.cols) * int64_t(sizeof(C));
  const Plan plan(features, word_bytes, larger(word_bytes, args.cols * int64_t(sizeof(T))), panel_width<C>);
  const Best best(plan.batch_rows * plan.lists, plan.k, args.activation);
  const Encoder<T, Words> encoder{args, features, plan, best};
  for (int64_t first = 0; first < args.rows; first += plan.batch_rows) {
    const int64_t rows = smaller(plan.batch_rows, args.rows - first);
    encoder.run(first, rows);
    finish_rows(features, plan, best, first, rows);
  }
}

// Coarse words make the product faster and let more features pass. Scores are about as large as |x| |w| / √D; of
// normally distributed ones, exp(loss · √(2 log(F / k))) times as many pass if the bound is wider by `loss`.
template <class Words, class T>
bool is_worthwhile(const Features<T>& features) {
  constexpr double most_passing = 1.0 / 24;
  const int64_t cols = features.args.cols, count = features.count();
  if (cols < Words::least_cols || cols > Words::most_cols || count == 0) return false;
  const auto row = [&](int64_t i) { return features.row(i); };
  const auto weight = [&](int64_t i) { return features.weight(i); };
  const double total =
      average_loss<Words, true>(row, features.args.rows, cols) + average_loss<Words, false>(weight, count, cols);
  const double loss = total * __builtin_sqrt(static_cast<double>(cols));
  const double part = static_cast<double>(features.args.k) / static_cast<double>(count);
  return part < most_passing && loss * __builtin_sqrt(-2 * __builtin_log(part)) < __builtin_log(most_passing / part);
}

void encode(const TopkEncode& args) {
  if (args.rows == 0) return;
  dispatch_dtype(args.dtype, [&]<class T>() {
    const Features<T> features(args);
    if (args.rows <= FewRows<T>::most_rows) return encode_few(features);
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
    if constexpr (sizeof(Compute<T>) == 4) {
      if (is_worthwhile<Bytes>(features)) return encode_many<T, Bytes>(features);
      if (is_worthwhile<Pairs>(features)) return encode_many<T, Pairs>(features);
    }
#endif
    encode_many<T, Fine<Compute<T>>>(features);
  });
}

}  // namespace

extern const TopkKernels topk_table;
const TopkKernels topk_table = {encode};

}  // namespace isthmus::ISTHMUS_LEVEL
