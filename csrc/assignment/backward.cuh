// Weighted sums over one side of the matrix of logits on CUDA: Σ p c and Σ p of the forward pass, and all gradients;
// the formulas stand in forward.inl and backward.inl.
//
// A block keeps a tile of one side, the *kept* side, walks over the tiles of the other, turns logits into weights in
// shared memory and adds the vectors of the other side to its own sums. Where the kept side alone does not fill the
// device, ranges of the other go to different blocks, whose sums are added in order. Every sum has one owner and a
// fixed order: no atomics.
#pragma once

#include "assignment/engine.cuh"

namespace isthmus::cuda {
namespace {

// ---- from probabilities to weights ---------------------------------------------------------------------------------

// A rule gives the weight of a pair from p and `value`, which is log p, or the product of the row of `products` with
// the code. Rows and codes are numbered over all heads.

// p, as it is or times the norm of the code, which makes the code of its point.
template <class C>
struct Probability {
  static constexpr bool from_products = false;
  const C* norms;  // null: 1
  __device__ C operator()(C p, C, int64_t, int64_t code) const { return norms == nullptr ? p : p * norms[code]; }
};

// p h_k
template <class C>
struct WeightedProbability {
  static constexpr bool from_products = false;
  const C* weights;
  __device__ C operator()(C p, C, int64_t, int64_t code) const { return p * weights[code]; }
};

// p (g·c - g·Σ p c)
template <class C>
struct AverageGradient {
  static constexpr bool from_products = true;
  const C *norms, *centre;
  __device__ C operator()(C p, C product, int64_t row, int64_t code) const {
    return p * (norms[code] * product - centre[row]);
  }
};

// p (h_k - Σ p h - e (log p + H))
template <class C>
struct StatisticsGradient {
  static constexpr bool from_products = false;
  const C *usage, *mean_usage, *slope, *entropy;  // usage or slope may be null: zeros
  __device__ C operator()(C p, C log_p, int64_t row, int64_t code) const {
    const C by_usage = usage == nullptr ? C(0) : usage[code] - mean_usage[row];
    const C by_entropy = slope == nullptr ? C(0) : slope[row] * (log_p + entropy[row]);
    return p == 0 ? C(0) : p * (by_usage - by_entropy);
  }
};

// e (p - [k = index])
template <class C>
struct CrossEntropyGradient {
  static constexpr bool from_products = false;
  const C* slope;
  const int64_t* indices;
  int64_t rows, codes;
  __device__ C operator()(C p, C, int64_t row, int64_t code) const {
    const bool chosen = row / rows * codes + indices[row] == code;
    return slope[row] * (chosen ? p - 1 : p);
  }
};

// ---- sums ----------------------------------------------------------------------------------------------------------

// What a pass adds up. Null: nobody wants it.
template <class C>
struct Pass {
  const C* normalizer;  // [2, heads · rows]
  const C* products;    // [heads · rows, dim]: multiplied with the codes, for rules that need it
  const C* others;      // [heads · count of the other side, dim]
  C* sums;              // [heads · kept, dim]: Σ weight · other
  C* totals;            // [heads · kept]: Σ weight
};

// How the tiles of the other side are cut into ranges. Depends on the problem alone.
template <class C>
struct PassPlan {
  int64_t tiles;  // of the kept side of each head
  int64_t tiles_per_range, ranges;
  C *sums, *totals;  // of each range, if there are several

  PassPlan(const Assignment& args, Side kept_side, bool wanted, Arena& arena) {
    constexpr int64_t enough_blocks = 512;
    const int64_t kept = kept_side == Side::rows ? args.rows : args.codes;
    const int64_t others = kept_side == Side::rows ? args.codes : args.rows;
    tiles = parts_of(kept, tile_size<C>);
    // All ranges together hold little more than the vectors they add.
    const int64_t blocks = at_least_one(args.heads * tiles), affordable = others / at_least_one(kept) + 4;
    const int64_t other_tiles = at_least_one(parts_of(others, tile_size<C>));
    tiles_per_range = parts_of(other_tiles, least(parts_of(enough_blocks, blocks), least(affordable, other_tiles)));
    ranges = parts_of(other_tiles, tiles_per_range);
    const int64_t count = wanted && ranges > 1 ? ranges * args.heads * kept : 0;
    sums = arena.take<C>(count * args.dim);
    totals = arena.take<C>(count);
  }

