// The topk kernels for AVX-512 with BF16 and VNNI; flags in cmake/Isa.cmake.
#define ISTHMUS_LEVEL avx512_bf16
#include "topk/cpu.inl"
