// The kernels of gaussian/kernels.h: noise is the stream of core/philox.h, samples, densities and gradients follow.
#include <tuple>

#include "gaussian/kernels.h"
#include "gaussian_batch.h"
#include "noise_reference.h"

using namespace isthmus;

namespace {

constexpr NoiseReference noise_reference = {{-123456789, 0x7ffffffe}};
constexpr double temperature = 0.7;
constexpr long double half_log_two_pi = 0.918938533204672741780329736405617640L;

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

// What comes with the samples, and how gradients find their way back.
enum class Extra { none, divergence, densities };
struct Draw {
  Extra extra = Extra::none;
  int64_t samples = 1;
  bool antithetic = false;
  bool path_only = false, gated = false;
};

struct Problem {
  Batch& batch;
  Draw draw;
  Array grad_z, grad_kl, grad_log_q, grad_log_p, gate;

  Problem(Batch& batch_, const Draw& draw_, Random random = Random(11))
      : batch(batch_),
        draw(draw_),
        grad_z(random.normal(batch.dtype, draw.samples * batch.elements())),
        grad_kl(random.normal(wide(), draw.extra == Extra::none ? 0 : batch.reduction().sums())),
        grad_log_q(random.normal(wide(), densities())),
        grad_log_p(random.normal(wide(), densities())),
        gate(random.uniform(wide(), draw.gated ? densities() : 0, 0, 2)) {}

  DType wide() const { return accumulate_dtype(batch.dtype); }
  int64_t densities() const { return draw.extra == Extra::densities ? draw.samples * batch.rows : 0; }
  int64_t row(int64_t i, int64_t k) const { return k * batch.rows + i / batch.cols; }

  // Temperature times noise of element i of sample k.
  double noise(int64_t i, int64_t k) const {
    const int64_t of = draw.antithetic ? k / 2 : k;
    const double n = temperature * noise_reference(batch.dtype, of * batch.elements() + i);
    return draw.antithetic && k % 2 == 1 ? -n : n;
  }

  // Pointers to what is there.
  static const void* given(const Array& array) { return array.size() == 0 ? nullptr : array.data(); }
  static void* wanted(Array& array) { return array.size() == 0 ? nullptr : array.data(); }
};

void test_sample(const Problem& p) {
  Batch& b = p.batch;
  const auto compute = [&] {
    Array z(b.dtype, p.draw.samples * b.elements()), kl(p.wide(), p.grad_kl.size());
    Array log_q(p.wide(), p.densities()), log_p(p.wide(), p.densities());
    gaussian_kernels().sample({b.gaussians(), b.reduction(), p.draw.samples, p.draw.antithetic, temperature,
                               noise_reference.key, z.data(), Problem::wanted(kl), Problem::wanted(log_q),
                               Problem::wanted(log_p)});
    return std::tuple(z, kl, log_q, log_p);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [z, kl, log_q, log_p] = outputs;
    std::vector<Sum> want_q(static_cast<size_t>(p.densities())), want_p = want_q;
    for (int64_t k = 0; k < p.draw.samples; ++k) {
      for (int64_t i = 0; i < b.elements(); ++i) {
        Sum want;
        if (b.kept(i)) {
          const GaussianPair at = b[i];
          const long double e = p.noise(i, k);
          want.add(at.mean, std::fabs(at.mean) + std::fabs(at.prior_mean));
          want.add(at.std * e);
          if (p.densities() > 0) {
            const long double u = (want.value - at.prior_mean) / at.prior_std, size = want.size / at.prior_std;
            const size_t row = static_cast<size_t>(p.row(i, k));
            want_q[row].add(-0.5 * e * e - std::log(at.std) - half_log_two_pi, 0.5 * e * e + 2);
            want_p[row].add(-0.5 * u * u - std::log(at.prior_std) - half_log_two_pi, 0.5 * size * size + 2);
          }
        }
        check_close("z", z, k * b.elements() + i, want, 16);
      }
    }
    if (kl.size() > 0) check_divergence(b, kl);
    for (int64_t i = 0; i < p.densities(); ++i) {
      check_close("log_q", log_q, i, want_q[static_cast<size_t>(i)], 24);
      check_close("log_p", log_p, i, want_p[static_cast<size_t>(i)], 24);
    }
  });
}

// What sample k adds to the gradients of element i.
void add_sample(const Problem& p, int64_t i, int64_t k, Slopes& slopes) {
  const GaussianPair at = p.batch[i];
  const long double e = p.noise(i, k), gate = p.draw.gated ? p.gate[p.row(i, k)] : 1;
  Sum to_z;
  to_z.add(p.grad_z[k * p.batch.elements() + i]);
  if (p.densities() > 0) {
    const long double to_q = p.grad_log_q[p.row(i, k)], to_p = p.grad_log_p[p.row(i, k)];
    const long double u = (at.mean + at.std * e - at.prior_mean) / at.prior_std;
    const long double size = (std::fabs(at.mean) + at.std * std::fabs(e) + std::fabs(at.prior_mean)) / at.prior_std;
    to_z.add(-to_q * e / at.std);
    to_z.add(-to_p * u / at.prior_std, std::fabs(to_p) * size / at.prior_std);
    slopes.prior_mean.add(to_p * u / at.prior_std, std::fabs(to_p) * size / at.prior_std);
    slopes.prior_scale.add(to_p * (u * u - 1) / at.prior_std, std::fabs(to_p) * (size * size + 1) / at.prior_std);
    if (!p.draw.path_only) {
      slopes.mean.add(gate * to_q * e / at.std);
      slopes.scale.add(gate * to_q * e * e / at.std);
      slopes.scale.add(-gate * to_q / at.std);
    }
  }
  slopes.mean = slopes.mean + to_z * gate;
  slopes.scale = slopes.scale + to_z * (gate * e);
}

