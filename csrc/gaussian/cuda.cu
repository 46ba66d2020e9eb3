// Reparameterised Gaussian sampling on CUDA; what is computed stands in cpu.inl.
//
// Traffic: the floor, mean and scale in, z out. A thread takes one Philox block: four neighbouring float32 elements
// (two float64), moved in one 16-byte access. Where the columns are no multiple of that, or a pointer is not aligned,
// a thread takes one element and throws the rest of its block away: slower, the same numbers.
// Row sums are reduced within a warp (narrow rows) or a block (wide rows) in a fixed order: no atomics.

#include "core/launch.cuh"
#include "core/normal.cuh"
#include "core/philox.h"
#include "gaussian/kernels.h"

namespace isthmus::cuda {
namespace {

constexpr int block_threads = 256;
constexpr int wide_row = 2048;  // from here on a whole block works on one row

template <class C>
constexpr int normals_per_block = sizeof(C) == 8 ? 2 : 4;

// Normals of elements [first, first + Width) of the key's stream. Width is 1 or the size of a Philox block.
template <class C, int Width>
__device__ __forceinline__ void normals(const int64_t* key, int64_t first, C (&out)[Width]) {
  constexpr int size = normals_per_block<C>;
  C block[size];
  normal_block(static_cast<uint64_t>(key[0]), static_cast<uint64_t>(key[1]) + static_cast<uint64_t>(first / size),
               block);
  if constexpr (Width == size) {
#pragma unroll
    for (int j = 0; j < Width; ++j) out[j] = block[j];
  } else {
    const int lane = static_cast<int>(first % size);
    out[0] = block[0];
#pragma unroll
    for (int j = 1; j < size; ++j) out[0] = lane == j ? block[j] : out[0];
  }
}

template <class T, int Width>
__device__ __forceinline__ void load(const void* base, int64_t i, Compute<T> (&out)[Width]) {
  const Pack<T, Width> pack = *reinterpret_cast<const Pack<T, Width>*>(static_cast<const T*>(base) + i);
#pragma unroll
  for (int j = 0; j < Width; ++j) out[j] = to_compute(pack.values[j]);
}

template <class T, int Width>
__device__ __forceinline__ void store(void* base, int64_t i, const Compute<T> (&values)[Width]) {
  Pack<T, Width> pack;
#pragma unroll
  for (int j = 0; j < Width; ++j) pack.values[j] = from_compute<T>(values[j]);
  *reinterpret_cast<Pack<T, Width>*>(static_cast<T*>(base) + i) = pack;
}

template <class T>
__global__ void noise_kernel(GaussianNoise args) {
  using C = Compute<T>;
  constexpr int size = normals_per_block<C>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * size;
  if (first >= args.count) return;
  C out[size];
  normals<C, size>(args.key, first, out);
#pragma unroll
  for (int j = 0; j < size; ++j) {
    if (first + j < args.count) static_cast<T*>(args.noise)[first + j] = from_compute<T>(out[j]);
  }
}

// ---- forward -------------------------------------------------------------------------------------------------------

// All samples of elements [i, i + Width), and their share of the divergence.
template <class T, ScaleType S, int Width>
__device__ __forceinline__ Compute<T> sample_elements(const GaussianSample& args, int64_t i) {
  using C = Compute<T>;
  C mean[Width], scale[Width], std[Width];
  load<T>(args.mean, i, mean);
  load<T>(args.scale, i, scale);
#pragma unroll
  for (int j = 0; j < Width; ++j) std[j] = static_cast<C>(args.temperature) * std_of<S>(scale[j]);

  const int64_t elements = args.rows * args.cols;
  for (int64_t k = 0; k < args.num_samples; ++k) {
    C z[Width];
    normals<C, Width>(args.key, k * elements + i, z);
#pragma unroll
    for (int j = 0; j < Width; ++j) z[j] = mean[j] + std[j] * z[j];
    store<T>(args.z, k * elements + i, z);
  }

  C kl = 0;
  if (args.kl == nullptr) return kl;
  if (args.prior_mean == nullptr) {
#pragma unroll
    for (int j = 0; j < Width; ++j) kl += kl_to_standard<S>(mean[j], scale[j]);
  } else {
    C prior_mean[Width], prior_scale[Width];
    load<T>(args.prior_mean, i, prior_mean);
    load<T>(args.prior_scale, i, prior_scale);
#pragma unroll
    for (int j = 0; j < Width; ++j) kl += kl_to_prior<S>(mean[j], scale[j], prior_mean[j], prior_scale[j]);
  }
  return kl;
}

template <class T, ScaleType S, int Width>
__global__ void __launch_bounds__(block_threads) sample_flat_kernel(GaussianSample args) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x) * Width;
  if (i < args.rows * args.cols) sample_elements<T, S, Width>(args, i);
}

