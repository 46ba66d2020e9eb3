// The parts of a workspace.
#pragma once

#include "core/launch.cuh"

namespace isthmus::cuda {
namespace {

// Hands out parts of one block of memory. With a null base it only measures.
struct Arena {
  uintptr_t base;
  int64_t used = 0;

  explicit Arena(void* base_) : base(reinterpret_cast<uintptr_t>(base_)) {}

  template <class T>
  T* take(int64_t count) {
    constexpr int64_t alignment = 256;
    T* part = reinterpret_cast<T*>(base + static_cast<uintptr_t>(used));
    used += divide_up(count * static_cast<int64_t>(sizeof(T)), alignment) * alignment;
    return part;
  }
};

}  // namespace
}  // namespace isthmus::cuda
