// Included by cpu.inl: the search for the codes of all stages, block by block of rows.

// The packed codebooks of a group.
template <class T>
struct PackedStages {
  const int64_t count;
  Buffer<PackedCodes<T>> codes;

  PackedStages(const ResidualCodes& all, const Stages& stages, const T* table) : count(stages.count), codes(count) {
    for (int64_t q = 0; q < count; ++q) {
      new (codes.data + q)
          PackedCodes<T>(Metric::euclidean, table + stages.starts.data[q] * all.dim, all.sizes[q], all.dim);
    }
  }
  ~PackedStages() {
    for (int64_t q = 0; q < count; ++q) codes.data[q].~PackedCodes<T>();
  }
};

// Of some rows the best sequences of codes so far, best first. Rows that have all their codes are gone.
template <class C>
struct Beam {
  int64_t rows = 0, width = 1;
  Buffer<int64_t> row;    // [rows]
  Buffer<C> residuals;    // [rows, width, dim]: what each sequence leaves over
  Buffer<int64_t> paths;  // [rows, width, stages]: the sequences

  Beam(int64_t max_rows, int64_t max_width, int64_t dim, int64_t stages)
      : row(max_rows), residuals(max_rows * max_width * dim), paths(max_rows * max_width * stages) {}
};

// One block of rows. Its beam stays in cache while the stages pass.
template <class T>
struct BlockOfRows {
  using C = Compute<T>;

  const ResidualSearch& args;
  const Stages& stages;
  const T* table;
  const int64_t dim;
  Beam<C> beams[2];         // before and after a stage
  Buffer<int64_t> nearest;  // [rows, width, best]: of each sequence the codes that may continue it
  Buffer<double> scores;    // [rows, width, best]: -|r|² with that code
  Buffer<int64_t> kept;     // [beam]: the best continuations of a row
  Buffer<double> kept_scores;

  BlockOfRows(const ResidualSearch& args_, const Stages& stages_, const T* table_, int64_t max_rows)
      : args(args_),
        stages(stages_),
        table(table_),
        dim(args.codes.dim),
        beams{{max_rows, args.beam, dim, stages.count}, {max_rows, args.beam, dim, stages.count}},
        nearest(max_rows * args.beam * args.beam),
        scores(max_rows * args.beam * args.beam),
        kept(args.beam),
        kept_scores(args.beam) {}

  // find(q, residuals, count, best, indices, scores): the nearest codes of a stage, as BlockSearch::search.
  template <class Find>
  void search(int64_t begin, int64_t end, const Find& find) {
    start(begin, end);
    for (int64_t q = 0; q < stages.count && beams[q % 2].rows > 0; ++q) {
      const int64_t best = args.beam < args.codes.sizes[q] ? args.beam : args.codes.sizes[q];
      const Beam<C>& beam = beams[q % 2];
      find(q, beam.residuals.data, beam.rows * beam.width, best, nearest.data, scores.data);
      extend(q, best, beams[q % 2], beams[(q + 1) % 2]);
    }
    reconstruct<T>(args, stages, begin, end);
  }

  int64_t active(int64_t row) const { return args.active == nullptr ? stages.count : args.active[row]; }

  void start(int64_t begin, int64_t end) {
    for (int64_t i = begin * stages.count; i < end * stages.count; ++i) args.indices[i] = -1;
    Beam<C>& beam = beams[0];
    beam.rows = 0;
    beam.width = 1;
    for (int64_t row = begin; row < end; ++row) {
      if (active(row) == 0) continue;
      const T* x = static_cast<const T*>(args.codes.x) + row * dim;
      C* residual = beam.residuals.data + beam.rows * dim;
      for (int64_t k = 0; k < dim; k += lanes<C>) store_first(residual + k, load_first(x + k, dim - k), dim - k);
      beam.row.data[beam.rows++] = row;
    }
  }

  // Of all sequences one code longer, keeps the best of each row.
  void extend(int64_t q, int64_t best, const Beam<C>& from, Beam<C>& to) {
    const int64_t found = from.width * best;
    to.rows = 0;
    to.width = found < args.beam ? found : args.beam;
    for (int64_t r = 0; r < from.rows; ++r) {
      const int64_t row = from.row.data[r], ahead = r + 4 < from.rows ? r + 4 : r;
      prefetch(code(q, nearest.data[ahead * found]));
      rank(scores.data + r * found, found, to.width);
      if (active(row) == q + 1) {
        write_path(q, from, r * found + kept.data[0], best, args.indices + row * stages.count);
        continue;
      }
      to.row.data[to.rows] = row;
      for (int64_t i = 0; i < to.width; ++i) {
        const int64_t place = to.rows * to.width + i, chosen = r * found + kept.data[i];
        write_path(q, from, chosen, best, to.paths.data + place * stages.count);
        subtract(from.residuals.data + chosen / best * dim, code(q, nearest.data[chosen]),
                 to.residuals.data + place * dim);
      }
      ++to.rows;
    }
  }

