// The discretized mixture of logistics of PixelCNN++ on CUDA devices.
//
// One thread takes one pixel through all components, so that a warp reads 32 neighbours of every plane. The mixture's
// sum is kept running, rescaled when its largest term grows. Backward goes over the components twice, once for the sum
// and once for the gradients: the second reading is served by the L2 cache, and nothing is stored between. Pixels are
// summed by block, blocks in a second kernel, in an order fixed by the shape.
#pragma once

#include "core/launch.cuh"
#include "likelihood/elementwise.cuh"
#include "likelihood/kernels.h"
#include "likelihood/logistic.h"

namespace isthmus::cuda {
namespace {

constexpr int pixel_threads = 128;

inline int64_t blocks_per_image(int64_t pixels) { return divide_up(pixels, pixel_threads); }

// log Σ e^term of the terms so far.
template <class C>
struct RunningLogSum {
  C largest, sum;

  __device__ __forceinline__ explicit RunningLogSum(C term) : largest(term), sum(1) {}
  __device__ __forceinline__ void add(C term) {
    if (term > largest) {
      sum = sum * exp(largest - term) + C(1);
      largest = term;
    } else {
      sum += exp(term - largest);  // NaN ends here
    }
  }
  __device__ __forceinline__ C value() const { return largest + log(sum); }
};

template <class T, int channels>
struct MixturePixel {
  using C = Compute<T>;
  static constexpr int64_t kinds = channels == 1 ? 2 : 3;

  int64_t image, pixel, pixels, mixtures;
  bool inside;

  __device__ __forceinline__ MixturePixel(int64_t pixels_, int64_t mixtures_) : pixels(pixels_), mixtures(mixtures_) {
    const int64_t per_image = (pixels + pixel_threads - 1) / pixel_threads;
    image = blockIdx.x / per_image;
    pixel = blockIdx.x % per_image * pixel_threads + threadIdx.x;
    inside = pixel < pixels;
  }

  __device__ __forceinline__ int64_t of_x(int c) const { return (image * channels + c) * pixels + pixel; }
  __device__ __forceinline__ int64_t of_plane(int64_t plane) const {
    return (image * mixture_planes(channels) * mixtures + plane) * pixels + pixel;
  }
  __device__ __forceinline__ int64_t logit(int64_t k) const { return of_plane(k); }
  // kind 0: means, 1: log-scales, 2: coefficients
  __device__ __forceinline__ int64_t of_channel(int c, int kind, int64_t k) const {
    return of_plane(mixtures * (1 + c * kinds + kind) + k);
  }
};

// One component at one pixel: its log-probability and, backward, its slopes.
template <class T, int channels>
struct MixtureComponent {
  using C = Compute<T>;
  C log_weight, joint;
  C coefficient[channels], by_mean[channels], by_log_scale[channels];

  __device__ __forceinline__ MixtureComponent(const MixturePixel<T, channels>& at, const LogisticBin<C>& bin,
                                              const T* parameters, const C (&x)[channels], int64_t k) {
    C mean[channels];
#pragma unroll
    for (int c = 0; c < channels; ++c) mean[c] = to_compute(parameters[at.of_channel(c, 0, k)]);
    if constexpr (channels == 3) {
#pragma unroll
      for (int c = 0; c < channels; ++c) coefficient[c] = tanh(to_compute(parameters[at.of_channel(c, 2, k)]));
      mean[1] += coefficient[0] * x[0];
      mean[2] += coefficient[1] * x[0] + coefficient[2] * x[1];
    }
    log_weight = to_compute(parameters[at.logit(k)]);
    joint = log_weight;
#pragma unroll
    for (int c = 0; c < channels; ++c) {
      const C log_scale = to_compute(parameters[at.of_channel(c, 1, k)]);
      joint += bin.log_probability(x[c], mean[c], log_scale, by_mean[c], by_log_scale[c]);
    }
  }
};

template <class T, int channels>
struct MixtureSums {
  using C = Compute<T>;
  C x[channels];
  C log_weights, log_total;