 private:
  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t at_least_one(int64_t value) { return value < 1 ? 1 : value; }
};

// Weights of a tile, [kept][other]: odd rows spread the kept vectors of a warp over the banks.
template <class C>
constexpr int weight_stride = tile_size<C> + 1;

template <class C>
struct PassShared {
  ProductSlices<C> slices;
  C weights[tile_size<C> * weight_stride<C>];
};

// The weights of the tile at (first_row, first_code), in shared memory; 0 where a pair does not exist.
template <Side Kept, class C, class Rule>
__device__ __forceinline__ void weight_tile(const Problem<C>& problem, const Pass<C>& pass, const Rule& rule,
                                            int64_t head, int64_t first_row, int64_t first_code,
                                            PassShared<C>& shared) {
  constexpr int n = per_thread<C>;
  const int x = threadIdx.x % block_side, y = threadIdx.x / block_side;
  const int64_t all_rows = problem.heads * problem.rows;
  const auto weight_at = [&](int r, int c) -> C& {
    const int i = Kept == Side::rows ? place<C>(y, r) : place<C>(x, c);
    const int j = Kept == Side::rows ? place<C>(x, c) : place<C>(y, r);
    return shared.weights[i * weight_stride<C> + j];
  };
  C values[n][n];
  logit_tile(problem, head, first_row, first_code, shared.slices, values);
#pragma unroll
  for (int r = 0; r < n; ++r) {
    const int64_t row_of_head = first_row + place<C>(y, r), row = head * problem.rows + row_of_head;
    const bool shown = row_of_head < problem.rows && !problem.hidden(row);
    const C peak = shown ? pass.normalizer[row] : C(0), log_sum = shown ? pass.normalizer[all_rows + row] : C(0);
    if (shown && problem.key != nullptr) add_noise(problem, row, first_code, x, peak + exp_floor<C>(), values[r]);
#pragma unroll
    for (int c = 0; c < n; ++c) {
      values[r][c] = values[r][c] - peak - log_sum;  // the sum of both would lose digits
      weight_at(r, c) = shown ? exp(values[r][c]) : C(0);
    }
  }
  if constexpr (Rule::from_products) {
#pragma unroll
    for (int r = 0; r < n; ++r) {
#pragma unroll
      for (int c = 0; c < n; ++c) values[r][c] = 0;
    }
    const int64_t dim = problem.dim;
    multiply_tiles(MatrixRows<C>{pass.products + head * problem.rows * dim, first_row, problem.rows, dim},
                   MatrixRows<C>{problem.codebook.vectors + head * problem.codes * dim, first_code, problem.codes, dim},
                   shared.slices, values);
  }
#pragma unroll
  for (int r = 0; r < n; ++r) {
    const int64_t row_of_head = first_row + place<C>(y, r), row = head * problem.rows + row_of_head;
    const bool shown = row_of_head < problem.rows && !problem.hidden(row);
#pragma unroll
    for (int c = 0; c < n; ++c) {
      const int64_t k = first_code + place<C>(x, c);
      C& weight = weight_at(r, c);
      weight = shown && k < problem.codes ? rule(weight, values[r][c], row, head * problem.codes + k) : C(0);
    }
  }
}

template <Side Kept, class C, class Rule>
__global__ void __launch_bounds__(block_threads)
    pass_kernel(Problem<C> problem, Pass<C> pass, PassPlan<C> plan, Rule rule) {
  constexpr int n = per_thread<C>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<PassShared<C>*>(memory);
  const int x = threadIdx.x % block_side, y = threadIdx.x / block_side;
  const int64_t kept = Kept == Side::rows ? problem.rows : problem.codes;
  const int64_t others = Kept == Side::rows ? problem.codes : problem.rows;
  const int64_t range = blockIdx.x % plan.ranges, tile = blockIdx.x / plan.ranges, dim = problem.dim;
  const int64_t head = tile / plan.tiles, first_kept = tile % plan.tiles * tile_size<C>;
  const int64_t begin = range * plan.tiles_per_range * tile_size<C>;
  const int64_t limit = begin + plan.tiles_per_range * tile_size<C>, end = limit < others ? limit : others;
  const int64_t first_sum = (range * problem.heads + head) * kept;
  const C* vectors = pass.others + head * others * dim;
  C* sums = pass.sums + first_sum * dim;
  C total = 0;  // Σ weight of the kept vector threadIdx.x

  for (int64_t first = begin; first < end; first += tile_size<C>) {
    weight_tile<Kept>(problem, pass, rule, head, Kept == Side::rows ? first_kept : first,
                      Kept == Side::rows ? first : first_kept, shared);
    __syncthreads();
    const int64_t left = end - first;
    const int count = static_cast<int>(left < tile_size<C> ? left : tile_size<C>);
    if (pass.totals != nullptr && threadIdx.x < tile_size<C>) {
      for (int j = 0; j < count; ++j) total += shared.weights[threadIdx.x * weight_stride<C> + j];
    }
    // Thread (y, x) owns the kept vectors y, y + 16, … at the dimensions x, x + 16, …: in every tile the same.
    for (int64_t d = x; pass.sums != nullptr && d < dim; d += block_side) {
      C own[n] = {};
#pragma unroll 4
      for (int j = 0; j < count; ++j) {
        const C other = vectors[(first + j) * dim + d];
#pragma unroll
        for (int i = 0; i < n; ++i) own[i] += shared.weights[(y + i * block_side) * weight_stride<C> + j] * other;
      }
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const int64_t mine = first_kept + y + i * block_side;
        if (mine < kept) sums[mine * dim + d] += own[i];
      }
    }
    __syncthreads();
  }
  const int64_t mine = first_kept + threadIdx.x;
  if (pass.totals != nullptr && threadIdx.x < tile_size<C> && mine < kept) pass.totals[first_sum + mine] = total;
}

// out[i] = Σ over the ranges of partial[range, i]
template <class C>
__global__ void __launch_bounds__(block_threads)
    add_ranges_kernel(const C* partial, int64_t ranges, int64_t count, C* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (i >= count) return;
  C sum = 0;
  for (int64_t range = 0; range < ranges; ++range) sum += partial[range * count + i];
  out[i] = sum;
}

template <class C>
void add_ranges(const C* partial, int64_t ranges, int64_t count, C* out, void* stream) {
  if (out == nullptr) return;
  launch("ranges", add_ranges_kernel<C>, parts_of(count, block_threads), block_threads, 0, stream, partial, ranges,
         count, out);
}

template <Side Kept, class C, class Rule>
void run_pass(const Problem<C>& problem, const Pass<C>& pass, const PassPlan<C>& plan, const Rule& rule, void* stream) {
  const int64_t kept = problem.heads * (Kept == Side::rows ? problem.rows : problem.codes);
  Pass<C> part = pass;
  if (plan.ranges > 1) {
    part.sums = pass.sums == nullptr ? nullptr : plan.sums;
    part.totals = pass.totals == nullptr ? nullptr : plan.totals;
  }
  if (part.sums != nullptr) {
    const size_t bytes = static_cast<size_t>(plan.ranges * kept * problem.dim) * sizeof(C);
    check(cudaMemsetAsync(part.sums, 0, bytes, static_cast<cudaStream_t>(stream)), "weighted sums");
  }
  launch("weighted sums", pass_kernel<Kept, C, Rule>, problem.heads * plan.tiles * plan.ranges, block_threads,
         sizeof(PassShared<C>), stream, problem, part, plan, rule);
  if (plan.ranges == 1) return;
  add_ranges<C>(plan.sums, plan.ranges, kept * problem.dim, pass.sums, stream);
  add_ranges<C>(plan.totals, plan.ranges, kept, pass.totals, stream);
}

// ---- what becomes of the sums --------------------------------------------------------------------------------------

// The soft assignment, which is centred + origin, or the chosen code.
template <class T, class C>
__global__ void __launch_bounds__(block_threads)
    write_soft_kernel(Problem<C> problem, const C* centred, const T* codebook, const int64_t* indices, bool hard,
                      T* quantized) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x, row = i / problem.dim;
  if (i >= problem.heads * problem.rows * problem.dim) return;
  const int64_t head = row / problem.rows, d = i % problem.dim;
  const bool hidden = problem.hidden(row);
  if (!hard) {
    quantized[i] = from_compute<T>(hidden ? C(0) : problem.origin[head * problem.dim + d] + centred[i]);
  } else {
    const int64_t code = head * problem.codes + indices[row];
    quantized[i] = hidden ? from_compute<T>(C(0)) : codebook[code * problem.dim + d];
  }
}

