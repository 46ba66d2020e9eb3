// Included by cpu.inl: finds the scores above a cut without storing the others.
//
// A register tile of the product x · weightᵀ + bias (core/product.h) is compared with a cut of each column; what may be
// above is scored again in float64 (core/score.h), and a sink decides. A float64 score is never above the upper bound
//
//     bias + γ |bias| + x · w + (γ |x| + n 2⁻¹²⁵) |w| + n 2⁻¹²⁵ (1 + |x|)
//
// which the product itself computes: each tile and each panel is two components deeper. γ bounds the rounding of both
// sums, docs/numerics.md has the proof. Vectors of a length of 2⁶⁰ or more, infinite or not a number, whose products
// could overflow, have an infinite bound. So a score that is not a number always comes before the sink.

template <class C>
constexpr double rounding_unit = sizeof(C) == 4 ? 0x1p-24 : 0x1p-53;
// Twice the number where underflow begins: what flushing one term to zero may cost.
template <class C>
constexpr double flushed = sizeof(C) == 4 ? 0x1p-125 : 0x1p-1021;
// Squares of tiny numbers vanish; the length of what vanished is less than this.
template <class C>
constexpr double least_length = sizeof(C) == 4 ? 0x1p-60 : 0x1p-500;
template <class C>
constexpr double tame_square = sizeof(C) == 4 ? 0x1p120 : 0x1p1000;
// Makes up for the evaluation of a bound in C.
template <class C>
constexpr double raise = 1 + 64 * rounding_unit<C>;

template <class C>
constexpr C largest_finite = sizeof(C) == 4 ? C(__FLT_MAX__) : C(__DBL_MAX__);

// A number of the compute type below `value` that is the next one or, at zero, the next normal one.
template <class C>
inline C next_below(C value) {
  if (value == 0) return sizeof(C) == 4 ? C(-__FLT_MIN__) : C(-__DBL_MIN__);
  return from_ordered<C>(to_ordered(value) - 1);
}

// The largest number of the compute type that is at most `value`. Cuts are finite above: an infinite bound, behind
// which something that is not a number may hide, always exceeds them.
template <class C>
inline C rounded_down(double value) {
  if (!(value < static_cast<double>(largest_finite<C>))) return largest_finite<C>;
  const C nearest = static_cast<C>(value);
  return static_cast<double>(nearest) > value ? next_below(nearest) : nearest;
}

// What is searched.
template <class T>
struct Scores {
  int64_t rows, cols, features;
  const T *x, *weight, *bias;

  template <class Args>
  explicit Scores(const Args& args)
      : rows(args.rows),
        cols(args.cols),
        features(args.features),
        x(static_cast<const T*>(args.x)),
        weight(static_cast<const T*>(args.weight)),
        bias(static_cast<const T*>(args.bias)) {}

  double at(int64_t row, int64_t feature) const {
    const double offset = bias == nullptr ? 0 : static_cast<double>(load_one(bias + feature));
    return exact_score(x + row * cols, weight + feature * cols, cols, offset);
  }
};

// An item of work is a block of rows and a range of features. What is found does not depend on the cut. Every block
// packs the weights again, so blocks are large; ranges supply the parallelism. Neighbouring ranges that fall to one
// thread run as one.
template <class T>
struct ScanPlan {
  using C = Compute<T>;
  static constexpr int64_t block_bytes = 1024 * 1024, wanted_items = 32, least_range = 512;

  int64_t block_rows, blocks, range, ranges;

  explicit ScanPlan(const Scores<T>& scores) {
    const int64_t row_bytes = larger(scores.cols, 1) * int64_t(sizeof(C));
    const int64_t most_rows = larger(divide_up(block_bytes / row_bytes, tile_rows), 8) * tile_rows;
    blocks = divide_up(scores.rows, most_rows);
    block_rows = divide_up(divide_up(scores.rows, blocks), tile_rows) * tile_rows;
    range = larger(scores.features * blocks / wanted_items, least_range) / panel_width<C> * panel_width<C>;
    ranges = divide_up(scores.features, range);
  }

  int64_t items() const { return blocks * ranges; }
};

// The bound's parts, in a form that a product of float32 numbers cannot fall below.
template <class C>
struct Bound {
  C gamma, underflow, enlarge;

  explicit Bound(int64_t cols) {
    const double count = 2 * (static_cast<double>(cols) + 16), share = count * rounding_unit<C>;
    const double infinity = __builtin_inf();
    gamma = static_cast<C>(share < 0.25 ? share / (1 - 2 * share) * raise<C> : infinity);
    underflow = static_cast<C>(count * flushed<C>);
    enlarge = static_cast<C>((1 + share) * raise<C>);
  }

  // Of a row, by its squared length: what multiplies |w|, and what stands alone. The scores of a row of zeros are
  // exact, and where there is nothing to find none of them is scored again. (No square of a float vanishes in float64.)
  void of_row(double square, C& slope, C& absolute) const {
    if (sizeof(C) == 4 && square == 0) {
      slope = absolute = 0;
      return;
    }
    const bool tame = square < tame_square<C>;
    const C length = tame ? static_cast<C>(__builtin_sqrt(square) * raise<C> + least_length<C>) : C(0);
    slope = gamma * length + underflow;
    absolute = tame ? underflow * (1 + length) : static_cast<C>(__builtin_inf());
  }

  Vec<C> length(Vec<C> square) const {
    const Vec<C> tame = sqrt(square) * enlarge + static_cast<C>(least_length<C>);
    return square < static_cast<C>(tame_square<C>) ? tame : Vec<C>{} + static_cast<C>(__builtin_inf());
  }

