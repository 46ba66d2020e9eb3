// Sparse codes on CUDA devices; what is computed stands in cpu.inl. All is gathers of rows and bound by memory.
//
// Decode reads each entry's row of weights once, 16 bytes a thread and eight rows on their way, and writes the result
// once; with a target that is read once, too, and the squared error costs no pass. The gradients of values read the
// same rows again. Gradients of weights read a row of the gradient for each entry and write [features, cols] once,
// zeros included: that write is the floor when few latents are on. Sums run in the order of entries: the same bits
// every time, without atomics.
//
// Nothing waits for the device. An index out of range, or an order that is not the code's, stops it with a message.

#include "sparse/gradients.cuh"
#include "sparse/order.cuh"

namespace isthmus::cuda {

int64_t sparse_workspace(const SortLatents& args) {
  Arena arena(nullptr);
  const OrderPlan plan(args, arena);
  return arena.used;
}

int64_t sparse_workspace(const SparseDecodeBackward& args) {
  int64_t bytes = 0;
  dispatch_dtype(args.dtype, [&]<class T>() { bytes = workspace<T>(args); });
  return bytes;
}

int64_t sparse_workspace(const SparseEncodeBackward& args) {
  int64_t bytes = 0;
  dispatch_dtype(args.dtype, [&]<class T>() { bytes = workspace<T>(args); });
  return bytes;
}

void sparse_latent_order(const SortLatents& args, void* stream) { latent_order(args, stream); }

void sparse_decode(const SparseDecode& args, void* stream) { decode(args, stream); }

void sparse_decode_backward(const SparseDecodeBackward& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() { decode_backward<T>(args, stream); });
}

void sparse_encode_backward(const SparseEncodeBackward& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() { encode_backward<T>(args, stream); });
}

void sparse_reconstruction_gradient(const ReconstructionGradient& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() { reconstruction_gradient<T>(args, stream); });
}

}  // namespace isthmus::cuda
