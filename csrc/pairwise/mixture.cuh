// Mixture densities on CUDA; what is computed stands in mixture.inl.
//
// Rows and components are two sides of one matrix of scores. A block keeps a tile of one side, the *kept* side, and
// walks over the tiles of the other. Forward sums over the other side; backward makes the gradient of the kept side
// and is run once for each side that is wanted. Every sum has one owner and a fixed order: no atomics.
#pragma once

#include "pairwise/engine.cuh"

namespace isthmus::cuda {
namespace {

enum class Side { rows, components };

// ---- forward -------------------------------------------------------------------------------------------------------

// How the tiles of the other side are cut into ranges for different blocks, if the kept side alone does not fill the
// device. Depends on the problem alone.
template <class C>
struct SumPlan {
  int64_t kept, others, tiles, tiles_per_range, ranges;
  LogSum<C>* partial;  // [ranges, kept]

  SumPlan(int64_t kept_, int64_t others_, Arena& arena) : kept(kept_), others(others_) {
    constexpr int64_t enough_blocks = 512;
    tiles = divide_up(kept, tile_size<C>);
    const int64_t other_tiles = others > 0 ? divide_up(others, tile_size<C>) : 1;
    const int64_t wanted = tiles == 0 ? 1 : divide_up(enough_blocks, tiles);
    tiles_per_range = divide_up(other_tiles, wanted < other_tiles ? wanted : other_tiles);
    ranges = divide_up(other_tiles, tiles_per_range);
    partial = arena.take<LogSum<C>>(ranges * kept);
  }
};

// The scores of one kept vector with those of the others are met by 16 threads, which share what they found.
template <class C>
struct SharedSums {
  C top[block_side][tile_size<C>], sum[block_side][tile_size<C>];
};

template <class T, Side Kept>
__global__ void __launch_bounds__(block_threads) sum_kernel(const T* z, int64_t rows, Components<Compute<T>> components,
                                                            RowWeights<T> weights, SumPlan<Compute<T>> plan) {
  using C = Compute<T>;
  constexpr int n = per_thread<C>;
  __shared__ union {
    ScoreSlices<C> slices;
    SharedSums<C> found;
  } shared;
  const int x = threadIdx.x % block_side, y = threadIdx.x / block_side;
  const int own = Kept == Side::rows ? y : x, other = Kept == Side::rows ? x : y;
  const int64_t range = blockIdx.x % plan.ranges, first_kept = blockIdx.x / plan.ranges * tile_size<C>;
  const int64_t begin = range * plan.tiles_per_range * tile_size<C>,
                limit = begin + plan.tiles_per_range * tile_size<C>;
  const int64_t end = limit < plan.others ? limit : plan.others;

  LogSum<C> sums[n];
  for (int64_t first = begin; first < end; first += tile_size<C>) {
    C scores[n][n];
    score_tile(z, rows, components, weights, Kept == Side::rows ? first_kept : first,
               Kept == Side::rows ? first : first_kept, shared.slices, scores);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      sums[i].template meet<n>([&](int j) { return Kept == Side::rows ? scores[i][j] : scores[j][i]; });
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    shared.found.top[other][place<C>(own, i)] = sums[i].top;
    shared.found.sum[other][place<C>(own, i)] = sums[i].sum;
  }
  __syncthreads();
  const int64_t mine = first_kept + threadIdx.x;
  if (threadIdx.x >= tile_size<C> || mine >= plan.kept) return;
  LogSum<C> total;
  for (int i = 0; i < block_side; ++i) {
    LogSum<C> part;
    part.top = shared.found.top[i][threadIdx.x];
    part.sum = shared.found.sum[i][threadIdx.x];
    total.merge(part);
  }
  plan.partial[range * plan.kept + mine] = total;
}

// Writes log_prob [kept] and the normalizer [2, kept].
template <class C>
__global__ void __launch_bounds__(block_threads) merge_ranges_kernel(SumPlan<C> plan, C* log_prob, C* normalizer) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (i >= plan.kept) return;
  LogSum<C> total;
  for (int64_t range = 0; range < plan.ranges; ++range) total.merge(plan.partial[range * plan.kept + i]);
  log_prob[i] = total.value();
  normalizer[i] = total.top;
  normalizer[plan.kept + i] = log(total.sum);
}

template <class T>
void sum_scores(const T* z, int64_t rows, const Components<Compute<T>>& components, const RowWeights<T>& weights,
                SumOver over, const SumPlan<Compute<T>>& plan, void* log_prob, void* normalizer, void* stream) {
  using C = Compute<T>;
  const auto kernel = over == SumOver::components ? sum_kernel<T, Side::rows> : sum_kernel<T, Side::components>;
  launch("mixture", kernel, plan.tiles * plan.ranges, block_threads, 0, stream, z, rows, components, weights, plan);
  launch("mixture ranges", merge_ranges_kernel<C>, divide_up(plan.kept, block_threads), block_threads, 0, stream, plan,
         static_cast<C*>(log_prob), static_cast<C*>(normalizer));
}

// ---- backward ------------------------------------------------------------------------------------------------------

// What the scores were summed over, what forward kept of the sums, and their incoming gradients.
template <class C>
struct Outer {
  SumOver over;
  const C *peak, *log_sum, *grad;

