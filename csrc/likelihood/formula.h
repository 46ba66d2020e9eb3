// Formulas that are written once for both devices: V is a vector in a kernel of the CPU, a number in one of a GPU. They
// use the functions of core/normal.h or core/normal.cuh, which the kernel file includes before them.
#pragma once

#if defined(__CUDACC__)
#define ISTHMUS_FORMULA __device__ __forceinline__
#define ISTHMUS_FORMULAS_BEGIN \
  namespace isthmus::cuda {    \
  namespace {
#else
#define ISTHMUS_FORMULA ISTHMUS_INLINE
#define ISTHMUS_FORMULAS_BEGIN \
  namespace isthmus {          \
  namespace {
#endif
#define ISTHMUS_FORMULAS_END \
  }                          \
  }
