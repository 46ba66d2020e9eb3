// The kernel of adam/kernels.h against plain loops.
#include <tuple>

#include "adam/kernels.h"
#include "kernel_test.h"

using namespace isthmus;

namespace {

struct Problem {
  DType dtype;
  int64_t rows, cols;
  bool unit_norm, skip_zero_rows;
  Array weight, exp_avg, exp_avg_sq, grad;

  Problem(DType dtype_, int64_t rows_, int64_t cols_, bool unit_norm_, bool skip_zero_rows_, Random random = Random(5))
      : dtype(dtype_),
        rows(rows_),
        cols(cols_),
        unit_norm(unit_norm_),
        skip_zero_rows(skip_zero_rows_),
        weight(random.normal(dtype, rows * cols)),
        exp_avg(random.normal(accumulate_dtype(dtype), rows * cols)),
        exp_avg_sq(random.uniform(accumulate_dtype(dtype), rows * cols, 0.1, 1)),
        grad(random.integers(dtype, rows * cols, 1)) {}

  AdamRows arguments() const {
    return {.dtype = dtype,
            .rows = rows,
            .cols = cols,
            .beta1 = 0.75,
            .beta2 = 0.875,
            .epsilon = 0.125,
            .keep = 0.9375,
            .rate = 0.5,
            .spread = 1.5,
            .unit_norm = unit_norm,
            .skip_zero_rows = skip_zero_rows,
            .grad = grad.data(),
            .weight = nullptr,
            .exp_avg = nullptr,
            .exp_avg_sq = nullptr};
  }

  bool stays(int64_t row) const {
    bool zeros = skip_zero_rows;
    for (int64_t i = row * cols; i < (row + 1) * cols; ++i) zeros &= grad[i] == 0;
    return zeros;
  }
};

// Weight, first and second moment of one row after the step.
std::tuple<std::vector<double>, std::vector<double>, std::vector<double>> expected_row(const Problem& p, int64_t row) {
  const AdamRows a = p.arguments();
  double products = 0, squares = 0, new_squares = 0;
  for (int64_t i = row * p.cols; i < (row + 1) * p.cols; ++i) {
    products += p.grad[i] * p.weight[i], squares += p.weight[i] * p.weight[i];
  }
  std::vector<double> weight, first, second;
  for (int64_t i = row * p.cols; i < (row + 1) * p.cols; ++i) {
    const double g = p.grad[i] - (p.unit_norm ? products / squares * p.weight[i] : 0);
    first.push_back(a.beta1 * p.exp_avg[i] + (1 - a.beta1) * g);
    second.push_back(a.beta2 * p.exp_avg_sq[i] + (1 - a.beta2) * g * g);
    weight.push_back(a.keep * p.weight[i] - a.rate * first.back() / (a.spread * std::sqrt(second.back()) + a.epsilon));
    new_squares += weight.back() * weight.back();
  }
  for (double& w : weight) w /= p.unit_norm ? std::sqrt(new_squares) : 1;
  return {weight, first, second};
}

void test_step(const Problem& p) {
  const auto compute = [&] {
    std::tuple written(p.weight, p.exp_avg, p.exp_avg_sq);
    AdamRows args = p.arguments();
    args.weight = std::get<0>(written).data();
    args.exp_avg = std::get<1>(written).data();
    args.exp_avg_sq = std::get<2>(written).data();
    adam_kernels().rows(args);
    return written;
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [weight, exp_avg, exp_avg_sq] = outputs;
    for (int64_t row = 0; row < p.rows; ++row) {
      const bool stays = p.stays(row);
      const auto [w, m, v] = expected_row(p, row);
      for (int64_t k = 0, i = row * p.cols; k < p.cols; ++k, ++i) {
        const size_t at = static_cast<size_t>(k);
        check_close("weight", weight, i, stays ? p.weight[i] : w[at], stays ? 0 : 40, 1);
        check_close("exp_avg", exp_avg, i, stays ? p.exp_avg[i] : m[at], stays ? 0 : 40, 1);
        check_close("exp_avg_sq", exp_avg_sq, i, stays ? p.exp_avg_sq[i] : v[at], stays ? 0 : 40, 1);
      }
    }
  });
}

}  // namespace

int main() {
  for (DType dtype : all_dtypes) {
    for (bool unit_norm : {false, true}) {
      for (bool skip_zero_rows : {false, true}) {
        // Rows of one number, and narrow ones, of which some gradients are zero throughout.
        for (const auto& [rows, cols] : {std::pair(300, 1), std::pair(200, 3), std::pair(40, 37), std::pair(3, 1200)}) {
          test_step(Problem(dtype, rows, cols, unit_norm, skip_zero_rows));
        }
      }
    }
  }
  return failed_checks > 0;
}
