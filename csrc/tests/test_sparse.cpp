// The kernels of sparse/kernels.h against plain loops, on small integers: every sum is exact.
#include <tuple>

#include "kernel_test.h"
#include "sparse/kernels.h"

using namespace isthmus;

namespace {

enum class Usage { uniform, hot, empty };  // one latent in half of the entries; no entry at all

struct Problem {
  DType dtype;
  Usage usage;
  int64_t rows, cols, features, k;
  bool ragged;
  std::vector<int64_t> offsets, indices, row_of;
  Array values, weight, bias, target, grad, x;

  Problem(DType dtype_, Usage usage_, bool ragged_, int64_t rows_, int64_t cols_, int64_t features_, int64_t k_,
          Random random = Random(5))
      : dtype(dtype_),
        usage(usage_),
        rows(rows_),
        cols(cols_),
        features(features_),
        k(k_),
        ragged(ragged_),
        offsets(lengths(random)),
        indices(draw(random)),
        row_of(rows_of_entries()),
        values(random.integers(dtype, entries(), 1)),
        weight(random.integers(dtype, features * cols)),
        bias(random.integers(dtype, cols)),
        target(random.integers(dtype, rows * cols)),
        grad(random.integers(dtype, rows * cols)),
        x(random.integers(dtype, rows * cols)) {}

  int64_t entries() const { return offsets.back(); }
  CodeLayout layout() const {
    return {rows, entries(), ragged ? -1 : k, ragged ? offsets.data() : nullptr, indices.data()};
  }

  // Calls f(entry, row, latent) for all entries but the empty places.
  template <class F>
  void each(F&& f) const {
    for (int64_t e = 0; e < entries(); ++e) {
      const int64_t latent = indices[static_cast<size_t>(e)];
      if (latent >= 0) f(e, row_of[static_cast<size_t>(e)], latent);
    }
  }

 private:
  // With one row that has no entries, and one that has many.
  std::vector<int64_t> lengths(Random& random) const {
    const Array extra = random.integers(DType::f64, rows);
    std::vector<int64_t> result{0};
    for (int64_t n = 0; n < rows; ++n) {
      const int64_t length = !ragged ? k : n == 1 ? 0 : n == 2 ? 5 * k : k + static_cast<int64_t>(std::fabs(extra[n]));
      result.push_back(result.back() + length);
    }
    return result;
  }

  std::vector<int64_t> draw(Random& random) const {
    const Array spread = random.integers(DType::f64, 3 * entries());
    std::vector<int64_t> result;
    for (int64_t e = 0; e < entries(); ++e) {
      const int64_t number = static_cast<int64_t>(25 * (spread[3 * e] + 2) + 5 * (spread[3 * e + 1] + 2) + e);
      const bool hot = usage == Usage::hot && spread[3 * e + 2] >= 0;
      result.push_back(usage == Usage::empty || spread[3 * e + 2] > 1 ? -1 : hot ? features / 2 : number % features);
    }
    return result;
  }

  std::vector<int64_t> rows_of_entries() const {
    std::vector<int64_t> result;
    for (int64_t n = 0; n < rows; ++n) {
      const auto count = offsets[static_cast<size_t>(n + 1)] - offsets[static_cast<size_t>(n)];
      result.insert(result.end(), static_cast<size_t>(count), n);
    }
    return result;
  }
};

struct Order {
  std::vector<int64_t> entries, rows, starts;

