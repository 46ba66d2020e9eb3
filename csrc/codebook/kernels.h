// Vector quantization: nearest codes, their gradient, and the statistics and updates of a codebook; free of torch. All
// pointers are to contiguous memory but for x, whose rows and heads may be apart.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"
#include "core/metric.h"

namespace isthmus {

// How the quantized vector passes its gradient on: to x unchanged, to x through the rotation and scaling that takes x
// to its code, or to the code.
enum class CodeGradient { straight_through, rotation, codebook };

// For each row of x its best codes, which have most of -|x - c|², x·c / |c| (0 for a code of zeros) or x·c: best first,
// the lower index first among equals. The order is that of the scores in exact arithmetic, up to the rounding of
// float64. A row that holds a NaN gets the indices 0, 1, …; a code that holds one comes last.
struct CodeSearch {
  DType dtype;
  Metric metric;
  int64_t heads, rows, codes, dim, best;  // each head has a codebook of its own; 1 <= best <= codes
  const void* x;                          // row r of head h begins at x[h · head_stride + r · row_stride]
  int64_t head_stride, row_stride;
  const void* codebook;  // [heads, codes, dim], codes >= 1
  const bool* mask;      // [heads, rows]; false: all indices are -1. null: every row counts
  int64_t* indices;      // [heads, rows, best]
  void* quantized;       // [heads, rows, dim]: the best codes themselves, zeros where masked
  void* squared_error;   // [heads, rows] in the accumulate type: |x - c|², 0 where masked; null: only the indices
  void* workspace;       // CUDA: cuda::codebook_workspace() bytes; the CPU brings its own
};

// The best code of each row, and by the same scores with the roles exchanged (x·c / |x| for cosine) the best row of
// each code, as CodeSearch has it.
struct CodeMatch {
  DType dtype;
  Metric metric;
  int64_t heads, rows, codes, dim;
  const void* x;          // [heads, rows, dim], rows >= 1
  const void* codebook;   // [heads, codes, dim], codes >= 1
  int64_t* nearest_code;  // [heads, rows]
  int64_t* nearest_row;   // [heads, codes]
  void* workspace;
};

static inline CodeMatch exchanged(const CodeMatch& m) {
  return {m.dtype,    m.metric, m.heads,       m.codes,        m.rows,     m.dim,
          m.codebook, m.x,      m.nearest_row, m.nearest_code, m.workspace};
}

// One half of it.
static inline CodeSearch search_of(const CodeMatch& m) {
  return {.dtype = m.dtype,
          .metric = m.metric,
          .heads = m.heads,
          .rows = m.rows,
          .codes = m.codes,
          .dim = m.dim,
          .best = 1,
          .x = m.x,
          .head_stride = m.rows * m.dim,
          .row_stride = m.dim,
          .codebook = m.codebook,
          .mask = nullptr,
          .indices = m.nearest_code,
          .quantized = nullptr,
          .squared_error = nullptr,
          .workspace = m.workspace};
}

// With t = 2 (x - c) · grad_error: grad_x = (what CodeGradient sends to x) + commitment_weight · t, grad_codebook[k] =
// Σ over the rows of code k of (what CodeGradient sends to the code) - t. Rows of index -1 are left out: grad_x is 0.
struct QuantizeBackward {
  DType dtype;
  CodeGradient gradient;
  int64_t heads, rows, codes, dim;
  double commitment_weight;
  const void* grad_quantized;  // [heads, rows, dim]
  const void* grad_error;      // [heads, rows] in the accumulate type
  const void* x;               // [heads, rows, dim]
  const void* codebook;        // [heads, codes, dim]
  const int64_t* indices;      // [heads, rows], each in [-1, codes)
  void* grad_x;                // [heads, rows, dim]; null: not wanted
  void* grad_codebook;         // [heads, codes, dim]; null: not wanted, and then nothing is sorted
  void* workspace;
};

// How many rows each code received, and their sum.
struct CodeStatistics {
  DType dtype;
  int64_t rows, codes, dim;
  const void* x;           // [rows, dim]
  const int64_t* indices;  // [rows], each in [-1, codes); rows of index -1 are left out
  void* counts;            // [codes] in the accumulate type
  void* sums;              // [codes, dim] in the accumulate type
  void* workspace;
};

// One step of a codebook that learns by moving averages, in place. For each head, with its N = Σ counts and
// r_k = (1 - decay) · (weight of code k):
//     usage_k ← usage_k + r_k (counts_k · codes / N - usage_k)        in units of the mean hits of a code
//     sums_k  ← sums_k  + r_k (batch_sums_k · codes / N - sums_k)
//     code_k  ← sums_k / smoothed usage_k,   smoothed = (usage_k + epsilon) · U / (U + codes · epsilon), U = Σ usage
// A code with a usage of 1e-12 or less stays where it is: the quotient has lost its digits. Then a code whose usage is
// below revive_below becomes its candidate, with a usage of 1. A head with N = 0 is left as it is.
struct CodebookUpdate {
  DType dtype;  // of codebook and candidates; all else is in the accumulate type
  int64_t heads, codes, dim;
  double decay, epsilon, revive_below;
  bool normalize;      // codes, and what is revived, are scaled to length 1; zeros stay
  const void* counts;  // [heads, codes]
  const void*
      batch_sums;  // [heads, codes, dim]; null, with sums: the codebook learns otherwise, only usage is averaged
  const void* code_weight;  // [heads, codes]; null: all 1
  const void* candidates;   // [heads, codes, dim], one with a NaN is none; null: nothing is revived
  void* usage;              // [heads, codes]
  void* sums;               // [heads, codes, dim]
  void* codebook;           // [heads, codes, dim]
  void* workspace;
};

struct CodebookKernels {
  void (*search)(const CodeSearch&);
  void (*match)(const CodeMatch&);
  void (*gather)(const CodeSearch&);  // for indices that are given, -1 for masked rows: quantized and squared_error
  void (*backward)(const QuantizeBackward&);
  void (*statistics)(const CodeStatistics&);
  void (*update)(const CodebookUpdate&);
};

ISTHMUS_DECLARE_MATRIX_KERNELS(CodebookKernels, codebook)

// CUDA: the same arguments with device pointers, fewer than 2³¹ codes. Launches on `stream` (a cudaStream_t) of the
// current device and returns without waiting. Indices cannot be checked beforehand without waiting, so an index out of
// range stops the device with a message, as torch's own indexing does.
namespace cuda {
int64_t codebook_workspace(const CodeSearch&);
int64_t codebook_workspace(const CodeMatch&);
int64_t codebook_workspace(const QuantizeBackward&);
int64_t codebook_workspace(const CodeStatistics&);
int64_t codebook_workspace(const CodebookUpdate&);
void codebook_search(const CodeSearch&, void* stream);
void codebook_match(const CodeMatch&, void* stream);
void codebook_gather(const CodeSearch&, void* stream);
void codebook_backward(const QuantizeBackward&, void* stream);
void codebook_statistics(const CodeStatistics&, void* stream);
void codebook_update(const CodebookUpdate&, void* stream);
}  // namespace cuda

}  // namespace isthmus
