// Parallel loop over work items. Kernels cut their work into items whose borders depend on the problem alone, never on
// the thread count, and combine partial results in item order: the same numbers for 1, 2 or 7 threads.
//
// The loop itself is borrowed: the extension installs torch's thread pool (so torch.set_num_threads holds), a C++
// program may install its own; without one, loops run serially.
#pragma once

#include <cstdint>
#include <type_traits>

namespace isthmus {

using RangeBody = void (*)(int64_t begin, int64_t end, void* context);
// Calls body(begin, end, context) for disjoint ranges that cover [0, count), none shorter than grain if avoidable.
using ParallelBackend = void (*)(int64_t count, int64_t grain, RangeBody body, void* context);

void set_parallel_backend(ParallelBackend backend);
void parallel_ranges(int64_t count, int64_t grain, RangeBody body, void* context);

// static: every kernel file gets its own copy, so code compiled for AVX-512 is never merged into another file.
template <class Body>
static inline void parallel_for(int64_t count, int64_t grain, Body&& body) {
  parallel_ranges(
      count, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<std::remove_reference_t<Body>*>(context))(begin, end);
      },
      &body);
}

}  // namespace isthmus