  // The first `width` places of a stable sort by score.
  void rank(const double* score, int64_t found, int64_t width) {
    if (args.beam == 1) {
      kept.data[0] = 0;
      return;
    }
    const BestCodes best{kept_scores.data, kept.data, width};
    best.clear();
    for (int64_t i = 0; i < found; ++i) best.meet(score[i], i);
  }

  void write_path(int64_t q, const Beam<C>& from, int64_t chosen, int64_t best, int64_t* path) const {
    const int64_t* parent = from.paths.data + chosen / best * stages.count;
    for (int64_t i = 0; i < q; ++i) path[i] = parent[i];
    path[q] = nearest.data[chosen];
  }

  const T* code(int64_t q, int64_t index) const { return table + (stages.starts.data[q] + index) * dim; }

  // Codes lie far apart: several have to be waited for at once.
  void prefetch(const T* vector) const {
    for (int64_t k = 0; k < dim; k += 64 / int64_t(sizeof(T))) __builtin_prefetch(vector + k);
  }

  void subtract(const C* residual, const T* code, C* left_over) const {
    for (int64_t k = 0; k < dim; k += lanes<C>) {
      store_first(left_over + k, load_first(residual + k, dim - k) - load_first(code + k, dim - k), dim - k);
    }
  }
};

// Few rows: one block, all threads share its search.
template <class T>
void search_directly(const ResidualSearch& args, const Stages& stages, int64_t group, const T* table) {
  using C = Compute<T>;
  const int64_t rows = args.codes.rows, dim = args.codes.dim;
  BlockOfRows<T>(args, stages, table, rows)
      .search(group * rows, (group + 1) * rows,
              [&](int64_t q, const C* x, int64_t count, int64_t best, int64_t* indices, double* scores) {
                DirectSearch<T>(Metric::euclidean, table + stages.starts.data[q] * dim, args.codes.sizes[q], dim, best)
                    .search(x, dim, count, indices, scores);
              });
}

template <class T>
void search_group(const ResidualSearch& args, const Stages& stages, int64_t group) {
  using C = Compute<T>;
  const ResidualCodes& codes = args.codes;
  const T* table = static_cast<const T*>(codes.tables) + group * codes.codes * codes.dim;
  if (DirectSearch<T>::suits(codes.rows * args.beam, codes.dim, args.beam)) {
    return search_directly(args, stages, group, table);
  }
  const PackedStages<T> packed(codes, stages, table);
  // Large blocks spare the codebooks' passage through the cache, but every thread needs some.
  constexpr int64_t max_sequences = BlockSearch<T>::max_rows, min_rows = 24;
  const int64_t most = max_sequences / args.beam;
  const int64_t share = (codes.rows / 16 + tile_height - 1) / tile_height * tile_height;
  const int64_t wanted = share < min_rows ? min_rows : share, block_rows = most < 1 ? 1 : most < wanted ? most : wanted;
  constexpr int64_t products_per_element = 64;  // as fast as moving one element in a loop bound by memory
  const int64_t work = codes.codes * codes.dim * args.beam * block_rows / products_per_element;
  parallel_for((codes.rows + block_rows - 1) / block_rows, grain_of(work), [&](int64_t begin, int64_t end) {
    BlockOfRows<T> block(args, stages, table, block_rows);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t last = (b + 1) * block_rows < codes.rows ? (b + 1) * block_rows : codes.rows;
      block.search(group * codes.rows + b * block_rows, group * codes.rows + last,
                   [&](int64_t q, const C* x, int64_t count, int64_t best, int64_t* indices, double* scores) {
                     BlockSearch<T> search(packed.codes.data[q], best);
                     for (int64_t i = 0; i < count; i += max_sequences) {
                       const int64_t left = count - i < max_sequences ? count - i : max_sequences;
                       // Only a beam ranks by scores, and without them the search takes less time.
                       search.search(x + i * codes.dim, codes.dim, left, indices + i * best,
                                     args.beam > 1 ? scores + i * best : nullptr);
                     }
                   });
    }
  });
}

void search(const ResidualSearch& args) {
  if (args.codes.rows == 0) return;
  const Stages stages(args.codes);
  dispatch_dtype(args.codes.dtype, [&]<class T>() {
    for (int64_t group = 0; group < args.codes.groups; ++group) search_group<T>(args, stages, group);
  });
}
