// Ragged sparse encoders on CUDA devices; what is computed stands in kernels.h.
//
// As in top-k (topk/operands.cuh) scores are screened on the tensor cores with a rigorous bound, and those that may be
// selected are scored in float64, in the operations of the CPU: the answer is that of the CPU. For thresholds the
// product is computed once, for a batch twice, the first time for a histogram.
//
// Arithmetic bounds both: 2·N·F·D (4·N·F·D) operations of half types. Memory: x and weights are written and read once
// as half types, one bit of each score is kept, N·F/8 bytes, and the weights of candidates are gathered, for thresholds
// twice.
//
// threshold_encode waits for the number of its entries. Nothing else does, and no result depends on the order of
// blocks.

#include "selection/batch.cuh"
#include "selection/threshold.cuh"

namespace isthmus::cuda {

int64_t selection_workspace(const ThresholdEncode& args) {
  Arena arena(nullptr);
  dispatch_dtype(args.dtype, [&]<class T>() { ThresholdPlan<T>(args, arena); });
  return arena.used;
}

int64_t selection_workspace(const BatchTopkEncode& args) {
  Arena arena(nullptr);
  dispatch_dtype(args.dtype, [&]<class T>() { BatchPlan<T>(args, arena); });
  return arena.used;
}

void selection_threshold_encode(const ThresholdEncode& args, void* stream) {
  if (args.rows > 0 && args.features > 0) {
    return dispatch_dtype(args.dtype, [&]<class T>() { threshold_encode<T>(args, stream); });
  }
  const size_t bytes = static_cast<size_t>(args.rows + 1) * sizeof(int64_t);
  check(cudaMemsetAsync(args.offsets, 0, bytes, static_cast<cudaStream_t>(stream)), "threshold_encode");
  args.allocate(args.context, 0);
}

void selection_batch_topk_encode(const BatchTopkEncode& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() { batch_topk_encode<T>(args, stream); });
}

}  // namespace isthmus::cuda
