// Included by cpu.inl of codebook and residual: the best codes of rows that are in cache, exactly.
//
//     screen    s~ = x·c - |c|²/2 (x·c of the normalised codes, x·c) in a register tile, of which only the largest of
//               each group of eight codes is kept (screen.inl)
//     survive   |s~ - s| <= E(row, group) (bound.inl); a group whose s~ + E is below the best s~ - E of another cannot
//               hold the best code. Mostly one group survives
//     rescore   the survivors in float64 (rescore.inl)
//
// The answer is the exact one, so it does not depend on how rows and codes are cut, nor on the level.
//
// Arithmetic: 2·N·K·D operations at the rate of the FMA ports, at twice that as bfloat16 and at four times as bytes; a
// few comparisons for every eight scores; 8·D float64 operations a survivor. Traffic: the packed codebook streams past
// each block of rows, which waits in cache.

#include "codebook/bound.inl"
#include "codebook/center.inl"
#include "codebook/rescore.inl"
// after rescore: groups of the same size
#include "codebook/screen.inl"

// A codebook [codes, dim], packed by all threads: to be made outside parallel_for.
template <class T>
struct PackedCodes {
  using C = Compute<T>;
  static constexpr int64_t least_coarse_dim = 16;  // below, what follows the product takes longer than it

  const CodeGroups<T> groups;
  const Panels<C> panels;

  // even_rows: what mostly_even() says of the rows to come; where it errs, the search takes longer.
  PackedCodes(Metric metric, const T* codebook, int64_t codes, int64_t dim, bool even_rows = true)
      : groups(metric, codebook, codes, dim),
        panels(metric, has_coarse_words && sizeof(C) == 4 && dim >= least_coarse_dim, even_rows, codebook, codes, dim,
               groups.lengths.data) {}
};

// Of numbers, the greatest first, `value` takes the place of the last if it is greater.
template <class C>
inline void insert(C* greatest, int64_t count, C value) {
  if (!(value > greatest[count - 1])) return;
  int64_t place = count - 1;
  for (; place > 0 && value > greatest[place - 1]; --place) greatest[place] = greatest[place - 1];
  greatest[place] = value;
}

// The rank-th largest lane, counted from 1.
template <class C>
inline C ranked_lane(Vec<C> v, int64_t rank) {
  C sorted[lanes<C>];
  for (int i = 0; i < lanes<C>; ++i) {
    int place = i;
    for (; place > 0 && v[i] > sorted[place - 1]; --place) sorted[place] = sorted[place - 1];
    sorted[place] = v[i];
  }
  return sorted[rank - 1];
}

// The scratch of one thread.
template <class T>
struct BlockSearch {
  using C = Compute<T>;
  static constexpr int size = lanes<C>;
  static constexpr int64_t max_rows = 96;
  static constexpr int64_t max_slabs = 8192 / slab_codes<C>;  // at once: their maxima stay in L2
  static constexpr int64_t slabs_per_span = 64 / size;

  struct Survivor {
    int64_t row, group;
    C score;  // the largest of its codes, as screened
  };

  const CodeGroups<T>& groups;
  const Panels<C>& panels;
  const int64_t best;
  const int64_t slabs_at_once = panels.slabs < max_slabs ? panels.slabs : max_slabs;
  const bool moves = panels.center.moves_rows(), copies = panels.coarse || moves;
  const int64_t word_stride = panels.words_of((panels.dim + 4 * size - 1) / (4 * size) * (4 * size));
  Buffer<C> words;         // [max_rows, word_stride]: the rows as the screen takes them, where it does not as they are
  Buffer<C> moved;         // a tile of rows
  Buffer<C> maxima;        // [max_rows, slabs_at_once, lanes]
  Buffer<C> bars;          // [max_rows, best]: the best codes of a row are at least as good, greatest first
  Buffer<Survivor> queue;  // of one screen
  Buffer<double> row;      // one row in float64
  Buffer<double> scratch;  // scores, for a caller that does not want them
  RowBound<C> bounds[max_rows];
  C units[max_rows / tile_height];  // of tiles

  BlockSearch(const PackedCodes<T>& codes, int64_t best_)
      : groups(codes.groups),
        panels(codes.panels),
        best(best_),
        words(copies ? max_rows * word_stride : 0),
        moved(moves ? tile_height * panels.dim : 0),
        maxima(max_rows * slabs_at_once * size),
        bars(max_rows * best),
        queue(max_rows * slabs_at_once * size),
        row(panels.dim),
        scratch(max_rows * best) {}

  // Row i begins at rows + i · stride, i < count <= max_rows. indices and scores (or null): [count, best], best first.
  // Scores are -|x - c|², x·c / |c| or x·c in float64; one that is not a number comes last.
  template <class Visitor = const NoVisitor>
  void search(const C* rows, int64_t stride, int64_t count, int64_t* indices, double* scores, Visitor&& visitor = {}) {
    search_slabs(0, panels.slabs, rows, stride, count, indices, scores == nullptr ? scratch.data : scores, visitor);
  }

