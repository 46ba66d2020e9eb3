// The engine of the family: rows and Gaussian components meet in register tiles.
//
//     score(i, k) = weight + Σ_d log N(z_id; m_kd, s_kd²) = offset_k - ½ Σ_d t²,    t = z_id / s_kd - m_kd / s_kd
//
// 1/s and m/s are made once for each component, so an element costs one fused operation for the residual and one to
// accumulate its square: what the expanded square z²/s² - 2zm/s² + m²/s² would cost as two matrix products, without its
// cancellation. A tile is rows by two vectors of components, as in core/product.h.

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// Row lengths in memory: whole vectors.
template <class C>
inline int64_t stride_of(int64_t dim) {
  return (dim + lanes<C> - 1) / lanes<C> * lanes<C>;
}

// Work items of `products` multiplications each: how many a second thread must bring to be worth its while.
inline int64_t grain_of_products(int64_t products) {
  constexpr int64_t products_per_element = 64;
  return grain_elements / (products / products_per_element + 1) + 1;
}

template <class C, class T>
inline C load_or(const T* values, int64_t i, C otherwise) {
  return values == nullptr ? otherwise : load_one(values + i);
}

// ---- the two sides -------------------------------------------------------------------------------------------------

// A run of rows that stays in cache while all panels pass: as tiles for the scores, as rows for the gradients.
template <class T>
struct RowBlock {
  using C = Compute<T>;
  static constexpr int64_t max_rows = 8 * tile_rows;

  const int64_t dim, stride;
  int64_t first = 0, count = 0;
  Buffer<C> tiles;  // [max_rows / tile_rows, dim, tile_rows]
  Buffer<C> rows;   // [max_rows, stride], zero beyond dim

  explicit RowBlock(int64_t dim_)
      : dim(dim_), stride(stride_of<C>(dim)), tiles(max_rows * dim), rows(max_rows * stride) {}

  void load(const void* matrix, int64_t first_, int64_t count_) {
    first = first_;
    count = count_;
    const T* source = static_cast<const T*>(matrix) + first * dim;
    for (int64_t row = 0; row < count; row += tile_rows) {
      const int64_t left = count - row < tile_rows ? count - row : tile_rows;
      pack_rows<tile_rows>(source + row * dim, dim, left, dim, tiles.data + row * dim);
    }
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t d = 0; d < dim; d += lanes<C>) {
        store(rows.data + row * stride + d, load_first(source + row * dim + d, dim - d));
      }
    }
  }
};

// Components as 1/s and m/s, in rows and in panels of columns. The last panel is filled up with copies of the last
// component whose offset is -inf: no tails, and no NaN from the residual of a row that is infinite.
template <class C>
struct Components {
  static constexpr int64_t width = panel_width<C>;

  const int64_t count, dim, stride, panels;
  Buffer<C> slope, shift;                // [panels · width, stride], zero beyond dim
  Buffer<C> slope_panels, shift_panels;  // [panels, dim, width]
  Buffer<C> offset;                      // [panels · width]

  explicit Components(const GaussianPairs& pairs)
      : count(pairs.components),
        dim(pairs.dim),
        stride(stride_of<C>(dim)),
        panels((count + width - 1) / width),
        slope(panels * width * stride),
        shift(panels * width * stride),
        slope_panels(panels * width * dim),
        shift_panels(panels * width * dim),
        offset(panels * width) {}

