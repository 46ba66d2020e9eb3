// Runs a test file at every instruction set level that was compiled in and that this CPU has.
#include "check.h"

using namespace isthmus;

int main() {
  for (Isa isa : available_isas()) {
#if !defined(ISTHMUS_MATRIX_TESTS)
    if (isa > Isa::avx512) continue;  // no code of its own there
#endif
    set_isa(isa);
    std::printf("---- %s\n", isa_name(isa));
    level_tests_kernels().run();
  }
  if (failed_checks > 0) std::fprintf(stderr, "%d checks failed\n", failed_checks);
  return failed_checks > 0;
}
