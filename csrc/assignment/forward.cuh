// Samples, soft assignments and losses on CUDA; what is computed stands in forward.inl.
//
// One kernel summarises each row: its greatest logit and whose it is, the sum beside it and what the entropy needs. A
// block keeps a tile of rows and walks over the tiles of codes; where rows alone do not fill the device, ranges of
// codes go to different blocks and are merged in order.
#pragma once

#include "assignment/engine.cuh"

namespace isthmus::cuda {
namespace {

// Of the logits of a row met so far: the greatest (the first of equals) and its code; Σ exp(t) and Σ exp(t) t,
// t = logit - top.
template <class C>
struct RowSummary {
  C top = sizeof(C) == 4 ? C(-0x1.fffffep127) : C(-0x1.fffffffffffffp1023);
  C sum = 0, moment = 0;
  int64_t code = 0;

  __device__ __forceinline__ void raise_to(C peak, int64_t its_code) {
    if (!(peak > top)) return;
    const C by = peak - top, factor = exp(-by);
    moment = sum == 0 ? C(0) : factor * (moment - by * sum);
    sum *= factor;
    top = peak;
    code = its_code;
  }
  __device__ __forceinline__ void add(C logit) {
    const C t = logit - top, e = exp(t);
    sum += e;
    moment += e == 0 ? C(0) : e * t;
  }
  __device__ __forceinline__ void merge(RowSummary other) {
    if (other.top == top && other.code < code) code = other.code;
    const C peak = other.top > top ? other.top : top;
    raise_to(peak, other.code);
    other.raise_to(peak, other.code);
    sum += other.sum;
    moment += other.moment;
  }
};

// How the tiles of codes are cut into ranges. Depends on the problem alone.
template <class C>
struct SummaryPlan {
  int64_t row_tiles, tiles_per_range, ranges;
  RowSummary<C>* partial;  // [ranges, heads · rows]

