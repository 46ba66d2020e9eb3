#include "categorical/kernels.h"

namespace isthmus::ISTHMUS_LEVEL {

extern const CategoricalKernels categorical_table;
const CategoricalKernels categorical_table = {};

}  // namespace isthmus::ISTHMUS_LEVEL
