// The Adam kernels for AVX2, FMA and F16C; flags in cmake/Isa.cmake.
#define ISTHMUS_LEVEL avx2
#include "adam/cpu.inl"