  // The same among the codes of some slabs alone, begin being a multiple of slabs_per_span.
  template <class Visitor = const NoVisitor>
  void search_slabs(int64_t begin, int64_t end, const C* rows, int64_t stride, int64_t count, int64_t* indices,
                    double* scores, Visitor&& visitor = {}) {
#if defined(ISTHMUS_TILES)
    const TileSession session;
#endif
    for (int64_t r = 0; r < count; r += tile_height) {
      prepare_tile(r, count - r < tile_height ? count - r : tile_height, rows, stride);
    }
    visitor.expect(rows, stride, count, bounds);
    for (int64_t r = 0; r < count; ++r) BestCodes{scores + r * best, indices + r * best, best}.clear();
    for (int64_t i = 0; i < count * best; ++i) bars.data[i] = -static_cast<C>(__builtin_inf());
    for (int64_t slab = begin; slab < end; slab += slabs_at_once) {
      const int64_t slabs = end - slab < slabs_at_once ? end - slab : slabs_at_once;
      for (int64_t s = 0; s < slabs; ++s) {
        panels.meet(slab + s, copies ? words.data : rows, copies ? word_stride : stride, count, units,
                    maxima.data + s * size, slabs_at_once * size, visitor);
      }
      int64_t found = 0;
      for (int64_t r = 0; r < count; ++r) found = find_survivors(r, slab, slabs, found);
      rescore(found, rows, stride, indices, scores);
    }
  }

