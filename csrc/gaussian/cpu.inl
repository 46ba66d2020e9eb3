// Reparameterised Gaussian sampling on the CPU.
//
//     z[k, i] = mean[i] + temperature · s[i] · noise(key, k · n + i)        kl[row] = Σ_cols KL(mean, s ‖ prior)
//
// Traffic: forward reads mean and scale once and writes z once (12 bytes an element in float32, the floor); backward
// reads grad_z, mean and scale and writes two gradients. Noise is recomputed from the key, never stored.
// Bound by arithmetic, not memory: about 6 instructions an element at AVX-512, most of them noise.
//
// Work goes through tiles of 1024 elements whose standard deviation and noise wait in L1, so that the divergence, the
// generator and the affine map each stay a short loop of their own.

#include "core/dispatch.h"
#include "core/noise.h"
#include "core/normal.h"
#include "core/parallel.h"
#include "core/tiles.h"
#include "gaussian/kernels.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

template <class C>
struct alignas(64) Tile {
  C values[tile_elements + lanes<C>];  // the tail lets a last vector be stored whole
};

inline int64_t tile_end(int64_t begin, int64_t end) {
  return end - begin < tile_elements ? end : begin + tile_elements;
}

template <class T>
void noise_range(const GaussianNoise& args, int64_t begin, int64_t end) {
  using C = Compute<T>;
  T* out = static_cast<T*>(args.noise);
  const Key key(args.key);
  if constexpr (sizeof(T) == sizeof(C)) {
    fill_normal(key, begin, end - begin, out + begin);
  } else {
    Tile<C> noise;
    for (int64_t i = begin; i < end; i = tile_end(i, end)) {
      const int64_t count = tile_end(i, end) - i;
      fill_normal(key, i, count, noise.values);
      for (int64_t j = 0; j < count; j += lanes<C>) store_first(out + i + j, load(noise.values + j), count - j);
    }
  }
}

void noise(const GaussianNoise& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const int64_t tiles = (args.count + tile_elements - 1) / tile_elements;
    parallel_for(tiles, grain_elements / tile_elements, [&](int64_t begin, int64_t end) {
      const int64_t last = end * tile_elements;
      noise_range<T>(args, begin * tile_elements, last < args.count ? last : args.count);
    });
  });
}

// ---- forward -------------------------------------------------------------------------------------------------------

template <class T, ScaleType S>
struct Forward {
  using C = Compute<T>;
  using V = Vec<C>;

  const GaussianSample& args;
  const T* mean = static_cast<const T*>(args.mean);
  const T* scale = static_cast<const T*>(args.scale);
  const T* prior_mean = static_cast<const T*>(args.prior_mean);
  const T* prior_scale = static_cast<const T*>(args.prior_scale);

  // std[j] of elements [first, first + count).
  void fill_std(int64_t first, int64_t count, C* std) const {
    for (int64_t j = 0; j < count; j += lanes<C>) store(std + j, std_of<S>(load_first(scale + first + j, count - j)));
  }

  // The same, and the divergence of these elements from the prior.
  template <bool Standard>
  C fill_std_and_kl(int64_t first, int64_t count, C* std) const {
    V sum = {};
    for (int64_t j = 0; j < count; j += lanes<C>) {
      const int64_t i = first + j, left = count - j;
      const V m = load_first(mean + i, left), sc = load_first(scale + i, left);
      V kl, s;
      if constexpr (Standard) {
        kl = kl_to_standard<S>(m, sc, s);
      } else {
        kl = kl_to_prior<S>(m, sc, load_first(prior_mean + i, left), load_first(prior_scale + i, left));
        s = std_of<S>(sc);
      }
      store_first(std + j, s, left);
      sum += left >= lanes<C> ? kl : (first_lanes<C>(left) ? kl : V{});
    }
    return sum_lanes<C>(sum);
  }

  void write_samples(int64_t first, int64_t count, const C* std, C* noise) const {
    const V temperature = splat(static_cast<C>(args.temperature));
    const int64_t elements = args.rows * args.cols;
    for (int64_t k = 0; k < args.num_samples; ++k) {
      const int64_t from = k * elements + first;
      T* z = static_cast<T*>(args.z) + from;
      fill_normal(Key(args.key), from, count, noise);
      for (int64_t j = 0; j < count; j += lanes<C>) {
        const V shift = temperature * load(std + j) * load(noise + j);
        store_first(z + j, load_first(mean + first + j, count - j) + shift, count - j);
      }
    }
  }

  C kl_of(int64_t first, int64_t count, C* std) const {
    return prior_mean == nullptr ? fill_std_and_kl<true>(first, count, std) : fill_std_and_kl<false>(first, count, std);
  }

  // partial: [rows, chunks_per_row] sums of the divergence, or null.
  void run(const RowTiles& tiles, int64_t begin, int64_t end, C* partial) const {
    Tile<C> std, noise;
    for (int64_t index = begin; index < end; ++index) {
      const RowTiles::Item item = tiles.item(index);
      if (item.rows > 1 || item.cols <= tile_elements) {
        // Whole rows, together one tile: contiguous.
        const int64_t first = item.row * args.cols + item.col;
        if (partial == nullptr) {
          fill_std(first, item.rows * item.cols, std.values);
        } else {
          for (int64_t r = 0; r < item.rows; ++r) {
            partial[(item.row + r) * tiles.chunks_per_row + item.col / chunk_columns] =
                kl_of(first + r * item.cols, item.cols, std.values + r * item.cols);
          }
        }
        write_samples(first, item.rows * item.cols, std.values, noise.values);
      } else {
        // One row, or a chunk of it, in several tiles.
        C sum = 0;
        const int64_t first = item.row * args.cols + item.col, last = first + item.cols;
        for (int64_t i = first; i < last; i = tile_end(i, last)) {
          const int64_t count = tile_end(i, last) - i;
          if (partial == nullptr) {
            fill_std(i, count, std.values);
          } else {
            sum += kl_of(i, count, std.values);
          }
          write_samples(i, count, std.values, noise.values);
        }
        if (partial != nullptr) partial[item.row * tiles.chunks_per_row + item.col / chunk_columns] = sum;
      }
    }
  }
};

