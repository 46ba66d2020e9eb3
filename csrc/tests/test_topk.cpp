// The kernels of topk/kernels.h against plain loops, on small integers: every sum is exact, ties abound.
#include <memory>
#include <tuple>

#include "kernel_test.h"
#include "topk/kernels.h"

using namespace isthmus;

namespace {

struct Problem {
  DType dtype;
  Activation activation;
  int64_t rows, cols, features, k, groups;
  bool has_bias, all;
  Array x, weight, bias;
  std::unique_ptr<bool[]> among;

  Problem(DType dtype_, Activation activation_, int64_t rows_, int64_t cols_, int64_t features_, int64_t k_,
          int64_t groups_, bool has_bias_, bool all_, Random random = Random(5))
      : dtype(dtype_),
        activation(activation_),
        rows(rows_),
        cols(cols_),
        features(features_),
        k(k_),
        groups(groups_),
        has_bias(has_bias_),
        all(all_),
        x(random.integers(dtype, rows * cols)),
        weight(random.integers(dtype, features * cols)),
        bias(random.integers(dtype, features)),
        among(new bool[static_cast<size_t>(features)]) {
    const std::vector<int64_t> drawn = random.indices(features, 4);
    for (size_t f = 0; f < drawn.size(); ++f) among[f] = drawn[f] == 0;
  }

  double score(int64_t row, int64_t feature) const {
    double sum = has_bias ? bias[feature] : 0;
    for (int64_t c = 0; c < cols; ++c) sum += x[row * cols + c] * weight[feature * cols + c];
    return activation == Activation::relu ? std::max(sum, 0.0) : sum;
  }

  double rank(int64_t row, int64_t feature) const {
    const double value = score(row, feature);
    return activation == Activation::abs ? std::fabs(value) : value;
  }
};

struct Code {
  Array values;
  std::vector<int64_t> indices;

  bool operator==(const Code& other) const { return values == other.values && indices == other.indices; }
};

Code by_definition(const Problem& p) {
  std::vector<double> values;
  std::vector<int64_t> indices;
  const int64_t width = p.features / p.groups, best = p.k / p.groups;
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t first = 0; first < p.features; first += width) {
      std::vector<int64_t> order;
      for (int64_t f = first; f < first + width; ++f) {
        if (p.all || p.among[static_cast<size_t>(f)]) order.push_back(f);
      }
      std::stable_sort(order.begin(), order.end(),
                       [&](int64_t a, int64_t b) { return p.rank(row, a) > p.rank(row, b); });
      for (size_t j = 0; j < static_cast<size_t>(best); ++j) {
        indices.push_back(j < order.size() ? order[j] : -1);
        values.push_back(j < order.size() ? p.score(row, order[j]) : 0);
      }
    }
  }
  return {Array(p.dtype, values), indices};
}

void test(const Problem& p) {
  const Code want = by_definition(p);
  const auto compute = [&] {
    Code code{Array(p.dtype, p.rows * p.k), std::vector<int64_t>(static_cast<size_t>(p.rows * p.k), -2)};
    topk_kernels().encode({p.dtype, p.activation, p.rows, p.cols, p.features, p.k, p.groups, p.x.data(),
                           p.weight.data(), p.has_bias ? p.bias.data() : nullptr, p.all ? nullptr : p.among.get(),
                           code.values.data(), code.indices.data(), nullptr});
    return std::tuple(code);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [values, indices] = std::get<0>(outputs);
    for (int64_t i = 0; i < values.size(); ++i) check_close("values", values, i, want.values[i], 0, 0);
    CHECK_THAT(indices == want.indices, "other features than by definition (level %s, dtype %d, k %ld of %ld)",
               isa_name(current_isa()), static_cast<int>(p.dtype), static_cast<long>(p.k),
               static_cast<long>(p.features));
  });
}

}  // namespace

int main() {
  for (DType dtype : all_dtypes) {
    for (Activation activation : {Activation::identity, Activation::relu, Activation::abs}) {
      for (bool plain : {false, true}) {
        test(Problem(dtype, activation, 1, 1, 1, 1, 1, plain, plain));
        test(Problem(dtype, activation, 5, 3, 7, 7, 1, plain, plain));
        test(Problem(dtype, activation, 23, 17, 300, 6, 3, plain, plain));
        test(Problem(dtype, activation, 9, 37, 2100, 40, 1, plain, plain));
        test(Problem(dtype, activation, 14, 65, 1200, 12, 12, plain, plain));
        test(Problem(dtype, activation, 33, 17, 1200, 12, 12, plain, plain));
        test(Problem(dtype, activation, 130, 37, 700, 90, 2, plain, plain));
      }
    }
    test(Problem(dtype, Activation::relu, 0, 4, 6, 2, 1, true, true));
    test(Problem(dtype, Activation::relu, 40, 0, 70, 2, 1, true, true));
  }
  return failed_checks > 0;
}
