// Included by search.inl: approximate scores of all codes, of which only the largest of each group of eight is kept.
//
// A *slab* is lanes × 8 codes as eight vectors: lane l of vector v holds code 8 l + v of the slab. So the largest score
// of eight neighbours is a maximum of vectors, lane by lane: no indices, one operation for each vector of scores, and
// of the [N, K] scores an eighth is stored, for the rows in cache.
//
// A register tile is 6 rows by 4 vectors at AVX-512: 24 multiply-adds for ten loads. It multiplies *words*: a number of
// the compute type or, in a coarse screen, four bytes or a pair of bfloat16.

#if defined(__AVX512BF16__) || defined(ISTHMUS_TILES)
constexpr bool has_coarse_words = true;
#else
constexpr bool has_coarse_words = false;
#endif
#if defined(__AVX512VNNI__) && !defined(ISTHMUS_TILES)
#define ISTHMUS_QUADS 1
#endif
#if defined(ISTHMUS_TILES)
constexpr int words_at_once = tile_side;
#else
constexpr int words_at_once = 1;
#endif

constexpr int tile_height = 6;
#if defined(__AVX512F__)
constexpr int tile_vectors = 4;  // of 32 registers
#else
constexpr int tile_vectors = 2;  // of 16 registers
#endif

#if defined(ISTHMUS_TILES)
#include "codebook/screen_tiles.inl"
#elif defined(ISTHMUS_QUADS)
#include "codebook/screen_quads.inl"
#endif

// Rounded to bfloat16, in the upper half of the word; for finite numbers.
ISTHMUS_INLINE u32v bfloat_bits(f32v v) {
  const u32v bits = (u32v)v;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
}

// A row as pairs of bfloat16, and zeros up to whole vectors of words. Returns the squared length of what they leave
// out.
inline double write_words(const float* x, int64_t dim, float* words) {
  f32v lost = {};
  for (int64_t k = 0; k < dim; k += 2 * lanes<float>) {
    for (int64_t j = k; j < k + 2 * lanes<float>; j += lanes<float>) {
      const f32v whole = j < dim ? load_first(x + j, dim - j) : f32v{};
      const u32v bits = bfloat_bits(whole);
      const u16h halves = __builtin_convertvector(bits >> 16, u16h);
      std::memcpy(words + j / 2, &halves, sizeof halves);
      const f32v rest = whole - (f32v)bits;
      lost += rest * rest;
    }
  }
  return static_cast<double>(sum_lanes<float>(lost));
}

// sum + x · c, word by word. Coarse words are floats in name only.
template <bool Coarse, class C>
ISTHMUS_INLINE Vec<C> multiply_add(C x, Vec<C> c, Vec<C> sum) {
#if defined(__AVX512BF16__)
  if constexpr (Coarse) {
    return (f32v)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(x), (__m512bh)c);
  }
#endif
  return sum + x * c;
}

// Who else looks at the rows of a block and the scores of its register tiles: nobody. match.inl has another.
struct NoVisitor {
  template <class C>
  void expect(const C*, int64_t, int64_t, const RowBound<C>*) const {}
  ISTHMUS_INLINE const NoVisitor& at(int64_t, int64_t, int) const { return *this; }
  template <int Rows, int Vectors, class Place>
  ISTHMUS_INLINE void meet(const Place&) const {}
};

// The codebook in slabs, with what bounds the error of each group.
template <class C>
struct Panels {
  static constexpr int size = lanes<C>;
  static constexpr int halves = group_codes / tile_vectors;

  const Metric metric;
  const Center<C> center;
  const bool coarse, quads;
  const int64_t codes, dim, slabs;
  const int64_t depth;   // words
  Buffer<C> columns;     // [slabs, halves, depth, tile_vectors, lanes] words
  Buffer<C> offsets;     // [slabs, group_codes, lanes]: -|c|²/2; -inf where there is no code, or a wild one
  Buffer<C> units;       // [slabs, lanes], of quads: of the codes of a group
  Buffer<int32_t> sums;  // [slabs, group_codes, lanes], of quads
  GroupBounds<C> bounds;
  double tame;       // longer codes are wild
  C least_unit = 0;  // of rows, so that no offset overflows

