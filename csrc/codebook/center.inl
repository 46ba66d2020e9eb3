// Included by search.inl: what is taken from all codes before they are screened, and how they spread around it.

template <class C>
inline C largest_component(const C* x, int64_t dim) {
  Vec<C> top = {};
  for (int64_t k = 0; k < dim; k += lanes<C>) top = greater(abs(load_first(x + k, dim - k)), top);
  return largest_lane<C>(top);
}

// A component whose square is this often the mean leaves too little of a byte for the others.
constexpr double uneven = 25;

// Whether most of some rows have no component much longer than their others.
template <class T>
inline bool mostly_even(const T* x, int64_t rows, int64_t stride, int64_t dim) {
  using C = Compute<T>;
  const int64_t step = (rows + 63) / 64;
  int64_t drawn = 0, found = 0;
  for (int64_t r = 0; r < rows; r += step, ++drawn) {
    Vec<C> top = {}, squares = {};
    for (int64_t k = 0; k < dim; k += lanes<C>) {
      const Vec<C> part = load_first(x + r * stride + k, dim - k);
      top = greater(part * part, top);
      squares += part * part;
    }
    const double mean = static_cast<double>(sum_lanes<C>(squares)) / static_cast<double>(dim);
    found += static_cast<double>(largest_lane<C>(top)) > uneven * mean;
  }
  return 8 * found <= drawn;
}

// The mean of some codes (of cosine, normalised), if they are much shorter without it: then so is the bound. Euclidean
// distances do not change if the rows lose it too, and the other scores of a row all change by the same x · mean.
template <class C>
struct Center {
  static constexpr int64_t draws = 64;

  const Metric metric;
  const int64_t dim;
  Buffer<C> mean;  // [dim]; zeros where it would not help
  bool helps = false;
  double mean_square = 0;  // of what is left of a code, roughly
  double largest = 0;      // component of it
  double taken = 0;        // length of what the codes lose and the rows do not

  // lengths: of the codes; only cosine needs them.
  template <class T>
  Center(Metric metric_, const T* codebook, int64_t codes, int64_t dim_, const double* lengths)
      : metric(metric_), dim(dim_), mean(dim) {
    const int64_t step = (codes + draws - 1) / draws, drawn = (codes + step - 1) / step;
    const auto load_code = [&](int64_t i, int64_t k) {
      const Vec<C> c = load_first(codebook + i * dim + k, dim - k);
      return metric == Metric::cosine ? c * static_cast<C>(lengths[i] > 0 ? 1 / lengths[i] : 0) : c;
    };
    double all = 0, common = 0;
    for (int64_t k = 0; k < dim; k += lanes<C>) {
      Vec<C> sum = {}, squares = {};
      for (int64_t i = 0; i < codes; i += step) {
        sum += load_code(i, k);
        squares += load_code(i, k) * load_code(i, k);
      }
      sum *= 1 / static_cast<C>(drawn);
      store_first(mean.data + k, sum, dim - k);
      common += static_cast<double>(sum_lanes<C>(sum * sum));
      all += static_cast<double>(sum_lanes<C>(squares)) / static_cast<double>(drawn);
    }
    helps = common > all / 4 && common < tame_square<C>;
    if (helps && metric != Metric::euclidean) taken = __builtin_sqrt(common) * (1 + 0x1p-10);
    Vec<C> top = {};
    for (int64_t k = 0; k < dim; k += lanes<C>) {
      if (!helps) store_first(mean.data + k, Vec<C>{}, dim - k);
      for (int64_t i = 0; i < codes; i += step) {
        top = greater(abs(load_code(i, k) - load_first(mean.data + k, dim - k)), top);
      }
    }
    mean_square = helps ? all - common : all;
    largest = static_cast<double>(largest_lane<C>(top));
  }

  bool moves_rows() const { return helps && metric == Metric::euclidean; }

  void move(const C* x, C* moved) const {
    for (int64_t k = 0; k < dim; k += lanes<C>) {
      store_first(moved + k, load_first(x + k, dim - k) - load_first(mean.data + k, dim - k), dim - k);
    }
  }
};