// Team threads work on one row: a warp or the whole block.
template <class T, ScaleType S, int Width, int Team>
__global__ void __launch_bounds__(block_threads) sample_rows_kernel(GaussianSample args) {
  using C = Compute<T>;
  constexpr int rows_per_block = block_threads / Team;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / Team;
  const int member = threadIdx.x % Team;
  C kl = 0;
  if (row < args.rows) {
    for (int64_t col = static_cast<int64_t>(member) * Width; col < args.cols; col += Team * Width) {
      kl += sample_elements<T, S, Width>(args, row * args.cols + col);
    }
  }
  kl = Team == warp_size ? warp_sum(kl) : block_sum(kl);
  if (row < args.rows && member == 0) static_cast<C*>(args.kl)[row] = kl;
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <class T, ScaleType S, int Width>
__global__ void __launch_bounds__(block_threads) sample_backward_kernel(GaussianSampleBackward args) {
  using C = Compute<T>;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x) * Width;
  const int64_t elements = args.rows * args.cols;
  if (i >= elements) return;

  C to_mean[Width] = {}, to_scale[Width] = {}, scale[Width];
  for (int64_t k = 0; k < args.num_samples; ++k) {
    C grad[Width], noise[Width];
    load<T>(args.grad_z, k * elements + i, grad);
    normals<C, Width>(args.key, k * elements + i, noise);
#pragma unroll
    for (int j = 0; j < Width; ++j) {
      to_mean[j] += grad[j];
      to_scale[j] += grad[j] * noise[j];
    }
  }
  load<T>(args.scale, i, scale);
#pragma unroll
  for (int j = 0; j < Width; ++j) to_scale[j] *= static_cast<C>(args.temperature) * std_slope<S>(scale[j]);

  if (args.grad_kl != nullptr) {
    const C grad_kl = static_cast<const C*>(args.grad_kl)[i / args.cols];
    C mean[Width];
    load<T>(args.mean, i, mean);
    KlGradient<C> kl[Width];
    if (args.prior_mean == nullptr) {
#pragma unroll
      for (int j = 0; j < Width; ++j) kl[j] = kl_to_standard_gradient<S>(mean[j], scale[j]);
    } else {
      C prior_mean[Width], prior_scale[Width], to_prior_mean[Width], to_prior_scale[Width];
      load<T>(args.prior_mean, i, prior_mean);
      load<T>(args.prior_scale, i, prior_scale);
#pragma unroll
      for (int j = 0; j < Width; ++j) {
        kl[j] = kl_to_prior_gradient<S>(mean[j], scale[j], prior_mean[j], prior_scale[j]);
        to_prior_mean[j] = grad_kl * kl[j].prior_mean;
        to_prior_scale[j] = grad_kl * kl[j].prior_scale;
      }
      store<T>(args.grad_prior_mean, i, to_prior_mean);
      store<T>(args.grad_prior_scale, i, to_prior_scale);
    }
#pragma unroll
    for (int j = 0; j < Width; ++j) {
      to_mean[j] += grad_kl * kl[j].mean;
      to_scale[j] += grad_kl * kl[j].scale;
    }
  }
  store<T>(args.grad_mean, i, to_mean);
  store<T>(args.grad_scale, i, to_scale);
}

// ---- launchers -----------------------------------------------------------------------------------------------------

template <int Width>
struct WidthTag {
  static constexpr int width = Width;
};

// Calls f with a whole Philox block for each thread if every access is then aligned, else with one element.
template <class T, class F, class... Pointers>
void dispatch_width(int64_t cols, F&& f, Pointers... pointers) {
  constexpr int width = normals_per_block<Compute<T>>;
  const uintptr_t bits = (reinterpret_cast<uintptr_t>(pointers) | ...);
  if (cols % width == 0 && bits % (width * sizeof(T)) == 0) {
    f(WidthTag<width>{});
  } else {
    f(WidthTag<1>{});
  }
}

}  // namespace

void gaussian_noise(const GaussianNoise& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const int64_t threads = divide_up(args.count, normals_per_block<Compute<T>>);
    launch("gaussian_noise", noise_kernel<T>, divide_up(threads, block_threads), block_threads, 0, stream, args);
  });
}

void gaussian_sample(const GaussianSample& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    dispatch_scale(args.scale_type, [&]<ScaleType S>() {
      const auto run = [&](auto tag) {
        constexpr int width = decltype(tag)::width;
        if (args.kl == nullptr) {
          const int64_t threads = divide_up(args.rows * args.cols, width);
          launch("gaussian_sample", sample_flat_kernel<T, S, width>, divide_up(threads, block_threads), block_threads,
                 0, stream, args);
        } else if (args.cols < wide_row) {
          launch("gaussian_sample_kl", sample_rows_kernel<T, S, width, warp_size>,
                 divide_up(args.rows, block_threads / warp_size), block_threads, 0, stream, args);
        } else {
          launch("gaussian_sample_kl", sample_rows_kernel<T, S, width, block_threads>, args.rows, block_threads, 0,
                 stream, args);
        }
      };
      dispatch_width<T>(args.cols, run, args.mean, args.scale, args.prior_mean, args.prior_scale, args.z);
    });
  });
}

void gaussian_sample_backward(const GaussianSampleBackward& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    dispatch_scale(args.scale_type, [&]<ScaleType S>() {
      const auto run = [&](auto tag) {
        constexpr int width = decltype(tag)::width;
        const int64_t threads = divide_up(args.rows * args.cols, width);
        launch("gaussian_sample_backward", sample_backward_kernel<T, S, width>, divide_up(threads, block_threads),
               block_threads, 0, stream, args);
      };
      dispatch_width<T>(args.cols, run, args.grad_z, args.mean, args.scale, args.prior_mean, args.prior_scale,
                        args.grad_mean, args.grad_scale, args.grad_prior_mean, args.grad_prior_scale);
    });
  });
}

}  // namespace isthmus::cuda
