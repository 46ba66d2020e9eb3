// Included by search.inl: approximate scores of all codes, of which only the largest of each group of eight is kept.
//
// A *slab* is lanes × 8 codes as eight vectors: lane l of vector v holds code 8 l + v of the slab. So the largest score
// of eight neighbours is a maximum of vectors, lane by lane: no indices, one operation for each vector of scores, and
// of the [N, K] scores an eighth is stored, for the rows in cache.
//
// A register tile is 6 rows by 4 vectors at AVX-512: 24 fused multiply-adds for ten loads. Rows are read where they
// are.

constexpr int tile_height = 6;
#if defined(__AVX512F__)
constexpr int tile_vectors = 4;  // of 32 registers
#else
constexpr int tile_vectors = 2;  // of 16 registers
#endif

template <class C>
constexpr double rounding_unit = sizeof(C) == 4 ? 0x1p-24 : 0x1p-53;
// Where underflow begins, doubled: what flushing one number to zero may cost.
template <class C>
constexpr double smallest_normal = sizeof(C) == 4 ? 0x1p-125 : 0x1p-1021;
// No product of two vectors shorter than the root of this overflows. Longer ones are *wild*: never screened, always
// rescored.
template <class C>
constexpr double tame_square = sizeof(C) == 4 ? 0x1p120 : 0x1p1000;

// Bounds are evaluated in C. Each of their parts is first raised by more than that costs.
template <class C>
inline C raised(double bound) {
  return static_cast<C>(bound * (1 + 64 * rounding_unit<C>));
}

// How far an approximate score may be from the exact one: slope · norm(group) + floor(group) + absolute. See "Nearest
// code" in docs/numerics.md.
template <class C>
struct RowBound {
  C slope = 0, absolute = 0;
  bool wild = false, not_a_number = false;

  RowBound() = default;
  RowBound(const C* x, int64_t dim) {
    const double square = squared_length(x, dim), depth = static_cast<double>(dim) + 16;
    not_a_number = square != square;
    wild = !(square < tame_square<C>);
    if (wild) return;
    const double length = __builtin_sqrt(square) * (1 + depth * 0x1p-52);
    slope = raised<C>(2 * depth * rounding_unit<C> * length);
    absolute = raised<C>(2 * depth * 0x1p-53 * square + depth * smallest_normal<C> * (1 + length));
  }
};

// The codebook in slabs, with what bounds the error of each group.
template <class T>
struct Panels {
  using C = Compute<T>;
  static constexpr int size = lanes<C>;
  static constexpr int halves = group_codes / tile_vectors;

  const Metric metric;
  const int64_t codes, dim, slabs;
  Buffer<C> columns;   // [slabs, halves, dim, tile_vectors, lanes]
  Buffer<C> offsets;   // [slabs, group_codes, lanes]: -|c|²/2; -inf where there is no code, or a wild one
  Buffer<C> norms;     // [slabs, lanes]: at least the length of every code of the group
  Buffer<C> floors;    // [slabs, lanes]: the part of the bound that no row changes
  Buffer<C> ceilings;  // [slabs, lanes]: the same, but infinite if the group holds a wild code

