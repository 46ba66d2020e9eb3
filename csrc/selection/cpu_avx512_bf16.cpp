// The selection kernels for AVX-512 with BF16 and VNNI; flags in cmake/Isa.cmake.
#define ISTHMUS_LEVEL avx512_bf16
#include "selection/cpu.inl"
