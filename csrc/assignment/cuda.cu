// Soft and stochastic assignment on CUDA: engine.cuh has the tile of logits; here are the launches.

#include "assignment/backward.cuh"
#include "assignment/forward.cuh"

namespace isthmus::cuda {
namespace {

template <class C>
C* take_if(bool wanted, int64_t count, Arena& arena) {
  return wanted ? arena.take<C>(count) : nullptr;
}

int64_t row_count(const Assignment& of) { return of.heads * of.rows; }

template <class C>
struct SamplePlan {
  Problem<C> problem;
  SummaryPlan<C> summary;
  SamplePlan(const CodeSample& args, Arena& arena)
      : problem(args.of, nullptr, {args.key, 1}, arena), summary(args.of, arena) {}
};

template <class C>
struct SoftQuantizePlan {
  Problem<C> problem;
  SummaryPlan<C> summary;
  PassPlan<C> over_codes;
  SoftQuantizePlan(const SoftQuantize& args, Arena& arena)
      : problem(args.of, nullptr, args.gumbel, arena),
        summary(args.of, arena),
        over_codes(args.of, Side::rows, true, arena) {}
};

template <class C>
struct SoftQuantizeBackwardPlan {
  Problem<C> problem;
  GradientPlan<C> gradients;
  C *incoming, *centre, *averaged;
  SoftQuantizeBackwardPlan(const SoftQuantizeBackward& args, Arena& arena)
      : problem(args.of, nullptr, args.gumbel, arena),
        gradients(args.of, args.grad_x != nullptr, args.grad_codebook != nullptr, arena),
        incoming(arena.take<C>(row_count(args.of) * args.of.dim)),
        centre(arena.take<C>(row_count(args.of))),
        averaged(take_if<C>(args.grad_codebook != nullptr, args.of.heads * args.of.codes * args.of.dim, arena)) {}
};

template <class C>
struct SoftStatisticsPlan {
  Problem<C> problem;
  SummaryPlan<C> summary;
  PassPlan<C> over_rows;
  SoftStatisticsPlan(const SoftStatistics& args, Arena& arena)
      : problem(args.of, nullptr, no_noise, arena),
        summary(args.of, arena),
        over_rows(args.of, Side::codes, true, arena) {}
};

template <class C>
struct SoftStatisticsBackwardPlan {
  Problem<C> problem;
  GradientPlan<C> gradients;
  PassPlan<C> over_codes;
  C* mean_usage;
  SoftStatisticsBackwardPlan(const SoftStatisticsBackward& args, Arena& arena)
      : problem(args.of, nullptr, no_noise, arena),
        gradients(args.of, args.grad_x != nullptr, args.grad_codebook != nullptr, arena),
        over_codes(args.of, Side::rows, args.grad_usage != nullptr, arena),
        mean_usage(take_if<C>(args.grad_usage != nullptr, row_count(args.of), arena)) {}
};

template <class C>
struct CrossEntropyPlan {
  Problem<C> problem;
  SummaryPlan<C> summary;
  CrossEntropyPlan(const CodeCrossEntropy& args, Arena& arena)
      : problem(args.of, args.indices, no_noise, arena), summary(args.of, arena) {}
};

template <class C>
struct CrossEntropyBackwardPlan {
  Problem<C> problem;
  GradientPlan<C> gradients;
  CrossEntropyBackwardPlan(const CodeCrossEntropyBackward& args, Arena& arena)
      : problem(args.of, args.indices, no_noise, arena),
        gradients(args.of, args.grad_x != nullptr, args.grad_codebook != nullptr, arena) {}
};

template <template <class> class Plan, class Args>
int64_t workspace_of(const Args& args) {
  Arena arena(nullptr);
  dispatch_dtype(args.of.dtype, [&]<class T>() { Plan<Compute<T>>(args, arena); });
  return arena.used;
}

// Calls f<T>(plan) with the points of rows and codes in place.
template <template <class> class Plan, class Args, class F>
void with_plan(const Args& args, void* stream, F&& f) {
  dispatch_dtype(args.of.dtype, [&]<class T>() {
    Arena arena(args.workspace);
    const Plan<Compute<T>> plan(args, arena);
    place<T>(args.of, plan.problem, stream);
    f.template operator()<T>(plan);
  });
}

}  // namespace

int64_t assignment_workspace(const CodeSample& args) { return workspace_of<SamplePlan>(args); }
int64_t assignment_workspace(const SoftQuantize& args) { return workspace_of<SoftQuantizePlan>(args); }
int64_t assignment_workspace(const SoftQuantizeBackward& args) { return workspace_of<SoftQuantizeBackwardPlan>(args); }
int64_t assignment_workspace(const SoftStatistics& args) { return workspace_of<SoftStatisticsPlan>(args); }
int64_t assignment_workspace(const SoftStatisticsBackward& args) {
  return workspace_of<SoftStatisticsBackwardPlan>(args);
}
int64_t assignment_workspace(const CodeCrossEntropy& args) { return workspace_of<CrossEntropyPlan>(args); }
int64_t assignment_workspace(const CodeCrossEntropyBackward& args) {
  return workspace_of<CrossEntropyBackwardPlan>(args);
}

void assignment_sample(const CodeSample& args, void* stream) {
  with_plan<SamplePlan>(args, stream, [&]<class T>(const auto& plan) {
    using C = Compute<T>;
    summarise<false>(plan.problem, plan.summary, RowResults<C>{args.indices, nullptr, nullptr, nullptr}, stream);
  });
}

void assignment_soft_quantize(const SoftQuantize& args, void* stream) {
  with_plan<SoftQuantizePlan>(args, stream, [&]<class T>(const auto& plan) {
    using C = Compute<T>;
    const Problem<C>& problem = plan.problem;
    C *normalizer = static_cast<C*>(args.normalizer), *centred = static_cast<C*>(args.centred);
    summarise<true>(problem, plan.summary, RowResults<C>{args.indices, normalizer, nullptr, nullptr}, stream);
    run_pass<Side::rows>(problem, Pass<C>{normalizer, nullptr, problem.codebook.vectors, centred, nullptr},
                         plan.over_codes, Probability<C>{problem.unit ? problem.codebook.norms : nullptr}, stream);
    launch("soft assignment", write_soft_kernel<T, C>, divide_up(row_count(args.of) * args.of.dim, block_threads),
           block_threads, 0, stream, problem, static_cast<const C*>(centred), static_cast<const T*>(args.of.codebook),
           static_cast<const int64_t*>(args.indices), args.hard, static_cast<T*>(args.quantized));
  });
}

void assignment_soft_quantize_backward(const SoftQuantizeBackward& args, void* stream) {
  with_plan<SoftQuantizeBackwardPlan>(args, stream, [&]<class T>(const auto& plan) {
    using C = Compute<T>;
    const Problem<C>& problem = plan.problem;
    launch("incoming gradient", incoming_kernel<T, C>, divide_up(row_count(args.of) * warp_size, block_threads),
           block_threads, 0, stream, problem, static_cast<const T*>(args.grad), static_cast<const C*>(args.centred),
           plan.incoming, plan.centre);
    if (args.grad_codebook != nullptr) {
      run_pass<Side::codes>(
          problem, Pass<C>{static_cast<const C*>(args.normalizer), nullptr, plan.incoming, plan.averaged, nullptr},
          plan.gradients.over_rows, Probability<C>{nullptr}, stream);
    }
    differentiate<T>(problem, plan.gradients, args.normalizer, plan.incoming,
                     AverageGradient<C>{problem.codebook.norms, plan.centre}, plan.averaged, args.grad_x,
                     args.grad_codebook, stream);
  });
}

void assignment_soft_statistics(const SoftStatistics& args, void* stream) {
  with_plan<SoftStatisticsPlan>(args, stream, [&]<class T>(const auto& plan) {
    using C = Compute<T>;
    C *normalizer = static_cast<C*>(args.normalizer), *usage = static_cast<C*>(args.usage);
    summarise<true>(plan.problem, plan.summary,
                    RowResults<C>{nullptr, normalizer, static_cast<C*>(args.entropy), nullptr}, stream);
    run_pass<Side::codes>(plan.problem, Pass<C>{normalizer, nullptr, nullptr, nullptr, usage}, plan.over_rows,
                          Probability<C>{nullptr}, stream);
  });
}

void assignment_soft_statistics_backward(const SoftStatisticsBackward& args, void* stream) {
  with_plan<SoftStatisticsBackwardPlan>(args, stream, [&]<class T>(const auto& plan) {
    using C = Compute<T>;
    const C *normalizer = static_cast<const C*>(args.normalizer), *usage = static_cast<const C*>(args.grad_usage);
    if (usage != nullptr) {
      run_pass<Side::rows>(plan.problem, Pass<C>{normalizer, nullptr, nullptr, nullptr, plan.mean_usage},
                           plan.over_codes, WeightedProbability<C>{usage}, stream);
    }
    const StatisticsGradient<C> rule{usage, plan.mean_usage, static_cast<const C*>(args.grad_entropy),
                                     static_cast<const C*>(args.entropy)};
    differentiate<T>(plan.problem, plan.gradients, normalizer, static_cast<const C*>(nullptr), rule,
                     static_cast<const C*>(nullptr), args.grad_x, args.grad_codebook, stream);
  });
}

void assignment_cross_entropy(const CodeCrossEntropy& args, void* stream) {
  with_plan<CrossEntropyPlan>(args, stream, [&]<class T>(const auto& plan) {
    using C = Compute<T>;
    summarise<true>(plan.problem, plan.summary,
                    RowResults<C>{nullptr, static_cast<C*>(args.normalizer), nullptr, static_cast<C*>(args.loss)},
                    stream);
  });
}

void assignment_cross_entropy_backward(const CodeCrossEntropyBackward& args, void* stream) {
  with_plan<CrossEntropyBackwardPlan>(args, stream, [&]<class T>(const auto& plan) {
    using C = Compute<T>;
    const CrossEntropyGradient<C> rule{static_cast<const C*>(args.grad), args.indices, args.of.rows, args.of.codes};
    differentiate<T>(plan.problem, plan.gradients, args.normalizer, static_cast<const C*>(nullptr), rule,
                     static_cast<const C*>(nullptr), args.grad_x, args.grad_codebook, stream);
  });
}

}  // namespace isthmus::cuda
