#include "check.h"

#include <cstdarg>

namespace isthmus {

int failed_checks = 0;

bool report_check(bool passed, const char* file, int line, const char* format, ...) {
  constexpr int shown = 20;
  if (passed) return true;
  if (++failed_checks > shown) return false;
  std::fprintf(stderr, "%s:%d: failed: ", file, line);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  return false;
}

}  // namespace isthmus
