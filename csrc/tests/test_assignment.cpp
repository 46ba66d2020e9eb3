// The kernels of assignment/kernels.h against plain loops in long double.
#include <tuple>

#include "assignment/kernels.h"
#include "kernel_test.h"

using namespace isthmus;

namespace {

using Numbers = std::vector<long double>;

struct Problem {
  DType dtype, accumulate;
  Metric metric;
  int64_t rows, codes, dim;
  Array x, codebook;
  static constexpr long double temperature = 0.75;

  Problem(DType dtype_, Metric metric_, int64_t rows_, int64_t codes_, int64_t dim_, Random random = Random(3))
      : dtype(dtype_),
        accumulate(accumulate_dtype(dtype)),
        metric(metric_),
        rows(rows_),
        codes(codes_),
        dim(dim_),
        x(random.normal(dtype, rows * dim)),
        codebook(random.normal(dtype, codes * dim)) {}

  Assignment args() const {
    return {dtype, metric, static_cast<double>(temperature), 1, rows, codes, dim, x.data(), codebook.data(), nullptr};
  }
  long double logit(int64_t i, int64_t k) const {
    long double sum = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const long double u = x[i * dim + d], v = codebook[k * dim + d];
      sum += metric == Metric::euclidean ? -(u - v) * (u - v) : u * v;
    }
    return sum / temperature;
  }
  // softmax of the logits of each row: [rows, codes].
  Numbers probabilities() const {
    Numbers p;
    for (int64_t i = 0; i < rows; ++i) {
      long double sum = 0;
      for (int64_t k = 0; k < codes; ++k) sum += std::exp(logit(i, k));
      for (int64_t k = 0; k < codes; ++k) p.push_back(std::exp(logit(i, k)) / sum);
    }
    return p;
  }
};

size_t at(int64_t i) { return static_cast<size_t>(i); }

// The gradients of Σ w(i, k) logit(i, k).
struct Gradients {
  Numbers x, codebook;

  template <class Weight>
  Gradients(const Problem& p, Weight weight) : x(at(p.rows * p.dim)), codebook(at(p.codes * p.dim)) {
    for (int64_t i = 0; i < p.rows; ++i) {
      for (int64_t k = 0; k < p.codes; ++k) {
        const long double w = weight(i, k) / p.temperature;
        for (int64_t d = 0; d < p.dim; ++d) {
          const long double u = p.x[i * p.dim + d], v = p.codebook[k * p.dim + d];
          const bool euclidean = p.metric == Metric::euclidean;
          x[at(i * p.dim + d)] += w * (euclidean ? 2 * (v - u) : v);
          codebook[at(k * p.dim + d)] += w * (euclidean ? 2 * (u - v) : u);
        }
      }
    }
  }
};

// Probabilities carry the roundings of logits of some dozens.
void check_all(const char* what, const Array& got, const Numbers& want) {
  long double size = 1;
  for (long double value : want) size = std::max(size, std::fabs(value));
  for (size_t i = 0; i < want.size(); ++i) {
    check_close(what, got, static_cast<int64_t>(i), static_cast<double>(want[i]), 1000, static_cast<double>(size));
  }
}

void test_soft_quantize(const Problem& p) {
  const Array grad = Random(4).normal(p.dtype, p.rows * p.dim);
  const Numbers probability = p.probabilities();
  const auto compute = [&] {
    Array quantized(p.dtype, p.rows * p.dim), centred(p.accumulate, p.rows * p.dim);
    Array normalizer(p.accumulate, 2 * p.rows), grad_x(p.dtype, p.rows * p.dim),
        grad_codebook(p.dtype, p.codes * p.dim);
    std::vector<int64_t> indices(at(p.rows));
    assignment_kernels().soft_quantize(
        {p.args(), {nullptr, 1}, false, quantized.data(), indices.data(), centred.data(), normalizer.data(), nullptr});
    assignment_kernels().soft_quantize_backward({p.args(),
                                                 {nullptr, 1},
                                                 grad.data(),
                                                 centred.data(),
                                                 normalizer.data(),
                                                 grad_x.data(),
                                                 grad_codebook.data(),
                                                 nullptr});
    return std::tuple(quantized, indices, grad_x, grad_codebook);
  };
  Numbers mean(at(p.rows * p.dim)), pull(at(p.rows * p.codes));
  for (int64_t i = 0; i < p.rows; ++i) {
    for (int64_t k = 0; k < p.codes; ++k) {
      for (int64_t d = 0; d < p.dim; ++d) {
        mean[at(i * p.dim + d)] += probability[at(i * p.codes + k)] * p.codebook[k * p.dim + d];
        pull[at(i * p.codes + k)] += grad[i * p.dim + d] * p.codebook[k * p.dim + d];
      }
    }
  }
  Gradients gradients(p, [&](int64_t i, int64_t k) {
    long double centre = 0;
    for (int64_t d = 0; d < p.dim; ++d) centre += grad[i * p.dim + d] * mean[at(i * p.dim + d)];
    return probability[at(i * p.codes + k)] * (pull[at(i * p.codes + k)] - centre);
  });
  for (int64_t i = 0; i < p.rows; ++i) {
    for (int64_t k = 0; k < p.codes; ++k) {
      for (int64_t d = 0; d < p.dim; ++d) {
        gradients.codebook[at(k * p.dim + d)] += probability[at(i * p.codes + k)] * grad[i * p.dim + d];
      }
    }
  }
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [quantized, indices, grad_x, grad_codebook] = outputs;
    check_all("quantized", quantized, mean);
    check_all("grad x", grad_x, gradients.x);
    check_all("grad codebook", grad_codebook, gradients.codebook);
    for (int64_t i = 0; i < p.rows; ++i) {
      const auto first = probability.begin() + i * p.codes, best = std::max_element(first, first + p.codes);
      CHECK_THAT(probability[at(i * p.codes + indices[at(i)])] > 0.999L * *best, "row %ld", static_cast<long>(i));
    }
  });
}

