// The kernels of divergence/kernels.h against the textbook in long double.
#include <tuple>

#include "divergence/kernels.h"
#include "gaussian_batch.h"

using namespace isthmus;

namespace {

constexpr double infinity = __builtin_inf();

// ---- the divergence of Gaussians -----------------------------------------------------------------------------------

// Shares of the two sides in the gradient. That of a residual posterior cannot be divided.
double posterior_weight(const Batch& b) { return b.prior == Prior::residual ? 1 : 0.25; }
double prior_weight(const Batch& b) { return b.prior == Prior::residual ? 1 : 0.75; }

void test_forward(Batch& b) {
  const auto compute = [&] {
    Array kl(accumulate_dtype(b.dtype), b.reduction().sums());
    divergence_kernels().gaussian_kl({b.gaussians(), b.reduction(), kl.data(), nullptr});
    return std::tuple(kl);
  };
  on_every_level(compute, [&](const auto& outputs) { check_divergence(b, std::get<0>(outputs)); });
}

void test_backward(Batch& b) {
  const Array grad = Random(5).normal(accumulate_dtype(b.dtype), b.reduction().sums());
  const auto compute = [&] {
    GradientArrays grads(b);
    divergence_kernels().gaussian_kl_backward(
        {b.gaussians(), b.reduction(), grad.data(), posterior_weight(b), prior_weight(b), grads.results()});
    return std::tuple(grads);
  };
  on_every_level(compute, [&](const auto& outputs) {
    check_gradients(b, std::get<0>(outputs), 24, [&](int64_t i) {
      Slopes slopes;
      b[i].add_kl_slopes(Batch::weight * grad[b.sum_of(i)], posterior_weight(b), prior_weight(b), slopes);
      return slopes;
    });
  });
}

void test(const Setup& setup) {
  Batch batch(setup);
  test_forward(batch);
  test_backward(batch);
}

void test_numbers() {
  for (DType dtype : all_dtypes) {
    for (ScaleType type : all_scale_types) {
      for (Prior prior : all_priors) {
        for (auto [rows, cols] : {std::pair(3, 5), std::pair(40, 33), std::pair(2, 1037)}) {
          test({.dtype = dtype, .scale_type = type, .prior = prior, .rows = rows, .cols = cols});
        }
      }
    }
  }
}

void test_options() {
  for (DType dtype : all_dtypes) {
    for (Prior prior : all_priors) {
      const Setup plain = {.dtype = dtype, .prior = prior, .rows = 60, .cols = 33};
      const auto with = [&](auto set) {
        Setup setup = plain;
        set(setup);
        test(setup);
      };
      with([](Setup& s) { s.over_rows = true; });
      for (int64_t block : {1, 3, 20, 33, 660}) with([&](Setup& s) { s.packed_block = block; });
      for (int64_t period : {1, 33, 20}) with([&](Setup& s) { s.prior_period = period; });
      // The mask's rows are not those of the reduction.
      for (int64_t mask_cols : {1, 11, 33, 66}) with([&](Setup& s) { s.mask_cols = mask_cols; });
      for (Clamp::Mode clamp : all_clamps) {
        with([&](Setup& s) { s.clamp = clamp; });
        with([&](Setup& s) { s.clamp = clamp, s.scale_type = ScaleType::softplus, s.packed_block = 11; });
      }
      with([](Setup& s) { s.over_rows = true, s.mask_cols = 33, s.packed_block = 33, s.prior_period = 1; });
    }
  }
}

// Nothing at all, single numbers, elements on their own, and sums that are shared by threads, along either direction.
void test_shapes() {
  for (bool over_rows : {false, true}) {
    for (auto [rows, cols] : {std::pair(0, 3), std::pair(3, 0), std::pair(1, 1), std::pair(2500, 1), std::pair(5000, 7),
                              std::pair(1, 20000), std::pair(2, 50001)}) {
      for (Prior prior : {Prior::standard, Prior::given}) {
        test({.scale_type = ScaleType::softplus, .prior = prior, .rows = rows, .cols = cols, .over_rows = over_rows});
      }
    }
  }
}

// Next to the prior the divergence is about d², and must keep its digits down to the smallest.
void test_accuracy_near_the_prior() {
  for (DType dtype : {DType::f32, DType::f64}) {
    for (double difference = 0.3; difference > 1e-15; difference *= 0.37) {
      for (double sign : {-1.0, 1.0}) {
        const Array mean(dtype, std::vector<double>{0}), scale(dtype, std::vector<double>{sign * 2 * difference});
        GaussianKl args = {};
        args.posterior.dtype = dtype;
        args.posterior.mean = {mean.data(), 1, 1};
        args.posterior.scale = {scale.data(), 1, 1};
        args.reduction = {1, 1, false, 1};
        const auto compute = [&] {
          Array kl(dtype, 1);
          args.kl = kl.data();
          divergence_kernels().gaussian_kl(args);
          return std::tuple(kl);
        };
        on_every_level(compute, [&](const auto& outputs) {
          const long double d = scale[0] / 2;
          long double term = d * d, want = 0;  // (expm1(2d) - 2d) / 2, by its series
          for (int n = 3; n < 40; ++n) want += term, term *= 2 * d / n;
          check_close("kl near the prior", std::get<0>(outputs), 0, static_cast<double>(want), 8, 0);
        });
      }
    }
  }
}

// ---- importance weights --------------------------------------------------------------------------------------------

std::tuple<Array, Array> bound_and_gradients(const LogMeanExp& forward, const Array& grad) {
  const int64_t bounds = forward.groups * forward.cols;
  Array bound(accumulate_dtype(forward.dtype), bounds), grads(forward.dtype, bounds * forward.samples);
  LogMeanExp args = forward;
  args.bound = bound.data();
  divergence_kernels().log_mean_exp(args);
  divergence_kernels().log_mean_exp_backward(
      {args.dtype, args.groups, args.samples, args.cols, grad.data(), args.log_weights, bound.data(), grads.data()});
  return {bound, grads};
}

void test_log_mean_exp(DType dtype, int64_t groups, int64_t samples, int64_t cols, double spread) {
  Random random(3);
  const Array weights = random.uniform(dtype, groups * samples * cols, -spread, spread);
  const Array grad = random.normal(accumulate_dtype(dtype), groups * cols);
  const LogMeanExp args = {dtype, groups, samples, cols, weights.data(), nullptr};
  on_every_level([&] { return bound_and_gradients(args, grad); },
                 [&](const auto& outputs) {
                   const auto& [bound, grads] = outputs;
                   for (int64_t i = 0; i < groups * cols; ++i) {
                     const auto at = [&](int64_t k) { return (i / cols * samples + k) * cols + i % cols; };
                     double highest = -infinity;
                     for (int64_t k = 0; k < samples; ++k) highest = std::max(highest, weights[at(k)]);
                     long double sum = 0;
                     for (int64_t k = 0; k < samples; ++k)
                       sum += std::exp(static_cast<long double>(weights[at(k)] - highest));
                     const long double samples_of_weight = samples, want = highest + std::log(sum / samples_of_weight);
                     check_close("bound", bound, i, static_cast<double>(want), 8, 1);
                     for (int64_t k = 0; k < samples; ++k) {
                       const long double share =
                           std::exp(static_cast<long double>(weights[at(k)]) - want) / samples_of_weight;
                       // The bound is rounded, and an exponential multiplies the error of its argument by the argument.
                       const double size = std::fabs(grad[i]) * static_cast<double>(share) * (1 + spread);
                       check_close("grad", grads, at(k), grad[i] * static_cast<double>(share), 12, size);
                     }
                   }
                 });
}

// Columns whose weights are not all numbers.
void test_weights_at_infinity() {
  const double nan = __builtin_nan("");
  for (DType dtype : {DType::f32, DType::f64}) {
    const Array weights(dtype, {-infinity, -infinity, 1.0, nan, infinity, -infinity, 1.0, nan, 2.0, 0.0});
    const Array grad(dtype, std::vector<double>(5, 1.0));
    const LogMeanExp args = {dtype, 1, 2, 5, weights.data(), nullptr};
    const auto check = [&](const auto& outputs) {
      const auto& [bound, grads] = outputs;
      CHECK(bound[0] == -infinity && grads[0] == 0 && grads[5] == 0);
      check_close("bound", bound, 1, 1 - std::log(2.0), 4, 1);
      CHECK(grads[1] == 0 && std::fabs(grads[6] - 1) < 1e-6);
      CHECK(std::isnan(bound[2]) && std::isnan(grads[2]) && std::isnan(grads[7]));
      CHECK(std::isnan(bound[3]) && std::isnan(grads[3]) && std::isnan(grads[8]));
      CHECK(bound[4] == infinity);
    };
    on_every_level([&] { return bound_and_gradients(args, grad); }, check);
  }
}

}  // namespace

int main() {
  test_numbers();
  test_options();
  test_shapes();
  test_accuracy_near_the_prior();
  for (DType dtype : all_dtypes) {
    for (double spread : {3.0, 1000.0}) {
      test_log_mean_exp(dtype, 1, 1, 1, spread);
      test_log_mean_exp(dtype, 3, 4, 33, spread);
      test_log_mean_exp(dtype, 2, 5, 1, spread);
      test_log_mean_exp(dtype, 1, 64, 1000, spread);
    }
  }
  test_log_mean_exp(DType::f32, 1, 3, 0, 1);
  test_weights_at_infinity();
  return failed_checks > 0;
}
