// Included by cpu.inl: sampling, with the divergence and the log-densities of the samples on request.

// A Gaussian's row of log-density is constant - ½ Σ (standardised element)².
template <class C>
struct DensityTiles {
  Tile<C> log_std, prior_log_std;
  Tile<C> offset;             // posterior mean - prior mean
  Tile<C> inverse_prior_std;  // 1 / s_prior

  template <ScaleType S, Prior P>
  void fill(const GaussianPiece<C>& x, int64_t count) {
    for (int64_t j = 0; j < count; j += lanes<C>) {
      const Parameters<Vec<C>> at = x.template at<P>(j, count - j);
      Vec<C> log_std_q = log_std_of<S>(at.scale), log_std_p = {}, inverse = Vec<C>{} + 1;
      if constexpr (P != Prior::standard) {
        log_std_p = log_std_of<S>(at.prior_scale);
        inverse = inverse_std<S>(at.prior_scale);
      }
      if constexpr (P == Prior::residual) log_std_q += log_std_p;
      store(log_std.values + j, log_std_q);
      store(prior_log_std.values + j, log_std_p);
      store(offset.values + j, isthmus::offset<P>(at));
      store(inverse_prior_std.values + j, inverse);
    }
  }
};

// The parts of `forward` that know how the scale is given and what the prior is, for each compute type.
template <class C>
struct ForwardSteps {
  void (*fill_std)(const GaussianPiece<C>&, int64_t count, C* std);
  void (*fill_std_and_kl)(const GaussianPiece<C>&, int64_t count, C* std, C* kl);
  void (*fill_densities)(const GaussianPiece<C>&, int64_t count, DensityTiles<C>&);
};

template <class C>
ForwardSteps<C> forward_steps(const Gaussians& q) {
  ForwardSteps<C> steps = {};
  dispatch_gaussians(q, [&]<ScaleType S, Prior P>() {
    steps.fill_std = [](const GaussianPiece<C>& x, int64_t count, C* std) {
      for (int64_t j = 0; j < count; j += lanes<C>) {
        store(std + j, posterior_std<S, P>(x.template at<P>(j, count - j)));
      }
    };
    steps.fill_std_and_kl = [](const GaussianPiece<C>& x, int64_t count, C* std, C* kl) {
      for (int64_t j = 0; j < count; j += lanes<C>) {
        Vec<C> s;
        const Vec<C> element = kl_and_std<S, P>(x.template at<P>(j, count - j), s);
        store(std + j, s);
        store(kl + j, element);
      }
    };
    steps.fill_densities = [](const GaussianPiece<C>& x, int64_t count, DensityTiles<C>& tiles) {
      tiles.template fill<S, P>(x, count);
    };
  });
  return steps;
}

// Sample k has the noise from element noise_start() on, times noise_sign().
template <class Args>
int64_t noise_start(const Args& args, int64_t k) {
  return (args.antithetic ? k / 2 : k) * args.reduction.rows * args.reduction.cols;
}
template <class Args>
double noise_sign(const Args& args, int64_t k) {
  return args.antithetic && k % 2 == 1 ? -args.temperature : args.temperature;
}

template <class T>
struct Forward {
  using C = Compute<T>;
  using V = Vec<C>;

  const GaussianSample& args;
  const Key key;
  const ForwardSteps<C> steps;
  GaussianReader<T> reader;
  Tile<C> center, std, kl, noise;
  DensityTiles<C> densities;

  explicit Forward(const GaussianSample& args_)
      : args(args_), key(args_.key), steps(forward_steps<C>(args_.posterior)), reader(args_.posterior) {}

  T* z_of(const Piece& piece, int64_t k) const {
    return static_cast<T*>(args.z) + k * args.reduction.rows * args.reduction.cols + piece.first;
  }

  void write_sample(const Piece& piece, int64_t k, const C* mean) {
    const int64_t count = piece.count();
    const V factor = splat(static_cast<C>(noise_sign(args, k)));
    T* z = z_of(piece, k);
    const auto shift = [&](int64_t j) { return factor * load(std.values + j) * load(noise.values + j); };
    int64_t j = 0;
    for (; j + 2 * lanes<C> <= count; j += 2 * lanes<C>) {
      const int64_t next = j + lanes<C>;
      store_pair(z + j, {load(mean + j) + shift(j), load(mean + next) + shift(next)});
    }
    for (; j < count; j += lanes<C>) store_first(z + j, load_first(mean + j, count - j) + shift(j), count - j);
    clear_masked(args.posterior, piece.first, count, z);
  }

