// The matrix product inside searching ops on CUDA: a tile of a · bᵀ in the registers of one block, never stored; what
// becomes of it is the caller's epilogue. The CUDA side of core/product.h.
//
// A block of 256 threads holds a tile of 128 by 128 products (64 by 64 in float64), 8 by 8 (4 by 4) of them in each
// thread. Slices of 16 steps of depth pass through two buffers in shared memory, the next one on its way from global
// memory while the last is multiplied. Every product is one chain of fused multiply-adds in order of depth.
#pragma once

#include "core/launch.cuh"

namespace isthmus::cuda {
namespace {

constexpr int block_side = 16;  // a block is 16 by 16 threads
constexpr int block_threads = block_side * block_side;
constexpr int depth_slice = block_side;

template <class C>
constexpr int vector_size = 16 / sizeof(C);  // elements of one access to shared memory
template <class C>
constexpr int per_thread = 2 * vector_size<C>;  // rows of a thread, and columns of a thread
template <class C>
constexpr int tile_size = block_side * per_thread<C>;
// Elements between rows in shared memory: spreads transposing stores over the banks and keeps vectors aligned.
template <class C>
constexpr int tile_stride = tile_size<C> + 4;

// Which rows (columns) of the tile are a thread's: two runs of vector_size, so that neighbours read neighbouring
// vectors.
template <class C>
__device__ __forceinline__ int place(int thread, int i) {
  constexpr int v = vector_size<C>;
  return i / v * (block_side * v) + thread * v + i % v;
}

// Rows first … of a row-major matrix [count, depth]; rows that do not exist are zero.
template <class T>
struct MatrixRows {
  const T* matrix;
  int64_t first, count, depth;
};

// depth_slice steps of one operand: [step][row], so that a thread reads its rows as vectors.
template <class C>
struct alignas(16) Slice {
  C elements[depth_slice][tile_stride<C>];

  // Thread (y, x) brings step x of rows y, y + 16, …
  template <class T>
  static __device__ __forceinline__ void fetch(const MatrixRows<T>& rows, int64_t depth, int y, int x,
                                               C (&values)[per_thread<C>]) {
    const int64_t left = rows.count - rows.first - y;
    const T* p = rows.matrix + (rows.first + y) * rows.depth + depth + x;
#pragma unroll
    for (int i = 0; i < per_thread<C>; ++i) {
      const bool exists = i * block_side < left && depth + x < rows.depth;
      values[i] = exists ? to_compute(p[i * block_side * rows.depth]) : C(0);
    }
  }
  __device__ __forceinline__ void put(int y, int x, const C (&values)[per_thread<C>]) {
#pragma unroll
    for (int i = 0; i < per_thread<C>; ++i) elements[x][y + i * block_side] = values[i];
  }
  __device__ __forceinline__ void read(int k, int thread, C (&values)[per_thread<C>]) const {
    constexpr int v = vector_size<C>;
#pragma unroll
    for (int i = 0; i < per_thread<C>; i += v) {
      const auto pack = *reinterpret_cast<const Pack<C, v>*>(&elements[k][place<C>(thread, i)]);
#pragma unroll
      for (int j = 0; j < v; ++j) values[i + j] = pack.values[j];
    }
  }
};

// Two buffers of both operands, in shared memory.
template <class C>
struct ProductSlices {
  Slice<C> a[2], b[2];
};

// products[r][c] += Σ_k a[place(y, r)][k] · b[place(x, c)][k] for thread (y, x). All threads of the block call it. The
// slices must be free on entry (a barrier since their last use) and are free on return.
template <class C, class T>
__device__ __forceinline__ void multiply_tiles(const MatrixRows<T>& a, const MatrixRows<T>& b, ProductSlices<C>& slices,
                                               C (&products)[per_thread<C>][per_thread<C>]) {
  constexpr int n = per_thread<C>;
  const int x = threadIdx.x % block_side, y = threadIdx.x / block_side;
  C next[n];
  Slice<C>::fetch(a, 0, y, x, next);
  slices.a[0].put(y, x, next);
  Slice<C>::fetch(b, 0, y, x, next);
  slices.b[0].put(y, x, next);
  __syncthreads();
  int buffer = 0;
  const auto multiply = [&](int first_step) {
#pragma unroll
    for (int k = first_step; k < first_step + depth_slice / 2; ++k) {
      C from_a[n], from_b[n];
      slices.a[buffer].read(k, y, from_a);
      slices.b[buffer].read(k, x, from_b);
#pragma unroll
      for (int r = 0; r < n; ++r) {
#pragma unroll
        for (int c = 0; c < n; ++c) products[r][c] += from_a[r] * from_b[c];
      }
    }
  };
  for (int64_t depth = 0; depth < a.depth; depth += depth_slice) {
    const bool more = depth + depth_slice < a.depth;
    // One operand travels during each half of the arithmetic: half the registers for data in flight. The other buffer
    // was last read before the barrier that ended the previous round.
    if (more) Slice<C>::fetch(a, depth + depth_slice, y, x, next);
    multiply(0);
    if (more) {
      slices.a[buffer ^ 1].put(y, x, next);
      Slice<C>::fetch(b, depth + depth_slice, y, x, next);
    }
    multiply(depth_slice / 2);
    if (more) slices.b[buffer ^ 1].put(y, x, next);
    __syncthreads();
    buffer ^= 1;
  }
}

}  // namespace
}  // namespace isthmus::cuda
