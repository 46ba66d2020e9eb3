// Included by cpu.inl: every score above the threshold of its feature.

template <class T>
struct ThresholdSink {
  const ThresholdEncode& args;
  const BrokenRows& broken;
  const Lists<T>& lists;

  double threshold(int64_t feature) const { return args.thresholds[args.one_threshold ? 0 : feature]; }
  double offset(int64_t feature) const { return -threshold(feature); }
  Compute<T> bar() const { return 0; }

  void meet(int64_t item, int64_t row, int64_t feature, double score) const {
    if (score > threshold(feature)) {
      List<T>& list = lists.data[item];
      const int64_t place = list.grow();
      store_score(list.values + place, score);
      list.positions[place] = position_of(row, feature);
    } else if (score != score) {
      broken.add(row);
    }
  }
};

// Counts the entries of rows, then puts them there: of whole blocks, which share no row and no list.
template <class T>
struct ThresholdRows {
  const ScanPlan& plan;
  const ThresholdEncode& args;
  const BrokenRows& broken;
  const Lists<T>& lists;

  template <class F>
  void each_entry(int64_t block, F&& f) const {
    for (int64_t item = block * plan.parts; item < (block + 1) * plan.parts; ++item) {
      const List<T>& list = lists.data[item];
      for (int64_t i = 0; i < list.count; ++i) {
        const int64_t row = row_of(list.positions[i]);
        if (!broken[row]) f(row, list.values + i, feature_of(list.positions[i]));
      }
    }
  }

  template <class F>
  void each_block(F&& f) const {
    parallel_for(plan.blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) f(b, b * plan.block_rows, smaller((b + 1) * plan.block_rows, args.rows));
    });
  }

  void count() const {
    each_block([&](int64_t block, int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) args.offsets[row + 1] = broken[row];
      each_entry(block, [&](int64_t row, const T*, int64_t) { ++args.offsets[row + 1]; });
    });
    accumulate(args.offsets, args.rows);
  }

  void place(const Entries& out) const {
    T* values = static_cast<T*>(out.values);
    each_block([&](int64_t block, int64_t first, int64_t last) {
      Buffer<int64_t> next(last - first);
      for (int64_t row = first; row < last; ++row) {
        next.data[row - first] = args.offsets[row];
        if (!broken[row]) continue;
        store_score(values + args.offsets[row], __builtin_nan(""));
        out.indices[args.offsets[row]] = 0;
      }
      each_entry(block, [&](int64_t row, const T* value, int64_t feature) {
        const int64_t to = next.data[row - first]++;
        values[to] = *value;
        out.indices[to] = feature;
      });
    });
  }
};

template <class T>
void threshold_encode_rows(const ThresholdEncode& args) {
  const Scores<T> scores(args);
  const ScanPlan plan(scores);
  const BrokenRows broken(args.rows);
  const Lists<T> lists(plan.items());
  scan(scores, plan, broken, ThresholdSink<T>{args, broken, lists});
  const ThresholdRows<T> rows{plan, args, broken, lists};
  rows.count();
  rows.place(args.allocate(args.context, args.offsets[args.rows]));
}

void threshold_encode(const ThresholdEncode& args) {
  if (args.rows > 0 && args.features > 0) {
    return dispatch_dtype(args.dtype, [&]<class T>() { threshold_encode_rows<T>(args); });
  }
  for (int64_t row = 0; row <= args.rows; ++row) args.offsets[row] = 0;
  args.allocate(args.context, 0);
}
