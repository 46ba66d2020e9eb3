// The kernels of pairwise/kernels.h against plain loops in long double.
#include <tuple>

#include "gaussian_reference.h"
#include "pairwise/kernels.h"

using namespace isthmus;

namespace {

const long double log_two_pi = std::log(2 * std::acos(-1.0L));

struct Problem {
  DType dtype, accumulate;
  ScaleType type;
  int64_t rows, components, dim;
  Array z, mean, scale;

  Problem(DType dtype_, ScaleType type_, int64_t rows_, int64_t components_, int64_t dim_, Random random = Random(5))
      : dtype(dtype_),
        accumulate(accumulate_dtype(dtype)),
        type(type_),
        rows(rows_),
        components(components_),
        dim(dim_),
        z(random.normal(dtype, rows * dim)),
        mean(random.normal(dtype, components * dim)),
        scale(random_scale(random, dtype, type, components * dim)) {}

  GaussianPairs pairs() const { return {dtype, type, rows, components, dim, z.data(), mean.data(), scale.data()}; }

  long double residual(int64_t i, int64_t k, int64_t d) const {
    return (z[i * dim + d] - mean[k * dim + d]) / std_of(type, scale[k * dim + d]);
  }
  long double log_density(int64_t i, int64_t k, int64_t d) const {
    const long double t = residual(i, k, d);
    return -0.5L * (t * t + log_two_pi) - std::log(std_of(type, scale[k * dim + d]));
  }
  long double score(int64_t i, int64_t k) const {
    long double sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += log_density(i, k, d);
    return sum;
  }
};

// The gradients of Σ_{i,k,d} weight(i, k, d) · log N(z_id; m_kd, s_kd²).
struct Gradients {
  std::vector<long double> z, mean, scale;

  template <class Weight>
  Gradients(const Problem& p, Weight weight)
      : z(static_cast<size_t>(p.rows * p.dim)), mean(static_cast<size_t>(p.components * p.dim)), scale(mean.size()) {
    for (int64_t i = 0; i < p.rows; ++i) {
      for (int64_t k = 0; k < p.components; ++k) {
        for (int64_t d = 0; d < p.dim; ++d) {
          const long double s = std_of(p.type, p.scale[k * p.dim + d]), t = p.residual(i, k, d), w = weight(i, k, d);
          z[static_cast<size_t>(i * p.dim + d)] -= w * t / s;
          mean[static_cast<size_t>(k * p.dim + d)] += w * t / s;
          scale[static_cast<size_t>(k * p.dim + d)] += w * (t * t - 1) / s * std_slope(p.type, p.scale[k * p.dim + d]);
        }
      }
    }
  }
};

// A score of some hundreds carries as many roundings into its exponential.
void check_all(const char* what, const Array& got, const std::vector<long double>& want) {
  long double size = 1;
  for (long double value : want) size = std::max(size, std::fabs(value));
  for (size_t i = 0; i < want.size(); ++i) {
    check_close(what, got, static_cast<int64_t>(i), static_cast<double>(want[i]), 1000, static_cast<double>(size));
  }
}

void test_mixture(const Problem& p, SumOver over) {
  const bool by_row = over == SumOver::components;
  const int64_t sums = by_row ? p.rows : p.components, terms = by_row ? p.components : p.rows;
  Random random(9);
  const Array log_weight = random.normal(p.dtype, terms), grad = random.normal(p.accumulate, sums);
  const auto compute = [&] {
    Array log_prob(p.accumulate, sums), normalizer(p.accumulate, 2 * sums);
    Array grad_z(p.dtype, p.rows * p.dim), grad_weight(p.dtype, terms);
    Array grad_mean(p.dtype, p.components * p.dim), grad_scale(p.dtype, p.components * p.dim);
    pairwise_kernels().mixture({p.pairs(), over, log_weight.data(), log_prob.data(), normalizer.data(), nullptr});
    pairwise_kernels().mixture_backward({p.pairs(), over, log_weight.data(), normalizer.data(), grad.data(),
                                         grad_z.data(), grad_mean.data(), grad_scale.data(), grad_weight.data(),
                                         nullptr});
    return std::tuple(log_prob, grad_z, grad_mean, grad_scale, grad_weight);
  };
  std::vector<long double> want(static_cast<size_t>(sums)), want_weight(static_cast<size_t>(terms));
  const auto term = [&](int64_t i, int64_t k) { return p.score(i, k) + log_weight[by_row ? k : i]; };
  for (int64_t i = 0; i < p.rows; ++i) {
    for (int64_t k = 0; k < p.components; ++k) want[static_cast<size_t>(by_row ? i : k)] += std::exp(term(i, k));
  }
  for (long double& value : want) value = std::log(value);
  std::vector<long double> shares;
  for (int64_t i = 0; i < p.rows; ++i) {
    for (int64_t k = 0; k < p.components; ++k) {
      const int64_t sum = by_row ? i : k;
      shares.push_back(grad[sum] * std::exp(term(i, k) - want[static_cast<size_t>(sum)]));
      want_weight[static_cast<size_t>(by_row ? k : i)] += shares.back();
    }
  }
  const Gradients gradients(
      p, [&](int64_t i, int64_t k, int64_t) { return shares[static_cast<size_t>(i * p.components + k)]; });
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [log_prob, grad_z, grad_mean, grad_scale, grad_weight] = outputs;
    check_all("log_prob", log_prob, want);
    check_all("grad z", grad_z, gradients.z);
    check_all("grad mean", grad_mean, gradients.mean);
    check_all("grad scale", grad_scale, gradients.scale);
    check_all("grad log_weight", grad_weight, want_weight);
  });
}