  // Densities of sample k: of the row, or of the part of it that the piece holds.
  void write_densities(const Piece& piece, int64_t k) const {
    C* log_q = static_cast<C*>(args.log_q) + k * args.reduction.rows + piece.row;
    C* log_p = static_cast<C*>(args.log_p) + k * args.reduction.rows + piece.row;
    const C factor = static_cast<C>(noise_sign(args, k));
    for (int64_t r = 0; r < piece.rows; ++r) {
      const int64_t from = r * piece.cols;
      V sum_q = {}, sum_p = {};
      for (int64_t c = 0; c < piece.cols; c += lanes<C>) {
        const int64_t j = from + c, left = piece.cols - c;
        const V e = factor * load_first(noise.values + j, left);
        const V shift = load_first(std.values + j, left) * e;
        const V u = (load_first(densities.offset.values + j, left) + shift) *
                    load_first(densities.inverse_prior_std.values + j, left);
        sum_q += 0.5f * e * e + load_first(densities.log_std.values + j, left);
        sum_p += 0.5f * u * u + load_first(densities.prior_log_std.values + j, left);
      }
      const C constant = static_cast<C>(half_log_two_pi * static_cast<double>(piece.cols));
      const C q = -constant - sum_lanes<C>(sum_q), p = -constant - sum_lanes<C>(sum_p);
      log_q[r] = piece.begins_rows ? q : log_q[r] + q;
      log_p[r] = piece.begins_rows ? p : log_p[r] + p;
    }
  }

  void run(const Piece& piece, const Sums<C>& sums) {
    const int64_t count = piece.count();
    const GaussianPiece<C> x = reader.read(piece.first, count);
    if (args.kl == nullptr) {
      steps.fill_std(x, count, std.values);
    } else {
      steps.fill_std_and_kl(x, count, std.values, kl.values);
      clear_masked(args.posterior, piece.first, count, kl.values);
      sums.add(piece, kl.values);
    }
    if (args.log_q != nullptr) steps.fill_densities(x, count, densities);
    const C* mean = x.mean;
    if (args.posterior.prior == Prior::residual) {
      for (int64_t j = 0; j < count; j += lanes<C>) {
        store(center.values + j, load_first(x.mean + j, count - j) + load_first(x.prior_mean + j, count - j));
      }
      mean = center.values;
    }
    reader.prefetch(piece.first + count);
    for (int64_t k = 0; k < args.num_samples; ++k) {
      prefetch<true>(z_of(piece, k));
      if (!args.antithetic || k % 2 == 0) fill_normal(key, noise_start(args, k) + piece.first, count, noise.values);
      write_sample(piece, k, mean);
      if (args.log_q != nullptr) write_densities(piece, k);
    }
  }
};

// Rows without elements are in no piece; the log of their density is 0.
template <class C>
void clear_empty_densities(const GaussianSample& args) {
  if (args.log_q == nullptr || args.reduction.cols > 0) return;
  const size_t bytes = static_cast<size_t>(args.num_samples * args.reduction.rows) * sizeof(C);
  std::memset(args.log_q, 0, bytes);
  std::memset(args.log_p, 0, bytes);
}

void sample(const GaussianSample& args) {
  dispatch_dtype(args.posterior.dtype, [&]<class T>() {
    clear_empty_densities<Compute<T>>(args);
    const RowTiles tiles = args.log_q == nullptr ? tiles_for(args.reduction) : whole_rows(args.reduction);
    const Sums<Compute<T>> sums(tiles, args.reduction, args.kl);
    parallel_for(tiles.items, tiles.grain(), [&](int64_t begin, int64_t end) {
      Forward<T> forward(args);
      for (int64_t item = begin; item < end; ++item) {
        for_each_piece(tiles, item, [&](const Piece& piece) { forward.run(piece, sums); });
      }
    });
    sums.finish();
  });
}