  // lengths: of the codes; only cosine needs them.
  template <class T>
  Panels(Metric metric_, bool coarse_, bool even_rows, const T* codebook, int64_t codes_, int64_t dim_,
         const double* lengths)
      : metric(metric_),
        center(metric, codebook, codes_, dim_, lengths),
        coarse(coarse_),
        quads(coarse && even_rows && suits_quads(codes_)),
        codes(codes_),
        dim(dim_),
        slabs((codes + slab_codes<C> - 1) / slab_codes<C>),
        depth(words_of(dim)),
        columns(slabs * slab_codes<C> * depth),
        offsets(slabs * slab_codes<C>),
        units(quads ? slabs * size : 0),
        sums(quads ? slabs * slab_codes<C> : 0),
        bounds(metric, coarse, dim, slabs),
        tame(quads ? 0x1p24 * center.mean_square : tame_square<C>) {
    parallel_for(slabs, grain_of(slab_codes<C> * dim), [&](int64_t begin, int64_t end) {
      const Buffer<C> scratch(group_codes * scratch_depth() * size);
      for (int64_t s = begin; s < end; ++s) {
        pack(s, codebook + s * slab_codes<C> * dim, lengths + s * slab_codes<C>, scratch.data);
      }
    });
    bounds.find_widest();
    if (quads) find_least_unit();
  }

  // Bytes leave out more than pairs: they pay where there is much to multiply, and no component much longer than
  // others.
  bool suits_quads([[maybe_unused]] int64_t count) const {
#if defined(ISTHMUS_QUADS)
    const double mean_square = center.mean_square;
    return sizeof(C) == 4 && center.dim >= least_quad_dim && center.dim <= most_quad_dim && count >= least_quad_codes &&
           mean_square > 0x1p-60 && mean_square < 0x1p60 &&
           center.largest * center.largest * static_cast<double>(center.dim) < uneven * mean_square;
#else
    return false;
#endif
  }

  int64_t words_of(int64_t numbers) const {
    if (quads) return (numbers + 3) / 4;
    if (coarse) return (numbers + 2 * words_at_once - 1) / (2 * words_at_once) * words_at_once;
    return numbers;
  }

  // Pairs are read up to whole words.
  int64_t scratch_depth() const { return coarse && !quads ? 2 * depth : dim; }

  void find_least_unit() {
    for (int64_t i = 0; i < slabs * slab_codes<C>; ++i) {
      const C offset = -offsets.data[i],
              need = offset / units.data[i / slab_codes<C> * size + i % size] * static_cast<C>(0x1p-29);
      if (offset < static_cast<C>(__builtin_inf()) && need > least_unit) least_unit = need;
    }
  }

  template <class T>
  void pack(int64_t slab, const T* first, const double* lengths, C* scratch) const {
    const int64_t left = codes - slab * slab_codes<C>;
    Vec<C> square[group_codes];
    Mask<C> wild[group_codes];
    Vec<C> top = {};
    for (int v = 0; v < group_codes; ++v) {
      const int64_t found = (left - v + group_codes - 1) / group_codes;
      const int64_t count = found < 0 ? 0 : found < size ? found : size;
      C* column = scratch + v * scratch_depth() * size;
      pack_rows<size>(first + v * dim, group_codes * dim, count, dim, column);
      for (int64_t k = dim; k < scratch_depth(); ++k) store(column + k * size, Vec<C>{});
      if (metric == Metric::cosine) normalize(column, count, lengths + v);
      if (metric != Metric::cosine && center.helps) shift(column);
      square[v] = squares(column);
      const Mask<C> present = first_lanes<C>(count);
      wild[v] = present & ~(square[v] < static_cast<C>(tame));
      const Mask<C> screened = present & ~wild[v];
      if (count < size || any(wild[v])) keep(column, screened);
      const Vec<C> start = metric == Metric::euclidean ? C(-0.5) * square[v] : Vec<C>{};
      store(offsets.data + slab * slab_codes<C> + v * size, screened ? start : Vec<C>{} - C(__builtin_inf()));
      square[v] = screened ? square[v] : Vec<C>{};
      for (int64_t k = 0; quads && k < dim; ++k) top = greater(abs(load(column + k * size)), top);
    }
    if (quads) store(units.data + slab * size, greater(top * (1 / C(127)), Vec<C>{} + static_cast<C>(least_length<C>)));
    GroupNorms<C> norms;
    for (int v = 0; v < group_codes; ++v) {
      C* words = columns.data + ((slab * halves + v / tile_vectors) * depth * tile_vectors + v % tile_vectors) * size;
      norms.meet(square[v], write_column(slab, v, scratch + v * scratch_depth() * size, words), wild[v]);
    }
    bounds.set(slab, norms, quads ? load(units.data + slab * size) * (1 / C(64)) : Vec<C>{});
  }

