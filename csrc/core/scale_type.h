// The four ways in which a tensor may carry the standard deviation s of a Gaussian.
#pragma once

namespace isthmus {

enum class ScaleType : int {
  logvar,    // s = exp(scale / 2)
  std,       // s = scale
  softplus,  // s = log(1 + exp(scale))
  square,    // s = scale²
};

}  // namespace isthmus
