// Included by cpu.inl: exact scores where a large part of the features is wanted, and every row would read that part
// again. One feature after the other meets the rows of a block that want it, which stay in second-level cache:
//
//     first   of each row the k features with the highest bounds; the worst of their scores is its bar
//     then    the others that reach the bar: few, as bounds are tight
//
// The rows that want a feature are the bits of a word.

template <class T>
struct BlockChooser {
  using C = Compute<T>;
  static constexpr int64_t most_rows = 60;

  const Features<T>& features;
  const Best& best;
  const int64_t rows, most_features;
  const int64_t cols = features.args.cols;
  Sorter sorter{most_features};
  Buffer<uint64_t> wanted{most_features};
  Buffer<C> x{rows * cols};
  ExactRow<T> weight{features};
  // What was scored, of each row.
  Buffer<double> ranks{rows * most_features};
  Buffer<int32_t> notes{rows * most_features};
  Buffer<int64_t> counts{rows};

  // Rows from `first` on, whose candidates are among the `count` features from `position` on; place(i): of row i.
  template <class Place>
  void settle(const CandidateLists<T>& lists, int64_t first, int64_t present, int64_t position, int64_t count,
              const Place& place) const {
    C cuts[most_rows];
    const int64_t elements = present * cols;
    for (int64_t e = 0; e < elements; e += lanes<C>) {
      store_first(x.data + e, load_first(features.row(first) + e, elements - e), elements - e);
    }
    std::memset(wanted.data, 0, static_cast<size_t>(count) * sizeof(uint64_t));
    for (int64_t i = 0; i < present; ++i) {
      const Candidates<C> list = lists.of(i);
      cuts[i] = list.count > best.k ? cut_value(list, best.k, best.k + best.k / 16) : -static_cast<C>(__builtin_inf());
      want(i, list, position, [&](Vec<C> bound) { return bound >= splat(cuts[i]); });
      counts.data[i] = 0;
    }
    score(position, count);
    for (int64_t i = 0; i < present; ++i) {
      const C bar = rounded_down<C>(worst(i));
      want(i, lists.of(i), position, [&](Vec<C> bound) { return (bound < splat(cuts[i])) & ~(bound < splat(bar)); });
    }
    score(position, count);
    for (int64_t i = 0; i < present; ++i) hand_over(i, place(i));
  }

  // Row i wants those of its candidates for whose bound `chosen` holds.
  template <class Chosen>
  void want(int64_t i, const Candidates<C>& list, int64_t position, const Chosen& chosen) const {
    each_vector<C>(list.count, [&](int64_t from, uint32_t inside) {
      for (uint32_t bits = lane_bits<C>(chosen(load(list.values + from))) & inside; bits != 0; bits &= bits - 1) {
        wanted.data[list.indices[from + __builtin_ctz(bits)] - position] |= uint64_t{1} << i;
      }
    });
  }

  // Scores whatever is wanted; afterwards, nothing is. The next feature is fetched, a part with every score.
  void score(int64_t position, int64_t count) const {
    for (int64_t f = 0; f < count; ++f) {
      uint64_t left = wanted.data[f];
      if (left == 0) continue;
      wanted.data[f] = 0;
      const int32_t feature = static_cast<int32_t>(position + f);
      weight.set(features.weight(feature));
      Prefetch next{features.weight(feature + (f + 1 < count)), cols};
      for (; __builtin_popcountll(left) >= scores_at_once; next.some()) score<scores_at_once>(feature, left);
      for (; left != 0; next.some()) score<1>(feature, left);
    }
  }

  struct Prefetch {
    const char *at, *end;

    Prefetch(const T* vector, int64_t cols)
        : at(reinterpret_cast<const char*>(vector)), end(reinterpret_cast<const char*>(vector + cols)) {}
    void some() {
      constexpr int64_t line = 64, lines = 16;
      for (int i = 0; i < lines && at < end; ++i, at += line) __builtin_prefetch(at);
    }
  };

  // The first rows of those that are left.
  template <int Count>
  ISTHMUS_NOINLINE void score(int32_t position, uint64_t& left) const {
    int64_t row[Count];
    const C* vectors[Count];
    double products[Count];
    for (int j = 0; j < Count; ++j, left &= left - 1) {
      row[j] = __builtin_ctzll(left);
      vectors[j] = x.data + row[j] * cols;
    }
    exact_products<Count, double, C>(weight.x.data, vectors, cols, products);
    for (int j = 0; j < Count; ++j) add(row[j], products[j] + features.bias(position), position);
  }

  void add(int64_t i, double score, int32_t position) const {
    const double rank = best.ranking.rank(score);
    const int64_t place = i * most_features + counts.data[i];
    if (counts.data[i] == Best::broken || rank <= best.ranking.start()) return;
    ranks.data[place] = rank;
    notes.data[place] = best.ranking.note(score, position);
    counts.data[i] = score == score ? counts.data[i] + 1 : Best::broken;
  }

  // What k features of row i are known to reach.
  double worst(int64_t i) const {
    if (counts.data[i] < best.k) return best.ranking.start();
    double least = __builtin_inf();
    for (int64_t j = 0; j < counts.data[i]; ++j) {
      const double rank = ranks.data[i * most_features + j];
      least = rank < least ? rank : least;
    }
    return least;
  }

  void hand_over(int64_t i, int64_t place) const {
    const BestHeap found{ranks.data + i * most_features, notes.data + i * most_features, counts.data[i]};
    sorter.sort(found);
    const int64_t count = smaller(found.count, best.k);
    best.counts.data[place] = count;
    for (int64_t j = 0; j < count; ++j) {
      best.ranks.data[place * best.k + j] = found.values[j];
      best.notes.data[place * best.k + j] = found.notes[j];
    }
  }
};
