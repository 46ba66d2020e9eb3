// The kernels of sparse/kernels.h against plain loops, on small integers: every sum is exact, ties abound.
#include <numeric>
#include <tuple>

#include "kernel_test.h"
#include "sparse/kernels.h"

using namespace isthmus;

namespace {

struct Problem {
  DType dtype;
  Activation activation;
  bool has_bias;
  int64_t rows, cols, features, k;
  Array x, weight, bias, out_bias, grad_code, grad_out;

  Problem(DType dtype_, Activation activation_, bool bias_, int64_t rows_, int64_t cols_, int64_t features_, int64_t k_,
          Random random = Random(5))
      : dtype(dtype_),
        activation(activation_),
        has_bias(bias_),
        rows(rows_),
        cols(cols_),
        features(features_),
        k(k_),
        x(random.integers(dtype, rows * cols, 1)),
        weight(random.integers(dtype, features * cols)),
        bias(random.integers(dtype, features)),
        out_bias(random.integers(dtype, cols)),
        grad_code(random.integers(dtype, rows * k)),
        grad_out(random.integers(dtype, rows * cols)) {}

  const void* maybe(const Array& array) const { return has_bias ? array.data() : nullptr; }

  std::vector<double> activations(int64_t row) const {
    std::vector<double> values(static_cast<size_t>(features));
    for (int64_t f = 0; f < features; ++f) {
      double sum = has_bias ? bias[f] : 0;
      for (int64_t c = 0; c < cols; ++c) sum += x[row * cols + c] * weight[f * cols + c];
      values[static_cast<size_t>(f)] = activation == Activation::relu ? std::max(sum, 0.0) : sum;
    }
    return values;
  }
};

// A code for decoding and for the gradients: distinct indices in a row, as encode gives them.
struct Code {
  Array values;
  std::vector<int64_t> indices;
};

Code encode_by_definition(const Problem& p) {
  std::vector<double> values;
  std::vector<int64_t> indices;
  for (int64_t row = 0; row < p.rows; ++row) {
    const std::vector<double> activations = p.activations(row);
    std::vector<int64_t> order(static_cast<size_t>(p.features));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return activations[static_cast<size_t>(a)] > activations[static_cast<size_t>(b)];
    });
    for (int64_t j = 0; j < p.k; ++j) {
      indices.push_back(order[static_cast<size_t>(j)]);
      values.push_back(activations[static_cast<size_t>(indices.back())]);
    }
  }
  return {Array(p.dtype, values), indices};
}

void test_encode(const Problem& p, const Code& want) {
  const auto compute = [&] {
    Array values(p.dtype, p.rows * p.k);
    std::vector<int64_t> indices(static_cast<size_t>(p.rows * p.k), -1);
    topk_kernels().encode({p.dtype, p.activation, p.rows, p.cols, p.features, p.k, p.x.data(), p.weight.data(),
                             p.maybe(p.bias), values.data(), indices.data(), nullptr});
    return std::tuple(values, indices);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [values, indices] = outputs;
    for (int64_t i = 0; i < values.size(); ++i) check_close("values", values, i, want.values[i], 0, 0);
    CHECK_THAT(indices == want.indices, "other features than by definition (level %s, dtype %d, k %ld of %ld)",
               isa_name(current_isa()), static_cast<int>(p.dtype), static_cast<long>(p.k),
               static_cast<long>(p.features));
  });
}

// Gradients of the rows of a matrix gathered by `indices`: Σ over (row, j) of coefficient · rows of `source`.
std::vector<double> scatter(const Problem& p, const std::vector<int64_t>& indices,
                            const std::vector<double>& coefficient, const Array& source) {
  std::vector<double> sums(static_cast<size_t>(p.features * p.cols));
  for (size_t i = 0; i < indices.size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / p.k;
    for (int64_t c = 0; c < p.cols; ++c) {
      sums[static_cast<size_t>(indices[i] * p.cols + c)] += coefficient[i] * source[row * p.cols + c];
    }
  }
  return sums;
}

void check_all(const char* what, const Array& got, const std::vector<double>& want) {
  for (size_t i = 0; i < want.size(); ++i) check_close(what, got, static_cast<int64_t>(i), want[i], 0, 0);
}

