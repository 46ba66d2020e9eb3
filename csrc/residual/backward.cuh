// Gradients, and sums of residuals over the rows of each code. The gradient of x is a pass over the rows, a warp for
// each; sums go stage by stage through core/sort.cuh, and the visit of a residual carries it to the next stage.
#pragma once

#include "codebook/passage.cuh"
#include "residual/stages.cuh"

namespace isthmus::cuda {
namespace {

// places: [groups, rows, stages]. totals: [groups, rows, dim], for the rotation alone.
template <class T>
__global__ void __launch_bounds__(block_threads)
    input_gradient_kernel(ResidualBackward args, const int64_t* places, Compute<T>* totals) {
  using C = Compute<T>;
  const int64_t row = warp_number(), dim = args.codes.dim, stages = args.codes.stages;
  if (row >= args.codes.groups * args.codes.rows) return;
  const T* x = static_cast<const T*>(args.codes.x) + row * dim;
  const T* tables = static_cast<const T*>(args.codes.tables);
  const T* grad = static_cast<const T*>(args.grad_quantized) + row * dim;
  const C* grad_error = static_cast<const C*>(args.grad_error) + row * stages;
  const C weight = static_cast<C>(args.commitment_weight) * 2;
  places += row * stages;
  bool coded = false;
  for (int64_t q = 0; q < stages; ++q) coded |= places[q] >= 0;

  Passage<C> passage;
  C* total = totals + row * dim;
  if (args.gradient == CodeGradient::rotation) {
    for (int64_t k = warp_lane(); k < dim; k += warp_size) {
      C sum = 0;
      for (int64_t q = 0; q < stages; ++q) sum += places[q] < 0 ? C(0) : to_compute(tables[places[q] * dim + k]);
      total[k] = sum;
    }
    passage = rotation(x, total, grad, dim);
  }
  for (int64_t k = warp_lane(); k < dim; k += warp_size) {
    C residual = to_compute(x[k]), sum = 0;
    for (int64_t q = 0; q < stages; ++q) {
      if (places[q] < 0) continue;
      residual -= to_compute(tables[places[q] * dim + k]);
      sum += weight * grad_error[q] * residual;
    }
    // A product with 0 would turn an infinite gradient that is not passed on into NaN.
    if (coded && passage.of_grad != 0) sum += passage.of_grad * to_compute(grad[k]);
    if (coded && (passage.of_x != 0 || passage.of_code != 0)) {
      sum += passage.of_x * to_compute(x[k]) + passage.of_code * total[k];
    }
    static_cast<T*>(args.grad_x)[row * dim + k] = from_compute<T>(sum);
  }
}

// The group of each row in the sums of one stage: its code, counted over all groups of codebooks.
__global__ void __launch_bounds__(block_threads)
    keys_kernel(ResidualCodes codes, const int64_t* indices, Stage stage, int64_t* keys) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (row >= codes.groups * codes.rows) return;
  const int64_t index = indices[row * codes.stages + stage.number];
  check_index(index, -1, stage.size);
  keys[row] = index < 0 ? -1 : row / codes.rows * stage.size + index;
}

__device__ __forceinline__ int64_t place_of(const ResidualCodes& codes, const Stage& stage, int64_t key) {
  return key / stage.size * codes.codes + stage.start + key % stage.size;
}

// Each element of a residual is visited once in a stage, which carries it to the next.
template <class T>
__device__ __forceinline__ Compute<T> subtract_code(const ResidualCodes& codes, int64_t place, int64_t k,
                                                    Compute<T>& residual) {
  residual -= to_compute(static_cast<const T*>(codes.tables)[place * codes.dim + k]);
  return residual;
}

template <class T>
struct StageGradients {
  using Number = Compute<T>;
  ResidualBackward args;
  Stage stage;
  Number* residuals;

  __device__ __forceinline__ Number share(int64_t row, int64_t key, int64_t k) const {
    const ResidualCodes& codes = args.codes;
    const Number left = subtract_code<T>(codes, place_of(codes, stage, key), k, residuals[row * codes.dim + k]);
    return -2 * static_cast<const Number*>(args.grad_error)[row * codes.stages + stage.number] * left;
  }
  __device__ __forceinline__ void write(int64_t key, int64_t k, Number sum) const {
    static_cast<T*>(args.grad_tables)[place_of(args.codes, stage, key) * args.codes.dim + k] = from_compute<T>(sum);
  }
};

template <class T>
struct StageTotals {
  using Number = Compute<T>;
  ResidualTotals args;
  Stage stage;
  Number* residuals;

