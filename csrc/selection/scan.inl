// Included by cpu.inl: finds the scores above a bar without storing the others.
//
// The screen of the top-k encoder (topk/screen.inl) gives upper bounds of the scores of a tile of rows with a panel of
// features, from a product of bytes where the CPU has those. What may be above the bar is scored again in float64
// (core/score.h), and a sink decides. A score that is not a number always comes before the sink.
//
// Weights come in chunks: all threads write a chunk as panels, then every block of rows meets them. A feature that has
// to be scored is read again while it is still in cache.

// What is searched.
template <class T>
struct Scores {
  int64_t rows, cols, features;
  const T *x, *weight, *bias;

  template <class Args>
  explicit Scores(const Args& args)
      : rows(args.rows),
        cols(args.cols),
        features(args.features),
        x(static_cast<const T*>(args.x)),
        weight(static_cast<const T*>(args.weight)),
        bias(static_cast<const T*>(args.bias)) {}

  double bias_of(int64_t feature) const { return bias == nullptr ? 0 : static_cast<double>(load_one(bias + feature)); }
  double at(int64_t row, int64_t feature) const {
    return exact_score(x + row * cols, weight + feature * cols, cols, bias_of(feature));
  }
};

// How the work is cut; what is found does not depend on it. Features form `parts`, so that few rows have parallelism,
// too; of each part a slice is in a chunk. An item of work is a block of rows and a part.
struct ScanPlan {
  static constexpr int64_t wanted_items = 16, least_part = 1024, most_block_rows = 96;
  static constexpr int64_t batch_bytes = 32 * 1024 * 1024, chunk_bytes = 8 * 1024 * 1024;

  int64_t block_rows, blocks, batch_blocks;  // a batch: blocks that share the panels of a chunk
  int64_t parts, part, slice;                // the latter two in features

  template <class T>
  explicit ScanPlan(const Scores<T>& scores) {
    constexpr int64_t width = panel_width<Compute<T>>;
    const int64_t row_bytes = larger(scores.cols, 1) * int64_t(sizeof(Compute<T>));
    block_rows = divide_up(smaller(most_block_rows, divide_up(scores.rows, wanted_items)), tile_rows) * tile_rows;
    blocks = divide_up(scores.rows, block_rows);
    batch_blocks = smaller(larger(batch_bytes / (row_bytes * block_rows), 1), blocks);
    parts = larger(smaller(wanted_items / batch_blocks, scores.features / least_part), 1);
    part = divide_up(divide_up(scores.features, parts), width) * width;
    slice = smaller(larger(chunk_bytes / row_bytes / parts / width, 1) * width, part);
  }

  int64_t items() const { return blocks * parts; }
};

// A sink has
//
//     offset(feature)                  added to the scores of this feature before they are held against the bar
//     bar()                            what is not above it is of no interest
//     meet(item, row, feature, score)  takes every score of interest, and some that are not, in the order of features
//                                      within an item and a row
template <class T, class Words, class Sink>
struct Scanner {
  using C = Compute<T>;
  static constexpr int width = panel_width<C>;

  struct Pair {
    int64_t row, feature;
  };

  const Scores<T>& scores;
  const ScanPlan& plan;
  const BrokenRows& broken;
  const Sink& sink;
  const Screen<Words> screen{scores.cols, false};
  const int64_t depth = screen.depth, panels = plan.slice / width, batch_rows = plan.batch_blocks * plan.block_rows;
  Buffer<C> words{batch_rows * depth};
  Buffer<C> units{batch_rows}, lengths{batch_rows}, slopes{batch_rows / tile_rows};
  Buffer<C> panel_words{plan.parts * plan.slice * depth};
  Buffer<C> panel_terms{plan.parts * plan.slice * Panel<C>::terms};

  // A panel of the current chunk.
  Panel<C> panel(int64_t p) const {
    return {panel_words.data + p * width * depth, panel_terms.data + p * width * Panel<C>::terms};
  }
  int64_t first_feature(int64_t part, int64_t chunk) const { return part * plan.part + chunk * plan.slice; }
  int64_t end_feature(int64_t part, int64_t chunk) const {
    return smaller(smaller(first_feature(part, chunk) + plan.slice, (part + 1) * plan.part), scores.features);
  }

