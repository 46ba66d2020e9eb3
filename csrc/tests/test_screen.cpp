// Tries to break the bound of codebook/bound.inl: vectors whose rounding errors all point one way, cancel, or vanish.
// For each group of codes the screened maximum must be within the bound of the exact one, in long double.
#include <cmath>
#include <random>
#include <utility>
#include <vector>

#include "check.h"
#if defined(__AVX512F__) && !defined(__AVX512BF16__)
#define ISTHMUS_EMULATE_AMX  // so that this level, too, has a coarse screen to test
#endif
#include "codebook/kernels.h"
#include "core/amx_tiles.h"
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/product.h"
#include "core/rounding.h"
#include "core/tiles.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

#include "codebook/search.inl"
// after search
#include "codebook/direct.inl"

constexpr int64_t rows = 7;
std::mt19937 engine(1);

double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(engine); }

// The score that the screen approximates: with the center taken off.
template <class C>
long double exact_score(const Panels<C>& panels, const C* x, const C* c) {
  long double product = 0, square = 0, length = 0;
  for (int64_t k = 0; k < panels.dim; ++k) length += static_cast<long double>(c[k]) * c[k];
  length = panels.metric == Metric::cosine && length > 0 ? std::sqrt(length) : 1;
  for (int64_t k = 0; k < panels.dim; ++k) {
    const long double center = panels.center.mean.data[k], code = c[k] / length - center;
    product += (x[k] - (panels.center.moves_rows() ? center : 0)) * code;
    square += code * code;
  }
  return panels.metric == Metric::euclidean ? product - square / 2 : product;
}

// The score itself.
template <class C>
long double exact_score(Metric metric, const C* x, const C* c, int64_t dim) {
  long double product = 0, square = 0, distance = 0;
  for (int64_t k = 0; k < dim; ++k) {
    const long double a = x[k], b = c[k];
    product += a * b;
    square += b * b;
    distance += (a - b) * (a - b);
  }
  if (metric == Metric::euclidean) return -distance;
  return metric == Metric::cosine && square > 0 ? product / std::sqrt(square) : product;
}

// A group's codes scored from the vectors themselves: none is better than its upper bound, and the bar that they make
// is not above the best of what is screened, `exact`.
template <class C>
void check_closer_look(BlockSearch<C>& block, const C* x, const C* codebook, int64_t r, int64_t group,
                       long double exact, const char* name) {
  const int64_t dim = block.panels.dim, first = group * group_codes;
  Shortlist<C>& list = block.shortlist;
  list.begin(x + r * dim, block.whole_bounds[r]);
  list.meet(group);
  for (int64_t i = 0; i < group_codes && first + i < block.panels.codes; ++i) {
    const long double score = exact_score(block.panels.metric, x + r * dim, codebook + (first + i) * dim, dim);
    CHECK_THAT(!(list.uppers.data[i] < score), "%s: score %Lg, upper bound %Lg (dim %ld, metric %d)", name, score,
               static_cast<long double>(list.uppers.data[i]), static_cast<long>(dim),
               static_cast<int>(block.panels.metric));
  }
  const long double bar = block.as_screened(r, static_cast<double>(list.bar()));
  CHECK_THAT(!(bar > exact), "%s: bar %Lg, best %Lg (dim %ld, metric %d)", name, bar, exact, static_cast<long>(dim),
             static_cast<int>(block.panels.metric));
}

// Returns the largest share of its bound that an error took up.
template <class C>
double check_bounds(BlockSearch<C>& block, const C* x, const C* codebook, const char* name) {
  const Panels<C>& panels = block.panels;
  const int64_t codes = panels.codes;
  double share = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t group = 0; group * group_codes < codes; ++group) {
      long double exact = -__builtin_inf();
      for (int64_t i = group * group_codes; i < codes && i < (group + 1) * group_codes; ++i) {
        const long double score = exact_score(panels, x + r * panels.dim, codebook + i * panels.dim);
        exact = std::max(exact, score);
      }
      check_closer_look(block, x, codebook, r, group, exact, name);
      const double bound = panels.bounds.upper(block.bounds[r], group);
      const double score = block.maximum(r, group / lanes<C>)[group % lanes<C>];
      const double error = static_cast<double>(std::fabs(score - exact));
      CHECK_THAT(error <= bound, "%s: error %g, bound %g (dim %ld, metric %d, row %ld, group %ld)", name, error, bound,
                 static_cast<long>(panels.dim), static_cast<int>(panels.metric), static_cast<long>(r),
                 static_cast<long>(group));
      CHECK(bound <= panels.bounds.of_span(block.bounds[r], group / 64) * 1.00001);
      if (error > 0) share = std::max(share, error / bound);
    }
  }
  return share;
}

