// Best codes of rows and best rows of codes from one screen (codebook/match.inl) against two searches, which
// test_code_search holds against long double: the same indices at every level, for every cut, however scores mislead.
#include <functional>
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

using Indices = std::vector<int64_t>;
using Numbers = std::vector<double>;

struct Problem {
  const char* name;
  DType dtype;
  Metric metric;
  int64_t heads, rows, codes, dim;
  Array x, codebook;

  CodeMatch arguments(Indices& nearest_code, Indices& nearest_row) const {
    nearest_code.assign(static_cast<size_t>(heads * rows), -7);
    nearest_row.assign(static_cast<size_t>(heads * codes), -7);
    return {dtype,  metric, heads, rows, codes, dim, x.data(), codebook.data(), nearest_code.data(), nearest_row.data(),
            nullptr};
  }
};

using Outputs = std::tuple<Indices, Indices>;

Outputs match(const CodebookKernels& kernels, const Problem& p) {
  Outputs found;
  kernels.match(p.arguments(std::get<0>(found), std::get<1>(found)));
  return found;
}

Outputs two_searches(const Problem& p) {
  Outputs found;
  const CodeMatch args = p.arguments(std::get<0>(found), std::get<1>(found));
  codebook_kernels().search(search_of(args));
  codebook_kernels().search(search_of(exchanged(args)));
  return found;
}

void test(const Problem& p) {
  Outputs expected;
  const auto check = [&](const Outputs& found, const char* level) {
    CHECK_THAT(std::get<0>(found) == std::get<0>(expected), "%s: other codes (level %s, dtype %d, metric %d)", p.name,
               level, static_cast<int>(p.dtype), static_cast<int>(p.metric));
    CHECK_THAT(std::get<1>(found) == std::get<1>(expected), "%s: other rows (level %s, dtype %d, metric %d)", p.name,
               level, static_cast<int>(p.dtype), static_cast<int>(p.metric));
  };
  on_every_level([&] { return match(codebook_kernels(), p); },
                 [&](const Outputs& found) {
                   if (current_isa() == available_isas().front()) expected = two_searches(p);
                   check(found, isa_name(current_isa()));
                 });
#if defined(__x86_64__)
  if (available_isas().back() >= Isa::avx512) check(match(emulated_amx::codebook_table, p), "amx, emulated");
#endif
}

struct Shape {
  int64_t rows, codes, dim;
};
using Maker = std::function<void(Shape, Numbers& x, Numbers& codebook)>;

Numbers normals(Random& random, int64_t count) {
  const Array values = random.normal(DType::f64, count);
  Numbers numbers;
  for (int64_t i = 0; i < count; ++i) numbers.push_back(values[i]);
  return numbers;
}

// Of every size: few codes, few rows, several blocks, both coarse screens.
void test_kind(const char* name, const Maker& make, std::initializer_list<DType> dtypes = {DType::f32, DType::f64}) {
  Random random(5);
  for (DType dtype : dtypes) {
    for (Metric metric : {Metric::euclidean, Metric::cosine, Metric::inner_product}) {
      for (Shape shape : {Shape{40, 3, 4}, Shape{33, 130, 7}, Shape{301, 77, 20}, Shape{2111, 150, 16},
                          Shape{2200, 2060, 33}, Shape{200, 1050, 130}}) {
        if (dtype == DType::f64 && shape.codes > 2000) continue;  // which is screened in one way only
        Numbers x = normals(random, shape.rows * shape.dim), codebook = normals(random, shape.codes * shape.dim);
        make(shape, x, codebook);
        test({name, dtype, metric, 1, shape.rows, shape.codes, shape.dim, Array(dtype, x), Array(dtype, codebook)});
      }
    }
  }
}

void scale(Numbers& numbers, double factor) {
  for (double& number : numbers) number *= factor;
}

