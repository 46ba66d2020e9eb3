// Scratch memory of a kernel, aligned to the cache line and freed with its scope.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace isthmus {
namespace {

template <class T>
struct Buffer {
  T* const data;

  explicit Buffer(int64_t count)
      : data(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

}  // namespace
}  // namespace isthmus