  // log_weight(k) is added to the scores of component k.
  template <class T, class LogWeight>
  void fill(const GaussianPairs& pairs, LogWeight&& log_weight) {
    dispatch_scale(pairs.scale_type, [&]<ScaleType S>() {
      parallel_for(panels, grain_elements / (dim * width + 1) + 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          for (int64_t k = p * width; k < (p + 1) * width; ++k) {
            const int64_t source = k < count ? k : count - 1;
            const C density = fill_component<S>(static_cast<const T*>(pairs.mean) + source * dim,
                                                static_cast<const T*>(pairs.scale) + source * dim, k);
            offset.data[k] = k < count ? density + log_weight(k) : -static_cast<C>(__builtin_inf());
          }
          pack_rows<width>(slope.data + p * width * stride, stride, width, dim, slope_panels.data + p * width * dim);
          pack_rows<width>(shift.data + p * width * stride, stride, width, dim, shift_panels.data + p * width * dim);
        }
      });
    });
  }

  // Returns the log-density at the mean.
  template <ScaleType S, class T>
  C fill_component(const T* mean, const T* scale, int64_t k) const {
    Vec<C> log_std = {};
    for (int64_t d = 0; d < dim; d += lanes<C>) {
      const Vec<C> raw = load_first(scale + d, dim - d);
      const Mask<C> inside = first_lanes<C>(dim - d < lanes<C> ? dim - d : lanes<C>);
      const Vec<C> inverse = inside ? inverse_std<S>(raw) : Vec<C>{};
      store(slope.data + k * stride + d, inverse);
      store(shift.data + k * stride + d, inverse * load_first(mean + d, dim - d));
      log_std += inside ? log_std_of<S>(raw) : Vec<C>{};
    }
    return -sum_lanes<C>(log_std) - static_cast<C>(half_log_two_pi) * static_cast<C>(dim);
  }
};

// ---- scores --------------------------------------------------------------------------------------------------------

// sums[r][j] = Σ_d (tile[d][r] · slope[d][j] - shift[d][j])²; no slopes: they are all 1.
template <class C, int Rows, bool Scaled = true>
ISTHMUS_NOINLINE void square_tile(const C* tile, const C* slope, const C* shift, int64_t depth, C* sums) {
  constexpr int64_t width = panel_width<C>;
  Vec<C> acc[Rows][2] = {};
  for (int64_t d = 0; d < depth; ++d, tile += tile_rows, shift += width) {
    const Vec<C> slope0 = Scaled ? load(slope) : Vec<C>{}, slope1 = Scaled ? load(slope + lanes<C>) : Vec<C>{};
    const Vec<C> shift0 = load(shift), shift1 = load(shift + lanes<C>);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vec<C> t0 = (Scaled ? tile[r] * slope0 : splat(tile[r])) - shift0;
      const Vec<C> t1 = (Scaled ? tile[r] * slope1 : splat(tile[r])) - shift1;
      acc[r][0] += t0 * t0;
      acc[r][1] += t1 * t1;
    }
    if constexpr (Scaled) slope += width;
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    store(sums + r * width, acc[r][0]);
    store(sums + r * width + lanes<C>, acc[r][1]);
  }
}

// What is added to the scores of a row beside the offsets of the components.
template <class T>
struct RowWeights {
  using C = Compute<T>;

  C constant = 0;
  const T* of_rows = nullptr;  // added instead of `constant`
  // Of the pairs (i, i) and (i, i + 1 mod cycle): what they get beside `constant`. No cycle: no such pairs.
  int64_t cycle = 0;
  C self = 0, next = 0;

  static RowWeights aggregate(const AggregateWeights& weights, int64_t rows) {
    return {.constant = static_cast<C>(weights.log_other),
            .cycle = rows,
            .self = static_cast<C>(weights.log_self - weights.log_other),
            .next = static_cast<C>(weights.log_next - weights.log_other)};
  }

  C of_row(int64_t row) const { return load_or(of_rows, row, constant); }
  int64_t after(int64_t row) const { return row + 1 == cycle ? 0 : row + 1; }
};

template <class T>
struct Scores {
  using C = Compute<T>;
  static constexpr int64_t width = panel_width<C>;

  const Components<C>& components;
  RowWeights<T> weights;
  alignas(64) C values[tile_rows * width];  // [tile_rows, width] of the tile computed last

  // Of the tile that begins at `row` of the block, with panel p; returns how many rows it has.
  int64_t compute(const RowBlock<T>& block, int64_t row, int64_t p) {
    const int64_t left = block.count - row, count = left < tile_rows ? left : tile_rows, panel = p * width * block.dim;
    dispatch_rows(count, [&]<int Rows>() {
      square_tile<C, Rows>(block.tiles.data + row * block.dim, components.slope_panels.data + panel,
                           components.shift_panels.data + panel, block.dim, values);
    });
    for (int64_t r = 0; r < count; ++r) {
      const C weight = weights.of_row(block.first + row + r);
      for (int64_t j = 0; j < width; j += lanes<C>) {
        const Vec<C> offset = load(components.offset.data + p * width + j) + weight;
        store(values + r * width + j, offset - C(0.5) * load(values + r * width + j));
      }
      if (weights.cycle > 0) {
        add_to_pair(r, block.first + row + r - p * width, weights.self);
        add_to_pair(r, weights.after(block.first + row + r) - p * width, weights.next);
      }
    }
    return count;
  }

