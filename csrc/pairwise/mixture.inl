// Mixture densities: log Σ exp of the scores of each row over the components, or of each component over the rows.
//
// Forward keeps one running log-sum-exp for each lane of each row (or each component) and forgets the scores. Backward
// computes them again and turns them into responsibilities r = grad · exp(score - log_prob), then
//
//     ∂/∂z_i = -Σ_k r t / s_k      ∂/∂m_k = Σ_i r t / s_k      ∂/∂log s_k = Σ_i r (t² - 1)      ∂/∂log_weight = Σ r
//
// with vectors along d, pair by pair: most pairs of a trained mixture have r = 0 exactly and cost nothing.
//
// Arithmetic: 2·N·K·D operations forward, 2·N·K·D plus 5·D for each pair with r ≠ 0 backward. Memory beside inputs and
// outputs: 4·K·D for the components, backward 2·K·D for each of at most 16 chunks of rows.

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// ---- forward -------------------------------------------------------------------------------------------------------

// The log-sum-exp over the components of every row of a block.
template <class T>
void sum_over_components(const RowBlock<T>& block, Scores<T>& scores, const LogSums<Compute<T>>& out) {
  using C = Compute<T>;
  LogSum<C> sums[RowBlock<T>::max_rows];
  for (int64_t p = 0; p < scores.components.panels; ++p) {
    for (int64_t row = 0; row < block.count; row += tile_rows) {
      const int64_t count = scores.compute(block, row, p);
      for (int64_t r = 0; r < count; ++r) {
        const C* values = scores.values + r * scores.width;
        sums[row + r].meet(2, [&](int64_t i) { return load(values + i * lanes<C>); });
      }
    }
  }
  for (int64_t row = 0; row < block.count; ++row) out.write(block.first + row, sums[row].of_all_lanes(), 1);
}

template <class T>
void each_row(const GaussianPairs& pairs, const Components<Compute<T>>& components, const RowWeights<T>& weights,
              const LogSums<Compute<T>>& out) {
  const RowChunks chunks(pairs.rows);
  parallel_for(chunks.count, grain_of_products(2 * chunks.rows_per_chunk * pairs.components * pairs.dim),
               [&](int64_t begin, int64_t end) {
                 RowBlock<T> block(pairs.dim);
                 Scores<T> scores{components, weights, {}};
                 for_each_block(pairs.z, block, chunks.first(begin), chunks.first(end),
                                [&] { sum_over_components(block, scores, out); });
               });
}

// The log-sum-exp over the rows of a block, added to those of the blocks before it.
template <class T>
void sum_over_rows(const RowBlock<T>& block, Scores<T>& scores, LogSum<Compute<T>>* sums) {
  using C = Compute<T>;
  for (int64_t p = 0; p < scores.components.panels; ++p) {
    for (int64_t row = 0; row < block.count; row += tile_rows) {
      const int64_t count = scores.compute(block, row, p);
      for (int64_t v = 0; v < 2; ++v) {
        const C* values = scores.values + v * lanes<C>;
        sums[2 * p + v].meet(count, [&](int64_t r) { return load(values + r * scores.width); });
      }
    }
  }
}

template <class T>
void each_component(const GaussianPairs& pairs, const Components<Compute<T>>& components, const RowWeights<T>& weights,
                    const LogSums<Compute<T>>& out) {
  using C = Compute<T>;
  const RowChunks chunks(pairs.rows);
  const int64_t vectors = 2 * components.panels;
  Buffer<LogSum<C>> sums(chunks.count * vectors);
  parallel_for(chunks.count, grain_of_products(2 * chunks.rows_per_chunk * pairs.components * pairs.dim),
               [&](int64_t begin, int64_t end) {
                 RowBlock<T> block(pairs.dim);
                 Scores<T> scores{components, weights, {}};
                 for (int64_t chunk = begin; chunk < end; ++chunk) {
                   LogSum<C>* of_chunk = sums.data + chunk * vectors;
                   for (int64_t v = 0; v < vectors; ++v) of_chunk[v] = {};
                   for_each_block(pairs.z, block, chunks.first(chunk), chunks.first(chunk + 1),
                                  [&] { sum_over_rows(block, scores, of_chunk); });
                 }
               });
  for (int64_t v = 0; v < vectors; ++v) {
    LogSum<C> total;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) total.merge(sums.data[chunk * vectors + v]);
    const int64_t k = v * lanes<C>;
    if (k < pairs.components) out.write(k, total, pairs.components - k);
  }
}

