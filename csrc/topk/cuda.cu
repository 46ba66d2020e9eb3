// The top-k encoder on CUDA devices; what is computed stands in kernels.h.
//
// All scores are screened on the tensor cores, in half types with a rigorous bound (operands.cuh), twice: first for a
// bar that k features of a row are sure to reach, then for the features that may reach it (screen.cuh). These few,
// about k and half as many, are scored in float64 in the operations of the CPU, so the answer is that of the CPU, ties
// included, and no approximation shows. A row or feature that no bound holds for is scored in float64 throughout.
//
// Arithmetic bounds it: 4·N·F·D operations of half types. Memory: weights are read once and written and read as half
// types, an eighth of a number for each score goes out and comes back, and each candidate's weights are gathered. The
// workspace is the half types of the weights and 64 MiB for rows, however many there are; [N, F] never exists.
//
// Nothing waits for the device and no result depends on the order of blocks: all of it can be captured in a graph.

#include "topk/select.cuh"

namespace isthmus::cuda {
namespace {

template <class T>
void encode(const TopkEncode& args, void* stream) {
  Arena arena(args.workspace);
  const EncodePlan<T> plan(args, arena);
  const Screen<T>& screen = plan.screen;
  const Ranks ranks(args.activation);
  prepare_columns(screen, stream);
  for (int64_t first = 0; first < args.rows; first += screen.chunk_rows()) {
    const int64_t tiles = prepare_rows(screen, first, stream), rows = tiles * mma_tile;
    run_screen(screen, tiles, GroupMaxima{ranks, plan.maxima, plan.maxima_stride()}, stream);
    launch("cut", cut_kernel<T>, walk_blocks(rows * args.groups), walk_threads, 0, stream, plan, ranks, rows);
    const CutTest test{ranks, plan.cuts, args.groups};
    run_screen(screen, tiles, CandidateBits<CutTest>(screen, test, plan.mask), stream);
    launch("select", select_kernel<T>, walk_blocks(rows), walk_threads, 0, stream, args, plan, first);
  }
}

}  // namespace

int64_t topk_workspace(const TopkEncode& args) {
  Arena arena(nullptr);
  dispatch_dtype(args.dtype, [&]<class T>() { EncodePlan<T>(args, arena); });
  return arena.used;
}

void topk_encode(const TopkEncode& args, void* stream) {
  if (args.rows == 0) return;
  dispatch_dtype(args.dtype, [&]<class T>() { encode<T>(args, stream); });
}

}  // namespace isthmus::cuda
