// Screening: of all pairs of a row and a code the approximate scores, of which the maximum of each group of 32 codes is
// kept. A matrix product with an epilogue of maxima in registers: on tensor cores (core/mma.cuh) or on the FMA units
// (core/product.cuh). A block holds a tile of rows against the tiles of a range of codes.
#pragma once

#include "codebook/plan.cuh"
#include "core/mma.cuh"

namespace isthmus::cuda {
namespace {

// The operands of a block, and where its maxima go.
template <class Operand>
struct ScreenBlock {
  using C = Compute<Operand>;
  static constexpr int tile = screen_tile<Operand>;

  int64_t depth, tiles;  // of codes
  const Operand *rows, *codes;
  const C* offsets;
  C* maxima;  // [groups, stride]
  int64_t stride;

  template <class T>
  __device__ __forceinline__ ScreenBlock(const SearchPlan<T, Operand>& plan, int64_t first_tile) {
    const int64_t row_tile = blockIdx.x / plan.ranges, head = (first_tile + row_tile) / plan.row_tiles;
    const int64_t code_tile = blockIdx.x % plan.ranges * plan.tiles_per_range, left = plan.code_tiles - code_tile;
    const int64_t first_code = (head * plan.code_tiles + code_tile) * tile;
    depth = plan.depth;
    tiles = left < plan.tiles_per_range ? left : plan.tiles_per_range;
    rows = plan.rows + row_tile * tile * depth;
    codes = plan.codes + first_code * depth;
    offsets = plan.offsets + first_code;
    stride = plan.chunk_tiles * tile;
    maxima = plan.maxima + code_tile * (tile / group_codes) * stride + row_tile * tile;
  }
};

// ---- tensor cores --------------------------------------------------------------------------------------------------

// 8 warps, 2 by 4, each with 64 rows against 32 codes: one group.
constexpr int screen_stages = 3;
constexpr int stage_pitch = depth_step + 8;  // 80 bytes between rows: eight of them touch all banks once

struct alignas(16) ScreenStage {
  uint16_t rows[128][stage_pitch], codes[128][stage_pitch];
  float offsets[128];
};
static_assert(sizeof(ScreenStage) % 16 == 0);

// The steps of a block: depth_step of the depth of one tile of codes after the other.
template <class Operand>
struct ScreenSteps {
  int64_t tile = 0, depth = 0;

  __device__ __forceinline__ void advance(const ScreenBlock<Operand>& block) {
    depth += depth_step;
    if (depth < block.depth) return;
    depth = 0;
    ++tile;
  }

  __device__ __forceinline__ void fetch(const ScreenBlock<Operand>& block, ScreenStage& stage) const {
    constexpr int n = 8, parts = depth_step / n, at_once = block_threads / parts;
    const int part = threadIdx.x % parts * n;
#pragma unroll
    for (int i = 0; i < 128; i += at_once) {
      const int r = i + threadIdx.x / parts;
      copy_async(&stage.rows[r][part], block.rows + r * block.depth + depth + part);
      copy_async(&stage.codes[r][part], block.codes + (tile * 128 + r) * block.depth + depth + part);
    }
    if (threadIdx.x < 32) copy_async(&stage.offsets[4 * threadIdx.x], block.offsets + tile * 128 + 4 * threadIdx.x);
  }
};

// Scores of a warp's 64 rows and 32 codes: [16 rows][8 codes][the four of a fragment].
struct WarpScores {
  float scores[4][4][4];

  __device__ __forceinline__ void start(const ScreenStage& stage, int first_code) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float left = stage.offsets[first_code + 8 * c + column],
                  right = stage.offsets[first_code + 8 * c + column + 1];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        scores[r][c][0] = scores[r][c][2] = left;
        scores[r][c][1] = scores[r][c][3] = right;
      }
    }
  }

  template <class Operand>
  __device__ __forceinline__ void multiply(const ScreenStage& stage, int first_row, int first_code) {
    const int lane = threadIdx.x % warp_size;
#pragma unroll
    for (int k = 0; k < depth_step; k += 16) {
      uint32_t rows[4][4], codes[2][4];  // codes: two runs of eight, each in two halves of the depth
#pragma unroll
      for (int r = 0; r < 4; ++r)
        load_matrices(&stage.rows[first_row + 16 * r + lane % 16][k + lane / 16 * 8], rows[r]);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        load_matrices(&stage.codes[first_code + 16 * c + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8], codes[c]);
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          multiply_add<Operand>(rows[r], codes[c / 2][c % 2 * 2], codes[c / 2][c % 2 * 2 + 1], scores[r][c]);
        }
      }
    }
  }

  // The four lanes that share a row meet. Each ends with the maxima of other 16 rows, so that one exchange serves all:
  // lane t of them has rows 16 t + lane / 4 (maxima[0]) and 8 further (maxima[1]). A NaN is passed over.
  __device__ __forceinline__ void row_maxima(float (&maxima)[2]) const {
    const bool second = threadIdx.x & 2, first = threadIdx.x & 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float of[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        of[r] = fmaxf(scores[r][0][2 * half], scores[r][0][2 * half + 1]);
#pragma unroll
        for (int c = 1; c < 4; ++c) {
          of[r] = fmaxf(of[r], fmaxf(scores[r][c][2 * half], scores[r][c][2 * half + 1]));
        }
      }
      const float even = meet(second ? of[2] : of[0], second ? of[0] : of[2], 2);
      const float odd = meet(second ? of[3] : of[1], second ? of[1] : of[3], 2);
      maxima[half] = meet(first ? odd : even, first ? even : odd, 1);
    }
  }

 private:
  static __device__ __forceinline__ float meet(float kept, float given, int partner) {
    return fmaxf(kept, __shfl_xor_sync(0xffffffffu, given, partner));
  }
};

