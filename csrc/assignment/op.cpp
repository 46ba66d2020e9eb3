#include "op.h"

namespace isthmus {
void register_assignment(StableLibrary&) {}
}  // namespace isthmus
