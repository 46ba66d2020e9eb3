// Sparse codes: decoding and gradients, kernels free of torch. All pointers are to contiguous memory.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"
#include "topk/kernels.h"

namespace isthmus {

struct TopkEncodeBackward {
  DType dtype;
  Activation activation;
  int64_t rows, cols, features, k;
  const void* grad;        // [rows, k]
  const void* x;           // [rows, cols]
  const void* weight;      // [features, cols]
  const void* values;      // [rows, k], as encode returned them
  const int64_t* indices;  // [rows, k], in [0, features)
  void* grad_x;            // [rows, cols]
  void* grad_weight;       // [features, cols]
  void* grad_bias;         // [features]
  void* workspace;         // CUDA: sparse_workspace() bytes
};

// out[n] = bias + Σ_j values[n, j] · weight[indices[n, j]]
struct SparseDecode {
  DType dtype;
  int64_t rows, cols, features, k;
  const void* values;      // [rows, k]
  const int64_t* indices;  // [rows, k], in [0, features)
  const void* weight;      // [features, cols]
  const void* bias;        // [cols], or null
  void* out;               // [rows, cols]
};

struct SparseDecodeBackward {
  DType dtype;
  int64_t rows, cols, features, k;
  const void* grad;  // [rows, cols]
  const void* values;
  const int64_t* indices;
  const void* weight;
  void* grad_values;  // [rows, k]
  void* grad_weight;  // [features, cols]
  void* grad_bias;    // [cols]
  void* workspace;    // CUDA: sparse_workspace() bytes
};

struct SparseKernels {
  void (*encode_backward)(const TopkEncodeBackward&);
  void (*decode)(const SparseDecode&);
  void (*decode_backward)(const SparseDecodeBackward&);
};

ISTHMUS_DECLARE_KERNELS(SparseKernels, sparse)

// CUDA: the same arguments with device pointers. Launches on `stream` (a cudaStream_t) of the current device and
// returns without waiting. An index out of range stops the device with a message, as torch's own indexing does.
namespace cuda {
int64_t sparse_workspace(const TopkEncodeBackward&);
int64_t sparse_workspace(const SparseDecodeBackward&);
void sparse_encode_backward(const TopkEncodeBackward&, void* stream);
void sparse_decode(const SparseDecode&, void* stream);
void sparse_decode_backward(const SparseDecodeBackward&, void* stream);
}  // namespace cuda

}  // namespace isthmus
