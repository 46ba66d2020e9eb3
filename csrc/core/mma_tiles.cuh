// A tile of 128 rows against tiles of 128 columns, multiplied on the tensor cores (core/mma.cuh): a · bᵀ of padded half
// types, summed in float32 in the registers of a block of 256 threads; what becomes of the products is the caller's
// epilogue.
//
// The 8 warps stand 2 by 4, each with 64 rows and 32 columns. Slices of 32 steps of depth pass through three stages in
// shared memory: two are on their way while one is multiplied.
#pragma once

#include "core/mma.cuh"

namespace isthmus::cuda {
namespace {

constexpr int mma_tile = 128;
constexpr int mma_threads = 256;
constexpr int mma_depth = 32;  // the depth of operands is padded to a multiple
constexpr int mma_stages = 3;

struct alignas(16) MmaStage {
  static constexpr int pitch = mma_depth + 8;  // 80 bytes between rows: eight of them touch all banks once
  uint16_t a[mma_tile][pitch], b[mma_tile][pitch];
};

// The products of a warp: [16 rows][8 columns][the four of a fragment].
struct WarpProducts {
  float values[4][4][4];

  static __device__ __forceinline__ int first_row() { return threadIdx.x / (4 * warp_size) * 64; }
  static __device__ __forceinline__ int first_column() { return threadIdx.x / warp_size % 4 * 32; }
  // Of the tile: values[r][c][2 · half + j] is that of row(r, half) and column(c) + j.
  static __device__ __forceinline__ int row(int r, int half) {
    return first_row() + 16 * r + 8 * half + threadIdx.x % warp_size / 4;
  }
  static __device__ __forceinline__ int column(int c) { return first_column() + 8 * c + threadIdx.x % 4 * 2; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 64; ++i) values[i / 16][i / 4 % 4][i % 4] = 0;
  }

  template <class Operand>
  __device__ __forceinline__ void multiply(const MmaStage& stage) {
    const int lane = threadIdx.x % warp_size;
#pragma unroll
    for (int k = 0; k < mma_depth; k += 16) {
      uint32_t a[4][4], b[2][4];  // b: two runs of eight columns, each in two halves of the depth
#pragma unroll
      for (int r = 0; r < 4; ++r) load_matrices(&stage.a[first_row() + 16 * r + lane % 16][k + lane / 16 * 8], a[r]);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        load_matrices(&stage.b[first_column() + 16 * c + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8], b[c]);
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          multiply_add<Operand>(a[r], b[c / 2][c % 2 * 2], b[c / 2][c % 2 * 2 + 1], values[r][c]);
        }
      }
    }
  }
};

// The operands of a block.
template <class Operand>
struct TileProduct {
  const Operand *a, *b;  // [mma_tile, depth] and [tiles, mma_tile, depth]
  int64_t depth, tiles;

  // The steps of a block: mma_depth of the depth of one tile of b after the other.
  struct Step {
    int64_t tile = 0, depth = 0;
  };

  __device__ __forceinline__ void advance(Step& step) const {
    step.depth += mma_depth;
    if (step.depth < depth) return;
    step.depth = 0;
    ++step.tile;
  }

  __device__ __forceinline__ void fetch(const Step& step, MmaStage& stage) const {
    constexpr int n = 8, parts = mma_depth / n, at_once = mma_threads / parts;
    const int part = threadIdx.x % parts * n;
#pragma unroll
    for (int i = 0; i < mma_tile; i += at_once) {
      const int r = i + threadIdx.x / parts;
      copy_async(&stage.a[r][part], a + r * depth + step.depth + part);
      copy_async(&stage.b[r][part], b + (step.tile * mma_tile + r) * depth + step.depth + part);
    }
  }

  // epilogue(tile, products) for each tile of b in turn; it may spoil the products. All threads of the block call it.
  template <class Epilogue>
  __device__ __forceinline__ void run(MmaStage* stages, const Epilogue& epilogue) const {
    Step ahead, now;
#pragma unroll
    for (int s = 0; s < mma_stages - 1; ++s) {
      if (ahead.tile < tiles) fetch(ahead, stages[s]);
      commit_copies();
      advance(ahead);
    }
    WarpProducts products;
    for (int s = 0; now.tile < tiles; s = (s + 1) % mma_stages) {
      wait_copies<mma_stages - 2>();
      __syncthreads();  // the copies of all threads are there, and all have left the stage that is filled next
      if (ahead.tile < tiles) fetch(ahead, stages[(s + mma_stages - 1) % mma_stages]);
      commit_copies();
      advance(ahead);
      if (now.depth == 0) products.clear();
      products.multiply<Operand>(stages[s]);
      if (now.depth + mma_depth == depth) epilogue(now.tile, products);
      advance(now);
    }
  }
};

}  // namespace
}  // namespace isthmus::cuda
