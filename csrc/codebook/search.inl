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
// Arithmetic: 2·N·K·D operations at the rate of the FMA ports or, coarse, at twice that; a few comparisons for every
// eight scores; 8·D float64 operations a survivor. Traffic: the packed codebook streams past each block of rows, which
// waits in cache.

#include "codebook/bound.inl"
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

  PackedCodes(Metric metric, const T* codebook, int64_t codes, int64_t dim)
      : groups(metric, codebook, codes, dim),
        panels(metric, has_coarse_words && sizeof(C) == 4 && dim >= least_coarse_dim, codebook, codes, dim,
               groups.lengths.data) {}
};

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
  static constexpr int64_t slabs_per_word = 64 / size;

  const CodeGroups<T>& groups;
  const Panels<C>& panels;
  const int64_t best;
  const int64_t slabs_at_once = panels.slabs < max_slabs ? panels.slabs : max_slabs;
  const int64_t word_stride = (panels.dim + 2 * size - 1) / (2 * size) * size;
  Buffer<C> words;         // [max_rows, word_stride]: the rows of a coarse screen
  Buffer<C> maxima;        // [max_rows, slabs_at_once, lanes]
  Buffer<C> bars;          // [max_rows, best]: the best codes of a row are at least as good, greatest first
  Buffer<uint32_t> queue;  // of survivors: row and group
  Buffer<double> row;      // one row in float64
  Buffer<double> scratch;  // scores, for a caller that does not want them
  RowBound<C> bounds[max_rows];

  BlockSearch(const PackedCodes<T>& codes, int64_t best_)
      : groups(codes.groups),
        panels(codes.panels),
        best(best_),
        words(panels.coarse ? max_rows * word_stride : 0),
        maxima(max_rows * slabs_at_once * size),
        bars(max_rows * best),
        queue(max_rows * slabs_at_once * size),
        row(panels.dim),
        scratch(max_rows * best) {}

  // Row i begins at rows + i · stride, i < count <= max_rows. indices and scores (or null): [count, best], best first.
  // Scores are -|x - c|², x·c / |c| or x·c in float64; one that is not a number comes last.
  void search(const C* rows, int64_t stride, int64_t count, int64_t* indices, double* scores) {
    search_slabs(0, panels.slabs, rows, stride, count, indices, scores == nullptr ? scratch.data : scores);
  }

  // The same among the codes of some slabs alone.
  void search_slabs(int64_t begin, int64_t end, const C* rows, int64_t stride, int64_t count, int64_t* indices,
                    double* scores) {
#if defined(ISTHMUS_TILES)
    const TileSession session;
#endif
    for (int64_t r = 0; r < count; ++r) prepare(r, rows + r * stride, {scores + r * best, indices + r * best, best});
    for (int64_t slab = begin; slab < end; slab += slabs_at_once) {
      const int64_t slabs = end - slab < slabs_at_once ? end - slab : slabs_at_once;
      for (int64_t s = 0; s < slabs; ++s) {
        C* place = maxima.data + s * size;
        if (panels.coarse) {
          panels.meet(slab + s, words.data, word_stride, count, place, slabs_at_once * size);
        } else {
          panels.meet(slab + s, rows, stride, count, place, slabs_at_once * size);
        }
      }
      const int64_t found =
          panels.coarse ? find_survivors<true>(slab, slabs, count) : find_survivors<false>(slab, slabs, count);
      rescore(slab * size, found, rows, stride, indices, scores);
    }
  }

  void prepare(int64_t r, const C* x, const BestCodes& found) {
    double lost = 0;
    if constexpr (sizeof(C) == 4) {
      if (panels.coarse) lost = write_words(x, panels.dim, words.data + r * word_stride);
    }
    bounds[r] = RowBound<C>(squared_length(x, panels.dim), lost, panels.coarse, panels.dim);
    found.clear();
    for (int64_t i = 0; i < best; ++i) bars.data[r * best + i] = -static_cast<C>(__builtin_inf());
  }

  template <bool Coarse>
  int64_t find_survivors(int64_t slab, int64_t slabs, int64_t count) {
    int64_t found = 0;
    for (int64_t r = 0; r < count; ++r) {
      raise_bars<Coarse>(r, slab, slabs);
      for (int64_t s = 0; s < slabs; s += slabs_per_word) {
        uint64_t bits = 0;
        for (int64_t i = s; i < s + slabs_per_word && i < slabs; ++i) {
          bits |= static_cast<uint64_t>(survivors<Coarse>(r, slab + i, i)) << ((i - s) * size);
        }
        const int64_t groups_left = groups.groups - (slab + s) * size;  // fewer than the lanes of the last slab
        if (groups_left < 64) bits &= (uint64_t{1} << groups_left) - 1;
        for (; bits != 0; bits &= bits - 1) {
          const int64_t group = s * size + __builtin_ctzll(bits);
          queue.data[found++] = static_cast<uint32_t>(r << 16 | group);
          __builtin_prefetch(groups.group(slab * size + group));
        }
      }
    }
    return found;
  }

  template <bool Coarse>
  ISTHMUS_INLINE Vec<C> bound(int64_t r, int64_t slab, const C* base) const {
    const GroupBounds<C>& group = panels.bounds;
    Vec<C> sum = bounds[r].slope * load(group.norms.data + slab * size) + load(base + slab * size);
    if constexpr (Coarse) sum += bounds[r].length * load(group.losses.data + slab * size);
    return sum + bounds[r].absolute;
  }

  ISTHMUS_INLINE Vec<C> maximum(int64_t r, int64_t s) const {
    return load(maxima.data + (r * slabs_at_once + s) * size);
  }

  // Each group has one code, at least, that is as good as its maximum less the bound.
  template <bool Coarse>
  ISTHMUS_INLINE Vec<C> lower(int64_t r, int64_t slab, int64_t s) const {
    return maximum(r, s) - bound<Coarse>(r, slab, panels.bounds.floors.data);
  }

  template <bool Coarse>
  ISTHMUS_INLINE void raise_bars(int64_t r, int64_t slab, int64_t slabs) {
    C* bar = bars.data + r * best;
    Vec<C> top = Vec<C>{} - C(__builtin_inf());
    for (int64_t s = 0; s < slabs; ++s) top = greater(lower<Coarse>(r, slab + s, s), top);
    if (best == 1) {
      const C highest = largest_lane<C>(top);
      if (highest > bar[0]) bar[0] = highest;
      return;
    }
    // Of the largest in each lane, the best-th is reached by `best` groups: less than that need not be looked at.
    const C start = best <= size ? ranked_lane<C>(top, best) : -C(__builtin_inf());
    for (int64_t s = 0; s < slabs; ++s) {
      const Vec<C> value = lower<Coarse>(r, slab + s, s);
      for (unsigned bits = lane_bits((value >= start) & (value > bar[best - 1])); bits != 0; bits &= bits - 1) {
        insert(bar, value[__builtin_ctz(bits)]);
      }
    }
  }

  void insert(C* bar, C value) const {
    if (!(value > bar[best - 1])) return;
    int64_t place = best - 1;
    for (; place > 0 && value > bar[place - 1]; --place) bar[place] = bar[place - 1];
    bar[place] = value;
  }

  // Written so that whatever is not a number survives.
  template <bool Coarse>
  ISTHMUS_INLINE unsigned survivors(int64_t r, int64_t slab, int64_t s) const {
    const Vec<C> upper = maximum(r, s) + bound<Coarse>(r, slab, panels.bounds.ceilings.data);
    return lane_bits(~(upper < bars.data[r * best + best - 1]));
  }

  void rescore(int64_t first_group, int64_t found, const C* rows, int64_t stride, int64_t* indices, double* scores) {
    int64_t copied = -1;
    for (int64_t i = 0; i < found; ++i) {
      const int64_t r = queue.data[i] >> 16, group = first_group + (queue.data[i] & 0xffff);
      if (r != copied) copy_double(rows + r * stride, panels.dim, row.data);
      copied = r;
      groups.rescore(row.data, group, {scores + r * best, indices + r * best, best});
    }
  }
};
