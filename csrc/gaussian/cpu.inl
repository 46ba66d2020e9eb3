// Reparameterised Gaussian sampling on the CPU.
//
//     z[k, i] = mean[i] + temperature · s[i] · noise(key, k · n + i)        kl = Σ KL(N(mean, s²) ‖ prior)
//     log_q[k, row] = Σ_cols log N(z; mean, s²)                             log_p[k, row] = Σ_cols log prior(z)
//
// Traffic: forward reads mean and scale once and writes z once (12 bytes an element in float32, the floor); backward
// reads grad_z, mean and scale and writes two gradients. Noise is recomputed from the key, never stored.
// Bound by arithmetic, not memory: at AVX-512 half of it is noise, between four and five instructions an element.
//
// Work goes through pieces of 512 elements whose standard deviation and noise wait in L1, so that the divergence, the
// generator and the affine map each stay a short loop of their own.

#include "core/gaussian_tiles.h"
#include "core/noise.h"
#include "core/parallel.h"
#include "core/reduce.h"
#include "gaussian/kernels.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

#include "gaussian/forward.inl"
// after forward: shares its tiles
#include "gaussian/backward.inl"

template <class T>
void noise_range(const GaussianNoise& args, int64_t begin, int64_t end) {
  using C = Compute<T>;
  T* out = static_cast<T*>(args.noise);
  const Key key(args.key);
  if constexpr (sizeof(T) == sizeof(C)) {
    fill_normal(key, begin, end - begin, out + begin);
  } else {
    Tile<C> noise;
    for (int64_t i = begin; i < end; i += tile_elements) {
      const int64_t count = end - i < tile_elements ? end - i : tile_elements;
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

}  // namespace

extern const GaussianKernels gaussian_table;
const GaussianKernels gaussian_table = {noise, sample, sample_backward};

}  // namespace isthmus::ISTHMUS_LEVEL
