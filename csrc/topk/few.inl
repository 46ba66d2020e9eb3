// Included by cpu.inl: few rows, for whom packing the weights takes longer than reading them once, as they lie.
//
// The screen is that of fine words (screen.inl), for a vector of features at a time: sums of x·w and w·w in the compute
// type, lane by lane, then over the lanes. Candidates are chosen as for many rows.

// Features next to each other, of which the first `count` exist.
template <class C>
struct Column {
  int64_t count;
  Vec<C> bias, slack, norm;

  uint32_t inside() const { return ~0u >> (32 - count); }
};

template <class T>
struct FewRows {
  using C = Compute<T>;
  // A score costs more here, by its sum over lanes. Measured at every level, from 32 components to 768.
  static constexpr int64_t most_rows = 16;
  static constexpr int size = lanes<C>, width = tile_rows == 12 ? 4 : 2;  // features at a time

  const Features<T>& features;
  const Plan& plan;
  const Best& best;
  const int64_t rows = features.args.rows, cols = features.args.cols, depth = divide_up(cols, size) * size;
  const bool magnitudes = features.args.activation == Activation::abs;
  const C slope = static_cast<C>(Fine<C>::roundings(cols) * rounding_unit<C> * outward);
  // From the root of a sum of squares to a length.
  const C enlarge = static_cast<C>(1 + 0x1p-18 + rounding_unit<C> * 2 * static_cast<double>(cols));
  Buffer<C> words{rows * depth}, lengths{rows};  // zeros behind each row

  void run() const {
    for (int64_t r = 0; r < rows; ++r) {
      C* row = words.data + r * depth;
      for (int64_t k = 0; k < depth; ++k) row[k] = 0;
      lengths.data[r] = static_cast<C>(Fine<C>::template write<true>(features.row(r), cols, row).length * outward);
    }
    parallel_for(plan.lists, 1, [&](int64_t begin, int64_t end) {
      const CandidateLists<T> lists{features, best, rows, plan.capacity};
      for (int64_t list = begin; list < end; ++list) scan(lists, list);
    });
  }

  void scan(const CandidateLists<T>& lists, int64_t list) const {
    const int64_t end = plan.begin(features, list + 1);
    const auto settle = [&](int64_t r) { lists.settle(r, r * plan.lists + list, r); };
    for (int64_t r = 0; r < rows; ++r) lists.begin(r, r * plan.lists + list);
    for (int64_t position = plan.begin(features, list); position < end; position += size) {
      Column<C> column{smaller(size, end - position), {}, {}, {}};
      for (int64_t r = 0; r < rows;) {
        Vec<C> sums[4];
        const int64_t first = r;
        r += rows - r >= 4 ? multiply<4>(position, r, column, sums) : multiply<1>(position, r, column, sums);
        for (int64_t i = first; i < r; ++i) {
          const Vec<C> bound = upper_bound(column, sums[i - first], lengths.data[i]);
          const uint32_t bits = ~lane_bits<C>(bound <= splat(lists.bars.data[i])) & column.inside();
          if (bits == 0) continue;
          lists.append(i, bound, position, bits);
          if (!lists.has_room(i, size)) settle(i);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) settle(r);
  }

  ISTHMUS_INLINE Vec<C> upper_bound(const Column<C>& column, Vec<C> sum, C length) const {
    const Vec<C> score = sum + column.bias;
    return (magnitudes ? abs(score) : score) + (column.norm * slope * length + column.slack);
  }

  // The products of `Rows` rows from r on with the features from `position` on; of the first rows, their terms, too.
  template <int Rows>
  ISTHMUS_NOINLINE int64_t multiply(int64_t position, int64_t r, Column<C>& column, Vec<C>* sums) const {
    Vec<C> products[Rows][size], squares[size];
    for (int j = 0; j < size; j += width) {
      const T* weights[width];
      Vec<C> product[width][Rows] = {}, square[width] = {};
      for (int i = 0; i < width; ++i) weights[i] = features.weight(position + smaller(j + i, column.count - 1));
      const auto step = [&](int64_t k, const auto& load_part) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int i = 0; i < width; ++i) {
          const Vec<C> w = load_part(weights[i] + k);
          __builtin_prefetch(weights[i] + k + width * cols);  // what comes next, mostly: hardware stops at each page
          square[i] += w * w;
#pragma GCC unroll 4
          for (int row = 0; row < Rows; ++row) product[i][row] += w * load(words.data + (r + row) * depth + k);
        }
      };
      int64_t k = 0;
      for (; k + size <= cols; k += size) step(k, [](const T* p) { return load(p); });
      if (k < cols) step(k, [&](const T* p) { return load_first(p, cols - k); });
#pragma GCC unroll 4
      for (int i = 0; i < width; ++i) {
        squares[j + i] = square[i];
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row) products[row][j + i] = product[i][row];
      }
    }
    for (int row = 0; row < Rows; ++row) sums[row] = sum_each(products[row]);
    if (r == 0) set_terms(position, sum_each(squares), column);
    return Rows;
  }

  // The sum over the lanes of vector i in lane i.
  static Vec<C> sum_each(Vec<C> (&vectors)[size]) {
    transpose<C>(vectors);
    Vec<C> sum = vectors[0];
#pragma GCC unroll 16
    for (int i = 1; i < size; ++i) sum += vectors[i];
    return sum;
  }

  void set_terms(int64_t position, Vec<C> square, Column<C>& column) const {
    const Vec<C> infinite = Vec<C>{} + static_cast<C>(__builtin_inf()),
                 least = Vec<C>{} + static_cast<C>(2 * least_length<C>);
    for (int64_t i = 0; i < column.count; ++i) column.bias[i] = static_cast<C>(features.bias(position + i));
    const Vec<C> size_of_bias = abs(column.bias), length = sqrt(square) * enlarge;
    const Mask<C> tame = (square < static_cast<C>(tame_square<C>)) &
                         ((size_of_bias * size_of_bias < static_cast<C>(tame_square<C>)) | (size_of_bias == infinite));
    column.norm = tame ? greater(length, least) : infinite;
    column.slack = size_of_bias == infinite ? Vec<C>{} : size_of_bias * static_cast<C>(4 * rounding_unit<C>);
  }
};
