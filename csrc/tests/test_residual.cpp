// The kernels of residual/kernels.h against plain loops, on small integers: every distance is exact, ties abound.
#include <tuple>

#include "kernel_test.h"
#include "residual/kernels.h"

using namespace isthmus;

namespace {

using Vector = std::vector<double>;

struct Sequence {
  std::vector<int64_t> path;
  Vector residual;
  double error;
};

struct Problem {
  DType dtype;
  int64_t groups, rows, dim, stages, total;
  std::vector<int64_t> sizes, active;
  Array x, tables;

  Problem(DType dtype_, int64_t groups_, int64_t rows_, int64_t dim_, std::vector<int64_t> sizes_,
          Random random = Random(5))
      : dtype(dtype_),
        groups(groups_),
        rows(rows_),
        dim(dim_),
        stages(static_cast<int64_t>(sizes_.size())),
        total(0),
        sizes(sizes_),
        active(random.indices(groups * rows, stages + 1)),
        x(random.integers(dtype, groups * rows * dim, 9)),
        tables(dtype, 0) {
    for (int64_t size : sizes) total += size;
    tables = random.integers(dtype, groups * total * dim, 3);
  }

  ResidualCodes codes() const {
    return {dtype, groups, rows, dim, stages, total, sizes.data(), x.data(), tables.data()};
  }

  Vector row_of(const Array& matrix, int64_t row) const {
    Vector values;
    for (int64_t d = 0; d < dim; ++d) values.push_back(matrix[row * dim + d]);
    return values;
  }

  // The place of a code in the tables.
  int64_t place(int64_t row, int64_t stage, int64_t index) const {
    int64_t start = row / rows * total;
    for (int64_t q = 0; q < stage; ++q) start += sizes[static_cast<size_t>(q)];
    return start + index;
  }

  Vector subtract(Vector residual, int64_t row, int64_t stage, int64_t index) const {
    const Vector code = row_of(tables, place(row, stage, index));
    for (size_t d = 0; d < code.size(); ++d) residual[d] -= code[d];
    return residual;
  }

  // All continuations of all kept sequences, sorted: the first of a row's best.
  std::vector<int64_t> best_path(int64_t row, int64_t beam) const {
    std::vector<Sequence> kept = {{{}, row_of(x, row), 0}};
    const int64_t depth = active[static_cast<size_t>(row)];
    for (int64_t q = 0; q < depth; ++q) {
      std::vector<Sequence> longer;
      for (const Sequence& sequence : kept) {
        for (int64_t index = 0; index < sizes[static_cast<size_t>(q)]; ++index) {
          Sequence next{sequence.path, subtract(sequence.residual, row, q, index), 0};
          next.path.push_back(index);
          for (double r : next.residual) next.error += r * r;
          longer.push_back(next);
        }
      }
      std::stable_sort(longer.begin(), longer.end(),
                       [](const Sequence& a, const Sequence& b) { return a.error < b.error; });
      longer.resize(std::min(longer.size(), static_cast<size_t>(beam)));
      kept = longer;
    }
    std::vector<int64_t> path = kept[0].path;
    path.resize(static_cast<size_t>(stages), -1);
    return path;
  }

  std::vector<int64_t> best_paths(int64_t beam) const {
    std::vector<int64_t> all;
    for (int64_t row = 0; row < groups * rows; ++row) {
      for (int64_t index : best_path(row, beam)) all.push_back(index);
    }
    return all;
  }
};

void test_search(const Problem& p, int64_t beam) {
  const int64_t rows = p.groups * p.rows;
  const auto compute = [&] {
    std::vector<int64_t> indices(static_cast<size_t>(rows * p.stages), -7);
    Array quantized(p.dtype, rows * p.dim), error(accumulate_dtype(p.dtype), rows * p.stages);
    residual_kernels().search(
        {p.codes(), beam, p.active.data(), indices.data(), quantized.data(), error.data(), nullptr});
    return std::tuple(indices, quantized, error);
  };
  const std::vector<int64_t> want = p.best_paths(beam);
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [indices, quantized, error] = outputs;
    CHECK_THAT(indices == want, "beam %ld finds other codes (level %s, dtype %d)", static_cast<long>(beam),
               isa_name(current_isa()), static_cast<int>(p.dtype));
    for (int64_t row = 0; row < rows; ++row) {
      const Vector x = p.row_of(p.x, row);
      Vector residual = x;
      for (int64_t q = 0; q < p.stages; ++q) {
        const int64_t index = want[static_cast<size_t>(row * p.stages + q)];
        double left = 0;
        if (index >= 0) {
          residual = p.subtract(residual, row, q, index);
          for (double r : residual) left += r * r;
        }
        check_close("squared error", error, row * p.stages + q, left, 0, 0);
      }
      for (int64_t d = 0; d < p.dim; ++d) {
        const size_t k = static_cast<size_t>(d);
        check_close("quantized", quantized, row * p.dim + d, x[k] - residual[k], 0, 0);
      }
    }
  });
}

