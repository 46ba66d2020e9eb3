// What a C++ test needs: CHECK reports a broken promise and goes on, the exit status counts them.
//
// A test of SIMD code defines run_level_tests() once per instruction set, in the way of a kernel (level_main.cpp runs
// them). Such files use no standard containers: a weak symbol compiled for AVX-512 must not reach the code that decides
// whether this CPU has it.
#pragma once

#include <cstdio>

#include "core/isa.h"

namespace isthmus {

extern int failed_checks;

__attribute__((format(printf, 4, 5))) bool report_check(bool passed, const char* file, int line, const char* format,
                                                        ...);

#define CHECK(condition) ::isthmus::report_check((condition), __FILE__, __LINE__, "%s", #condition)
// The message says with which values.
#define CHECK_THAT(condition, ...) ::isthmus::report_check((condition), __FILE__, __LINE__, __VA_ARGS__)
#define CHECK_THROWS(expression)                                                   \
  do {                                                                             \
    bool thrown = false;                                                           \
    try {                                                                          \
      expression;                                                                  \
    } catch (const std::exception&) {                                              \
      thrown = true;                                                               \
    }                                                                              \
    ::isthmus::report_check(thrown, __FILE__, __LINE__, "%s throws", #expression); \
  } while (false)

struct LevelTests {
  void (*run)();
};
#if defined(ISTHMUS_MATRIX_TESTS)
ISTHMUS_DECLARE_MATRIX_KERNELS(LevelTests, level_tests)
#else
ISTHMUS_DECLARE_KERNELS(LevelTests, level_tests)
#endif

// Ends a test file that is compiled for each level.
#define ISTHMUS_LEVEL_TESTS(run)              \
  namespace isthmus::ISTHMUS_LEVEL {          \
  extern const LevelTests level_tests_table;  \
  const LevelTests level_tests_table = {run}; \
  }

}  // namespace isthmus