  Vec<C> start(Vec<C> bias) const {
    const Vec<C> size = abs(bias);
    return size < static_cast<C>(__builtin_inf()) ? bias + gamma * size : bias;
  }
};

// Asks for the lines of a stretch of memory, to wait in the second-level cache.
template <class T>
inline void prefetch(const T* from, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(from);
  for (int64_t i = 0; i < count * int64_t(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

// A sink has
//
//     begin(item)                  what follows belongs to this item
//     cuts(feature, cuts)          scores of these columns that are not above are of no interest
//     meet(row, feature, score)    called for every score that is above, and for some that are not, in the order of
//                                  features within a row; never again for a row after `broken` is set
template <class T, class Sink>
struct Scanner {
  using C = Compute<T>;
  static constexpr int width = panel_width<C>;

  const Scores<T>& scores;
  const ScanPlan<T>& plan;
  const BrokenRows& broken;
  Sink& sink;
  const Bound<C> bound{scores.cols};
  const int64_t depth = scores.cols + 2;
  Buffer<C> tiles{plan.block_rows * depth};
  Buffer<C> panel{width * depth};
  Buffer<uint32_t> above{tile_rows};

  void pack_block(int64_t first, int64_t rows) const {
    for (int64_t r = 0; r < rows; r += tile_rows) {
      const int64_t count = smaller(tile_rows, rows - r);
      const T* x = scores.x + (first + r) * scores.cols;
      C* tile = tiles.data + r * depth;
      pack_rows<tile_rows>(x, scores.cols, count, scores.cols, tile);
      C *slopes = tile + scores.cols * tile_rows, *absolutes = slopes + tile_rows;
      for (int64_t i = 0; i < tile_rows; ++i) {
        const T* row = x + smaller(i, count - 1) * scores.cols;
        bound.of_row(exact_score(row, row, scores.cols, 0), slopes[i], absolutes[i]);
      }
    }
  }

  void pack_panel(int64_t feature, int64_t count) const {
    pack_rows<width>(scores.weight + feature * scores.cols, scores.cols, count, scores.cols, panel.data);
    Vec<C> squares[2] = {};
    C* end = panel.data + scores.cols * width;
    for (const C* w = panel.data; w < end; w += width) {
      for (int v = 0; v < 2; ++v) squares[v] += load(w + v * lanes<C>) * load(w + v * lanes<C>);
    }
    for (int v = 0; v < 2; ++v) {
      store(end + v * lanes<C>, bound.length(squares[v]));
      store(end + width + v * lanes<C>, splat(C(1)));
    }
  }

  // Bit j of above[r] is set unless the bound of row r and column j is at most the cut.
  ISTHMUS_NOINLINE void screen(const C* tile, int64_t rows, const Vec<C> (&start)[2], const Vec<C> (&cut)[2]) const {
    dispatch_rows(rows, [&]<int Rows>() {
      Vec<C> acc[Rows][2];
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        acc[r][0] = start[0];
        acc[r][1] = start[1];
      }
      multiply_tile(tile, panel.data, depth, acc);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        above.data[r] = ~(lane_bits(acc[r][0] <= cut[0]) | lane_bits(acc[r][1] <= cut[1]) << lanes<C>);
      }
    });
  }

  void meet(int64_t row, int64_t feature, uint32_t bits) const {
    for (; bits != 0 && !broken[row]; bits &= bits - 1) {
      const int64_t f = feature + __builtin_ctz(bits);
      sink.meet(row, f, scores.at(row, f));
    }
  }

  void scan(int64_t first, int64_t rows, int64_t begin, int64_t end) const {
    for (int64_t f = begin; f < end; f += width) {
      const int64_t count = smaller(width, end - f), in_second = count - lanes<C>;
      const uint32_t inside = ~0u >> (32 - count);
      pack_panel(f, count);
      Vec<C> start[2] = {}, cut[2];
      if (scores.bias != nullptr) start[0] = bound.start(load_first(scores.bias + f, count));
      if (scores.bias != nullptr && in_second > 0) {
        start[1] = bound.start(load_first(scores.bias + f + lanes<C>, in_second));
      }
      sink.cuts(f, cut);
      // Packing reads many rows side by side, too many for the hardware to foresee: fetch the next panel meanwhile.
      const int64_t ahead = smaller(width, end - f - count) * scores.cols;
      const int64_t share = divide_up(ahead, divide_up(rows, tile_rows));
      const T* next = scores.weight + (f + width) * scores.cols;
      for (int64_t r = 0; r < rows; r += tile_rows) {
        const int64_t tile = smaller(tile_rows, rows - r), fetched = r / tile_rows * share;
        if (fetched < ahead) prefetch(next + fetched, smaller(share, ahead - fetched));
        screen(tiles.data + r * depth, tile, start, cut);
        for (int64_t i = 0; i < tile; ++i) meet(first + r + i, f, above.data[i] & inside);
      }
    }
  }

  void run(int64_t begin, int64_t end) const {
    for (int64_t item = begin; item < end;) {
      const int64_t block = item / plan.ranges, next = smaller(end, (block + 1) * plan.ranges);
      const int64_t first = block * plan.block_rows, rows = smaller(plan.block_rows, scores.rows - first);
      const int64_t range = item % plan.ranges;
      pack_block(first, rows);
      sink.begin(item);
      scan(first, rows, range * plan.range, smaller((range + next - item) * plan.range, scores.features));
      item = next;
    }
  }
};
