// The noise of a key by its definition: words from core/philox.h, the rest in double. In an anonymous namespace because
// files that are compiled for each instruction set include it.
#pragma once

#include <cmath>

#include "core/dtype.h"
#include "core/philox.h"

namespace isthmus {
namespace {

struct NoiseReference {
  int64_t key[2];

  double operator()(DType dtype, int64_t index) const {
    const int64_t per_block = dtype == DType::f64 ? 2 : 4;
    const Words words = philox(uint64_t(key[0]), uint64_t(key[1]) + uint64_t(index / per_block));
    if (dtype == DType::f64) {
      const NormalPair pair = normal_pair(words);
      return index % 2 == 0 ? pair.first : pair.second;
    }
    const uint32_t* pair = words.w + index % 4 / 2 * 2;
    // The stream is that of the angle rounded to float.
    volatile float angle = two_pi_f * uniform(pair[1]);
    const double t = static_cast<double>(angle);
    const double radius = std::sqrt(-2 * std::log(static_cast<double>(uniform(pair[0]))));
    return radius * (index % 2 == 0 ? std::cos(t) : std::sin(t));
  }

  // The n-th child: its own key, from the words of block n.
  NoiseReference child(uint64_t n) const {
    const Words words = philox(uint64_t(key[0]), uint64_t(key[1]) + n);
    const auto join = [](uint32_t low, uint32_t high) { return int64_t(uint64_t(high) << 32 | low); };
    return {{join(words.w[0], words.w[1]), join(words.w[2], words.w[3])}};
  }
};

}  // namespace
}  // namespace isthmus
