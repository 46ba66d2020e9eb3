// Permission to use the AMX tile registers. Linux grants it per process, on request, once.
#pragma once

namespace isthmus {

// True if the CPU has AMX-TILE and AMX-BF16 and the kernel let this process use the tile registers.
bool request_amx();

}  // namespace isthmus
