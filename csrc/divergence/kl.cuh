// Included by cuda.cu: the divergence of diagonal Gaussians.

// The divergence of a pack.
template <class T, Prior P, int N>
struct KlElements {
  using C = Compute<T>;
  Gaussians q;

  __device__ __forceinline__ void operator()(int64_t i, C (&kl)[N]) const {
    if (is_masked(q, i)) return fill(C(0), kl);
    const GaussianPack<T, P, N> x(q, i);
    with_scale_type(q.scale_type, [&]<ScaleType S>() {
#pragma unroll
      for (int j = 0; j < N; ++j) kl[j] = kl_of<S, P>(x.at(j));
    });
  }
};

template <class T, Prior P, int N>
__global__ void __launch_bounds__(threads_per_block) kl_backward_kernel(GaussianKlBackward args) {
  using C = Compute<T>;
  const Gaussians& q = args.posterior;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * threads_per_block + threadIdx.x) * N;
  if (i >= args.reduction.rows * args.reduction.cols) return;
  if (is_masked(q, i)) return write_zeros<T, N>(args.grads, i);

  const GaussianPack<T, P, N> x(q, i);
  C to_kl[N];
  spread(args.reduction, args.grad, i, to_kl);
  const C posterior_weight = static_cast<C>(args.posterior_weight), prior_weight = static_cast<C>(args.prior_weight);
  GradientPack<T, P, N> grads;
  with_scale_type(q.scale_type, [&]<ScaleType S>() {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Parameters<C> kl = kl_slopes<S, P>(x.at(j));
      const C to_posterior = posterior_weight * to_kl[j], to_prior = prior_weight * to_kl[j];
      grads.set(j,
                {to_posterior * kl.mean, to_posterior * kl.scale, to_prior * kl.prior_mean, to_prior * kl.prior_scale});
    }
  });
  grads.write(q, args.grads, i);
}