void test_kinds() {
  test_kind("random", [](Shape, Numbers&, Numbers&) {}, {DType::f32, DType::f64, DType::bf16, DType::f16});
  test_kind("duplicates", [](Shape shape, Numbers& x, Numbers& codebook) {
    const size_t period = static_cast<size_t>(shape.dim) * 17;
    for (size_t i = period; i < codebook.size(); ++i) codebook[i] = codebook[i - period];
    for (size_t i = period; i < x.size(); ++i) x[i] = x[i - period];
  });
  test_kind("far from the origin", [](Shape, Numbers& x, Numbers& codebook) {
    for (double& number : x) number = 5 + 1e-2 * number;
    for (double& number : codebook) number = 5 + 1e-2 * number;
  });
  // Every row is nearer to every code than those before it: bars never stand still, and the queue overflows.
  test_kind("ever nearer", [](Shape shape, Numbers& x, Numbers&) {
    for (size_t i = 0; i < x.size(); ++i) x[i] *= 1.1 - static_cast<double>(i) / static_cast<double>(x.size());
    for (size_t r = 0; r < static_cast<size_t>(shape.rows); ++r) x[r * static_cast<size_t>(shape.dim)] += 1;
  });
  test_kind("neighbouring floats", [](Shape shape, Numbers& x, Numbers& codebook) {
    const size_t dim = static_cast<size_t>(shape.dim);
    for (size_t i = dim; i < x.size(); ++i) {
      const double above = x[i - dim];
      x[i] = i % 7 == 0 ? static_cast<double>(std::nextafter(static_cast<float>(above), 9e9f)) : above;
    }
    for (size_t i = 0; i < codebook.size(); ++i) codebook[i] = x[i % (5 * dim)] + 1e-4 * codebook[i];
  });
  test_kind("zeros", [](Shape shape, Numbers& x, Numbers& codebook) {
    for (size_t k = 0; k < static_cast<size_t>(shape.dim); ++k) x[k] = codebook[k] = 0;
  });
  for (double factor : {1e-44, 1e-30, 1e-20, 1e12, 1e19, 1e37}) {
    test_kind("all rows scaled", [=](Shape, Numbers& x, Numbers&) { scale(x, factor); });
    test_kind("some scaled", [=](Shape shape, Numbers& x, Numbers& codebook) {
      for (size_t k = 0; k < static_cast<size_t>(shape.dim); ++k) {
        x[x.size() - 1 - k] *= factor;
        codebook[codebook.size() - 1 - k] *= factor;
      }
    });
  }
  // Lengths whose squares float64 cannot hold.
  test_kind("nearly nothing", [](Shape, Numbers& x, Numbers&) { scale(x, 1e-161); }, {DType::f64});
  test_kind("not a number", [](Shape shape, Numbers& x, Numbers& codebook) {
    const size_t dim = static_cast<size_t>(shape.dim);
    x[0] = codebook[0] = x[7 * dim + 1] = __builtin_nan("");
    x[9 * dim] = codebook[2 * dim] = __builtin_inf();
    x[11 * dim + 2] = codebook[dim + 3] = -__builtin_inf();
  });
  test_kind("nothing but not a number", [](Shape, Numbers& x, Numbers&) { x.assign(x.size(), __builtin_nan("")); });
}

// Small integers: every score is exact, ties abound.
void test_integers() {
  Random random(3);
  for (DType dtype : all_dtypes) {
    for (auto [heads, rows, codes, dim] :
         {std::tuple(1, 1, 1, 1), std::tuple(2, 70, 40, 0), std::tuple(3, 500, 130, 5), std::tuple(1, 900, 300, 17)}) {
      test({"integers", dtype, Metric::euclidean, heads, rows, codes, dim, random.integers(dtype, heads * rows * dim),
            random.integers(dtype, heads * codes * dim)});
    }
  }
}

}  // namespace

int main() {
  test_integers();
  test_kinds();
  return failed_checks > 0;
}
