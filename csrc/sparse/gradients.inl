// Gradients of decoders and encoders.
//
// A walk by latent reads every row of weights in use once, in ascending order, and for each entry a row of the
// gradient: those are few enough for the last-level cache. It writes grad_weight once, zeros included. Walking row by
// row instead would read the weights once for each entry. Ordinary stores: streaming ones lose on pages that the system
// has just cleared.

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// Vectors of columns in registers: of the sum over a latent, and as many of its row of weights.
#if defined(__AVX512F__)
constexpr int walk_vectors = 8;
#else
constexpr int walk_vectors = 4;
#endif

// Calls f<Vectors>(c, left) for blocks of columns from c on: as many vectors as fit into what is left of the row, and a
// single one at its end, which may be less than full.
template <class C, class F>
inline void over_columns(int64_t cols, F&& f) {
  int64_t c = 0;
  for (; c + walk_vectors * lanes<C> <= cols; c += walk_vectors * lanes<C>) {
    f.template operator()<walk_vectors>(c, cols - c);
  }
  for (; c < cols; c += lanes<C>) f.template operator()<1>(c, cols - c);
}

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

// One walk through the entries by latent serves two gradients. With m the row of `matrix` that an entry e of latent f
// belongs to:
//
//     grad_weight[f] = Σ_e coefficients[e] · m        grad_coefficients[e] = weight[f] · m
//
// A row of weights is read once for all entries of its latent, and m once for both gradients. Gradients that are null
// are not made; grad_bias[f] is the sum of the coefficients alone.
template <class T>
struct LatentWalk {
  using C = Compute<T>;
  static constexpr int64_t batch = 32;          // entries whose products wait in the first-level cache
  static constexpr int64_t prefetch_ahead = 6;  // entries

  const LatentOrder& order;
  int64_t features, cols;
  const T *coefficients, *matrix, *weight;
  T *grad_coefficients, *grad_weight, *grad_bias;

  const T* row_at(int64_t position) const { return matrix + order.rows[position] * cols; }

  // What the positions first … last - 1, no more than a batch, add to the sum of their latent.
  template <bool Products>
  void add(int64_t first, int64_t last, int64_t latent, C* sum) const {
    const int64_t count = last - first, known = order.starts[features];
    C factors[batch];
    Vec<C> products[batch];
    for (int64_t i = 0; i < count; ++i) {
      factors[i] = load_number(coefficients + order.entries[first + i]);
      sum[cols] += factors[i];
      if constexpr (Products) products[i] = Vec<C>{};
    }
    const T* direction = Products ? weight + latent * cols : nullptr;
    const T* next_direction = Products ? weight + smaller(latent + 1, features - 1) * cols : nullptr;
    over_columns<C>(cols, [&]<int Vectors>(int64_t c, int64_t left) {
      Vec<C> acc[Vectors], w[Vectors];
      each_column<Vectors>(sum + c, left, [&](int v, Vec<C> part) { acc[v] = part; });
      if constexpr (Products) {
        each_column<Vectors>(direction + c, left, [&](int v, Vec<C> part) { w[v] = part; });
        prefetch_columns<Vectors>(next_direction + c);
      }
      for (int64_t i = 0; i < count; ++i) {
        prefetch_columns<Vectors>(row_at(smaller(first + i + prefetch_ahead, known - 1)) + c);
        Vec<C> product[2] = {};
        each_column<Vectors>(row_at(first + i) + c, left, [&](int v, Vec<C> m) {
          acc[v] += factors[i] * m;
          if constexpr (Products) product[v % 2] += w[v] * m;
        });
        if constexpr (Products) products[i] += product[0] + product[1];
      }
      store_columns<Vectors>(sum + c, left, acc);
    });
    if constexpr (Products) {
      for (int64_t i = 0; i < count; ++i) {
        store_one(grad_coefficients + order.entries[first + i], sum_lanes<C>(products[i]));
      }
    }
  }

