// The engine of the family: codes and rows meet in register tiles, softmaxes run lane by lane.
//
//     logit(i, k) = slope · u_i·v_k + offset_k        u = x - m, v = c - m, slope = 2 / temperature, offset = -|v|² /
//                                                     temperature (euclidean); unit vectors (cosine); x and c
//                                                     themselves
//
// m is the mean code: distances do not change, and what is expanded into products is no larger than the codes are
// apart. The term |x - m|², which all codes share, cancels in every softmax and is left out.
//
// A tile of the product is codes by two vectors of *rows*. So the maxima, sums and rescalings of a softmax need no
// exchange between lanes, and a strip of probabilities, [code][row], is at once the packed panel of the next product,
// Σ_k p_k c_k.

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// Codes that a panel of rows meets at a time: a multiple of every tile, every panel and the groups of noise. Their
// probabilities for one panel stay in L1.
constexpr int64_t strip_codes = 192;

// Row lengths in memory: whole vectors.
template <class C>
inline int64_t stride_of(int64_t dim) {
  return divide_up(dim, lanes<C>) * lanes<C>;
}

// Work items of `products` multiplications each: how many a second thread must bring to be worth its while.
inline int64_t grain_of_products(int64_t products) {
  constexpr int64_t products_per_element = 64;
  return grain_elements / (products / products_per_element + 1) + 1;
}

// ---- vectors as points ---------------------------------------------------------------------------------------------

