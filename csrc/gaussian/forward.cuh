// Included by cuda.cu: sampling, with the divergence and the log-densities of the samples on request.

template <class C>
constexpr int normals_per_block = sizeof(C) == 8 ? 2 : 4;

// Normals of elements [first, first + N) of the key's stream. N is 1 or the size of a Philox block.
template <class C, int N>
__device__ __forceinline__ void normals(const int64_t* key, int64_t first, C (&out)[N]) {
  constexpr int size = normals_per_block<C>;
  C block[size];
  normal_block(static_cast<uint64_t>(key[0]), static_cast<uint64_t>(key[1]) + static_cast<uint64_t>(first / size),
               block);
  if constexpr (N == size) {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = block[j];
  } else {
    const int lane = static_cast<int>(first % size);
    out[0] = block[0];
#pragma unroll
    for (int j = 1; j < size; ++j) out[0] = lane == j ? block[j] : out[0];
  }
}

// Draws the noise of samples 0, 1, … of one pack; an antithetic pair shares one.
template <class Args, class C, int N>
struct Noise {
  const Args& args;
  int64_t i;
  C values[N];

  __device__ __forceinline__ Noise(const Args& args_, int64_t i_) : args(args_), i(i_) {}

  // Of sample k, times temperature and sign still to be taken. After a draw of k - 1 the second of a pair is free.
  __device__ __forceinline__ void draw(int64_t k) {
    if (!second(k)) redraw(k);
  }
  __device__ __forceinline__ void redraw(int64_t k) {
    const int64_t elements = args.reduction.rows * args.reduction.cols;
    normals<C, N>(args.key, (args.antithetic ? k / 2 : k) * elements + i, values);
  }
  __device__ __forceinline__ C factor(int64_t k) const {
    return static_cast<C>(second(k) ? -args.temperature : args.temperature);
  }

 private:
  __device__ __forceinline__ bool second(int64_t k) const { return args.antithetic && k % 2 == 1; }
};

template <class T, int N>
__device__ __forceinline__ void write_sample(const GaussianSample& args, int64_t k, int64_t i,
                                             const Compute<T> (&z)[N]) {
  store(static_cast<T*>(args.z) + k * args.reduction.rows * args.reduction.cols + i, z);
}

// The mean of the posterior: of a residual one, that of the prior is part.
template <Prior P, class C>
__device__ __forceinline__ C posterior_mean(const Parameters<C>& x) {
  if constexpr (P == Prior::residual) return x.mean + x.prior_mean;
  return x.mean;
}

// All samples of a pack, and its divergence if that is wanted.
template <class T, Prior P, int N>
struct Samples {
  using C = Compute<T>;
  GaussianSample args;

  __device__ __forceinline__ void operator()(int64_t i, C (&kl)[N]) const {
    const Gaussians& q = args.posterior;
    fill(C(0), kl);
    if (is_masked(q, i)) {
      for (int64_t k = 0; k < args.num_samples; ++k) write_sample<T>(args, k, i, kl);
      return;
    }
    const GaussianPack<T, P, N> x(q, i);
    C std[N];
    with_scale_type(q.scale_type, [&]<ScaleType S>() {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        std[j] = posterior_std<S, P>(x.at(j));
        if (args.kl != nullptr) kl[j] = kl_of<S, P>(x.at(j));
      }
    });
    Noise<GaussianSample, C, N> noise(args, i);
    for (int64_t k = 0; k < args.num_samples; ++k) {
      noise.draw(k);
      const C factor = noise.factor(k);
      C z[N];
#pragma unroll
      for (int j = 0; j < N; ++j) z[j] = posterior_mean<P>(x.at(j)) + factor * std[j] * noise.values[j];
      write_sample<T>(args, k, i, z);
    }
  }
};

// What the log-densities of a pack depend on. A row of log-density is -Σ ½ (standardised element)² + log s + ½ log 2π.
template <class C, int N>
struct DensityPack {
  C std[N], log_std[N], prior_log_std[N];
  C offset[N];             // posterior mean - prior mean
  C inverse_prior_std[N];  // 1 / s_prior

