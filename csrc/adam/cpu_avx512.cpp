// The Adam kernels for AVX-512 F, BW, DQ and VL; flags in cmake/Isa.cmake.
#define ISTHMUS_LEVEL avx512
#include "adam/cpu.inl"