// In double: the squares of floats neither overflow nor vanish. Four chains, so that additions need not wait.
template <class C>
inline double norm_of(const C* vector, int64_t stride) {
  double sums[4] = {};
  for (int64_t d = 0; d < stride; d += 4) {
    for (int i = 0; i < 4 && d + i < stride; ++i) sums[i] += static_cast<double>(vector[d + i]) * vector[d + i];
  }
  return __builtin_sqrt((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// From vectors to the points whose products are scores, and back with their gradients.
template <class T>
struct Space {
  using C = Compute<T>;

  const bool unit;  // points are unit vectors, or zero
  const int64_t dim, stride;
  Buffer<C> origin;  // [stride]: the mean code where only differences count, else zeros

  Space(const Assignment& args, const T* codebook)
      : unit(args.metric == Metric::cosine), dim(args.dim), stride(stride_of<C>(dim)), origin(stride) {
    for (int64_t d = 0; d < stride; d += lanes<C>) {
      Vec<C> sum = {};
      if (args.metric == Metric::euclidean) {
        for (int64_t k = 0; k < args.codes; ++k) sum += load_first(codebook + k * dim + d, dim - d);
      }
      const Vec<C> mean = sum / static_cast<C>(args.codes);
      store(origin.data + d, mean - mean == 0 ? mean : Vec<C>{});  // one bad code must not spoil the others
    }
  }

  // Returns the factor that makes the point the vector again, less the origin.
  C place(const T* vector, C* point) const {
    for (int64_t d = 0; d < stride; d += lanes<C>) {
      store(point + d, load_first(vector + d, dim - d) - load(origin.data + d));
    }
    if (!unit) return 1;
    const double norm = norm_of(point, stride), divisor = norm == 0 ? 1 : norm;
    for (int64_t d = 0; d < stride; ++d) point[d] = static_cast<C>(point[d] / divisor);
    return static_cast<C>(norm);
  }

  // Turns the gradient of a point into that of its vector.
  void pull_back(const C* point, C norm, C* grad) const {
    if (!unit) return;
    Vec<C> product = {};
    for (int64_t d = 0; d < stride; d += lanes<C>) product += load(point + d) * load(grad + d);
    const C along = sum_lanes<C>(product);
    for (int64_t d = 0; d < stride; ++d) grad[d] = norm == 0 ? C(0) : (grad[d] - along * point[d]) / norm;
  }
};

// ---- codes ---------------------------------------------------------------------------------------------------------

// A run of codes.
struct Strip {
  int64_t first, count;
};

template <class T>
struct Codes {
  using C = Compute<T>;

  const int64_t count, dim, stride;
  const C slope;
  const Space<T> space;
  Buffer<C> points;   // [count, stride], zero beyond dim
  Buffer<C> norms;    // [count]: code = origin + norm · point
  Buffer<C> offsets;  // [count, up to whole tiles]
  Buffer<C> tiles;    // [⌈count / tile_rows⌉, dim, tile_rows]

  // The logits are divided by `relaxation`.
  Codes(const Assignment& args, int64_t head, double relaxation)
      : Codes(args, static_cast<const T*>(args.codebook) + head * args.codes * args.dim,
              1 / (args.temperature * relaxation)) {}

  // Those of strip.count codes with a panel of rows: [count, width].
  void logits(const Strip& strip, const C* panel, C* out) const { multiply(strip, offsets.data, panel, out); }
  // The products alone.
  void products(const Strip& strip, const C* panel, C* out) const { multiply(strip, nullptr, panel, out); }

 private:
  Codes(const Assignment& args, const T* codebook, double inverse)
      : count(args.codes),
        dim(args.dim),
        stride(stride_of<C>(dim)),
        slope(static_cast<C>(args.metric == Metric::euclidean ? 2 * inverse : inverse)),
        space(args, codebook),
        points(count * stride),
        norms(count),
        offsets(divide_up(count, tile_rows) * tile_rows),
        tiles(divide_up(count, tile_rows) * tile_rows * dim) {
    const C curvature = args.metric == Metric::euclidean ? -static_cast<C>(inverse) : C(0);
    parallel_for(divide_up(count, tile_rows), grain_elements / (tile_rows * dim + 1) + 1,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t tile = begin; tile < end; ++tile) fill_tile(codebook, tile * tile_rows, curvature);
                 });
  }

  void fill_tile(const T* codebook, int64_t first, C curvature) const {
    const int64_t present = smaller(count - first, tile_rows);
    for (int64_t k = first; k < first + tile_rows; ++k) {
      offsets.data[k] = 0;
      if (k >= count) continue;
      const C* point = points.data + k * stride;
      norms.data[k] = space.place(codebook + k * dim, points.data + k * stride);
      Vec<C> square = {};
      for (int64_t d = 0; d < stride; d += lanes<C>) square += load(point + d) * load(point + d);
      if (curvature != 0) offsets.data[k] = curvature * sum_lanes<C>(square);
    }
    pack_rows<tile_rows>(points.data + first * stride, stride, present, dim, tiles.data + first * dim);
  }

  template <int Rows>
  ISTHMUS_NOINLINE void multiply_rows(const C* tile, const C* offset, const C* panel, C* out) const {
    Vec<C> acc[Rows][2];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) acc[r][0] = acc[r][1] = Vec<C>{};
    multiply_tile(tile, panel, dim, acc);
    // The offset last: it may be large, and each addition to it would round.
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      store(out + r * panel_width<C>, acc[r][0] + offset[r]);
      store(out + r * panel_width<C> + lanes<C>, acc[r][1] + offset[r]);
    }
  }

  // `added` is an offset for each code of the codebook; null: none.
  void multiply(const Strip& strip, const C* added, const C* panel, C* out) const {
    static constexpr C zeros[tile_rows] = {};
    for (int64_t k = 0; k < strip.count; k += tile_rows) {
      const int64_t code = strip.first + k;
      dispatch_rows(strip.count - k, [&]<int Rows>() {
        multiply_rows<Rows>(tiles.data + code * dim, added == nullptr ? zeros : added + code, panel,
                            out + k * panel_width<C>);
      });
    }
  }
};

// A row-major matrix [count, stride] by columns: what a sum over its rows multiplies.
template <class C>
struct Columns {
  const int64_t count, dim;
  Buffer<C> tiles;  // [⌈dim / tile_rows⌉, count, tile_rows]

  Columns(int64_t count_, int64_t dim_) : count(count_), dim(dim_), tiles(count * padded(dim)) {}

  static int64_t padded(int64_t dim) { return divide_up(dim, tile_rows) * tile_rows; }

  void pack(const C* rows, int64_t stride) const {
    for (int64_t d = 0; d < dim; d += tile_rows) {
      pack_columns<tile_rows>(rows + d, stride, smaller(dim - d, tile_rows), count, tiles.data + d * count);
    }
  }

  // sums[d][j] += Σ_r rows[r][d] · panel[r - first][j] over the rows of a strip; sums is [padded(dim), width].
  void add(const Strip& strip, const C* panel, C* sums) const {
    for (int64_t d = 0; d < dim; d += tile_rows) {
      dispatch_rows(dim - d, [&]<int Rows>() {
        add_rows<Rows>(tiles.data + d * count + strip.first * tile_rows, panel, strip.count, sums + d * panel_width<C>);
      });
    }
  }

