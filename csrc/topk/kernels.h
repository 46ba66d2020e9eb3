// The top-k encoder: kernels free of torch. All pointers are to contiguous memory.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"

namespace isthmus {

// abs ranks by |a| and keeps the sign of a.
enum class Activation : int { identity, relu, abs };

// The best of activation(x · weightᵀ + bias) in each row, best first, ties by lowest index. The features are `groups`
// equal ranges, each of which gives its k / groups best to a row, group after group.
//
// Scores are ranked in float64 (core/score.h) and rounded once. With relu, whatever is not positive counts as 0. A row
// with a NaN among its scores gets NaN values and index 0 throughout.
struct TopkEncode {
  DType dtype;
  Activation activation;
  int64_t rows, cols, features, k;  // 1 <= k <= features < 2^31
  int64_t groups;                   // divides features and k
  const void* x;                    // [rows, cols]
  const void* weight;               // [features, cols]
  const void* bias;                 // [features], or null
  const bool* among;                // [features]: the others do not take part; or null: all do
  void* values;                     // [rows, k]; where a group has fewer features: 0
  int64_t* indices;                 // [rows, k]; there: -1
  void* workspace;                  // CUDA: topk_workspace() bytes
};

struct TopkKernels {
  void (*encode)(const TopkEncode&);
};

ISTHMUS_DECLARE_BF16_KERNELS(TopkKernels, topk)

// CUDA: the same arguments with device pointers. Launches on `stream` (a cudaStream_t) of the current device and
// returns without waiting.
namespace cuda {
int64_t topk_workspace(const TopkEncode&);
void topk_encode(const TopkEncode&, void* stream);
}  // namespace cuda

}  // namespace isthmus
