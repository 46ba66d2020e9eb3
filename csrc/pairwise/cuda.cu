// Terms over all pairs on CUDA: engine.cuh has the tile of scores, one file has each term; here are the launches.

#include <cmath>

#include "pairwise/aggregate.cuh"
#include "pairwise/discrepancy.cuh"
#include "pairwise/mixture.cuh"

namespace isthmus::cuda {
namespace {

template <template <class> class Plan, class Args>
int64_t workspace_of(DType dtype, const Args& args) {
  Arena arena(nullptr);
  dispatch_dtype(dtype, [&]<class T>() { Plan<Compute<T>>(args, arena); });
  return arena.used;
}

}  // namespace

int64_t pairwise_workspace(const Mixture& args) { return workspace_of<MixturePlan>(args.pairs.dtype, args); }
int64_t pairwise_workspace(const MixtureBackward& args) {
  return workspace_of<MixtureBackwardPlan>(args.pairs.dtype, args);
}
int64_t pairwise_workspace(const Aggregate& args) { return workspace_of<AggregatePlan>(args.pairs.dtype, args); }
int64_t pairwise_workspace(const AggregateBackward& args) {
  return workspace_of<AggregateBackwardPlan>(args.pairs.dtype, args);
}
int64_t pairwise_workspace(const Discrepancy& args) { return workspace_of<DiscrepancyPlan>(args.dtype, args); }
int64_t pairwise_workspace(const DiscrepancyBackward& args) {
  return workspace_of<DiscrepancyBackwardPlan>(args.of.dtype, args);
}

void pairwise_mixture(const Mixture& args, void* stream) {
  dispatch_dtype(args.pairs.dtype, [&]<class T>() {
    using C = Compute<T>;
    Arena arena(args.workspace);
    const MixturePlan<C> plan(args, arena);
    fill_weighted_components<T>(args, plan.components, stream);
    sum_scores(static_cast<const T*>(args.pairs.z), args.pairs.rows, plan.components, row_weights<T>(args), args.over,
               plan.sum, args.log_prob, args.normalizer, stream);
  });
}

void pairwise_mixture_backward(const MixtureBackward& args, void* stream) {
  dispatch_dtype(args.pairs.dtype, [&]<class T>() {
    using C = Compute<T>;
    Arena arena(args.workspace);
    const MixtureBackwardPlan<C> plan(args, arena);
    const GaussianPairs& pairs = args.pairs;
    const T* z = static_cast<const T*>(pairs.z);
    const RowWeights<T> weights = row_weights<T>(args);
    const int64_t sums = args.over == SumOver::components ? pairs.rows : pairs.components;
    const Outer<C> outer(args.over, args.normalizer, args.grad, sums);
    fill_weighted_components<T>(args, plan.components, stream);
    if (plan.want_rows) {
      pull<T, Side::rows>(z, pairs.rows, plan.components, weights, outer, plan.to_rows, stream);
      round_to<T>(plan.to_rows.first, pairs.rows * pairs.dim, args.grad_z, stream);
    }
    if (plan.want_components) {
      pull<T, Side::components>(z, pairs.rows, plan.components, weights, outer, plan.to_components, stream);
      write_component_gradients<T>(pairs, plan.components, plan.to_components, args.grad_mean, args.grad_scale, stream);
    }
    if (args.over == SumOver::components) {
      round_to<T>(plan.to_components.weight, pairs.components, args.grad_log_weight, stream);
    } else {
      round_to<T>(plan.to_rows.weight, pairs.rows, args.grad_log_weight, stream);
    }
  });
}

void pairwise_aggregate(const Aggregate& args, void* stream) {
  dispatch_dtype(args.pairs.dtype, [&]<class T>() {
    using C = Compute<T>;
    Arena arena(args.workspace);
    const AggregatePlan<C> plan(args, arena);
    const GaussianPairs& pairs = args.pairs;
    const T* z = static_cast<const T*>(pairs.z);
    const RowWeights<T> weights = aggregate_weights<T>(args.weights, pairs.rows);
    fill_components<T>(pairs, nullptr, C(0), plan.components, stream);
    sum_scores(z, pairs.rows, plan.components, weights, SumOver::components, plan.sum, args.log_joint, args.normalizer,
               stream);
    launch("aggregate", marginal_kernel<T>, divide_up(pairs.rows * pairs.dim, block_threads), block_threads, 0, stream,
           z, plan.components, weights, static_cast<C*>(args.log_marginal));
  });
}

void pairwise_aggregate_backward(const AggregateBackward& args, void* stream) {
  dispatch_dtype(args.pairs.dtype, [&]<class T>() {
    using C = Compute<T>;
    Arena arena(args.workspace);
    const AggregateBackwardPlan<C> plan(args, arena);
    const GaussianPairs& pairs = args.pairs;
    const T* z = static_cast<const T*>(pairs.z);
    const RowWeights<T> weights = aggregate_weights<T>(args.weights, pairs.rows);
    const Outer<C> outer(SumOver::components, args.normalizer, args.grad_joint, pairs.rows);
    fill_components<T>(pairs, nullptr, C(0), plan.components, stream);
    if (args.grad_z != nullptr) {
      pull<T, Side::rows>(z, pairs.rows, plan.components, weights, outer, plan.to_rows, stream);
      pull_marginal<T, Side::rows>(args, plan.components, weights, plan.to_rows, stream);
      round_to<T>(plan.to_rows.first, pairs.rows * pairs.dim, args.grad_z, stream);
    }
    if (args.grad_mean != nullptr) {
      pull<T, Side::components>(z, pairs.rows, plan.components, weights, outer, plan.to_components, stream);
      pull_marginal<T, Side::components>(args, plan.components, weights, plan.to_components, stream);
      write_component_gradients<T>(pairs, plan.components, plan.to_components, args.grad_mean, args.grad_scale, stream);
    }
  });
}

void pairwise_discrepancy(const Discrepancy& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    Arena arena(args.workspace);
    const DiscrepancyPlan<C> plan(args, arena);
    const Points<T> x{static_cast<const T*>(args.x), args.x_rows}, y{static_cast<const T*>(args.y), args.y_rows};
    sum_pairs<T, Pairs::above_diagonal>(args, x, x, plan.above_x, stream);
    sum_pairs<T, Pairs::above_diagonal>(args, y, y, plan.above_y, stream);
    sum_pairs<T, Pairs::all>(args, x, y, plan.across, stream);
    launch("discrepancy", combine_kernel<C>, 1, block_threads, 0, stream, args, plan);
  });
}

void pairwise_discrepancy_backward(const DiscrepancyBackward& args, void* stream) {
  const Discrepancy& of = args.of;
  dispatch_dtype(of.dtype, [&]<class T>() {
    using C = Compute<T>;
    Arena arena(args.workspace);
    const DiscrepancyBackwardPlan<C> plan(args, arena);
    const Points<T> x{static_cast<const T*>(of.x), of.x_rows}, y{static_cast<const T*>(of.y), of.y_rows};
    const C* grad = static_cast<const C*>(args.grad);
    const C across = static_cast<C>(-4 * of.weight_xy);
    const auto pull_sample = [&](const Points<T>& own, double weight, const Points<T>& other, void* gradient) {
      if (gradient == nullptr) return;
      pull_points(of, own, own, grad, static_cast<C>(4 * weight), true, plan.sums, stream);
      pull_points(of, own, other, grad, across, false, plan.sums, stream);
      round_to<T>(plan.sums, own.count * of.dim, gradient, stream);
    };
    pull_sample(x, of.weight_x, y, args.grad_x);
    pull_sample(y, of.weight_y, x, args.grad_y);
  });
}

}  // namespace isthmus::cuda