 private:
  template <int Rows>
  static ISTHMUS_NOINLINE void add_rows(const C* tile, const C* panel, int64_t depth, C* sums) {
    Vec<C> acc[Rows][2];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      acc[r][0] = load(sums + r * panel_width<C>);
      acc[r][1] = load(sums + r * panel_width<C> + lanes<C>);
    }
    multiply_tile(tile, panel, depth, acc);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      store(sums + r * panel_width<C>, acc[r][0]);
      store(sums + r * panel_width<C> + lanes<C>, acc[r][1]);
    }
  }
};

// Visits a matrix [dim][width] by its columns: visit(j, d, the numbers d, … of column j) for j < count.
template <class C, class Visit>
inline void for_each_column(const C* matrix, int64_t dim, int64_t count, Visit&& visit) {
  constexpr int64_t width = panel_width<C>;
  alignas(64) C square[width * lanes<C>];
  for (int64_t d = 0; d < dim; d += lanes<C>) {
    pack_rows<lanes<C>>(matrix + d * width, width, smaller(dim - d, lanes<C>), width, square);
    for (int64_t j = 0; j < count; ++j) visit(j, d, load(square + j * lanes<C>));
  }
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// Rows that stay in cache while all codes pass, also as panels whose lanes are rows.
template <class C>
struct RowPanels {
  static constexpr int64_t width = panel_width<C>, max_panels = 8, max_rows = max_panels * width;

  const int64_t dim, stride;
  Buffer<C> rows;    // [max_rows, stride], zero beyond dim
  Buffer<C> panels;  // [max_panels, dim, width]

  explicit RowPanels(int64_t dim_)
      : dim(dim_), stride(stride_of<C>(dim)), rows(max_rows * stride), panels(max_rows * dim) {}

  // Rows up to the end of the last panel are there, and zero if they hold nothing.
  void pack(int64_t count, C factor) const {
    for (int64_t row = 0; row < count; row += width) {
      C* panel = panels.data + row * dim;
      pack_rows<width>(rows.data + row * stride, stride, width, dim, panel);
      for (int64_t i = 0; i < width * dim; i += lanes<C>) store(panel + i, factor * load(panel + i));
    }
  }
  C* row(int64_t r) const { return rows.data + r * stride; }
  const C* panel(int64_t p) const { return panels.data + p * width * dim; }
};

// Which rows are left out.
struct Hidden {
  const bool* mask;
  const int64_t* indices;
  bool operator()(int64_t row) const {
    return (mask != nullptr && !mask[row]) || (indices != nullptr && indices[row] < 0);
  }
};

// A run of rows of one head. Rows are numbered over all heads.
template <class T>
struct RowBlock {
  using C = Compute<T>;
  static constexpr int64_t width = panel_width<C>, max_rows = RowPanels<C>::max_rows;

  const Codes<T>& codes;
  const T* x;
  const Hidden hidden;
  int64_t first = 0, count = 0;
  RowPanels<C> points;  // the panels are multiplied by the slope of the logits
  Buffer<C> norms;      // [max_rows]

  RowBlock(const Codes<T>& codes_, const Assignment& args, const int64_t* indices = nullptr)
      : codes(codes_),
        x(static_cast<const T*>(args.x)),
        hidden{args.mask, indices},
        points(codes.dim),
        norms(max_rows) {}

  int64_t panels() const { return divide_up(count, width); }
  int64_t rows_in(int64_t panel) const { return smaller(count - panel * width, width); }
  int64_t row_of(int64_t panel) const { return first + panel * width; }

  void load_rows(int64_t first_, int64_t count_) {
    first = first_;
    count = count_;
    for (int64_t r = 0; r < panels() * width; ++r) {
      norms.data[r] = 1;
      if (r < count && !hidden(first + r)) {
        norms.data[r] = codes.space.place(x + (first + r) * codes.dim, points.row(r));
      } else {
        for (int64_t d = 0; d < points.stride; ++d) points.row(r)[d] = 0;
      }
    }
    points.pack(count, codes.slope);
  }
};

// Calls meet(panel, strip) with the logits of every panel of the block and every strip of codes.
template <class T, class Meet>
inline void for_each_strip(const RowBlock<T>& block, Compute<T>* logits, Meet&& meet) {
  const Codes<T>& codes = block.codes;
  for (int64_t first = 0; first < codes.count; first += strip_codes) {
    const Strip strip{first, smaller(codes.count - first, strip_codes)};
    for (int64_t p = 0; p < block.panels(); ++p) {
      codes.logits(strip, block.points.panel(p), logits);
      meet(p, strip);
    }
  }
}

// Two vectors: a number for each row of a panel.
template <class C>
struct Lanes {
  Vec<C> v[2];

  static Lanes of(C value) { return {splat(value), splat(value)}; }
  // Of rows first, … of the block; a row that is left out gets `otherwise`.
  template <class T>
  static Lanes load(const RowBlock<T>& block, int64_t panel, const C* values, C otherwise) {
    Lanes out = of(otherwise);
    for (int64_t j = 0; j < block.rows_in(panel); ++j) {
      const int64_t row = block.row_of(panel) + j;
      if (!block.hidden(row)) out.set(j, values[row]);
    }
    return out;
  }

  C get(int64_t j) const { return v[j / lanes<C>][j % lanes<C>]; }
  void set(int64_t j, C value) { v[j / lanes<C>][j % lanes<C>] = value; }
};

// Calls f(h, k, at) for the two vectors of each code of a strip, in order: half h of code k lies at `at`.
template <class C, class F>
ISTHMUS_INLINE void for_each_vector(int64_t count, F&& f) {
  for (int64_t k = 0; k < count; ++k) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) f(h, k, k * panel_width<C> + h * lanes<C>);
  }
}