void test_statistics_and_loss(const Problem& p) {
  Random random(6);
  const Array grad = random.normal(p.accumulate, p.rows);
  std::vector<int64_t> indices = random.indices(p.rows, p.codes);
  indices[0] = -1;
  const Numbers probability = p.probabilities();
  const auto compute = [&] {
    Array entropy(p.accumulate, p.rows), usage(p.accumulate, p.codes), normalizer(p.accumulate, 2 * p.rows);
    Array loss = entropy, grad_x(p.dtype, p.rows * p.dim), grad_codebook(p.dtype, p.codes * p.dim);
    assignment_kernels().soft_statistics({p.args(), entropy.data(), usage.data(), normalizer.data(), nullptr});
    assignment_kernels().cross_entropy({p.args(), indices.data(), loss.data(), normalizer.data(), nullptr});
    assignment_kernels().cross_entropy_backward(
        {p.args(), indices.data(), grad.data(), normalizer.data(), grad_x.data(), grad_codebook.data(), nullptr});
    return std::tuple(entropy, usage, loss, grad_x, grad_codebook);
  };
  Numbers entropy(at(p.rows)), usage(at(p.codes)), loss(at(p.rows));
  for (int64_t i = 0; i < p.rows; ++i) {
    for (int64_t k = 0; k < p.codes; ++k) {
      const long double q = probability[at(i * p.codes + k)];
      entropy[at(i)] -= q * std::log(q);
      usage[at(k)] += q;
      if (k == indices[at(i)]) loss[at(i)] = -std::log(q);
    }
  }
  const Gradients gradients(p, [&](int64_t i, int64_t k) {
    const int64_t index = indices[at(i)];
    return index < 0 ? 0 : grad[i] * (probability[at(i * p.codes + k)] - (k == index ? 1 : 0));
  });
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [got_entropy, got_usage, got_loss, grad_x, grad_codebook] = outputs;
    check_all("entropy", got_entropy, entropy);
    check_all("usage", got_usage, usage);
    check_all("loss", got_loss, loss);
    check_all("grad x", grad_x, gradients.x);
    check_all("grad codebook", grad_codebook, gradients.codebook);
  });
}

// Noise and nearly no temperature: the nearest codes.
void test_samples(const Problem& p) {
  const int64_t key[] = {12, 34};
  Assignment of = p.args();
  of.temperature = 1e-6;
  const auto compute = [&] {
    std::vector<int64_t> indices(at(p.rows));
    assignment_kernels().sample({of, key, indices.data(), nullptr});
    return std::tuple(indices);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [indices] = outputs;
    for (int64_t i = 0; i < p.rows; ++i) {
      for (int64_t k = 0; k < p.codes; ++k) {
        CHECK_THAT(p.logit(i, k) <= p.logit(i, indices[at(i)]) + 1e-3L, "row %ld", static_cast<long>(i));
      }
    }
  });
}

}  // namespace

int main() {
  for (const DType dtype : all_dtypes) {
    for (const Metric metric : {Metric::euclidean, Metric::inner_product}) {
      for (const auto& [rows, codes, dim] : {std::tuple{1, 1, 1}, {13, 200, 5}, {70, 17, 9}}) {
        const Problem p(dtype, metric, rows, codes, dim);
        test_soft_quantize(p);
        test_statistics_and_loss(p);
        test_samples(p);
      }
    }
  }
  return failed_checks > 0;
}