// The incoming gradient in the compute type, 0 where hidden, and its product with the centred soft assignment.
// A warp for each row.
template <class T, class C>
__global__ void __launch_bounds__(block_threads)
    incoming_kernel(Problem<C> problem, const T* grad, const C* centred, C* wide, C* centre) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x) / warp_size;
  if (row >= problem.heads * problem.rows) return;
  const int64_t dim = problem.dim;
  const bool hidden = problem.hidden(row);
  C product = 0;
  for (int64_t d = threadIdx.x % warp_size; d < dim; d += warp_size) {
    const C g = hidden ? C(0) : to_compute(grad[row * dim + d]);
    product += g * centred[row * dim + d];
    wide[row * dim + d] = g;
  }
  product = warp_sum(product);
  if (threadIdx.x % warp_size == 0) centre[row] = product;
}

// From Σ w · point to the gradients of x or of the codes. A warp for each vector.
template <class T, Side S, class C>
__global__ void __launch_bounds__(block_threads)
    finish_kernel(Problem<C> problem, const C* sums, const C* totals, const C* direct, T* out) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x) / warp_size;
  if (i >= problem.heads * (S == Side::rows ? problem.rows : problem.codes)) return;
  const Points<C>& points = S == Side::rows ? problem.x : problem.codebook;
  const int lane = threadIdx.x % warp_size;
  const int64_t dim = problem.dim;
  const bool hidden = S == Side::rows && problem.hidden(i);
  const C weight = S == Side::codes && problem.euclidean ? totals[i] : C(0), norm = points.norms[i];
  const auto gradient = [&](int64_t d) {
    return problem.slope * (sums[i * dim + d] - weight * points.vectors[i * dim + d]);
  };
  C product = 0;
  for (int64_t d = lane; problem.unit && d < dim; d += warp_size) product += gradient(d) * points.vectors[i * dim + d];
  const C along = warp_total(product);
  for (int64_t d = lane; d < dim; d += warp_size) {
    C value = gradient(d);
    if (problem.unit) value = norm == 0 ? C(0) : (value - along * points.vectors[i * dim + d]) / norm;
    if (direct != nullptr) value += direct[i * dim + d];
    out[i * dim + d] = from_compute<T>(hidden ? C(0) : value);
  }
}

