// The aggregate posterior on CUDA; what is computed stands in aggregate.inl. The joint density is a mixture
// (mixture.cuh). Of the marginals a thread owns one row, or one component, at one dimension, and walks over the other
// side: neighbours read neighbouring dimensions, and all rows of a block share the components in L1.
#pragma once

#include "pairwise/mixture.cuh"

namespace isthmus::cuda {
namespace {

template <class C>
struct AggregatePlan {
  Components<C> components;
  SumPlan<C> sum;

  AggregatePlan(const Aggregate& args, Arena& arena)
      : components(args.pairs, true, arena), sum(args.pairs.rows, args.pairs.components, arena) {}
};

template <class C>
struct AggregateBackwardPlan {
  Components<C> components;
  KeptSums<C> to_rows, to_components;

  AggregateBackwardPlan(const AggregateBackward& args, Arena& arena)
      : components(args.pairs, true, arena),
        to_rows(Side::rows, args.pairs.rows, args.pairs.dim, args.grad_z != nullptr, arena),
        to_components(Side::components, args.pairs.components, args.pairs.dim, args.grad_mean != nullptr, arena) {}
};

template <class T>
__global__ void __launch_bounds__(block_threads)
    marginal_kernel(const T* z, Components<Compute<T>> components, RowWeights<T> weights, Compute<T>* log_marginal) {
  using C = Compute<T>;
  constexpr int group = 8;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x, dim = components.dim;
  if (i >= components.count * dim) return;
  const int64_t row = i / dim, d = i % dim;
  const C own = to_compute(z[i]);
  LogSum<C> sum;
  for (int64_t first = 0; first < components.count; first += group) {
    C terms[group];
#pragma unroll
    for (int n = 0; n < group; ++n) {
      const int64_t k = first + n, at = k * dim + d;
      if (k < components.count) {
        const C t = own * components.slope[at] - components.shift[at];
        terms[n] = components.density[at] + weights.of_pair(row, k) - t * t / 2;
      } else {
        terms[n] = -infinity<C>();
      }
    }
    sum.template meet<group>([&](int n) { return terms[n]; });
  }
  log_marginal[i] = sum.value() + weights.constant;
}

// Adds to the sums that the joint density has left.
template <class T, Side Kept>
__global__ void __launch_bounds__(block_threads)
    pull_marginal_kernel(const T* z, Components<Compute<T>> components, RowWeights<T> weights,
                         const Compute<T>* log_marginal, const Compute<T>* grad, KeptSums<Compute<T>> sums) {
  using C = Compute<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x, dim = components.dim;
  if (i >= components.count * dim) return;
  const int64_t mine = i / dim, d = i % dim;
  C one = 0, two = 0;
  for (int64_t other = 0; other < components.count; ++other) {
    const int64_t row = Kept == Side::rows ? mine : other, k = Kept == Side::rows ? other : mine;
    const int64_t at_row = row * dim + d, at = k * dim + d;
    const C t = to_compute(z[at_row]) * components.slope[at] - components.shift[at];
    const C term = components.density[at] + weights.of_pair(row, k) + weights.constant - t * t / 2;
    const C weight = responsibility(term, C(0), log_marginal[at_row], grad[at_row]), weighted = weight * t;
    one += Kept == Side::rows ? -weighted * components.slope[at] : weighted;
    if constexpr (Kept == Side::components) two += weighted * t - weight;
  }
  sums.first[i] += one;
  if constexpr (Kept == Side::components) sums.second[i] += two;
}

template <class T, Side Kept>
void pull_marginal(const AggregateBackward& args, const Components<Compute<T>>& components,
                   const RowWeights<T>& weights, const KeptSums<Compute<T>>& sums, void* stream) {
  using C = Compute<T>;
  launch("aggregate_backward", pull_marginal_kernel<T, Kept>,
         divide_up(components.count * components.dim, block_threads), block_threads, 0, stream,
         static_cast<const T*>(args.pairs.z), components, weights, static_cast<const C*>(args.log_marginal),
         static_cast<const C*>(args.grad_marginal), sums);
}

}  // namespace
}  // namespace isthmus::cuda