  template <Prior P, class T>
  __device__ __forceinline__ DensityPack(const Gaussians& q, const GaussianPack<T, P, N>& x) {
    with_scale_type(q.scale_type, [&]<ScaleType S>() {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const Parameters<C> at = x.at(j);
        std[j] = posterior_std<S, P>(at);
        log_std[j] = log_std_of<S>(at.scale);
        offset[j] = cuda::offset<P>(at);
        prior_log_std[j] = 0;
        inverse_prior_std[j] = 1;
        if constexpr (P != Prior::standard) {
          prior_log_std[j] = log_std_of<S>(at.prior_scale);
          inverse_prior_std[j] = inverse_std<S>(at.prior_scale);
        }
        if constexpr (P == Prior::residual) log_std[j] += prior_log_std[j];
      }
    });
  }

  // Element j, standardised by the prior, when temperature · noise is e.
  __device__ __forceinline__ C against_prior(int j, C e) const {
    return (offset[j] + std[j] * e) * inverse_prior_std[j];
  }
};

// Samples and their log-densities. A row of one sample belongs to one team; teams of the samples of a row are
// neighbours and find its parameters in the cache.
template <class T, Prior P, int N>
__global__ void __launch_bounds__(threads_per_block) sample_densities_kernel(GaussianSample args, Cut cut) {
  using C = Compute<T>;
  const Gaussians& q = args.posterior;
  const Walk walk(cut, N);
  const int64_t row = walk.sum / args.num_samples, k = walk.sum % args.num_samples;
  const int64_t skipped = (walk.sum - row) * args.reduction.cols;  // the walk counts every sample's row
  C sum_q = 0, sum_p = 0;
  for (int64_t at = walk.first; at < walk.end; at += walk.step) {
    const int64_t i = at - skipped;
    C z[N] = {};
    if (!is_masked(q, i)) {
      const GaussianPack<T, P, N> x(q, i);
      const DensityPack<C, N> densities(q, x);
      Noise<GaussianSample, C, N> noise(args, i);
      noise.redraw(k);
      const C factor = noise.factor(k);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const C e = factor * noise.values[j], u = densities.against_prior(j, e);
        z[j] = posterior_mean<P>(x.at(j)) + densities.std[j] * e;
        sum_q -= C(0.5) * e * e + densities.log_std[j] + C(half_log_two_pi);
        sum_p -= C(0.5) * u * u + densities.prior_log_std[j] + C(half_log_two_pi);
      }
    }
    write_sample<T>(args, k, i, z);
  }
  sum_q = team_sum(sum_q, cut.lanes);
  sum_p = team_sum(sum_p, cut.lanes);
  if (!walk.leads) return;
  static_cast<C*>(args.log_q)[k * args.reduction.rows + row] = sum_q;
  static_cast<C*>(args.log_p)[k * args.reduction.rows + row] = sum_p;
}

template <class T, Prior P, int N>
void sample_densities(const GaussianSample& args, void* stream) {
  const char* name = "gaussian_sample_log_prob";
  const Reduction& view = args.reduction;
  const int64_t rows = args.num_samples * view.rows;
  if (rows * view.cols == 0) {
    write_zeros<Compute<T>>(name, args.log_q, rows, stream);
    return write_zeros<Compute<T>>(name, args.log_p, rows, stream);
  }
  const Cut cut({rows, view.cols, false, 1}, N, true);
  launch(name, sample_densities_kernel<T, P, N>, cut.blocks, threads_per_block, 0, stream, args, cut);
}

template <class T, Prior P, int N>
void sample(GaussianSample args, void* workspace, void* stream) {
  if (args.log_q != nullptr) {
    sample_densities<T, P, N>(args, stream);
    args.num_samples = 0;  // only the divergence is left
  }
  if (args.kl == nullptr && args.num_samples == 0) return;
  const Reduction view = args.kl != nullptr ? args.reduction : no_reduction(args.reduction);
  sum<N, Compute<T>>("gaussian_sample", Samples<T, P, N>{args}, view, args.kl, workspace, stream);
}
