// The top-k encoder: kernels free of torch. All pointers are to contiguous memory.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"

namespace isthmus {

enum class Activation : int { identity, relu };

// The k largest of activation(x · weightᵀ + bias) in each row, largest first, ties by lowest index.
struct TopkEncode {
  DType dtype;
  Activation activation;
  int64_t rows, cols, features, k;  // 1 <= k <= features < 2^31
  const void* x;                    // [rows, cols]
  const void* weight;               // [features, cols]
  const void* bias;                 // [features], or null
  void* values;                     // [rows, k]
  int64_t* indices;                 // [rows, k]
  void* workspace;                  // CUDA: topk_workspace() bytes
};

struct TopkKernels {
  void (*encode)(const TopkEncode&);
};

ISTHMUS_DECLARE_KERNELS(TopkKernels, topk)

// CUDA: the same arguments with device pointers. Launches on `stream` (a cudaStream_t) of the current device and
// returns without waiting.
namespace cuda {
int64_t topk_workspace(const TopkEncode&);
void topk_encode(const TopkEncode&, void* stream);
}  // namespace cuda

}  // namespace isthmus
