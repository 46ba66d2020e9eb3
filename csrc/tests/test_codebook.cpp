// The kernels of codebook/kernels.h but the search (test_code_search.cpp) against plain loops, on small integers, whose
// sums are exact. Some rows have no code.
#include <tuple>

#include "codebook/kernels.h"
#include "kernel_test.h"

using namespace isthmus;

namespace {

struct Problem {
  DType dtype;
  int64_t heads, rows, codes, dim;
  Array x, codebook, grad_quantized, grad_error;
  std::vector<int64_t> indices;

  Problem(DType dtype_, int64_t heads_, int64_t rows_, int64_t codes_, int64_t dim_, Random random = Random(3))
      : dtype(dtype_),
        heads(heads_),
        rows(rows_),
        codes(codes_),
        dim(dim_),
        x(random.integers(dtype, all_rows() * dim)),
        codebook(random.integers(dtype, heads * codes * dim)),
        grad_quantized(random.integers(dtype, all_rows() * dim)),
        grad_error(random.integers(accumulate_dtype(dtype), all_rows())),
        indices(random.indices(all_rows(), codes + 1)) {
    for (int64_t& index : indices) index -= 1;
  }

  int64_t all_rows() const { return heads * rows; }
  // Of all heads; -1 for a row that has none.
  int64_t code_of(int64_t row) const {
    const int64_t index = indices[static_cast<size_t>(row)];
    return index < 0 ? -1 : row / rows * codes + index;
  }
};

void test_gather(const Problem& p) {
  const auto compute = [&] {
    Array quantized(p.dtype, p.all_rows() * p.dim), error(accumulate_dtype(p.dtype), p.all_rows());
    std::vector<int64_t> indices = p.indices;
    CodeSearch args{};
    args.dtype = p.dtype;
    args.heads = p.heads, args.rows = p.rows, args.codes = p.codes, args.dim = p.dim, args.best = 1;
    args.x = p.x.data(), args.head_stride = p.rows * p.dim, args.row_stride = p.dim;
    args.codebook = p.codebook.data();
    args.indices = indices.data();
    args.quantized = quantized.data(), args.squared_error = error.data();
    codebook_kernels().gather(args);
    return std::tuple(quantized, error);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [quantized, error] = outputs;
    for (int64_t row = 0; row < p.all_rows(); ++row) {
      const int64_t code = p.code_of(row);
      double sum = 0;
      for (int64_t d = 0; d < p.dim; ++d) {
        const double c = code < 0 ? 0 : p.codebook[code * p.dim + d];
        check_close("quantized", quantized, row * p.dim + d, c, 0, 0);
        if (code >= 0) sum += std::pow(p.x[row * p.dim + d] - c, 2);
      }
      check_close("squared error", error, row, sum, 0, 0);
    }
  });
}

// λ Rᵀ g by the definition of R; only for x and c that are neither zero nor opposed.
std::vector<double> rotated(const Problem& p, int64_t row, int64_t code) {
  std::vector<double> x, c, u, g;
  double xx = 0, cc = 0, uu = 0, ug = 0, cg = 0;
  for (int64_t d = 0; d < p.dim; ++d) {
    x.push_back(p.x[row * p.dim + d]), c.push_back(p.codebook[code * p.dim + d]);
    g.push_back(p.grad_quantized[row * p.dim + d]);
    xx += x.back() * x.back(), cc += c.back() * c.back();
  }
  if (xx == 0) return g;
  for (size_t d = 0; d < x.size(); ++d) {
    x[d] /= std::sqrt(xx), c[d] /= cc > 0 ? std::sqrt(cc) : 1;
    u.push_back(x[d] + c[d]);
    uu += u[d] * u[d], ug += u[d] * g[d], cg += c[d] * g[d];
  }
  for (size_t d = 0; d < x.size(); ++d) {
    g[d] = std::sqrt(cc / xx) * (g[d] - (uu > 1e-25 ? 2 * u[d] * ug / uu : 0) + 2 * x[d] * cg);
  }
  return g;
}

