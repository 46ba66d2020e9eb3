// The kernels of codebook/kernels.h against plain loops, on small integers: every distance is exact, ties abound.
#include <tuple>

#include "codebook/kernels.h"
#include "kernel_test.h"

using namespace isthmus;

namespace {

struct Problem {
  DType dtype;
  int64_t rows, codes, dim;
  Array x, codebook, grad_quantized, grad_error;
  std::vector<int64_t> indices;

  Problem(DType dtype_, int64_t rows_, int64_t codes_, int64_t dim_, Random random = Random(3))
      : dtype(dtype_),
        rows(rows_),
        codes(codes_),
        dim(dim_),
        x(random.integers(dtype, rows * dim)),
        codebook(random.integers(dtype, codes * dim)),
        grad_quantized(random.integers(dtype, rows * dim)),
        grad_error(random.integers(accumulate_dtype(dtype), rows)),
        indices(random.indices(rows, codes)) {}

  double squared_distance(int64_t row, int64_t code) const {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += std::pow(x[row * dim + d] - codebook[code * dim + d], 2);
    return sum;
  }

  // The first of the nearest codes; 0 for a row without a distance that is a number.
  int64_t nearest(int64_t row) const {
    int64_t best = 0;
    for (int64_t code = 1; code < codes; ++code) {
      if (squared_distance(row, code) < squared_distance(row, best)) best = code;
    }
    return best;
  }
};

void test_search(const Problem& p, bool with_codes) {
  const auto compute = [&] {
    std::vector<int64_t> indices(static_cast<size_t>(p.rows), -1);
    Array quantized(p.dtype, with_codes ? p.rows * p.dim : 0);
    Array error(accumulate_dtype(p.dtype), with_codes ? p.rows : 0);
    codebook_kernels().search({p.dtype, p.rows, p.codes, p.dim, p.x.data(), p.codebook.data(), indices.data(),
                               with_codes ? quantized.data() : nullptr, with_codes ? error.data() : nullptr, nullptr});
    return std::tuple(indices, quantized, error);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [indices, quantized, error] = outputs;
    for (int64_t row = 0; row < p.rows; ++row) {
      const int64_t want = p.nearest(row), got = indices[static_cast<size_t>(row)];
      CHECK_THAT(got == want, "row %ld got code %ld, expected %ld (level %s)", static_cast<long>(row),
                 static_cast<long>(got), static_cast<long>(want), isa_name(current_isa()));
      if (!with_codes) continue;
      check_close("squared error", error, row, p.squared_distance(row, want), 0, 0);
      for (int64_t d = 0; d < p.dim; ++d) {
        check_close("quantized", quantized, row * p.dim + d, p.codebook[want * p.dim + d], 0, 0);
      }
    }
  });
}

void test_backward(const Problem& p) {
  constexpr double commitment = 0.25;
  const auto compute = [&] {
    Array grad_x(p.dtype, p.rows * p.dim), grad_codebook(p.dtype, p.codes * p.dim);
    codebook_kernels().backward({p.dtype, p.rows, p.codes, p.dim, commitment, p.grad_quantized.data(),
                                 p.grad_error.data(), p.x.data(), p.codebook.data(), p.indices.data(), grad_x.data(),
                                 grad_codebook.data(), nullptr});
    return std::tuple(grad_x, grad_codebook);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [grad_x, grad_codebook] = outputs;
    std::vector<double> sums(static_cast<size_t>(p.codes * p.dim));
    for (int64_t i = 0; i < p.rows * p.dim; ++i) {
      const int64_t row = i / p.dim, place = p.indices[static_cast<size_t>(row)] * p.dim + i % p.dim;
      const double t = 2 * (p.x[i] - p.codebook[place]) * p.grad_error[row];
      check_close("grad x", grad_x, i, p.grad_quantized[i] + commitment * t, 0, 0);
      sums[static_cast<size_t>(place)] -= t;
    }
    for (size_t i = 0; i < sums.size(); ++i) check_close("grad codebook", grad_codebook, int64_t(i), sums[i], 0, 0);
  });
}

void test_statistics(const Problem& p) {
  const DType accumulate = accumulate_dtype(p.dtype);
  const auto compute = [&] {
    Array counts(accumulate, p.codes), sums(accumulate, p.codes * p.dim);
    codebook_kernels().statistics(
        {p.dtype, p.rows, p.codes, p.dim, p.x.data(), p.indices.data(), counts.data(), sums.data(), nullptr});
    return std::tuple(counts, sums);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [counts, sums] = outputs;
    std::vector<double> want_counts(static_cast<size_t>(p.codes)), want_sums(static_cast<size_t>(p.codes * p.dim));
    for (int64_t row = 0; row < p.rows; ++row) {
      const int64_t code = p.indices[static_cast<size_t>(row)];
      want_counts[static_cast<size_t>(code)] += 1;
      for (int64_t d = 0; d < p.dim; ++d) want_sums[static_cast<size_t>(code * p.dim + d)] += p.x[row * p.dim + d];
    }
    for (size_t i = 0; i < want_counts.size(); ++i) check_close("counts", counts, int64_t(i), want_counts[i], 0, 0);
    for (size_t i = 0; i < want_sums.size(); ++i) check_close("sums", sums, int64_t(i), want_sums[i], 0, 0);
  });
}

// Rows and codes that hold NaN or infinities never win and never reach beyond themselves.
void test_not_a_number() {
  const double nan = __builtin_nan("");
  for (DType dtype : {DType::f32, DType::f64}) {
    Problem p(dtype, 3, 40, 3);
    std::vector<double> x = {nan, 0, 0, 1, 1, 1, 0, 0, 0}, codebook(120, 5);
    for (int d = 0; d < 3; ++d) codebook[static_cast<size_t>(d)] = nan;         // code 0
    for (int d = 0; d < 3; ++d) codebook[static_cast<size_t>(33 * 3 + d)] = 1;  // the nearest of rows 1 and 2
    p.x = Array(dtype, x);
    p.codebook = Array(dtype, codebook);
    const auto compute = [&] {
      std::vector<int64_t> indices(3, -1);
      codebook_kernels().search(
          {dtype, 3, 40, 3, p.x.data(), p.codebook.data(), indices.data(), nullptr, nullptr, nullptr});
      return std::tuple(indices);
    };
    on_every_level(compute,
                   [&](const auto& outputs) { CHECK((std::get<0>(outputs) == std::vector<int64_t>{0, 33, 33})); });
  }
}

}  // namespace

int main() {
  for (DType dtype : all_dtypes) {
    for (auto [rows, codes, dim] : {std::tuple(1, 1, 1), std::tuple(5, 3, 2), std::tuple(37, 130, 7),
                                    std::tuple(70, 33, 65), std::tuple(0, 4, 4), std::tuple(6, 5, 0)}) {
      const Problem p(dtype, rows, codes, dim);
      test_search(p, false);
      test_search(p, true);
      test_backward(p);
      test_statistics(p);
    }
  }
  test_not_a_number();
  return failed_checks > 0;
}