// What a term of the sum weighs if nobody says: they all weigh the same.
template <class C>
inline C uniform_log_weight(int64_t terms) {
  return static_cast<C>(-__builtin_log(static_cast<double>(terms)));
}

// Calls f(components, weights) for the sums of `args`.
template <class T, class Args, class F>
void with_scores(const Args& args, F&& f) {
  using C = Compute<T>;
  const GaussianPairs& pairs = args.pairs;
  const T* log_weight = static_cast<const T*>(args.log_weight);
  Components<C> components(pairs);
  if (args.over == SumOver::components) {
    const C uniform = uniform_log_weight<C>(pairs.components);
    components.template fill<T>(pairs, [&](int64_t k) { return load_or(log_weight, k, uniform); });
    f(components, RowWeights<T>{});
  } else {
    components.template fill<T>(pairs, [](int64_t) { return C(0); });
    f(components, RowWeights<T>{.constant = uniform_log_weight<C>(pairs.rows), .of_rows = log_weight});
  }
}

void mixture(const Mixture& args) {
  dispatch_dtype(args.pairs.dtype, [&]<class T>() {
    const int64_t sums = args.over == SumOver::components ? args.pairs.rows : args.pairs.components;
    const LogSums<Compute<T>> out(args, args.log_prob, sums);
    with_scores<T>(args, [&](const auto& components, const auto& weights) {
      const auto sum = args.over == SumOver::components ? each_row<T> : each_component<T>;
      sum(args.pairs, components, weights, out);
    });
  });
}

// ---- backward ------------------------------------------------------------------------------------------------------

// Sums over a chunk of rows, for each component.
template <class C>
struct ComponentSums {
  C* residual;  // [K, stride]: Σ r t
  C* excess;    // [K, stride]: Σ r t², in the end less Σ r
  C* weight;    // [panels · width]: Σ r
};

// The partial sums of all chunks, and the gradients they add up to.
template <class C>
struct ComponentGradients {
  const Components<C>& components;
  const RowChunks chunks;
  const bool wanted;
  const int64_t matrix, vector;  // elements of one chunk
  Buffer<C> residuals, excesses, weights;

  ComponentGradients(const Components<C>& components_, int64_t rows, bool wanted_)
      : components(components_),
        chunks(rows),
        wanted(wanted_),
        matrix(wanted ? components.count * components.stride : 0),
        vector(wanted ? components.panels * components.width : 0),
        residuals(chunks.count * matrix),
        excesses(chunks.count * matrix),
        weights(chunks.count * vector) {}

  // The sums of a chunk, set to zero.
  ComponentSums<C> begin(int64_t chunk) const {
    const ComponentSums<C> sums{residuals.data + chunk * matrix, excesses.data + chunk * matrix,
                                weights.data + chunk * vector};
    for (int64_t i = 0; i < matrix; ++i) sums.residual[i] = sums.excess[i] = 0;
    for (int64_t i = 0; i < vector; ++i) sums.weight[i] = 0;
    return sums;
  }

