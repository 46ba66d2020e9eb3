// The steps of a search, in order.
#pragma once

#include "codebook/prepare.cuh"
#include "codebook/screen.cuh"
#include "codebook/select.cuh"

namespace isthmus::cuda {
namespace {

template <class T, class Operand>
void search(const CodeSearch& args, void* stream) {
  using Plan = SearchPlan<T, Operand>;
  Arena arena(args.workspace);
  const Plan plan(args, arena);
  launch("pack_codes", pack_codes_kernel<T, Operand>, blocks_of_warps(args.heads * plan.groups), block_threads, 0,
         stream, plan);
  if constexpr (Plan::centred) {
    launch("centre", centre_kernel<T, Operand>, args.heads * divide_up(args.dim, warp_size), block_threads, 0, stream,
           plan);
  }
  launch("code_operands", code_operands_kernel<T, Operand>,
         blocks_of_warps(args.heads * plan.code_tiles * Plan::tile / group_codes), block_threads, 0, stream, plan);
  const int64_t all_tiles = args.heads * plan.row_tiles;
  for (int64_t first = 0; first < all_tiles; first += plan.chunk_tiles) {
    const int64_t left = all_tiles - first, tiles = left < plan.chunk_tiles ? left : plan.chunk_tiles;
    const int64_t row_blocks = blocks_of_warps(tiles * Plan::tile);
    launch("row_operands", row_operands_kernel<T, Operand>, row_blocks, block_threads, 0, stream, plan, first);
    screen(plan, first, tiles, stream);
    launch("select", select_kernel<T, Operand>, row_blocks, block_threads, 0, stream, plan, first);
  }
}

// Below this depth float32 is multiplied as it is: most of a tensor core's depth would be padding, and in few
// dimensions many codes are near.
constexpr int64_t min_rounded_depth = 16;

// What is multiplied: the half types on tensor cores, as what float32 is rounded to; float64 as it is.
template <class F>
inline void dispatch_operand(const CodeSearch& args, F&& f) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    if constexpr (!std::is_same_v<T, float>) {
      f.template operator()<T, T>();
    } else if (args.dim < min_rounded_depth) {
      f.template operator()<float, float>();
    } else {
      f.template operator()<float, __nv_bfloat16>();
    }
  });
}

}  // namespace
}  // namespace isthmus::cuda
