// Included by cpu.inl: gradients of sampling, of the divergence and of the log-densities, in one pass.
//
// What flows through the samples is summed over them first, into tiles; a last loop turns the sums into gradients. One
// sample needs no sums: the loop then takes its gradient from where it lies.

template <class C>
struct Flow {
  Tile<C> to_mean, to_std;                  // Σ_k of the gradient at z, and of that times temperature · noise
  Tile<C> to_kl;                            // gradient of the divergence of each element
  Tile<C> to_log_q;                         // Σ_k grad_log_q of the element's row
  Tile<C> to_prior_mean, to_prior_log_std;  // through log_p, z held fixed
};

// The only sample's gradient, its noise, and the factor of that.
template <class C>
struct OneSample {
  const C *grad, *noise;
  C factor;
};

struct FlowOptions {
  bool one_sample, with_kl, with_densities;  // one_sample: and no densities
  double posterior_weight, prior_weight;
};

template <class C>
struct BackwardSteps {
  void (*fill_std)(const GaussianPiece<C>&, int64_t count, C* std);
  void (*fill_densities)(const GaussianPiece<C>&, int64_t count, DensityTiles<C>&);
  void (*write)(const GaussianPiece<C>&, int64_t count, const Flow<C>&, const OneSample<C>&, const FlowOptions&,
                C* mean, C* scale, C* prior_mean, C* prior_scale);
};

template <class C, ScaleType S, Prior P, bool Single, bool WithKl, bool WithDensities>
void write_gradients(const GaussianPiece<C>& x, int64_t count, const Flow<C>& flow, const OneSample<C>& sample,
                     C posterior_weight, C prior_weight, C* grad_mean, C* grad_scale, C* grad_prior_mean,
                     C* grad_prior_scale) {
  using V = Vec<C>;
  for (int64_t j = 0; j < count; j += lanes<C>) {
    const int64_t left = count - j;
    const Parameters<V> at = x.template at<P>(j, left);
    V to_mean, to_std, slope;
    if constexpr (Single) {
      to_mean = load_first(sample.grad + j, left);
      to_std = sample.factor * to_mean * load(sample.noise + j);
    } else {
      to_mean = load(flow.to_mean.values + j);
      to_std = load(flow.to_std.values + j);
    }
    Parameters<V> sum = {to_mean, {}, {}, {}};
    if constexpr (WithKl) {
      const Parameters<V> kl = kl_and_std_slopes<S, P>(at, slope);
      const V to_kl = load(flow.to_kl.values + j), to_posterior = to_kl * posterior_weight;
      sum.mean += to_posterior * kl.mean;
      sum.scale = to_posterior * kl.scale;
      sum.prior_mean = to_kl * prior_weight * kl.prior_mean;
      sum.prior_scale = to_kl * prior_weight * kl.prior_scale;
    } else {
      slope = std_slope<S>(at.scale);
      if constexpr (P == Prior::residual) slope *= std_of<S>(at.prior_scale);
    }
    sum.scale += to_std * slope;
    if constexpr (WithDensities) {
      const V to_log_q = load(flow.to_log_q.values + j);
      sum.scale -= to_log_q * log_std_slope<S>(at.scale);
      if constexpr (P != Prior::standard) {
        V to_prior_log_std = load(flow.to_prior_log_std.values + j);
        if constexpr (P == Prior::residual) to_prior_log_std -= to_log_q;
        sum.prior_mean += load(flow.to_prior_mean.values + j);
        sum.prior_scale += to_prior_log_std * log_std_slope<S>(at.prior_scale);
      }
    }
    if constexpr (P == Prior::residual) {
      sum.prior_mean += to_mean;
      sum.prior_scale += to_std * std_of<S>(at.scale) * std_slope<S>(at.prior_scale);
    }
    store_first(grad_mean + j, sum.mean, left);
    store_first(grad_scale + j, sum.scale, left);
    if constexpr (P != Prior::standard) {
      if (grad_prior_mean == nullptr) continue;
      store_first(grad_prior_mean + j, sum.prior_mean, left);
      store_first(grad_prior_scale + j, sum.prior_scale, left);
    }
  }
}

template <class C>
BackwardSteps<C> backward_steps(const Gaussians& q) {
  BackwardSteps<C> steps = {forward_steps<C>(q).fill_std, forward_steps<C>(q).fill_densities, nullptr};
  dispatch_gaussians(q, [&]<ScaleType S, Prior P>() {
    steps.write = [](const GaussianPiece<C>& x, int64_t count, const Flow<C>& flow, const OneSample<C>& sample,
                     const FlowOptions& options, C* mean, C* scale, C* prior_mean, C* prior_scale) {
      const C posterior_weight = static_cast<C>(options.posterior_weight);
      const C prior_weight = static_cast<C>(options.prior_weight);
      const auto run = [&]<bool Single, bool WithKl, bool WithDensities>() {
        write_gradients<C, S, P, Single, WithKl, WithDensities>(x, count, flow, sample, posterior_weight, prior_weight,
                                                                mean, scale, prior_mean, prior_scale);
      };
      if (options.with_densities) return run.template operator()<false, true, true>();
      if (options.one_sample && options.with_kl) return run.template operator()<true, true, false>();
      if (options.one_sample) return run.template operator()<true, false, false>();
      if (options.with_kl) return run.template operator()<false, true, false>();
      run.template operator()<false, false, false>();
    };
  });
  return steps;
}

template <class T>
struct Backward {
  using C = Compute<T>;
  using V = Vec<C>;

