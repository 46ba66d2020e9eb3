// The discretized mixture of logistics of PixelCNN++ on the CPU.
//
// Each way reads every parameter once and stores nothing between: plain PyTorch holds some thirty tensors of the size
// of the parameters for backward. Bound by arithmetic: about twenty exponentials for each component and pixel.
//
// Vectors run over pixels, so that every load is of neighbours. A tile of 64 pixels is carried through all components:
// planes lie a power of two apart in memory, and reading a vector of each in turn would fall into one cache set. What
// the components leave behind (their log-probabilities; their slopes, backward) waits in L1 for the mixture's sum.

#include "core/buffer.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "likelihood/kernels.h"
#include "likelihood/logistic.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

constexpr int64_t tile_pixels = 64;
constexpr int64_t item_pixels = 1024;  // of one image: a work item

// Neighbouring pixels of one image.
struct PixelTile {
  int64_t image, first, count;
};

// The planes of [images, planes, pixels].
template <class T, int channels>
struct ParameterPlanes {
  T* data;
  int64_t mixtures, pixels;

  T* plane(const PixelTile& tile, int64_t index) const {
    constexpr int64_t factor = mixture_planes(channels);
    return data + (tile.image * factor * mixtures + index) * pixels + tile.first;
  }
  // Each channel's block holds its means, log-scales and, of three channels, coefficients.
  T* of_channel(const PixelTile& tile, int c, int which, int64_t k) const {
    constexpr int64_t kinds = channels == 1 ? 2 : 3;
    return plane(tile, mixtures * (1 + c * kinds + which) + k);
  }
  T* logit(const PixelTile& tile, int64_t k) const { return plane(tile, k); }
  T* mean(const PixelTile& tile, int c, int64_t k) const { return of_channel(tile, c, 0, k); }
  T* log_scale(const PixelTile& tile, int c, int64_t k) const { return of_channel(tile, c, 1, k); }
  T* coefficient(const PixelTile& tile, int c, int64_t k) const { return of_channel(tile, c, 2, k); }
};

template <class T, int channels>
struct MixtureTile {
  using C = Compute<T>;
  using V = Vec<C>;
  static constexpr int slopes_per_component = 3 * channels;

  const LogisticMixture& args;
  LogisticBin<C> bin;
  ParameterPlanes<const T, channels> parameters;
  const T* x;
  Buffer<C> joint, logit;  // [mixtures, tile_pixels]: log weight + log-probability, and log weight, unnormalised
  Buffer<C> slopes;        // [mixtures, (by mean, by log-scale, coefficient) of each channel, tile_pixels]

  MixtureTile(const LogisticMixture& args_, bool backward)
      : args(args_),
        bin(args.bins, args.min_log_scale),
        parameters{static_cast<const T*>(args.parameters), args.mixtures, args.pixels},
        x(static_cast<const T*>(args.x)),
        joint(args.mixtures * tile_pixels),
        logit(args.mixtures * tile_pixels),
        slopes(backward ? args.mixtures * slopes_per_component * tile_pixels : 0) {}

  ISTHMUS_INLINE void load_x(const PixelTile& tile, int64_t j, V (&values)[channels]) const {
    for (int c = 0; c < channels; ++c) {
      values[c] = load_first(x + (tile.image * channels + c) * args.pixels + tile.first + j, tile.count - j);
    }
  }

  C* slope(int64_t k, int which, int c) const { return slopes.data + ((k * 3 + which) * channels + c) * tile_pixels; }

  // Component k at the pixels of a tile: fills joint, logit and, backward, slopes.
  template <bool backward>
  void component(const PixelTile& tile, int64_t k) const {
    for (int64_t j = 0; j < tile.count; j += lanes<C>) {
      const int64_t left = tile.count - j;
      V values[channels];
      load_x(tile, j, values);
      V mean[channels];
      for (int c = 0; c < channels; ++c) mean[c] = load_first(parameters.mean(tile, c, k) + j, left);
      if constexpr (channels == 3) {
        V coefficient[channels];
        for (int c = 0; c < channels; ++c) {
          coefficient[c] = tanh(load_first(parameters.coefficient(tile, c, k) + j, left));
          if constexpr (backward) store(slope(k, 2, c) + j, coefficient[c]);
        }
        mean[1] += coefficient[0] * values[0];
        mean[2] += coefficient[1] * values[0] + coefficient[2] * values[1];
      }
      const V log_weight = load_first(parameters.logit(tile, k) + j, left);
      V sum = log_weight;
      for (int c = 0; c < channels; ++c) {
        const V log_scale = load_first(parameters.log_scale(tile, c, k) + j, left);
        if constexpr (backward) {
          V by_mean, by_log_scale;
          sum += bin.log_probability(values[c], mean[c], log_scale, by_mean, by_log_scale);
          store(slope(k, 0, c) + j, by_mean);
          store(slope(k, 1, c) + j, by_log_scale);
        } else {
          sum += bin.log_probability(values[c], mean[c], log_scale);
        }
      }
      store(joint.data + k * tile_pixels + j, sum);
      store(logit.data + k * tile_pixels + j, log_weight);
    }
  }

