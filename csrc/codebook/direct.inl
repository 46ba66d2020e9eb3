// Included by cpu.inl of codebook and residual: the best codes of few rows, for whom packing a codebook takes longer
// than reading it once as it lies.
//
//     screen    s~ = -|x - c|², x·c / |c| or x·c and its error bound E (bound.inl) in the compute type, a vector of
//               codes at a time; s~ + E is kept, and the best s~ - E of every chunk of codes
//     survive   a code whose s~ + E is below the best s~ - E cannot be the best
//     rescore   the groups of eight that hold a survivor, packed one at a time, in float64 (rescore.inl)
//
// Traffic: the codebook once, rows · codes numbers written and read once.

// Half of the lanes of two vectors that hold parts of Count sums each; the other half, added, leaves parts of 2 Count.
// In the order of instructions that are cheap: first within 16 bytes, then whole 16 bytes.
template <class C, int Count, bool Second>
ISTHMUS_INLINE Vec<C> half_of_parts(Vec<C> a, Vec<C> b) {
  constexpr int quad = 16 / int(sizeof(C)), size = lanes<C>;
  Mask<C> place;
  for (int i = 0; i < size; ++i) {
    if (Count < quad) {
      const int part = i % quad / Count, base = i / quad * quad;
      const int from = part / 2 + (Second ? quad / Count / 2 : 0);
      place[i] = base + from * Count + i % Count + (part % 2) * size;
    } else {
      constexpr int quads = size / quad, of_each = quads * quad / Count, kept = of_each / 2 > 0 ? of_each / 2 : 1;
      const int lane = i / quad, sum = lane / kept, of_vector = quads / of_each;
      const int from = sum % of_vector * of_each + lane % kept + (Second ? kept : 0);
      place[i] = from * quad + i % quad + sum / of_vector * size;
    }
  }
  return __builtin_shuffle(a, b, place);
}

// Sum over the lanes of vector i in lane i.
template <class C, int Count = 1>
ISTHMUS_INLINE Vec<C> sum_each(Vec<C> (&vectors)[lanes<C> / Count]) {
  constexpr int half = lanes<C> / Count / 2;
  Vec<C> folded[half];
#pragma GCC unroll 16
  for (int i = 0; i < half; ++i) {
    const Vec<C> a = vectors[2 * i], b = vectors[2 * i + 1];
    folded[i] = half_of_parts<C, Count, false>(a, b) + half_of_parts<C, Count, true>(a, b);
  }
  if constexpr (half == 1) {
    return folded[0];
  } else {
    return sum_each<C, 2 * Count>(folded);
  }
}

template <class T>
struct DirectSearch {
  using C = Compute<T>;
  static constexpr int size = lanes<C>;
  static constexpr int64_t chunk_codes = 256, max_rows = 24, max_best = 16;

  const GroupScorer scorer;
  const T* codebook;
  const int64_t codes, best;
  const int64_t chunks = (codes + chunk_codes - 1) / chunk_codes;
  const int64_t dim = scorer.dim, depth = (dim + size - 1) / size * size;

  DirectSearch(Metric metric, const T* codebook_, int64_t codes_, int64_t dim_, int64_t best_)
      : scorer{metric, dim_}, codebook(codebook_), codes(codes_), best(best_) {}

  // A score costs more here, by its sum over lanes, the more so the shorter vectors are. Measured at every level.
  static bool suits(int64_t rows, int64_t dim, int64_t best) {
    return rows <= 2 + dim / 8 && rows <= max_rows && best <= max_best;
  }

  // The rows, and what becomes of them.
  struct Batch {
    const int64_t count;
    Buffer<C> rows;                 // [count, depth], zeros behind dim
    Buffer<double> doubles;         // [count, dim]
    Buffer<DirectBound<C>> bounds;  // [count]
    Buffer<C> uppers;               // [chunks, count, chunk_codes]: s~ + E
    Buffer<C> bars;                 // [chunks, count, best]: the greatest s~ - E, greatest first

    Batch(const DirectSearch& search, const C* x, int64_t stride, int64_t count_)
        : count(count_),
          rows(count * search.depth),
          doubles(count * search.dim),
          bounds(count),
          uppers(search.chunks * count * chunk_codes),
          bars(search.chunks * count * search.best) {
      for (int64_t r = 0; r < count; ++r, x += stride) {
        for (int64_t k = 0; k < search.dim; k += size) {
          store(rows.data + r * search.depth + k, load_first(x + k, search.dim - k));
        }
        copy_double(x, search.dim, doubles.data + r * search.dim);
        bounds.data[r] = DirectBound<C>(search.scorer.metric, squared_length(x, search.dim), search.dim);
      }
    }
  };

