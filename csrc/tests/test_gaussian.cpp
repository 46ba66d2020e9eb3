// The kernels of gaussian/kernels.h: noise is the stream of core/philox.h, samples and gradients follow from it.
#include <tuple>

#include "gaussian/kernels.h"
#include "gaussian_reference.h"
#include "noise_reference.h"

using namespace isthmus;

namespace {

constexpr NoiseReference noise_reference = {{-123456789, 0x7ffffffe}};
constexpr double temperature = 0.7;

void test_noise() {
  for (DType dtype : all_dtypes) {
    for (int64_t count : {0, 1, 3, 64, 1023, 4099, 30000}) {
      const auto compute = [&] {
        Array noise(dtype, count);
        gaussian_kernels().noise({dtype, noise_reference.key, count, noise.data()});
        return std::tuple(noise);
      };
      on_every_level(compute, [&](const auto& outputs) {
        for (int64_t i = 0; i < count; ++i)
          check_close("noise", std::get<0>(outputs), i, noise_reference(dtype, i), 8, 0);
      });
    }
  }
}

struct Problem {
  DType dtype;
  ScaleType type;
  bool has_prior;
  int64_t rows, cols, samples;
  Array mean, scale, prior_mean, prior_scale, grad_z, grad_kl;

  Problem(DType dtype_, ScaleType type_, bool prior_, int64_t rows_, int64_t cols_, int64_t samples_)
      : Problem(dtype_, type_, prior_, rows_, cols_, samples_, Random(11)) {}

  Problem(DType dtype_, ScaleType type_, bool prior_, int64_t rows_, int64_t cols_, int64_t samples_, Random random)
      : dtype(dtype_),
        type(type_),
        has_prior(prior_),
        rows(rows_),
        cols(cols_),
        samples(samples_),
        mean(random.normal(dtype, rows * cols)),
        scale(random_scale(random, dtype, type, rows * cols)),
        prior_mean(random.normal(dtype, rows * cols)),
        prior_scale(random_scale(random, dtype, type, rows * cols)),
        grad_z(random.normal(dtype, samples * rows * cols)),
        grad_kl(random.normal(accumulate_dtype(dtype), rows)) {}

  int64_t elements() const { return rows * cols; }
  const void* prior(const Array& array) const { return has_prior ? array.data() : nullptr; }

  KlReference divergence(int64_t i) const {
    return has_prior ? kl_reference(type, mean[i], scale[i], prior_mean[i], prior_scale[i])
                     : kl_reference(type, mean[i], scale[i], 0, unit_scale(type));
  }
};

void test_sample(const Problem& p, bool with_kl) {
  const auto compute = [&] {
    Array z(p.dtype, p.samples * p.elements()), kl(accumulate_dtype(p.dtype), with_kl ? p.rows : 0);
    gaussian_kernels().sample({p.dtype, p.type, p.rows, p.cols, p.samples, temperature, noise_reference.key,
                               p.mean.data(), p.scale.data(), p.prior(p.prior_mean), p.prior(p.prior_scale), z.data(),
                               with_kl ? kl.data() : nullptr});
    return std::tuple(z, kl);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [z, kl] = outputs;
    for (int64_t i = 0; i < z.size(); ++i) {
      const int64_t element = i % p.elements();
      const double s = static_cast<double>(std_of(p.type, p.scale[element]));
      const double shift = temperature * s * noise_reference(p.dtype, i);
      check_close("z", z, i, p.mean[element] + shift, 12, std::fabs(shift));
    }
    for (int64_t row = 0; row < kl.size(); ++row) {
      double sum = 0;
      for (int64_t i = row * p.cols; i < (row + 1) * p.cols; ++i) sum += p.divergence(i).kl;
      check_close("kl", kl, row, sum, 40, 1e-3);
    }
  });
}

void test_backward(const Problem& p, bool with_kl) {
  const bool has_prior = with_kl && p.has_prior;
  const auto compute = [&] {
    const int64_t prior_elements = has_prior ? p.elements() : 0;
    Array mean(p.dtype, p.elements()), scale(p.dtype, p.elements());
    Array prior_mean(p.dtype, prior_elements), prior_scale(p.dtype, prior_elements);
    gaussian_kernels().sample_backward(
        {p.dtype, p.type, p.rows, p.cols, p.samples, temperature, noise_reference.key, p.grad_z.data(),
         with_kl ? p.grad_kl.data() : nullptr, with_kl ? p.mean.data() : nullptr, p.scale.data(),
         has_prior ? p.prior_mean.data() : nullptr, has_prior ? p.prior_scale.data() : nullptr, mean.data(),
         scale.data(), has_prior ? prior_mean.data() : nullptr, has_prior ? prior_scale.data() : nullptr});
    return std::tuple(mean, scale, prior_mean, prior_scale);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [mean, scale, prior_mean, prior_scale] = outputs;
    for (int64_t i = 0; i < p.elements(); ++i) {
      double to_mean = 0, to_std = 0, size = 1;
      for (int64_t k = 0; k < p.samples; ++k) {
        const double g = p.grad_z[k * p.elements() + i], n = noise_reference(p.dtype, k * p.elements() + i);
        to_mean += g;
        to_std += temperature * g * n;
        size += std::fabs(g) * (1 + std::fabs(n));
      }
      double to_scale = to_std * static_cast<double>(std_slope(p.type, p.scale[i]));
      if (with_kl) {
        const KlReference kl = p.divergence(i);
        const double g = p.grad_kl[i / p.cols];
        size += std::fabs(g) * (1 + std::fabs(kl.mean) + std::fabs(kl.scale));
        to_mean += g * kl.mean;
        to_scale += g * kl.scale;
        if (has_prior) check_close("grad prior mean", prior_mean, i, g * kl.prior_mean, 20, size);
        if (has_prior) check_close("grad prior scale", prior_scale, i, g * kl.prior_scale, 20, size);
      }
      check_close("grad mean", mean, i, to_mean, 10, size);
      check_close("grad scale", scale, i, to_scale, 20, size);
    }
  });
}

void test(const Problem& p) {
  for (bool with_kl : {false, true}) {
    test_sample(p, with_kl);
    test_backward(p, with_kl);
  }
}

}  // namespace

int main() {
  test_noise();
  for (DType dtype : all_dtypes) {
    for (ScaleType type : all_scale_types) {
      for (bool has_prior : {false, true}) {
        test(Problem(dtype, type, has_prior, 3, 5, 1));
        test(Problem(dtype, type, has_prior, 37, 33, 2));
        test(Problem(dtype, type, has_prior, 2, 1037, 1));
      }
    }
  }
  // Nothing to do, one element, one column, and rows wide enough to be shared by threads.
  test(Problem(DType::f32, ScaleType::logvar, false, 0, 3, 1));
  test(Problem(DType::f32, ScaleType::logvar, false, 3, 0, 1));
  test(Problem(DType::f32, ScaleType::logvar, true, 1, 1, 3));
  test(Problem(DType::f32, ScaleType::std, true, 2500, 1, 1));
  test(Problem(DType::f32, ScaleType::logvar, true, 2, 40001, 1));
  return failed_checks > 0;
}
