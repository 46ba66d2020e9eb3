// Included by search.inl: how far an approximate score may be from the exact one. With ~ for what is multiplied in
// place of a vector and δ for what that leaves out, and proved under "Nearest code" in docs/numerics.md,
//
//     |s~ - s| <= slope · |c| + |x~| · |δc| + floor(c) + absolute,     slope = |δx| + γ |x|
//
// γ is the rounding of the sum, floor and absolute are the parts that depend on the code or on the row alone. For a
// group |c|, |δc| and floor are the largest of its codes: one long code spoils its own group and no other.

// Twice the number where underflow begins: what flushing one term to zero may cost.
template <class C>
constexpr double flushed = sizeof(C) == 4 ? 0x1p-125 : 0x1p-1021;
// Squares of tiny numbers vanish; the length of what vanished is less than this.
template <class C>
constexpr double least_length = sizeof(C) == 4 ? 0x1p-60 : 0x1p-500;

// How often a sum of `dim` products and an offset is rounded, at most, and then some.
inline double roundings(int64_t dim) { return 2 * (static_cast<double>(dim) + 16); }

// Makes up for the evaluation of the bound in C.
template <class C>
constexpr double raise = 1 + 64 * rounding_unit<C>;

// Lane by lane, the largest of the codes of a group.
template <class C>
struct GroupNorms {
  Vec<C> square = {}, lost = {};
  Mask<C> wild = {};

  ISTHMUS_INLINE void meet(Vec<C> its_square, Vec<C> its_lost, Mask<C> is_wild) {
    square = greater(its_square, square);
    lost = greater(its_lost, lost);
    wild |= is_wild;
  }
};

// The part of a row. That of a wild row is infinite, and so every group survives.
template <class C>
struct RowBound {
  C slope = 0, length = 0, absolute = 0;
  C rounding = 0;  // the slope of a fine screen

  RowBound() = default;
  // square = |x|², lost = |δx|² of a coarse screen; taken: the length of what the codes lost and x did not; unit: of
  // x~.
  RowBound(double square, double lost, bool coarse, int64_t dim, double taken, double unit) {
    if (!(square < tame_square<C>)) {
      absolute = static_cast<C>(__builtin_inf());
      return;
    }
    const double count = roundings(dim), enlarged = (1 + count * rounding_unit<C>)*raise<C>;
    const double whole = __builtin_sqrt(square) * enlarged;
    const double part = coarse ? __builtin_sqrt(lost) * enlarged + least_length<C> : 0;
    const double rescoring = 0x1p-53 * (square + whole * taken);
    rounding = static_cast<C>(count * rounding_unit<C> * whole * raise<C>);
    slope = static_cast<C>((part + count * rounding_unit<C> * whole) * raise<C>);
    length = static_cast<C>((whole + part > 32 * unit ? whole + part : 32 * unit) * raise<C>);
    absolute = static_cast<C>(count * (rescoring + flushed<C> * (1 + whole)) * raise<C>);
  }
};

template <class C>
struct GroupBounds {
  static constexpr int size = lanes<C>;

  const Metric metric;
  const bool coarse;
  const int64_t dim, slabs;
  Buffer<C> norms;     // [slabs, lanes]: at least |c|
  Buffer<C> losses;    // [slabs, lanes]: at least |δc|
  Buffer<C> floors;    // [slabs, lanes]
  Buffer<C> ceilings;  // [slabs, lanes]: the same, but infinite if the group holds a wild code
  Buffer<C> widest;    // [spans, 3]: the largest norm, loss and ceiling of 64 groups

  GroupBounds(Metric metric_, bool coarse_, int64_t dim_, int64_t slabs_)
      : metric(metric_),
        coarse(coarse_),
        dim(dim_),
        slabs(slabs_),
        norms(slabs * size),
        losses(slabs * size),
        floors(slabs * size),
        ceilings(slabs * size),
        widest((slabs * size / 64 + 1) * 3) {}

