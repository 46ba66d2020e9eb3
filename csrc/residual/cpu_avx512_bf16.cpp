// The residual kernels for AVX-512 with products of bfloat16; flags in cmake/Isa.cmake.
#define ISTHMUS_LEVEL avx512_bf16
#include "residual/cpu.inl"
