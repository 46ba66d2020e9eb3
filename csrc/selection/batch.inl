// Included by cpu.inl: the largest scores of a whole batch.
//
// A sample tells what score the last of them will have, about. What is above is collected in lists, one for each item
// of work. When they hold twice as many entries as are wanted, they are cut down to the best, which raises what is
// asked of later ones: a sample that misleads costs time, not memory. Where the guess was too high, the search begins
// again with a lower one.

// The last entry that is kept, in the order of falling scores, then of positions.
struct Limit {
  double score;
  int64_t position;

  bool keeps(double its_score, int64_t its_position) const {
    return its_score > score || (its_score == score && its_position <= position);
  }
};

// The position of the last of so many entries of this score, in the order of positions.
inline int64_t find_last_tie(const List<double>* lists, int64_t num_lists, double score, int64_t wanted) {
  int64_t low = 0, high = INT64_MAX;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    int64_t found = 0;
    for (int64_t l = 0; l < num_lists; ++l) {
      const List<double>& list = lists[l];
      for (int64_t i = 0; i < list.count; ++i) found += (list.values[i] == score) & (list.positions[i] <= middle);
    }
    if (found >= wanted) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// A limit that keeps at least `wanted` entries of the lists, which hold more, and at most `most`; of the lowest
// positions where scores are equal. Bisection over all numbers, in which ever fewer scores take part.
inline Limit find_limit(const List<double>* lists, int64_t num_lists, int64_t wanted, int64_t most) {
  int64_t count = 0;
  for (int64_t l = 0; l < num_lists; ++l) count += lists[l].count;
  const Buffer<double> scores(count);
  count = 0;
  for (int64_t l = 0; l < num_lists; count += lists[l++].count) {
    for (int64_t i = 0; i < lists[l].count; ++i) scores.data[count + i] = lists[l].values[i];
  }
  int64_t low = to_ordered(-__builtin_inf()), high = to_ordered(__builtin_inf()), above = 0;
  while (low < high) {
    const int64_t middle = (low | high) - ((low ^ high) >> 1);  // rounded up, without overflow
    const double score = from_ordered<double>(middle);
    int64_t reached = 0, kept = 0;
    for (int64_t i = 0; i < count; ++i) reached += scores.data[i] >= score;
    const bool is_low = above + reached >= wanted;
    if (is_low && above + reached <= most) return {score, INT64_MAX};
    for (int64_t i = 0; i < count; ++i) {
      const double candidate = scores.data[i];
      scores.data[kept] = candidate;
      kept += (candidate >= score) == is_low;
    }
    count = kept;
    if (is_low) {
      low = middle;
    } else {
      high = middle - 1;
      above += reached;
    }
  }
  const double score = from_ordered<double>(low);
  return {score, find_last_tie(lists, num_lists, score, wanted - above)};
}

// A number of the compute type that is less than `value`, and hardly so. It is finite above: an infinite bound, behind
// which something that is not a number may hide, always exceeds it.
template <class C>
inline C number_below(double value) {
  constexpr C most = sizeof(C) == 4 ? C(__FLT_MAX__) : C(__DBL_MAX__),
              least = sizeof(C) == 4 ? C(__FLT_MIN__) : C(__DBL_MIN__);
  if (value > static_cast<double>(most)) return most;
  const C nearest = static_cast<C>(value);
  if (static_cast<double>(nearest) < value) return nearest;
  return nearest == 0 ? -least : from_ordered<C>(to_ordered(nearest) - 1);
}

inline void acquire(bool* lock) {
  while (__atomic_test_and_set(lock, __ATOMIC_ACQUIRE)) {
  }
}
inline void release(bool* lock) { __atomic_clear(lock, __ATOMIC_RELEASE); }

// The sink of a scan, which all threads share.
template <class C>
struct BatchSearch {
  const int64_t wanted;
  const double floor;  // what is not above is the same for all, and not collected
  const double guess;  // nor is what is below this
  const BrokenRows& broken;
  const Lists<double>& lists;
  // The greatest score that `wanted` entries are known to reach, or the guess.
  mutable double least = guess;
  const int64_t most_found = 2 * wanted + 1024;
  mutable int64_t found = 0;  // entries in all lists
  mutable bool cutting = false;
  Buffer<bool> appending{lists.count};  // a lock for each list

  BatchSearch(int64_t wanted_, double floor_, double guess_, const BrokenRows& broken_, const Lists<double>& lists_)
      : wanted(wanted_), floor(floor_), guess(guess_), broken(broken_), lists(lists_) {
    std::memset(appending.data, 0, static_cast<size_t>(lists.count));
  }

  double current_least() const {
    double value;
    __atomic_load(&least, &value, __ATOMIC_RELAXED);
    return value;
  }

  double offset(int64_t) const { return 0; }

  // What equals the floor is not wanted; what equals the least score may be.
  C bar() const {
    const double value = current_least();
    return value > floor ? number_below<C>(value) : static_cast<C>(floor);
  }

  void meet(int64_t item, int64_t row, int64_t feature, double score) const {
    if (score > floor && score >= current_least()) {
      if (append(item, score, position_of(row, feature)) >= most_found) cut();
    } else if (score != score) {
      broken.add(row);
    }
  }

  // Returns how many entries there are.
  int64_t append(int64_t item, double score, int64_t position) const {
    acquire(appending.data + item);
    List<double>& list = lists.data[item];
    const int64_t place = list.grow();
    list.values[place] = score;
    list.positions[place] = position;
    const int64_t total = __atomic_add_fetch(&found, 1, __ATOMIC_RELAXED);
    release(appending.data + item);
    return total;
  }

  // Down to the best of all lists.
  ISTHMUS_NOINLINE void cut() const {
    acquire(&cutting);
    for (int64_t l = 0; l < lists.count; ++l) acquire(appending.data + l);
    if (found >= most_found) {  // else another thread was faster
      const Limit limit = find_limit(lists.data, lists.count, wanted, wanted + wanted / 4);
      found = 0;
      for (int64_t l = 0; l < lists.count; ++l) found += keep(lists.data[l], limit);
      if (limit.score > current_least()) __atomic_store(&least, &limit.score, __ATOMIC_RELAXED);
    }
    for (int64_t l = 0; l < lists.count; ++l) release(appending.data + l);
    release(&cutting);
  }

  // Returns how many are left, which take no more memory than they need.
  static int64_t keep(List<double>& list, const Limit& limit) {
    int64_t kept = 0;
    for (int64_t i = 0; i < list.count; ++i) {
      const double score = list.values[i];
      const int64_t position = list.positions[i];
      list.values[kept] = score;
      list.positions[kept] = position;
      kept += limit.keeps(score, position);
    }
    list.count = kept;
    list.fit();
    return kept;
  }
};

// The result: of each row its entries, then what fills up.
template <class T>
struct BatchRows {
  const BatchTopkEncode& args;
  const BatchSearch<Compute<T>>& search;
  const Limit limit = find_last();
  T* const values = static_cast<T*>(args.values);
  Buffer<int64_t> found{args.rows};    // entries of each row
  Buffer<int64_t> fillers{args.rows};  // and how many at the floor

  Limit find_last() const {
    if (search.wanted <= 0) return {__builtin_inf(), -1};
    if (search.found <= search.wanted) return {-__builtin_inf(), INT64_MAX};
    return find_limit(search.lists.data, search.lists.count, search.wanted, search.wanted);
  }

  template <class F>
  void each_entry(F&& f) const {
    for (int64_t l = 0; l < search.lists.count; ++l) {
      const List<double>& list = search.lists.data[l];
      for (int64_t i = 0; i < list.count; ++i) {
        const int64_t position = list.positions[i];
        if (limit.keeps(list.values[i], position)) f(row_of(position), feature_of(position), list.values[i]);
      }
    }
  }

  // Returns the smallest score that was selected.
  double count() const {
    double lowest = __builtin_inf();
    for (int64_t row = 0; row < args.rows; ++row) found.data[row] = fillers.data[row] = 0;
    int64_t left = args.entries;
    each_entry([&](int64_t row, int64_t, double score) {
      ++found.data[row];
      --left;
      if (score < lowest) lowest = score;
    });
    // One entry for each broken row, the floor elsewhere, at last all there is of the broken rows.
    const auto give = [&](bool to_broken, int64_t most, const Buffer<int64_t>& to) {
      for (int64_t row = 0; row < args.rows && left > 0; ++row) {
        if (search.broken[row] != to_broken) continue;
        const int64_t given = smaller(most - found.data[row], left);
        to.data[row] += given;
        left -= given;
        if (given > 0 && !to_broken) lowest = search.floor;
      }
    };
    give(true, 1, found);
    give(false, args.features, fillers);
    give(true, args.features, found);
    for (int64_t row = 0; row < args.rows; ++row) args.offsets[row + 1] = found.data[row] + fillers.data[row];
    accumulate(args.offsets, args.rows);
    return lowest;
  }

  void set(int64_t place, double value, int64_t feature) const {
    store_score(values + place, value);
    args.indices[place] = feature;
  }

  // A row's entries stand at its end; the lowest features that are not among them move in, in order.
  void fill(int64_t row) const {
    int64_t place = args.offsets[row], next = place + fillers.data[row];
    for (int64_t feature = 0; place < next; ++feature) {
      if (next < args.offsets[row + 1] && args.indices[next] == feature) {
        values[place] = values[next];
        args.indices[place++] = args.indices[next++];
      } else {
        set(place++, search.floor, feature);
      }
    }
  }

  void write() const {
    store_score(static_cast<Compute<T>*>(args.threshold), count());
    Buffer<int64_t> next(args.rows);
    for (int64_t row = 0; row < args.rows; ++row) {
      next.data[row] = args.offsets[row] + fillers.data[row];
      for (int64_t i = next.data[row]; search.broken[row] && i < args.offsets[row + 1]; ++i) {
        set(i, __builtin_nan(""), 0);
      }
    }
    each_entry([&](int64_t row, int64_t feature, double score) { set(next.data[row]++, score, feature); });
    for (int64_t row = 0; row < args.rows; ++row) {
      if (fillers.data[row] > 0) fill(row);
    }
  }
};

// A score that more than `wanted` entries reach, probably: from a sample of rows and features. Each attempt guesses
// lower.
template <class T>
double guess_least(const Scores<T>& scores, int64_t wanted, int attempt, double floor) {
  constexpr int64_t most_rows = 128, most_features = 512, least_rank = 64;
  const int64_t rows = smaller(scores.rows, most_rows), features = smaller(scores.features, most_features);
  const double share = static_cast<double>(rows) / static_cast<double>(scores.rows) * static_cast<double>(features) /
                       static_cast<double>(scores.features);
  const int64_t rank = larger(least_rank, static_cast<int64_t>(1.5 * share * static_cast<double>(wanted)))
                       << (4 * attempt);
  if (share > 0.25 || rank >= rows * features) return floor;
  const Lists<double> sample(rows);
  parallel_for(rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t f = 0; f < features; ++f) {
        const double score = scores.at(scores.rows * r / rows, scores.features * f / features);
        List<double>& list = sample.data[r];
        const int64_t place = list.grow();
        list.values[place] = score == score ? score : floor;
        list.positions[place] = position_of(r, f);
      }
    }
  });
  const double guess = find_limit(sample.data, rows, rank, rank + rank / 4).score;
  return guess > floor ? guess : floor;
}