  void set(int64_t slab, const GroupNorms<C>& group, Vec<C> unit_loss) const {
    const C rounding = static_cast<C>(roundings(dim) * rounding_unit<C>);
    const C enlarged = (1 + 2 * rounding) * static_cast<C>(raise<C>), least = static_cast<C>(least_length<C>);
    const C underflow = static_cast<C>(roundings(dim) * flushed<C>);
    const Vec<C> norm = sqrt(group.square) * enlarged + least;
    Vec<C> floor = underflow * (1 + norm);
    if (metric == Metric::euclidean) floor += rounding * norm * norm;
    floor *= static_cast<C>(raise<C>);
    store(norms.data + slab * size, norm);
    store(losses.data + slab * size, coarse ? sqrt(group.lost) * enlarged + (least + unit_loss) : Vec<C>{});
    store(floors.data + slab * size, floor);
    store(ceilings.data + slab * size, group.wild ? Vec<C>{} + C(__builtin_inf()) : floor);
  }

  // After all slabs are set.
  void find_widest() const {
    for (int64_t first = 0; first < slabs * size; first += 64) {
      C* span = widest.data + first / 64 * 3;
      for (int i = 0; i < 3; ++i) span[i] = 0;
      for (int64_t g = first; g < slabs * size && g < first + 64; ++g) {
        if (norms.data[g] > span[0]) span[0] = norms.data[g];
        if (losses.data[g] > span[1]) span[1] = losses.data[g];
        if (ceilings.data[g] > span[2]) span[2] = ceilings.data[g];
      }
    }
  }

  ISTHMUS_INLINE C product(const RowBound<C>& row, C norm, C loss) const {
    return row.slope * norm + row.length * loss + row.absolute;
  }
  // For subtracting: of a group with a wild code, the other codes.
  ISTHMUS_INLINE C lower(const RowBound<C>& row, int64_t g) const {
    return product(row, norms.data[g], losses.data[g]) + floors.data[g];
  }
  ISTHMUS_INLINE C upper(const RowBound<C>& row, int64_t g) const {
    return product(row, norms.data[g], losses.data[g]) + ceilings.data[g];
  }
  // At least as wide as that of any of 64 groups.
  ISTHMUS_INLINE C of_span(const RowBound<C>& row, int64_t span) const {
    const C* w = widest.data + span * 3;
    return product(row, w[0], w[1]) + w[2];
  }
};

// How far the score itself may be off, computed in the compute type from the vectors as they are: what a row and its
// rounding add to E, proved under "Few rows" in docs/numerics.md:
//
//     euclidean      relative |s~| + underflow
//     inner product  relative |x| |c| + underflow (1 + |x|) (1 + |c|)
//     cosine         relative |x|     + underflow (1 + |x|) (1 + 1 / |c|)
template <class C>
struct DirectBound {
  Metric metric = Metric::euclidean;
  C relative = 0, underflow = 0;

  DirectBound() = default;
  DirectBound(Metric metric_, double square, int64_t dim) : metric(metric_) {
    const double count = 2 * roundings(dim), rounding = count * rounding_unit<C>;
    const double length = metric == Metric::euclidean ? 0 : __builtin_sqrt(square) * raise<C> + least_length<C>;
    const bool tame = square < tame_square<C>;
    relative = static_cast<C>(tame ? rounding * raise<C> * (length > 0 ? length : 1) : __builtin_inf());
    underflow = static_cast<C>(tame ? count * flushed<C> * (1 + length) : __builtin_inf());
  }

  // From sums of (x - c)² or x·c, and of c². A code whose square vanishes or could overflow gets an infinite error.
  ISTHMUS_INLINE void judge(Vec<C> sum, Vec<C> square, Vec<C>& score, Vec<C>& error) const {
    if (metric == Metric::euclidean) {
      score = -sum;
      error = relative * sum + underflow;
      return;
    }
    const Vec<C> length = sqrt(square), infinite = Vec<C>{} + C(__builtin_inf());
    const Mask<C> tame = square < static_cast<C>(tame_square<C>);
    if (metric == Metric::inner_product) {
      score = sum;
      const Vec<C> longer = length * static_cast<C>(raise<C>) + static_cast<C>(least_length<C>);
      error = tame ? relative * longer + underflow * (1 + longer) : infinite;
    } else {
      const Vec<C> inverse = 1 / length;
      score = sum * inverse;
      const Mask<C> held = tame & (square > static_cast<C>(flushed<C> / rounding_unit<C>));
      error = held ? relative + underflow * (1 + 2 * inverse) : infinite;
    }
  }
};