  C weight_of(int64_t k) const {
    C sum = 0;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) sum += weights.data[chunk * vector + k];
    return sum;
  }
  Vec<C> sum_of(const Buffer<C>& partial, int64_t i) const {
    Vec<C> sum = {};
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) sum += load(partial.data + chunk * matrix + i);
    return sum;
  }

  template <class T>
  void write(const GaussianPairs& pairs, T* grad_mean, T* grad_scale) const {
    const int64_t dim = pairs.dim, stride = components.stride;
    dispatch_scale(pairs.scale_type, [&]<ScaleType S>() {
      parallel_for(components.count, grain_elements / (2 * dim * (chunks.count + 1) + 1) + 1,
                   [&](int64_t begin, int64_t end) {
                     for (int64_t k = begin; k < end; ++k) {
                       const C weight = weight_of(k);
                       for (int64_t d = 0; d < dim; d += lanes<C>) {
                         const int64_t i = k * stride + d, out = k * dim + d, left = dim - d;
                         const Vec<C> scale = load_first(static_cast<const T*>(pairs.scale) + out, left);
                         const Vec<C> to_mean = sum_of(residuals, i) * load(components.slope.data + i);
                         const Vec<C> to_log_std = sum_of(excesses, i) - weight;
                         store_first(grad_mean + out, to_mean, left);
                         store_first(grad_scale + out, to_log_std * log_std_slope<S>(scale), left);
                       }
                     }
                   });
    });
  }
};

// The gradient with respect to the rows of a block.
template <class T>
struct RowGradients {
  using C = Compute<T>;
  Buffer<C> z;       // [max_rows, stride]
  Buffer<C> weight;  // [max_rows]: Σ r

  explicit RowGradients(int64_t stride) : z(RowBlock<T>::max_rows * stride), weight(RowBlock<T>::max_rows) {}

  void begin(const RowBlock<T>& block) const {
    for (int64_t i = 0; i < block.count * block.stride; ++i) z.data[i] = 0;
    for (int64_t i = 0; i < block.count; ++i) weight.data[i] = 0;
  }
  void write(const RowBlock<T>& block, T* grad_z) const {
    for (int64_t row = 0; row < block.count; ++row) {
      for (int64_t d = 0; d < block.dim; d += lanes<C>) {
        const int64_t left = block.dim - d;
        store_first(grad_z + (block.first + row) * block.dim + d, load(z.data + row * block.stride + d), left);
      }
    }
  }
};

// Which gradients are accumulated: a pass that nobody asked for is not made.
struct Wanted {
  bool rows, components;
};

template <class F>
inline void dispatch_wanted(Wanted wanted, F&& f) {
  if (wanted.rows && wanted.components) return f.template operator()<true, true>();
  if (wanted.rows) return f.template operator()<true, false>();
  if (wanted.components) return f.template operator()<false, true>();
  f.template operator()<false, false>();
}

// What the scores were summed over, what forward kept of the sums, and their incoming gradients.
template <class C>
struct Outer {
  SumOver over;
  const C *peak, *log_sum, *grad;

  Outer(SumOver over_, const void* normalizer, const void* grad_, int64_t count)
      : over(over_),
        peak(static_cast<const C*>(normalizer)),
        log_sum(peak + count),
        grad(static_cast<const C*>(grad_)) {}
};

// r = grad · exp(score - log Σ exp); 0 where the sum was over nothing but -inf.
template <class C>
ISTHMUS_INLINE Vec<C> responsibility(Vec<C> score, Vec<C> peak, Vec<C> log_sum, Vec<C> grad) {
  const Vec<C> finite = log_sum == -C(__builtin_inf()) ? Vec<C>{} : log_sum;
  return grad * exp(score - peak - finite);
}

// Calls f<N>(d) for N vectors at d, as many at a time as their registers allow.
template <class C, class F>
ISTHMUS_INLINE void for_vectors(int64_t stride, F&& f) {
  constexpr int most = vector_bytes == 64 ? 4 : 2;
  int64_t d = 0;
  for (; d + most * lanes<C> <= stride; d += most * lanes<C>) f.template operator()<most>(d);
  for (; d < stride; d += lanes<C>) f.template operator()<1>(d);
}

// The gradient of the scores of one block of rows with all components.
template <class T>
struct ScoreGradient {
  using C = Compute<T>;
  static constexpr int64_t width = panel_width<C>;

  const RowBlock<T>& block;
  Scores<T>& scores;
  const Outer<C> outer;
  const RowGradients<T>& to_rows;
  const ComponentSums<C> to_components;

