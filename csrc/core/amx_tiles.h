// The tile registers of AMX: eight, of 16 rows of 64 bytes. With ISTHMUS_EMULATE_AMX the same in plain C++, so that a
// kernel can be tested on a CPU without them.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/simd.h"

#if defined(ISTHMUS_EMULATE_AMX) || defined(__AMX_BF16__)
#define ISTHMUS_TILES 1

namespace isthmus {
namespace {

constexpr int tile_side = 16;  // rows, and words of four bytes in each

#if defined(ISTHMUS_EMULATE_AMX)

thread_local uint32_t emulated_tiles[8][tile_side][tile_side];

struct TileSession {
  TileSession() { std::memset(emulated_tiles, 0, sizeof emulated_tiles); }
};

template <int Tile>
inline void load_tile(const float* rows, int64_t stride_words) {
  for (int i = 0; i < tile_side; ++i) std::memcpy(emulated_tiles[Tile][i], rows + i * stride_words, 4 * tile_side);
}
template <int Tile>
inline void store_tile(float* rows) {
  std::memcpy(rows, emulated_tiles[Tile], sizeof emulated_tiles[Tile]);
}
template <int Sum, int A, int B>
inline void multiply_tiles() {
  const auto number = [](uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  for (int i = 0; i < tile_side; ++i) {
    for (int j = 0; j < tile_side; ++j) {
      float sum = number(emulated_tiles[Sum][i][j]);
      for (int k = 0; k < tile_side; ++k) {
        const uint32_t a = emulated_tiles[A][i][k], b = emulated_tiles[B][k][j];
        sum += number(a << 16) * number(b << 16);
        sum += number(a & 0xffff0000u) * number(b & 0xffff0000u);
      }
      std::memcpy(&emulated_tiles[Sum][i][j], &sum, sizeof sum);
    }
  }
}

#else

// The shape of the tiles belongs to the thread, and other libraries set it too: it is loaded for the time of a kernel,
// and released, lest the operating system keep saving eight kilobytes at every switch.
struct TileSession {
  TileSession() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

// In assembler, as the intrinsics take only literal tile numbers.

// Tile = 16 rows of 16 words, stride_words apart; a stride of 0 repeats one row.
template <int Tile>
ISTHMUS_INLINE void load_tile(const float* rows, int64_t stride_words) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(4 * stride_words), "i"(Tile) : "memory");
}
// To 16 rows without gaps.
template <int Tile>
ISTHMUS_INLINE void store_tile(float* rows) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(int64_t{4 * tile_side}), "i"(Tile) : "memory");
}
// Sum[i][j] += Σ_k A[i][k] · B[k][j], where a word is a pair of bfloat16 and the product of two words their dot
// product.
template <int Sum, int A, int B>
ISTHMUS_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}

#endif

}  // namespace
}  // namespace isthmus
#endif
