// Included by cpu.inl: gradients, and sums of residuals over the rows of each code.
//
// The gradient of x walks along a row, whose residual stays in registers. Sums over the rows of a code go stage by
// stage: a counting sort by code, and the residuals of all rows, which the visit itself carries to the next stage.

template <class T>
struct InputGradient {
  using C = Compute<T>;
  using V = Vec<C>;

  const ResidualBackward& args;
  const int64_t dim = args.codes.dim;
  Path<T> path;
  Buffer<C> slopes;  // [stages]: what each residual counts for
  Buffer<C> total;   // [dim]: the sum of the codes

  InputGradient(const ResidualBackward& args_, const Stages& stages)
      : args(args_), path(args.codes, stages), slopes(stages.count), total(dim) {}

  void write(int64_t row) {
    path.follow(args.indices, row);
    const T* x = static_cast<const T*>(args.codes.x) + row * dim;
    const T* grad_quantized = static_cast<const T*>(args.grad_quantized) + row * dim;
    T* grad_x = static_cast<T*>(args.grad_x) + row * dim;
    if (path.length == 0) {
      for (int64_t k = 0; k < dim; ++k) grad_x[k] = T{};
      return;
    }
    set_slopes(row);
    const Passage<C> p = passage(x, grad_quantized);
    for (int64_t k = 0; k < dim; k += lanes<C>) {
      const int64_t left = dim - k;
      V residual = load_first(x + k, left), sum = {};
      for (int64_t i = 0; i < path.length; ++i) {
        residual -= load_first(path.code.data[i] + k, left);
        sum += slopes.data[i] * residual;
      }
      // A product with 0 would turn an infinite gradient that is not passed on into NaN.
      if (p.of_grad != 0) sum += p.of_grad * load_first(grad_quantized + k, left);
      if (p.of_x != 0 || p.of_code != 0) {
        sum += p.of_x * load_first(x + k, left) + p.of_code * load_first(total.data + k, left);
      }
      store_first(grad_x + k, sum, left);
    }
  }

  void set_slopes(int64_t row) const {
    const C* grad_error = static_cast<const C*>(args.grad_error) + row * args.codes.stages;
    for (int64_t i = 0; i < path.length; ++i) {
      slopes.data[i] = static_cast<C>(args.commitment_weight) * 2 * grad_error[path.stage.data[i]];
    }
  }

  Passage<C> passage(const T* x, const T* grad_quantized) const {
    if (args.gradient == CodeGradient::straight_through) return {};
    for (int64_t k = 0; k < dim; k += lanes<C>) {
      V sum = {};
      for (int64_t i = 0; i < path.length; ++i) sum += load_first(path.code.data[i] + k, dim - k);
      store_first(total.data + k, sum, dim - k);
    }
    return rotation(x, total.data, grad_quantized, dim);
  }
};

// Sums over the rows that stage q gave a code: share(q, row) is a function of vectors (before, after) of the residual,
// write(place, count, sum) receives the count and the sum of the code at a place of the tables.
template <class T, class Share, class Write>
void sum_residuals(const ResidualCodes& codes, const Stages& stages, const int64_t* indices, Share&& share,
                   Write&& write) {
  using C = Compute<T>;
  const int64_t rows = codes.groups * codes.rows, dim = codes.dim;
  Buffer<C> residuals(rows * dim);
  parallel_for(rows, grain_of(dim), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * dim; i < end * dim; i += lanes<C>) {
      const int64_t left = end * dim - i;
      store_first(residuals.data + i, load_first(static_cast<const T*>(codes.x) + i, left), left);
    }
  });

  Buffer<int64_t> keys(rows);
  for (int64_t q = 0; q < stages.count; ++q) {
    const int64_t size = codes.sizes[q];
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t index = indices[row * stages.count + q];
      keys.data[row] = index < 0 ? -1 : row / codes.rows * size + index;
    }
    const Groups groups(keys.data, rows, codes.groups * size);
    const auto place_of = [&](int64_t key) { return key / size * codes.codes + stages.starts.data[q] + key % size; };
    sum_groups<C>(
        groups, dim,
        [&](int64_t row, int64_t key, C* sum) {
          const T* code = static_cast<const T*>(codes.tables) + place_of(key) * dim;
          C* residual = residuals.data + row * dim;
          const auto part = share(q, row);
          for (int64_t k = 0; k < dim; k += lanes<C>) {
            const int64_t left = dim - k;
            const Vec<C> before = load_first(residual + k, left), after = before - load_first(code + k, left);
            store_first(residual + k, after, left);
            store_first(sum + k, load_first(sum + k, left) + part(before, after), left);
          }
        },
        [&](int64_t key, const C* sum) {
          write(place_of(key), groups.starts.data[key + 1] - groups.starts.data[key], sum);
        });
  }
}

void backward(const ResidualBackward& args) {
  const Stages stages(args.codes);
  const int64_t rows = args.codes.groups * args.codes.rows, dim = args.codes.dim;
  dispatch_dtype(args.codes.dtype, [&]<class T>() {
    using C = Compute<T>;
    if (args.grad_x != nullptr) {
      parallel_for(rows, grain_of(dim * stages.count), [&](int64_t begin, int64_t end) {
        InputGradient<T> gradient(args, stages);
        for (int64_t row = begin; row < end; ++row) gradient.write(row);
      });
    }
    if (args.grad_tables == nullptr) return;
    sum_residuals<T>(
        args.codes, stages, args.indices,
        [&](int64_t q, int64_t row) {
          const C slope = -2 * static_cast<const C*>(args.grad_error)[row * stages.count + q];
          return [slope](Vec<C>, Vec<C> after) { return slope * after; };
        },
        [&](int64_t place, int64_t, const C* sum) {
          T* gradient = static_cast<T*>(args.grad_tables) + place * dim;
          for (int64_t k = 0; k < dim; k += lanes<C>) store_first(gradient + k, load_first(sum + k, dim - k), dim - k);
        });
  });
}

void totals(const ResidualTotals& args) {
  const Stages stages(args.codes);
  const int64_t codes = args.codes.groups * args.codes.codes, dim = args.codes.dim;
  dispatch_dtype(args.codes.dtype, [&]<class T>() {
    using C = Compute<T>;
    C* totals = static_cast<C*>(args.totals);
    sum_residuals<T>(
        args.codes, stages, args.indices, [](int64_t, int64_t) { return [](Vec<C> before, Vec<C>) { return before; }; },
        [&](int64_t place, int64_t count, const C* sum) {
          totals[place] = static_cast<C>(count);
          for (int64_t k = 0; k < dim; ++k) totals[codes + place * dim + k] = sum[k];
        });
  });
}