template <class T, Side S, class C>
void finish(const Problem<C>& problem, const C* sums, const C* totals, const C* direct, void* out, void* stream) {
  const int64_t count = problem.heads * (S == Side::rows ? problem.rows : problem.codes);
  launch("gradients", finish_kernel<T, S, C>, parts_of(count * warp_size, block_threads), block_threads, 0, stream,
         problem, sums, totals, direct, static_cast<T*>(out));
}

// ---- gradients -----------------------------------------------------------------------------------------------------

// Memory for the gradients that all losses share.
template <class C>
struct GradientPlan {
  C *to_x, *to_codes, *totals;
  PassPlan<C> over_codes, over_rows;

  GradientPlan(const Assignment& args, bool want_x, bool want_codes, Arena& arena)
      : to_x(want_x ? arena.take<C>(args.heads * args.rows * args.dim) : nullptr),
        to_codes(want_codes ? arena.take<C>(args.heads * args.codes * args.dim) : nullptr),
        totals(want_codes ? arena.take<C>(args.heads * args.codes) : nullptr),
        over_codes(args, Side::rows, want_x, arena),
        over_rows(args, Side::codes, want_codes, arena) {}
};

// Both gradients of the weights that a rule gives; `direct`, if not null, is added to those of the codes.
template <class T, class C, class Rule>
void differentiate(const Problem<C>& problem, const GradientPlan<C>& plan, const void* normalizer, const C* products,
                   const Rule& rule, const C* direct, void* grad_x, void* grad_codebook, void* stream) {
  const C* values = static_cast<const C*>(normalizer);
  if (grad_x != nullptr) {
    run_pass<Side::rows>(problem, Pass<C>{values, products, problem.codebook.vectors, plan.to_x, nullptr},
                         plan.over_codes, rule, stream);
    finish<T, Side::rows>(problem, plan.to_x, static_cast<const C*>(nullptr), static_cast<const C*>(nullptr), grad_x,
                          stream);
  }
  if (grad_codebook == nullptr) return;
  run_pass<Side::codes>(problem, Pass<C>{values, products, problem.x.vectors, plan.to_codes, plan.totals},
                        plan.over_rows, rule, stream);
  finish<T, Side::codes>(problem, plan.to_codes, plan.totals, direct, grad_codebook, stream);
}

}  // namespace
}  // namespace isthmus::cuda