  template <bool backward>
  void components(const PixelTile& tile) const {
    for (int64_t k = 0; k < args.mixtures; ++k) component<backward>(tile, k);
  }

  // log Σ_k e^terms[k] at the pixels of vector j.
  ISTHMUS_INLINE V log_sum(const Buffer<C>& terms, int64_t j) const {
    V largest = load(terms.data + j);
    for (int64_t k = 1; k < args.mixtures; ++k) {
      const V term = load(terms.data + k * tile_pixels + j);
      largest = term > largest ? term : largest;
    }
    V sum = {};
    for (int64_t k = 0; k < args.mixtures; ++k) sum += exp(load(terms.data + k * tile_pixels + j) - largest);
    return largest + log(sum);
  }
};

// Items are whole tiles of one image: none of them crosses a sum.
struct PixelItems {
  int64_t pixels, per_image, count;

  PixelItems(int64_t images, int64_t pixels_)
      : pixels(pixels_), per_image((pixels + item_pixels - 1) / item_pixels), count(images * per_image) {}

  template <class F>
  void for_each_tile(int64_t item, F&& f) const {
    const int64_t begin = item % per_image * item_pixels;
    const int64_t end = begin + item_pixels < pixels ? begin + item_pixels : pixels;
    for (int64_t first = begin; first < end; first += tile_pixels) {
      f(PixelTile{item / per_image, first, end - first < tile_pixels ? end - first : tile_pixels});
    }
  }
};

// ---- forward -------------------------------------------------------------------------------------------------------

// Writes the tile's pixels where each is a result of its own; returns their sum where not.
template <class T, int channels>
Compute<T> mixture_nll_of_tile(const MixtureTile<T, channels>& mixture, const PixelTile& tile, Compute<T>* per_pixel) {
  using C = Compute<T>;
  mixture.template components<false>(tile);
  const C weight = static_cast<C>(mixture.args.weight);
  Vec<C> sum = {};
  for (int64_t j = 0; j < tile.count; j += lanes<C>) {
    const int64_t left = tile.count - j;
    const Vec<C> nll = weight * (mixture.log_sum(mixture.logit, j) - mixture.log_sum(mixture.joint, j));
    if (per_pixel != nullptr) store_first(per_pixel + tile.image * mixture.args.pixels + tile.first + j, nll, left);
    sum += left >= lanes<C> ? nll : (first_lanes<C>(left) ? nll : Vec<C>{});
  }
  return sum_lanes<C>(sum);
}

