// The residual kernels for the matrix units of AMX; flags in cmake/Isa.cmake.
#define ISTHMUS_LEVEL amx
#include "residual/cpu.inl"