  __device__ __forceinline__ MixtureSums(const MixturePixel<T, channels>& at, const LogisticBin<C>& bin, const T* x_,
                                         const T* parameters) {
#pragma unroll
    for (int c = 0; c < channels; ++c) x[c] = to_compute(x_[at.of_x(c)]);
    const MixtureComponent<T, channels> first(at, bin, parameters, x, 0);
    RunningLogSum<C> weights(first.log_weight), total(first.joint);
    for (int64_t k = 1; k < at.mixtures; ++k) {
      const MixtureComponent<T, channels> component(at, bin, parameters, x, k);
      weights.add(component.log_weight);
      total.add(component.joint);
    }
    log_weights = weights.value();
    log_total = total.value();
  }
};

// Writes each pixel, or the sum of each block's.
template <class T, int channels>
__global__ void __launch_bounds__(pixel_threads)
    mixture_nll(LogisticBin<Compute<T>> bin, const T* x, const T* parameters, int64_t pixels, int64_t mixtures,
                Compute<T> weight, Compute<T>* per_pixel, Compute<T>* per_block) {
  using C = Compute<T>;
  const MixturePixel<T, channels> at(pixels, mixtures);
  C nll = 0;
  if (at.inside) {
    const MixtureSums<T, channels> sums(at, bin, x, parameters);
    nll = weight * (sums.log_weights - sums.log_total);
    if (per_pixel != nullptr) per_pixel[at.image * pixels + at.pixel] = nll;
  }
  if (per_block == nullptr) return;  // the same choice in every thread
  const C sum = block_sum(nll);
  if (threadIdx.x == 0) per_block[blockIdx.x] = sum;
}

// pixels_per_result: how many neighbouring pixels one entry of `grad` belongs to.
template <class T, int channels>
__global__ void __launch_bounds__(pixel_threads)
    mixture_gradients(LogisticBin<Compute<T>> bin, const T* x, const T* parameters, int64_t pixels, int64_t mixtures,
                      Compute<T> weight, const Compute<T>* grad, int64_t pixels_per_result, T* to_x, T* to_parameters) {
  using C = Compute<T>;
  const MixturePixel<T, channels> at(pixels, mixtures);
  if (!at.inside) return;
  const MixtureSums<T, channels> sums(at, bin, x, parameters);
  const C g = weight * grad[(at.image * pixels + at.pixel) / pixels_per_result];
  C x_sums[channels] = {};
  for (int64_t k = 0; k < mixtures; ++k) {
    const MixtureComponent<T, channels> component(at, bin, parameters, sums.x, k);
    const C share = -g * exp(component.joint - sums.log_total);
    C by_mean[channels];
#pragma unroll
    for (int c = 0; c < channels; ++c) {
      by_mean[c] = share * component.by_mean[c];
      x_sums[c] -= by_mean[c];
      if (to_parameters == nullptr) continue;
      to_parameters[at.of_channel(c, 0, k)] = from_compute<T>(by_mean[c]);
      to_parameters[at.of_channel(c, 1, k)] = from_compute<T>(share * component.by_log_scale[c]);
    }
    if constexpr (channels == 3) {
      const C(&coefficient)[channels] = component.coefficient;
      x_sums[0] += by_mean[1] * coefficient[0] + by_mean[2] * coefficient[1];
      x_sums[1] += by_mean[2] * coefficient[2];
      const C received[channels] = {by_mean[1] * sums.x[0], by_mean[2] * sums.x[0], by_mean[2] * sums.x[1]};
#pragma unroll
      for (int c = 0; to_parameters != nullptr && c < channels; ++c) {
        to_parameters[at.of_channel(c, 2, k)] = from_compute<T>(received[c] * (C(1) - coefficient[c] * coefficient[c]));
      }
    }
    if (to_parameters != nullptr) {
      to_parameters[at.logit(k)] = from_compute<T>(g * exp(component.log_weight - sums.log_weights) + share);
    }
  }
#pragma unroll
  for (int c = 0; to_x != nullptr && c < channels; ++c) to_x[at.of_x(c)] = from_compute<T>(x_sums[c]);
}

// Calls f<T, channels>().
template <class F>
void dispatch_mixture(const LogisticMixture& args, F&& f) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    args.channels == 1 ? f.template operator()<T, 1>() : f.template operator()<T, 3>();
  });
}

}  // namespace

int64_t logistic_mixture_workspace(int64_t images, int64_t pixels) { return images * blocks_per_image(pixels); }

void likelihood_discretized_logistic_mixture_nll(const LogisticMixture& args, void* stream) {
  dispatch_mixture(args, [&]<class T, int channels>() {
    using C = Compute<T>;
    constexpr const char* name = "discretized_logistic_mixture_nll";
    const int64_t blocks = args.images * blocks_per_image(args.pixels);
    C* nll = static_cast<C*>(args.nll);
    C* partial = static_cast<C*>(args.workspace);
    launch(name, mixture_nll<T, channels>, blocks, pixel_threads, 0, stream,
           LogisticBin<C>(args.bins, args.min_log_scale), static_cast<const T*>(args.x),
           static_cast<const T*>(args.parameters), args.pixels, args.mixtures, static_cast<C>(args.weight),
           args.sum_pixels ? nullptr : nll, args.sum_pixels ? partial : nullptr);
    if (!args.sum_pixels || args.results == 0) return;
    const int64_t parts = blocks / args.results;
    launch(name, sum_parts<C>, args.results, threads_per_block, 0, stream, static_cast<const C*>(partial), parts, parts,
           nll);
  });
}

void likelihood_discretized_logistic_mixture_nll_backward(const LogisticMixtureBackward& args, void* stream) {
  dispatch_mixture(args, [&]<class T, int channels>() {
    using C = Compute<T>;
    launch("discretized_logistic_mixture_nll_backward", mixture_gradients<T, channels>,
           args.images * blocks_per_image(args.pixels), pixel_threads, 0, stream,
           LogisticBin<C>(args.bins, args.min_log_scale), static_cast<const T*>(args.x),
           static_cast<const T*>(args.parameters), args.pixels, args.mixtures, static_cast<C>(args.weight),
           static_cast<const C*>(args.grad), args.results > 0 ? args.images * args.pixels / args.results : int64_t(1),
           static_cast<T*>(args.grad_x), static_cast<T*>(args.grad_parameters));
  });
}

}  // namespace isthmus::cuda
