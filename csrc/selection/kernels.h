// Ragged sparse encoders: kernels free of torch. All pointers are to contiguous memory.
//
// Both return entries in the order of (row, feature); those of row n are offsets[n] … offsets[n + 1] - 1. Scores are
// compared in float64 and rounded once to the element type. A row that has a NaN among its scores gives one entry for
// all of them: value NaN, index 0.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"
#include "topk/kernels.h"

namespace isthmus {

// Room for entries whose number only the kernel can tell.
struct Entries {
  void* values;      // [count]
  int64_t* indices;  // [count]
};

// Every score of x · weightᵀ + bias that is above the threshold of its feature.
struct ThresholdEncode {
  DType dtype;
  int64_t rows, cols, features;  // features < 2^31
  const void* x;                 // [rows, cols]
  const void* weight;            // [features, cols]
  const void* bias;              // [features], or null
  const double* thresholds;      // [features], or one for all of them
  bool one_threshold;
  int64_t* offsets;  // [rows + 1]
  // Called once, on the calling thread, when the entries have been counted; the kernel then fills what it returns. On
  // CUDA the count has to be waited for.
  Entries (*allocate)(void* context, int64_t count);
  void* context;
  void* workspace;  // CUDA: selection_workspace() bytes
};

// The `entries` largest of activation(x · weightᵀ + bias) in the whole batch; ties by lowest (row, feature). The entry
// of a broken row ranks above all numbers; where everything else is used up, broken rows give more entries like it.
struct BatchTopkEncode {
  DType dtype;
  Activation activation;
  int64_t rows, cols, features;  // features < 2^31
  int64_t entries;               // 0 <= entries <= rows · features
  const void* x;                 // [rows, cols]
  const void* weight;            // [features, cols]
  const void* bias;              // [features], or null
  void* values;                  // [entries]
  int64_t* indices;              // [entries]
  int64_t* offsets;              // [rows + 1]
  void* threshold;               // of accumulate_dtype(dtype): the smallest score selected, infinity if there is none
  void* workspace;               // CUDA: selection_workspace() bytes
};

struct SelectionKernels {
  void (*threshold_encode)(const ThresholdEncode&);
  void (*batch_topk_encode)(const BatchTopkEncode&);
};

ISTHMUS_DECLARE_BF16_KERNELS(SelectionKernels, selection)

// CUDA: the same arguments with device pointers, on `stream` (a cudaStream_t) of the current device. Only
// threshold_encode waits for the device, once.
namespace cuda {
int64_t selection_workspace(const ThresholdEncode&);
int64_t selection_workspace(const BatchTopkEncode&);
void selection_threshold_encode(const ThresholdEncode&, void* stream);
void selection_batch_topk_encode(const BatchTopkEncode&, void* stream);
}  // namespace cuda

}  // namespace isthmus