  __device__ __forceinline__ Number share(int64_t row, int64_t key, int64_t k) const {
    Number& residual = residuals[row * args.codes.dim + k];
    const Number before = residual;
    subtract_code<T>(args.codes, place_of(args.codes, stage, key), k, residual);
    return before;
  }
  __device__ __forceinline__ void write(int64_t key, int64_t k, Number sum) const {
    Number* sums = static_cast<Number*>(args.totals) + args.codes.groups * args.codes.codes;
    sums[place_of(args.codes, stage, key) * args.codes.dim + k] = sum;
  }
};

template <class C>
__global__ void __launch_bounds__(block_threads)
    stage_counts_kernel(ResidualTotals args, Stage stage, const int64_t* starts) {
  const int64_t key = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (key >= args.codes.groups * stage.size) return;
  static_cast<C*>(args.totals)[place_of(args.codes, stage, key)] = static_cast<C>(starts[key + 1] - starts[key]);
}

// Memory for sums over the rows of each code, of one stage at a time.
template <class C>
struct StageSums {
  const ResidualCodes& codes;
  C* residuals;   // [groups, rows, dim]
  int64_t* keys;  // [groups, rows]
  Arena scratch;
  int64_t used = 0;

  StageSums(const ResidualCodes& codes_, Arena& arena)
      : codes(codes_),
        residuals(arena.take<C>(codes.groups * codes.rows * codes.dim)),
        keys(arena.take<int64_t>(codes.groups * codes.rows)),
        scratch(arena) {
    for_each_stage(codes, [&](const Stage& stage) {
      Arena of_stage = scratch;
      sums_of(stage, of_stage);
      if (of_stage.used > used) used = of_stage.used;
    });
  }

  GroupSums<C> sums_of(const Stage& stage, Arena& arena) const {
    return {codes.groups * codes.rows, codes.groups * stage.size, codes.dim, arena};
  }

  // after(stage, starts of the groups) follows the sums of each stage.
  template <class T, class Body, class Args, class After>
  void run(const Args& args, void* stream, After&& after) {
    const int64_t rows = codes.groups * codes.rows;
    widen_all<T>(codes.x, rows * codes.dim, residuals, stream);
    for_each_stage(codes, [&](const Stage& stage) {
      Arena of_stage = scratch;
      GroupSums<C> sums = sums_of(stage, of_stage);
      launch("keys", keys_kernel, divide_up(rows, block_threads), block_threads, 0, stream, codes, args.indices, stage,
             keys);
      sums.run(keys, -1, Body{args, stage, residuals}, stream);
      after(stage, static_cast<const int64_t*>(sums.groups.starts));
    });
  }
};

template <class T>
struct BackwardLayout {
  int64_t* places;
  Compute<T>* totals;

  BackwardLayout(const ResidualBackward& args, Arena& arena) {
    const int64_t rows = args.codes.groups * args.codes.rows;
    places = arena.take<int64_t>(rows * args.codes.stages);
    totals = arena.take<Compute<T>>(args.gradient == CodeGradient::rotation ? rows * args.codes.dim : 0);
  }
};

template <class T>
void backward(const ResidualBackward& args, void* stream) {
  using C = Compute<T>;
  Arena arena(args.workspace);
  if (args.grad_x != nullptr) {
    const BackwardLayout<T> layout(args, arena);
    find_places(args.codes, args.indices, layout.places, stream);
    launch("input_gradient", input_gradient_kernel<T>, blocks_of_warps(args.codes.groups * args.codes.rows),
           block_threads, 0, stream, args, static_cast<const int64_t*>(layout.places), layout.totals);
  }
  if (args.grad_tables != nullptr) {
    StageSums<C>(args.codes, arena).template run<T, StageGradients<T>>(args, stream, [](const Stage&, const int64_t*) {
    });
  }
}

template <class T>
void totals(const ResidualTotals& args, void* stream) {
  using C = Compute<T>;
  Arena arena(args.workspace);
  StageSums<C>(args.codes, arena)
      .template run<T, StageTotals<T>>(args, stream, [&](const Stage& stage, const int64_t* starts) {
        launch("stage_counts", stage_counts_kernel<C>, divide_up(args.codes.groups * stage.size, block_threads),
               block_threads, 0, stream, args, stage, starts);
      });
}

}  // namespace
}  // namespace isthmus::cuda
