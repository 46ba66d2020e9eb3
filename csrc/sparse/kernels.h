// Sparse codes: decoding, gradients, the order by latent. Kernels free of torch; pointers are to contiguous memory.
//
// A code has `rows` rows of entries. An entry is a value and the index of a latent, a row of the weight matrix
// [features, cols]. All sums over the entries of a row or of a latent run in the order of entries.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"

namespace isthmus {

// Which entries belong to a row, and to which latent each entry points.
struct CodeLayout {
  int64_t rows, entries;
  int64_t k;               // padded: row n owns the entries n · k … (n + 1) · k - 1; not read if offsets are given
  const int64_t* offsets;  // ragged: [rows + 1], row n owns offsets[n] … offsets[n + 1] - 1; null: padded
  const int64_t* indices;  // [entries], in [0, features), or -1: an empty place, which is skipped and gets no gradient
};

// The entries sorted by latent, stably: latent f has the positions starts[f] … starts[f + 1] - 1.
struct LatentOrder {
  const int64_t* entries;  // [entries of the code]; those from starts[features] on are -1
  const int64_t* rows;     // [entries of the code]: the row that each of them belongs to
  const int64_t* starts;   // [features + 1]
};

// Makes a LatentOrder. Empty places are left out; with values, also entries whose value is 0.
struct SortLatents {
  DType dtype;  // of the values
  CodeLayout code;
  int64_t features;
  const void* values;  // [entries], or null
  int64_t* order_entries;
  int64_t* order_rows;
  int64_t* starts;
  void* workspace;  // CUDA: sparse_workspace() bytes
};

// out[n] = bias + Σ_e values[e] · weight[indices[e]] over the entries e of row n. With a target, in the same pass
// squared_error[n] = |target[n] - out[n]|², of the sum before it is rounded to the dtype.
struct SparseDecode {
  DType dtype;
  CodeLayout code;
  int64_t cols, features;
  const void* values;   // [entries]
  const void* weight;   // [features, cols]
  const void* bias;     // [cols], or null
  const void* target;   // [rows, cols], or null
  void* out;            // [rows, cols]
  void* squared_error;  // [rows], float32 (float64 for float64); null without a target
};

// The gradient that a reconstruction gets in all:
//     grad = grad_reconstruction + 2 · grad_error · (reconstruction - target)
// and that of its target, 2 · grad_error · (target - reconstruction).
struct ReconstructionGradient {
  DType dtype;
  int64_t rows, cols;
  const void* grad_reconstruction;  // [rows, cols], or null: zeros
  const void* grad_error;           // [rows], float32 (float64 for float64)
  const void* reconstruction;       // [rows, cols]
  const void* target;               // [rows, cols]
  void* grad;                       // [rows, cols]
  void* grad_target;                // [rows, cols]; null: not wanted
};

// Gradients of SparseDecode: a null result is not wanted. grad_weight sums the entries that are in the order;
// grad_values has all entries, zero at empty places.
struct SparseDecodeBackward {
  DType dtype;
  CodeLayout code;
  LatentOrder order;  // null pointers only if grad_weight is null
  int64_t cols, features;
  const void* grad;    // [rows, cols]
  const void* values;  // [entries]
  const void* weight;  // [features, cols]
  void* grad_values;   // [entries]
  void* grad_weight;   // [features, cols], all of it is written
  void* grad_bias;     // [cols]
  void* workspace;     // CUDA: sparse_workspace() bytes
};

// Gradients of pre-activations values[e] = x[n] · weight[indices[e]] + bias[indices[e]]: a null result is not wanted.
// grad_weight and grad_bias sum the entries that are in the order.
struct SparseEncodeBackward {
  DType dtype;
  CodeLayout code;
  LatentOrder order;  // null pointers only if grad_weight and grad_bias are null
  int64_t cols, features;
  const void* grad;    // [entries]
  const void* x;       // [rows, cols]
  const void* weight;  // [features, cols]
  void* grad_x;        // [rows, cols]
  void* grad_weight;   // [features, cols], all of it is written
  void* grad_bias;     // [features]
  void* workspace;     // CUDA: sparse_workspace() bytes
};

struct SparseKernels {
  void (*latent_order)(const SortLatents&);
  void (*decode)(const SparseDecode&);
  void (*decode_backward)(const SparseDecodeBackward&);
  void (*encode_backward)(const SparseEncodeBackward&);
  void (*reconstruction_gradient)(const ReconstructionGradient&);
};

ISTHMUS_DECLARE_KERNELS(SparseKernels, sparse)

// CUDA: the same arguments with device pointers. Launches on `stream` (a cudaStream_t) of the current device and
// returns without waiting. An index out of range stops the device with a message, as torch's own indexing does.
namespace cuda {
int64_t sparse_workspace(const SortLatents&);
int64_t sparse_workspace(const SparseDecodeBackward&);
int64_t sparse_workspace(const SparseEncodeBackward&);
void sparse_latent_order(const SortLatents&, void* stream);
void sparse_decode(const SparseDecode&, void* stream);
void sparse_decode_backward(const SparseDecodeBackward&, void* stream);
void sparse_encode_backward(const SparseEncodeBackward&, void* stream);
void sparse_reconstruction_gradient(const ReconstructionGradient&, void* stream);
}  // namespace cuda

}  // namespace isthmus