  Vec<C> squares(const C* column) const {
    Vec<C> sum = {};
    for (int64_t k = 0; k < dim; ++k) {
      const Vec<C> c = load(column + k * size);
      sum += c * c;
    }
    return sum;
  }

  // lengths: of lane l at [8 l]. A code of length zero stays what it is. One rounding, also where the center is taken
  // off.
  void normalize(C* column, int64_t count, const double* lengths) const {
    for (int64_t k = 0; k < dim; ++k) {
      C* c = column + k * size;
      const double off = static_cast<double>(center.mean.data[k]);
      for (int l = 0; l < count; ++l) {
        const double length = lengths[group_codes * l];
        c[l] = static_cast<C>(static_cast<double>(c[l]) / (length == 0 ? 1 : length) - off);
      }
    }
  }

  void shift(C* column) const {
    for (int64_t k = 0; k < dim; ++k) store(column + k * size, load(column + k * size) - center.mean.data[k]);
  }

  void keep(C* column, Mask<C> screened) const {
    for (int64_t k = 0; k < dim; ++k) store(column + k * size, screened ? load(column + k * size) : Vec<C>{});
  }

  // Returns the squared lengths of what the words leave out.
  Vec<C> write_column([[maybe_unused]] int64_t slab, [[maybe_unused]] int v, const C* column, C* words) const {
#if defined(ISTHMUS_QUADS)
    if constexpr (sizeof(C) == 4) {
      if (quads) {
        return write_quads(column, dim, load(units.data + slab * size), words, tile_vectors * size,
                           sums.data + slab * slab_codes<C> + v * size);
      }
    }
#endif
    return write_pairs(column, words);
  }

  Vec<C> write_pairs(const C* column, C* words) const {
    Vec<C> lost = {};
    for (int64_t j = 0; j < depth; ++j, words += tile_vectors * size) {
      if constexpr (has_coarse_words && sizeof(C) == 4) {
        if (coarse) {
          const f32v even = load(column + 2 * j * size), odd = load(column + (2 * j + 1) * size);
          const u32v low = bfloat_bits(even), high = bfloat_bits(odd);
          const f32v even_lost = even - (f32v)low, odd_lost = odd - (f32v)high;
          lost += even_lost * even_lost + odd_lost * odd_lost;
          store(words, (f32v)((low >> 16) | high));
          continue;
        }
      }
      store(words, load(column + j * size));
    }
    return lost;
  }

  // The unit of a tile of rows whose largest component this is.
  C unit_of(C largest) const {
    const C unit = largest / 127, least = static_cast<C>(least_length<C>);
    const C wanted = unit > least_unit ? unit : least_unit;
    return wanted > least ? wanted : least;
  }

  // A row as words; returns the squared length of what they leave out.
  double write_row(const C* x, [[maybe_unused]] C unit, C* words) const {
#if defined(ISTHMUS_QUADS)
    if constexpr (sizeof(C) == 4) {
      if (quads) return write_bytes(x, dim, unit, words);
    }
#endif
    if constexpr (sizeof(C) == 4) return write_words(x, dim, words);
    return 0;
  }