  Outer(SumOver over_, const void* normalizer, const void* grad_, int64_t count)
      : over(over_),
        peak(static_cast<const C*>(normalizer)),
        log_sum(peak + count),
        grad(static_cast<const C*>(grad_)) {}
};

// Sums over the other side. Of rows: first = -Σ r t / s. Of components: first = Σ r t, second = Σ r t².
template <class C>
struct KeptSums {
  C *first, *second;  // [kept, dim]
  C* weight;          // [kept]: Σ r

  KeptSums(Side side, int64_t kept, int64_t dim, bool wanted, Arena& arena)
      : first(wanted ? arena.take<C>(kept * dim) : nullptr),
        second(wanted && side == Side::components ? arena.take<C>(kept * dim) : nullptr),
        weight(wanted ? arena.take<C>(kept) : nullptr) {}
};

// r of a tile, [kept][other]: odd rows spread the kept vectors of a warp over the banks.
template <class C>
constexpr int weight_stride = tile_size<C> + 1;

template <class C>
struct BackwardShared {
  ScoreSlices<C> slices;
  C weights[tile_size<C> * weight_stride<C>];
};

template <class T, Side Kept>
__global__ void __launch_bounds__(block_threads)
    pull_kernel(const T* z, int64_t rows, Components<Compute<T>> components, RowWeights<T> weights,
                Outer<Compute<T>> outer, KeptSums<Compute<T>> sums) {
  using C = Compute<T>;
  constexpr int n = per_thread<C>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<BackwardShared<C>*>(memory);
  const int x = threadIdx.x % block_side, y = threadIdx.x / block_side;
  const int64_t kept = Kept == Side::rows ? rows : components.count;
  const int64_t others = Kept == Side::rows ? components.count : rows;
  const int64_t first_kept = static_cast<int64_t>(blockIdx.x) * tile_size<C>, dim = components.dim;
  C total = 0;  // Σ r of the kept vector threadIdx.x

  for (int64_t first = 0; first < others; first += tile_size<C>) {
    const int64_t first_row = Kept == Side::rows ? first_kept : first;
    const int64_t first_component = Kept == Side::rows ? first : first_kept;
    C scores[n][n];
    score_tile(z, rows, components, weights, first_row, first_component, shared.slices, scores);
#pragma unroll
    for (int r = 0; r < n; ++r) {
      const int64_t row = first_row + place<C>(y, r);
#pragma unroll
      for (int c = 0; c < n; ++c) {
        const int64_t k = first_component + place<C>(x, c);
        const bool exists = row < rows && k < components.count;
        const int64_t source = outer.over == SumOver::components ? row : k;
        const C weight =
            exists ? responsibility(scores[r][c], outer.peak[source], outer.log_sum[source], outer.grad[source]) : C(0);
        const int i = Kept == Side::rows ? place<C>(y, r) : place<C>(x, c);
        const int j = Kept == Side::rows ? place<C>(x, c) : place<C>(y, r);
        shared.weights[i * weight_stride<C> + j] = weight;
      }
    }
    __syncthreads();

    const int64_t left = others - first;
    const int count = static_cast<int>(left < tile_size<C> ? left : tile_size<C>);
    if (threadIdx.x < tile_size<C>) {
      for (int j = 0; j < count; ++j) total += shared.weights[threadIdx.x * weight_stride<C> + j];
    }
    // Thread (y, x) owns the kept vectors y, y + 16, … at the dimensions x, x + 16, …: in every tile the same.
    for (int64_t d = x; d < dim; d += block_side) {
      C own[n], own_shift[n], one[n] = {}, two[n] = {};
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const int64_t mine = first_kept + y + i * block_side, at = mine * dim + d;
        own[i] = mine >= kept ? C(0) : Kept == Side::rows ? to_compute(z[at]) : components.slope[at];
        own_shift[i] = mine < kept && Kept == Side::components ? components.shift[at] : C(0);
      }
      for (int j = 0; j < count; ++j) {
        const int64_t at = (first + j) * dim + d;
        const C partner = Kept == Side::rows ? components.slope[at] : to_compute(z[at]);
        const C partner_shift = Kept == Side::rows ? components.shift[at] : C(0);
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const C weight = shared.weights[(y + i * block_side) * weight_stride<C> + j];
          const C t = own[i] * partner - (Kept == Side::rows ? partner_shift : own_shift[i]);
          const C weighted = weight == 0 ? C(0) : weight * t;
          one[i] += Kept == Side::rows ? -weighted * partner : weighted;
          if constexpr (Kept == Side::components) two[i] += weighted * t;
        }
      }
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const int64_t mine = first_kept + y + i * block_side, at = mine * dim + d;
        if (mine >= kept) continue;
        sums.first[at] += one[i];
        if constexpr (Kept == Side::components) sums.second[at] += two[i];
      }
    }
    __syncthreads();
  }
  const int64_t mine = first_kept + threadIdx.x;
  if (threadIdx.x < tile_size<C> && mine < kept) sums.weight[mine] = total;
}

