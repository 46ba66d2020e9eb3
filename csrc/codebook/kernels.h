// Vector quantization: nearest code, its gradient, and the statistics of a codebook update; free of torch. All pointers
// are to contiguous memory.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"

namespace isthmus {

// For each row of x the code of least |x - c|²: the lowest index on ties, 0 if no distance is a number.
struct CodeSearch {
  DType dtype;
  int64_t rows, codes, dim;
  const void* x;         // [rows, dim]
  const void* codebook;  // [codes, dim], codes >= 1
  int64_t* indices;      // [rows]
  void* quantized;       // [rows, dim]: the codes themselves
  void* squared_error;   // [rows] in the accumulate type; null if only the indices are wanted
  void* workspace;       // CUDA: cuda::codebook_workspace() bytes; the CPU brings its own
};

// Of the straight-through estimate: with t = 2 (x - c) · grad_error, grad_x = grad_quantized + commitment_weight · t
// and grad_codebook[k] = -Σ t over the rows of code k.
struct QuantizeBackward {
  DType dtype;
  int64_t rows, codes, dim;
  double commitment_weight;
  const void* grad_quantized;  // [rows, dim]
  const void* grad_error;      // [rows] in the accumulate type
  const void* x;               // [rows, dim]
  const void* codebook;        // [codes, dim]
  const int64_t* indices;      // [rows], each in [0, codes)
  void* grad_x;                // [rows, dim]
  void* grad_codebook;         // [codes, dim]
  void* workspace;
};

// How many rows each code received, and their sum.
struct CodeStatistics {
  DType dtype;
  int64_t rows, codes, dim;
  const void* x;           // [rows, dim]
  const int64_t* indices;  // [rows], each in [0, codes)
  void* counts;            // [codes] in the accumulate type
  void* sums;              // [codes, dim] in the accumulate type
  void* workspace;
};

struct CodebookKernels {
  void (*search)(const CodeSearch&);
  void (*backward)(const QuantizeBackward&);
  void (*statistics)(const CodeStatistics&);
};

ISTHMUS_DECLARE_KERNELS(CodebookKernels, codebook)

// CUDA: the same arguments with device pointers, fewer than 2³¹ codes. Launches on `stream` (a cudaStream_t) of the
// current device and returns without waiting. Indices cannot be checked beforehand without waiting, so an index out of
// range stops the device with a message, as torch's own indexing does.
namespace cuda {
int64_t codebook_workspace(const CodeSearch&);
int64_t codebook_workspace(const QuantizeBackward&);
int64_t codebook_workspace(const CodeStatistics&);
void codebook_search(const CodeSearch&, void* stream);
void codebook_backward(const QuantizeBackward&, void* stream);
void codebook_statistics(const CodeStatistics&, void* stream);
}  // namespace cuda

}  // namespace isthmus
