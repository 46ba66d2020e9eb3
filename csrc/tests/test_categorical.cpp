// The kernels of categorical/kernels.h against the textbook in long double: noise by its definition, softmax of the
// perturbed logits, Σ q log(q / p) and their gradients.
#include <tuple>

#include "categorical/kernels.h"
#include "kernel_test.h"
#include "noise_reference.h"

using namespace isthmus;

namespace {

constexpr NoiseReference key = {{-123456789, 0x7ffffffe}};
constexpr double temperature = 0.7;
using Row = std::vector<long double>;

double gumbel_reference(DType dtype, int64_t i) {
  const int64_t per_block = dtype == DType::f64 ? 2 : 4;
  const Words words = philox(uint64_t(key.key[0]), uint64_t(key.key[1]) + uint64_t(i / per_block));
  if (dtype == DType::f64) {
    const uint32_t* pair = words.w + i % 2 * 2;
    const double v = std::min(uniform(pair[0], pair[1]), 1 - std::ldexp(1.0, -53));
    return -std::log(-std::log1p(-v));
  }
  const float v = std::min(uniform(words.w[i % 4]), 1 - std::ldexp(1.0f, -24));
  return -std::log(-std::log1p(-static_cast<double>(v)));
}

void test_noise() {
  for (DType dtype : all_dtypes) {
    for (int64_t count : {0, 1, 3, 64, 1023, 4099, 30000}) {
      const auto compute = [&] {
        Array noise(dtype, count);
        categorical_kernels().noise({dtype, key.key, count, noise.data()});
        return std::tuple(noise);
      };
      on_every_level(compute, [&](const auto& outputs) {
        for (int64_t i = 0; i < count; ++i)
          check_close("noise", std::get<0>(outputs), i, gumbel_reference(dtype, i), 4, 1);
      });
    }
  }
}

Row softmax(Row x) {
  long double top = x[0], sum = 0;
  for (long double value : x) top = std::max(top, value);
  for (long double& value : x) sum += value = std::exp(value - top);
  for (long double& value : x) value /= sum;
  return x;
}

enum class PriorKind { none, rows, shared };

struct Problem {
  DType dtype;
  PriorKind kind;
  int64_t rows, cols;
  Array logits, prior, grad_y, grad_kl;

  Problem(DType dtype_, PriorKind kind_, int64_t rows_, int64_t cols_, Random random = Random(11))
      : dtype(dtype_),
        kind(kind_),
        rows(rows_),
        cols(cols_),
        logits(random.normal(dtype, rows * cols)),
        prior(random.normal(dtype, kind == PriorKind::shared ? cols : rows * cols)),
        grad_y(random.normal(dtype, rows * cols)),
        grad_kl(random.normal(accumulate_dtype(dtype), rows)) {}

  bool has_prior() const { return kind != PriorKind::none; }
  Categories in() const {
    return {dtype, rows, cols, logits.data(), has_prior() ? prior.data() : nullptr, kind == PriorKind::shared};
  }
  int64_t elements() const { return rows * cols; }
  Array empty() const { return Array(dtype, elements()); }
  Array empty_prior() const { return Array(dtype, has_prior() ? elements() : 0); }

  Row perturbed(int64_t row) const {
    Row x;
    for (int64_t i = row * cols; i < (row + 1) * cols; ++i) {
      x.push_back((logits[i] + gumbel_reference(dtype, i)) / temperature);
    }
    return x;
  }
  Row posterior(int64_t row) const {
    Row x;
    for (int64_t i = row * cols; i < (row + 1) * cols; ++i) x.push_back(logits[i]);
    return softmax(x);
  }
  Row prior_row(int64_t row) const {
    if (!has_prior()) return Row(static_cast<size_t>(cols), 1.0L / static_cast<long double>(cols));
    Row x;
    for (int64_t c = 0; c < cols; ++c) x.push_back(prior[kind == PriorKind::shared ? c : row * cols + c]);
    return softmax(x);
  }
  // KL, and its gradient to logits and prior logits.
  long double divergence(int64_t row, Row& to_logits, Row& to_prior) const {
    const Row q = posterior(row), p = prior_row(row);
    to_logits = to_prior = Row(q.size());
    long double kl = 0;
    for (size_t c = 0; c < q.size(); ++c) kl += q[c] * std::log(q[c] / p[c]);
    for (size_t c = 0; c < q.size(); ++c) {
      to_logits[c] = q[c] * (std::log(q[c] / p[c]) - kl);
      to_prior[c] = p[c] - q[c];
    }
    return kl;
  }
};

void test_forward(const Problem& p, bool hard) {
  const auto compute = [&] {
    Array y = p.empty(), kl(accumulate_dtype(p.dtype), p.rows), alone = kl;
    categorical_kernels().gumbel_softmax({p.in(), temperature, hard, key.key, y.data(), kl.data()});
    categorical_kernels().kl({p.in(), alone.data()});
    return std::tuple(y, kl, alone);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [y, kl, alone] = outputs;
    CHECK(kl == alone);
    for (int64_t row = 0; row < p.rows; ++row) {
      const Row x = p.perturbed(row), soft = softmax(x);
      const int64_t winner = std::max_element(x.begin(), x.end()) - x.begin();
      for (int64_t c = 0; c < p.cols; ++c) {
        const double want = hard ? c == winner : static_cast<double>(soft[static_cast<size_t>(c)]);
        check_close("y", y, row * p.cols + c, want, hard ? 0 : 60, 0);
      }
      Row to_logits, to_prior;
      check_close("kl", kl, row, static_cast<double>(p.divergence(row, to_logits, to_prior)), 40, 0.1);
    }
  });
}