// ---- work -----------------------------------------------------------------------------------------------------------

// The rows of a head in parts, at most `wanted`, of whole panels.
template <class C>
struct RowChunks {
  const int64_t rows, rows_per_chunk, count;

  RowChunks(int64_t rows_, int64_t wanted)
      : rows(rows_),
        rows_per_chunk(divide_up(divide_up(rows, wanted), panel_width<C>) * panel_width<C>),
        count(rows == 0 ? 0 : divide_up(rows, rows_per_chunk)) {}

  // Rows that have nothing to do with each other.
  static RowChunks apart(int64_t rows) {
    constexpr int64_t most_threads = 256;
    return RowChunks(rows, smaller(rows / panel_width<C> + 1, most_threads));
  }
  // Sums over rows are added chunk by chunk: as many as keep partial sums within a fixed multiple of the inputs.
  static RowChunks summed(int64_t rows, int64_t codes) {
    constexpr int64_t fewest = 4, most = 64;
    const int64_t share = divide_up(rows, codes);
    return RowChunks(rows, share < fewest ? fewest : smaller(share, most));
  }
};

// Calls body(block, chunk) with each block of rows loaded, chunks in parallel, `products` multiplications for each row.
// begin_chunk(chunk) comes before the blocks of a chunk.
template <class T, class Begin, class Body>
inline void for_each_block(const Codes<T>& codes, const Assignment& args, const int64_t* indices, int64_t head,
                           const RowChunks<Compute<T>>& chunks, int64_t products, Begin&& begin_chunk, Body&& body) {
  parallel_for(chunks.count, grain_of_products(chunks.rows_per_chunk * products), [&](int64_t begin, int64_t end) {
    RowBlock<T> block(codes, args, indices);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      begin_chunk(chunk);
      const int64_t last = smaller((chunk + 1) * chunks.rows_per_chunk, chunks.rows);
      for (int64_t row = chunk * chunks.rows_per_chunk; row < last; row += block.max_rows) {
        block.load_rows(head * args.rows + row, smaller(last - row, block.max_rows));
        body(block, chunk);
      }
    }
  });
}

// Σ over rows for each code, lane by lane: [chunks, codes] vectors, added to one number for each code in the end.
template <class C>
struct CodeSums {
  const int64_t codes, chunks;
  Buffer<C> partial;  // [chunks, codes, lanes]

  CodeSums(int64_t codes_, int64_t chunks_) : codes(codes_), chunks(chunks_), partial(chunks * codes * lanes<C>) {}

  void begin(int64_t chunk) const {
    for (int64_t k = 0; k < codes; ++k) store(of(chunk, k), Vec<C>{});
  }
  void add(int64_t chunk, const Strip& strip, const C* panel) const {
    for (int64_t k = 0; k < strip.count; ++k, panel += panel_width<C>) {
      C* sum = of(chunk, strip.first + k);
      store(sum, load(sum) + (load(panel) + load(panel + lanes<C>)));
    }
  }
  C total(int64_t k) const {
    Vec<C> sum = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += load(of(chunk, k));
    return sum_lanes<C>(sum);
  }

 private:
  C* of(int64_t chunk, int64_t k) const { return partial.data + (chunk * codes + k) * lanes<C>; }
};

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