  void write_rows(int64_t first, int64_t rows) const {
    parallel_for(divide_up(rows, tile_rows), 1, [&](int64_t begin, int64_t end) {
      const Buffer<C> scratch(tile_rows * screen.padded);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t r = t * tile_rows;
        slopes.data[t] = screen.pack_tile(scores.x + (first + r) * scores.cols, smaller(tile_rows, rows - r),
                                          words.data + r * depth, units.data + r, lengths.data + r, scratch.data);
      }
    });
  }

  void write_panels(int64_t chunk) const {
    parallel_for(plan.parts * panels, 1, [&](int64_t begin, int64_t end) {
      const Buffer<C> scratch(width * screen.padded);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t part = p / panels, first = first_feature(part, chunk) + p % panels * width;
        const int64_t count = smaller(width, end_feature(part, chunk) - first);
        if (count <= 0) continue;
        screen.pack_panel([&](int64_t i) { return scores.weight + (first + i) * scores.cols; },
                          [&](int64_t i) { return scores.bias_of(first + i) + sink.offset(first + i); }, count,
                          panel(p), scratch.data);
      }
    });
  }

  void run() const {
    for (int64_t batch = 0; batch < plan.blocks; batch += plan.batch_blocks) {
      const int64_t blocks = smaller(plan.batch_blocks, plan.blocks - batch), first = batch * plan.block_rows;
      write_rows(first, smaller(batch_rows, scores.rows - first));
      for (int64_t chunk = 0; chunk * plan.slice < plan.part; ++chunk) {
        write_panels(chunk);
        parallel_for(blocks * plan.parts, 1, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) meet_block(batch, i / plan.parts, i % plan.parts, chunk);
        });
      }
    }
  }

  void meet_block(int64_t batch, int64_t block, int64_t part, int64_t chunk) const {
    const int64_t r = block * plan.block_rows, first = batch * plan.block_rows + r,
                  item = (batch + block) * plan.parts + part;
    const int64_t rows = smaller(plan.block_rows, scores.rows - first), end = end_feature(part, chunk);
    alignas(64) C bounds[tile_rows * width], bars[tile_rows];
    uint32_t passed[tile_rows];
    Pair pending[ScanPlan::most_block_rows * width];
    int64_t p = part * panels;
    for (int64_t f = first_feature(part, chunk); f < end; f += width, ++p) {
      const uint32_t inside = ~0u >> (32 - smaller(width, end - f));
      int64_t count = 0;
      for (C& bar : bars) bar = sink.bar();
      for (int64_t t = 0; t < rows; t += tile_rows) {
        const int64_t in_tile = smaller(tile_rows, rows - t), tile = r + t;
        screen.meet({words.data + tile * depth, units.data + tile, lengths.data + tile, slopes.data[tile / tile_rows]},
                    in_tile, panel(p), bars, bounds, passed);
        for (int64_t i = 0; i < in_tile; ++i) {
          for (uint32_t bits = passed[i] & inside; bits != 0; bits &= bits - 1) {
            pending[count++] = {first + t + i, f + __builtin_ctz(bits)};
          }
        }
      }
      settle(item, pending, count);
    }
  }

  // Some are fetched while others are scored, those of a row together.
  void settle(int64_t item, const Pair* pending, int64_t count) const {
    int64_t fetched = 0;
    for (int64_t i = 0; i < count;) {
      for (; fetched < smaller(i + 2 * scores_at_once, count); ++fetched) {
        prefetch(scores.weight + pending[fetched].feature * scores.cols);
      }
      const int64_t last = i + scores_at_once - 1;
      if (last < count && pending[last].row == pending[i].row) {
        score<scores_at_once>(item, pending + i);
        i += scores_at_once;
      } else {
        score<1>(item, pending + i++);
      }
    }
  }

  template <int Count>
  ISTHMUS_NOINLINE void score(int64_t item, const Pair* pairs) const {
    const T* weights[Count];
    double products[Count];
    for (int i = 0; i < Count; ++i) weights[i] = scores.weight + pairs[i].feature * scores.cols;
    exact_products<Count, T>(scores.x + pairs[0].row * scores.cols, weights, scores.cols, products);
    for (int i = 0; i < Count && !broken[pairs[i].row]; ++i) {
      sink.meet(item, pairs[i].row, pairs[i].feature, products[i] + scores.bias_of(pairs[i].feature));
    }
  }

  ISTHMUS_INLINE void prefetch(const T* vector) const {
    constexpr int64_t most_fetched = 4096;
    const int64_t bytes = smaller(scores.cols * int64_t(sizeof(T)), most_fetched);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const char*>(vector) + i);
  }
};

// Few rows: every score is exact, and what takes the time is to read the weights once.
template <class T, class Sink>
void scan_few(const Scores<T>& scores, const ScanPlan& plan, const BrokenRows& broken, const Sink& sink) {
  parallel_for(plan.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t f = begin * plan.part; f < smaller(end * plan.part, scores.features); ++f) {
      for (int64_t row = 0; row < scores.rows; ++row) {
        if (!broken[row]) sink.meet(f / plan.part, row, f, scores.at(row, f));
      }
    }
  });
}

// Coarse words make the product faster and let more scores pass. Scores are about as large as |x| |w| / √D: a bound
// that is wider by half of that lets a few times as many pass.
template <class Words, class T>
bool suits(const Scores<T>& scores) {
  constexpr double most_lost = 0.5;
  if (scores.cols < Words::least_cols || scores.cols > Words::most_cols) return false;
  const auto row = [&](int64_t i) { return scores.x + i * scores.cols; };
  const auto weight = [&](int64_t i) { return scores.weight + i * scores.cols; };
  const double lost = average_loss<Words, true>(row, scores.rows, scores.cols) +
                      average_loss<Words, false>(weight, scores.features, scores.cols);
  return lost * __builtin_sqrt(static_cast<double>(scores.cols)) < most_lost;
}

// Calls f<Words>() with what the screen is to multiply.
template <class T, class F>
void dispatch_words([[maybe_unused]] const Scores<T>& scores, F&& f) {
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
  if constexpr (sizeof(Compute<T>) == 4) {
    if (suits<Bytes>(scores)) return f.template operator()<Bytes>();
    if (suits<Pairs>(scores)) return f.template operator()<Pairs>();
  }
#endif
  f.template operator()<Fine<Compute<T>>>();
}

template <class T, class Sink>
void scan(const Scores<T>& scores, const ScanPlan& plan, const BrokenRows& broken, const Sink& sink) {
  constexpr int64_t few_rows = 4;
  if (scores.rows <= few_rows) return scan_few(scores, plan, broken, sink);
  dispatch_words(scores, [&]<class Words>() { Scanner<T, Words, Sink>{scores, plan, broken, sink}.run(); });
}
