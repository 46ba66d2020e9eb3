// The kernels of likelihood/kernels.h against the textbook in long double.
#include <tuple>

#include "gaussian_reference.h"
#include "likelihood/kernels.h"

using namespace isthmus;

namespace {

constexpr double row_weight = 0.75;

struct NllReference {
  double nll, x, mean, scale;  // the value and its derivatives
};

// ---- gaussian_nll --------------------------------------------------------------------------------------------------

NllReference gaussian_reference(ScaleType type, double x, double mean, double scale, double weight, double beta) {
  const long double s = std_of(type, scale), q = (x - mean) / s, factor = weight * std::pow(s, 2.0L * beta);
  const long double nll = q * q / 2 + std::log(s) + std::log(2 * std::acos(-1.0L)) / 2;
  const long double to_scale = (1 - q * q) / s * std_slope(type, scale);
  return {static_cast<double>(factor * nll), static_cast<double>(factor * q / s), static_cast<double>(-factor * q / s),
          static_cast<double>(factor * to_scale)};
}

struct GaussianProblem {
  DType dtype;
  ScaleType type;
  bool shared;  // one scale
  double beta;
  int64_t rows, cols;
  Array x, mean, scale, weight, grad;

  GaussianProblem(DType dtype_, ScaleType type_, bool shared_, double beta_, int64_t rows_, int64_t cols_,
                  Random random = Random(7))
      : dtype(dtype_),
        type(type_),
        shared(shared_),
        beta(beta_),
        rows(rows_),
        cols(cols_),
        x(random.normal(dtype, rows * cols)),
        mean(random.normal(dtype, rows * cols)),
        scale(random_scale(random, shared ? accumulate_dtype(dtype) : dtype, type, shared ? 1 : rows * cols)),
        weight(random.uniform(dtype, rows * cols, 0.5, 1.5)),
        grad(random.normal(accumulate_dtype(dtype), rows)) {}

  NllReference reference(int64_t i) const {
    return gaussian_reference(type, x[i], mean[i], scale[shared ? 0 : i], weight[i], beta);
  }

  template <class Direction>
  GaussianNll<Direction> arguments(const Direction& direction) const {
    GaussianNll<Direction> args{direction, type, beta};
    args.dtype = dtype, args.rows = rows, args.cols = cols, args.weight = row_weight;
    args.in[0] = {x.data(), false}, args.in[1] = {mean.data(), false};
    args.in[2] = {scale.data(), shared}, args.in[3] = {weight.data(), false};
    return args;
  }
};

void test_gaussian_forward(const GaussianProblem& p) {
  const auto compute = [&] {
    Array nll(accumulate_dtype(p.dtype), p.rows);
    Nll direction{};
    direction.nll = nll.data();
    likelihood_kernels().gaussian_nll(p.arguments(direction));
    return std::tuple(nll);
  };
  on_every_level(compute, [&](const auto& outputs) {
    for (int64_t row = 0; row < p.rows; ++row) {
      double sum = 0, size = 1e-3;
      for (int64_t i = row * p.cols; i < (row + 1) * p.cols; ++i) {
        sum += row_weight * p.reference(i).nll;
        size += std::fabs(p.reference(i).nll);
      }
      check_close("nll", std::get<0>(outputs), row, sum, 40, size);
    }
  });
}

void test_gaussian_backward(const GaussianProblem& p) {
  const int64_t elements = p.rows * p.cols;
  const auto compute = [&] {
    Array x(p.dtype, elements), mean(p.dtype, elements), scale(p.scale.dtype(), p.scale.size());
    NllBackward direction{};
    direction.grad = p.grad.data();
    direction.out[0] = x.data(), direction.out[1] = mean.data(), direction.out[2] = scale.data();
    likelihood_kernels().gaussian_nll_backward(p.arguments(direction));
    return std::tuple(x, mean, scale);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [x, mean, scale] = outputs;
    double total = 0, size = 0;
    for (int64_t i = 0; i < elements; ++i) {
      const NllReference want = p.reference(i);
      const double g = row_weight * p.grad[i / p.cols], terms = 20 * std::fabs(g);
      check_close("grad x", x, i, g * want.x, 20, terms);
      check_close("grad mean", mean, i, g * want.mean, 20, terms);
      if (!p.shared) check_close("grad scale", scale, i, g * want.scale, 20, terms);
      total += g * want.scale, size += std::fabs(g * want.scale);
    }
    if (p.shared) check_close("grad of the shared scale", scale, 0, total, 40, size);
  });
}

void test_gaussian() {
  for (DType dtype : all_dtypes) {
    for (ScaleType type : all_scale_types) {
      for (bool shared : {false, true}) {
        for (auto [rows, cols] : {std::pair(1, 1), std::pair(3, 5), std::pair(40, 33), std::pair(2, 1037)}) {
          const GaussianProblem problem(dtype, type, shared, shared ? 0.5 : 0, rows, cols);
          test_gaussian_forward(problem);
          test_gaussian_backward(problem);
        }
      }
    }
  }
  // No rows, no columns, elements on their own, and rows wide enough to be shared by threads.
  for (auto [rows, cols] : {std::pair(0, 3), std::pair(3, 0), std::pair(2500, 1), std::pair(2, 50001)}) {
    for (bool shared : {false, true}) {
      test_gaussian_forward(GaussianProblem(DType::f32, ScaleType::logvar, shared, 0, rows, cols));
      test_gaussian_backward(GaussianProblem(DType::f32, ScaleType::softplus, shared, 1, rows, cols));
    }
  }
}

}  // namespace

int main() {
  test_gaussian();
  return failed_checks > 0;
}