  template <bool ToRows, bool ToComponents>
  void run() const {
    for (int64_t p = 0; p < scores.components.panels; ++p) {
      for (int64_t row = 0; row < block.count; row += tile_rows) {
        const int64_t count = scores.compute(block, row, p);
        if (!to_responsibilities<ToComponents>(row, count, p)) continue;
        const int64_t left = scores.components.count - p * width, columns = left < width ? left : width;
        if constexpr (ToRows) {
          for (int64_t r = 0; r < count; ++r) pull_row(row + r, p * width, columns, scores.values + r * width);
        }
        if constexpr (ToComponents) {
          for (int64_t j = 0; j < columns; ++j) pull_component(p * width + j, row, count, scores.values + j);
        }
      }
    }
  }

  // Turns the scores into r, and sums r over both sides. Is any r not 0?
  template <bool ToComponents>
  bool to_responsibilities(int64_t row, int64_t count, int64_t p) const {
    const int64_t last = scores.components.count - p * width;
    Mask<C> felt = {};
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = block.first + row + r;
      Vec<C> row_sum = {};
      for (int64_t j = 0; j < width && j < last; j += lanes<C>) {
        const bool by_row = outer.over == SumOver::components;
        const int64_t k = p * width + j, left = last - j;
        const auto of_sum = [&](const C* values) { return by_row ? splat(values[i]) : load_first(values + k, left); };
        C* value = scores.values + r * width + j;
        const Vec<C> weight =
            responsibility<C>(load(value), of_sum(outer.peak), of_sum(outer.log_sum), of_sum(outer.grad));
        store(value, weight);
        row_sum += weight;
        felt |= weight != 0;
        if constexpr (ToComponents) store(to_components.weight + k, load(to_components.weight + k) + weight);
      }
      to_rows.weight.data[row + r] += sum_lanes<C>(row_sum);
    }
    return any(felt);
  }

  // -Σ_k r t / s_k of a row and the components k = first, …; r is weights[0], ….
  ISTHMUS_NOINLINE void pull_row(int64_t row, int64_t first, int64_t columns, const C* weights) const {
    for_vectors<C>(block.stride, [&]<int N>(int64_t d) {
      const Components<C>& components = scores.components;
      C* to_z = to_rows.z.data + row * block.stride + d;
      Vec<C> z[N], sum[N];
      for (int v = 0; v < N; ++v) {
        z[v] = load(block.rows.data + row * block.stride + d + v * lanes<C>);
        sum[v] = load(to_z + v * lanes<C>);
      }
      for (int64_t j = 0; j < columns; ++j) {
        if (weights[j] == 0) continue;
        const int64_t at = (first + j) * block.stride + d;
        for (int v = 0; v < N; ++v) {
          const Vec<C> slope = load(components.slope.data + at + v * lanes<C>);
          const Vec<C> t = z[v] * slope - load(components.shift.data + at + v * lanes<C>);
          sum[v] -= weights[j] * t * slope;
        }
      }
      for (int v = 0; v < N; ++v) store(to_z + v * lanes<C>, sum[v]);
    });
  }

  // Σ_i r t and Σ_i r t² of a component and the rows i = first, …; r is weights[0], weights[width], ….
  ISTHMUS_NOINLINE void pull_component(int64_t k, int64_t first, int64_t count, const C* weights) const {
    for_vectors<C>(block.stride, [&]<int N>(int64_t d) {
      const int64_t at = k * block.stride + d;
      C *to_residual = to_components.residual + at, *to_excess = to_components.excess + at;
      Vec<C> slope[N], shift[N], residual[N], excess[N];
      for (int v = 0; v < N; ++v) {
        slope[v] = load(scores.components.slope.data + at + v * lanes<C>);
        shift[v] = load(scores.components.shift.data + at + v * lanes<C>);
        residual[v] = load(to_residual + v * lanes<C>);
        excess[v] = load(to_excess + v * lanes<C>);
      }
      for (int64_t r = 0; r < count; ++r) {
        const C weight = weights[r * width];
        if (weight == 0) continue;
        const C* z = block.rows.data + (first + r) * block.stride + d;
        for (int v = 0; v < N; ++v) {
          const Vec<C> t = load(z + v * lanes<C>) * slope[v] - shift[v];
          const Vec<C> weighted = weight * t;
          residual[v] += weighted;
          excess[v] += weighted * t;
        }
      }
      for (int v = 0; v < N; ++v) {
        store(to_residual + v * lanes<C>, residual[v]);
        store(to_excess + v * lanes<C>, excess[v]);
      }
    });
  }
};

