#include "likelihood/kernels.h"

namespace isthmus::ISTHMUS_LEVEL {

extern const LikelihoodKernels likelihood_table;
const LikelihoodKernels likelihood_table = {};

}  // namespace isthmus::ISTHMUS_LEVEL
