// Included by cpu.inl: gradients of the quantized vectors and of their squared errors.
//
// The two gradients are two passes: rows in their own order for x, and code by code for the codebook. Doing both code
// by code would read x and the gradient once less, but write rows in a random order, which costs twice what it saves.
// If the codebook needs no gradient, nothing is sorted.

template <class T>
struct Backward {
  using C = Compute<T>;
  using V = Vec<C>;

  const QuantizeBackward& args;
  const T* grad_quantized = static_cast<const T*>(args.grad_quantized);
  const C* grad_error = static_cast<const C*>(args.grad_error);
  const T* x = static_cast<const T*>(args.x);
  const T* codebook = static_cast<const T*>(args.codebook);
  T* grad_x = static_cast<T*>(args.grad_x);
  T* grad_codebook = static_cast<T*>(args.grad_codebook);

  Passage<C> passage(int64_t row, int64_t code) const {
    switch (args.gradient) {
      case CodeGradient::rotation:
        return rotation(x + row * args.dim, codebook + code * args.dim, grad_quantized + row * args.dim, args.dim);
      case CodeGradient::codebook:
        return {0, 0, 0};
      default:
        return {};
    }
  }

  void to_row(int64_t row, int64_t code) const {
    const int64_t at = row * args.dim;
    const T* c = codebook + code * args.dim;
    const Passage<C> p = passage(row, code);
    const C pull = static_cast<C>(args.commitment_weight) * 2 * grad_error[row];
    for (int64_t k = 0; k < args.dim; k += lanes<C>) {
      const int64_t left = args.dim - k;
      const V a = load_first(x + at + k, left), b = load_first(c + k, left),
              g = load_first(grad_quantized + at + k, left);
      // A product with 0 would turn an infinite gradient that is not passed on into NaN.
      V sum = pull * (a - b);
      if (p.of_grad != 0) sum += p.of_grad * g;
      if (p.of_x != 0 || p.of_code != 0) sum += p.of_x * a + p.of_code * b;
      store_first(grad_x + at + k, sum, left);
    }
  }

  void to_code(int64_t row, int64_t code, C* sum) const {
    const int64_t at = row * args.dim;
    const T* c = codebook + code * args.dim;
    const C slope = 2 * grad_error[row];
    const bool passes = args.gradient == CodeGradient::codebook;
    for (int64_t k = 0; k < args.dim; k += lanes<C>) {
      const int64_t left = args.dim - k;
      V total = load_first(sum + k, left) - slope * (load_first(x + at + k, left) - load_first(c + k, left));
      if (passes) total += load_first(grad_quantized + at + k, left);
      store_first(sum + k, total, left);
    }
  }

  void write_code(int64_t code, const C* sum) const {
    for (int64_t k = 0; k < args.dim; k += lanes<C>) {
      store_first(grad_codebook + code * args.dim + k, load_first(sum + k, args.dim - k), args.dim - k);
    }
  }

  void clear_row(int64_t row) const {
    for (int64_t k = 0; k < args.dim; ++k) grad_x[row * args.dim + k] = T{};
  }
};

// The code of each row, counted over all heads; -1 stays.
struct FlatIndices {
  Buffer<int64_t> values;

  explicit FlatIndices(const QuantizeBackward& args) : values(args.heads * args.rows) {
    for (int64_t row = 0; row < args.heads * args.rows; ++row) {
      const int64_t code = args.indices[row];
      values.data[row] = code < 0 ? -1 : row / args.rows * args.codes + code;
    }
  }
};

void backward(const QuantizeBackward& args) {
  const FlatIndices codes(args);
  const int64_t* code_of = codes.values.data;
  const int64_t rows = args.heads * args.rows;
  dispatch_dtype(args.dtype, [&]<class T>() {
    const Backward<T> body{args};
    if (args.grad_x != nullptr) {
      parallel_for(rows, grain_of(args.dim), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          code_of[row] < 0 ? body.clear_row(row) : body.to_row(row, code_of[row]);
        }
      });
    }
    if (args.grad_codebook != nullptr) {
      sum_groups<Compute<T>>(
          Groups(code_of, rows, args.heads * args.codes), args.dim,
          [&](int64_t row, int64_t code, auto* sum) { body.to_code(row, code, sum); },
          [&](int64_t code, const auto* sum) { body.write_code(code, sum); });
    }
  });
}
