// Terms over all pairs on the CPU: engine.inl has the register tile and the work decomposition, one file has each term.

#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/normal.h"
#include "core/parallel.h"
#include "core/product.h"
#include "core/tiles.h"
#include "pairwise/kernels.h"
// clang-format off: the engine comes first.
#include "pairwise/engine.inl"
#include "pairwise/mixture.inl"
#include "pairwise/aggregate.inl"
#include "pairwise/discrepancy.inl"
// clang-format on

namespace isthmus::ISTHMUS_LEVEL {

extern const PairwiseKernels pairwise_table;
const PairwiseKernels pairwise_table = {mixture,     mixture_backward,    aggregate, aggregate_backward,
                                        discrepancy, discrepancy_backward};

}  // namespace isthmus::ISTHMUS_LEVEL