  // lengths: of the codes, [slabs · slab_codes]; only cosine needs them.
  Panels(Metric metric_, const T* codebook, int64_t codes_, int64_t dim_, const double* lengths)
      : metric(metric_),
        codes(codes_),
        dim(dim_),
        slabs((codes + slab_codes<C> - 1) / slab_codes<C>),
        columns(slabs * slab_codes<C> * dim),
        offsets(slabs * slab_codes<C>),
        norms(slabs * size),
        floors(slabs * size),
        ceilings(slabs * size) {
    parallel_for(slabs, grain_of(slab_codes<C> * dim), [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) pack(s, codebook + s * slab_codes<C> * dim, lengths + s * slab_codes<C>);
    });
  }

  C* vector(int64_t slab, int v) const {
    return columns.data + ((slab * halves + v / tile_vectors) * dim * tile_vectors + v % tile_vectors) * size;
  }

  void pack(int64_t slab, const T* first, const double* lengths) const {
    const int64_t left = codes - slab * slab_codes<C>;
    Vec<C> largest = {};
    Mask<C> wild_group = {};
    for (int v = 0; v < group_codes; ++v) {
      const int64_t found = (left - v + group_codes - 1) / group_codes;
      const int64_t count = found < 0 ? 0 : found < size ? found : size;
      C* column = vector(slab, v);
      pack_rows<size>(first + v * dim, group_codes * dim, count, dim, column, tile_vectors * size);
      if (metric == Metric::cosine) normalize(column, lengths + v);
      const Vec<C> square = squares(column);
      const Mask<C> wild = ~(square < static_cast<C>(tame_square<C>));
      if (any(wild)) clear(column, wild);
      const Vec<C> start = metric == Metric::euclidean ? C(-0.5) * square : Vec<C>{};
      store(offsets.data + slab * slab_codes<C> + v * size,
            (wild | ~first_lanes<C>(count)) ? Vec<C>{} - C(__builtin_inf()) : start);
      largest = greater(wild ? Vec<C>{} : square, largest);
      wild_group |= wild;
    }
    const C depth = static_cast<C>(dim) + 16, unit = static_cast<C>(rounding_unit<C>);
    const Vec<C> norm = sqrt(largest * (1 + 4 * depth * unit)) * (1 + 8 * unit) + least_norm();
    const Vec<C> rounding = metric == Metric::euclidean ? 2 * depth * unit * norm * norm : Vec<C>{};
    const Vec<C> floor = (rounding + depth * static_cast<C>(smallest_normal<C>) * (1 + norm)) * (1 + 64 * unit);
    store(norms.data + slab * size, norm);
    store(floors.data + slab * size, floor);
    store(ceilings.data + slab * size, wild_group ? Vec<C>{} + C(__builtin_inf()) : floor);
  }

  // Squares of tiny numbers vanish; the length of what vanished is less than this.
  C least_norm() const { return static_cast<C>(sizeof(C) == 4 ? 0x1p-60 : 0x1p-500); }

  Vec<C> squares(const C* column) const {
    Vec<C> sum = {};
    for (int64_t k = 0; k < dim; ++k) {
      const Vec<C> c = load(column + k * tile_vectors * size);
      sum += c * c;
    }
    return sum;
  }

  // lengths: of lane l at [8 l]. A code of length zero stays what it is.
  void normalize(C* column, const double* lengths) const {
    for (int64_t k = 0; k < dim; ++k) {
      C* c = column + k * tile_vectors * size;
      for (int l = 0; l < size; ++l) {
        const double length = lengths[group_codes * l];
        c[l] = static_cast<C>(static_cast<double>(c[l]) / (length == 0 ? 1 : length));
      }
    }
  }

  void clear(C* column, Mask<C> wild) const {
    for (int64_t k = 0; k < dim; ++k) {
      C* c = column + k * tile_vectors * size;
      store(c, wild ? Vec<C>{} : load(c));
    }
  }

  // maxima[row · step + l] = the largest score of group l of the slab, for `count` rows.
  void meet(int64_t slab, const C* rows, int64_t stride, int64_t count, C* maxima, int64_t step) const {
    for (int half = 0; half < halves; ++half) {
      int64_t row = 0;
      const auto advance = [&]<int Rows>() {
        for (; row + Rows <= count; row += Rows) {
          if (half == 0) {
            meet_tile<Rows, true>(slab * halves + half, rows + row * stride, stride, maxima + row * step, step);
          } else {
            meet_tile<Rows, false>(slab * halves + half, rows + row * stride, stride, maxima + row * step, step);
          }
        }
      };
      advance.template operator()<tile_height>();
      advance.template operator()<tile_height / 2>();
      advance.template operator()<1>();
    }
  }

  template <int Rows, bool First>
  ISTHMUS_NOINLINE void meet_tile(int64_t half, const C* rows, int64_t stride, C* maxima, int64_t step) const {
    const C* offset = offsets.data + half * tile_vectors * size;
    const C* column = columns.data + half * dim * tile_vectors * size;
    const C* x[Rows];
    Vec<C> scores[Rows][tile_vectors];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      x[r] = rows + r * stride;
#pragma GCC unroll 16
      for (int v = 0; v < tile_vectors; ++v) scores[r][v] = load(offset + v * size);
    }
    for (int64_t k = 0; k < dim; ++k, column += tile_vectors * size) {
      Vec<C> b[tile_vectors];
#pragma GCC unroll 16
      for (int v = 0; v < tile_vectors; ++v) b[v] = load(column + v * size);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < tile_vectors; ++v) scores[r][v] += x[r][k] * b[v];
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
