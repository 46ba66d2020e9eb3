// Ragged sparse encoders on the CPU: all scores above a threshold, and the largest scores of a batch.
//
// The matrix product x · weightᵀ is never stored: scan.inl finds the few scores that may be wanted by upper bounds, and
// scores those again in float64. So the result is exact, and the same bits at every level and for every number of
// threads.
//
// Extra memory: the words of at most about 32 MB of x, the panels of 8 MB of weights; and the entries that were found.
// For a threshold those are 8 bytes and a value each. For batch top-k they are 16 bytes each, about 1.5 E of them,
// never more than 2 E + 1024 and one for each thread, in lists of at most twice that length.

#include <new>

#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/product.h"
#include "core/rounding.h"
#include "core/score.h"
#include "core/tiles.h"
#include "selection/kernels.h"
#include "topk/select.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

#include "topk/screen.inl"

#include "selection/entries.inl"
#include "selection/scan.inl"

#include "selection/batch.inl"
#include "selection/threshold.inl"

}  // namespace

extern const SelectionKernels selection_table;
const SelectionKernels selection_table = {threshold_encode, batch_topk_encode};

}  // namespace isthmus::ISTHMUS_LEVEL