void test_aggregate(const Problem& p) {
  const AggregateWeights weights{-2.5, -1.25, -0.5};
  const auto weight = [&](int64_t i, int64_t k) {
    return k == i ? weights.log_self : k == (i + 1) % p.rows ? weights.log_next : weights.log_other;
  };
  Random random(9);
  const Array grad_joint = random.normal(p.accumulate, p.rows);
  const Array grad_marginal = random.normal(p.accumulate, p.rows * p.dim);
  const auto compute = [&] {
    Array joint(p.accumulate, p.rows), marginal(p.accumulate, p.rows * p.dim), normalizer(p.accumulate, 2 * p.rows);
    Array grad_z(p.dtype, p.rows * p.dim), grad_mean = grad_z, grad_scale = grad_z;
    pairwise_kernels().aggregate({p.pairs(), weights, joint.data(), marginal.data(), normalizer.data(), nullptr});
    pairwise_kernels().aggregate_backward({p.pairs(), weights, marginal.data(), normalizer.data(), grad_joint.data(),
                                           grad_marginal.data(), grad_z.data(), grad_mean.data(), grad_scale.data(),
                                           nullptr});
    return std::tuple(joint, marginal, grad_z, grad_mean, grad_scale);
  };
  std::vector<long double> joint(static_cast<size_t>(p.rows)), marginal(static_cast<size_t>(p.rows * p.dim));
  for (int64_t i = 0; i < p.rows; ++i) {
    for (int64_t k = 0; k < p.rows; ++k) {
      joint[static_cast<size_t>(i)] += std::exp(weight(i, k) + p.score(i, k));
      for (int64_t d = 0; d < p.dim; ++d) {
        marginal[static_cast<size_t>(i * p.dim + d)] += std::exp(weight(i, k) + p.log_density(i, k, d));
      }
    }
  }
  for (long double& value : joint) value = std::log(value);
  for (long double& value : marginal) value = std::log(value);
  const Gradients gradients(p, [&](int64_t i, int64_t k, int64_t d) {
    const size_t at = static_cast<size_t>(i * p.dim + d);
    return grad_joint[i] * std::exp(weight(i, k) + p.score(i, k) - joint[static_cast<size_t>(i)]) +
           grad_marginal[i * p.dim + d] * std::exp(weight(i, k) + p.log_density(i, k, d) - marginal[at]);
  });
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [found_joint, found_marginal, grad_z, grad_mean, grad_scale] = outputs;
    check_all("log_joint", found_joint, joint);
    check_all("log_marginal", found_marginal, marginal);
    check_all("grad z", grad_z, gradients.z);
    check_all("grad mean", grad_mean, gradients.mean);
    check_all("grad scale", grad_scale, gradients.scale);
  });
}