// What a thread works with, and what its additions go to.
template <class T>
struct BackwardWorker {
  using C = Compute<T>;
  RowBlock<T> block;
  RowGradients<T> to_rows;
  Scores<T> scores;

  BackwardWorker(const Components<C>& components, const RowWeights<T>& weights)
      : block(components.dim), to_rows(block.stride), scores{components, weights, {}} {}
};

// Calls add(worker, to_components) with each block of rows loaded, and writes the gradient of the rows.
template <class T, class Add>
void for_each_block_of_chunks(const GaussianPairs& pairs, const ComponentGradients<Compute<T>>& gradients,
                              const RowWeights<T>& weights, int64_t products_per_row, T* grad_z, Add&& add) {
  const RowChunks& chunks = gradients.chunks;
  parallel_for(chunks.count, grain_of_products(chunks.rows_per_chunk * products_per_row),
               [&](int64_t begin, int64_t end) {
                 BackwardWorker<T> worker(gradients.components, weights);
                 for (int64_t chunk = begin; chunk < end; ++chunk) {
                   const auto to_components = gradients.begin(chunk);
                   for_each_block(pairs.z, worker.block, chunks.first(chunk), chunks.first(chunk + 1), [&] {
                     worker.to_rows.begin(worker.block);
                     add(worker, to_components);
                     if (grad_z != nullptr) worker.to_rows.write(worker.block, grad_z);
                   });
                 }
               });
}

void mixture_backward(const MixtureBackward& args) {
  dispatch_dtype(args.pairs.dtype, [&]<class T>() {
    using C = Compute<T>;
    const GaussianPairs& pairs = args.pairs;
    T* grad_log_weight = static_cast<T*>(args.grad_log_weight);
    T* weights_of_rows = args.over == SumOver::rows ? grad_log_weight : nullptr;
    T* weights_of_components = args.over == SumOver::components ? grad_log_weight : nullptr;
    const Wanted wanted{args.grad_z != nullptr, args.grad_mean != nullptr || weights_of_components != nullptr};
    const int64_t sums = args.over == SumOver::components ? pairs.rows : pairs.components;
    const Outer<C> outer(args.over, args.normalizer, args.grad, sums);
    with_scores<T>(args, [&](const Components<C>& components, const RowWeights<T>& weights) {
      const ComponentGradients<C> gradients(components, pairs.rows, wanted.components);
      for_each_block_of_chunks(
          pairs, gradients, weights, 7 * pairs.components * pairs.dim, static_cast<T*>(args.grad_z),
          [&](BackwardWorker<T>& worker, const ComponentSums<C>& to_components) {
            const ScoreGradient<T> gradient{worker.block, worker.scores, outer, worker.to_rows, to_components};
            dispatch_wanted(wanted,
                            [&]<bool ToRows, bool ToComponents>() { gradient.template run<ToRows, ToComponents>(); });
            if (weights_of_rows == nullptr) return;
            for (int64_t r = 0; r < worker.block.count; ++r) {
              store_one(weights_of_rows + worker.block.first + r, worker.to_rows.weight.data[r]);
            }
          });
      if (args.grad_mean != nullptr) {
        gradients.write(pairs, static_cast<T*>(args.grad_mean), static_cast<T*>(args.grad_scale));
      }
      if (weights_of_components == nullptr) return;
      for (int64_t k = 0; k < pairs.components; ++k) store_one(weights_of_components + k, gradients.weight_of(k));
    });
  });
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
