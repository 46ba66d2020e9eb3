#include "core/parallel.h"

namespace isthmus {
namespace {

void serial(int64_t count, int64_t, RangeBody body, void* context) { body(0, count, context); }

ParallelBackend current_backend = serial;

}  // namespace

void set_parallel_backend(ParallelBackend backend) { current_backend = backend ? backend : serial; }

void parallel_ranges(int64_t count, int64_t grain, RangeBody body, void* context) {
  if (count <= grain) {
    if (count > 0) body(0, count, context);
  } else {
    current_backend(count, grain, body, context);
  }
}

}  // namespace isthmus
