// The matrix product inside every searching and linear op: one register tile of
//
//     acc[row][column] += Σ_k a[k][row] · b[k][column]
//
// The results stay in registers; what becomes of them (argmin, top-k filter, noise, store) is the caller's epilogue.
//
// Operands are packed. A *tile* is [depth][tile_rows], a *panel* is [depth][panel_width], both of the compute type and
// padded with zeros: one pointer each, unit steps, no tails and no half types in the inner loop, and no cache-set
// conflicts when the leading dimension is a power of two. Packing moves O(rows · depth) elements; it pays
// because every tile meets all panels.
//
// At AVX-512 a tile is 12 rows by 2 vectors: 24 accumulators, two vectors of b, one broadcast of a. Each step issues 24
// fused multiply-adds and 14 loads, so the two FMA ports are the limit.
#pragma once

#include "core/simd.h"

namespace isthmus {
namespace {

#if defined(__AVX512F__)
constexpr int tile_rows = 12;  // of 32 registers
#else
constexpr int tile_rows = 6;  // of 16 registers
#endif

template <class C>
constexpr int panel_width = 2 * lanes<C>;

// ---- packing -------------------------------------------------------------------------------------------------------

// Lanes where bit `Step` is clear from `a`, the others from `b` moved up by Step; and the other way round.
template <class C, int Step>
ISTHMUS_INLINE void swap_off_diagonal(Vec<C>& a, Vec<C>& b) {
  Mask<C> upper, lower;
  for (int i = 0; i < lanes<C>; ++i) {
    upper[i] = (i & Step) ? lanes<C> + i - Step : i;
    lower[i] = (i & Step) ? lanes<C> + i : i + Step;
  }
  const Vec<C> first = __builtin_shuffle(a, b, upper);
  b = __builtin_shuffle(a, b, lower);
  a = first;
}

// A square of vectors, transposed in registers by swapping ever larger off-diagonal blocks.
template <class C, int Step = 1>
ISTHMUS_INLINE void transpose(Vec<C> (&square)[lanes<C>]) {
#pragma GCC unroll 16
  for (int i = 0; i < lanes<C>; ++i) {
    if ((i & Step) == 0) swap_off_diagonal<C, Step>(square[i], square[i + Step]);
  }
  if constexpr (2 * Step < lanes<C>) transpose<C, 2 * Step>(square);
}

// Rows as columns: packed[k · step + j] = matrix[j · stride + k] for j < count, zero up to Width.
template <int Width, class T>
inline void pack_rows(const T* matrix, int64_t stride, int64_t count, int64_t depth, Compute<T>* packed,
                      int64_t step = Width) {
  using C = Compute<T>;
  constexpr int size = lanes<C>;
  for (int64_t k = 0; k < depth; k += size) {
    for (int j = 0; j < Width; j += size) {
      Vec<C> square[size];
#pragma GCC unroll 16
      for (int i = 0; i < size; ++i) {
        square[i] = j + i < count ? load_first(matrix + (j + i) * stride + k, depth - k) : Vec<C>{};
      }
      transpose<C>(square);
      const int64_t left = depth - k < size ? depth - k : size;
#pragma GCC unroll 16
      for (int i = 0; i < size; ++i) {
        if (i < left) store_first(packed + (k + i) * step + j, square[i], Width - j);
      }
    }
  }
}

// Columns as they are: packed[k][j] = matrix[k · stride + j] for j < count, zero up to Width.
template <int Width, class T>
inline void pack_columns(const T* matrix, int64_t stride, int64_t count, int64_t depth, Compute<T>* packed) {
  using C = Compute<T>;
  for (int64_t k = 0; k < depth; ++k) {
    for (int j = 0; j < Width; j += lanes<C>) {
      const Vec<C> columns = j < count ? load_first(matrix + k * stride + j, count - j) : Vec<C>{};
      store_first(packed + k * Width + j, columns, Width - j);
    }
  }
}

// For the function around multiply_tile: alone with its registers, it is spared the constants of its surroundings, for
// which accumulators would be spilled.
#define ISTHMUS_NOINLINE __attribute__((noinline))

// ---- product -------------------------------------------------------------------------------------------------------

// acc[r] += Σ_k tile[k][r] · panel[k] for the first Rows rows of the tile.
template <class C, int Rows>
ISTHMUS_INLINE void multiply_tile(const C* tile, const C* panel, int64_t depth, Vec<C> (&acc)[Rows][2]) {
  for (int64_t k = 0; k < depth; ++k, tile += tile_rows, panel += panel_width<C>) {
    const Vec<C> b0 = load(panel), b1 = load(panel + lanes<C>);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      acc[r][0] += tile[r] * b0;
      acc[r][1] += tile[r] * b1;
    }
  }
}

// Calls f<Rows>() with the smallest compiled row count that covers `rows`: a last tile of few rows costs less.
template <class F>
ISTHMUS_INLINE void dispatch_rows(int64_t rows, F&& f) {
  constexpr int third = tile_rows / 3;
  if (rows <= third) {
    f.template operator()<third>();
  } else if (rows <= 2 * third) {
    f.template operator()<2 * third>();
  } else {
    f.template operator()<tile_rows>();
  }
}

}  // namespace
}  // namespace isthmus
