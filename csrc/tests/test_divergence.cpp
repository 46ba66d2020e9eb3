// The kernels of divergence/kernels.h against the textbook in double.
#include <tuple>

#include "divergence/kernels.h"
#include "gaussian_reference.h"

using namespace isthmus;

namespace {

enum class Prior { standard, shared, elementwise };

struct Problem {
  DType dtype;
  ScaleType type;
  Prior prior_kind;
  int64_t rows, cols;
  Array mean, scale, prior_mean, prior_scale, grad;

  Problem(DType dtype_, ScaleType type_, Prior prior_, int64_t rows_, int64_t cols_, Random random = Random(7))
      : dtype(dtype_),
        type(type_),
        prior_kind(prior_),
        rows(rows_),
        cols(cols_),
        mean(random.normal(dtype, rows * cols)),
        scale(random_scale(random, dtype, type, rows * cols)),
        prior_mean(random.normal(dtype, prior_kind == Prior::shared ? 1 : rows * cols)),
        prior_scale(random_scale(random, dtype, type, prior_mean.size())),
        grad(random.normal(accumulate_dtype(dtype), rows)) {}

  const void* prior(const Array& array) const { return prior_kind == Prior::standard ? nullptr : array.data(); }

  KlReference reference(int64_t i) const {
    if (prior_kind == Prior::standard) return kl_reference(type, mean[i], scale[i], 0, unit_scale(type));
    const int64_t j = prior_kind == Prior::shared ? 0 : i;
    return kl_reference(type, mean[i], scale[i], prior_mean[j], prior_scale[j]);
  }
};

constexpr double weight = 0.75;

void test_forward(const Problem& p) {
  const auto compute = [&] {
    Array kl(accumulate_dtype(p.dtype), p.rows);
    divergence_kernels().gaussian_kl({p.dtype, p.type, p.rows, p.cols, weight, p.mean.data(), p.scale.data(),
                                      p.prior(p.prior_mean), p.prior(p.prior_scale), p.prior_kind == Prior::shared,
                                      kl.data(), nullptr});
    return std::tuple(kl);
  };
  on_every_level(compute, [&](const auto& outputs) {
    for (int64_t row = 0; row < p.rows; ++row) {
      double sum = 0;
      for (int64_t i = row * p.cols; i < (row + 1) * p.cols; ++i) sum += weight * p.reference(i).kl;
      check_close("kl", std::get<0>(outputs), row, sum, 40, 1e-3);
    }
  });
}

void test_backward(const Problem& p) {
  const bool has_prior = p.prior_kind != Prior::standard;
  const int64_t elements = p.rows * p.cols, prior_elements = has_prior ? elements : 0;
  const auto compute = [&] {
    Array mean(p.dtype, elements), scale(p.dtype, elements);
    Array prior_mean(p.dtype, prior_elements), prior_scale(p.dtype, prior_elements);
    divergence_kernels().gaussian_kl_backward(
        {p.dtype, p.type, p.rows, p.cols, weight, p.grad.data(), p.mean.data(), p.scale.data(), p.prior(p.prior_mean),
         p.prior(p.prior_scale), p.prior_kind == Prior::shared, mean.data(), scale.data(),
         has_prior ? prior_mean.data() : nullptr, has_prior ? prior_scale.data() : nullptr});
    return std::tuple(mean, scale, prior_mean, prior_scale);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [mean, scale, prior_mean, prior_scale] = outputs;
    for (int64_t i = 0; i < elements; ++i) {
      const KlReference want = p.reference(i);
      const double g = weight * p.grad[i / p.cols];
      check_close("grad mean", mean, i, g * want.mean, 20, std::fabs(g));
      check_close("grad scale", scale, i, g * want.scale, 20, std::fabs(g));
      if (!has_prior) continue;
      check_close("grad prior mean", prior_mean, i, g * want.prior_mean, 20, std::fabs(g));
      check_close("grad prior scale", prior_scale, i, g * want.prior_scale, 20, std::fabs(g));
    }
  });
}

// Next to the prior the divergence is about d², and must keep its digits down to the smallest.
void test_accuracy_near_the_prior() {
  for (DType dtype : {DType::f32, DType::f64}) {
    for (double difference = 0.3; difference > 1e-15; difference *= 0.37) {
      for (double sign : {-1.0, 1.0}) {
        const Array mean(dtype, std::vector<double>{0}), scale(dtype, std::vector<double>{sign * 2 * difference});
        const auto compute = [&] {
          Array kl(dtype, 1);
          divergence_kernels().gaussian_kl({dtype, ScaleType::logvar, 1, 1, 1, mean.data(), scale.data(), nullptr,
                                            nullptr, false, kl.data(), nullptr});
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

}  // namespace

int main() {
  for (DType dtype : all_dtypes) {
    for (ScaleType type : all_scale_types) {
      for (Prior prior : {Prior::standard, Prior::shared, Prior::elementwise}) {
        for (auto [rows, cols] : {std::pair(1, 1), std::pair(3, 5), std::pair(40, 33), std::pair(2, 1037)}) {
          test_forward(Problem(dtype, type, prior, rows, cols));
          test_backward(Problem(dtype, type, prior, rows, cols));
        }
      }
    }
  }
  // No rows, no columns, elements on their own, and rows wide enough to be shared by threads.
  for (auto [rows, cols] : {std::pair(0, 3), std::pair(3, 0), std::pair(2500, 1), std::pair(2, 50001)}) {
    test_forward(Problem(DType::f32, ScaleType::logvar, Prior::standard, rows, cols));
    test_backward(Problem(DType::f32, ScaleType::softplus, Prior::elementwise, rows, cols));
  }
  test_accuracy_near_the_prior();
  return failed_checks > 0;
}
