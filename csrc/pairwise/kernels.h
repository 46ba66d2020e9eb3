// The pairwise kernels, free of torch. All pointers are to contiguous memory.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"

namespace isthmus {

struct PairwiseKernels {};

ISTHMUS_DECLARE_KERNELS(PairwiseKernels, pairwise)

}  // namespace isthmus
