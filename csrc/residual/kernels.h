// Residual vector quantization: every stage codes what the stages before it left over; free of torch. All pointers are
// to contiguous memory.
#pragma once

#include "codebook/kernels.h"

namespace isthmus {

// What is coded, and with what. The codebooks of a group's stages follow each other in one table.
struct ResidualCodes {
  DType dtype;
  int64_t groups, rows, dim, stages;
  int64_t codes;         // of all stages together: rows of a table
  const int64_t* sizes;  // [stages], in host memory for CUDA too: the codes of each stage, >= 1
  const void* x;         // [groups, rows, dim]
  const void* tables;    // [groups, codes, dim]
};

// With r_0 = x and r_{q+1} = r_q - c_q in the compute type, c_q is the code of stage q that is nearest to r_q (exactly,
// as in CodeSearch). A beam b > 1 keeps the b sequences of codes that leave the least |r|² after each stage and returns
// the best; of equals that whose beginning was better, then that of the lower last index.
struct ResidualSearch {
  ResidualCodes codes;
  int64_t beam;           // >= 1
  const int64_t* active;  // [groups, rows], each in [0, stages]: how many stages code a row. null: all
  int64_t* indices;       // [groups, rows, stages]: within the codebook of the stage; -1 for a stage that is not active
  void* quantized;        // [groups, rows, dim]: c_0 + c_1 + …, added in this order in the compute type
  void* squared_error;    // [groups, rows, stages] in the accumulate type: |r_q - c_q|², 0 for a stage not active
  void* workspace;        // CUDA: cuda::residual_workspace() bytes; the CPU brings its own
};

// With t_q = 2 (r_q - c_q) · grad_error_q: grad_x = (what CodeGradient sends through x → c_0 + c_1 + …) +
// commitment_weight · Σ_q t_q, and the gradient of a code is -Σ t_q over the rows that stage q gave it. A stage of
// index -1 is left out; a row without any stage has grad_x = 0.
struct ResidualBackward {
  ResidualCodes codes;
  CodeGradient gradient;  // straight_through or rotation
  double commitment_weight;
  const void* grad_quantized;  // [groups, rows, dim]
  const void* grad_error;      // [groups, rows, stages] in the accumulate type
  const int64_t* indices;      // [groups, rows, stages], each in [-1, size of the stage)
  void* grad_x;                // [groups, rows, dim]; null: not wanted
  void* grad_tables;           // [groups, codes, dim]; null: not wanted
  void* workspace;
};

// How many residuals each code received, and their sum.
struct ResidualTotals {
  ResidualCodes codes;
  const int64_t* indices;  // as in ResidualBackward
  void* totals;            // in the accumulate type: counts [groups, codes], and behind them sums [groups, codes, dim]
  void* workspace;
};

struct ResidualKernels {
  void (*search)(const ResidualSearch&);
  void (*backward)(const ResidualBackward&);
  void (*totals)(const ResidualTotals&);
};

ISTHMUS_DECLARE_MATRIX_KERNELS(ResidualKernels, residual)

// CUDA: the same arguments with device pointers but for `sizes`. Launches on `stream` (a cudaStream_t) of the current
// device and returns without waiting. An index or a number of active stages out of range stops the device with a
// message.
namespace cuda {
int64_t residual_workspace(const ResidualSearch&);
int64_t residual_workspace(const ResidualBackward&);
int64_t residual_workspace(const ResidualTotals&);
void residual_search(const ResidualSearch&, void* stream);
void residual_backward(const ResidualBackward&, void* stream);
void residual_totals(const ResidualTotals&, void* stream);
}  // namespace cuda

}  // namespace isthmus
