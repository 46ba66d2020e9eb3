// Maximum mean discrepancy: sums of a kernel of the distance over all pairs of two samples.
//
// Distances are sums of squared differences, made in the register tile of engine.inl without slopes: equal points are
// exactly 0 apart. Of the pairs within one sample only those above the diagonal are visited. Backward walks over all
// pairs once for each sample and sums slope · (x_i - y_j) for the rows of a block: each gradient has one owner.
//
// Arithmetic: (N + M)²/2 distances forward, (N + M)² backward. Memory: copies of both samples, 2·(N + M)·D.

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// A sample as panels of columns, and as rows for the gradients.
template <class T>
struct Points {
  using C = Compute<T>;
  static constexpr int64_t width = panel_width<C>;

  const void* matrix;
  const int64_t count, dim, stride, panels;
  Buffer<C> columns;  // [panels, dim, width]
  Buffer<C> rows;     // [count, stride], zero beyond dim

  Points(const void* matrix_, int64_t count_, int64_t dim_)
      : matrix(matrix_),
        count(count_),
        dim(dim_),
        stride(stride_of<C>(dim)),
        panels((count + width - 1) / width),
        columns(panels * width * dim),
        rows(count * stride) {
    const T* source = static_cast<const T*>(matrix);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t first = p * width, left = count - first;
      pack_rows<width>(source + first * dim, dim, left < width ? left : width, dim, columns.data + first * dim);
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t d = 0; d < dim; d += lanes<C>) {
        store(rows.data + i * stride + d, load_first(source + i * dim + d, dim - d));
      }
    }
  }

  // Squared distances [tile_rows, width] of the tile at `row` of the block to panel p; returns how many rows it has.
  int64_t distances(const RowBlock<T>& block, int64_t row, int64_t p, C* squares) const {
    const int64_t left = block.count - row, count_rows = left < tile_rows ? left : tile_rows;
    dispatch_rows(count_rows, [&]<int Rows>() {
      square_tile<C, Rows, false>(block.tiles.data + row * dim, nullptr, columns.data + p * width * dim, dim, squares);
    });
    return count_rows;
  }
};

// ---- kernels of the squared distance -------------------------------------------------------------------------------

template <class C>
ISTHMUS_INLINE Vec<C> kernel_value(const KernelSum& kernel, Vec<C> square) {
  Vec<C> sum = {};
  for (int h = 0; h < kernel.count; ++h) {
    const Vec<C> u = static_cast<C>(kernel.factors[h]) * square;
    sum += kernel.kernel == DistanceKernel::rbf ? exp_of_negative(-u) : 1 / (1 + u);
  }
  return sum;
}

// The derivative of kernel_value.
template <class C>
ISTHMUS_INLINE Vec<C> kernel_slope(const KernelSum& kernel, Vec<C> square) {
  Vec<C> sum = {};
  for (int h = 0; h < kernel.count; ++h) {
    const C factor = static_cast<C>(kernel.factors[h]);
    const Vec<C> u = factor * square, inverse = 1 / (1 + u);
    sum -= factor * (kernel.kernel == DistanceKernel::rbf ? exp_of_negative(-u) : inverse * inverse);
  }
  return sum;
}

// ---- forward -------------------------------------------------------------------------------------------------------

enum class Pairs { all, above_diagonal };

// Σ k over a tile of rows from `first_row` and a panel of columns from `first_column`.
template <Pairs Which, class C>
ISTHMUS_INLINE double sum_tile(const KernelSum& kernel, const C* squares, int64_t rows, int64_t first_row,
                               int64_t first_column, int64_t columns) {
  constexpr int64_t width = panel_width<C>;
  Vec<C> sum = {};
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t diagonal = Which == Pairs::all ? -1 : first_row + r - first_column;
    for (int64_t j = 0; j < width; j += lanes<C>) {
      const auto column = iota<C>() + static_cast<decltype(+Mask<C>{}[0])>(j);
      const auto in_range = [&](int64_t i) { return static_cast<decltype(+Mask<C>{}[0])>(i < width ? i : width); };
      const Mask<C> counts = (column < in_range(columns)) & (column > in_range(diagonal < -1 ? -1 : diagonal));
      sum += counts ? kernel_value<C>(kernel, load(squares + r * width + j)) : Vec<C>{};
    }
  }
  return static_cast<double>(sum_lanes<C>(sum));
}