void sample(const GaussianSample& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    dispatch_scale(args.scale_type, [&]<ScaleType S>() {
      const RowTiles tiles(args.rows, args.cols);
      RowSums<Compute<T>> kl(tiles, args.kl);
      parallel_for(tiles.items, tiles.grain(),
                   [&](int64_t begin, int64_t end) { Forward<T, S>{args}.run(tiles, begin, end, kl.partial); });
      kl.finish();
    });
  });
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <class T, ScaleType S>
struct Backward {
  using C = Compute<T>;
  using V = Vec<C>;

  const GaussianSampleBackward& args;
  const T* mean = static_cast<const T*>(args.mean);
  const T* scale = static_cast<const T*>(args.scale);
  const T* prior_mean = static_cast<const T*>(args.prior_mean);
  const T* prior_scale = static_cast<const T*>(args.prior_scale);
  T* grad_mean = static_cast<T*>(args.grad_mean);
  T* grad_scale = static_cast<T*>(args.grad_scale);
  T* grad_prior_mean = static_cast<T*>(args.grad_prior_mean);
  T* grad_prior_scale = static_cast<T*>(args.grad_prior_scale);

  // Over the samples k: through_mean = Σ grad_z, through_std = temperature · Σ grad_z · noise.
  void sum_samples(int64_t first, int64_t count, C* through_mean, C* through_std, C* noise) const {
    const V temperature = splat(static_cast<C>(args.temperature));
    const int64_t elements = args.rows * args.cols;
    for (int64_t k = 0; k < args.num_samples; ++k) {
      const int64_t from = k * elements + first;
      const T* grad_z = static_cast<const T*>(args.grad_z) + from;
      fill_normal(Key(args.key), from, count, noise);
      for (int64_t j = 0; j < count; j += lanes<C>) {
        const V g = load_first(grad_z + j, count - j), scaled = temperature * g * load(noise + j);
        store(through_mean + j, k == 0 ? g : load(through_mean + j) + g);
        store(through_std + j, k == 0 ? scaled : load(through_std + j) + scaled);
      }
    }
  }

  template <bool WithKl, bool Standard>
  void write_gradients(int64_t first, int64_t count, const C* through_mean, const C* through_std, C grad_kl) const {
    for (int64_t j = 0; j < count; j += lanes<C>) {
      const int64_t i = first + j, left = count - j;
      const V sc = load_first(scale + i, left);
      V to_mean = load(through_mean + j), to_scale = load(through_std + j) * std_slope<S>(sc);
      if constexpr (WithKl) {
        const V m = load_first(mean + i, left);
        KlGradient<V> kl;
        if constexpr (Standard) {
          kl = kl_to_standard_gradient<S>(m, sc);
        } else {
          kl = kl_to_prior_gradient<S>(m, sc, load_first(prior_mean + i, left), load_first(prior_scale + i, left));
          store_first(grad_prior_mean + i, grad_kl * kl.prior_mean, left);
          store_first(grad_prior_scale + i, grad_kl * kl.prior_scale, left);
        }
        to_mean += grad_kl * kl.mean;
        to_scale += grad_kl * kl.scale;
      }
      store_first(grad_mean + i, to_mean, left);
      store_first(grad_scale + i, to_scale, left);
    }
  }

  void gradients(int64_t row, int64_t first, int64_t count, const C* through_mean, const C* through_std) const {
    if (args.grad_kl == nullptr) return write_gradients<false, true>(first, count, through_mean, through_std, 0);
    const C grad_kl = static_cast<const C*>(args.grad_kl)[row];
    if (prior_mean == nullptr) return write_gradients<true, true>(first, count, through_mean, through_std, grad_kl);
    write_gradients<true, false>(first, count, through_mean, through_std, grad_kl);
  }

  void run(const RowTiles& tiles, int64_t begin, int64_t end) const {
    Tile<C> through_mean, through_std, noise;
    for (int64_t index = begin; index < end; ++index) {
      const RowTiles::Item item = tiles.item(index);
      const int64_t first = item.row * args.cols + item.col, last = first + item.rows * item.cols;
      for (int64_t i = first; i < last; i = tile_end(i, last)) {
        const int64_t count = tile_end(i, last) - i;
        sum_samples(i, count, through_mean.values, through_std.values, noise.values);
        if (item.rows == 1 || args.grad_kl == nullptr) {
          gradients(item.row, i, count, through_mean.values, through_std.values);
          continue;
        }
        for (int64_t r = 0; r < item.rows; ++r) {
          const int64_t offset = r * item.cols;
          gradients(item.row + r, i + offset, item.cols, through_mean.values + offset, through_std.values + offset);
        }
      }
    }
  }
};

void sample_backward(const GaussianSampleBackward& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    dispatch_scale(args.scale_type, [&]<ScaleType S>() {
      const RowTiles tiles(args.rows, args.cols);
      parallel_for(tiles.items, tiles.grain(),
                   [&](int64_t begin, int64_t end) { Backward<T, S>{args}.run(tiles, begin, end); });
    });
  });
}

}  // namespace

extern const GaussianKernels gaussian_table;
const GaussianKernels gaussian_table = {noise, sample, sample_backward};

}  // namespace isthmus::ISTHMUS_LEVEL
