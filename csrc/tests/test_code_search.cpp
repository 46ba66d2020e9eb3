// The nearest-code search of codebook/kernels.h against long double: every metric, level and cut, and inputs made to
// mislead the screen.
#include <functional>
#include <string>
#include <tuple>

#include "codebook/kernels.h"
#include "kernel_test.h"

using namespace isthmus;

#if defined(__x86_64__)
namespace isthmus {
ISTHMUS_DECLARE_TABLE(CodebookKernels, codebook, emulated_amx)
}
#endif

namespace {

constexpr Metric metrics[] = {Metric::euclidean, Metric::cosine, Metric::inner_product};

struct Problem {
  std::string name;
  DType dtype;
  Metric metric;
  int64_t heads, rows, codes, dim, best;
  Array x, codebook;
  std::vector<bool> mask = {};  // empty: every row counts
  int64_t padding = 0;          // between the rows of x

  double row(int64_t r, int64_t k) const { return x[r * (dim + padding) + k]; }
  double code(int64_t head, int64_t c, int64_t k) const { return codebook[(head * codes + c) * dim + k]; }

  // Score and the size that float64 rounding is relative to.
  std::pair<long double, long double> score(int64_t r, int64_t c) const {
    long double product = 0, xx = 0, cc = 0, distance = 0;
    for (int64_t k = 0; k < dim; ++k) {
      const long double a = row(r, k), b = code(r / rows, c, k);
      product += a * b;
      xx += a * a;
      cc += b * b;
      distance += (a - b) * (a - b);
    }
    if (metric == Metric::euclidean) return {-distance, distance};
    if (metric == Metric::inner_product) return {product, std::sqrt(xx * cc)};
    return {cc == 0 ? product : product / std::sqrt(cc), std::sqrt(xx)};
  }
};

// The same order as the search: greater scores, then lower indices, what is not a number last.
std::vector<int64_t> best_codes(const Problem& p, int64_t r) {
  std::vector<long double> scores;
  std::vector<int64_t> order;
  for (int64_t c = 0; c < p.codes; ++c) {
    scores.push_back(p.score(r, c).first);
    order.push_back(c);
  }
  const auto precedes = [&](int64_t a, int64_t b) {
    const long double s = scores[static_cast<size_t>(a)], t = scores[static_cast<size_t>(b)];
    if (std::isnan(s) || std::isnan(t)) return std::isnan(s) == std::isnan(t) ? a < b : std::isnan(t);
    return s == t ? a < b : s > t;
  };
  std::partial_sort(order.begin(), order.begin() + p.best, order.end(), precedes);
  order.resize(static_cast<size_t>(p.best));
  return order;
}

void check_row(const Problem& p, int64_t r, const int64_t* got, bool exact) {
  const bool masked = !p.mask.empty() && !p.mask[static_cast<size_t>(r)];
  const std::vector<int64_t> want = best_codes(p, r);
  for (int64_t i = 0; i < p.best; ++i) {
    const int64_t index = got[i], wanted = masked ? -1 : want[static_cast<size_t>(i)];
    if (index == wanted) continue;
    const bool in_range = !masked && index >= 0 && index < p.codes;
    long double gap = 1, allowed = 0;
    if (in_range && !exact) {
      const auto [mine, size] = p.score(r, index);
      gap = p.score(r, wanted).first - mine;
      allowed = 4 * static_cast<long double>(p.dim + 4) * 0x1p-53L * size;
    }
    CHECK_THAT(gap <= allowed, "%s: row %ld rank %ld got code %ld, expected %ld (level %s, dtype %d, metric %d)",
               p.name.c_str(), static_cast<long>(r), static_cast<long>(i), static_cast<long>(index),
               static_cast<long>(wanted), isa_name(current_isa()), static_cast<int>(p.dtype),
               static_cast<int>(p.metric));
  }
}

// The best codes of the first rows of each head.
std::vector<int64_t> search(const CodebookKernels& kernels, const Problem& p, int64_t rows) {
  std::vector<int64_t> indices(static_cast<size_t>(p.heads * rows * p.best), -7);
  std::vector<char> mask;
  for (size_t i = 0; i < p.mask.size(); ++i) {
    if (static_cast<int64_t>(i) % p.rows < rows) mask.push_back(p.mask[i]);
  }
  const int64_t stride = p.dim + p.padding;
  kernels.search({p.dtype, p.metric, p.heads, rows, p.codes, p.dim, p.best, p.x.data(), p.rows * stride, stride,
                  p.codebook.data(), mask.empty() ? nullptr : reinterpret_cast<const bool*>(mask.data()),
                  indices.data(), nullptr, nullptr, nullptr});
  return indices;
}

std::vector<int64_t> search(const CodebookKernels& kernels, const Problem& p) { return search(kernels, p, p.rows); }

// Few rows go another way; they must find the same.
bool few_rows_agree(const Problem& p, const std::vector<int64_t>& indices) {
  for (int64_t few : {1, 2, 7}) {
    if (few > p.rows) break;
    const std::vector<int64_t> found = search(codebook_kernels(), p, few);
    for (int64_t h = 0; h < p.heads; ++h) {
      if (!std::equal(&found[size_t(h * few * p.best)], &found[size_t((h + 1) * few * p.best - 1)] + 1,
                      &indices[size_t(h * p.rows * p.best)])) {
        return false;
      }
    }
  }
  return true;
}

// The kernels of level amx on emulated tiles, where the rest of them can run.
bool agrees_on_emulated_tiles(const Problem& p, const std::vector<int64_t>& indices) {
#if defined(__x86_64__)
  if (available_isas().back() >= Isa::avx512) return search(emulated_amx::codebook_table, p) == indices;
#endif
  return true;
}

void test(const Problem& p, bool exact) {
  std::vector<int64_t> first;
  on_every_level([&] { return std::tuple(search(codebook_kernels(), p)); },
                 [&](const auto& outputs) {
                   const std::vector<int64_t>& indices = std::get<0>(outputs);
                   if (first.empty()) {
                     first = indices;
                     for (int64_t r = 0; r < p.heads * p.rows; ++r)
                       check_row(p, r, &indices[size_t(r * p.best)], exact);
                   }
                   CHECK_THAT(indices == first, "%s: level %s finds other codes (dtype %d, metric %d)", p.name.c_str(),
                              isa_name(current_isa()), static_cast<int>(p.dtype), static_cast<int>(p.metric));
                   CHECK_THAT(few_rows_agree(p, indices),
                              "%s: few rows find other codes (level %s, dtype %d, metric %d)", p.name.c_str(),
                              isa_name(current_isa()), static_cast<int>(p.dtype), static_cast<int>(p.metric));
                 });
  CHECK_THAT(agrees_on_emulated_tiles(p, first), "%s: emulated tiles find other codes (dtype %d, metric %d)",
             p.name.c_str(), static_cast<int>(p.dtype), static_cast<int>(p.metric));
}

// Small integers: every score is exact, ties abound.
void test_integers() {
  Random random(3);
  for (DType dtype : all_dtypes) {
    for (Metric metric : {Metric::euclidean, Metric::inner_product}) {
      for (auto [rows, codes, dim, best] :
           {std::tuple(1, 1, 1, 1), std::tuple(5, 3, 2, 3), std::tuple(37, 130, 7, 1), std::tuple(100, 300, 65, 4),
            std::tuple(6, 5, 0, 2), std::tuple(250, 17, 8, 17), std::tuple(3, 5000, 5, 2)}) {
        test({"integers", dtype, metric, 1, rows, codes, dim, best, random.integers(dtype, rows * dim),
              random.integers(dtype, codes * dim)},
             true);
      }
    }
  }
}

void test_heads_masks_strides() {
  Random random(4);
  for (DType dtype : all_dtypes) {
    Problem p{"heads",
              dtype,
              Metric::euclidean,
              3,
              50,
              40,
              6,
              2,
              random.integers(dtype, 3 * 50 * 9),
              random.integers(dtype, 3 * 40 * 6)};
    p.padding = 3;
    test(p, true);
    p.mask.resize(150);
    for (size_t i = 0; i < 150; ++i) p.mask[i] = i % 3 == 0 && (i < 40 || i > 130);
    test(p, true);
  }
}

// A problem in doubles, rounded to the type.
using Numbers = std::vector<double>;
struct Shape {
  int64_t rows, codes, dim;
};
using Maker = std::function<void(Random&, Shape, Numbers& x, Numbers& codebook)>;

Numbers normals(Random& random, int64_t count) {
  const Array values = random.normal(DType::f64, count);
  Numbers numbers;
  for (int64_t i = 0; i < count; ++i) numbers.push_back(values[i]);
  return numbers;
}

double neighbour(double x, DType dtype) {
  if (dtype == DType::f64) return std::nextafter(x, 9e9);
  if (dtype == DType::f32) return std::nextafter(static_cast<float>(x), 9e9f);
  return x * (1 + 2 * rounding_unit(dtype));
}

void test_hard(const char* name, const Maker& make) {
  Random random(5);
  for (DType dtype : all_dtypes) {
    for (Metric metric : metrics) {
      for (Shape shape :
           {Shape{30, 300, 3}, Shape{50, 150, 64}, Shape{20, 129, 33}, Shape{8, 2100, 40}, Shape{12, 1050, 130}}) {
        Numbers x = normals(random, shape.rows * shape.dim), codebook = normals(random, shape.codes * shape.dim);
        make(random, shape, x, codebook);
        for (int64_t best : {1, 5}) {
          test({name, dtype, metric, 1, shape.rows, shape.codes, shape.dim, best, Array(dtype, x),
                Array(dtype, codebook)},
               false);
        }
      }
    }
  }
}

void scale(Numbers& numbers, double factor) {
  for (double& number : numbers) number *= factor;
}

void test_hard_inputs() {
  test_hard("random", [](Random&, Shape, Numbers&, Numbers&) {});
  test_hard("duplicated codes", [](Random&, Shape shape, Numbers&, Numbers& codebook) {
    for (size_t i = static_cast<size_t>(20 * shape.dim); i < codebook.size(); ++i) {
      codebook[i] = codebook[i - static_cast<size_t>(20 * shape.dim)];
    }
  });
  test_hard("rows that are codes", [](Random&, Shape, Numbers& x, Numbers& codebook) {
    for (size_t i = 0; i < x.size(); ++i) x[i] = codebook[i % codebook.size()];
  });
  test_hard("clustered", [](Random&, Shape shape, Numbers& x, Numbers& codebook) {
    scale(codebook, 1e-3);
    for (size_t i = 0; i < codebook.size(); ++i) codebook[i] += static_cast<double>(i % size_t(shape.dim)) + 1;
    for (size_t i = 0; i < x.size(); ++i) x[i] = codebook[i] + 1e-3 * x[i];
  });
  test_hard("neighbouring floats", [](Random&, Shape shape, Numbers& x, Numbers& codebook) {
    const size_t dim = static_cast<size_t>(shape.dim);
    for (size_t i = dim; i < codebook.size(); ++i) {
      const double left = codebook[i - dim];
      codebook[i] = i % 7 == 0 ? neighbour(left, DType::f32) : left;
    }
    for (size_t i = 0; i < x.size(); ++i) x[i] = codebook[i % dim + dim * (i / dim % 5)] + 1e-4 * x[i];
  });
  test_hard("huge rows", [](Random&, Shape, Numbers& x, Numbers&) { scale(x, 1e4); });
  test_hard("tiny codes", [](Random&, Shape, Numbers&, Numbers& codebook) { scale(codebook, 1e-4); });
  test_hard("a row of zeros, codes of zeros", [](Random&, Shape shape, Numbers& x, Numbers& codebook) {
    for (int64_t k = 0; k < shape.dim; ++k) {
      x[static_cast<size_t>(k)] = 0;
      for (int64_t c : {9, 40, 41}) codebook[static_cast<size_t>(c * shape.dim + k)] = 0;
    }
  });
}

// Norms that only float32 and float64 can hold.
void test_extreme_norms() {
  Random random(6);
  const double large[] = {1e-44, 1e-38, 1e-30, 1e-12, 1e12, 1e17, 1e25, 1e37};
  for (DType dtype : {DType::f32, DType::f64}) {
    for (Metric metric : metrics) {
      for (double factor : large) {
        for (int which : {0, 1, 2, 3}) {  // all rows, all codes, both, one code
          const Shape shape{10, 140, 20};
          Numbers x = normals(random, shape.rows * shape.dim), codebook = normals(random, shape.codes * shape.dim);
          if (which == 0 || which == 2) scale(x, factor);
          if (which == 1 || which == 2) scale(codebook, factor);
          for (size_t k = 0; which == 3 && k < 20; ++k) codebook[37 * 20 + k] *= factor;
          test({"norms", dtype, metric, 1, shape.rows, shape.codes, shape.dim, 3, Array(dtype, x),
                Array(dtype, codebook)},
               false);
        }
      }
    }
  }
}

// What is not a number never wins and never reaches beyond its row or its code.
void test_not_a_number() {
  const double nan = __builtin_nan(""), inf = __builtin_inf();
  Random random(7);
  for (DType dtype : all_dtypes) {
    for (Metric metric : metrics) {
      for (auto [codes, dim] : {std::pair{40, 3}, {700, 33}}) {
        for (int64_t best : {1, 4, 40}) {
          Numbers x = normals(random, 30 * dim), codebook = normals(random, codes * dim);
          x[0] = x[size_t(dim)] = x[size_t(dim + 1)] = x[size_t(dim + 2)] = nan;
          x[size_t(3 * dim + 1)] = inf;
          x[size_t(4 * dim + 1)] = -inf;
          for (int64_t k = 0; k < dim; ++k) codebook[size_t(k)] = nan;
          codebook[size_t(33 * dim + 1)] = nan;
          codebook[size_t(20 * dim + 1)] = inf;
          codebook[size_t(30 * dim + 2)] = -inf;
          test({"not a number", dtype, metric, 1, 30, codes, dim, best, Array(dtype, x), Array(dtype, codebook)},
               false);
        }
      }
    }
  }
}

}  // namespace

int main() {
  test_integers();
  test_heads_masks_strides();
  test_hard_inputs();
  test_extreme_norms();
  test_not_a_number();
  return failed_checks > 0;
}
