// Packs of N neighbouring elements, which one thread moves in one access; the best size is 16 bytes.
#pragma once

#include "core/launch.cuh"

namespace isthmus::cuda {
namespace {

// For memory that no thread of the kernel writes.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
  if constexpr (sizeof(T) * N == 16) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(p));
    return *reinterpret_cast<const Pack<T, N>*>(&bits);
  } else {
    return {{__ldg(p)}};
  }
}

template <class T, int N>
__device__ __forceinline__ void load(const T* from, Compute<T> (&out)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = to_compute(pack.values[j]);
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, const Compute<T> (&values)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int j = 0; j < N; ++j) pack.values[j] = from_compute<T>(values[j]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// The threads of a block that has `count` packs to do: whole warps, at most `most` threads.
inline int threads_for(int64_t count, int most) {
  const int64_t warps = divide_up(count < most ? count : most, warp_size);
  return static_cast<int>(warp_size * (warps < 1 ? 1 : warps));
}

// Calls f<N>() with the elements of a 16-byte access if all rows of `cols` elements start on one, else with 1.
template <class T, class F, class... Pointers>
void dispatch_pack(int64_t cols, F&& f, const Pointers*... pointers) {
  constexpr int n = 16 / sizeof(T);
  const bool aligned = cols % n == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
  if (aligned) {
    f.template operator()<n>();
  } else {
    f.template operator()<1>();
  }
}

}  // namespace
}  // namespace isthmus::cuda
