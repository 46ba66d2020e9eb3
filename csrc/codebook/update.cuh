// One step of a codebook that learns by moving averages. Usages come first, a block for each head, because every code's
// share needs their total. Then a warp takes each code: one pass over the codebook.
#pragma once

#include "codebook/kernels.h"
#include "codebook/warps.cuh"
#include "core/sort.cuh"

namespace isthmus::cuda {
namespace {

// What all codes of a head need to know.
template <class C>
struct HeadUsage {
  C per_hit;  // codes / hits; 0 if nothing was hit
  C shrink;   // of the smoothed usage
};

constexpr int usage_threads = 1024;

template <class C>
__device__ __forceinline__ C rate_of(const CodebookUpdate& args, int64_t code) {
  const C weight = args.code_weight == nullptr ? C(1) : static_cast<const C*>(args.code_weight)[code];
  return static_cast<C>(1 - args.decay) * weight;
}

template <class C>
__global__ void __launch_bounds__(usage_threads) usage_kernel(CodebookUpdate args, HeadUsage<C>* heads) {
  __shared__ C hits;
  const int64_t head = blockIdx.x;
  const C* counts = static_cast<const C*>(args.counts) + head * args.codes;
  C* usage = static_cast<C*>(args.usage) + head * args.codes;
  C sum = 0;
  for (int64_t code = threadIdx.x; code < args.codes; code += usage_threads) sum += counts[code];
  sum = block_sum(sum);
  if (threadIdx.x == 0) hits = sum;
  __syncthreads();
  const C per_hit = hits == 0 ? C(0) : static_cast<C>(args.codes) / hits;
  C used = 0;
  for (int64_t code = threadIdx.x; code < args.codes; code += usage_threads) {
    C value = usage[code];
    if (hits != 0) value += rate_of<C>(args, head * args.codes + code) * (counts[code] * per_hit - value);
    usage[code] = value;
    used += value;
  }
  used = block_sum(used);
  if (threadIdx.x > 0) return;
  heads[head] = {per_hit, used / (used + static_cast<C>(args.codes) * static_cast<C>(args.epsilon))};
}

// A code, and the warp that moves it.
template <class T>
struct CodeStep {
  using C = Compute<T>;
  const CodebookUpdate& args;
  const int64_t code, first;  // the code and its first component, counted over all heads

  __device__ __forceinline__ CodeStep(const CodebookUpdate& args_, int64_t code_)
      : args(args_), code(code_), first(code_ * args_.dim) {}

  __device__ __forceinline__ void average(const HeadUsage<C>& head, C usage) const {
    constexpr C forgotten = static_cast<C>(1e-12);
    const C r = rate_of<C>(args, code);
    const C* batch_sums = static_cast<const C*>(args.batch_sums) + first;
    C* sums = static_cast<C*>(args.sums) + first;
    C square = 0;
    for (int64_t k = warp_lane(); k < args.dim; k += warp_size) {
      const C moved = sums[k] + r * (head.per_hit * batch_sums[k] - sums[k]);
      sums[k] = moved;
      square += moved * moved;
    }
    square = warp_total(square);
    if (usage <= forgotten) return;
    const C share = (usage + static_cast<C>(args.epsilon)) * head.shrink;
    write(static_cast<const C*>(sums), args.normalize ? per_length(square) : 1 / share);
  }

  __device__ __forceinline__ void revive() const {
    const T* candidate = static_cast<const T*>(args.candidates) + first;
    C square = 0;
    for (int64_t k = warp_lane(); k < args.dim; k += warp_size) {
      const C value = to_compute(candidate[k]);
      square += value * value;
    }
    square = warp_total(square);
    if (square != square) return;
    const C scale = args.normalize ? per_length(square) : C(1);
    write(candidate, scale);
    C* sums = static_cast<C*>(args.sums) + first;
    for (int64_t k = warp_lane(); args.sums != nullptr && k < args.dim; k += warp_size) {
      sums[k] = scale * to_compute(candidate[k]);
    }
    if (warp_lane() == 0) static_cast<C*>(args.usage)[code] = 1;
  }

 private:
  // A lane reads what it wrote itself.
  template <class From>
  __device__ __forceinline__ void write(const From* from, C scale) const {
    T* to = static_cast<T*>(args.codebook) + first;
    for (int64_t k = warp_lane(); k < args.dim; k += warp_size) to[k] = from_compute<T>(scale * to_compute(from[k]));
  }

  // 1 for a vector of zeros, which has no direction to keep.
  static __device__ __forceinline__ C per_length(C square) { return square > 0 ? 1 / sqrt(square) : C(1); }
};

template <class T>
__global__ void __launch_bounds__(block_threads)
    update_kernel(CodebookUpdate args, const HeadUsage<Compute<T>>* heads) {
  using C = Compute<T>;
  const int64_t code = warp_number();
  if (code >= args.heads * args.codes) return;
  const HeadUsage<C> head = heads[code / args.codes];
  if (head.per_hit == 0) return;
  const C usage = static_cast<const C*>(args.usage)[code];
  const CodeStep<T> step(args, code);
  if (args.sums != nullptr) step.average(head, usage);
  __syncwarp();  // all lanes have read the usage
  if (args.candidates != nullptr && usage < static_cast<C>(args.revive_below)) step.revive();
}

template <class T>
void update(const CodebookUpdate& args, void* stream) {
  using C = Compute<T>;
  Arena arena(args.workspace);
  HeadUsage<C>* heads = arena.take<HeadUsage<C>>(args.heads);
  launch("usage", usage_kernel<C>, args.heads, usage_threads, 0, stream, args, heads);
  launch("update", update_kernel<T>, blocks_of_warps(args.heads * args.codes), block_threads, 0, stream, args,
         static_cast<const HeadUsage<C>*>(heads));
}

}  // namespace
}  // namespace isthmus::cuda