  // The rows of a tile share the unit of their words.
  void prepare_tile(int64_t first, int64_t count, const C* rows, int64_t stride) {
    double squares[tile_height];
    C largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      const C* x = rows + (first + i) * stride;
      if (moves) panels.center.move(x, moved.data + i * panels.dim);
      if (moves) x = moved.data + i * panels.dim;
      squares[i] = squared_length(x, panels.dim);
      if (panels.quads && squares[i] < tame_square<C>) {
        const C longest = largest_component(x, panels.dim);
        largest = longest > largest ? longest : largest;
      }
    }
    const C unit = units[first / tile_height] = panels.quads ? panels.unit_of(largest) : 0;
    for (int64_t i = 0; i < count; ++i) {
      const C* x = moves ? moved.data + i * panels.dim : rows + (first + i) * stride;
      C* copy = words.data + (first + i) * word_stride;
      const double lost = panels.coarse ? panels.write_row(x, unit, copy) : 0;
      if (!panels.coarse && moves) std::memcpy(copy, x, static_cast<size_t>(panels.dim) * sizeof(C));
      bounds[first + i] =
          RowBound<C>(squares[i], lost, panels.coarse, panels.dim, panels.center.taken, static_cast<double>(unit));
    }
  }

  ISTHMUS_INLINE Vec<C> maximum(int64_t r, int64_t s) const {
    return load(maxima.data + (r * slabs_at_once + s) * size);
  }

  // Appends to the queue. First, one comparison for each vector of maxima with the widest bound of 64 groups; then what
  // is left, with the bound of its own group. Written so that whatever is not a number survives.
  int64_t find_survivors(int64_t r, int64_t slab, int64_t slabs, int64_t queued) {
    const C* bar = bars.data + r * best;
    C spans[max_slabs / slabs_per_span];
    for (int64_t s = 0; s < slabs; s += slabs_per_span) {
      spans[s / slabs_per_span] = panels.bounds.of_span(bounds[r], (slab + s) / slabs_per_span);
    }
    const C highest = ranked_maximum(r, slabs, spans), start = highest > bar[best - 1] ? highest : bar[best - 1];
    int64_t end = queued;
    for (int64_t s = 0; s < slabs; s += slabs_per_span) {
      const C low = start - spans[s / slabs_per_span];
      uint64_t dropped = 0;
      for (int64_t i = s; i < s + slabs_per_span && i < slabs; ++i) {
        dropped |= static_cast<uint64_t>(lane_bits(maximum(r, i) < low)) << ((i - s) * size);
      }
      const int64_t left = groups.groups - (slab + s) * size;  // fewer than lanes in the last slab
      const uint64_t present = left < 64 ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
      for (uint64_t bits = present & ~dropped; bits != 0; bits &= bits - 1) {
        const int64_t place = s * size + __builtin_ctzll(bits);
        queue.data[end++] = {r, slab * size + place, maxima.data[r * slabs_at_once * size + place]};
      }
    }
    return slabs == panels.slabs && end - queued <= best ? end : refine(r, queued, end);
  }

  // Of the queue from `begin`, keeps what survives with the bounds of its own groups.
  int64_t refine(int64_t r, int64_t begin, int64_t end) {
    C* bar = bars.data + r * best;
    for (int64_t i = begin; i < end; ++i) {
      // The group has one code, at least, that is as good as its lower bound.
      insert(bar, best, queue.data[i].score - panels.bounds.lower(bounds[r], queue.data[i].group));
    }
    int64_t kept = begin;
    for (int64_t i = begin; i < end; ++i) {
      if (queue.data[i].score + panels.bounds.upper(bounds[r], queue.data[i].group) < bar[best - 1]) continue;
      if (kept < i) queue.data[kept] = queue.data[i];
      ++kept;
    }
    return kept;
  }

  // A lower bound of the best-th best code.
  ISTHMUS_INLINE C ranked_maximum(int64_t r, int64_t slabs, const C* spans) const {
    if (best > size) return -static_cast<C>(__builtin_inf());
    Vec<C> top = Vec<C>{} - C(__builtin_inf());
    for (int64_t s = 0; s < slabs; ++s) top = greater(maximum(r, s) - spans[s / slabs_per_span], top);
    return best == 1 ? largest_lane<C>(top) : ranked_lane<C>(top, best);
  }

  void rescore(int64_t found, const C* rows, int64_t stride, int64_t* indices, double* scores) {
    for (int64_t begin = 0, end = end_of_row(0, found); begin < found;) {
      const int64_t r = queue.data[begin].row, next_end = end_of_row(end, found);
      const bool next_ordered = pays_to_order(next_end - end);
      if (next_ordered) bring_forward(end, next_end);
      for (int64_t i = end; i < next_end && i < end + (next_ordered ? 1 : 2); ++i) groups.prefetch(queue.data[i].group);
      const C* x = rows + r * stride;
      const BestCodes codes{scores + r * best, indices + r * best, best};
      copy_double(x, panels.dim, row.data);
      if (pays_to_order(end - begin)) {
        rescore_best_first(r, x, begin, end, codes);
      } else {
        for (int64_t i = begin; i < end; ++i) groups.rescore(row.data, queue.data[i].group, codes);
      }
      begin = end;
      end = next_end;
    }
  }

  // Of the part of the queue that begins here and belongs to one row.
  int64_t end_of_row(int64_t begin, int64_t found) const {
    int64_t end = begin;
    while (end < found && queue.data[end].row == queue.data[begin].row) ++end;
    return end;
  }

  // Of vectors that are short, rescoring a few more takes no longer than finding out which. Codes of cosine would have
  // to be normalised in float64 once more: where a center is taken off, they have few digits left.
  bool pays_to_order(int64_t survivors) const {
    return panels.coarse && panels.metric != Metric::cosine && survivors > best + 1 && best <= size &&
           panels.dim >= 128;
  }

  // Survivors of a coarse screen: once `best` codes are known, the score of the last of them, which needs no allowance
  // for what words leave out, drops most of the others.
  void rescore_best_first(int64_t r, const C* x, int64_t begin, int64_t end, const BestCodes& codes) {
    C bar = bars.data[r * best + best - 1];
    int64_t last = BestCodes::nobody;
    for (int64_t i = begin; i < end; ++i) {
      if (i < begin + best) bring_forward(i, end);
      const Survivor next = queue.data[i];
      if (next.score + panels.bounds.upper(bounds[r], next.group) < bar) continue;
      groups.rescore(row.data, next.group, codes);
      if (codes.indices[best - 1] == last) continue;
      last = codes.indices[best - 1];
      const C raised = lower_bound(r, x, last);
      if (raised > bar) bar = raised;
    }
  }

  // The survivor with the largest score takes this place in the queue.
  void bring_forward(int64_t place, int64_t end) {
    int64_t top = place;
    for (int64_t i = place + 1; i < end; ++i) {
      if (queue.data[i].score > queue.data[top].score) top = i;
    }
    const Survivor moved = queue.data[top];
    queue.data[top] = queue.data[place];
    queue.data[place] = moved;
  }

  // What the screen approximates, for one code, less its rounding. Not for cosine.
  C lower_bound(int64_t r, const C* x, int64_t code) const {
    const Center<C>& center = panels.center;
    Vec<C> products = {}, squares = {};
    for (int64_t k = 0; k < panels.dim; k += size) {
      const int64_t left = panels.dim - k;
      const Vec<C> mean = load_first(center.mean.data + k, left);
      const Vec<C> c = load_first(groups.codebook + code * panels.dim + k, left) - mean;
      products += (load_first(x + k, left) - (moves ? mean : Vec<C>{})) * c;
      squares += c * c;
    }
    const C half = panels.metric == Metric::euclidean ? C(0.5) : C(0);
    return sum_lanes<C>(products) - half * sum_lanes<C>(squares) - panels.bounds.fine(bounds[r], code / group_codes);
  }
};
