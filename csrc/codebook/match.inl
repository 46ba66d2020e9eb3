// Included by cpu.inl: the best code of each row and the best row of each code, from one screen.
//
// Rows are searched in blocks, as in lookup.inl. Each register tile of scores, of six rows, is also looked at from the
// side of its codes, for each of which the rows are in the order of
//
//     t = gain(row) · s + shift(row)      euclidean: s - |x|²/2,  cosine: (s + x·m) / |x|,  inner product: s + x·m
//
// with m the center that the codes lost and the rows did not.
//
//     screen    a code has a bar, the greatest t~ - E so far. A tile whose greatest t~ + E is below does not hold its
//               best row. The bars rise fast: of n tiles in any order but the worst, some log n reach them
//     queue     the pairs of tile and code that do
//     rescore   those that reach the final bars, in float64 (rescore.inl): how the bars rose does not matter
//
// No score is stored: a thread has a bar, a best row and eight places in the queue for each code, 120 bytes in float32.

// The part of E that belongs to a tile: of RowBound, the worst of its rows.
template <class C>
struct TileBound {
  C slope = 0, length = 0, absolute = 0, gain = 0;

  // A rounded gain adds to the slope of the row, a rounded shift to what is absolute.
  void meet(const RowBound<C>& row, C its_gain, C of_shift) {
    raise_to(slope, (row.slope + row.rounding) * its_gain);
    raise_to(length, row.length * its_gain);
    raise_to(absolute, row.absolute * its_gain + of_shift);
    raise_to(gain, its_gain);
  }

  // What is not a number stays.
  static void raise_to(C& most, C value) {
    if (!(value <= most)) most = value;
  }
};

// The best rows of all codes, among those that one thread searches.
template <class T>
struct BestRows {
  using C = Compute<T>;
  static constexpr int size = lanes<C>;
  static constexpr int64_t max_rows = BlockSearch<T>::max_rows, max_tiles = max_rows / tile_height;

  struct Pair {
    int32_t tile, code;
    C score;  // no row of the tile has a greater one
  };

  const PackedCodes<T>& packed;
  const Panels<C>& panels = packed.panels;
  const int64_t codes = panels.codes, dim = panels.dim;
  const T* const x;  // [rows, dim]
  const int64_t rows;
  const int64_t room = 8 * codes;
  Buffer<C> leading;        // [codes]: the greatest t~ + E in the queue
  Buffer<C> bars;           // [slabs, group_codes, lanes], as codes lie in slabs; infinite where there is none
  Buffer<Pair> queue;       // [room and a tile]
  Buffer<double> scores;    // [codes]
  Buffer<int64_t> indices;  // [codes]
  Buffer<C> moved;          // a row
  Buffer<C> groups;         // [max_tiles, dim, group_codes]: rows as they are rescored
  Buffer<double> lengths;   // [max_tiles, group_codes]; of cosine only
  Buffer<C> widened;        // a code
  Buffer<double> code;
  int64_t grouped[max_tiles];     // which tile
  int64_t queued = 0, first = 0;  // row of the block
  C gains[max_rows], shifts[max_rows];
  TileBound<C> bounds[max_tiles];

  BestRows(const PackedCodes<T>& packed_, const T* x_, int64_t rows_)
      : packed(packed_),
        x(x_),
        rows(rows_),
        leading(codes),
        bars(panels.slabs * slab_codes<C>),
        queue(room + slab_codes<C>),
        scores(codes),
        indices(codes),
        moved(dim),
        groups(max_tiles * dim * group_codes),
        lengths(max_tiles * group_codes),
        widened(dim),
        code(dim) {
    constexpr C infinite = static_cast<C>(__builtin_inf());
    for (int64_t i = 0; i < panels.slabs * slab_codes<C>; ++i) bars.data[i] = infinite;
    for (int64_t c = 0; c < codes; ++c) {
      bar(c) = -infinite;
      best(c).clear();
    }
    for (int64_t& tile : grouped) tile = -1;
  }

  C& bar(int64_t c) const {
    const int64_t in_slab = c % slab_codes<C>;
    return bars.data[c - in_slab + in_slab % group_codes * size + in_slab / group_codes];
  }
  BestCodes best(int64_t c) const { return {scores.data + c, indices.data + c, 1}; }

  // ---- screen: what BlockSearch tells its visitor ----

  // The rows of the block, which is to begin at row `first`.
  void expect(const C* block, int64_t stride, int64_t count, const RowBound<C>* of_rows) {
    for (TileBound<C>& bound : bounds) bound = {};
    for (int64_t r = 0; r < count; ++r) {
      const double of_shift = order(r, block + r * stride);
      bounds[r / tile_height].meet(of_rows[r], gains[r], static_cast<C>(of_shift));
    }
  }

