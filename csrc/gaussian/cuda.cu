// Reparameterised Gaussian sampling on CUDA; what is computed stands in cpu.inl.
//
// Traffic: the floor, mean and scale in, z out; backward grad_z, mean and scale in, two gradients out. A thread takes
// one Philox block: four neighbouring float32 elements (two float64), moved in one 16-byte access. Where the shape is
// no multiple of that, or a tensor's blocks or address are not, a thread takes one element and throws the rest of its
// block away: slower, the same numbers.

#include "core/gaussian_packs.cuh"
#include "core/philox.h"
#include "core/reduce.cuh"
#include "gaussian/kernels.h"

namespace isthmus::cuda {
namespace {

#include "gaussian/forward.cuh"
// after forward: shares its noise and densities
#include "gaussian/backward.cuh"

template <class T>
__global__ void __launch_bounds__(threads_per_block) noise_kernel(GaussianNoise args) {
  using C = Compute<T>;
  constexpr int size = normals_per_block<C>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * threads_per_block + threadIdx.x) * size;
  if (first >= args.count) return;
  C out[size];
  normals(args.key, first, out);
#pragma unroll
  for (int j = 0; j < size; ++j) {
    if (first + j < args.count) static_cast<T*>(args.noise)[first + j] = from_compute<T>(out[j]);
  }
}

// Whether packs end with the rows for which something is summed or given.
template <int N>
bool rows_fit(const Reduction& view, const void* kl, const void* log_q) {
  if (log_q != nullptr) return view.cols % N == 0;
  return packs_fit<N>(kl != nullptr ? view : no_reduction(view));
}

template <class T, int N>
bool packs_fit(const GaussianSample& args) {
  return rows_fit<N>(args.reduction, args.kl, args.log_q) && packs_fit<T, N>(args.posterior) &&
         packs_fit<T, N>(args.z) && packs_fit<Compute<T>, N>(args.kl);
}

template <class T, int N>
bool packs_fit(const GaussianSampleBackward& args) {
  return rows_fit<N>(args.reduction, args.grad_kl, args.grad_log_q) && packs_fit<T, N>(args.posterior) &&
         packs_fit<T, N>(args.grad_z) && packs_fit<T, N>(args.grads);
}

// Calls f<T, P, N>() for the dtype and the prior of `args`, N as wide as its layout allows.
template <class Args, class F>
void dispatch(const Args& args, F&& f) {
  dispatch_gaussians(args.posterior, [&]<class T, Prior P>() {
    constexpr int widest = normals_per_block<Compute<T>>;
    if (packs_fit<T, widest>(args)) return f.template operator()<T, P, widest>();
    f.template operator()<T, P, 1>();
  });
}

}  // namespace

int64_t gaussian_sample_workspace(const Reduction& view) { return sum_workspace(view); }

void gaussian_noise(const GaussianNoise& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const int64_t blocks = divide_up(args.count, threads_per_block * normals_per_block<Compute<T>>);
    launch("gaussian_noise", noise_kernel<T>, blocks, threads_per_block, 0, stream, args);
  });
}

void gaussian_sample(const GaussianSample& args, void* workspace, void* stream) {
  dispatch(args, [&]<class T, Prior P, int N>() { sample<T, P, N>(args, workspace, stream); });
}

void gaussian_sample_backward(const GaussianSampleBackward& args, void* stream) {
  dispatch(args, [&]<class T, Prior P, int N>() { sample_backward<T, P, N>(args, stream); });
}

}  // namespace isthmus::cuda
