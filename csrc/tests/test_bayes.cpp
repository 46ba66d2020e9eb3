// The kernels of bayes/kernels.h against plain loops: weights drawn from the stream of their key.
#include <tuple>

#include "bayes/kernels.h"
#include "gaussian_reference.h"
#include "noise_reference.h"

using namespace isthmus;

namespace {

constexpr NoiseReference noise_of_weights = {{2024, 99}};
const NoiseReference noise_of_bias = noise_of_weights.child(1);

enum class Bias { none, fixed, random };

struct Problem {
  DType dtype;
  ScaleType type;
  Estimator estimator;
  Bias bias;
  int64_t rows, inputs, features;
  Array x, weight_mean, weight_scale, bias_mean, bias_scale, grad;

  Problem(DType dtype_, ScaleType type_, Estimator estimator_, Bias bias_, int64_t rows_, int64_t inputs_,
          int64_t features_, Random random = Random(17))
      : dtype(dtype_),
        type(type_),
        estimator(estimator_),
        bias(bias_),
        rows(rows_),
        inputs(inputs_),
        features(features_),
        x(random.normal(dtype, rows * inputs)),
        weight_mean(random.normal(dtype, features * inputs)),
        weight_scale(random_scale(random, dtype, type, features * inputs)),
        bias_mean(random.normal(dtype, features)),
        bias_scale(random_scale(random, dtype, type, features)),
        grad(random.normal(dtype, rows * features)) {}

  const void* mean_of_bias() const { return bias == Bias::none ? nullptr : bias_mean.data(); }
  const void* scale_of_bias() const { return bias == Bias::random ? bias_scale.data() : nullptr; }

  double weight_std(int64_t i) const { return static_cast<double>(std_of(type, weight_scale[i])); }
  double weight_slope(int64_t i) const { return static_cast<double>(std_slope(type, weight_scale[i])); }
  double bias_std(int64_t f) const {
    return bias == Bias::random ? static_cast<double>(std_of(type, bias_scale[f])) : 0;
  }
  double bias_slope(int64_t f) const { return static_cast<double>(std_slope(type, bias_scale[f])); }
};

// Every quantity of the layer and its gradients in double. `size` is what rounding errors are relative to: sums of n
// terms of the order of 1 gather the errors of n partial sums.
struct Reference {
  std::vector<double> out, x, weight_mean, weight_scale, bias_mean, bias_scale;
  double size;

  explicit Reference(const Problem& p)
      : out(count(p.rows * p.features)),
        x(count(p.rows * p.inputs)),
        weight_mean(count(p.features * p.inputs)),
        weight_scale(weight_mean.size()),
        bias_mean(count(p.features)),
        bias_scale(bias_mean.size()),
        size(10.0 + static_cast<double>(std::max({p.rows, p.inputs, p.features}))) {
    for (int64_t row = 0; row < p.rows; ++row) {
      for (int64_t f = 0; f < p.features; ++f) {
        p.estimator == Estimator::weight ? sample_weight(p, row, f) : sample_output(p, row, f);
      }
    }
  }

 private:
  static size_t count(int64_t n) { return static_cast<size_t>(n); }

  void sample_weight(const Problem& p, int64_t row, int64_t f) {
    const double g = p.grad[row * p.features + f];
    const double bias_noise = p.bias == Bias::random ? noise_of_bias(p.dtype, f) : 0;
    double sum = p.bias == Bias::none ? 0 : p.bias_mean[f] + p.bias_std(f) * bias_noise;
    for (int64_t d = 0; d < p.inputs; ++d) {
      const int64_t i = f * p.inputs + d, j = row * p.inputs + d;
      const double noise = noise_of_weights(p.dtype, i), weight = p.weight_mean[i] + p.weight_std(i) * noise;
      sum += p.x[j] * weight;
      x[count(j)] += g * weight;
      weight_mean[count(i)] += g * p.x[j];
      weight_scale[count(i)] += g * p.x[j] * noise * p.weight_slope(i);
    }
    out[count(row * p.features + f)] = sum;
    bias_mean[count(f)] += g;
    bias_scale[count(f)] += g * bias_noise * p.bias_slope(f);
  }