  // Sets gain and shift of a row, and returns how far the shift, or a gain that underflow spoils, may be wrong.
  double order(int64_t r, const C* row) {
    const Center<C>& center = panels.center;
    const double rounding = roundings(dim) * rounding_unit<C>;
    gains[r] = 1;
    if (panels.metric == Metric::euclidean) {
      if (center.helps) center.move(row, moved.data);
      const double square = squared_length(center.helps ? moved.data : row, dim);
      shifts[r] = static_cast<C>(-0.5 * square);
      return rounding * square;
    }
    const double square = squared_length(row, dim), length = __builtin_sqrt(square);
    double gain = 1, common = 0;
    if (panels.metric == Metric::cosine && length > 0) gain = 1 / length;
    for (int64_t k = 0; center.helps && k < dim; ++k) {
      common += static_cast<double>(row[k]) * static_cast<double>(center.mean.data[k]);
    }
    gains[r] = static_cast<C>(gain);
    shifts[r] = static_cast<C>(gain * common);
    const bool spoilt = gain != 1 && length < least_length<double>;
    return spoilt ? __builtin_inf() : rounding * length * center.taken * gain;
  }

  // A register tile, as Panels::meet shows it.
  struct View {
    BestRows& all;
    const int64_t row, slab;
    const int vector;

    template <int Rows, int Vectors, class Place>
    ISTHMUS_INLINE void meet(const Place& place) const {
      Vec<C> tops[Vectors];
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const C gain = all.gains[row + r], shift = all.shifts[row + r];
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; ++v) {
          const Vec<C> t = place(r, v, gain, shift);
          tops[v] = r == 0 ? t : greater(t, tops[v]);
        }
      }
      const TileBound<C>& tile = all.bounds[row / tile_height];
      const GroupBounds<C>& groups = all.panels.bounds;
      const Vec<C> shared = tile.slope * load(groups.norms.data + slab * size) +
                            (tile.length * load(groups.losses.data + slab * size) + tile.absolute);
      const Vec<C> upper = shared + tile.gain * load(groups.ceilings.data + slab * size);
      const C* bar = all.bars.data + slab * slab_codes<C> + vector * size;
      Mask<C> below = first_lanes<C>(size);
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) below &= tops[v] + upper < load(bar + v * size);
      if (lane_bits(below) == (1u << size) - 1) [[likely]]
        return;
      const Vec<C> lower = shared + tile.gain * load(groups.floors.data + slab * size);
      all.enqueue(*this, tops, upper, lower);
    }
  };

  ISTHMUS_INLINE View at(int64_t row, int64_t slab, int vector) { return {*this, row, slab, vector}; }

  template <int Vectors>
  ISTHMUS_NOINLINE void enqueue(const View& view, const Vec<C> (&tops)[Vectors], Vec<C> upper, Vec<C> lower) {
    const int64_t place = view.slab * slab_codes<C>, tile = (first + view.row) / tile_height;
    C reached[Vectors * size];
    uint64_t alive = 0;
    for (int v = 0; v < Vectors; ++v) {
      C* bar = bars.data + place + (view.vector + v) * size;
      store(reached + v * size, tops[v] + upper);
      alive |= static_cast<uint64_t>(lane_bits(~(tops[v] + upper < load(bar)))) << (v * size);
      store(bar, greater(tops[v] - lower, load(bar)));
    }
    for (; alive != 0; alive &= alive - 1) {
      const int i = __builtin_ctzll(alive);
      const int64_t c = place + i % size * group_codes + view.vector + i / size;
      if (c < codes) queue.data[queued++] = {static_cast<int32_t>(tile), static_cast<int32_t>(c), reached[i]};
    }
    if (queued > room) make_room();
  }

  // ---- rescore ----

  void make_room() {
    drop();
    if (queued > room / 2) rescore();
  }

  // What has fallen below the bars since.
  void drop() {
    int64_t kept = 0;
    for (int64_t i = 0; i < queued; ++i) {
      const Pair pair = queue.data[i];
      if (!(pair.score < bar(pair.code))) queue.data[kept++] = pair;
    }
    queued = kept;
  }

  // Of each code, the tile with the greatest t~ first: the score found there drops most of the others.
  void rescore() {
    for (int64_t c = 0; c < codes; ++c) leading.data[c] = -static_cast<C>(__builtin_inf());
    for (int64_t i = 0; i < queued; ++i) {
      C& greatest = leading.data[queue.data[i].code];
      greatest = queue.data[i].score > greatest ? queue.data[i].score : greatest;
    }
    rescore_if([&](const Pair& pair) { return pair.score == leading.data[pair.code]; });
    rescore_if(
        [&](const Pair& pair) { return pair.score != leading.data[pair.code] && !(pair.score < bar(pair.code)); });
    queued = 0;
  }

  // Neighbours in the queue are of one block: its tiles are packed when they are first needed.
  template <class Chosen>
  void rescore_if(const Chosen& chosen) {
    const GroupScorer& scorer = packed.groups.scorer;
    for (int64_t i = 0; i < queued; ++i) {
      const Pair pair = queue.data[i], later = queue.data[i + 8 < queued ? i + 8 : i];
      if (chosen(later)) prefetch_code(later.code);
      if (!chosen(pair)) continue;
      const int64_t row = int64_t{pair.tile} * tile_height, left = rows - row, place = pair.tile % max_tiles;
      const int64_t count = left < tile_height ? left : tile_height;
      C* group = groups.data + place * dim * group_codes;
      double* of_group = lengths.data + place * group_codes;
      if (grouped[place] != pair.tile) scorer.pack(x + row * dim, count, group, of_group);
      grouped[place] = pair.tile;
      load_code(pair.code);
      scorer.meet(code.data, group, of_group, row, count, best(pair.code));
      raise_bar(pair.code);
    }
  }

  // To the t of the best row so far, less what rounding may have added. Not for the inner product, whose rounding
  // depends on the length of that row.
  void raise_bar(int64_t c) const {
    const double score = scores.data[c], rounding = roundings(dim) * rounding_unit<C>;
    double t = 0.5 * score, size_of_terms = -score;
    if (panels.metric == Metric::inner_product) return;
    if (panels.metric == Metric::cosine) {
      const double length = packed.groups.lengths.data[c];
      if (length > 0 && length < least_length<double>) return;
      t = length > 0 ? score / length : score;
      size_of_terms = 1;
    }
    const C raised = static_cast<C>(t - rounding * size_of_terms);
    if (raised > bar(c)) bar(c) = raised;
  }

  void prefetch_code(int64_t c) const {
    const char* bytes = reinterpret_cast<const char*>(packed.groups.codebook + c * dim);
    for (int64_t i = 0; i < dim * static_cast<int64_t>(sizeof(T)) && i < 1024; i += 64) __builtin_prefetch(bytes + i);
  }

  void load_code(int64_t c) const {
    const T* from = packed.groups.codebook + c * dim;
    if constexpr (sizeof(T) == sizeof(C)) {
      copy_double(from, dim, code.data);
    } else {
      for (int64_t k = 0; k < dim; k += size) store_first(widened.data + k, load_first(from + k, dim - k), dim - k);
      copy_double(widened.data, dim, code.data);
    }
  }
};