template <class T, int channels>
void run_logistic_mixture(const LogisticMixture& args) {
  using C = Compute<T>;
  const PixelItems items(args.images, args.pixels);
  const Buffer<C> partial(items.count);
  C* per_pixel = args.sum_pixels ? nullptr : static_cast<C*>(args.nll);
  parallel_for(items.count, 1, [&](int64_t begin, int64_t end) {
    const MixtureTile<T, channels> mixture(args, false);
    for (int64_t item = begin; item < end; ++item) {
      double sum = 0;
      items.for_each_tile(item, [&](const PixelTile& tile) { sum += mixture_nll_of_tile(mixture, tile, per_pixel); });
      partial.data[item] = static_cast<C>(sum);
    }
  });
  if (!args.sum_pixels || args.results == 0) return;
  sum_partial(partial.data, args.results, items.count / args.results, static_cast<C*>(args.nll));
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <class T, int channels>
struct MixtureGradients {
  using C = Compute<T>;
  using V = Vec<C>;

  const MixtureTile<T, channels>& mixture;
  const LogisticMixture& args;
  const C* grad;
  ParameterPlanes<T, channels> to_parameters;  // no data: not wanted
  T* to_x;                                     // null: not wanted

  V incoming(const PixelTile& tile, int64_t j) const {
    const C weight = static_cast<C>(args.weight);
    if (!args.sum_pixels) {
      return weight * load_first(grad + tile.image * args.pixels + tile.first + j, tile.count - j);
    }
    return splat(weight * grad[args.results == 1 ? 0 : tile.image]);
  }

  // Component k; `share` is its part of the gradient by log-probability. Adds what x receives.
  ISTHMUS_INLINE void component(const PixelTile& tile, int64_t j, int64_t k, V to_logit, V share,
                                const V (&values)[channels], V (&x_sums)[channels]) const {
    const int64_t left = tile.count - j;
    V by_mean[channels], by_log_scale[channels];
    for (int c = 0; c < channels; ++c) {
      by_mean[c] = share * load(mixture.slope(k, 0, c) + j);
      by_log_scale[c] = share * load(mixture.slope(k, 1, c) + j);
      x_sums[c] -= by_mean[c];
    }
    V to_coefficient[channels];
    if constexpr (channels == 3) {
      V coefficient[channels];
      for (int c = 0; c < channels; ++c) coefficient[c] = load(mixture.slope(k, 2, c) + j);
      x_sums[0] += by_mean[1] * coefficient[0] + by_mean[2] * coefficient[1];
      x_sums[1] += by_mean[2] * coefficient[2];
      const V received[channels] = {by_mean[1] * values[0], by_mean[2] * values[0], by_mean[2] * values[1]};
      for (int c = 0; c < channels; ++c) {
        to_coefficient[c] = received[c] * (C(1) - coefficient[c] * coefficient[c]);
      }
    }
    if (to_parameters.data == nullptr) return;
    store_first(to_parameters.logit(tile, k) + j, to_logit, left);
    for (int c = 0; c < channels; ++c) {
      store_first(to_parameters.mean(tile, c, k) + j, by_mean[c], left);
      store_first(to_parameters.log_scale(tile, c, k) + j, by_log_scale[c], left);
      if constexpr (channels == 3) store_first(to_parameters.coefficient(tile, c, k) + j, to_coefficient[c], left);
    }
  }

  void write(const PixelTile& tile) const {
    mixture.template components<true>(tile);
    for (int64_t j = 0; j < tile.count; j += lanes<C>) {
      const V g = incoming(tile, j);
      const V log_weights = mixture.log_sum(mixture.logit, j), log_total = mixture.log_sum(mixture.joint, j);
      V values[channels], x_sums[channels] = {};
      mixture.load_x(tile, j, values);
      for (int64_t k = 0; k < args.mixtures; ++k) {
        const V prior = exp(load(mixture.logit.data + k * tile_pixels + j) - log_weights);
        const V share = -g * exp(load(mixture.joint.data + k * tile_pixels + j) - log_total);
        component(tile, j, k, g * prior + share, share, values, x_sums);
      }
      for (int c = 0; to_x != nullptr && c < channels; ++c) {
        store_first(to_x + (tile.image * channels + c) * args.pixels + tile.first + j, x_sums[c], tile.count - j);
      }
    }
  }
};

template <class T, int channels>
void run_logistic_mixture_backward(const LogisticMixtureBackward& args) {
  using C = Compute<T>;
  const PixelItems items(args.images, args.pixels);
  parallel_for(items.count, 1, [&](int64_t begin, int64_t end) {
    const MixtureTile<T, channels> mixture(args, true);
    const MixtureGradients<T, channels> gradients{mixture,
                                                  args,
                                                  static_cast<const C*>(args.grad),
                                                  {static_cast<T*>(args.grad_parameters), args.mixtures, args.pixels},
                                                  static_cast<T*>(args.grad_x)};
    for (int64_t item = begin; item < end; ++item) {
      items.for_each_tile(item, [&](const PixelTile& tile) { gradients.write(tile); });
    }
  });
}

void discretized_logistic_mixture_nll(const LogisticMixture& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    args.channels == 1 ? run_logistic_mixture<T, 1>(args) : run_logistic_mixture<T, 3>(args);
  });
}

void discretized_logistic_mixture_nll_backward(const LogisticMixtureBackward& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    args.channels == 1 ? run_logistic_mixture_backward<T, 1>(args) : run_logistic_mixture_backward<T, 3>(args);
  });
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
