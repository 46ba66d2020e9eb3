// The codebook kernels for AVX-512 with products of bfloat16 and of bytes; flags in cmake/Isa.cmake.
#define ISTHMUS_LEVEL avx512_bf16
#include "codebook/cpu.inl"