void test_backward(const Problem& p) {
  Batch& b = p.batch;
  const bool balanced = p.draw.extra == Extra::divergence && b.prior != Prior::residual;
  const double posterior_weight = balanced ? 0.25 : 1, prior_weight = balanced ? 0.75 : 1;
  const auto compute = [&] {
    GradientArrays grads(b);
    gaussian_kernels().sample_backward({b.gaussians(), b.reduction(), p.draw.samples, p.draw.antithetic, temperature,
                                        noise_reference.key, p.grad_z.data(), Problem::given(p.grad_kl),
                                        Problem::given(p.grad_log_q), Problem::given(p.grad_log_p), p.draw.path_only,
                                        Problem::given(p.gate), posterior_weight, prior_weight, grads.results()});
    return std::tuple(grads);
  };
  on_every_level(compute, [&](const auto& outputs) {
    check_gradients(b, std::get<0>(outputs), 32, [&](int64_t i) {
      Slopes slopes;
      for (int64_t k = 0; k < p.draw.samples; ++k) add_sample(p, i, k, slopes);
      if (p.grad_kl.size() > 0) {
        b[i].add_kl_slopes(Batch::weight * p.grad_kl[b.sum_of(i)], posterior_weight, prior_weight, slopes);
      }
      return slopes;
    });
  });
}

void test(const Setup& setup, const Draw& draw) {
  Batch batch(setup);
  const Problem problem(batch, draw);
  test_sample(problem);
  // Without a divergence and densities nothing depends on a prior, unless the posterior is relative to it.
  if (draw.extra != Extra::none || setup.prior == Prior::standard) test_backward(problem);
}

void test_numbers() {
  for (DType dtype : all_dtypes) {
    for (ScaleType type : all_scale_types) {
      for (Prior prior : all_priors) {
        Setup setup = {.dtype = dtype, .scale_type = type, .prior = prior, .rows = 37, .cols = 33};
        if (prior == Prior::standard) test(setup, {.extra = Extra::none, .samples = 2});
        test(setup, {.extra = Extra::divergence});
        test(setup, {.extra = Extra::densities, .samples = 3});
        setup.rows = 2, setup.cols = 1037;
        test(setup, {.extra = Extra::divergence, .samples = 2});
        test(setup, {.extra = Extra::densities});
      }
    }
  }
}

void test_draws() {
  for (DType dtype : all_dtypes) {
    for (Prior prior : all_priors) {
      const Setup setup = {.dtype = dtype, .prior = prior, .rows = 20, .cols = 33};
      if (prior == Prior::standard) test(setup, {.samples = 4, .antithetic = true});
      test(setup, {.extra = Extra::divergence, .samples = 4, .antithetic = true});
      test(setup, {.extra = Extra::densities, .samples = 4, .antithetic = true});
      for (bool path_only : {false, true}) {
        for (bool gated : {false, true}) {
          test(setup, {.extra = Extra::densities, .samples = 2, .path_only = path_only, .gated = gated});
        }
      }
    }
  }
}

void test_options() {
  for (DType dtype : all_dtypes) {
    for (Prior prior : all_priors) {
      const auto with = [&](bool densities, auto set) {
        Setup setup = {.dtype = dtype, .prior = prior, .rows = 60, .cols = 33};
        set(setup);
        test(setup, {.extra = Extra::divergence, .samples = 2});
        if (densities) test(setup, {.extra = Extra::densities, .samples = 2});
      };
      with(false, [](Setup& s) { s.over_rows = true; });
      for (int64_t block : {1, 20, 660}) with(true, [&](Setup& s) { s.packed_block = block; });
      for (int64_t period : {1, 33}) with(true, [&](Setup& s) { s.prior_period = period; });
      for (int64_t mask_cols : {11, 66}) with(false, [&](Setup& s) { s.mask_cols = mask_cols; });
      for (Clamp::Mode clamp : all_clamps) {
        with(true, [&](Setup& s) { s.clamp = clamp, s.scale_type = ScaleType::square, s.packed_block = 11; });
      }
      with(false, [](Setup& s) { s.over_rows = true, s.mask_cols = 33, s.packed_block = 33, s.prior_period = 1; });
    }
  }
}

// Nothing at all, single numbers, elements on their own, and rows wide enough to be shared by threads.
void test_shapes() {
  for (auto [rows, cols] :
       {std::pair(0, 3), std::pair(3, 0), std::pair(1, 1), std::pair(2500, 1), std::pair(2, 40001)}) {
    for (Extra extra : {Extra::none, Extra::divergence, Extra::densities}) {
      const Prior prior = extra == Extra::none ? Prior::standard : Prior::given;
      for (bool over_rows : {false, true}) {
        if (over_rows && extra != Extra::divergence) continue;
        test({.scale_type = ScaleType::std, .prior = prior, .rows = rows, .cols = cols, .over_rows = over_rows},
             {.extra = extra, .samples = 2});
      }
    }
  }
}

}  // namespace

int main() {
  test_noise();
  test_numbers();
  test_draws();
  test_options();
  test_shapes();
  return failed_checks > 0;
}