  void run() const {
    sum_runs<C>(
        {features, order.starts, order.entries}, cols + 1,
        [&](int64_t first, int64_t last, int64_t latent, C* sum) {
          std::memset(sum, 0, static_cast<size_t>(cols + 1) * sizeof(C));
          for (int64_t p = first; p < last; p += batch) {
            const int64_t end = smaller(p + batch, last);
            grad_coefficients != nullptr ? add<true>(p, end, latent, sum) : add<false>(p, end, latent, sum);
          }
        },
        [&](int64_t latent, const C* sum) {
          if (grad_weight != nullptr) round_row(sum, cols, grad_weight + latent * cols);
          if (grad_bias != nullptr) store_one(grad_bias + latent, sum[cols]);
        });
  }
};

// grad_values[e] = grad[row of e] · weight[indices[e]], bit for bit as in LatentWalk; of the entries that are not
// `done`, unless that is null.
template <class T>
void dot_entries(const SparseDecodeBackward& args, const bool* done) {
  using C = Compute<T>;
  const CodeLayout& code = args.code;
  const T *grad = static_cast<const T*>(args.grad), *weight = static_cast<const T*>(args.weight);
  T* grad_values = static_cast<T*>(args.grad_values);
  const int64_t prefetch_ahead = entries_ahead(args.cols * int64_t(sizeof(T)));
  parallel_for(code.rows, row_grain(code, args.cols), [&](int64_t begin, int64_t end) {
    const int64_t known = first_entry(code, end);
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t e = first_entry(code, n); e < first_entry(code, n + 1); ++e) {
        if (done != nullptr && done[e]) continue;
        Vec<C> product = {};
        if (code.indices[e] >= 0) {
          const T *a = weight + code.indices[e] * args.cols, *b = grad + n * args.cols;
          const T* ahead = weight + larger(code.indices[smaller(e + prefetch_ahead, known - 1)], 0) * args.cols;
          over_columns<C>(args.cols, [&]<int Vectors>(int64_t c, int64_t left) {
            prefetch_columns<Vectors>(ahead + c);
            Vec<C> w[Vectors], part[2] = {};
            each_column<Vectors>(a + c, left, [&](int v, Vec<C> column) { w[v] = column; });
            each_column<Vectors>(b + c, left, [&](int v, Vec<C> m) { part[v % 2] += w[v] * m; });
            product += part[0] + part[1];
          });
        }
        store_one(grad_values + e, sum_lanes<C>(product));
      }
    }
  });
}

// Which entries are in the order.
void mark_entries(const LatentOrder& order, int64_t sorted, int64_t entries, bool* marks) {
  std::memset(marks, 0, static_cast<size_t>(entries) * sizeof(bool));
  for (int64_t p = 0; p < sorted; ++p) marks[order.entries[p]] = true;
}

void decode_backward(const SparseDecodeBackward& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const T* grad = static_cast<const T*>(args.grad);
    if (args.grad_weight != nullptr) {
      const LatentWalk<T> walk{args.order,
                               args.features,
                               args.cols,
                               static_cast<const T*>(args.values),
                               grad,
                               static_cast<const T*>(args.weight),
                               static_cast<T*>(args.grad_values),
                               static_cast<T*>(args.grad_weight),
                               nullptr};
      walk.run();
    }
    if (args.grad_values != nullptr) {
      const int64_t entries = args.code.entries;
      const int64_t sorted = args.grad_weight != nullptr ? args.order.starts[args.features] : 0;
      if (sorted < entries) {
        Buffer<bool> done(entries);
        mark_entries(args.order, sorted, entries, done.data);
        dot_entries<T>(args, done.data);
      }
    }
    if (args.grad_bias != nullptr) sum_rows(grad, args.code.rows, args.cols, static_cast<T*>(args.grad_bias));
  });
}

void encode_backward(const SparseEncodeBackward& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const T *grad = static_cast<const T*>(args.grad), *weight = static_cast<const T*>(args.weight);
    if (args.grad_x != nullptr) {
      const Decoder<T> to_x{args.code, args.cols, grad, weight, nullptr, nullptr};
      to_x.run(static_cast<T*>(args.grad_x), nullptr);
    }
    if (args.grad_weight != nullptr || args.grad_bias != nullptr) {
      const LatentWalk<T> walk{args.order,
                               args.features,
                               args.grad_weight != nullptr ? args.cols : 0,  // the bias needs no columns
                               grad,
                               static_cast<const T*>(args.x),
                               nullptr,
                               nullptr,
                               static_cast<T*>(args.grad_weight),
                               static_cast<T*>(args.grad_bias)};
      walk.run();
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