template <class T, class Operand>
__global__ void __launch_bounds__(block_threads, 2) screen_mma_kernel(SearchPlan<T, Operand> plan, int64_t first_tile) {
  extern __shared__ ScreenStage stages[];
  const ScreenBlock<Operand> block(plan, first_tile);
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const int first_row = warp / 4 * 64, first_code = warp % 4 * 32;
  ScreenSteps<Operand> ahead, now;
#pragma unroll
  for (int s = 0; s < screen_stages - 1; ++s) {
    if (ahead.tile < block.tiles) ahead.fetch(block, stages[s]);
    commit_copies();
    ahead.advance(block);
  }
  WarpScores warp_scores;
  for (int s = 0; now.tile < block.tiles; s = (s + 1) % screen_stages) {
    wait_copies<screen_stages - 2>();
    __syncthreads();  // the copies of all threads are there, and all have left the stage that is filled next
    if (ahead.tile < block.tiles) ahead.fetch(block, stages[(s + screen_stages - 1) % screen_stages]);
    commit_copies();
    ahead.advance(block);
    if (now.depth == 0) warp_scores.start(stages[s], first_code);
    warp_scores.multiply<Operand>(stages[s], first_row, first_code);
    if (now.depth + depth_step == block.depth) {
      float maxima[2];
      warp_scores.row_maxima(maxima);
      float* place = block.maxima + (now.tile * 4 + warp % 4) * block.stride + first_row + lane % 4 * 16 + lane / 4;
      place[0] = maxima[0];
      place[8] = maxima[1];
    }
    now.advance(block);
  }
}

// ---- FMA units -----------------------------------------------------------------------------------------------------

template <class T, class Operand>
__global__ void __launch_bounds__(block_threads, 2) screen_fma_kernel(SearchPlan<T, Operand> plan, int64_t first_tile) {
  using C = Compute<Operand>;
  constexpr int n = per_thread<C>, v = vector_size<C>, tile = tile_size<C>;
  constexpr int sharers = group_codes / v;  // threads that have codes of the same group
  __shared__ ProductSlices<C> slices;
  const ScreenBlock<Operand> block(plan, first_tile);
  const int tx = threadIdx.x % block_side, ty = threadIdx.x / block_side;
  for (int64_t t = 0; t < block.tiles; ++t) {
    C scores[n][n] = {};
    multiply_tiles(MatrixRows<Operand>{block.rows, 0, tile, block.depth},
                   MatrixRows<Operand>{block.codes, t * tile, (t + 1) * tile, block.depth}, slices, scores);
#pragma unroll
    for (int run = 0; run < n; run += v) {
      const int64_t group = t * (tile / group_codes) + place<C>(tx, run) / group_codes;
      C offsets[v];
#pragma unroll
      for (int j = 0; j < v; ++j) offsets[j] = block.offsets[t * tile + place<C>(tx, run + j)];
#pragma unroll
      for (int r = 0; r < n; ++r) {
        C most = -infinity<C>();
#pragma unroll
        for (int j = 0; j < v; ++j) most = max(most, scores[r][run + j] + offsets[j]);
#pragma unroll
        for (int offset = sharers / 2; offset > 0; offset /= 2) {
          most = max(most, __shfl_xor_sync(0xffffffffu, most, offset));
        }
        if (tx % sharers == 0) block.maxima[group * block.stride + place<C>(ty, r)] = most;
      }
    }
  }
}

template <class T, class Operand>
void screen(const SearchPlan<T, Operand>& plan, int64_t first_tile, int64_t tiles, void* stream) {
  if constexpr (on_tensor_cores<Operand>) {
    launch("screen", screen_mma_kernel<T, Operand>, tiles * plan.ranges, block_threads,
           screen_stages * sizeof(ScreenStage), stream, plan, first_tile);
  } else {
    launch("screen", screen_fma_kernel<T, Operand>, tiles * plan.ranges, block_threads, 0, stream, plan, first_tile);
  }
}

}  // namespace
}  // namespace isthmus::cuda