// Rows and codes of one head.
template <class T>
struct Matching : HeadOfSearch<T> {
  using C = Compute<T>;
  using HeadOfSearch<T>::args;

  const PackedCodes<T> codes;
  const int64_t block_rows = Lookup<T>::block_rows_of(args.rows);
  const int64_t blocks = divide_up(args.rows, block_rows);
  Buffer<BestRows<T>*> found;  // by each thread

  explicit Matching(const HeadOfSearch<T>& of)
      : HeadOfSearch<T>(of),
        codes(args.metric, of.codebook, args.codes, args.dim, mostly_even(of.x, args.rows, args.dim, args.dim)),
        found(blocks) {}

  void run(int64_t* nearest_row) const {
    for (int64_t b = 0; b < blocks; ++b) found.data[b] = nullptr;
    const int64_t grain = grain_of(args.codes * args.dim * block_rows / Lookup<T>::products_per_element);
    parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
      found.data[begin] = new BestRows<T>(codes, this->x, args.rows);
      search(begin, end, *found.data[begin]);
    });
    int64_t threads = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      if (found.data[b] != nullptr) found.data[threads++] = found.data[b];
    }
    share_bars(threads);
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        found.data[t]->drop();
        found.data[t]->rescore();
      }
    });
    merge(threads, nearest_row);
    for (int64_t t = 0; t < threads; ++t) delete found.data[t];
  }

  void search(int64_t begin, int64_t end, BestRows<T>& best_rows) const {
    BlockSearch<T> block(codes, 1);
    const Buffer<C> widened(sizeof(T) == sizeof(C) ? 0 : block_rows * args.dim);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = best_rows.first = b * block_rows, count = smaller(args.rows - first, block_rows);
      const auto rows = this->rows_of(first, count, widened.data);
      block.search(rows.data, rows.stride, count, this->indices + first, nullptr, best_rows);
    }
  }

  void share_bars(int64_t threads) const {
    parallel_for(args.codes, grain_of(threads), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        C bar = found.data[0]->bar(c);
        for (int64_t t = 1; t < threads; ++t) bar = found.data[t]->bar(c) > bar ? found.data[t]->bar(c) : bar;
        for (int64_t t = 0; t < threads; ++t) found.data[t]->bar(c) = bar;
      }
    });
  }

  void merge(int64_t threads, int64_t* nearest_row) const {
    parallel_for(args.codes, grain_of(threads), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const BestCodes best = found.data[0]->best(c);
        for (int64_t t = 1; t < threads; ++t) best.meet(found.data[t]->scores.data[c], found.data[t]->indices.data[c]);
        nearest_row[c] = best.indices[0];
      }
    });
  }
};

// Blocks are of rows, and what a thread keeps is of codes: the fewer are the codes.
void match(const CodeMatch& args) {
  if (args.rows < args.codes) return match(exchanged(args));
  const CodeSearch of_rows = search_of(args);
  dispatch_dtype(args.dtype, [&]<class T>() {
    if (DirectSearch<T>::suits(args.codes, args.dim, 1)) {
      search(of_rows);
      search(search_of(exchanged(args)));
      return;
    }
    for (int64_t head = 0; head < args.heads; ++head) {
      Matching<T>(HeadOfSearch<T>{of_rows, head}).run(args.nearest_row + head * args.codes);
    }
  });
}
