// The codebook kernels of level amx over tile registers in plain C++: all of them but the instructions themselves, on
// any CPU with AVX-512.
#define ISTHMUS_EMULATE_AMX
#define ISTHMUS_LEVEL emulated_amx
#include "codebook/cpu.inl"
