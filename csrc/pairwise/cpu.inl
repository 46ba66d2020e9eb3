#include "pairwise/kernels.h"

namespace isthmus::ISTHMUS_LEVEL {

extern const PairwiseKernels pairwise_table;
const PairwiseKernels pairwise_table = {};

}  // namespace isthmus::ISTHMUS_LEVEL
