// Included by cpu.inl: the search as an op. Blocks of rows go to the threads, and their codes are gathered while they
// are hot. Where blocks are few, the codes are cut into slices too, and what is best in each is merged.

// The rows of one head, and what becomes of their codes.
template <class T>
struct HeadOfSearch {
  using C = Compute<T>;

  const CodeSearch& args;
  const int64_t head;
  const T* x = static_cast<const T*>(args.x) + head * args.head_stride;
  const T* codebook = static_cast<const T*>(args.codebook) + head * args.codes * args.dim;
  const bool* mask = args.mask == nullptr ? nullptr : args.mask + head * args.rows;
  int64_t* indices = args.indices + head * args.rows * args.best;

  // Rows [first, first + count) in the compute type.
  struct Rows {
    int64_t first, count;
    const C* data;
    int64_t stride;
  };

  Rows rows_of(int64_t first, int64_t count, C* widened) const {
    if constexpr (sizeof(T) == sizeof(C)) {
      return {first, count, x + first * args.row_stride, args.row_stride};
    } else {
      for (int64_t row = 0; row < count; ++row) {
        const T* from = x + (first + row) * args.row_stride;
        for (int64_t k = 0; k < args.dim; k += lanes<C>) {
          store_first(widened + row * args.dim + k, load_first(from + k, args.dim - k), args.dim - k);
        }
      }
      return {first, count, widened, args.dim};
    }
  }

  bool all_masked(int64_t begin, int64_t end) const {
    if (mask == nullptr) return false;
    for (int64_t row = begin; row < end; ++row) {
      if (mask[row]) return false;
    }
    return true;
  }

  void finish(int64_t begin, int64_t end) const {
    if (mask != nullptr) {
      for (int64_t i = begin * args.best; i < end * args.best; ++i) {
        if (!mask[i / args.best]) indices[i] = -1;
      }
    }
    if (args.squared_error != nullptr) gather_rows<T>(args, head, begin, end);
  }
};

// Few rows, by the codebook as it lies.
template <class T>
void look_up_directly(const HeadOfSearch<T>& of) {
  using C = Compute<T>;
  const CodeSearch& args = of.args;
  const Buffer<C> widened(sizeof(T) == sizeof(C) ? 0 : args.rows * args.dim);
  const Buffer<double> scores(args.rows * args.best);
  const auto rows = of.rows_of(0, args.rows, widened.data);
  DirectSearch<T>(args.metric, of.codebook, args.codes, args.dim, args.best)
      .search(rows.data, rows.stride, rows.count, of.indices, scores.data);
  of.finish(0, args.rows);
}

// Many rows, block by block.
template <class T>
struct Lookup : HeadOfSearch<T> {
  using C = Compute<T>;
  using HeadOfSearch<T>::args, HeadOfSearch<T>::indices, HeadOfSearch<T>::mask;
  static constexpr int64_t max_rows = BlockSearch<T>::max_rows;
  static constexpr int64_t products_per_element = 64;  // as fast as moving one element in a loop bound by memory

  const PackedCodes<T> codes;

  explicit Lookup(const HeadOfSearch<T>& of)
      : HeadOfSearch<T>(of),
        codes(args.metric, of.codebook, args.codes, args.dim, mostly_even(of.x, args.rows, args.row_stride, args.dim)) {
  }

  // Large blocks spare the codebook's passage through the cache, but every thread needs some.
  static int64_t block_rows_of(int64_t rows) {
    const int64_t share = (rows / 16 + tile_height - 1) / tile_height * tile_height;
    return share < 24 ? 24 : share < max_rows ? share : max_rows;
  }

  void run() const {
    const int64_t block_rows = block_rows_of(args.rows);
    constexpr int64_t span = BlockSearch<T>::slabs_per_span;
    const int64_t blocks = (args.rows + block_rows - 1) / block_rows, slabs = codes.panels.slabs;
    const int64_t wanted = (8 + blocks - 1) / blocks, spans = (slabs + span - 1) / span;
    const int64_t slices = wanted < spans ? wanted : spans;
    if (slices == 1) {
      for_each_block(blocks, 1, block_rows, [&](BlockSearch<T>& block, const auto& rows, int64_t) {
        block.search(rows.data, rows.stride, rows.count, indices + rows.first * args.best, nullptr);
      });
      return;
    }
    Buffer<int64_t> found(slices * args.rows * args.best);
    Buffer<double> scores(slices * args.rows * args.best);
    for_each_block(blocks, slices, block_rows, [&](BlockSearch<T>& block, const auto& rows, int64_t slice) {
      const int64_t place = (slice * args.rows + rows.first) * args.best;
      const int64_t end = spans * (slice + 1) / slices * span;
      block.search_slabs(spans * slice / slices * span, end < slabs ? end : slabs, rows.data, rows.stride, rows.count,
                         found.data + place, scores.data + place);
    });
    merge(found.data, scores.data, slices);
    this->finish(0, args.rows);
  }

  template <class F>
  void for_each_block(int64_t blocks, int64_t slices, int64_t block_rows, F&& f) const {
    const int64_t grain = grain_of(args.codes * args.dim * block_rows / slices / products_per_element);
    parallel_for(blocks * slices, grain, [&](int64_t begin, int64_t end) {
      BlockSearch<T> block(codes, args.best);
      const Buffer<C> widened(sizeof(T) == sizeof(C) ? 0 : max_rows * args.dim);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item / slices * block_rows, left = args.rows - first;
        const int64_t count = left < block_rows ? left : block_rows;
        if (!this->all_masked(first, first + count)) f(block, this->rows_of(first, count, widened.data), item % slices);
        if (slices == 1) this->finish(first, first + count);
      }
    });
  }

  // found, scores: [slices, rows, best].
  void merge(const int64_t* found, const double* scores, int64_t slices) const {
    Buffer<double> best_scores(args.best);
    for (int64_t row = 0; row < args.rows; ++row) {
      if (mask != nullptr && !mask[row]) continue;
      const BestCodes best{best_scores.data, indices + row * args.best, args.best};
      best.clear();
      for (int64_t slice = 0; slice < slices; ++slice) {
        const int64_t place = (slice * args.rows + row) * args.best;
        for (int64_t i = place; i < place + args.best; ++i) best.meet(scores[i], found[i]);
      }
    }
  }
};

void search(const CodeSearch& args) {
  if (args.rows == 0) return;
  dispatch_dtype(args.dtype, [&]<class T>() {
    for (int64_t head = 0; head < args.heads; ++head) {
      const HeadOfSearch<T> of{args, head};
      if (DirectSearch<T>::suits(args.rows, args.dim, args.best)) {
        look_up_directly(of);
      } else {
        Lookup<T>(of).run();
      }
    }
  });
}
