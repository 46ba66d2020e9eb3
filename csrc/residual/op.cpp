#include "op.h"

namespace isthmus {
void register_residual(StableLibrary&) {}
}  // namespace isthmus