void test_backward(const Problem& p) {
  const auto compute = [&] {
    Array through_both = p.empty(), through_y = p.empty(), through_kl = p.empty(), from_y = p.empty(), y = p.empty();
    Array to_prior = p.empty_prior(), to_prior_alone = to_prior;
    const auto pointer = [&](Array& array) { return p.has_prior() ? array.data() : nullptr; };
    const CategoricalKernels& kernels = categorical_kernels();
    kernels.gumbel_softmax({p.in(), temperature, false, key.key, y.data(), nullptr});
    kernels.softmax_backward({p.dtype, p.rows, p.cols, temperature, p.grad_y.data(), y.data(), from_y.data()});
    kernels.gumbel_softmax_backward(
        {p.in(), temperature, key.key, p.grad_y.data(), nullptr, through_y.data(), nullptr});
    kernels.gumbel_softmax_backward(
        {p.in(), temperature, key.key, p.grad_y.data(), p.grad_kl.data(), through_both.data(), pointer(to_prior)});
    kernels.kl_backward({p.in(), p.grad_kl.data(), through_kl.data(), pointer(to_prior_alone)});
    return std::tuple(through_both, through_y, through_kl, from_y, to_prior, to_prior_alone);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [through_both, through_y, through_kl, from_y, to_prior, to_prior_alone] = outputs;
    CHECK(to_prior == to_prior_alone);
    // y is rounded to its type before it is used again, below the normal numbers in absolute steps.
    const double reused = rounding_unit(p.dtype) / rounding_unit(accumulate_dtype(p.dtype));
    for (int64_t row = 0; row < p.rows; ++row) {
      const Row soft = softmax(p.perturbed(row));
      Row kl_logits, kl_prior;
      p.divergence(row, kl_logits, kl_prior);
      long double mean = 0, size = 0;
      for (size_t c = 0; c < soft.size(); ++c) {
        const double g = p.grad_y[row * p.cols + static_cast<int64_t>(c)];
        mean += soft[c] * g;
        size += soft[c] * std::fabs(g);
      }
      const double scale = p.grad_kl[row];
      for (size_t c = 0; c < soft.size(); ++c) {
        const int64_t i = row * p.cols + static_cast<int64_t>(c);
        const double spread = static_cast<double>((std::fabs(p.grad_y[i]) + size) / temperature);
        const double sample = static_cast<double>(soft[c] * (p.grad_y[i] - mean) / temperature);
        const double bound = static_cast<double>(soft[c]) * spread;
        const double stored = std::max(bound, std::ldexp(spread, format_of(p.dtype).lowest));
        const double divergence = scale * static_cast<double>(kl_logits[c]);
        check_close("through y", through_y, i, sample, 60, bound);
        check_close("from y", from_y, i, sample, 60 + 4 * reused, stored);
        check_close("through kl", through_kl, i, divergence, 60, std::fabs(scale) * 0.1);
        check_close("through both", through_both, i, sample + divergence, 60, bound + std::fabs(scale) * 0.1);
        if (p.has_prior()) {
          check_close("to prior", to_prior, i, scale * static_cast<double>(kl_prior[c]), 60, std::fabs(scale) * 0.1);
        }
      }
    }
  });
}

void test(const Problem& p) {
  for (bool hard : {false, true}) test_forward(p, hard);
  test_backward(p);
}

}  // namespace

int main() {
  test_noise();
  for (DType dtype : all_dtypes) {
    for (PriorKind kind : {PriorKind::none, PriorKind::rows, PriorKind::shared}) {
      test(Problem(dtype, kind, 3, 5));
      test(Problem(dtype, kind, 110, 10));
      test(Problem(dtype, kind, 37, 33));
      test(Problem(dtype, kind, 2, 1037));
    }
  }
  // Nothing to do, one class, and rows of many blocks.
  test(Problem(DType::f32, PriorKind::none, 0, 3));
  test(Problem(DType::f32, PriorKind::rows, 2500, 1));
  test(Problem(DType::f32, PriorKind::none, 2, 20001));
  return failed_checks > 0;
}