  Order(const Problem& p, bool with_values)
      : entries(static_cast<size_t>(p.entries()), 77),
        rows(static_cast<size_t>(p.entries()), 77),
        starts(static_cast<size_t>(p.features + 1), 77) {
    sparse_kernels().latent_order({p.dtype, p.layout(), p.features, with_values ? p.values.data() : nullptr,
                                   entries.data(), rows.data(), starts.data(), nullptr});
  }
  LatentOrder view() const { return {entries.data(), rows.data(), starts.data()}; }
};

void test_order(const Problem& p, bool with_values) {
  std::vector<std::vector<int64_t>> groups(static_cast<size_t>(p.features));
  p.each([&](int64_t e, int64_t, int64_t latent) {
    if (!with_values || p.values[e] != 0) groups[static_cast<size_t>(latent)].push_back(e);
  });
  std::vector<int64_t> entries, rows, starts{0};
  for (const auto& group : groups) {
    entries.insert(entries.end(), group.begin(), group.end());
    starts.push_back(static_cast<int64_t>(entries.size()));
  }
  for (int64_t e : entries) rows.push_back(p.row_of[static_cast<size_t>(e)]);
  entries.resize(static_cast<size_t>(p.entries()), -1);
  rows.resize(static_cast<size_t>(p.entries()), -1);
  const auto compute = [&] {
    const Order order(p, with_values);
    return std::tuple(order.entries, order.rows, order.starts);
  };
  on_every_level(compute, [&](const auto& outputs) { CHECK(outputs == std::tuple(entries, rows, starts)); });
}

void check_all(const char* what, const Array& got, const std::vector<double>& want) {
  for (size_t i = 0; i < want.size(); ++i) check_close(what, got, static_cast<int64_t>(i), want[i], 0, 0);
}

std::vector<double> zeros(int64_t count) { return std::vector<double>(static_cast<size_t>(count)); }

// sums[to] += factor · row `from` of the matrix
void add_row(std::vector<double>& sums, int64_t to, double factor, const Array& matrix, int64_t from, int64_t cols) {
  for (int64_t c = 0; c < cols; ++c) sums[static_cast<size_t>(to * cols + c)] += factor * matrix[from * cols + c];
}

double dot(const Array& a, int64_t row_a, const Array& b, int64_t row_b, int64_t cols) {
  double sum = 0;
  for (int64_t c = 0; c < cols; ++c) sum += a[row_a * cols + c] * b[row_b * cols + c];
  return sum;
}

void test_decode(const Problem& p, bool has_bias, bool has_target) {
  const DType wide = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  const auto compute = [&] {
    Array out(p.dtype, p.rows * p.cols), error(wide, has_target ? p.rows : 0);
    sparse_kernels().decode({p.dtype, p.layout(), p.cols, p.features, p.values.data(), p.weight.data(),
                             has_bias ? p.bias.data() : nullptr, has_target ? p.target.data() : nullptr, out.data(),
                             has_target ? error.data() : nullptr});
    return std::tuple(out, error);
  };
  std::vector<double> out = zeros(p.rows * p.cols), error = zeros(has_target ? p.rows : 0);
  for (int64_t n = 0; n < p.rows && has_bias; ++n) add_row(out, n, 1, p.bias, 0, p.cols);
  p.each([&](int64_t e, int64_t n, int64_t latent) { add_row(out, n, p.values[e], p.weight, latent, p.cols); });
  for (int64_t i = 0; i < p.rows * p.cols && has_target; ++i) {
    const double difference = p.target[i] - out[static_cast<size_t>(i)];
    error[static_cast<size_t>(i / p.cols)] += difference * difference;
  }
  on_every_level(compute, [&](const auto& outputs) {
    check_all("out", std::get<0>(outputs), out);
    check_all("squared error", std::get<1>(outputs), error);
  });
}

void test_decode_backward(const Problem& p, bool with_values) {
  const auto compute = [&] {
    const Order order(p, with_values);
    Array values(p.dtype, p.entries()), weight(p.dtype, p.features * p.cols), bias(p.dtype, p.cols);
    SparseDecodeBackward args{p.dtype,       p.layout(),    order.view(),    p.cols,
                              p.features,    p.grad.data(), p.values.data(), p.weight.data(),
                              values.data(), weight.data(), bias.data(),     nullptr};
    sparse_kernels().decode_backward(args);
    // One at a time they are the same bits.
    Array values_alone(p.dtype, p.entries()), weight_alone(p.dtype, p.features * p.cols);
    args.grad_weight = args.grad_bias = nullptr;
    args.grad_values = values_alone.data();
    sparse_kernels().decode_backward(args);
    args.grad_values = nullptr;
    args.grad_weight = weight_alone.data();
    sparse_kernels().decode_backward(args);
    CHECK(values == values_alone && weight == weight_alone);
    return std::tuple(values, weight, bias);
  };
  std::vector<double> values = zeros(p.entries()), weight = zeros(p.features * p.cols), bias = zeros(p.cols);
  p.each([&](int64_t e, int64_t n, int64_t latent) {
    values[static_cast<size_t>(e)] = dot(p.grad, n, p.weight, latent, p.cols);
    add_row(weight, latent, p.values[e], p.grad, n, p.cols);  // zeros that are left out add nothing
  });
  for (int64_t n = 0; n < p.rows; ++n) add_row(bias, 0, 1, p.grad, n, p.cols);
  on_every_level(compute, [&](const auto& outputs) {
    check_all("grad values", std::get<0>(outputs), values);
    check_all("grad weight", std::get<1>(outputs), weight);
    check_all("grad bias", std::get<2>(outputs), bias);
  });
}

void test_encode_backward(const Problem& p, bool with_values) {
  const auto compute = [&] {
    const Order order(p, with_values);
    Array x(p.dtype, p.rows * p.cols), weight(p.dtype, p.features * p.cols), bias(p.dtype, p.features);
    sparse_kernels().encode_backward({p.dtype, p.layout(), order.view(), p.cols, p.features, p.values.data(),
                                      p.x.data(), p.weight.data(), x.data(), weight.data(), bias.data(), nullptr});
    Array bias_alone(p.dtype, p.features);
    sparse_kernels().encode_backward({p.dtype, p.layout(), order.view(), p.cols, p.features, p.values.data(),
                                      p.x.data(), p.weight.data(), nullptr, nullptr, bias_alone.data(), nullptr});
    CHECK(bias == bias_alone);
    return std::tuple(x, weight, bias);
  };
  std::vector<double> x = zeros(p.rows * p.cols), weight = zeros(p.features * p.cols), bias = zeros(p.features);
  p.each([&](int64_t e, int64_t n, int64_t latent) {
    add_row(x, n, p.values[e], p.weight, latent, p.cols);
    add_row(weight, latent, p.values[e], p.x, n, p.cols);
    bias[static_cast<size_t>(latent)] += p.values[e];
  });
  on_every_level(compute, [&](const auto& outputs) {
    check_all("grad x", std::get<0>(outputs), x);
    check_all("grad weight", std::get<1>(outputs), weight);
    check_all("grad bias", std::get<2>(outputs), bias);
  });
}

void test_reconstruction_gradient(const Problem& p, bool has_grad, bool wants_target) {
  Random random(3);
  const Array error = random.integers(p.dtype == DType::f64 ? DType::f64 : DType::f32, p.rows);
  const auto compute = [&] {
    Array grad(p.dtype, p.rows * p.cols), to_target(p.dtype, p.rows * p.cols);
    sparse_kernels().reconstruction_gradient({p.dtype, p.rows, p.cols, has_grad ? p.grad.data() : nullptr, error.data(),
                                              p.x.data(), p.target.data(), grad.data(),
                                              wants_target ? to_target.data() : nullptr});
    return std::tuple(grad, to_target);
  };
  std::vector<double> grad = zeros(p.rows * p.cols), to_target = zeros(wants_target ? p.rows * p.cols : 0);
  for (int64_t i = 0; i < p.rows * p.cols; ++i) {
    const double pull = 2 * error[i / p.cols] * (p.x[i] - p.target[i]);
    grad[static_cast<size_t>(i)] = (has_grad ? p.grad[i] : 0) + pull;
    if (wants_target) to_target[static_cast<size_t>(i)] = -pull;
  }
  on_every_level(compute, [&](const auto& outputs) {
    check_all("grad", std::get<0>(outputs), grad);
    if (wants_target) check_all("grad target", std::get<1>(outputs), to_target);
  });
}

void test(const Problem& p) {
  for (bool with_values : {false, true}) {
    test_order(p, with_values);
    test_decode_backward(p, with_values);
    test_encode_backward(p, with_values);
  }
  for (bool one : {false, true}) {
    for (bool other : {false, true}) {
      test_decode(p, one, other);
      test_reconstruction_gradient(p, one, other);
    }
  }
}

}  // namespace

int main() {
  for (DType dtype : all_dtypes) {
    for (Usage usage : {Usage::uniform, Usage::hot, Usage::empty}) {
      for (bool ragged : {false, true}) {
        test(Problem(dtype, usage, ragged, 1, 1, 1, 1));
        test(Problem(dtype, usage, ragged, 5, 3, 7, 7));
        test(Problem(dtype, usage, ragged, 23, 33, 301, 5));
      }
    }
    test(Problem(dtype, Usage::uniform, false, 0, 4, 6, 2));
    test(Problem(dtype, Usage::uniform, true, 0, 4, 6, 2));
    test(Problem(dtype, Usage::uniform, true, 9, 0, 6, 2));
  }
  // A latent that is always on crosses the borders of many chunks.
  test(Problem(DType::f64, Usage::hot, false, 700, 17, 40, 3));
  test(Problem(DType::f32, Usage::hot, true, 700, 257, 40, 3));
  return failed_checks > 0;
}