// No code is better than its upper bound, and some code is as good as the lower bound of each chunk.
template <class C>
void check_direct(Metric metric, const C* x, const C* codebook, int64_t codes, int64_t dim, const char* name) {
  const DirectSearch<C> search(metric, codebook, codes, dim, 1);
  const typename DirectSearch<C>::Batch batch(search, x, dim, rows);
  for (int64_t chunk = 0; chunk < search.chunks; ++chunk) {
    search.screen(batch, chunk);
    for (int64_t r = 0; r < rows; ++r) {
      long double best = -__builtin_inf();
      for (int64_t i = 0; i < search.chunk_codes && chunk * search.chunk_codes + i < codes; ++i) {
        const C* code = codebook + (chunk * search.chunk_codes + i) * dim;
        const long double exact = exact_score(metric, x + r * dim, code, dim);
        const long double upper = batch.uppers.data[(chunk * rows + r) * search.chunk_codes + i];
        CHECK_THAT(!(upper < exact), "%s: score %Lg, upper bound %Lg (dim %ld, metric %d)", name, exact, upper,
                   static_cast<long>(dim), static_cast<int>(metric));
        best = std::max(best, exact);
      }
      CHECK(!(batch.bars.data[chunk * rows + r] > best));
    }
  }
}

// make(k) draws one component.
template <class C, class Make>
void test_kind(const char* name, Make make) {
  double share = 0;
  for (Metric metric : {Metric::euclidean, Metric::cosine, Metric::inner_product}) {
    for (auto [dim, codes] :
         {std::pair{1, 150}, {2, 150}, {15, 150}, {16, 150}, {33, 2100}, {64, 150}, {257, 2050}, {2000, 150}}) {
      std::vector<C> x, codebook;
      for (int64_t i = 0; i < rows * dim; ++i) x.push_back(static_cast<C>(make(i % dim)));
      for (int64_t i = 0; i < codes * dim; ++i) codebook.push_back(static_cast<C>(make(i % dim)));
      // Squares of such float64 vanish, and with them the length by which cosine divides.
      if (metric == Metric::cosine && sizeof(C) == 8 && std::fabs(codebook[0]) < least_length<C>) continue;
      const PackedCodes<C> packed(metric, codebook.data(), codes, dim);
      BlockSearch<C> block(packed, 1);
      std::vector<int64_t> indices(rows);
      block.search(x.data(), dim, rows, indices.data(), nullptr);
      share = std::max(share, check_bounds(block, x.data(), codebook.data(), name));
      check_direct(metric, x.data(), codebook.data(), codes, dim, name);
    }
  }
  std::printf("%-20s in %s: errors of up to %.2f of the bound\n", name, sizeof(C) == 4 ? "float32" : "float64", share);
}

template <class C>
void test_all() {
  test_kind<C>("uniform", [](int64_t) { return uniform(-1, 1); });
  test_kind<C>("one sign", [](int64_t) { return uniform(0.5, 1); });
  // Just under the middle between two bfloat16: what rounding takes away is largest, and of one sign.
  test_kind<C>("middles of bfloat16", [](int64_t) { return 1 + 0x1p-8 - 0x1p-20 * uniform(0, 1); });
  test_kind<C>("middles of float", [](int64_t) { return 1 + 0x1p-24 * std::floor(uniform(0, 16)); });
  test_kind<C>("cancelling", [](int64_t k) { return (k % 2 == 0 ? 1 : -1) * (1000 + uniform(0, 0.01)); });
  test_kind<C>("all magnitudes",
               [](int64_t) { return std::ldexp(uniform(-1, 1), static_cast<int>(uniform(-40, 20))); });
  test_kind<C>("a long component", [](int64_t k) { return (k == 0 ? 1e6 : 1) * uniform(-1, 1); });
  const int lowest = sizeof(C) == 4 ? -149 : -1074, middle = lowest / 2;
  test_kind<C>("subnormal",
               [=](int64_t) { return std::ldexp(uniform(-1, 1), lowest + static_cast<int>(uniform(0, 30))); });
  test_kind<C>("subnormal products",
               [=](int64_t) { return std::ldexp(uniform(-1, 1), middle + static_cast<int>(uniform(-8, 8))); });
  test_kind<C>("nearly wild", [](int64_t) { return std::ldexp(uniform(0.5, 1), 54); });
}

void run() {
  test_all<float>();
  test_all<double>();
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL

ISTHMUS_LEVEL_TESTS(run)