// Σ k over pairs of a row of x and a point, in float64 beyond a tile.
template <Pairs Which, class T>
double sum_pairs(const KernelSum& kernel, const Points<T>& x, const Points<T>& points) {
  using C = Compute<T>;
  constexpr int64_t width = panel_width<C>;
  const RowChunks chunks(x.count);
  double partial[RowChunks::max_chunks];
  parallel_for(chunks.count, grain_of_products(chunks.rows_per_chunk * points.count * (x.dim + 16 * kernel.count)),
               [&](int64_t begin, int64_t end) {
                 RowBlock<T> block(x.dim);
                 alignas(64) C squares[tile_rows * width];
                 for (int64_t chunk = begin; chunk < end; ++chunk) {
                   partial[chunk] = 0;
                   for_each_block(x.matrix, block, chunks.first(chunk), chunks.first(chunk + 1), [&] {
                     for (int64_t p = Which == Pairs::all ? 0 : block.first / width; p < points.panels; ++p) {
                       for (int64_t row = 0; row < block.count; row += tile_rows) {
                         const int64_t rows = points.distances(block, row, p, squares);
                         partial[chunk] += sum_tile<Which>(kernel, squares, rows, block.first + row, p * width,
                                                           points.count - p * width);
                       }
                     }
                   });
                 }
               });
  double sum = 0;
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) sum += partial[chunk];
  return sum;
}

void discrepancy(const Discrepancy& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const Points<T> x(args.x, args.x_rows, args.dim), y(args.y, args.y_rows, args.dim);
    const double sum = args.weight_x * sum_pairs<Pairs::above_diagonal>(args.kernel, x, x) +
                       args.weight_y * sum_pairs<Pairs::above_diagonal>(args.kernel, y, y) -
                       args.weight_xy * sum_pairs<Pairs::all>(args.kernel, x, y);
    *static_cast<Compute<T>*>(args.value) = static_cast<Compute<T>>(2 * sum + args.diagonal);
  });
}

// ---- backward ------------------------------------------------------------------------------------------------------

// Adds Σ_j weight · k'(|z_i - p_j|²) (z_i - p_j) to the gradients of the rows z_i of a block.
template <class T>
void pull_block(const KernelSum& kernel, const RowBlock<T>& block, const Points<T>& points, Compute<T> weight,
                Compute<T>* gradient) {
  using C = Compute<T>;
  constexpr int64_t width = panel_width<C>;
  alignas(64) C slopes[tile_rows * width];
  for (int64_t p = 0; p < points.panels; ++p) {
    const int64_t left = points.count - p * width, columns = left < width ? left : width;
    for (int64_t row = 0; row < block.count; row += tile_rows) {
      const int64_t rows = points.distances(block, row, p, slopes);
      for (int64_t i = 0; i < rows * width; i += lanes<C>) {
        store(slopes + i, weight * kernel_slope<C>(kernel, load(slopes + i)));
      }
      for (int64_t r = 0; r < rows; ++r) {
        const C* z = block.rows.data + (row + r) * block.stride;
        C* to_z = gradient + (row + r) * block.stride;
        for_vectors<C>(block.stride, [&]<int N>(int64_t d) {
          Vec<C> sum[N];
          for (int v = 0; v < N; ++v) sum[v] = load(to_z + d + v * lanes<C>);
          for (int64_t j = 0; j < columns; ++j) {
            const C slope = slopes[r * width + j];
            if (slope == 0) continue;
            const C* point = points.rows.data + (p * width + j) * block.stride + d;
            for (int v = 0; v < N; ++v) {
              sum[v] += slope * (load(z + d + v * lanes<C>) - load(point + v * lanes<C>));
            }
          }
          for (int v = 0; v < N; ++v) store(to_z + d + v * lanes<C>, sum[v]);
        });
      }
    }
  }
}

// The gradient of one sample: pulled by itself and by the other.
template <class T>
void pull_sample(const KernelSum& kernel, const Points<T>& own, double own_weight, const Points<T>& other,
                 double other_weight, T* gradient) {
  using C = Compute<T>;
  const RowChunks chunks(own.count);
  const int64_t products = (own.count + other.count) * (2 * own.dim + 16 * kernel.count);
  parallel_for(chunks.count, grain_of_products(chunks.rows_per_chunk * products), [&](int64_t begin, int64_t end) {
    RowBlock<T> block(own.dim);
    const RowGradients<T> to_rows(block.stride);
    for_each_block(own.matrix, block, chunks.first(begin), chunks.first(end), [&] {
      to_rows.begin(block);
      pull_block(kernel, block, own, static_cast<C>(own_weight), to_rows.z.data);
      pull_block(kernel, block, other, static_cast<C>(other_weight), to_rows.z.data);
      to_rows.write(block, gradient);
    });
  });
}

void discrepancy_backward(const DiscrepancyBackward& args) {
  const Discrepancy& of = args.of;
  dispatch_dtype(of.dtype, [&]<class T>() {
    const Points<T> x(of.x, of.x_rows, of.dim), y(of.y, of.y_rows, of.dim);
    const double grad = static_cast<double>(*static_cast<const Compute<T>*>(args.grad));
    const double across = -4 * grad * of.weight_xy;
    if (args.grad_x != nullptr) {
      pull_sample(of.kernel, x, 4 * grad * of.weight_x, y, across, static_cast<T*>(args.grad_x));
    }
    if (args.grad_y != nullptr) {
      pull_sample(of.kernel, y, 4 * grad * of.weight_y, x, across, static_cast<T*>(args.grad_y));
    }
  });
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
