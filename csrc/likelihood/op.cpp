#include "op.h"
#include "likelihood/kernels.h"

namespace isthmus {

void register_likelihood(StableLibrary&) {}

}  // namespace isthmus