  void add_to_pair(int64_t r, int64_t j, C weight) {
    if (j >= 0 && j < width) values[r * width + j] += weight;
  }
};

// Lane by lane, log Σ exp of the vectors met so far. A group costs one rescaling at most. The start below every finite
// number keeps a sum over nothing, and over -inf, free of inf - inf; a NaN is never the maximum, but stays in the sum.
template <class C>
struct LogSum {
  Vec<C> top = Vec<C>{} - (sizeof(C) == 4 ? C(0x1.fffffep127) : C(0x1.fffffffffffffp1023));
  Vec<C> sum = {};

  ISTHMUS_INLINE void raise_to(Vec<C> peak) {
    if (!any(peak > top)) return;
    const Vec<C> raised = peak > top ? peak : top;
    sum *= exp_of_negative(top - raised);
    top = raised;
  }
  // The vectors value(0), …, value(count - 1).
  template <class Value>
  ISTHMUS_INLINE void meet(int64_t count, Value&& value) {
    Vec<C> peak = top;
    for (int64_t i = 0; i < count; ++i) peak = value(i) > peak ? value(i) : peak;
    raise_to(peak);
    for (int64_t i = 0; i < count; ++i) sum += exp_of_negative(value(i) - top);
  }
  ISTHMUS_INLINE void merge(const LogSum& other) {
    raise_to(other.top);
    sum += other.sum * exp_of_negative(other.top - top);
  }

  Vec<C> value() const { return top + log(sum); }
  // Of all lanes together, in each of them.
  LogSum of_all_lanes() const {
    C peak = top[0];
    for (int i = 1; i < lanes<C>; ++i) peak = top[i] > peak ? top[i] : peak;
    return {splat(peak), splat(sum_lanes<C>(sum * exp_of_negative(top - peak)))};
  }
};

// Where the log-sum-exps of a forward pass go. Backward needs score - log_prob to all its digits, which log_prob alone
// has lost where it is large: so the greatest term and the logarithm of the sum beside it are kept apart.
template <class C>
struct LogSums {
  C *log_prob, *peak, *log_sum;

  template <class Args>
  LogSums(const Args& args, void* log_prob_, int64_t count)
      : log_prob(static_cast<C*>(log_prob_)), peak(static_cast<C*>(args.normalizer)), log_sum(peak + count) {}

  void write(int64_t i, const LogSum<C>& sum, int64_t count) const {
    const Vec<C> log_of_sum = log(sum.sum);
    store_first(log_prob + i, sum.top + log_of_sum, count);
    store_first(peak + i, sum.top, count);
    store_first(log_sum + i, log_of_sum, count);
  }
};

// ---- work ----------------------------------------------------------------------------------------------------------

// Sums over rows run in at most `max_chunks` parts that are added in order: few enough that partial sums stay a fixed
// multiple of the result, and a function of the shape alone.
struct RowChunks {
  static constexpr int64_t max_chunks = 16, min_rows = 4 * tile_rows;
  int64_t rows, rows_per_chunk, count;

  explicit RowChunks(int64_t rows_) : rows(rows_) {
    const int64_t share = (rows + max_chunks * tile_rows - 1) / (max_chunks * tile_rows) * tile_rows;
    rows_per_chunk = share < min_rows ? min_rows : share;
    count = (rows + rows_per_chunk - 1) / rows_per_chunk;
  }

  // Of chunk `index`; behind the last chunk, the end of the rows.
  int64_t first(int64_t index) const { return index < count ? index * rows_per_chunk : rows; }
};

// Calls body() with each block of the rows [begin, end) of a matrix loaded.
template <class T, class Body>
inline void for_each_block(const void* matrix, RowBlock<T>& block, int64_t begin, int64_t end, Body&& body) {
  for (int64_t row = begin; row < end; row += block.max_rows) {
    block.load(matrix, row, end - row < block.max_rows ? end - row : block.max_rows);
    body();
  }
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
