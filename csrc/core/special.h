// Special functions of vectors: the tails of the normal distribution. In the manner of core/math.h: branch-free in
// float32 with polynomials fitted for this library, the C library in float64.
#pragma once

#include "core/math.h"

namespace isthmus {
namespace {

// ---- float32 -------------------------------------------------------------------------------------------------------

// e^(x²) (1 - erf(x)) for x >= 0: what is left of the tail beyond x when its decay is taken out.
ISTHMUS_INLINE f32v erfcx(f32v x) {
  // (1 + 2x) erfcx(x) in t = (x - 2) / (x + 2), which takes all x >= 0 to [-1, 1]: error 2^-26.3.
  constexpr float p[] = {0x1.46e80ep0f,    -0x1.7bf5dcp-4f,  -0x1.5407e6p-3f, 0x1.4ff902p-3f,
                         -0x1.bc1fd2p-5f,  -0x1.06af08p-7f,  0x1.1ceaaap-7f,  0x1.3d5d3cp-10f,
                         -0x1.6f719ep-10f, -0x1.6f8708p-12f, 0x1.55e35cp-13f, 0x1.fb9b98p-15f};
  const f32v t = 1.0f - 4.0f / (x + 2.0f);
  return 0.5f * polynomial(t, p) / (0.5f + x);  // 1 + 2x might overflow
}

// ---- float64 -------------------------------------------------------------------------------------------------------

ISTHMUS_INLINE f64v erfcx(f64v x) {
  for (int i = 0; i < lanes<double>; ++i) {
    const double v = x[i];
    if (v < 10) {
      const double high = static_cast<float>(v), low = v - high;  // high² is exact
      x[i] = __builtin_exp(high * high) * __builtin_exp(low * (high + v)) * __builtin_erfc(v);
    } else {
      double sum = 1;  // the asymptotic series
      for (int n = 15; n > 0; --n) sum = 1 - (2 * n - 1) / (2 * v * v) * sum;
      x[i] = sum / (v * 1.77245385090551602729816748334);
    }
  }
  return x;
}

}  // namespace
}  // namespace isthmus
