// The selection kernels for AMX, whose tiles they have no use for; flags in cmake/Isa.cmake.
#define ISTHMUS_LEVEL amx
#include "selection/cpu.inl"