  SummaryPlan(const Assignment& args, Arena& arena) {
    constexpr int64_t enough_blocks = 512;
    row_tiles = parts_of(args.rows, tile_size<C>);
    const int64_t code_tiles = parts_of(args.codes, tile_size<C>), tiles = args.heads * row_tiles;
    const int64_t wanted = tiles == 0 ? 1 : parts_of(enough_blocks, tiles);
    tiles_per_range = parts_of(code_tiles, wanted < code_tiles ? wanted : code_tiles);
    ranges = parts_of(code_tiles, tiles_per_range);
    partial = arena.take<RowSummary<C>>(ranges * args.heads * args.rows);
  }
};

// A row of a tile is met by 16 threads, which share what they found.
template <class C>
struct SharedSummaries {
  C top[block_side][tile_size<C>], sum[block_side][tile_size<C>], moment[block_side][tile_size<C>];
  int code[block_side][tile_size<C>];
};

// Sums: the sums are wanted too, not only the greatest. chosen, if not null, receives the logits of the codes that
// problem.hidden.indices name.
template <bool Sums, class C>
__global__ void __launch_bounds__(block_threads) summary_kernel(Problem<C> problem, SummaryPlan<C> plan, C* chosen) {
  constexpr int n = per_thread<C>;
  __shared__ union {
    ProductSlices<C> slices;
    SharedSummaries<C> found;
  } shared;
  const int x = threadIdx.x % block_side, y = threadIdx.x / block_side;
  const int64_t range = blockIdx.x % plan.ranges, tile = blockIdx.x / plan.ranges;
  const int64_t head = tile / plan.row_tiles, first_row = tile % plan.row_tiles * tile_size<C>;
  const int64_t begin = range * plan.tiles_per_range * tile_size<C>;
  const int64_t limit = begin + plan.tiles_per_range * tile_size<C>;
  const int64_t end = limit < problem.codes ? limit : problem.codes;

  RowSummary<C> summaries[n];
  for (int64_t first = begin; first < end; first += tile_size<C>) {
    C logits[n][n];
    logit_tile(problem, head, first_row, first, shared.slices, logits);
#pragma unroll
    for (int r = 0; r < n; ++r) {
      const int64_t row_of_head = first_row + place<C>(y, r), row = head * problem.rows + row_of_head;
      if (row_of_head >= problem.rows) continue;
      if (problem.key != nullptr) {
        const C floor = summaries[r].top + (Sums ? exp_floor<C>() : C(0));
        add_noise(problem, row, first, x, floor, logits[r]);
      }
      C peak = summaries[r].top;
      int64_t code = 0;
#pragma unroll
      for (int c = 0; c < n; ++c) {
        const int64_t k = first + place<C>(x, c);
        if (logits[r][c] > peak) {
          peak = logits[r][c];
          code = k;
        }
        if (chosen != nullptr && problem.hidden.indices[row] == k) chosen[row] = logits[r][c];
      }
      summaries[r].raise_to(peak, code);
      if constexpr (Sums) {
#pragma unroll
        for (int c = 0; c < n; ++c) summaries[r].add(logits[r][c]);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < n; ++r) {
    const int i = place<C>(y, r);
    shared.found.top[x][i] = summaries[r].top;
    shared.found.sum[x][i] = summaries[r].sum;
    shared.found.moment[x][i] = summaries[r].moment;
    shared.found.code[x][i] = static_cast<int>(summaries[r].code);
  }
  __syncthreads();
  const int64_t mine = first_row + threadIdx.x;
  if (threadIdx.x >= tile_size<C> || mine >= problem.rows) return;
  RowSummary<C> total;
  for (int i = 0; i < block_side; ++i) {
    RowSummary<C> part;
    part.top = shared.found.top[i][threadIdx.x];
    part.sum = shared.found.sum[i][threadIdx.x];
    part.moment = shared.found.moment[i][threadIdx.x];
    part.code = shared.found.code[i][threadIdx.x];
    total.merge(part);
  }
  plan.partial[range * problem.heads * problem.rows + head * problem.rows + mine] = total;
}

// Where summaries go; null: nobody wants it.
template <class C>
struct RowResults {
  int64_t* indices;
  C* normalizer;  // [2, heads · rows]
  C* entropy;
  C* loss;  // holds the logits of the chosen codes
};

template <class C>
__global__ void __launch_bounds__(block_threads)
    write_rows_kernel(Problem<C> problem, SummaryPlan<C> plan, RowResults<C> out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x,
                rows = problem.heads * problem.rows;
  if (row >= rows) return;
  RowSummary<C> total;
  for (int64_t range = 0; range < plan.ranges; ++range) total.merge(plan.partial[range * rows + row]);
  const bool hidden = problem.hidden(row);
  const C log_sum = log(total.sum);
  if (out.indices != nullptr) out.indices[row] = hidden ? -1 : total.code;
  if (out.normalizer != nullptr) {
    out.normalizer[row] = hidden ? C(0) : total.top;
    out.normalizer[rows + row] = hidden ? C(0) : log_sum;
  }
  if (out.entropy != nullptr) out.entropy[row] = hidden ? C(0) : log_sum - total.moment / total.sum;
  if (out.loss != nullptr) out.loss[row] = hidden ? C(0) : total.top - out.loss[row] + log_sum;
}

template <bool Sums, class C>
void summarise(const Problem<C>& problem, const SummaryPlan<C>& plan, const RowResults<C>& out, void* stream) {
  launch("row summaries", summary_kernel<Sums, C>, problem.heads * plan.row_tiles * plan.ranges, block_threads, 0,
         stream, problem, plan, out.loss);
  launch("rows", write_rows_kernel<C>, parts_of(problem.heads * problem.rows, block_threads), block_threads, 0, stream,
         problem, plan, out);
}

}  // namespace
}  // namespace isthmus::cuda