void test_backward(const Problem& p, CodeGradient gradient, bool need_x, bool need_codebook) {
  constexpr double commitment = 0.25;
  const auto compute = [&] {
    Array grad_x(p.dtype, need_x ? p.all_rows() * p.dim : 0);
    Array grad_codebook(p.dtype, need_codebook ? p.heads * p.codes * p.dim : 0);
    codebook_kernels().backward({p.dtype, gradient, p.heads, p.rows, p.codes, p.dim, commitment,
                                 p.grad_quantized.data(), p.grad_error.data(), p.x.data(), p.codebook.data(),
                                 p.indices.data(), need_x ? grad_x.data() : nullptr,
                                 need_codebook ? grad_codebook.data() : nullptr, nullptr});
    return std::tuple(grad_x, grad_codebook);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [grad_x, grad_codebook] = outputs;
    const bool rotates = gradient == CodeGradient::rotation, to_code = gradient == CodeGradient::codebook;
    std::vector<double> sums(static_cast<size_t>(p.heads * p.codes * p.dim));
    for (int64_t row = 0; row < p.all_rows(); ++row) {
      const int64_t code = p.code_of(row);
      const std::vector<double> passed = rotates && code >= 0 ? rotated(p, row, code) : std::vector<double>();
      for (int64_t d = 0; d < p.dim; ++d) {
        const int64_t i = row * p.dim + d, place = code * p.dim + d;
        const double t = code < 0 ? 0 : 2 * (p.x[i] - p.codebook[place]) * p.grad_error[row];
        const double through = code < 0 || to_code ? 0 : rotates ? passed[static_cast<size_t>(d)] : p.grad_quantized[i];
        const double size = std::sqrt(static_cast<double>(p.dim)) * 16;
        if (need_x) check_close("grad x", grad_x, i, through + commitment * t, rotates ? 16 : 0, size);
        if (code >= 0) sums[static_cast<size_t>(place)] += (to_code ? p.grad_quantized[i] : 0) - t;
      }
    }
    for (int64_t i = 0; i < grad_codebook.size(); ++i) {
      check_close("grad codebook", grad_codebook, i, sums[static_cast<size_t>(i)], 0, 0);
    }
  });
}

void test_statistics(const Problem& p) {
  const DType accumulate = accumulate_dtype(p.dtype);
  const auto compute = [&] {
    Array counts(accumulate, p.codes), sums(accumulate, p.codes * p.dim);
    codebook_kernels().statistics(
        {p.dtype, p.all_rows(), p.codes, p.dim, p.x.data(), p.indices.data(), counts.data(), sums.data(), nullptr});
    return std::tuple(counts, sums);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [counts, sums] = outputs;
    std::vector<double> want_counts(static_cast<size_t>(p.codes)), want_sums(static_cast<size_t>(p.codes * p.dim));
    for (int64_t row = 0; row < p.all_rows(); ++row) {
      const int64_t code = p.indices[static_cast<size_t>(row)];
      if (code < 0) continue;
      want_counts[static_cast<size_t>(code)] += 1;
      for (int64_t d = 0; d < p.dim; ++d) want_sums[static_cast<size_t>(code * p.dim + d)] += p.x[row * p.dim + d];
    }
    for (size_t i = 0; i < want_counts.size(); ++i) check_close("counts", counts, int64_t(i), want_counts[i], 0, 0);
    for (size_t i = 0; i < want_sums.size(); ++i) check_close("sums", sums, int64_t(i), want_sums[i], 0, 0);
  });
}

// Counts of 1 and 3 with mean 2, decay 1/2: powers of two, so that every number is exact.
void test_update(DType dtype) {
  const DType accumulate = accumulate_dtype(dtype);
  const double nan = __builtin_nan("");
  const Array counts(accumulate, {1, 3, 2, 2}), batch_sums(accumulate, {2, 4, 12, 24, 2, 2, 4, 4});
  const Array candidates(dtype, {9, 9, 9, 9, 5, 6, nan, 8});
  const auto compute = [&] {
    Array usage(accumulate, {1.5, 0.5, 0.25, 0.0}), sums(accumulate, {1, 2, 4, 8, 0, 0, 0, 0});
    Array codebook(dtype, {7, 7, 7, 7, 7, 7, 7, 7});
    codebook_kernels().update({dtype, 1, 4, 2, 0.5, 0, 0.75, false, counts.data(), batch_sums.data(), nullptr,
                               candidates.data(), usage.data(), sums.data(), codebook.data(), nullptr});
    return std::tuple(usage, sums, codebook);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [usage, sums, codebook] = outputs;
    const double want_usage[] = {1, 1, 1, 0.5}, want_sums[] = {1, 2, 5, 10, 5, 6, 1, 1};
    const double want_codes[] = {1, 2, 5, 10, 5, 6, 2, 2};
    for (int64_t i = 0; i < 4; ++i) check_close("usage", usage, i, want_usage[i], 0, 0);
    for (int64_t i = 0; i < 8; ++i) check_close("sums", sums, i, want_sums[i], 0, 0);
    for (int64_t i = 0; i < 8; ++i) check_close("codebook", codebook, i, want_codes[i], 0, 0);
  });
}

}  // namespace

int main() {
  for (DType dtype : all_dtypes) {
    for (auto [heads, rows, codes, dim] : {std::tuple(1, 1, 1, 1), std::tuple(1, 5, 3, 2), std::tuple(2, 37, 13, 7),
                                           std::tuple(3, 70, 33, 65), std::tuple(1, 0, 4, 4), std::tuple(1, 6, 5, 0)}) {
      const Problem p(dtype, heads, rows, codes, dim);
      test_gather(p);
      for (CodeGradient gradient : {CodeGradient::straight_through, CodeGradient::rotation, CodeGradient::codebook}) {
        test_backward(p, gradient, true, true);
        test_backward(p, gradient, true, false);
        test_backward(p, gradient, false, true);
      }
      test_statistics(p);
    }
    test_update(dtype);
  }
  return failed_checks > 0;
}
