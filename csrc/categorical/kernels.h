// The categorical kernels, free of torch. All pointers are to contiguous memory.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"

namespace isthmus {

struct CategoricalKernels {};

ISTHMUS_DECLARE_KERNELS(CategoricalKernels, categorical)

}  // namespace isthmus
