// Included by search.inl: approximate scores of all codes, of which only the largest of each group of eight is kept.
//
// A *slab* is lanes × 8 codes as eight vectors: lane l of vector v holds code 8 l + v of the slab. So the largest score
// of eight neighbours is a maximum of vectors, lane by lane: no indices, one operation for each vector of scores, and
// of the [N, K] scores an eighth is stored, for the rows in cache.
//
// A register tile is 6 rows by 4 vectors at AVX-512: 24 multiply-adds for ten loads. It multiplies *words*: a number of
// the compute type or, in a coarse screen, a pair of bfloat16.

#if defined(__AVX512BF16__) || defined(ISTHMUS_TILES)
constexpr bool has_coarse_words = true;
#else
constexpr bool has_coarse_words = false;
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

// The codebook in slabs, with what bounds the error of each group.
template <class C>
struct Panels {
  static constexpr int size = lanes<C>;
  static constexpr int halves = group_codes / tile_vectors;

  const Metric metric;
  const bool coarse;
  const int64_t codes, dim, slabs;
  const int64_t depth;  // words
  Buffer<C> columns;    // [slabs, halves, depth, tile_vectors, lanes] words
  Buffer<C> offsets;    // [slabs, group_codes, lanes]: -|c|²/2; -inf where there is no code, or a wild one
  GroupBounds<C> bounds;
  Buffer<C> center;  // [dim]: taken from all codes (of cosine, normalised), which changes no order
  bool centered = false;
  double center_length = 0;  // 0 if it is taken from the rows as well

  // lengths: of the codes; only cosine needs them.
  template <class T>
  Panels(Metric metric_, bool coarse_, const T* codebook, int64_t codes_, int64_t dim_, const double* lengths)
      : metric(metric_),
        coarse(coarse_),
        codes(codes_),
        dim(dim_),
        slabs((codes + slab_codes<C> - 1) / slab_codes<C>),
        depth(coarse ? (dim + 2 * words_at_once - 1) / (2 * words_at_once) * words_at_once : dim),
        columns(slabs * slab_codes<C> * depth),
        offsets(slabs * slab_codes<C>),
        bounds(metric, coarse, dim, slabs),
        center(dim) {
    find_center(codebook, lengths);
    parallel_for(slabs, grain_of(slab_codes<C> * dim), [&](int64_t begin, int64_t end) {
      const Buffer<C> scratch((coarse ? 2 * depth : depth) * size);
      for (int64_t s = begin; s < end; ++s) {
        pack(s, codebook + s * slab_codes<C> * dim, lengths + s * slab_codes<C>, scratch.data);
      }
    });
    bounds.find_widest();
  }

  // The mean of some codes, if they are much shorter without it: then so is the bound. Euclidean distances do not
  // change if the rows lose it too, and the other scores of a row all change by the same x · center.
  template <class T>
  void find_center(const T* codebook, const double* lengths) {
    const int64_t step = (codes + 63) / 64, drawn = (codes + step - 1) / step;
    double squares = 0, square = 0;
    for (int64_t k = 0; k < dim; k += size) {
      Vec<C> sum = {};
      for (int64_t i = 0; i < codes; i += step) {
        Vec<C> c = load_first(codebook + i * dim + k, dim - k);
        if (metric == Metric::cosine) c *= static_cast<C>(lengths[i] > 0 ? 1 / lengths[i] : 0);
        sum += c;
        squares += sum_lanes<C>(c * c);
      }
      sum *= 1 / static_cast<C>(drawn);
      store_first(center.data + k, sum, dim - k);
      square += sum_lanes<C>(sum * sum);
    }
    centered = square > squares / static_cast<double>(drawn) / 4 && square < tame_square<C>;
    center_length = centered && metric != Metric::euclidean ? __builtin_sqrt(square) * (1 + 0x1p-10) : 0;
  }

  bool moves_rows() const { return centered && metric == Metric::euclidean; }

  void move(const C* x, C* moved) const {
    for (int64_t k = 0; k < dim; k += size) {
      store_first(moved + k, load_first(x + k, dim - k) - load_first(center.data + k, dim - k), dim - k);
    }
  }

