// Screening: bounds of all scores, of which an epilogue keeps what decides. Two of them serve top-k:
//
//   group maxima    of each eight neighbouring slots the highest lower bound: the k-th highest of a row is a bar that
//   at
//                   least k features reach
//   candidates      a bit for each slot whose upper bound does not fall below the bar
//
// so the product is computed twice, at the speed of the tensor cores, and the [N, F] scores never exist.
#pragma once

#include "topk/kernels.h"
#include "topk/operands.cuh"

namespace isthmus::cuda {
namespace {

constexpr int slots_per_group = 8;  // the columns that four lanes of a fragment share

// Scores are compared as ranks: their magnitudes if signs do not count, and nothing below the floor.
struct Ranks {
  unsigned kept_bits;
  float floor;

  explicit Ranks(Activation activation)
      : kept_bits(activation == Activation::abs ? 0x7fffffffu : 0xffffffffu),
        floor(activation == Activation::relu ? 0 : -INFINITY) {}

  __device__ __forceinline__ float rank(float score) const {
    return __int_as_float(__float_as_int(score) & static_cast<int>(kept_bits));
  }
};

// How far a screened score may be off.
__device__ __forceinline__ float margin(const RowBound& row, const FeatureBound& feature) {
  return row.slope * feature.length + row.length * feature.error + row.live * feature.slack;
}

// What an epilogue sees of a block.
struct ScreenedTile {
  int64_t first_row, first_slot;  // of the chunk; of all slots
  const RowBound* rows;           // [mma_tile], in shared memory
  const FeatureBound* features;   // [mma_tile]
};

// Calls f(r, half, c, j, score, margin) for each of this thread's products; c is the outer loop.
template <class F>
__device__ __forceinline__ void each_score(const ScreenedTile& tile, const WarpProducts& products, F&& f) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const FeatureBound of[2] = {tile.features[WarpProducts::column(c)], tile.features[WarpProducts::column(c) + 1]};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const RowBound row = tile.rows[WarpProducts::row(r, half)];
#pragma unroll
        for (int j = 0; j < 2; ++j)
          f(r, half, c, j, products.values[r][c][2 * half + j] + of[j].bias, margin(row, of[j]));
      }
    }
  }
}

// An Epilogue has begin() and finish(), at the ends of a block, and tile(screened tile, products) between them.
template <class T, class Epilogue>
__global__ void __launch_bounds__(mma_threads, 2) screen_kernel(Screen<T> screen, Epilogue epilogue) {
  extern __shared__ MmaStage stages[];
  __shared__ RowBound rows[mma_tile];
  using Operand = typename Screen<T>::Operand;
  const int64_t row_tile = blockIdx.x / screen.ranges, first_tile = blockIdx.x % screen.ranges * screen.tiles_per_range;
  const int64_t in_use = static_cast<int64_t>((*screen.slots_in_use + mma_tile - 1) / mma_tile) - first_tile;
  const int64_t tiles = in_use < screen.tiles_per_range ? in_use : screen.tiles_per_range;
  if (tiles <= 0) return;
  if (threadIdx.x < mma_tile) rows[threadIdx.x] = screen.row_bounds[row_tile * mma_tile + threadIdx.x];
  epilogue.begin();
  const TileProduct<Operand> product{screen.rows + row_tile * mma_tile * screen.depth,
                                     screen.columns + first_tile * mma_tile * screen.depth, screen.depth, tiles};
  product.run(stages, [&](int64_t tile, WarpProducts& products) {
    const int64_t first_slot = (first_tile + tile) * mma_tile;
    epilogue.tile({row_tile * mma_tile, first_slot, rows, screen.feature_bounds + first_slot}, products);
  });
  epilogue.finish();
}

template <class T, class Epilogue>
void run_screen(const Screen<T>& screen, int64_t row_tiles, const Epilogue& epilogue, void* stream) {
  launch("screen", screen_kernel<T, Epilogue>, row_tiles * screen.ranges, mma_threads, mma_stages * sizeof(MmaStage),
         stream, screen, epilogue);
}