  void sample_output(const Problem& p, int64_t row, int64_t f) {
    const int64_t at = row * p.features + f;
    const double g = p.grad[at], noise = noise_of_weights(p.dtype, at);
    double mean = p.bias == Bias::none ? 0 : p.bias_mean[f], variance = p.bias_std(f) * p.bias_std(f);
    for (int64_t d = 0; d < p.inputs; ++d) {
      const int64_t i = f * p.inputs + d, j = row * p.inputs + d;
      mean += p.x[j] * p.weight_mean[i];
      variance += std::pow(p.x[j] * p.weight_std(i), 2);
    }
    out[count(at)] = mean + std::sqrt(variance) * noise;
    const double to_variance = variance > 0 ? g * noise / (2 * std::sqrt(variance)) : 0;
    for (int64_t d = 0; d < p.inputs; ++d) {
      const int64_t i = f * p.inputs + d, j = row * p.inputs + d;
      const double s = p.weight_std(i);
      x[count(j)] += g * p.weight_mean[i] + to_variance * 2 * p.x[j] * s * s;
      weight_mean[count(i)] += g * p.x[j];
      weight_scale[count(i)] += to_variance * p.x[j] * p.x[j] * 2 * s * p.weight_slope(i);
    }
    bias_mean[count(f)] += g;
    bias_scale[count(f)] += to_variance * 2 * p.bias_std(f) * p.bias_slope(f);
  }
};

void check_all(const char* what, const Array& got, const std::vector<double>& want, double size) {
  for (int64_t i = 0; i < got.size(); ++i) check_close(what, got, i, want[static_cast<size_t>(i)], 16, size);
}

void test_forward(const Problem& p, const Reference& want) {
  const auto compute = [&] {
    Array out(p.dtype, p.rows * p.features);
    bayes_kernels().linear({p.dtype, p.type, p.estimator, p.rows, p.inputs, p.features, noise_of_weights.key,
                            p.x.data(), p.weight_mean.data(), p.weight_scale.data(), p.mean_of_bias(),
                            p.scale_of_bias(), out.data()});
    return std::tuple(out);
  };
  on_every_level(compute, [&](const auto& outputs) { check_all("out", std::get<0>(outputs), want.out, want.size); });
}

void test_backward(const Problem& p, const Reference& want) {
  const auto compute = [&] {
    Array x(p.dtype, p.rows * p.inputs), weight_mean(p.dtype, p.features * p.inputs);
    Array weight_scale(p.dtype, weight_mean.size()), bias_mean(p.dtype, p.features);
    Array bias_scale(p.dtype, p.bias == Bias::random ? p.features : 0);
    Array workspace(accumulate_dtype(p.dtype), p.estimator == Estimator::local ? p.rows * p.features : 0);
    bayes_kernels().linear_backward({p.dtype, p.type, p.estimator, p.rows, p.inputs, p.features, noise_of_weights.key,
                                     p.grad.data(), p.x.data(), p.weight_mean.data(), p.weight_scale.data(),
                                     p.scale_of_bias(), x.data(), weight_mean.data(), weight_scale.data(),
                                     bias_mean.data(), p.bias == Bias::random ? bias_scale.data() : nullptr,
                                     workspace.data()});
    return std::tuple(x, weight_mean, weight_scale, bias_mean, bias_scale);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [x, weight_mean, weight_scale, bias_mean, bias_scale] = outputs;
    check_all("grad x", x, want.x, want.size);
    check_all("grad weight mean", weight_mean, want.weight_mean, want.size);
    check_all("grad weight scale", weight_scale, want.weight_scale, want.size);
    check_all("grad bias mean", bias_mean, want.bias_mean, want.size);
    check_all("grad bias scale", bias_scale, want.bias_scale, want.size);
  });
}

void test(const Problem& p) {
  const Reference want(p);
  test_forward(p, want);
  test_backward(p, want);
}

}  // namespace

int main() {
  for (DType dtype : all_dtypes) {
    for (Estimator estimator : {Estimator::weight, Estimator::local}) {
      for (ScaleType type : all_scale_types) test(Problem(dtype, type, estimator, Bias::random, 5, 7, 9));
      for (Bias bias : {Bias::none, Bias::fixed, Bias::random}) {
        test(Problem(dtype, ScaleType::softplus, estimator, bias, 33, 70, 41));
        test(Problem(dtype, ScaleType::softplus, estimator, bias, 1, 1, 1));
      }
    }
  }
  for (Estimator estimator : {Estimator::weight, Estimator::local}) {
    test(Problem(DType::f32, ScaleType::std, estimator, Bias::random, 0, 3, 4));
    test(Problem(DType::f32, ScaleType::std, estimator, Bias::random, 4, 3, 0));
    test(Problem(DType::f32, ScaleType::std, estimator, Bias::random, 4, 0, 3));
    test(Problem(DType::f32, ScaleType::logvar, estimator, Bias::random, 130, 300, 150));
  }
  return failed_checks > 0;
}