  // As BlockSearch::search, but by all threads: to be called outside parallel_for.
  void search(const C* x, int64_t stride, int64_t count, int64_t* indices, double* scores) const {
    const Batch batch(*this, x, stride, count);
    constexpr int64_t steps_per_element = 8;  // of a vector, in cache
    parallel_for(chunks, grain_of(chunk_codes * dim * (1 + count / 4) / steps_per_element),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t chunk = begin; chunk < end; ++chunk) screen(batch, chunk);
                 });
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      for (int64_t i = 0; i < count * best; ++i) {
        insert(batch.bars.data + i / best * best, best, batch.bars.data[chunk * count * best + i]);
      }
    }
    rescore(batch, indices, scores);
  }

  void screen(const Batch& batch, int64_t chunk) const {
    C* bars = batch.bars.data + chunk * batch.count * best;
    for (int64_t i = 0; i < batch.count * best; ++i) bars[i] = -static_cast<C>(__builtin_inf());
    const int64_t first = chunk * chunk_codes, left = codes - first;
    for (int64_t i = 0; i < chunk_codes && i < left; i += size) {
      const int64_t present = left - i < size ? left - i : size;
      for (int64_t r = 0; r < batch.count;) {
        if (batch.count - r >= 4) {
          r += screen_tile<4>(batch, chunk, r, i, present);
        } else if (batch.count - r >= 2) {
          r += screen_tile<2>(batch, chunk, r, i, present);
        } else {
          r += screen_tile<1>(batch, chunk, r, i, present);
        }
      }
    }
  }

  // Some rows and a vector of codes, i being the place of its first in the chunk.
  template <int Rows>
  int64_t screen_tile(const Batch& batch, int64_t chunk, int64_t row, int64_t i, int64_t present) const {
    Vec<C> sums[Rows][size], squares[size];
    const T* first = codebook + (chunk * chunk_codes + i) * dim;
    if (scorer.metric == Metric::euclidean) {
      add_products<true>(first, present, batch.rows.data + row * depth, sums, squares);
    } else {
      add_products<false>(first, present, batch.rows.data + row * depth, sums, squares);
    }
    const Vec<C> square = scorer.metric == Metric::euclidean ? Vec<C>{} : sum_each<C>(squares);
    const Mask<C> there = first_lanes<C>(present);
    for (int r = 0; r < Rows; ++r) {
      Vec<C> score, error;
      batch.bounds.data[row + r].judge(sum_each<C>(sums[r]), square, score, error);
      const Vec<C> lower = there ? score - error : Vec<C>{} - C(__builtin_inf());
      const int64_t place = chunk * batch.count + row + r;
      store(batch.uppers.data + place * chunk_codes + i, score + error);
      insert_lanes(batch.bars.data + place * best, best, lower);
    }
    return Rows;
  }

  // Lanes of (x - c)² or x·c, and of c², several codes at a time.
  template <bool Euclidean, int Rows>
  ISTHMUS_NOINLINE void add_products(const T* first, int64_t present, const C* rows, Vec<C> (&sums)[Rows][size],
                                     Vec<C> (&squares)[size]) const {
    constexpr int width = Rows == 4 || size < 4 ? 2 : 4;
    for (int j = 0; j < size; j += width) {
      const T* codes[width];
      Vec<C> sum[width][Rows] = {}, square[width] = {};
      for (int i = 0; i < width; ++i) codes[i] = first + (j + i < present ? j + i : 0) * dim;
      const auto step = [&](int64_t k, const auto& load_code) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int i = 0; i < width; ++i) {
          const Vec<C> c = load_code(codes[i] + k);
          if constexpr (!Euclidean) square[i] += c * c;
#pragma GCC unroll 4
          for (int r = 0; r < Rows; ++r) {
            const Vec<C> x = load(rows + r * depth + k);
            if constexpr (Euclidean) {
              sum[i][r] += (x - c) * (x - c);
            } else {
              sum[i][r] += x * c;
            }
          }
        }
      };
      int64_t k = 0;
      for (; k + size <= dim; k += size) step(k, [](const T* p) { return load(p); });
      if (k < dim) step(k, [&](const T* p) { return load_first(p, dim - k); });
#pragma GCC unroll 4
      for (int i = 0; i < width; ++i) {
        if constexpr (!Euclidean) squares[j + i] = square[i];
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) sums[r][j + i] = sum[i][r];
      }
    }
  }

  void rescore(const Batch& batch, int64_t* indices, double* scores) const {
    // Whole groups and whole vectors: at most two of one, or of the other.
    constexpr int64_t unit = size > group_codes ? size : group_codes;
    const Buffer<C> group(group_codes * dim);
    double lengths[group_codes];
    unsigned alive[max_rows];
    for (int64_t r = 0; r < batch.count; ++r) best_of(r, indices, scores).clear();
    for (int64_t first = 0; first < codes; first += unit) {
      unsigned any = 0;
      for (int64_t r = 0; r < batch.count; ++r) any |= alive[r] = survivors<unit>(batch, r, first);
      for (int64_t code = first; any != 0; code += group_codes, any >>= group_codes) {
        constexpr unsigned of_group = (1u << group_codes) - 1;
        if ((any & of_group) == 0) continue;
        scorer.pack(codebook + code * dim, codes - code, group.data, lengths);
        for (int64_t r = 0; r < batch.count; ++r) {
          if ((alive[r] >> (code - first) & of_group) == 0) continue;
          scorer.meet(batch.doubles.data + r * dim, group.data, lengths, code, codes - code,
                      best_of(r, indices, scores));
        }
      }
    }
  }

  BestCodes best_of(int64_t row, int64_t* indices, double* scores) const {
    return {scores + row * best, indices + row * best, best};
  }

  // One bit for each of `Count` codes; whatever is not a number survives.
  template <int64_t Count>
  ISTHMUS_INLINE unsigned survivors(const Batch& batch, int64_t row, int64_t first) const {
    const int64_t place = first / chunk_codes * batch.count + row;
    const C* upper = batch.uppers.data + place * chunk_codes + first % chunk_codes;
    const C bar = batch.bars.data[row * best + best - 1];
    unsigned bits = 0;
    for (int64_t i = 0; i < Count; i += size) bits |= lane_bits(~(load(upper + i) < bar)) << i;
    return Count < 32 && codes - first < Count ? bits & ((1u << (codes - first)) - 1) : bits;
  }
};
