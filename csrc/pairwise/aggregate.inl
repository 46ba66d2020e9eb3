// The aggregate posterior of a batch and the product of its marginals (beta-TC): row i is a sample of component i.
//
// The joint is a mixture density whose weights depend on the pair (mixture.inl). Of the marginals every element of
// every pair is a term of its own, B²·D exponentials: vectors along d, components in groups of eight that share one
// look at the running maximum, a block of rows for each group while it is in L1.
//
// Memory beside inputs and outputs: 5·B·D for the components, backward 2·B·D for each of at most 16 chunks of rows.

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// What one dimension of a pair adds to the log-density: density - ½ t².
template <class C>
struct Marginals {
  static constexpr int group = panel_width<C> < 8 ? panel_width<C> : 8;

  const Components<C>& components;
  const int64_t groups;
  Buffer<C> density;  // [groups · group, stride]: -log s - ½ log 2π; -inf for components that do not exist

  explicit Marginals(const Components<C>& components_)
      : components(components_),
        groups((components.count + group - 1) / group),
        density(groups * group * components.stride) {}

  template <class T>
  void fill(const GaussianPairs& pairs) const {
    const int64_t dim = components.dim, stride = components.stride;
    dispatch_scale(pairs.scale_type, [&]<ScaleType S>() {
      for (int64_t k = 0; k < groups * group; ++k) {
        for (int64_t d = 0; d < stride; d += lanes<C>) {
          Vec<C> value = Vec<C>{} - C(__builtin_inf());
          if (k < components.count) {
            const int64_t left = dim - d < lanes<C> ? dim - d : lanes<C>;
            const Vec<C> log_std = log_std_of<S>(load_first(static_cast<const T*>(pairs.scale) + k * dim + d, left));
            value = first_lanes<C>(left) ? -C(half_log_two_pi) - log_std : Vec<C>{};
          }
          store(density.data + k * stride + d, value);
        }
      }
    });
  }
};

// The standardised residual of a vector of dimensions.
template <class C>
ISTHMUS_INLINE Vec<C> residual_at(const Components<C>& components, int64_t at, Vec<C> z) {
  return z * load(components.slope.data + at) - load(components.shift.data + at);
}

// ---- forward -------------------------------------------------------------------------------------------------------

template <class T>
struct MarginalSums {
  using C = Compute<T>;
  static constexpr int group = Marginals<C>::group;

  const Marginals<C>& marginals;
  const RowWeights<T>& weights;
  const int64_t stride, vectors;
  Buffer<LogSum<C>> sums;  // [max_rows, vectors]

  MarginalSums(const Marginals<C>& marginals_, const RowWeights<T>& weights_)
      : marginals(marginals_),
        weights(weights_),
        stride(marginals.components.stride),
        vectors(stride / lanes<C>),
        sums(RowBlock<T>::max_rows * vectors) {}

  void run(const RowBlock<T>& block, C* log_marginal) const {
    for (int64_t i = 0; i < block.count * vectors; ++i) sums.data[i] = {};
    for (int64_t k = 0; k < marginals.components.count; k += group) {
      for (int64_t row = 0; row < block.count; ++row) meet_group(block, row, k);
    }
    for (int64_t row = 0; row < block.count; ++row) {
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t d = v * lanes<C>, i = (block.first + row) * block.dim + d;
        store_first(log_marginal + i, sums.data[row * vectors + v].value() + weights.constant, block.dim - d);
      }
    }
  }

  void meet_group(const RowBlock<T>& block, int64_t row, int64_t k) const {
    const int64_t i = block.first + row, self = i - k, next = weights.after(i) - k;
    const bool weighted = (self >= 0 && self < group) || (next >= 0 && next < group);
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t d = v * lanes<C>;
      const Vec<C> z = load(block.rows.data + row * stride + d);
      Vec<C> terms[group];
#pragma GCC unroll 8
      for (int n = 0; n < group; ++n) {
        const int64_t at = (k + n) * stride + d;
        const Vec<C> t = residual_at(marginals.components, at, z);
        terms[n] = load(marginals.density.data + at) - C(0.5) * t * t;
      }
      if (weighted) {
#pragma GCC unroll 8
        for (int n = 0; n < group; ++n) terms[n] += (n == self ? weights.self : 0) + (n == next ? weights.next : 0);
      }
      sums.data[row * vectors + v].meet(group, [&](int64_t n) { return terms[n]; });
    }
  }
};

// Calls f(components, weights, marginals) for the batch of `args`.
template <class T, class Args, class F>
void with_aggregate(const Args& args, F&& f) {
  using C = Compute<T>;
  Components<C> components(args.pairs);
  components.template fill<T>(args.pairs, [](int64_t) { return C(0); });
  const Marginals<C> marginals(components);
  marginals.template fill<T>(args.pairs);
  f(components, RowWeights<T>::aggregate(args.weights, args.pairs.rows), marginals);
}

// A marginal costs an exponential for each element, a score two operations.
constexpr int64_t products_per_term = 16;

