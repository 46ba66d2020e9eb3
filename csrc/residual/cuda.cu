// Residual vector quantization on CUDA devices; what is computed stands in cpu.inl.
//
// Each stage is a search in the compute type on what codebook/ offers, for all rows at once: the residuals of all rows,
// of every sequence of the beam, lie in device memory between two stages, not in registers. Residuals are made by
// subtractions alone, so they are the bits of the CPU, and so are the indices.
//
// Nothing waits for the device, and no result depends on the order of blocks.

#include "residual/kernels.h"

#include "residual/backward.cuh"
#include "residual/beam.cuh"

namespace isthmus::cuda {

int64_t residual_workspace(const ResidualSearch& args) {
  int64_t bytes = 0;
  dispatch_dtype(args.codes.dtype, [&]<class T>() { bytes = search_workspace<T>(args); });
  return bytes;
}

int64_t residual_workspace(const ResidualBackward& args) {
  Arena arena(nullptr);
  dispatch_dtype(args.codes.dtype, [&]<class T>() {
    if (args.grad_x != nullptr) BackwardLayout<T>(args, arena);
    if (args.grad_tables != nullptr) arena.used = StageSums<Compute<T>>(args.codes, arena).used;
  });
  return arena.used;
}

int64_t residual_workspace(const ResidualTotals& args) {
  Arena arena(nullptr);
  int64_t bytes = 0;
  dispatch_dtype(args.codes.dtype, [&]<class T>() { bytes = StageSums<Compute<T>>(args.codes, arena).used; });
  return bytes;
}

void residual_search(const ResidualSearch& args, void* stream) {
  dispatch_dtype(args.codes.dtype, [&]<class T>() { search<T>(args, stream); });
}

void residual_backward(const ResidualBackward& args, void* stream) {
  dispatch_dtype(args.codes.dtype, [&]<class T>() { backward<T>(args, stream); });
}

void residual_totals(const ResidualTotals& args, void* stream) {
  dispatch_dtype(args.codes.dtype, [&]<class T>() { totals<T>(args, stream); });
}

}  // namespace isthmus::cuda
