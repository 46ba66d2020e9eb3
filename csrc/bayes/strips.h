// Matrix products whose right operand need not exist: it is made strip by strip, where it is used.
//
//     block[row][col] = Σ_k left[row][k] · right[k][col]
//
// The left operand is packed into tiles. The columns of the right operand are cut into strips; one thread makes a strip
// (generates it, or copies it), passes all tiles over it and hands every finished block to the problem, which adds
// biases, noise or slopes and stores it. So a weight is generated once for some thousand rows and never leaves the
// cache.
//
// A problem has one term or two: two products over the same rows and columns, finished together, because the mean and
// the variance of an output, or two parts of one gradient, belong to the same elements. It provides
//
//     C, terms, rows, depth, cols
//     pack_tile(row, rows, tiles)                                    tiles: [terms][depth][tile_rows]
//     pack_strip(col, cols, first_k, depth, staging, strips)         strips: [terms][2 panels][depth][panel_width]
//     finish(block, blocks)                                          blocks: [terms][tile_rows][strip_width]
//
// Every element is accumulated in the order of k, whatever the number of threads.
#pragma once

#include "core/buffer.h"
#include "core/parallel.h"
#include "core/product.h"
#include "core/tiles.h"

namespace isthmus {
namespace {

// Two panels: as many float32 columns as the generator makes normals in one step.
template <class C>
constexpr int strip_width = 2 * panel_width<C>;
template <class C>
constexpr int block_elements = tile_rows * strip_width<C>;

constexpr int64_t depth_chunk = 256;  // a strip of this depth stays in L2
constexpr int64_t row_block = 4032;   // bounds the packed left operand; a multiple of tile_rows at every level

// A rectangle of a matrix.
struct Block {
  int64_t row, rows, col, cols;
};

// Calls f(col, cols, panel) for the panels of a strip.
template <class C, class F>
ISTHMUS_INLINE void for_each_panel(int64_t col, int64_t cols, int64_t depth, C* strip, F&& f) {
  for (int64_t c = 0; c < cols; c += panel_width<C>) f(col + c, smaller(panel_width<C>, cols - c), strip + c * depth);
}

// block = tile · strip, or block += tile · strip.
template <class C>
void multiply_block(const C* tile, const C* strip, int64_t depth, int64_t rows, int64_t cols, bool add, C* block) {
  for (int64_t c = 0; c < cols; c += panel_width<C>) {
    dispatch_rows(rows, [&]<int Rows>() {
      C* out = block + c;
      Vec<C> acc[Rows][2];
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        acc[r][0] = add ? load(out + r * strip_width<C>) : Vec<C>{};
        acc[r][1] = add ? load(out + r * strip_width<C> + lanes<C>) : Vec<C>{};
      }
      multiply_tile(tile, strip + c * depth, depth, acc);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        store(out + r * strip_width<C>, acc[r][0]);
        store(out + r * strip_width<C> + lanes<C>, acc[r][1]);
      }
    });
  }
}

// The rows [first, first + rows) of a problem.
template <class Problem>
struct RowBlock {
  using C = typename Problem::C;
  static constexpr int terms = Problem::terms;

  const Problem& problem;
  const int64_t first, rows;
  const int64_t tiles = divide_up(rows, tile_rows);
  const int64_t tile_elements = problem.depth * tile_rows;
  const int64_t strips = divide_up(problem.cols, strip_width<C>);
  // Few strips leave threads idle: then the rows are shared too, in parts large enough to be worth a strip each.
  const int64_t parts = strips < 8 && rows >= 2048 ? smaller(divide_up(8, strips), rows / 1024) : 1;
  const Buffer<C> left{tiles * terms * tile_elements};

  int64_t rows_of(int64_t tile) const { return smaller(tile_rows, rows - tile * tile_rows); }

  void pack() const {
    constexpr int64_t enough = 1 << 16;  // elements that repay a second thread
    parallel_for(tiles, 1 + enough / (tile_elements + 1), [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        problem.pack_tile(first + tile * tile_rows, rows_of(tile), left.data + tile * terms * tile_elements);
      }
    });
  }

  // All tiles of a part of the rows, over one strip.
  void multiply_strip(int64_t strip, int64_t part, C* staging, C* right, C* results) const {
    const int64_t col = strip * strip_width<C>, cols = smaller(strip_width<C>, problem.cols - col);
    const int64_t begin = tiles * part / parts, end = tiles * (part + 1) / parts;
    int64_t k = 0;
    do {
      const int64_t depth = smaller(depth_chunk, problem.depth - k);
      problem.pack_strip(col, cols, k, depth, staging, right);
      for (int64_t tile = begin; tile < end; ++tile) {
        C* blocks = results + (single_chunk() ? 0 : tile - begin) * terms * block_elements<C>;
        for (int term = 0; term < terms; ++term) {
          multiply_block(left.data + (tile * terms + term) * tile_elements + k * tile_rows,
                         right + term * depth * strip_width<C>, depth, rows_of(tile), cols, k > 0,
                         blocks + term * block_elements<C>);
        }
        if (k + depth == problem.depth) problem.finish({first + tile * tile_rows, rows_of(tile), col, cols}, blocks);
      }
      k += depth;
    } while (k < problem.depth);
  }

  bool single_chunk() const { return problem.depth <= depth_chunk; }

  void multiply() const {
    pack();
    constexpr int64_t enough = 1 << 20;       // multiplications that repay a second thread
    constexpr int64_t cost_of_a_strip = 256;  // in rows
    const int64_t work = (rows / parts + cost_of_a_strip) * problem.depth * strip_width<C>;
    parallel_for(strips * parts, 1 + enough / (work + 1), [&](int64_t begin, int64_t end) {
      const int64_t strip_elements = smaller(depth_chunk, problem.depth) * strip_width<C>;
      const Buffer<C> staging(strip_elements), right(terms * strip_elements);
      const Buffer<C> results((single_chunk() ? 1 : divide_up(tiles, parts)) * terms * block_elements<C>);
      for (int64_t item = begin; item < end; ++item) {
        multiply_strip(item / parts, item % parts, staging.data, right.data, results.data);
      }
    });
  }
};

template <class Problem>
void multiply(const Problem& problem) {
  if (problem.cols == 0) return;
  for (int64_t row = 0; row < problem.rows; row += row_block) {
    RowBlock<Problem>{problem, row, smaller(row_block, problem.rows - row)}.multiply();
  }
}

}  // namespace
}  // namespace isthmus