template <class T, Side Kept>
void pull(const T* z, int64_t rows, const Components<Compute<T>>& components, const RowWeights<T>& weights,
          const Outer<Compute<T>>& outer, const KeptSums<Compute<T>>& sums, void* stream) {
  using C = Compute<T>;
  const int64_t kept = Kept == Side::rows ? rows : components.count;
  C* const accumulated[] = {sums.first, sums.second};
  for (C* sum : accumulated) {
    if (sum != nullptr) {
      const auto bytes = static_cast<size_t>(kept * components.dim) * sizeof(C);
      check(cudaMemsetAsync(sum, 0, bytes, static_cast<cudaStream_t>(stream)), "mixture_backward");
    }
  }
  launch("mixture_backward", pull_kernel<T, Kept>, divide_up(kept, tile_size<C>), block_threads,
         sizeof(BackwardShared<C>), stream, z, rows, components, weights, outer, sums);
}

// From sums to gradients in the type of the inputs; any of them may be null.
template <class T>
__global__ void __launch_bounds__(block_threads) round_kernel(const Compute<T>* values, int64_t count, T* rounded) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (i < count) rounded[i] = from_compute<T>(values[i]);
}

template <class T>
void round_to(const Compute<T>* values, int64_t count, void* rounded, void* stream) {
  if (rounded == nullptr) return;
  launch("round", round_kernel<T>, divide_up(count, block_threads), block_threads, 0, stream, values, count,
         static_cast<T*>(rounded));
}

template <class T, ScaleType S>
__global__ void __launch_bounds__(block_threads)
    component_gradients_kernel(Components<Compute<T>> components, KeptSums<Compute<T>> sums, const T* scale,
                               T* grad_mean, T* grad_scale) {
  using C = Compute<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (i >= components.count * components.dim) return;
  const C to_log_std = sums.second[i] - sums.weight[i / components.dim];
  grad_mean[i] = from_compute<T>(sums.first[i] * components.slope[i]);
  grad_scale[i] = from_compute<T>(to_log_std * log_std_slope<S>(to_compute(scale[i])));
}

template <class T>
void write_component_gradients(const GaussianPairs& pairs, const Components<Compute<T>>& components,
                               const KeptSums<Compute<T>>& sums, void* grad_mean, void* grad_scale, void* stream) {
  if (grad_mean == nullptr) return;
  dispatch_scale(pairs.scale_type, [&]<ScaleType S>() {
    launch("component_gradients", component_gradients_kernel<T, S>,
           divide_up(components.count * components.dim, block_threads), block_threads, 0, stream, components, sums,
           static_cast<const T*>(pairs.scale), static_cast<T*>(grad_mean), static_cast<T*>(grad_scale));
  });
}

// ---- plans ---------------------------------------------------------------------------------------------------------

template <class C, class Args>
C uniform_log_weight(const Args& args) {
  const int64_t terms = args.over == SumOver::components ? args.pairs.components : args.pairs.rows;
  return static_cast<C>(-std::log(static_cast<double>(terms)));
}

// The weights of the terms are part of the components or of the rows.
template <class T, class Args>
RowWeights<T> row_weights(const Args& args) {
  if (args.over == SumOver::components) return {0, nullptr, 0, 0, 0};
  return {uniform_log_weight<Compute<T>>(args), static_cast<const T*>(args.log_weight), 0, 0, 0};
}

template <class T, class Args>
void fill_weighted_components(const Args& args, const Components<Compute<T>>& components, void* stream) {
  using C = Compute<T>;
  if (args.over == SumOver::components) {
    fill_components<T>(args.pairs, static_cast<const T*>(args.log_weight), uniform_log_weight<C>(args), components,
                       stream);
  } else {
    fill_components<T>(args.pairs, nullptr, C(0), components, stream);
  }
}

template <class C>
struct MixturePlan {
  Components<C> components;
  SumPlan<C> sum;

  MixturePlan(const Mixture& args, Arena& arena)
      : components(args.pairs, false, arena),
        sum(args.over == SumOver::components ? args.pairs.rows : args.pairs.components,
            args.over == SumOver::components ? args.pairs.components : args.pairs.rows, arena) {}
};

template <class C>
struct MixtureBackwardPlan {
  bool want_rows, want_components;
  Components<C> components;
  KeptSums<C> to_rows, to_components;

  MixtureBackwardPlan(const MixtureBackward& args, Arena& arena)
      : want_rows(args.grad_z != nullptr || (args.over == SumOver::rows && args.grad_log_weight != nullptr)),
        want_components(args.grad_mean != nullptr ||
                        (args.over == SumOver::components && args.grad_log_weight != nullptr)),
        components(args.pairs, false, arena),
        to_rows(Side::rows, args.pairs.rows, args.pairs.dim, want_rows, arena),
        to_components(Side::components, args.pairs.components, args.pairs.dim, want_components, arena) {}
};

}  // namespace
}  // namespace isthmus::cuda
