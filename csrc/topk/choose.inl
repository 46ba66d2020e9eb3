// Included by cpu.inl: the best features of a row, from exact scores.

// Ranked by score; of equals, the lowest position first. With Activation::abs the rank is |score|, and a feature of
// negative score is noted as ~position.
struct Ranking {
  const Activation activation;

  // What a rank has to exceed before there are others: not a number if nothing.
  double start() const { return activation == Activation::relu ? 0 : __builtin_nan(""); }
  double rank(double score) const { return activation == Activation::abs && score < 0 ? -score : score; }
  int32_t note(double score, int32_t position) const {
    return activation == Activation::abs && score < 0 ? ~position : position;
  }
  static int32_t position(int32_t note) { return note < 0 ? ~note : note; }
  static double score(double rank, int32_t note) { return note < 0 ? -rank : rank; }
};

// The worst entry is the root.
struct WorstFirst {
  ISTHMUS_INLINE static bool before(double rank, int32_t note, double other, int32_t other_note) {
    return rank < other || (rank == other && Ranking::position(note) > Ranking::position(other_note));
  }
};
using BestHeap = Heap<double, WorstFirst>;

// The best k features so far, at each of several places: one for a row and a list of features.
struct Best {
  static constexpr int64_t broken = -1;  // the count of a place at which a NaN was met

  const int64_t places, k;
  const Ranking ranking;
  Buffer<double> ranks;    // [places, k]
  Buffer<int32_t> notes;   // [places, k]
  Buffer<int64_t> counts;  // [places]

  Best(int64_t places_, int64_t k_, Activation activation)
      : places(places_), k(k_), ranking{activation}, ranks(places * k), notes(places * k), counts(places) {
    clear();
  }

  void clear() const { std::memset(counts.data, 0, static_cast<size_t>(places) * sizeof(int64_t)); }

  BestHeap heap(int64_t place) const { return {ranks.data + place * k, notes.data + place * k, counts.data[place]}; }

  bool is_broken(int64_t place) const { return counts.data[place] == broken; }

  // No rank below it is among the best; nor is one equal to it, at a later position than all before.
  double bar(int64_t place) const { return counts.data[place] == k ? ranks.data[place * k] : ranking.start(); }

  void offer(int64_t place, double score, int32_t position) const {
    if (score != score || is_broken(place)) {
      counts.data[place] = broken;
      return;
    }
    const double rank = ranking.rank(score);
    const int32_t note = ranking.note(score, position);
    BestHeap best = heap(place);
    if (best.count < k) {
      if (!(rank <= ranking.start())) best.push(rank, note);
      counts.data[place] = best.count;
    } else if (WorstFirst::before(best.values[0], best.notes[0], rank, note)) {
      best.sift_down(0, rank, note);
    }
  }
};

// The greatest number of type C that is not above the value.
template <class C>
inline C rounded_down(double value) {
  const C nearest = static_cast<C>(value);
  return static_cast<double>(nearest) > value ? from_ordered<C>(to_ordered(nearest) - 1) : nearest;
}

// Scores what a screen has let pass, as little of it as decides. One for each thread.
template <class T>
struct Chooser {
  using C = Compute<T>;
  static constexpr int64_t few = 8, at_once = ExactRow<T>::at_once;

  const Features<T>& features;
  const Best& best;
  const int64_t capacity;
  ExactRow<T> row{features};
  Buffer<C> bounds{capacity + lanes<C>};
  Buffer<int32_t> positions{capacity + lanes<C>};

  // candidates: upper bounds of ranks, and positions; they are used up. The most promising are scored first, until no
  // other reaches the bar.
  void settle(int64_t place, const T* x, Candidates<C> candidates) const {
    if (candidates.count == 0 || best.is_broken(place)) return;
    row.set(x);
    while (candidates.count > 0) {
      const int64_t wanted = larger(few, smaller(best.k, candidates.count / 8));
      const C cut =
          candidates.count <= wanted ? -static_cast<C>(__builtin_inf()) : cut_value(candidates, wanted, 2 * wanted);
      score(place, candidates, cut);
      keep(candidates, rounded_down<C>(best.bar(place)), cut);
    }
  }

  // Those with at least this bound.
  void score(int64_t place, const Candidates<C>& candidates, C cut) const {
    Candidates<C> list{bounds.data, positions.data, 0};
    each_vector<C>(candidates.count, [&](int64_t i, uint32_t inside) {
      const Vec<C> bound = load(candidates.values + i);
      list.append(bound, load_indices<C>(candidates.indices + i), lane_bits<C>(bound >= splat(cut)) & inside);
    });
    double scores[at_once];
    for (int64_t i = 0; i < list.count; i += at_once) {
      const int64_t now = smaller(at_once, list.count - i);
      row.score(list.indices + i, now, scores);
      for (int64_t j = 0; j < now; ++j) best.offer(place, scores[j], list.indices[i + j]);
    }
  }

  // Of the others, those that reach the bar.
  void keep(Candidates<C>& candidates, C bar, C cut) const {
    Candidates<C> kept{candidates.values, candidates.indices, 0};
    each_vector<C>(candidates.count, [&](int64_t i, uint32_t inside) {
      const Vec<C> bound = load(candidates.values + i);
      const uint32_t bits = lane_bits<C>(bound < splat(cut)) & ~lane_bits<C>(bound < splat(bar));
      kept.append(bound, load_indices<C>(candidates.indices + i), bits & inside);
    });
    candidates = kept;
  }
};

// Upper bounds that passed the bars of some rows. One for each thread.
template <class T>
struct CandidateLists {
  using C = Compute<T>;

  const Features<T>& features;
  const Best& best;
  const int64_t rows, capacity, stride = capacity + lanes<C>;
  Chooser<T> chooser{features, best, capacity};
  Buffer<C> bars{rows};
  Buffer<int64_t> counts{rows};
  Buffer<C> bounds{rows * stride};
  Buffer<int32_t> positions{rows * stride};

  void begin(int64_t i, int64_t place) const {
    bars.data[i] = rounded_down<C>(best.bar(place));
    counts.data[i] = 0;
  }

  // A vector of bounds of features from `position` on, to row i. What is not a number is above everything.
  ISTHMUS_INLINE void append(int64_t i, Vec<C> bound, int64_t position, uint32_t bits) const {
    Candidates<C> list = of(i);
    list.append(bound == bound ? bound : Vec<C>{} + static_cast<C>(__builtin_inf()),
                indices_from<C>(static_cast<int32_t>(position)), bits);
    counts.data[i] = list.count;
  }

  bool has_room(int64_t i, int64_t more) const { return counts.data[i] + more <= capacity; }
  Candidates<C> of(int64_t i) const { return {bounds.data + i * stride, positions.data + i * stride, counts.data[i]}; }

  ISTHMUS_NOINLINE void settle(int64_t i, int64_t place, int64_t row) const {
    chooser.settle(place, features.row(row), of(i));
    begin(i, place);
  }
};