void test_discrepancy(DType dtype, DistanceKernel kernel, int64_t x_rows, int64_t y_rows, int64_t dim) {
  const DType accumulate = accumulate_dtype(dtype);
  Random random(11);
  const Array x = random.normal(dtype, x_rows * dim), y = random.normal(dtype, y_rows * dim);
  const Array grad(accumulate, std::vector<double>{0.75});
  const KernelSum sum{kernel, 2, {0.1, 0.7}};
  const Discrepancy of{dtype, sum, 0.5, 0.25, 0.125, 0.375, x_rows, y_rows, dim, x.data(), y.data(), nullptr, nullptr};
  const auto compute = [&] {
    Array value(accumulate, 1), grad_x(dtype, x_rows * dim), grad_y(dtype, y_rows * dim);
    Discrepancy args = of;
    args.value = value.data();
    pairwise_kernels().discrepancy(args);
    pairwise_kernels().discrepancy_backward({of, grad.data(), grad_x.data(), grad_y.data(), nullptr});
    return std::tuple(value, grad_x, grad_y);
  };
  long double want = of.diagonal;
  std::vector<long double> to_x(static_cast<size_t>(x_rows * dim)), to_y(static_cast<size_t>(y_rows * dim));
  // Every pair of rows of a and b counts `weight`; its gradient goes to both of its points.
  const auto add = [&](const Array& a, const Array& b, int64_t i, int64_t j, double weight, auto& to_a, auto& to_b) {
    long double square = 0;
    for (int64_t d = 0; d < dim; ++d) square += std::pow(a[i * dim + d] - b[j * dim + d], 2);
    long double slope = 0;
    for (int h = 0; h < sum.count; ++h) {
      const long double u = sum.factors[h] * square;
      want += weight * (kernel == DistanceKernel::rbf ? std::exp(-u) : 1 / (1 + u));
      slope -= sum.factors[h] * (kernel == DistanceKernel::rbf ? std::exp(-u) : 1 / ((1 + u) * (1 + u)));
    }
    for (int64_t d = 0; d < dim; ++d) {
      const long double pull = grad[0] * weight * slope * 2 * (a[i * dim + d] - b[j * dim + d]);
      to_a[static_cast<size_t>(i * dim + d)] += pull;
      to_b[static_cast<size_t>(j * dim + d)] -= pull;
    }
  };
  for (int64_t i = 0; i < x_rows; ++i) {
    for (int64_t j = i + 1; j < x_rows; ++j) add(x, x, i, j, 2 * of.weight_x, to_x, to_x);
    for (int64_t j = 0; j < y_rows; ++j) add(x, y, i, j, -2 * of.weight_xy, to_x, to_y);
  }
  for (int64_t i = 0; i < y_rows; ++i) {
    for (int64_t j = i + 1; j < y_rows; ++j) add(y, y, i, j, 2 * of.weight_y, to_y, to_y);
  }
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [value, grad_x, grad_y] = outputs;
    check_all("discrepancy", value, {want});
    check_all("grad x", grad_x, to_x);
    check_all("grad y", grad_y, to_y);
  });
}

}  // namespace

int main() {
  for (DType dtype : all_dtypes) {
    for (ScaleType type : all_scale_types) {
      for (auto [rows, components, dim] : {std::tuple(1, 1, 1), std::tuple(13, 33, 5), std::tuple(70, 9, 18)}) {
        const Problem p(dtype, type, rows, components, dim);
        test_mixture(p, SumOver::components);
        test_mixture(p, SumOver::rows);
      }
      for (auto [rows, dim] : {std::pair(2, 1), std::pair(57, 18)}) {
        test_aggregate(Problem(dtype, type, rows, rows, dim));
      }
    }
  }
  for (DType dtype : all_dtypes) {
    for (DistanceKernel kernel : {DistanceKernel::rbf, DistanceKernel::imq}) {
      test_discrepancy(dtype, kernel, 2, 1, 1);
      test_discrepancy(dtype, kernel, 61, 37, 18);
    }
  }
  return failed_checks > 0;
}
