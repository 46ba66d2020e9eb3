// The likelihood kernels for any CPU of the architecture; flags in cmake/Isa.cmake.
#define ISTHMUS_LEVEL baseline
#include "likelihood/cpu.inl"