void aggregate(const Aggregate& args) {
  const GaussianPairs& pairs = args.pairs;
  if (pairs.rows == 0) return;
  dispatch_dtype(pairs.dtype, [&]<class T>() {
    using C = Compute<T>;
    with_aggregate<T>(args, [&](const auto& components, const auto& weights, const auto& marginals) {
      const RowChunks chunks(pairs.rows);
      const LogSums<C> joint(args, args.log_joint, pairs.rows);
      parallel_for(chunks.count, grain_of_products(products_per_term * chunks.rows_per_chunk * pairs.rows * pairs.dim),
                   [&](int64_t begin, int64_t end) {
                     RowBlock<T> block(pairs.dim);
                     Scores<T> scores{components, weights, {}};
                     const MarginalSums<T> sums(marginals, weights);
                     for_each_block(pairs.z, block, chunks.first(begin), chunks.first(end), [&] {
                       sum_over_components(block, scores, joint);
                       sums.run(block, static_cast<C*>(args.log_marginal));
                     });
                   });
    });
  });
}

// ---- backward ------------------------------------------------------------------------------------------------------

// The gradient of the marginals of one block of rows.
template <class T>
struct MarginalGradient {
  using C = Compute<T>;
  static constexpr int64_t max_rows = RowBlock<T>::max_rows;

  const Marginals<C>& marginals;
  const RowWeights<T>& weights;
  const RowBlock<T>& block;
  const RowGradients<T>& to_rows;
  const ComponentSums<C> to_components;
  const int64_t stride = block.stride;
  Buffer<C> log_marginal{max_rows * stride};  // of the block: what forward found, less the weight all pairs share
  Buffer<C> grad{max_rows * stride};
  Buffer<C> extra{max_rows};  // the weight of each row's pair with one component, beside the shared one

  void load_block(const C* all_log_marginal, const C* all_grad) const {
    for (int64_t row = 0; row < block.count; ++row) {
      extra.data[row] = 0;
      for (int64_t d = 0; d < block.dim; d += lanes<C>) {
        const int64_t i = (block.first + row) * block.dim + d, left = block.dim - d;
        const Vec<C> value = load_first(all_log_marginal + i, left);
        const Vec<C> finite = value == -C(__builtin_inf()) ? Vec<C>{} : value - weights.constant;
        store(log_marginal.data + row * stride + d, finite);
        store(grad.data + row * stride + d, load_first(all_grad + i, left));
      }
    }
  }

  template <bool ToRows, bool ToComponents>
  void run() const {
    for (int64_t k = 0; k < marginals.components.count; ++k) {
      const int64_t self = k - block.first, next = (k == 0 ? weights.cycle : k) - 1 - block.first;
      set_extra(self, weights.self);
      set_extra(next, weights.next);
      for (int64_t d = 0; d < stride; d += lanes<C>) {
        pull<ToRows, ToComponents>(k * stride + d, d);
      }
      set_extra(self, 0);
      set_extra(next, 0);
    }
  }

  void set_extra(int64_t row, C weight) const {
    if (row >= 0 && row < block.count) extra.data[row] = weight;
  }

  // One vector of dimensions of one component, and all rows of the block.
  template <bool ToRows, bool ToComponents>
  ISTHMUS_INLINE void pull(int64_t at, int64_t d) const {
    const Components<C>& components = marginals.components;
    const Vec<C> slope = load(components.slope.data + at), shift = load(components.shift.data + at);
    const Vec<C> density = load(marginals.density.data + at);
    Vec<C> residual = {}, excess = {};
    for (int64_t row = 0; row < block.count; ++row) {
      const int64_t place = row * stride + d;
      const Vec<C> t = load(block.rows.data + place) * slope - shift;
      const Vec<C> term = density - C(0.5) * t * t - load(log_marginal.data + place) + extra.data[row];
      const Vec<C> weight = load(grad.data + place) * exp(term);
      const Vec<C> weighted = weight * t;
      if constexpr (ToComponents) {
        residual += weighted;
        excess += weighted * t - weight;
      }
      if constexpr (ToRows) store(to_rows.z.data + place, load(to_rows.z.data + place) - weighted * slope);
    }
    if constexpr (ToComponents) {
      store(to_components.residual + at, load(to_components.residual + at) + residual);
      store(to_components.excess + at, load(to_components.excess + at) + excess);
    }
  }
};

void aggregate_backward(const AggregateBackward& args) {
  const GaussianPairs& pairs = args.pairs;
  if (pairs.rows == 0) return;
  dispatch_dtype(pairs.dtype, [&]<class T>() {
    using C = Compute<T>;
    const Wanted wanted{args.grad_z != nullptr, args.grad_mean != nullptr};
    const Outer<C> outer(SumOver::components, args.normalizer, args.grad_joint, pairs.rows);
    with_aggregate<T>(args, [&](const Components<C>& components, const RowWeights<T>& weights, const auto& marginals) {
      const ComponentGradients<C> gradients(components, pairs.rows, wanted.components);
      for_each_block_of_chunks(
          pairs, gradients, weights, products_per_term * pairs.rows * pairs.dim, static_cast<T*>(args.grad_z),
          [&](BackwardWorker<T>& worker, const ComponentSums<C>& to_components) {
            const ScoreGradient<T> joint{worker.block, worker.scores, outer, worker.to_rows, to_components};
            const MarginalGradient<T> marginal{marginals, weights, worker.block, worker.to_rows, to_components};
            marginal.load_block(static_cast<const C*>(args.log_marginal), static_cast<const C*>(args.grad_marginal));
            dispatch_wanted(wanted, [&]<bool ToRows, bool ToComponents>() {
              joint.template run<ToRows, ToComponents>();
              marginal.template run<ToRows, ToComponents>();
            });
          });
      if (wanted.components) {
        gradients.write(pairs, static_cast<T*>(args.grad_mean), static_cast<T*>(args.grad_scale));
      }
    });
  });
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
