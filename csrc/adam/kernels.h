// Adam for matrices whose rows are directions, free of torch. All pointers are to contiguous memory.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"

namespace isthmus {

// One step of Adam with decoupled weight decay, in place. For every element, with its gradient g,
//     m ← beta1 · m + (1 - beta1) g
//     v ← beta2 · v + (1 - beta2) g²
//     w ← keep · w - rate · m / (spread · √v + epsilon)
// unit_norm: g is first rid of its part along the row of w, and w is scaled to length 1 in the end. A row of zeros has
// no direction: its gradient is taken whole, and if it does not move it stays. skip_zero_rows: a row whose gradient is
// zero throughout is left as it is, moments included.
struct AdamRows {
  DType dtype;  // of weight and grad; the moments are in the accumulate type
  int64_t rows, cols;
  double beta1, beta2, epsilon;
  double keep;    // 1 - lr · weight_decay
  double rate;    // lr / (1 - beta1^step)
  double spread;  // 1 / √(1 - beta2^step)
  bool unit_norm, skip_zero_rows;
  const void* grad;  // [rows, cols], as are all
  void* weight;
  void* exp_avg;     // m
  void* exp_avg_sq;  // v
};

struct AdamKernels {
  void (*rows)(const AdamRows&);
};

ISTHMUS_DECLARE_KERNELS(AdamKernels, adam)

// CUDA: the same arguments with device pointers. Launches on `stream` (a cudaStream_t) of the current device and
// returns without waiting.
namespace cuda {
void adam_rows(const AdamRows&, void* stream);
}  // namespace cuda

}  // namespace isthmus
