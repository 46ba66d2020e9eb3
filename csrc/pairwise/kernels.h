// Terms over all pairs of two sets of vectors, free of torch: mixture densities, the aggregate posterior, maximum mean
// discrepancy. All pointers are to contiguous memory; nothing of the size of the pairs is ever stored.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"
#include "core/scale_type.h"

namespace isthmus {

// Rows z_i and diagonal Gaussians (m_k, s_k). The score of a pair is log N(z_i; m_k, s_k²).
struct GaussianPairs {
  DType dtype;
  ScaleType scale_type;
  int64_t rows, components, dim;
  const void* z;      // [rows, dim]
  const void* mean;   // [components, dim]
  const void* scale;  // [components, dim]
};

enum class SumOver : int { components, rows };

// log Σ exp(log_weight + score): a mixture density for each row, or the weighted density of all rows for each
// component.
struct Mixture {
  GaussianPairs pairs;
  SumOver over;
  const void* log_weight;  // one for each term of the sum: [components] or [rows]; null: minus the log of their number
  void* log_prob;          // in the accumulate type: [rows] over components, [components] over rows
  void* normalizer;        // [2, …] like log_prob: the greatest term of each sum, and what log Σ exp is beyond it
  void* workspace;         // CUDA: pairwise_workspace() bytes; the CPU brings its own
};

// Gradients are null where nobody wants them; grad_mean and grad_scale come together.
struct MixtureBackward {
  GaussianPairs pairs;
  SumOver over;
  const void* log_weight;
  const void* normalizer;  // of the forward pass
  const void* grad;        // of log_prob
  void* grad_z;            // [rows, dim]
  void* grad_mean;         // [components, dim]
  void* grad_scale;        // [components, dim]
  void* grad_log_weight;   // like log_weight
  void* workspace;
};

// Row i is a sample of component i. With weights that depend on (j - i) mod rows alone,
//     log_joint[i]       = log Σ_j w_ij N(z_i; m_j, s_j²)
//     log_marginal[i][d] = log Σ_j w_ij N(z_id; m_jd, s_jd²)
struct AggregateWeights {
  double log_self, log_next, log_other;  // j = i, j = i + 1 mod rows, all others
};

struct Aggregate {
  GaussianPairs pairs;
  AggregateWeights weights;
  void* log_joint;     // [rows] in the accumulate type
  void* log_marginal;  // [rows, dim] in the accumulate type
  void* normalizer;    // [2, rows], of log_joint
  void* workspace;
};

struct AggregateBackward {
  GaussianPairs pairs;
  AggregateWeights weights;
  const void *log_marginal, *normalizer;   // of the forward pass
  const void *grad_joint, *grad_marginal;  // of log_joint and log_marginal
  void* grad_z;                            // as in MixtureBackward
  void* grad_mean;
  void* grad_scale;
  void* workspace;
};

// k(x, y) = Σ_h exp(-u) ("rbf") or Σ_h 1 / (1 + u) ("imq"), u = factor_h |x - y|².
enum class DistanceKernel : int { rbf, imq };

struct KernelSum {
  static constexpr int max_count = 32;
  DistanceKernel kernel;
  int count;
  double factors[max_count];  // 1 / (2 h²)
};

// The squared distance of the mean embeddings of two samples,
//     2 (weight_x Σ_{i<j} k(x_i, x_j) + weight_y Σ_{i<j} k(y_i, y_j) - weight_xy Σ_ij k(x_i, y_j)) + diagonal
struct Discrepancy {
  DType dtype;
  KernelSum kernel;
  double weight_x, weight_y, weight_xy;
  double diagonal;  // what the pairs i = j within a sample contribute
  int64_t x_rows, y_rows, dim;
  const void* x;  // [x_rows, dim]
  const void* y;  // [y_rows, dim]
  void* value;    // one number in the accumulate type
  void* workspace;
};

struct DiscrepancyBackward {
  Discrepancy of;
  const void* grad;  // one number in the accumulate type
  void* grad_x;      // [x_rows, dim], or null
  void* grad_y;      // [y_rows, dim], or null
  void* workspace;
};

struct PairwiseKernels {
  void (*mixture)(const Mixture&);
  void (*mixture_backward)(const MixtureBackward&);
  void (*aggregate)(const Aggregate&);
  void (*aggregate_backward)(const AggregateBackward&);
  void (*discrepancy)(const Discrepancy&);
  void (*discrepancy_backward)(const DiscrepancyBackward&);
};

ISTHMUS_DECLARE_KERNELS(PairwiseKernels, pairwise)

// CUDA: the same arguments with device pointers. Launches on `stream` (a cudaStream_t) of the current device and
// returns without waiting.
namespace cuda {
int64_t pairwise_workspace(const Mixture&);
int64_t pairwise_workspace(const MixtureBackward&);
int64_t pairwise_workspace(const Aggregate&);
int64_t pairwise_workspace(const AggregateBackward&);
int64_t pairwise_workspace(const Discrepancy&);
int64_t pairwise_workspace(const DiscrepancyBackward&);
void pairwise_mixture(const Mixture&, void* stream);
void pairwise_mixture_backward(const MixtureBackward&, void* stream);
void pairwise_aggregate(const Aggregate&, void* stream);
void pairwise_aggregate_backward(const AggregateBackward&, void* stream);
void pairwise_discrepancy(const Discrepancy&, void* stream);
void pairwise_discrepancy_backward(const DiscrepancyBackward&, void* stream);
}  // namespace cuda

}  // namespace isthmus
