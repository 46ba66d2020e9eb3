// Gradients of the quantized vectors and of their squared errors. Those of x are a pass over the rows, a warp for each;
// those of the codes are sums over the rows of each code (core/sort.cuh). Both are bound by memory.
#pragma once

#include "codebook/kernels.h"
#include "codebook/passage.cuh"
#include "core/sort.cuh"

namespace isthmus::cuda {
namespace {

// The code of each row, counted over all heads; -1 stays.
__global__ void __launch_bounds__(block_threads) flat_indices_kernel(QuantizeBackward args, int64_t* flat) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (row >= args.heads * args.rows) return;
  const int64_t code = args.indices[row];
  check_index(code, -1, args.codes);
  flat[row] = code < 0 ? -1 : row / args.rows * args.codes + code;
}

template <class T>
__global__ void __launch_bounds__(block_threads) row_gradient_kernel(QuantizeBackward args, const int64_t* codes) {
  using C = Compute<T>;
  const int64_t row = warp_number();
  if (row >= args.heads * args.rows) return;
  const int64_t code = codes[row];
  const T* x = static_cast<const T*>(args.x) + row * args.dim;
  const T* c = static_cast<const T*>(args.codebook) + code * args.dim;
  const T* grad = static_cast<const T*>(args.grad_quantized) + row * args.dim;
  T* grad_x = static_cast<T*>(args.grad_x) + row * args.dim;
  Passage<C> passage;
  if (code < 0 || args.gradient == CodeGradient::codebook) {
    passage = {0, 0, 0};
  } else if (args.gradient == CodeGradient::rotation) {
    passage = rotation(x, c, grad, args.dim);
  }
  const C pull = static_cast<C>(args.commitment_weight) * 2 * static_cast<const C*>(args.grad_error)[row];
  for (int64_t k = warp_lane(); k < args.dim; k += warp_size) {
    C sum = 0;
    if (code >= 0) {
      const C a = to_compute(x[k]), b = to_compute(c[k]);
      sum = pull * (a - b);
      // A product with 0 would turn an infinite gradient that is not passed on into NaN.
      if (passage.of_grad != 0) sum += passage.of_grad * to_compute(grad[k]);
      if (passage.of_x != 0 || passage.of_code != 0) sum += passage.of_x * a + passage.of_code * b;
    }
    grad_x[k] = from_compute<T>(sum);
  }
}

template <class T>
struct CodeGradients {
  using Number = Compute<T>;
  QuantizeBackward args;

  __device__ __forceinline__ Number share(int64_t row, int64_t code, int64_t k) const {
    const int64_t i = row * args.dim + k;
    const Number difference = to_compute(static_cast<const T*>(args.x)[i]) -
                              to_compute(static_cast<const T*>(args.codebook)[code * args.dim + k]);
    const Number pull = 2 * static_cast<const Number*>(args.grad_error)[row] * difference;
    if (args.gradient != CodeGradient::codebook) return -pull;
    return to_compute(static_cast<const T*>(args.grad_quantized)[i]) - pull;
  }
  __device__ __forceinline__ void write(int64_t code, int64_t k, Number sum) const {
    static_cast<T*>(args.grad_codebook)[code * args.dim + k] = from_compute<T>(sum);
  }
};

// Its scratch memory: the flat indices, and if the codebook's gradient is wanted the sums.
template <class T>
struct BackwardPlan {
  const int64_t rows;
  const bool sorts;
  int64_t* flat;
  GroupSums<Compute<T>> sums;

  BackwardPlan(const QuantizeBackward& args, Arena& arena)
      : rows(args.heads * args.rows),
        sorts(args.grad_codebook != nullptr),
        flat(arena.take<int64_t>(rows)),
        sums(sorts ? rows : 0, sorts ? args.heads * args.codes : 0, args.dim, arena) {}
};

template <class T>
void backward(const QuantizeBackward& args, void* stream) {
  Arena arena(args.workspace);
  BackwardPlan<T> plan(args, arena);
  launch("flat_indices", flat_indices_kernel, divide_up(plan.rows, block_threads), block_threads, 0, stream, args,
         plan.flat);
  if (args.grad_x != nullptr) {
    launch("row_gradient", row_gradient_kernel<T>, blocks_of_warps(plan.rows), block_threads, 0, stream, args,
           static_cast<const int64_t*>(plan.flat));
  }
  if (plan.sorts) plan.sums.run(plan.flat, -1, CodeGradients<T>{args}, stream);
}

}  // namespace
}  // namespace isthmus::cuda
