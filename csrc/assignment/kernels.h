// Soft and stochastic assignment of vectors to codes, free of torch: a softmax over the codes whose [rows, codes]
// probabilities are never stored. All pointers are to contiguous memory.
#pragma once

#include <cstdint>

#include "codebook/kernels.h"

namespace isthmus {

// logit(i, k) = score / temperature, where the score is what the metric has most of: -|x - c|², the cosine x·c / |x||c|
// (0 if either is zero) or x·c; p(k | i) = softmax over k.
struct Assignment {
  DType dtype;
  Metric metric;
  double temperature;
  int64_t heads, rows, codes, dim;  // each head has a codebook of its own; codes >= 1
  const void* x;                    // [heads, rows, dim]
  const void* codebook;             // [heads, codes, dim]
  const bool* mask;                 // [heads, rows]; false: the row is left out. null: every row counts
};

// With a key, the logits of a softmax become (logit + noise) / relaxation: element row · codes + code of the Gumbel
// stream, row counted over all heads.
struct Gumbel {
  const int64_t* key;  // two words; null: no noise
  double relaxation;
};

// The code of the greatest logit + noise: a sample of p. The lowest of equals; 0 for a row with a NaN; -1 where masked.
struct CodeSample {
  Assignment of;
  const int64_t* key;
  int64_t* indices;  // [heads, rows]
  void* workspace;   // CUDA: assignment_workspace() bytes; the CPU brings its own
};

// Σ_k p_k c_k and its most probable code. Masked rows: zeros and -1.
struct SoftQuantize {
  Assignment of;
  Gumbel gumbel;
  bool hard;         // quantized is the most probable code instead of the sum
  void* quantized;   // [heads, rows, dim]
  int64_t* indices;  // [heads, rows]
  void* centred;     // [heads, rows, dim] in the accumulate type: the sum less the mean code (euclidean)
  void* normalizer;  // [2, heads, rows] in the accumulate type: the greatest logit, and what log Σ exp is beyond it
  void* workspace;
};

// Gradients of the sum. They are null where nobody wants them.
struct SoftQuantizeBackward {
  Assignment of;
  Gumbel gumbel;
  const void* grad;                  // [heads, rows, dim]
  const void *centred, *normalizer;  // of the forward pass
  void* grad_x;                      // [heads, rows, dim]
  void* grad_codebook;               // [heads, codes, dim]
  void* workspace;
};

// The entropy of p for each row (0 where masked), and Σ p over the rows for each code.
struct SoftStatistics {
  Assignment of;
  void* entropy;     // [heads, rows] in the accumulate type
  void* usage;       // [heads, codes] in the accumulate type
  void* normalizer;  // [2, heads, rows]
  void* workspace;
};

struct SoftStatisticsBackward {
  Assignment of;
  const void *entropy, *normalizer;  // of the forward pass
  const void* grad_entropy;          // null: zeros
  const void* grad_usage;            // null: zeros
  void* grad_x;
  void* grad_codebook;
  void* workspace;
};

// -log p(index | row). Rows of index -1 are left out: their loss is 0.
struct CodeCrossEntropy {
  Assignment of;
  const int64_t* indices;  // [heads, rows], each in [-1, codes)
  void* loss;              // [heads, rows] in the accumulate type
  void* normalizer;        // [2, heads, rows]
  void* workspace;
};

struct CodeCrossEntropyBackward {
  Assignment of;
  const int64_t* indices;
  const void *grad, *normalizer;  // grad: [heads, rows] in the accumulate type
  void* grad_x;
  void* grad_codebook;
  void* workspace;
};

struct AssignmentKernels {
  void (*sample)(const CodeSample&);
  void (*soft_quantize)(const SoftQuantize&);
  void (*soft_quantize_backward)(const SoftQuantizeBackward&);
  void (*soft_statistics)(const SoftStatistics&);
  void (*soft_statistics_backward)(const SoftStatisticsBackward&);
  void (*cross_entropy)(const CodeCrossEntropy&);
  void (*cross_entropy_backward)(const CodeCrossEntropyBackward&);
};

ISTHMUS_DECLARE_KERNELS(AssignmentKernels, assignment)

// CUDA: the same arguments with device pointers. Launches on `stream` (a cudaStream_t) of the current device and
// returns without waiting.
namespace cuda {
int64_t assignment_workspace(const CodeSample&);
int64_t assignment_workspace(const SoftQuantize&);
int64_t assignment_workspace(const SoftQuantizeBackward&);
int64_t assignment_workspace(const SoftStatistics&);
int64_t assignment_workspace(const SoftStatisticsBackward&);
int64_t assignment_workspace(const CodeCrossEntropy&);
int64_t assignment_workspace(const CodeCrossEntropyBackward&);
void assignment_sample(const CodeSample&, void* stream);
void assignment_soft_quantize(const SoftQuantize&, void* stream);
void assignment_soft_quantize_backward(const SoftQuantizeBackward&, void* stream);
void assignment_soft_statistics(const SoftStatistics&, void* stream);
void assignment_soft_statistics_backward(const SoftStatisticsBackward&, void* stream);
void assignment_cross_entropy(const CodeCrossEntropy&, void* stream);
void assignment_cross_entropy_backward(const CodeCrossEntropyBackward&, void* stream);
}  // namespace cuda

}  // namespace isthmus
