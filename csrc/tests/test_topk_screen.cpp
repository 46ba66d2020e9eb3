// Tries to break the bound of topk/screen.inl: vectors whose rounding errors all point one way, cancel, or vanish. No
// score, in long double, may be above its upper bound; and bounds must not be wider than they have to be.
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "core/buffer.h"
#include "core/product.h"
#include "core/rounding.h"
#include "core/score.h"
#include "topk/kernels.h"
#include "topk/select.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

#include "topk/screen.inl"

std::mt19937 engine(1);

double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(engine); }

// The largest share of its bound that an error takes up; the bound is measured from the middle of what it allows.
template <class Words, class C>
double check_bounds(const char* name, const std::vector<C>& x, const std::vector<C>& weight, const std::vector<C>& bias,
                    int64_t cols, bool magnitudes) {
  constexpr int width = panel_width<C>;
  const Screen<Words> screen{cols, magnitudes};
  const Buffer<C> words(tile_rows * screen.depth), units(tile_rows), lengths(tile_rows);
  const Buffer<C> panel_words(width * screen.depth), terms(width * Panel<C>::terms), bounds(tile_rows * width);
  const Buffer<C> scratch(width * screen.padded + tile_rows * screen.padded);
  const C slope = screen.pack_tile(x.data(), tile_rows, words.data, units.data, lengths.data, scratch.data);
  const Panel<C> panel{panel_words.data, terms.data};
  screen.pack_panel([&](int64_t i) { return weight.data() + i * cols; }, [&](int64_t i) { return bias[i]; }, width,
                    panel, scratch.data);
  std::vector<C> thresholds(tile_rows, C(0));
  std::vector<uint32_t> passed(tile_rows);
  screen.meet({words.data, units.data, lengths.data, slope}, tile_rows, panel, thresholds.data(), bounds.data,
              passed.data());
  double share = 0;
  for (int64_t r = 0; r < tile_rows; ++r) {
    for (int64_t f = 0; f < width; ++f) {
      long double score = bias[f];
      for (int64_t k = 0; k < cols; ++k) score += static_cast<long double>(x[r * cols + k]) * weight[f * cols + k];
      if (magnitudes) score = std::fabs(score);
      const long double bound = bounds.data[r * width + f];
      CHECK_THAT(!(bound < score), "%s: score %Lg, bound %Lg (columns %ld)", name, score, bound,
                 static_cast<long>(cols));
      CHECK((passed[r] >> f & 1) == !(bound <= 0));
      // The error is what the bound would have to be, at the least, less what it allows on either side.
      const long double half =
          static_cast<long double>(panel.term(Panel<C>::norm)[f] * slope + panel.term(Panel<C>::loss)[f]) *
              lengths.data[r] +
          panel.term(Panel<C>::slack)[f];
      if (half > 0) share = std::max(share, static_cast<double>((score - (bound - half)) / half));
    }
  }
  return share;
}

// draw(k) is component k.
template <class Words, class Draw>
void test_kind(const char* words, const char* name, Draw draw) {
  using C = typename Words::C;
  double share = 0;
  for (int64_t cols : {1, 2, 15, 16, 33, 64, 257, 2000}) {
    for (bool magnitudes : {false, true}) {
      std::vector<C> x, weight, bias;
      for (int64_t i = 0; i < tile_rows * cols; ++i) x.push_back(static_cast<C>(draw(i % cols)));
      for (int64_t i = 0; i < panel_width<C> * cols; ++i) weight.push_back(static_cast<C>(draw(i % cols)));
      for (int64_t i = 0; i < panel_width<C>; ++i) bias.push_back(static_cast<C>(i % 3 == 0 ? 0 : draw(0)));
      share = std::max(share, check_bounds<Words>(name, x, weight, bias, cols, magnitudes));
    }
  }
  std::printf("%-20s in %s: errors of up to %.2f of the bound\n", name, words, share);
  CHECK(share <= 1);
}

template <class Words>
void test_words(const char* words) {
  const auto test = [&](const char* name, auto draw) { test_kind<Words>(words, name, draw); };
  test("uniform", [](int64_t) { return uniform(-1, 1); });
  test("one sign", [](int64_t) { return uniform(0.5, 1); });
  test("middles of bytes", [](int64_t k) { return k == 0 ? 127 : std::floor(uniform(0, 126)) + 0.4999; });
  test("middles of bfloat16", [](int64_t) { return 1 + 0x1p-8 - 0x1p-20 * uniform(0, 1); });
  test("middles of float", [](int64_t) { return 1 + 0x1p-24 * std::floor(uniform(0, 16)); });
  test("cancelling", [](int64_t k) { return (k % 2 == 0 ? 1 : -1) * (1000 + uniform(0, 0.01)); });
  test("all magnitudes", [](int64_t) { return std::ldexp(uniform(-1, 1), static_cast<int>(uniform(-40, 20))); });
  test("a long component", [](int64_t k) { return (k == 0 ? 1e6 : 1) * uniform(-1, 1); });
  test("tiny", [](int64_t) { return 1e-25 * uniform(-1, 1); });
  test("subnormal", [](int64_t) { return 1e-40 * uniform(-1, 1); });
  test("zeros", [](int64_t) { return 0; });
  test("huge", [](int64_t) { return 1e17 * uniform(-1, 1); });
}

void run() {
  test_words<Fine<float>>("float32");
  test_words<Fine<double>>("float64");
#if defined(__AVX512VNNI__)
  test_words<Bytes>("bytes");
  test_words<Pairs>("bfloat16");
#endif
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL

ISTHMUS_LEVEL_TESTS(run)
