#include "op.h"
#include "categorical/kernels.h"

namespace isthmus {

void register_categorical(StableLibrary&) {}

}  // namespace isthmus