  // maxima[row · step + l] = the largest score of group l of the slab, for `count` rows of words. row_units: of tiles.
  // Of the tile that begins at `row` and `vector`, visitor.at(row, slab, vector) meets f(r, v, gain, shift) = gain ·
  // score + shift.
  template <class Visitor = const NoVisitor>
  void meet(int64_t slab, const C* rows, int64_t stride, int64_t count, [[maybe_unused]] const C* row_units, C* maxima,
            int64_t step, Visitor&& visitor = {}) const {
#if defined(ISTHMUS_QUADS)
    if constexpr (sizeof(C) == 4) {
      if (quads) {
        return for_each_tile(count, [&]<int Rows, int Half>(int64_t row) {
          const int64_t half = slab * halves + Half;
          meet_quads<Rows, Half == 0>(
              columns.data + half * depth * tile_vectors * size, offsets.data + half * tile_vectors * size,
              sums.data + half * tile_vectors * size, depth, units.data + slab * size, row_units[row / tile_height],
              rows + row * stride, stride, maxima + row * step, step, visitor.at(row, slab, Half * tile_vectors));
        });
      }
    }
#endif
    if constexpr (has_coarse_words && sizeof(C) == 4) {
      if (coarse) return meet_coarse(slab, rows, stride, count, maxima, step, visitor);
    }
    meet_rows<false>(slab, rows, stride, count, maxima, step, visitor);
  }

  template <class Visitor>
  void meet_coarse(int64_t slab, const C* rows, int64_t stride, int64_t count, C* maxima, int64_t step,
                   Visitor& visitor) const {
#if defined(ISTHMUS_TILES)
    meet_slab(columns.data + slab * slab_codes<C> * depth, offsets.data + slab * slab_codes<C>, depth, rows, stride,
              count, maxima, step, [&](int64_t row, int vector) { return visitor.at(row, slab, vector); });
#else
    meet_rows<true>(slab, rows, stride, count, maxima, step, visitor);
#endif
  }

  template <bool Coarse, class Visitor>
  void meet_rows(int64_t slab, const C* rows, int64_t stride, int64_t count, C* maxima, int64_t step,
                 Visitor& visitor) const {
    for_each_tile(count, [&]<int Rows, int Half>(int64_t row) {
      meet_tile<Coarse, Rows, Half == 0>(slab * halves + Half, rows + row * stride, stride, maxima + row * step, step,
                                         visitor.at(row, slab, Half * tile_vectors));
    });
  }

  // All rows meet one part of the slab, which then is in L1, before the next.
  template <int Half = 0, class F>
  static void for_each_tile(int64_t count, const F& f) {
    int64_t row = 0;
    for (; row + tile_height <= count; row += tile_height) f.template operator()<tile_height, Half>(row);
    for (; row + tile_height / 2 <= count; row += tile_height / 2) f.template operator()<tile_height / 2, Half>(row);
    for (; row < count; ++row) f.template operator()<1, Half>(row);
    if constexpr (Half + 1 < halves) for_each_tile<Half + 1>(count, f);
  }

  template <bool Coarse, int Rows, bool First, class View>
  ISTHMUS_NOINLINE void meet_tile(int64_t half, const C* rows, int64_t stride, C* maxima, int64_t step,
                                  const View& view) const {
    const C* offset = offsets.data + half * tile_vectors * size;
    const C* column = columns.data + half * depth * tile_vectors * size;
    const C* x[Rows];
    Vec<C> scores[Rows][tile_vectors];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      x[r] = rows + r * stride;
#pragma GCC unroll 16
      for (int v = 0; v < tile_vectors; ++v) scores[r][v] = load(offset + v * size);
    }
    for (int64_t k = 0; k < depth; ++k, column += tile_vectors * size) {
      Vec<C> c[tile_vectors];
#pragma GCC unroll 16
      for (int v = 0; v < tile_vectors; ++v) c[v] = load(column + v * size);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < tile_vectors; ++v) scores[r][v] = multiply_add<Coarse, C>(x[r][k], c[v], scores[r][v]);
      }
    }
    view.template meet<Rows, tile_vectors>([&](int r, int v, C gain, C shift) { return gain * scores[r][v] + shift; });
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
      for (int v = 1; v < tile_vectors; ++v) scores[r][0] = greater(scores[r][v], scores[r][0]);
      store(maxima + r * step, First ? scores[r][0] : greater(scores[r][0], load(maxima + r * step)));
    }
  }
};
