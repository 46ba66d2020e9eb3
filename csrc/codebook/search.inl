// Included by cpu.inl of codebook and residual: the best codes of rows that are in cache, exactly.
//
//     screen    s~ = x·c - |c|²/2 (x·c of the normalised codes, x·c) in a register tile, of which only the largest of
//               each group of eight codes is kept (screen.inl)
//     survive   |s~ - s| <= E(row, group) (bound.inl); a group whose s~ + E is below a score that is known to be
//               reached cannot hold the best code. Mostly one group survives, or two
//     settle    after a coarse screen, the codes of the leading group are scored in the compute type. That drops most
//               other groups; then what is left (shortlist.inl)
//     rescore   what that does not settle, what a fine screen left, and several codes, in float64 (rescore.inl)
//
// The answer is the exact one, so it does not depend on how rows and codes are cut, nor on the level.
//
// Arithmetic: 2·N·K·D operations at the rate of the FMA ports, at twice that as bfloat16 and at four times as bytes; a
// few comparisons for every eight scores; 24·D operations a survivor. Traffic: the packed codebook streams past each
// block of rows, which waits in cache.

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

template <class C>
inline void insert_lanes(C* greatest, int64_t count, Vec<C> values) {
  unsigned bits = lane_bits(values > greatest[count - 1]);
  if (count == 1 && bits != 0) {
    greatest[0] = largest_lane<C>(values > greatest[0] ? values : greatest[0] - Vec<C>{});
    return;
  }
  for (; bits != 0; bits &= bits - 1) insert(greatest, count, values[__builtin_ctz(bits)]);
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

// after rescore
#include "codebook/repetitions.inl"
// after insert_lanes
#include "codebook/shortlist.inl"

// The scratch of one thread.
template <class T>
struct BlockSearch {
  using C = Compute<T>;
  using Lane = decltype(+Mask<C>{}[0]);
  static constexpr int size = lanes<C>;
  static constexpr int64_t max_rows = 96;
  static constexpr int64_t max_slabs = 8192 / slab_codes<C>;  // at once: their maxima stay in L2
  static constexpr int64_t slabs_per_span = 64 / size;

  const CodeGroups<T>& groups;
  const Panels<C>& panels;
  const int64_t best;
  const int64_t slabs_at_once = panels.slabs < max_slabs ? panels.slabs : max_slabs;
  const bool moves = panels.center.moves_rows(), copies = panels.coarse || moves;
  const bool settles = panels.coarse && best == 1;
  // Of vectors that are short, rescoring a few more takes no longer than finding out which.
  const bool orders = panels.coarse && panels.dim >= 128 && 1 < best && best <= size;
  const int64_t word_stride = panels.words_of((panels.dim + 4 * size - 1) / (4 * size) * (4 * size));
  Buffer<C> words;         // [max_rows, word_stride]: the rows as the screen takes them, where it does not as they are
  Buffer<C> moved;         // a tile of rows
  Buffer<C> maxima;        // [max_rows, slabs_at_once, lanes]
  Buffer<int64_t> queue;   // groups of a row
  Buffer<C> greatest;      // [best]: lower bounds
  Buffer<double> row;      // one row in float64
  Buffer<double> scratch;  // scores, for a caller that does not want them
  Repetitions<T> repetitions;
  Shortlist<T> shortlist;
  RowBound<C> bounds[max_rows];
  DirectBound<C> whole_bounds[max_rows];
  double shifts[max_rows];          // what is screened is this much more, at least, than half of -|x - c|² or the score
  int64_t leaders[max_rows];        // groups
  C bars[max_rows];                 // as screened, the best codes of a row are not worse
  C units[max_rows / tile_height];  // of tiles

  BlockSearch(const PackedCodes<T>& codes, int64_t best_)
      : groups(codes.groups),
        panels(codes.panels),
        best(best_),
        words(copies ? max_rows * word_stride : 0),
        moved(moves ? tile_height * panels.dim : 0),
        maxima(max_rows * slabs_at_once * size),
        queue(slabs_at_once * size),
        greatest(best),
        row(panels.dim),
        scratch(max_rows * best),
        repetitions(groups),
        shortlist(groups, slabs_at_once * size, best) {}

  // Row i begins at rows + i · stride, i < count <= max_rows. indices and scores (or null): [count, best], best first.
  // Scores are -|x - c|², x·c / |c| or x·c in float64; one that is not a number comes last.
  template <class Visitor = const NoVisitor>
  void search(const C* rows, int64_t stride, int64_t count, int64_t* indices, double* scores, Visitor&& visitor = {}) {
    search_slabs(0, panels.slabs, rows, stride, count, indices, scores, visitor);
  }

  // The same among the codes of some slabs alone, begin being a multiple of slabs_per_span.
  template <class Visitor = const NoVisitor>
  void search_slabs(int64_t begin, int64_t end, const C* rows, int64_t stride, int64_t count, int64_t* indices,
                    double* scores, Visitor&& visitor = {}) {
#if defined(ISTHMUS_TILES)
    const TileSession session;
#endif
    const bool index_alone = scores == nullptr && best == 1 && end - begin <= slabs_at_once;
    if (scores == nullptr) scores = scratch.data;
    for (int64_t r = 0; r < count; r += tile_height) {
      prepare_tile(r, count - r < tile_height ? count - r : tile_height, rows, stride);
    }
    visitor.expect(rows, stride, count, bounds);
    for (int64_t r = 0; r < count; ++r) BestCodes{scores + r * best, indices + r * best, best}.clear();
    for (int64_t r = 0; r < count; ++r) bars[r] = -static_cast<C>(__builtin_inf());
    for (int64_t slab = begin; slab < end; slab += slabs_at_once) {
      const int64_t slabs = end - slab < slabs_at_once ? end - slab : slabs_at_once;
      for (int64_t s = 0; s < slabs; ++s) {
        panels.meet(slab + s, copies ? words.data : rows, copies ? word_stride : stride, count, units,
                    maxima.data + s * size, slabs_at_once * size, visitor);
      }
      for (int64_t r = 0; r < count; ++r) find_leader(r, slab, slabs);
      for (int64_t r = 0; r < count; ++r) {
        const BestCodes of_row{scores + r * best, indices + r * best, best};
        if (settles) {
          settle(r, rows + r * stride, slab, slabs, of_row, index_alone);
        } else {
          rescore(r, rows + r * stride, slab, slabs, of_row);
        }
      }
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
      whole_bounds[first + i] = DirectBound<C>(panels.metric, squares[i], panels.dim);
      shifts[first + i] = shift_of(rows + (first + i) * stride, squares[i]);
    }
  }

  // With the center m, (x - m)·(c - m) - |c - m|²/2 = |x - m|²/2 - |x - c|²/2, and x·(c - m) = x·c - x·m.
  double shift_of(const C* x, double square) const {
    const double rounding = roundings(panels.dim) * 0x1p-53;
    if (panels.metric == Metric::euclidean) return square * (0.5 - rounding - (moves ? 2 * rounding_unit<C> : 0));
    double product = 0;
    for (int64_t k = 0; panels.center.helps && k < panels.dim; ++k) {
      product += static_cast<double>(x[k]) * static_cast<double>(panels.center.mean.data[k]);
    }
    return -product - __builtin_sqrt(square) * panels.center.taken * rounding;
  }

  ISTHMUS_INLINE Vec<C> maximum(int64_t r, int64_t s) const {
    return load(maxima.data + (r * slabs_at_once + s) * size);
  }

  C score_of(int64_t r, int64_t slab, int64_t group) const {
    return maxima.data[r * slabs_at_once * size + group - slab * size];
  }

  void raise_bar(int64_t r, C bar) {
    if (bar > bars[r]) bars[r] = bar;
  }

  // The group with the largest maximum, and for several codes a bar.
  void find_leader(int64_t r, int64_t slab, int64_t slabs) {
    Vec<C> top = Vec<C>{} - C(__builtin_inf());
    Mask<C> place = {};
    for (int64_t s = 0; s < slabs; ++s) {
      const Vec<C> here = maximum(r, s);
      const Mask<C> larger = here > top;
      top = larger ? here : top;
      place = larger ? Mask<C>{} + static_cast<Lane>(s) : place;
    }
    const int lane = __builtin_ctz(lane_bits(top == largest_lane<C>(top)));
    leaders[r] = (slab + place[lane]) * size + lane;
    if (best > 1 && best <= size) raise_bar(r, ranked_lower_bound(r, slab, slabs));
  }

  // Of the best-th best code.
  C ranked_lower_bound(int64_t r, int64_t slab, int64_t slabs) const {
    Vec<C> top = Vec<C>{} - C(__builtin_inf());
    for (int64_t s = 0; s < slabs; ++s) {
      top = greater(maximum(r, s) - panels.bounds.of_span(bounds[r], (slab + s) / slabs_per_span), top);
    }
    return ranked_lane<C>(top, best);
  }

  // The groups but for the leader that the bar leaves, which meets(group) may raise.
  template <class F>
  void for_each_survivor(int64_t r, int64_t slab, int64_t slabs, const F& meets) {
    int64_t found = find_survivors(r, slab, slabs);
    if (found > 16 + groups.groups / 16 && !repetitions.known) {
      repetitions.find(best);
      found = find_survivors(r, slab, slabs);
    }
    if (best > 1) raise_bar(r, lower_bound(r, slab, found));
    for (int64_t i = 0; i < found; ++i) {
      if (orders && i < best) bring_forward(i, found, r, slab);
      const int64_t group = queue.data[i];
      if (!(score_of(r, slab, group) + panels.bounds.upper(bounds[r], group) < bars[r])) meets(group);
    }
  }

  // The survivor with the largest score takes this place in the queue.
  void bring_forward(int64_t place, int64_t found, int64_t r, int64_t slab) const {
    int64_t top = place;
    for (int64_t i = place + 1; i < found; ++i) {
      if (score_of(r, slab, queue.data[i]) > score_of(r, slab, queue.data[top])) top = i;
    }
    const int64_t moved = queue.data[top];
    queue.data[top] = queue.data[place];
    queue.data[place] = moved;
  }

  // Of the best-th best code: each group has one, at least, that is as good as its own lower bound.
  C lower_bound(int64_t r, int64_t slab, int64_t found) const {
    for (int64_t i = 0; i < best; ++i) greatest.data[i] = -static_cast<C>(__builtin_inf());
    const auto meet = [&](int64_t group) {
      insert(greatest.data, best, score_of(r, slab, group) - panels.bounds.lower(bounds[r], group));
    };
    meet(leaders[r]);
    for (int64_t i = 0; i < found; ++i) meet(queue.data[i]);
    return greatest.data[best - 1];
  }

  // One comparison for each vector of maxima, with the widest bound of 64 groups. Written so that whatever is not a
  // number is left.
  int64_t find_survivors(int64_t r, int64_t slab, int64_t slabs) {
    int64_t found = 0;
    for (int64_t s = 0; s < slabs; s += slabs_per_span) {
      const int64_t span = (slab + s) / slabs_per_span;
      const C low = bars[r] - panels.bounds.of_span(bounds[r], span);
      uint64_t dropped = 0;
      for (int64_t i = s; i < s + slabs_per_span && i < slabs; ++i) {
        dropped |= static_cast<uint64_t>(lane_bits(maximum(r, i) < low)) << ((i - s) * size);
      }
      const int64_t first = span * 64, left = groups.groups - first;  // fewer than lanes in the last slab
      const uint64_t present = left < 64 ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
      for (uint64_t bits = present & repetitions.novel.data[span] & ~dropped; bits != 0; bits &= bits - 1) {
        const int64_t group = first + __builtin_ctzll(bits);
        queue.data[found] = group;
        found += group != leaders[r];
      }
    }
    return found;
  }

  // After a coarse screen: the bar rises with every group that is looked at more closely. index_alone: no score is
  // wanted, so that float64 may not be needed.
  void settle(int64_t r, const C* x, int64_t slab, int64_t slabs, const BestCodes& codes, bool index_alone) {
    shortlist.begin(x, whole_bounds[r]);
    const auto meet = [&](int64_t group) {
      shortlist.meet(group);
      raise_bar(r, as_screened(r, static_cast<double>(shortlist.bar())));
    };
    meet(leaders[r]);
    for_each_survivor(r, slab, slabs, meet);
    const int64_t winner = index_alone ? shortlist.winner() : BestCodes::nobody;
    if (winner != BestCodes::nobody) {
      codes.indices[0] = winner;
      return;
    }
    copy_double(x, panels.dim, row.data);
    for (int64_t i = 0; i < shortlist.count; ++i) {
      if (shortlist.contenders(i) != 0) groups.rescore(row.data, shortlist.groups.data[i], codes);
    }
  }

  // A bar for scores as one for what is screened, rounded down.
  C as_screened(int64_t r, double bar) const {
    const double part = panels.metric == Metric::euclidean ? 0.5 : 1, screened = part * bar + shifts[r];
    return static_cast<C>(screened - 4 * rounding_unit<C> * __builtin_fabs(screened));
  }

  // Where several codes are wanted or a fine screen left little but the leader.
  void rescore(int64_t r, const C* x, int64_t slab, int64_t slabs, const BestCodes& codes) {
    const int64_t leader = leaders[r];
    if (best == 1) raise_bar(r, score_of(r, slab, leader) - panels.bounds.lower(bounds[r], leader));
    copy_double(x, panels.dim, row.data);
    const auto meet = [&](int64_t group) {
      groups.rescore(row.data, group, codes);
      if (orders) raise_bar(r, as_screened(r, codes.scores[best - 1]));
    };
    meet(leader);
    for_each_survivor(r, slab, slabs, meet);
  }
};
