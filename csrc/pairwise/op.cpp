#include "op.h"
#include "pairwise/kernels.h"

namespace isthmus {

void register_pairwise(StableLibrary&) {}

}  // namespace isthmus
