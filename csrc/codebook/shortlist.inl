// Included by search.inl: of the groups that a screen left of one row, the few codes that float64 has to tell apart.
//
// All codes of a group are scored once more, from the vectors themselves. The compute type is enough to choose between
// codes that do not nearly tie, and takes a half or less of the time.

template <class T>
struct Shortlist {
  using C = Compute<T>;
  static constexpr int size = lanes<C>;
  static constexpr int parts = size < group_codes ? group_codes / size : 1;  // vectors of a group
  static constexpr int terms = size > group_codes ? size / group_codes : 1;  // components in a vector

  const CodeGroups<T>& all;
  const int64_t best;
  DirectBound<C> bound;
  int64_t count = 0;
  Buffer<C> row;           // zeros behind dim
  Buffer<int64_t> groups;  // [count]
  Buffer<C> uppers;        // [count, group_codes]: what their scores are at most
  Buffer<C> lowers;        // [best]: the best codes so far are at least as good, greatest first

  Shortlist(const CodeGroups<T>& all_, int64_t most_groups, int64_t best_)
      : all(all_),
        best(best_),
        row(all.dim + size),
        groups(most_groups),
        uppers(most_groups * group_codes + size),
        lowers(best) {}

  void begin(const C* x, const DirectBound<C>& of_row) {
    bound = of_row;
    count = 0;
    for (int64_t k = 0; k < all.dim; k += size) store(row.data + k, load_first(x + k, all.dim - k));
    for (int64_t i = 0; i < best; ++i) lowers.data[i] = -static_cast<C>(__builtin_inf());
  }

  C bar() const { return lowers.data[best - 1]; }

  void meet(int64_t group) {
    Vec<C> sums[parts], squares[parts];
    if (bound.metric == Metric::euclidean) {
      add_products<true>(all.numbers.data + group * group_codes * all.dim, sums, squares);
    } else {
      add_products<false>(all.numbers.data + group * group_codes * all.dim, sums, squares);
    }
    const int64_t left = all.codes - group * group_codes;
    for (int p = 0; p < parts; ++p) {
      Vec<C> score, error;
      bound.judge(sums[p], squares[p], score, error);
      const Mask<C> there = first_lanes<C>((left < group_codes ? left : group_codes) - p * size);
      store(uppers.data + count * group_codes + p * size, score + error);
      insert_lanes<C>(lowers.data, best, there ? score - error : Vec<C>{} - C(__builtin_inf()));
    }
    groups.data[count++] = group;
  }

  // (x - c)² or x·c, and c².
  template <bool Euclidean>
  ISTHMUS_NOINLINE void add_products(const C* numbers, Vec<C> (&sums)[parts], Vec<C> (&squares)[parts]) const {
    constexpr int chains = 4 / parts;
    Vec<C> sum[chains][parts] = {}, square[chains][parts] = {};
    const auto step = [&](int i, int64_t k, const auto& load_numbers) __attribute__((always_inline)) {
      const Vec<C> x = spread(row.data + k);
#pragma GCC unroll 4
      for (int p = 0; p < parts; ++p) {
        const Vec<C> c = load_numbers(numbers + k * group_codes + p * size);
        if constexpr (Euclidean) {
          sum[i][p] += (x - c) * (x - c);
        } else {
          sum[i][p] += x * c;
          square[i][p] += c * c;
        }
      }
    };
    const auto whole = [](const C* p) { return load(p); };
    int64_t k = 0;
    for (; k + chains * terms <= all.dim; k += chains * terms) {
#pragma GCC unroll 4
      for (int i = 0; i < chains; ++i) step(i, k + i * terms, whole);
    }
    for (; k + terms <= all.dim; k += terms) step(0, k, whole);
    if (k < all.dim) step(0, k, [](const C* p) { return load_first(p, group_codes); });
    for (int p = 0; p < parts; ++p) {
      sums[p] = squares[p] = Vec<C>{};
      for (int i = 0; i < chains; ++i) {
        sums[p] += sum[i][p];
        squares[p] += square[i][p];
      }
      if constexpr (terms == 2) {
        sums[p] += swap_halves(sums[p]);
        squares[p] += swap_halves(squares[p]);
      }
    }
  }

  // One component for each code.
  static ISTHMUS_INLINE Vec<C> spread(const C* x) {
    if constexpr (terms == 1) {
      return splat<C>(*x);
    } else {
      double pair;
      std::memcpy(&pair, x, sizeof pair);
      Mask<C> place;
      for (int i = 0; i < size; ++i) place[i] = i / 4 * 4 + i / group_codes;
      return __builtin_shuffle((Vec<C>)splat<double>(pair), place);
    }
  }

  static ISTHMUS_INLINE Vec<C> swap_halves(Vec<C> v) {
    Mask<C> place;
    for (int i = 0; i < size; ++i) place[i] = i ^ (size / 2);
    return __builtin_shuffle(v, place);
  }

  // One bit for each code of the i-th group that may be among the best; whatever is not a number may.
  unsigned contenders(int64_t i) const {
    const int64_t left = all.codes - groups.data[i] * group_codes;
    unsigned bits = 0;
    for (int p = 0; p < parts; ++p) {
      bits |= lane_bits(~(load(uppers.data + i * group_codes + p * size) < bar())) << (p * size);
    }
    return bits & (left < group_codes ? (1u << left) - 1 : (1u << group_codes) - 1);
  }

  // The one code that may be the best, or nobody.
  int64_t winner() const {
    int64_t code = BestCodes::nobody;
    for (int64_t i = 0; i < count; ++i) {
      const unsigned bits = contenders(i);
      if (bits == 0) continue;
      if (code != BestCodes::nobody || (bits & (bits - 1)) != 0) return BestCodes::nobody;
      code = groups.data[i] * group_codes + __builtin_ctz(bits);
    }
    return code;
  }
};