// ---- epilogues -----------------------------------------------------------------------------------------------------

// maxima [chunk rows, slots / 8]: of the lower bounds of the slots; a bound that is not a number is passed over.
struct GroupMaxima {
  Ranks ranks;
  float* maxima;
  int64_t stride;

  __device__ __forceinline__ void begin() const {}
  __device__ __forceinline__ void finish() const {}

  __device__ __forceinline__ void tile(const ScreenedTile& tile, WarpProducts& products) const {
    float of[4][2][4];
#pragma unroll
    for (int i = 0; i < 32; ++i) of[i / 8][i / 4 % 2][i % 4] = -INFINITY;
    each_score(tile, products, [&](int r, int half, int c, int, float score, float margin) {
      of[r][half][c] = fmaxf(of[r][half][c], ranks.rank(score) - margin);
    });
    // The four lanes that share a row meet. Each ends with the maximum of other eight columns, 8 · lane % 4 …, so that
    // one exchange serves all.
    const int lane = threadIdx.x % 4;
    const bool second = lane & 2, first = lane & 1;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* m = of[r][half];
        const float even = meet(second ? m[2] : m[0], second ? m[0] : m[2], 2);
        const float odd = meet(second ? m[3] : m[1], second ? m[1] : m[3], 2);
        const int64_t row = tile.first_row + WarpProducts::row(r, half);
        const int64_t group = (tile.first_slot + WarpProducts::first_column()) / slots_per_group + lane;
        maxima[row * stride + group] = meet(first ? odd : even, first ? even : odd, 1);
      }
    }
  }

  static __device__ __forceinline__ float meet(float kept, float given, int partner) {
    return fmaxf(kept, __shfl_xor_sync(0xffffffffu, given, partner));
  }
};

// mask [chunk rows, words]: a bit for each slot in use that passes. Of a warp's 32 columns, all of one group, a word
// for each row. Test: of_group(group) has passes(row, slot, score, margin).
template <class Test>
struct CandidateBits {
  Test test;
  uint32_t* mask;
  const int* group_counts;
  int64_t words, groups, group_slots;

  template <class T>
  CandidateBits(const Screen<T>& screen, const Test& test_, uint32_t* mask_)
      : test(test_),
        mask(mask_),
        group_counts(screen.group_counts),
        words(screen.words()),
        groups(screen.shape.groups),
        group_slots(screen.group_slots) {}

  __device__ __forceinline__ void begin() const {}
  __device__ __forceinline__ void finish() const {}

  __device__ __forceinline__ void tile(const ScreenedTile& tile, WarpProducts& products) const {
    uint32_t bits[4][2] = {};
    const int64_t first_slot = tile.first_slot + WarpProducts::first_column();
    const int64_t group = first_slot / group_slots, left = used_slots(group) - (first_slot - group * group_slots);
    const uint32_t used = left >= slots_per_word ? 0xffffffffu : left <= 0 ? 0 : (1u << left) - 1;
    const auto of_group = test.of_group(group < groups ? group : 0);
    each_score(tile, products, [&](int r, int half, int c, int j, float score, float margin) {
      const int bit = 8 * c + threadIdx.x % 4 * 2 + j;
      const int64_t row = tile.first_row + WarpProducts::row(r, half);
      if (of_group.passes(row, first_slot + bit, score, margin)) bits[r][half] |= 1u << bit;
    });
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t word = bits[r][half];
        word |= __shfl_xor_sync(0xffffffffu, word, 1);
        word |= __shfl_xor_sync(0xffffffffu, word, 2);
        const int64_t row = tile.first_row + WarpProducts::row(r, half);
        if (threadIdx.x % 4 == 0) mask[row * words + first_slot / slots_per_word] = word & used;
      }
    }
  }

 private:
  __device__ __forceinline__ int64_t used_slots(int64_t group) const {
    return group < groups ? group_counts[group] : 0;
  }
};

}  // namespace
}  // namespace isthmus::cuda