  template <class T>
  void pack(int64_t slab, const T* first, const double* lengths, C* column) const {
    const int64_t left = codes - slab * slab_codes<C>;
    GroupNorms<C> norms;
    for (int v = 0; v < group_codes; ++v) {
      const int64_t found = (left - v + group_codes - 1) / group_codes;
      const int64_t count = found < 0 ? 0 : found < size ? found : size;
      pack_rows<size>(first + v * dim, group_codes * dim, count, dim, column);
      for (int64_t k = dim; coarse && k < 2 * depth; ++k) store(column + k * size, Vec<C>{});
      if (metric == Metric::cosine) normalize(column, count, lengths + v);
      if (metric != Metric::cosine && centered) shift(column);
      const Vec<C> square = squares(column);
      const Mask<C> present = first_lanes<C>(count), wild = present & ~(square < static_cast<C>(tame_square<C>));
      const Mask<C> screened = present & ~wild;
      if (count < size || any(wild)) keep(column, screened);
      const Vec<C> start = metric == Metric::euclidean ? C(-0.5) * square : Vec<C>{};
      store(offsets.data + slab * slab_codes<C> + v * size, screened ? start : Vec<C>{} - C(__builtin_inf()));
      C* words = columns.data + ((slab * halves + v / tile_vectors) * depth * tile_vectors + v % tile_vectors) * size;
      norms.meet(screened ? square : Vec<C>{}, write_words(column, words), wild);
    }
    bounds.set(slab, norms);
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
      const double off = centered ? static_cast<double>(center.data[k]) : 0;
      for (int l = 0; l < count; ++l) {
        const double length = lengths[group_codes * l];
        c[l] = static_cast<C>(static_cast<double>(c[l]) / (length == 0 ? 1 : length) - off);
      }
    }
  }

  void shift(C* column) const {
    for (int64_t k = 0; k < dim; ++k) store(column + k * size, load(column + k * size) - center.data[k]);
  }

  void keep(C* column, Mask<C> screened) const {
    for (int64_t k = 0; k < dim; ++k) store(column + k * size, screened ? load(column + k * size) : Vec<C>{});
  }

  // Returns the squared lengths of what the words leave out.
  Vec<C> write_words(const C* column, C* words) const {
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

  // maxima[row · step + l] = the largest score of group l of the slab, for `count` rows of words.
  void meet(int64_t slab, const C* rows, int64_t stride, int64_t count, C* maxima, int64_t step) const {
    if constexpr (has_coarse_words && sizeof(C) == 4) {
      if (coarse) return meet_coarse(slab, rows, stride, count, maxima, step);
    }
    meet_rows<false>(slab, rows, stride, count, maxima, step);
  }

  void meet_coarse(int64_t slab, const C* rows, int64_t stride, int64_t count, C* maxima, int64_t step) const {
#if defined(ISTHMUS_TILES)
    meet_slab(columns.data + slab * slab_codes<C> * depth, offsets.data + slab * slab_codes<C>, depth, rows, stride,
              count, maxima, step);
#else
    meet_rows<true>(slab, rows, stride, count, maxima, step);
#endif
  }

  template <bool Coarse>
  void meet_rows(int64_t slab, const C* rows, int64_t stride, int64_t count, C* maxima, int64_t step) const {
    for (int half = 0; half < halves; ++half) {
      int64_t row = 0;
      const auto advance = [&]<int Rows>() {
        for (; row + Rows <= count; row += Rows) {
          const auto tile =
              half == 0 ? &Panels::meet_tile<Coarse, Rows, true> : &Panels::meet_tile<Coarse, Rows, false>;
          (this->*tile)(slab * halves + half, rows + row * stride, stride, maxima + row * step, step);
        }
      };
      advance.template operator()<tile_height>();
      advance.template operator()<tile_height / 2>();
      advance.template operator()<1>();
    }
  }

  template <bool Coarse, int Rows, bool First>
  ISTHMUS_NOINLINE void meet_tile(int64_t half, const C* rows, int64_t stride, C* maxima, int64_t step) const {
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
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
      for (int v = 1; v < tile_vectors; ++v) scores[r][0] = greater(scores[r][v], scores[r][0]);
      store(maxima + r * step, First ? scores[r][0] : greater(scores[r][0], load(maxima + r * step)));
    }
  }
};
