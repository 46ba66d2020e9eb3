// Included by cpu.inl: the features that take part, the exact score of one, and the best features of a row.

// Positions count the features that take part; group g has the positions starts[g] … starts[g + 1] - 1.
template <class T>
struct Features {
  const TopkEncode& args;
  const int64_t group_features = args.features / args.groups;
  Buffer<int32_t> ids{args.among == nullptr ? 0 : args.features};
  Buffer<int64_t> starts{args.groups + 1};

  explicit Features(const TopkEncode& args_) : args(args_) {
    int64_t count = 0;
    for (int64_t g = 0; g < args.groups; ++g) {
      starts.data[g] = args.among == nullptr ? g * group_features : count;
      for (int64_t f = g * group_features; args.among != nullptr && f < (g + 1) * group_features; ++f) {
        ids.data[count] = static_cast<int32_t>(f);
        count += args.among[f];
      }
    }
    starts.data[args.groups] = args.among == nullptr ? args.features : count;
  }

  const T* row(int64_t r) const { return static_cast<const T*>(args.x) + r * args.cols; }
  int64_t count() const { return starts.data[args.groups]; }
  ISTHMUS_INLINE int64_t id(int64_t position) const { return args.among == nullptr ? position : ids.data[position]; }
  ISTHMUS_INLINE const T* weight(int64_t position) const {
    return static_cast<const T*>(args.weight) + id(position) * args.cols;
  }
  ISTHMUS_INLINE double bias(int64_t position) const {
    return args.bias == nullptr ? 0 : static_cast<double>(load_one(static_cast<const T*>(args.bias) + id(position)));
  }
};

// Exact scores of one row: what exact_score() of core/score.h says, several features at a time.
template <class T>
struct ExactRow {
  static constexpr int at_once = lanes<double> >= 4 ? 4 : 2;

  const Features<T>& features;
  const int64_t cols = features.args.cols;
  Buffer<double> x{divide_up(cols, score_sums) * score_sums};

  void set(const T* row) const {
    for (int64_t k = 0; k < cols; k += score_sums) {
      f64v part[score_parts];
      load_doubles(row + k, cols - k, part);
      std::memcpy(x.data + k, part, sizeof part);
    }
  }

  // scores[i] = the score of the feature at positions[i].
  template <int Count>
  ISTHMUS_NOINLINE void score(const int32_t* positions, double* scores) const {
    const T* weights[Count];
    for (int i = 0; i < Count; ++i) weights[i] = features.weight(positions[i]);
    double products[Count];
    exact_products<Count, double, T>(x.data, weights, cols, products);
    for (int i = 0; i < Count; ++i) scores[i] = products[i] + features.bias(positions[i]);
  }

  void score(const int32_t* positions, int64_t count, double* scores) const {
    int64_t i = 0;
    for (; i + at_once <= count; i += at_once) score<at_once>(positions + i, scores + i);
    for (; i < count; ++i) score<1>(positions + i, scores + i);
  }
};
