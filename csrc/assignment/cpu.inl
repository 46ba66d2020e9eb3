// Soft and stochastic assignment on the CPU: engine.inl has the register tiles and the work decomposition.

#include "assignment/kernels.h"
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/gumbel.h"
#include "core/parallel.h"
#include "core/product.h"
#include "core/tiles.h"
// clang-format off: the engine comes first.
#include "assignment/engine.inl"
#include "assignment/forward.inl"
#include "assignment/backward.inl"
// clang-format on

namespace isthmus::ISTHMUS_LEVEL {

extern const AssignmentKernels assignment_table;
const AssignmentKernels assignment_table = {
    sample,        soft_quantize,         soft_quantize_backward, soft_statistics, soft_statistics_backward,
    cross_entropy, cross_entropy_backward};

}  // namespace isthmus::ISTHMUS_LEVEL
