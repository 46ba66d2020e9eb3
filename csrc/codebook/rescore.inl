// Included by search.inl: float64 scores of eight codes at a time, and the best of them.
//
// Eight lanes of float64 at every level, the same operations in the same order, no product fused into a sum: the same
// bits everywhere.

// As many numbers as there are lanes of float64.
ISTHMUS_INLINE f64v load_double(const double* p) { return load(p); }
ISTHMUS_INLINE f64v load_double(const float* p) {
#if defined(__AVX512F__)
  return (f64v)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#else
  typedef float Part __attribute__((vector_size(vector_bytes / 2)));
  Part part;
  std::memcpy(&part, p, sizeof part);
  return __builtin_convertvector(part, f64v);
#endif
}

template <class C>
inline void copy_double(const C* x, int64_t dim, double* copy) {
  int64_t k = 0;
  for (; k + lanes<double> <= dim; k += lanes<double>) store(copy + k, load_double(x + k));
  for (; k < dim; ++k) copy[k] = static_cast<double>(x[k]);
}

template <class C>
inline double squared_length(const C* x, int64_t dim) {
  constexpr int64_t chains = 4, step = chains * lanes<double>;
  f64v squares[chains] = {};
  int64_t k = 0;
  for (; k + step <= dim; k += step) {
#pragma GCC unroll 4
    for (int i = 0; i < chains; ++i) {
      const f64v part = load_double(x + k + i * lanes<double>);
      squares[i] += part * part;
    }
  }
  for (; k + lanes<double> <= dim; k += lanes<double>) squares[0] += load_double(x + k) * load_double(x + k);
  double sum = sum_lanes<double>((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; k < dim; ++k) sum += static_cast<double>(x[k]) * static_cast<double>(x[k]);
  return sum;
}

constexpr int group_codes = 8;
constexpr int group_parts = group_codes / lanes<double>;
// Groups come in slabs, one for each lane of the screen.
template <class C>
constexpr int64_t slab_codes = group_codes * lanes<C>;

// sums[j] = Σ_k term(k, codes[k][j]), even and odd k apart: two short chains of additions instead of a long one.
template <class C, class Term>
ISTHMUS_INLINE void sum_group(const C* codes, int64_t dim, Term term, f64v (&sums)[group_parts]) {
  f64v odd[group_parts];
#pragma GCC unroll 8
  for (int p = 0; p < group_parts; ++p) sums[p] = odd[p] = f64v{};
  int64_t k = 0;
  for (; k + 1 < dim; k += 2, codes += 2 * group_codes) {
#pragma GCC unroll 8
    for (int p = 0; p < group_parts; ++p) {
      sums[p] += rounded(term(k, load_double(codes + p * lanes<double>)));
      odd[p] += rounded(term(k + 1, load_double(codes + group_codes + p * lanes<double>)));
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < group_parts; ++p) {
    if (k < dim) sums[p] += rounded(term(k, load_double(codes + p * lanes<double>)));
    sums[p] += odd[p];
  }
}

// The best codes of a row so far, best first: greater scores, then lower indices; what is not a number comes last.
struct BestCodes {
  static constexpr int64_t nobody = INT64_MAX;

  double* scores;
  int64_t* indices;
  int64_t count;

  void clear() const {
    for (int64_t i = 0; i < count; ++i) {
      scores[i] = __builtin_nan("");
      indices[i] = nobody;
    }
  }

  static bool precedes(double score, int64_t index, double other, int64_t other_index) {
    if (score > other) return true;
    if (score < other) return false;
    const bool number = score == score, other_number = other == other;
    return number == other_number ? index < other_index : number;
  }

  void meet(double score, int64_t index) const {
    if (!precedes(score, index, scores[count - 1], indices[count - 1])) return;
    int64_t place = count - 1;
    for (; place > 0 && precedes(score, index, scores[place - 1], indices[place - 1]); --place) {
      scores[place] = scores[place - 1];
      indices[place] = indices[place - 1];
    }
    scores[place] = score;
    indices[place] = index;
  }

  // The short way where one code is wanted; false if the group has no score that is finite.
  ISTHMUS_INLINE bool meet_largest(const f64v (&group)[group_parts], int64_t first) const {
    f64v top = f64v{} - __builtin_inf();
#pragma GCC unroll 8
    for (int p = 0; p < group_parts; ++p) top = greater(group[p], top);
    const double largest = largest_lane<double>(top);
    if (!(largest > -__builtin_inf())) return false;
    if (largest < scores[0] || (largest == scores[0] && indices[0] < first)) return true;
    unsigned equal = 0;
#pragma GCC unroll 8
    for (int p = 0; p < group_parts; ++p) equal |= lane_bits(group[p] == largest) << (p * lanes<double>);
    scores[0] = largest;
    indices[0] = first + __builtin_ctz(equal);
    return true;
  }

  // A whole group, in any order of groups.
  ISTHMUS_INLINE void meet_group(const f64v (&group)[group_parts], int64_t first, int64_t left) const {
    if (count == 1 && left >= group_codes && meet_largest(group, first)) return;
    unsigned better = 0;
#pragma GCC unroll 8
    for (int p = 0; p < group_parts; ++p) better |= lane_bits(group[p] >= scores[count - 1]) << (p * lanes<double>);
    if (scores[count - 1] != scores[count - 1]) better = ~0u;  // nobody yet, or not a number
    better &= left < group_codes ? (1u << left) - 1 : (1u << group_codes) - 1;
    for (; better != 0; better &= better - 1) {
      const int j = __builtin_ctz(better);
      meet(group[j / lanes<double>][j % lanes<double>], first + j);
    }
  }
};

// Groups of eight codes [dim, group_codes], packed and scored.
struct GroupScorer {
  const Metric metric;
  const int64_t dim;

  // The codes from `first` on, of which `left` exist. lengths: [group_codes]; of cosine only.
  template <class T>
  void pack(const T* first, int64_t left, Compute<T>* group, double* lengths) const {
    pack_rows<group_codes>(first, dim, left < group_codes ? left : group_codes, dim, group);
    if (metric != Metric::cosine) return;
    f64v squares[group_parts];
    sum_group(group, dim, [](int64_t, f64v c) { return c * c; }, squares);
    for (int p = 0; p < group_parts; ++p) store(lengths + p * lanes<double>, sqrt(squares[p]));
  }

  // Codes first, first + 1, …, of which `left` exist, meet the best of the row x.
  template <class C>
  ISTHMUS_NOINLINE void meet(const double* x, const C* group, const double* lengths, int64_t first, int64_t left,
                             const BestCodes& best) const {
    f64v sums[group_parts];
    if (metric == Metric::euclidean) {
      sum_group(group, dim, [&](int64_t k, f64v c) { return (x[k] - c) * (x[k] - c); }, sums);
    } else {
      sum_group(group, dim, [&](int64_t k, f64v c) { return x[k] * c; }, sums);
    }
    for (int p = 0; p < group_parts; ++p) {
      if (metric == Metric::euclidean) sums[p] = -sums[p];
      if (metric == Metric::cosine) {
        const f64v length = load(lengths + p * lanes<double>);
        sums[p] = length == 0 ? sums[p] : sums[p] / length;
      }
    }
    best.meet_group(sums, first, left);
  }
};

// The whole codebook in such groups.
template <class T>
struct CodeGroups {
  using C = Compute<T>;
  const GroupScorer scorer;
  const T* const codebook;
  const int64_t codes, dim, groups;
  Buffer<C> numbers;       // [groups, dim, group_codes]
  Buffer<double> lengths;  // [groups, group_codes]; of cosine only

  CodeGroups(Metric metric, const T* codebook_, int64_t codes_, int64_t dim_)
      : scorer{metric, dim_},
        codebook(codebook_),
        codes(codes_),
        dim(dim_),
        groups((codes + group_codes - 1) / group_codes),
        numbers(groups * dim * group_codes),
        lengths(metric == Metric::cosine ? groups * group_codes : 0) {
    parallel_for(groups, grain_of(group_codes * dim), [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const int64_t first = g * group_codes;
        scorer.pack(codebook + first * dim, codes - first, numbers.data + first * dim, lengths.data + first);
      }
    });
  }

  // The codes of group g meet the best of the row x.
  void rescore(const double* x, int64_t g, const BestCodes& best) const {
    const int64_t first = g * group_codes;
    scorer.meet(x, numbers.data + first * dim, lengths.data + first, first, codes - first, best);
  }
};
