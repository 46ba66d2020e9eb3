// Vector quantization on CUDA devices.
//
// Search screens all codes on the tensor cores (short float32 vectors and float64: on the FMA units) and scores the few
// that may be the best in float64, as plan.cuh explains; the answer is that of the CPU. Arithmetic bounds it, 2·N·K·D
// operations; memory: O(K·D) and a chunk of 64 MiB for rows, however many there are.
//
// Backward, statistics and update are bound by memory; sums over the rows of a code go through core/sort.cuh.
//
// Nothing waits for the device and no result depends on the order of blocks: all of it can be captured in a graph.

#include "codebook/kernels.h"

#include "codebook/backward.cuh"
#include "codebook/search.cuh"
#include "codebook/statistics.cuh"
#include "codebook/update.cuh"

namespace isthmus::cuda {

int64_t codebook_workspace(const CodeSearch& args) {
  Arena arena(nullptr);
  dispatch_operand(args, [&]<class T, class Operand>() { SearchPlan<T, Operand>(args, arena); });
  return arena.used;
}

int64_t codebook_workspace(const CodeMatch& args) {
  const int64_t rows = codebook_workspace(search_of(args)), codes = codebook_workspace(search_of(exchanged(args)));
  return rows > codes ? rows : codes;
}

int64_t codebook_workspace(const QuantizeBackward& args) {
  Arena arena(nullptr);
  dispatch_dtype(args.dtype, [&]<class T>() { BackwardPlan<T>(args, arena); });
  return arena.used;
}

int64_t codebook_workspace(const CodeStatistics& args) {
  Arena arena(nullptr);
  dispatch_dtype(args.dtype, [&]<class T>() { GroupSums<Compute<T>>(args.rows, args.codes, args.dim, arena); });
  return arena.used;
}

int64_t codebook_workspace(const CodebookUpdate& args) {
  Arena arena(nullptr);
  dispatch_dtype(args.dtype, [&]<class T>() { arena.take<HeadUsage<Compute<T>>>(args.heads); });
  return arena.used;
}

void codebook_search(const CodeSearch& args, void* stream) {
  dispatch_operand(args, [&]<class T, class Operand>() { search<T, Operand>(args, stream); });
}

// Two searches, one after the other: a product on the tensor cores costs less than would the merge of codes over
// blocks.
void codebook_match(const CodeMatch& args, void* stream) {
  codebook_search(search_of(args), stream);
  codebook_search(search_of(exchanged(args)), stream);
}

void codebook_gather(const CodeSearch& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    launch("gather", gather_kernel<T>, blocks_of_warps(args.heads * args.rows), block_threads, 0, stream, args);
  });
}

void codebook_backward(const QuantizeBackward& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() { backward<T>(args, stream); });
}

void codebook_statistics(const CodeStatistics& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() { statistics<T>(args, stream); });
}

void codebook_update(const CodebookUpdate& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() { update<T>(args, stream); });
}

}  // namespace isthmus::cuda
