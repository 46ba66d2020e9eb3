// Gradients of decoders and encoders.

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// sum += coefficient · row
template <class T>
inline void add_scaled(Compute<T>* sum, Compute<T> coefficient, const T* row, int64_t cols) {
  using C = Compute<T>;
  int64_t c = 0;
  for (; c + lanes<C> <= cols; c += lanes<C>) store(sum + c, load(sum + c) + coefficient * load(row + c));
  const int64_t left = cols - c;
  if (left > 0) store_first(sum + c, load_first(sum + c, left) + coefficient * load_first(row + c, left), left);
}

template <class T>
inline void round_row(const Compute<T>* from, int64_t cols, T* to) {
  using C = Compute<T>;
  for (int64_t c = 0; c < cols; c += lanes<C>) store_first(to + c, load_first(from + c, cols - c), cols - c);
}

// grad_weight[f] = Σ coefficients[e] · matrix[row of e] over the entries of latent f in the order; and grad_bias[f],
// unless null, the sum of the coefficients alone.
template <class T>
void scatter_rows(const LatentOrder& order, int64_t features, const T* coefficients, const T* matrix, int64_t cols,
                  T* grad_weight, T* grad_bias) {
  using C = Compute<T>;
  sum_runs<C>(
      {features, order.starts, order.entries}, cols + 1,
      [&](int64_t first, int64_t last, int64_t, C* sum) {
        for (int64_t c = 0; c <= cols; ++c) sum[c] = 0;
        for (int64_t p = first; p < last; ++p) {
          const C coefficient = load_one(coefficients + order.entries[p]);
          if (grad_weight != nullptr) add_scaled(sum, coefficient, matrix + order.rows[p] * cols, cols);
          sum[cols] += coefficient;
        }
      },
      [&](int64_t feature, const C* sum) {
        if (grad_weight != nullptr) round_row(sum, cols, grad_weight + feature * cols);
        if (grad_bias != nullptr) store_one(grad_bias + feature, sum[cols]);
      });
}

// Sums over chunks of rows, then over the chunks: the same order for any number of threads.
template <class T>
void sum_rows(const T* matrix, int64_t rows, int64_t cols, T* out) {
  using C = Compute<T>;
  constexpr int64_t chunk = 128;
  const int64_t chunks = larger(divide_up(rows, chunk), 1);
  Buffer<C> partial(chunks * cols);
  parallel_for(chunks, grain_of(chunk * cols), [&](int64_t begin, int64_t end) {
    std::memset(partial.data + begin * cols, 0, static_cast<size_t>((end - begin) * cols) * sizeof(C));
    for (int64_t row = begin * chunk; row < smaller(end * chunk, rows); ++row) {
      add_scaled(partial.data + row / chunk * cols, C(1), matrix + row * cols, cols);
    }
  });
  for (int64_t c = 1; c < chunks; ++c) add_scaled(partial.data, C(1), partial.data + c * cols, cols);
  round_row(partial.data, cols, out);
}

// Σ_c a[c] · b[c], while the row `ahead` is on its way.
template <class T>
inline Compute<T> dot(const T* a, const T* b, const T* ahead, int64_t cols) {
  using C = Compute<T>;
  constexpr int64_t step = 4 * lanes<C>;
  Vec<C> acc[4] = {};
  int64_t c = 0;
  for (; c + step <= cols; c += step) {
    for (size_t byte = 0; byte < step * sizeof(T); byte += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(ahead + c) + byte);
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) acc[v] += load(a + c + v * lanes<C>) * load(b + c + v * lanes<C>);
  }
  for (; c < cols; c += lanes<C>) acc[0] += load_first(a + c, cols - c) * load_first(b + c, cols - c);
  return sum_lanes<C>((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// grad_values[e] = grad[row of e] · weight[indices[e]]
template <class T>
void dot_entries(const SparseDecodeBackward& args, const T* grad, const T* weight, T* grad_values) {
  const CodeLayout& code = args.code;
  parallel_for(code.rows, row_grain(code, args.cols), [&](int64_t begin, int64_t end) {
    const int64_t known = first_entry(code, end);
    const auto direction = [&](int64_t latent) { return weight + larger(latent, 0) * args.cols; };
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t e = first_entry(code, row); e < first_entry(code, row + 1); ++e) {
        const int64_t latent = code.indices[e];
        const T* ahead = direction(code.indices[smaller(e + 1, known - 1)]);
        const bool empty = latent < 0;
        store_one(grad_values + e, empty ? 0 : dot(grad + row * args.cols, direction(latent), ahead, args.cols));
      }
    }
  });
}

void decode_backward(const SparseDecodeBackward& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const T* grad = static_cast<const T*>(args.grad);
    if (args.grad_values != nullptr) {
      dot_entries(args, grad, static_cast<const T*>(args.weight), static_cast<T*>(args.grad_values));
    }
    if (args.grad_weight != nullptr) {
      scatter_rows<T>(args.order, args.features, static_cast<const T*>(args.values), grad, args.cols,
                      static_cast<T*>(args.grad_weight), nullptr);
    }
    if (args.grad_bias != nullptr) sum_rows(grad, args.code.rows, args.cols, static_cast<T*>(args.grad_bias));
  });
}

void encode_backward(const SparseEncodeBackward& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const T* grad = static_cast<const T*>(args.grad);
    if (args.grad_x != nullptr) {
      const Decoder<T> to_x{args.code, args.cols, grad, static_cast<const T*>(args.weight), nullptr, nullptr};
      to_x.run(static_cast<T*>(args.grad_x), nullptr);
    }
    if (args.grad_weight != nullptr || args.grad_bias != nullptr) {
      scatter_rows<T>(args.order, args.features, grad, static_cast<const T*>(args.x), args.cols,
                      static_cast<T*>(args.grad_weight), static_cast<T*>(args.grad_bias));
    }
  });
}

void reconstruction_gradient(const ReconstructionGradient& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    const C* grad_error = static_cast<const C*>(args.grad_error);
    parallel_for(args.rows, grain_of(args.cols), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const auto row = [&](const void* matrix) { return static_cast<const T*>(matrix) + n * args.cols; };
        const T *made = row(args.reconstruction), *target = row(args.target);
        T* grad = static_cast<T*>(args.grad) + n * args.cols;
        for (int64_t c = 0; c < args.cols; c += lanes<C>) {
          const int64_t left = args.cols - c;
          const Vec<C> pull = 2 * grad_error[n] * (load_first(made + c, left) - load_first(target + c, left));
          Vec<C> sum = pull;
          if (args.grad_reconstruction != nullptr) sum += load_first(row(args.grad_reconstruction) + c, left);
          store_first(grad + c, sum, left);
          if (args.grad_target != nullptr) {
            store_first(static_cast<T*>(args.grad_target) + n * args.cols + c, -pull, left);
          }
        }
      }
    });
  });
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
