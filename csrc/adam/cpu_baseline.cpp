// The Adam kernels for any CPU of the architecture; flags in cmake/Isa.cmake.
#define ISTHMUS_LEVEL baseline
#include "adam/cpu.inl"
