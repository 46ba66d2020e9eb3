// Included by cuda.cu: gradients of sampling, of the divergence and of the log-densities, in one pass.
//
// What flows through the samples is summed over them first, in registers; then the sums are turned into gradients.

// Of one element.
template <class C>
struct Flow {
  C to_mean, to_std;                  // Σ_k of the gradient at z, and of that times temperature · noise
  C to_prior_mean, to_prior_log_std;  // through log_p, z held fixed
};

template <class T, int N>
__device__ __forceinline__ void load_sample(const GaussianSampleBackward& args, int64_t k, int64_t i,
                                            Compute<T> (&grad)[N]) {
  load(static_cast<const T*>(args.grad_z) + k * args.reduction.rows * args.reduction.cols + i, grad);
}

template <class T, int N>
__device__ __forceinline__ void add_samples(const GaussianSampleBackward& args, int64_t i,
                                            Flow<Compute<T>> (&flow)[N]) {
  using C = Compute<T>;
  Noise<GaussianSampleBackward, C, N> noise(args, i);
  for (int64_t k = 0; k < args.num_samples; ++k) {
    C grad[N];
    load_sample<T>(args, k, i, grad);
    noise.draw(k);
    const C factor = noise.factor(k);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      flow[j].to_mean += grad[j];
      flow[j].to_std += factor * grad[j] * noise.values[j];
    }
  }
}

// The same with log-densities. Returns Σ_k of what flows to log_q not through z.
template <class T, Prior P, int N>
__device__ __forceinline__ Compute<T> add_samples_and_densities(const GaussianSampleBackward& args, int64_t i,
                                                                const GaussianPack<T, P, N>& x,
                                                                Flow<Compute<T>> (&flow)[N]) {
  using C = Compute<T>;
  const DensityPack<C, N> densities(args.posterior, x);
  const int64_t row = i / args.reduction.cols;
  Noise<GaussianSampleBackward, C, N> noise(args, i);
  C to_log_q = 0;
  for (int64_t k = 0; k < args.num_samples; ++k) {
    const int64_t at = k * args.reduction.rows + row;
    const C to_q = static_cast<const C*>(args.grad_log_q)[at], to_p = static_cast<const C*>(args.grad_log_p)[at];
    const C gate = args.gate == nullptr ? C(1) : static_cast<const C*>(args.gate)[at];
    const C through_q = args.path_only ? to_q : C(0);
    to_log_q += args.path_only ? C(0) : gate * to_q;
    C grad[N];
    load_sample<T>(args, k, i, grad);
    noise.draw(k);
    const C factor = noise.factor(k);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const C e = factor * noise.values[j], u = densities.against_prior(j, e);
      const C along_p = to_p * u * densities.inverse_prior_std[j];  // minus the slope of log_p along z
      const C along_q = through_q == C(0) ? C(0) : through_q * e / densities.std[j];
      const C at_z = gate * (grad[j] - along_p - along_q);
      flow[j].to_mean += at_z;
      flow[j].to_std += e * at_z;
      flow[j].to_prior_mean += along_p;
      flow[j].to_prior_log_std += to_p * (u * u - C(1));
    }
  }
  return to_log_q;
}

// Gradients of an element through its samples.
template <ScaleType S, Prior P, class C>
__device__ __forceinline__ Parameters<C> sample_gradients(const Parameters<C>& x, const Flow<C>& flow) {
  const C to_scale = flow.to_std * std_slope<S>(x.scale);
  if constexpr (P != Prior::residual) {
    return {flow.to_mean, to_scale, C(0), C(0)};
  } else {
    return {flow.to_mean, to_scale * std_of<S>(x.prior_scale), flow.to_mean,
            flow.to_std * std_of<S>(x.scale) * std_slope<S>(x.prior_scale)};
  }
}

// Gradients through the parameters of their densities.
template <ScaleType S, Prior P, class C>
__device__ __forceinline__ void add_density_gradients(const Parameters<C>& x, const Flow<C>& flow, C to_log_q,
                                                      Parameters<C>& sum) {
  sum.scale -= to_log_q * log_std_slope<S>(x.scale);
  if constexpr (P != Prior::standard) {
    const C to_prior_log_std = flow.to_prior_log_std - (P == Prior::residual ? to_log_q : C(0));
    sum.prior_mean += flow.to_prior_mean;
    sum.prior_scale += to_prior_log_std * log_std_slope<S>(x.prior_scale);
  }
}

template <class T, Prior P, int N, bool WithDensities>
__global__ void __launch_bounds__(threads_per_block) sample_backward_kernel(GaussianSampleBackward args) {
  using C = Compute<T>;
  const Gaussians& q = args.posterior;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * threads_per_block + threadIdx.x) * N;
  if (i >= args.reduction.rows * args.reduction.cols) return;
  if (is_masked(q, i)) return write_zeros<T, N>(args.grads, i);

  const bool with_kl = args.grad_kl != nullptr;
  const GaussianPack<T, P, N> x(q, i, WithDensities || with_kl);
  Flow<C> flow[N] = {};
  C to_log_q = 0, to_kl[N];
  if constexpr (WithDensities) {
    to_log_q = add_samples_and_densities(args, i, x, flow);
  } else {
    add_samples<T>(args, i, flow);
  }
  if (with_kl) spread(args.reduction, args.grad_kl, i, to_kl);

  const C posterior_weight = static_cast<C>(args.posterior_weight), prior_weight = static_cast<C>(args.prior_weight);
  GradientPack<T, P, N> grads;
  with_scale_type(q.scale_type, [&]<ScaleType S>() {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      Parameters<C> sum = sample_gradients<S, P>(x.at(j), flow[j]);
      if constexpr (WithDensities) add_density_gradients<S, P>(x.at(j), flow[j], to_log_q, sum);
      if (with_kl) {
        const Parameters<C> kl = kl_slopes<S, P>(x.at(j));
        const C to_posterior = posterior_weight * to_kl[j], to_prior = prior_weight * to_kl[j];
        sum.mean += to_posterior * kl.mean;
        sum.scale += to_posterior * kl.scale;
        sum.prior_mean += to_prior * kl.prior_mean;
        sum.prior_scale += to_prior * kl.prior_scale;
      }
      grads.set(j, sum);
    }
  });
  grads.write(q, args.grads, i);
}

template <class T, Prior P, int N>
void sample_backward(const GaussianSampleBackward& args, void* stream) {
  const int64_t blocks = divide_up(args.reduction.rows * args.reduction.cols, threads_per_block * N);
  if (args.grad_log_q != nullptr) {
    launch("gaussian_sample_log_prob_backward", sample_backward_kernel<T, P, N, true>, blocks, threads_per_block, 0,
           stream, args);
  } else {
    launch("gaussian_sample_backward", sample_backward_kernel<T, P, N, false>, blocks, threads_per_block, 0, stream,
           args);
  }
}
