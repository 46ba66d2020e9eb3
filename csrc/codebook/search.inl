// Included by cpu.inl of codebook and residual: the best codes of rows that are in cache, exactly.
//
//     screen    s~ = x·c - |c|²/2 (x·c of the normalised codes, x·c) in a register tile, of which only the largest of
//               each group of eight codes is kept (screen.inl)
//     survive   |s~ - s| <= E(row, group), proved in docs/numerics.md; a group whose s~ + E is below the best s~ - E of
//               another cannot hold the best code. Mostly one group survives
//     rescore   the survivors in float64 (rescore.inl)
//
// The answer is the exact one, so it does not depend on how rows and codes are cut, nor on the level.
//
// Arithmetic: 2·N·K·D operations at the rate of the FMA ports, a few comparisons for every eight scores, and 8·D
// float64 operations a survivor. Traffic: the packed codebook streams past each block of rows, which waits in cache.

#include "codebook/rescore.inl"

#include "codebook/screen.inl"

// A codebook [codes, dim], packed by all threads: to be made outside parallel_for.
template <class T>
struct PackedCodes {
  const CodeGroups<T> groups;
  const Panels<T> panels;

  PackedCodes(Metric metric, const T* codebook, int64_t codes, int64_t dim)
      : groups(metric, codebook, codes, dim), panels(metric, codebook, codes, dim, groups.lengths.data) {}
};

// The scratch of one thread.
template <class T>
struct BlockSearch {
  using C = Compute<T>;
  static constexpr int size = lanes<C>;
  static constexpr int64_t max_rows = 96;
  static constexpr int64_t slabs_at_once = 4096 / slab_codes<C>;  // their maxima stay in cache

  const CodeGroups<T>& groups;
  const Panels<T>& panels;
  const int64_t best;
  Buffer<C> maxima;        // [max_rows, slabs_at_once, lanes]
  Buffer<C> lower_bounds;  // [max_rows, best]: of the best scores of a row, greatest first
  Buffer<double> row;      // one row in float64
  Buffer<double> scratch;  // scores, for a caller that does not want them
  RowBound<C> bounds[max_rows];

  BlockSearch(const PackedCodes<T>& codes, int64_t best_)
      : groups(codes.groups),
        panels(codes.panels),
        best(best_),
        maxima(max_rows * slabs_at_once * size),
        lower_bounds(max_rows * best),
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
    for (int64_t r = 0; r < count; ++r) {
      bounds[r] = RowBound<C>(rows + r * stride, panels.dim);
      const BestCodes found{scores + r * best, indices + r * best, best};
      found.clear();
      if (bounds[r].not_a_number) meet_nothing(begin * slab_codes<C>, end * slab_codes<C>, found);
      for (int64_t i = 0; i < best; ++i) lower_bounds.data[r * best + i] = -static_cast<C>(__builtin_inf());
    }
    for (int64_t slab = begin; slab < end; slab += slabs_at_once) {
      const int64_t slabs = end - slab < slabs_at_once ? end - slab : slabs_at_once;
      for (int64_t s = 0; s < slabs; ++s) {
        panels.meet(slab + s, rows, stride, count, maxima.data + s * size, slabs_at_once * size);
      }
      for (int64_t r = 0; r < count; ++r) {
        const BestCodes found{scores + r * best, indices + r * best, best};
        if (bounds[r].not_a_number) continue;
        raise_lower_bounds(r, slab, slabs);
        copy_double(rows + r * stride, panels.dim, row.data);
        for (int64_t s = 0; s < slabs; ++s) {
          for (unsigned bits = survivors(r, slab + s, s); bits != 0; bits &= bits - 1) {
            rescore((slab + s) * size + __builtin_ctz(bits), found);
          }
        }
      }
    }
  }

  // Of a row without scores.
  void meet_nothing(int64_t first, int64_t end, const BestCodes& found) const {
    for (int64_t c = first; c < end && c < groups.codes && c < first + best; ++c) found.meet(__builtin_nan(""), c);
  }

  ISTHMUS_INLINE Vec<C> maximum(int64_t r, int64_t s) const {
    return load(maxima.data + (r * slabs_at_once + s) * size);
  }

  ISTHMUS_INLINE Vec<C> bound(int64_t r, int64_t slab, const Buffer<C>& base) const {
    return bounds[r].slope * load(panels.norms.data + slab * size) + load(base.data + slab * size) + bounds[r].absolute;
  }

  // Each group has one code, at least, that is as good as its maximum less the bound.
  void raise_lower_bounds(int64_t r, int64_t slab, int64_t slabs) {
    C* bar = lower_bounds.data + r * best;
    for (int64_t s = 0; s < slabs; ++s) {
      const Vec<C> lower = maximum(r, s) - bound(r, slab + s, panels.floors);
      for (unsigned bits = lane_bits(lower > bar[best - 1]); bits != 0; bits &= bits - 1) {
        const C value = lower[__builtin_ctz(bits)];
        if (!(value > bar[best - 1])) continue;
        int64_t place = best - 1;
        for (; place > 0 && value > bar[place - 1]; --place) bar[place] = bar[place - 1];
        bar[place] = value;
      }
    }
  }

  // Written so that whatever is not a number survives.
  ISTHMUS_INLINE unsigned survivors(int64_t r, int64_t slab, int64_t s) const {
    if (bounds[r].wild) return (1u << size) - 1;
    const Vec<C> upper = maximum(r, s) + bound(r, slab, panels.ceilings);
    return lane_bits(~(upper < lower_bounds.data[r * best + best - 1]));
  }

  void rescore(int64_t group, const BestCodes& found) const {
    double scores[group_codes];
    groups.score(row.data, group, scores);
    const int64_t first = group * group_codes, left = groups.codes - first;
    for (int64_t j = 0; j < group_codes && j < left; ++j) found.meet(scores[j], first + j);
  }
};