template <class T>
void batch_topk_encode_rows(const BatchTopkEncode& args) {
  const Scores<T> scores(args);
  const ScanPlan plan(scores);
  const double floor = args.activation == Activation::relu ? 0 : -__builtin_inf();
  const BrokenRows broken(args.rows);
  int64_t known = 0;
  for (int attempt = 0;;) {
    const Lists<double> lists(plan.items());
    const int64_t wanted = args.entries - known;
    const BatchSearch<Compute<T>> search{wanted, floor, guess_least(scores, wanted, attempt, floor), broken, lists};
    if (wanted > 0) scan(scores, plan, broken, search);
    if (broken.count() > known) {
      // Broken rows must not compete. They are found on the way: then, and only then, the batch is searched again.
      known = broken.count();
    } else if (search.guess > floor && search.found < wanted) {
      ++attempt;
    } else {
      return BatchRows<T>{args, search}.write();
    }
  }
}

void batch_topk_encode(const BatchTopkEncode& args) {
  if (args.entries > 0) {
    return dispatch_dtype(args.dtype, [&]<class T>() { batch_topk_encode_rows<T>(args); });
  }
  for (int64_t row = 0; row <= args.rows; ++row) args.offsets[row] = 0;
  dispatch_dtype(args.dtype,
                 [&]<class T>() { store_score(static_cast<Compute<T>*>(args.threshold), __builtin_inf()); });
}
