// Memory that is fresh from the system: what it costs to touch it.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace isthmus {

// Asks the system to back a large result by huge pages. From 32 MB on (the largest mmap threshold of glibc), malloc
// maps fresh pages for every result, and each page of 4 KB that is written for the first time costs a fault: for a
// gradient of 75 MB three times as much as filling it. Contents and addresses stay; a system that has no huge pages
// ignores it.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t least = int64_t(32) << 20;
  if (bytes < least) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), first = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (first + page - 1) / page * page, end = (first + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace isthmus
