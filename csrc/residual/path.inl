// Included by cpu.inl: from indices back to codes, and what the codes of a row leave over.

// Where the codebook of each stage begins in a table, and behind them the table's end.
struct Stages {
  const int64_t count;
  Buffer<int64_t> starts;

  explicit Stages(const ResidualCodes& codes) : count(codes.stages), starts(count + 1) {
    starts.data[0] = 0;
    for (int64_t q = 0; q < count; ++q) starts.data[q + 1] = starts.data[q] + codes.sizes[q];
  }
};

// The codes of one row at a time, without the stages that gave it none.
template <class T>
struct Path {
  const ResidualCodes& codes;
  const Stages& stages;
  int64_t length = 0;
  Buffer<const T*> code;  // [length]
  Buffer<int64_t> stage;  // [length]

  Path(const ResidualCodes& codes_, const Stages& stages_)
      : codes(codes_), stages(stages_), code(stages.count), stage(stages.count) {}

  // indices: [groups, rows, stages].
  void follow(const int64_t* indices, int64_t row) {
    const T* table = static_cast<const T*>(codes.tables) + row / codes.rows * codes.codes * codes.dim;
    length = 0;
    for (int64_t q = 0; q < stages.count; ++q) {
      const int64_t index = indices[row * stages.count + q];
      if (index < 0) continue;
      code.data[length] = table + (stages.starts.data[q] + index) * codes.dim;
      stage.data[length] = q;
      ++length;
    }
  }
};

// The sum of a row's codes, and what is left over after each: neighbouring elements wait in a register while the codes
// pass.
template <class T>
void reconstruct(const ResidualSearch& args, const Stages& stages, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t dim = args.codes.dim;
  Path<T> path(args.codes, stages);
  Buffer<C> sums(stages.count * lanes<C>);
  for (int64_t row = begin; row < end; ++row) {
    path.follow(args.indices, row);
    for (int64_t i = 0; i < path.length; ++i) store(sums.data + i * lanes<C>, Vec<C>{});
    for (int64_t k = 0; k < dim; k += lanes<C>) {
      Vec<C> residual = load_first(static_cast<const T*>(args.codes.x) + row * dim + k, dim - k), total = {};
      for (int64_t i = 0; i < path.length; ++i) {
        const Vec<C> code = load_first(path.code.data[i] + k, dim - k);
        residual -= code;
        total += code;
        C* sum = sums.data + i * lanes<C>;
        store(sum, load(sum) + residual * residual);
      }
      store_first(static_cast<T*>(args.quantized) + row * dim + k, total, dim - k);
    }
    C* error = static_cast<C*>(args.squared_error) + row * stages.count;
    for (int64_t q = 0; q < stages.count; ++q) error[q] = 0;
    for (int64_t i = 0; i < path.length; ++i) error[path.stage.data[i]] = sum_lanes<C>(load(sums.data + i * lanes<C>));
  }
}