void test_backward_and_totals(const Problem& p) {
  constexpr double commitment = 0.25;
  Random random(8);
  const int64_t rows = p.groups * p.rows, codes = p.groups * p.total;
  const DType accumulate = accumulate_dtype(p.dtype);
  const Array grad_quantized = random.integers(p.dtype, rows * p.dim);
  const Array grad_error = random.integers(accumulate, rows * p.stages);
  const std::vector<int64_t> indices = p.best_paths(1);
  const auto compute = [&] {
    Array grad_x(p.dtype, rows * p.dim), grad_tables(p.dtype, codes * p.dim), totals(accumulate, codes * (1 + p.dim));
    residual_kernels().backward({p.codes(), CodeGradient::straight_through, commitment, grad_quantized.data(),
                                 grad_error.data(), indices.data(), grad_x.data(), grad_tables.data(), nullptr});
    residual_kernels().totals({p.codes(), indices.data(), totals.data(), nullptr});
    return std::tuple(grad_x, grad_tables, totals);
  };
  Vector want_x(static_cast<size_t>(rows * p.dim)), want_tables(static_cast<size_t>(codes * p.dim));
  Vector counts(static_cast<size_t>(codes)), sums = want_tables;
  for (int64_t row = 0; row < rows; ++row) {
    Vector residual = p.row_of(p.x, row);
    for (int64_t q = 0; q < p.stages; ++q) {
      const int64_t index = indices[static_cast<size_t>(row * p.stages + q)];
      if (index < 0) continue;
      const int64_t place = p.place(row, q, index);
      const Vector left = p.subtract(residual, row, q, index);
      counts[static_cast<size_t>(place)] += 1;
      for (int64_t d = 0; d < p.dim; ++d) {
        const size_t k = static_cast<size_t>(d), of_row = static_cast<size_t>(row * p.dim + d);
        const double t = 2 * grad_error[row * p.stages + q] * left[k];
        want_x[of_row] += commitment * t + (q == 0 ? grad_quantized[row * p.dim + d] : 0);
        want_tables[static_cast<size_t>(place * p.dim + d)] -= t;
        sums[static_cast<size_t>(place * p.dim + d)] += residual[k];
      }
      residual = left;
    }
  }
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [grad_x, grad_tables, totals] = outputs;
    for (size_t i = 0; i < want_x.size(); ++i) check_close("grad x", grad_x, int64_t(i), want_x[i], 0, 0);
    for (size_t i = 0; i < sums.size(); ++i) {
      check_close("grad codebooks", grad_tables, int64_t(i), want_tables[i], 0, 0);
      check_close("sums", totals, codes + int64_t(i), sums[i], 0, 0);
    }
    for (size_t i = 0; i < counts.size(); ++i) check_close("counts", totals, int64_t(i), counts[i], 0, 0);
  });
}

}  // namespace

int main() {
  for (DType dtype : all_dtypes) {
    for (const auto& [groups, rows, dim, sizes] :
         {std::tuple(1, 1, 1, std::vector<int64_t>{1}), std::tuple(1, 37, 3, std::vector<int64_t>{7, 2, 40}),
          std::tuple(3, 50, 19, std::vector<int64_t>{33, 5}), std::tuple(2, 0, 4, std::vector<int64_t>{4, 4})}) {
      const Problem p(dtype, groups, rows, dim, sizes);
      for (int64_t beam : {1, 2, 5, 50}) test_search(p, beam);
      test_backward_and_totals(p);
    }
  }
  return failed_checks > 0;
}
