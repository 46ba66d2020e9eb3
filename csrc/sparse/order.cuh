// The order by latent: a radix sort of the entries in use (core/sort.cuh).
#pragma once

#include "sparse/code.cuh"

namespace isthmus::cuda {
namespace {

// The latent of each entry, -1 for those that the order leaves out.
template <class T>
__global__ void __launch_bounds__(block_threads)
    latents_in_use_kernel(CodeLayout code, const T* values, int64_t* latents) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (e < code.entries) latents[e] = to_compute(values[e]) == 0 ? -1 : code.indices[e];
}

// The row whose entries include e: rows before `low` end at or before it, those from `high` on begin behind it.
__device__ __forceinline__ int64_t row_of(const CodeLayout& code, int64_t e) {
  if (code.offsets == nullptr) return e / code.k;
  int64_t low = 0, high = code.rows;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (code.offsets[middle + 1] <= e) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__global__ void __launch_bounds__(block_threads) write_order_kernel(SortLatents args, Groups groups) {
  const int64_t p = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (p <= args.features) args.starts[p] = groups.starts[p];
  if (p >= args.code.entries) return;
  const bool in_use = p < groups.starts[args.features];
  const int64_t entry = in_use ? groups.items[p] : -1;
  args.order_entries[p] = entry;
  args.order_rows[p] = in_use ? row_of(args.code, entry) : -1;
}

struct OrderPlan {
  Groups groups;
  int64_t* latents;

  OrderPlan(const SortLatents& args, Arena& arena)
      : groups(args.code.entries, args.features, arena),
        latents(arena.take<int64_t>(args.values != nullptr ? args.code.entries : 0)) {}
};

inline void latent_order(const SortLatents& args, void* stream) {
  Arena arena(args.workspace);
  OrderPlan plan(args, arena);
  const int64_t entries = args.code.entries;
  check_code(args.code, args.features, stream);
  const int64_t* latents = args.code.indices;
  if (args.values != nullptr) {
    dispatch_dtype(args.dtype, [&]<class T>() {
      launch("latents_in_use", latents_in_use_kernel<T>, divide_up(entries, block_threads), block_threads, 0, stream,
             args.code, static_cast<const T*>(args.values), plan.latents);
    });
    latents = plan.latents;
  }
  plan.groups.sort(latents, -1, stream);
  const int64_t threads = entries > args.features ? entries : args.features + 1;
  launch("write_order", write_order_kernel, divide_up(threads, block_threads), block_threads, 0, stream, args,
         plan.groups);
}

}  // namespace
}  // namespace isthmus::cuda
