// The likelihood kernels, free of torch. All pointers are to contiguous memory.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"

namespace isthmus {

struct LikelihoodKernels {};

ISTHMUS_DECLARE_KERNELS(LikelihoodKernels, likelihood)

}  // namespace isthmus