  const GaussianSampleBackward& args;
  const Key key;
  const BackwardSteps<C> steps;
  const int64_t elements;  // of a sample
  GaussianReader<T> reader;
  Reader<T> grad_reader;
  GaussianWriter<T> writer;
  Flow<C> flow;
  Tile<C> noise, std;
  DensityTiles<C> densities;

  explicit Backward(const GaussianSampleBackward& args_)
      : args(args_),
        key(args_.key),
        steps(backward_steps<C>(args_.posterior)),
        elements(args_.reduction.rows * args_.reduction.cols),
        reader(args_.posterior),
        grad_reader({args_.grad_z, args_.num_samples * elements, 0}),
        writer(args_.grads) {}

  const T* grad_z(const Piece& piece, int64_t k) const {
    return static_cast<const T*>(args.grad_z) + k * elements + piece.first;
  }

  void add_sample(const Piece& piece, int64_t k) {
    const int64_t count = piece.count();
    const T* grad = grad_z(piece, k);
    const V factor = splat(static_cast<C>(noise_sign(args, k)));
    C *to_mean = flow.to_mean.values, *to_std = flow.to_std.values;
    for (int64_t j = 0; j < count; j += lanes<C>) {
      const V g = load_first(grad + j, count - j), scaled = factor * g * load(noise.values + j);
      store(to_mean + j, k == 0 ? g : load(to_mean + j) + g);
      store(to_std + j, k == 0 ? scaled : load(to_std + j) + scaled);
    }
  }

  // The same with log-densities: the part of one row that the piece holds.
  void add_row_of_sample(const Piece& piece, int64_t r, int64_t k) {
    const int64_t at = k * args.reduction.rows + piece.row + r;
    const C to_q = static_cast<const C*>(args.grad_log_q)[at], to_p = static_cast<const C*>(args.grad_log_p)[at];
    const C gate = args.gate == nullptr ? 1 : static_cast<const C*>(args.gate)[at];
    const C through_q = args.path_only ? to_q : 0, of_q = args.path_only ? 0 : gate * to_q;
    const C factor = static_cast<C>(noise_sign(args, k));
    const T* grad = grad_z(piece, k);
    for (int64_t c = 0; c < piece.cols; c += lanes<C>) {
      const int64_t j = r * piece.cols + c, left = piece.cols - c;
      const auto add = [&](Tile<C>& sum, V more) {
        store_first(sum.values + j, k == 0 ? more : load_first(sum.values + j, left) + more, left);
      };
      const V e = factor * load_first(noise.values + j, left), s = load_first(std.values + j, left);
      const V inverse = load_first(densities.inverse_prior_std.values + j, left);
      const V u = (load_first(densities.offset.values + j, left) + s * e) * inverse;
      const V along_p = to_p * u * inverse;  // minus the slope of log_p along z
      const V at_z = gate * (load_first(grad + j, left) - along_p - (through_q == 0 ? V{} : through_q * e / s));
      add(flow.to_mean, at_z);
      add(flow.to_std, e * at_z);
      add(flow.to_log_q, splat(of_q));
      add(flow.to_prior_mean, along_p);
      add(flow.to_prior_log_std, to_p * (u * u - 1));
    }
  }

  void run(const Piece& piece) {
    const int64_t count = piece.count();
    const GaussianPiece<C> x = reader.read(piece.first, count);
    const bool with_densities = args.grad_log_q != nullptr;
    const FlowOptions options{args.num_samples == 1 && !with_densities, args.grad_kl != nullptr, with_densities,
                              args.posterior_weight, args.prior_weight};
    if (options.with_densities) {
      steps.fill_std(x, count, std.values);
      steps.fill_densities(x, count, densities);
    }
    for (int64_t k = 0; k < args.num_samples; ++k) {
      Prefetches ahead;
      ahead.add<false>(grad_z(piece, k) + (options.one_sample ? count : 0));
      if (k == 0) {
        reader.prefetch(piece.first + count, ahead);
        writer.prefetch(piece.first, ahead);
      }
      if (!args.antithetic || k % 2 == 0) {
        fill_normal(key, noise_start(args, k) + piece.first, count, noise.values, ahead);
      }
      if (options.one_sample) break;
      if (!options.with_densities) {
        add_sample(piece, k);
        continue;
      }
      for (int64_t r = 0; r < piece.rows; ++r) add_row_of_sample(piece, r, k);
    }
    if (options.with_kl) spread(args.reduction, piece, static_cast<const C*>(args.grad_kl), flow.to_kl.values);

    writer.begin(piece.first, count);
    const OneSample<C> sample{options.one_sample ? grad_reader.read(piece.first, count) : nullptr, noise.values,
                              static_cast<C>(args.temperature)};
    steps.write(x, count, flow, sample, options, writer.mean, writer.scale, writer.prior_mean, writer.prior_scale);
    const Gaussians& q = args.posterior;
    if (q.clamp.mode != Clamp::Mode::none) clamp_gradient(q.clamp, x.raw_scale, count, writer.scale);
    writer.clear_masked(q, piece.first, count);
    writer.write(piece.first, count);
  }
};

void sample_backward(const GaussianSampleBackward& args) {
  dispatch_dtype(args.posterior.dtype, [&]<class T>() {
    const RowTiles tiles = tiles_for(args.reduction);
    parallel_for(tiles.items, tiles.grain(), [&](int64_t begin, int64_t end) {
      Backward<T> backward(args);
      for (int64_t item = begin; item < end; ++item) {
        for_each_piece(tiles, item, [&](const Piece& piece) { backward.run(piece); });
      }
    });
  });
}
