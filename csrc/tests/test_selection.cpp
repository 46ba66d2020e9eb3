// The kernels of selection/kernels.h against plain loops, on small integers: every sum is exact, ties abound.
#include <numeric>
#include <tuple>

#include "kernel_test.h"
#include "selection/kernels.h"

using namespace isthmus;

namespace {

struct Problem {
  DType dtype;
  int64_t rows, cols, features;
  bool has_bias;
  Array x, weight, bias;

  Problem(DType dtype_, int64_t rows_, int64_t cols_, int64_t features_, bool has_bias_, Random random = Random(3))
      : dtype(dtype_),
        rows(rows_),
        cols(cols_),
        features(features_),
        has_bias(has_bias_),
        x(random.integers(dtype, rows * cols)),
        weight(random.integers(dtype, features * cols)),
        bias(random.integers(dtype, features)) {}

  double score(int64_t row, int64_t feature) const {
    double sum = has_bias ? bias[feature] : 0;
    for (int64_t c = 0; c < cols; ++c) sum += x[row * cols + c] * weight[feature * cols + c];
    return sum;
  }
  const void* bias_data() const { return has_bias ? bias.data() : nullptr; }
};

struct Code {
  Array values;
  std::vector<int64_t> indices, offsets;

  bool operator==(const Code& other) const {
    return values == other.values && indices == other.indices && offsets == other.offsets;
  }
};

// The entries of the sorted positions row · features + feature.
Code by_definition(const Problem& p, const std::vector<int64_t>& positions, bool relu) {
  std::vector<double> values;
  std::vector<int64_t> indices, offsets(static_cast<size_t>(p.rows + 1));
  for (int64_t position : positions) {
    const int64_t row = position / p.features, feature = position % p.features;
    values.push_back(relu ? std::max(p.score(row, feature), 0.0) : p.score(row, feature));
    indices.push_back(feature);
    ++offsets[static_cast<size_t>(row + 1)];
  }
  std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
  return {Array(p.dtype, values), indices, offsets};
}

void test_threshold(const Problem& p, const std::vector<double>& thresholds) {
  const bool one = thresholds.size() == 1;
  std::vector<int64_t> above;
  for (int64_t i = 0; i < p.rows * p.features; ++i) {
    const double threshold = thresholds[one ? 0 : static_cast<size_t>(i % p.features)];
    if (p.score(i / p.features, i % p.features) > threshold) above.push_back(i);
  }
  const Code want = by_definition(p, above, false);
  const auto compute = [&] {
    Code found{Array(p.dtype, 0), {}, std::vector<int64_t>(static_cast<size_t>(p.rows + 1), -1)};
    const auto allocate = [](void* context, int64_t count) {
      Code& code = *static_cast<Code*>(context);
      code.values = Array(code.values.dtype(), count);
      code.indices.assign(static_cast<size_t>(count), -1);
      return Entries{code.values.data(), code.indices.data()};
    };
    selection_kernels().threshold_encode({p.dtype, p.rows, p.cols, p.features, p.x.data(), p.weight.data(),
                                          p.bias_data(), thresholds.data(), one, found.offsets.data(), allocate, &found,
                                          nullptr});
    return found;
  };
  on_every_level(compute, [&](const Code& found) {
    CHECK_THAT(found == want, "%ld entries, expected %ld (level %s, dtype %d)", static_cast<long>(found.values.size()),
               static_cast<long>(want.values.size()), isa_name(current_isa()), static_cast<int>(p.dtype));
  });
}

void test_batch(const Problem& p, Activation activation, int64_t entries) {
  const bool relu = activation == Activation::relu;
  std::vector<double> scores;
  for (int64_t i = 0; i < p.rows * p.features; ++i) {
    const double score = p.score(i / p.features, i % p.features);
    scores.push_back(relu ? std::max(score, 0.0) : score);
  }
  std::vector<int64_t> best(scores.size());
  std::iota(best.begin(), best.end(), 0);
  std::stable_sort(best.begin(), best.end(), [&](int64_t a, int64_t b) {
    return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)];
  });
  best.resize(static_cast<size_t>(entries));
  const double least = entries > 0 ? scores[static_cast<size_t>(best.back())] : __builtin_inf();
  std::sort(best.begin(), best.end());
  const Code want = by_definition(p, best, relu);
  const auto compute = [&] {
    Code found{Array(p.dtype, entries), std::vector<int64_t>(static_cast<size_t>(entries), -1),
               std::vector<int64_t>(static_cast<size_t>(p.rows + 1), -1)};
    Array threshold(accumulate_dtype(p.dtype), 1);
    selection_kernels().batch_topk_encode({p.dtype, activation, p.rows, p.cols, p.features, entries, p.x.data(),
                                           p.weight.data(), p.bias_data(), found.values.data(), found.indices.data(),
                                           found.offsets.data(), threshold.data(), nullptr});
    return std::tuple(found, threshold);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [found, threshold] = outputs;
    CHECK_THAT(found == want, "other entries than by definition (level %s, dtype %d, %ld of %ld)",
               isa_name(current_isa()), static_cast<int>(p.dtype), static_cast<long>(entries),
               static_cast<long>(p.rows * p.features));
    CHECK_THAT(threshold[0] == least, "threshold %g, expected %g", threshold[0], least);
  });
}

}  // namespace

int main() {
  const int64_t shapes[][3] = {{1, 1, 1}, {13, 5, 33}, {7, 0, 40}, {1090, 3, 70}, {5, 20, 1100}, {45, 70, 200}};
  for (DType dtype : all_dtypes) {
    for (const auto& [rows, cols, features] : shapes) {
      const Problem p(dtype, rows, cols, features, rows % 2 == 1);
      std::vector<double> each(static_cast<size_t>(features));
      for (size_t f = 0; f < each.size(); ++f) each[f] = static_cast<double>(f % 7) - 2.5;
      test_threshold(p, {0});
      test_threshold(p, each);
      for (int64_t entries : {int64_t(0), int64_t(1), rows, rows * features / 3, rows * features}) {
        test_batch(p, Activation::relu, entries);
        test_batch(p, Activation::identity, entries);
      }
    }
  }
  test_threshold(Problem(DType::f32, 0, 3, 5, true), {0});
  test_threshold(Problem(DType::f32, 3, 3, 0, true), {0});
  test_batch(Problem(DType::f32, 0, 3, 5, true), Activation::relu, 0);
  return failed_checks > 0;
}