void test_encode_backward(const Problem& p, const Code& code) {
  const auto compute = [&] {
    Array x(p.dtype, p.rows * p.cols), weight(p.dtype, p.features * p.cols), bias(p.dtype, p.features);
    sparse_kernels().encode_backward({p.dtype, p.activation, p.rows, p.cols, p.features, p.k, p.grad_code.data(),
                                      p.x.data(), p.weight.data(), code.values.data(), code.indices.data(), x.data(),
                                      weight.data(), bias.data(), nullptr});
    return std::tuple(x, weight, bias);
  };
  std::vector<double> passed, to_x(static_cast<size_t>(p.rows * p.cols)), to_bias(static_cast<size_t>(p.features));
  for (size_t i = 0; i < code.indices.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i), row = at / p.k;
    const bool open = p.activation == Activation::identity || code.values[at] > 0;
    passed.push_back(open ? p.grad_code[at] : 0);
    to_bias[static_cast<size_t>(code.indices[i])] += passed[i];
    for (int64_t c = 0; c < p.cols; ++c) {
      to_x[static_cast<size_t>(row * p.cols + c)] += passed[i] * p.weight[code.indices[i] * p.cols + c];
    }
  }
  const std::vector<double> to_weight = scatter(p, code.indices, passed, p.x);
  on_every_level(compute, [&](const auto& outputs) {
    check_all("grad x", std::get<0>(outputs), to_x);
    check_all("grad weight", std::get<1>(outputs), to_weight);
    check_all("grad bias", std::get<2>(outputs), to_bias);
  });
}

void test_decode(const Problem& p, const Code& code) {
  const auto compute = [&] {
    Array out(p.dtype, p.rows * p.cols);
    sparse_kernels().decode({p.dtype, p.rows, p.cols, p.features, p.k, code.values.data(), code.indices.data(),
                             p.weight.data(), p.maybe(p.out_bias), out.data()});
    return std::tuple(out);
  };
  on_every_level(compute, [&](const auto& outputs) {
    for (int64_t i = 0; i < p.rows * p.cols; ++i) {
      const int64_t row = i / p.cols, c = i % p.cols;
      double sum = p.has_bias ? p.out_bias[c] : 0;
      for (int64_t j = row * p.k; j < (row + 1) * p.k; ++j) {
        sum += code.values[j] * p.weight[code.indices[static_cast<size_t>(j)] * p.cols + c];
      }
      check_close("out", std::get<0>(outputs), i, sum, 0, 0);
    }
  });
}

void test_decode_backward(const Problem& p, const Code& code) {
  const auto compute = [&] {
    Array values(p.dtype, p.rows * p.k), weight(p.dtype, p.features * p.cols), bias(p.dtype, p.cols);
    sparse_kernels().decode_backward({p.dtype, p.rows, p.cols, p.features, p.k, p.grad_out.data(), code.values.data(),
                                      code.indices.data(), p.weight.data(), values.data(), weight.data(), bias.data(),
                                      nullptr});
    return std::tuple(values, weight, bias);
  };
  std::vector<double> values, to_values(code.indices.size()), to_bias(static_cast<size_t>(p.cols));
  for (size_t i = 0; i < code.indices.size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / p.k;
    values.push_back(code.values[static_cast<int64_t>(i)]);
    for (int64_t c = 0; c < p.cols; ++c)
      to_values[i] += p.grad_out[row * p.cols + c] * p.weight[code.indices[i] * p.cols + c];
  }
  for (int64_t i = 0; i < p.rows * p.cols; ++i) to_bias[static_cast<size_t>(i % p.cols)] += p.grad_out[i];
  const std::vector<double> to_weight = scatter(p, code.indices, values, p.grad_out);
  on_every_level(compute, [&](const auto& outputs) {
    check_all("grad values", std::get<0>(outputs), to_values);
    check_all("grad weight", std::get<1>(outputs), to_weight);
    check_all("grad bias", std::get<2>(outputs), to_bias);
  });
}

void test(const Problem& p) {
  const Code code = encode_by_definition(p);
  test_encode(p, code);
  test_encode_backward(p, code);
  test_decode(p, code);
  test_decode_backward(p, code);
}

}  // namespace

int main() {
  for (DType dtype : all_dtypes) {
    for (Activation activation : {Activation::identity, Activation::relu}) {
      for (bool has_bias : {false, true}) {
        test(Problem(dtype, activation, has_bias, 1, 1, 1, 1));
        test(Problem(dtype, activation, has_bias, 5, 3, 7, 7));
        test(Problem(dtype, activation, has_bias, 23, 17, 301, 5));
        test(Problem(dtype, activation, has_bias, 9, 33, 2100, 40));
      }
    }
    test(Problem(dtype, Activation::relu, true, 0, 4, 6, 2));
  }
  return failed_checks > 0;
}
