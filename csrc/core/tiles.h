// How a [rows, cols] problem with row sums is cut into work items. The cut depends on the shape alone, so sums are the
// same for every thread count: narrow rows are grouped, very wide rows are split into column chunks whose partial sums
// are added in order.
#pragma once

#include <cstdint>

namespace isthmus {
namespace {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t tile_elements = 512;        // a dozen buffers of this many elements stay in L1
constexpr int64_t chunk_columns = 16 * 1024;  // wider rows are shared between threads
constexpr int64_t grain_elements = 8 * 1024;  // below this much work a second thread costs more than it brings

// Work items of `elements` elements each: how many a second thread must bring to be worth its while.
inline int64_t grain_of(int64_t elements) { return grain_elements / (elements + 1) + 1; }

struct RowTiles {
  int64_t rows, cols;
  int64_t rows_per_item, cols_per_item, chunks_per_row, items;

  // min_rows_per_item: for sums over rows, whose partial results take memory for every item.
  RowTiles(int64_t rows_, int64_t cols_, int64_t min_rows_per_item = 1, bool split_rows = true)
      : rows(rows_), cols(cols_) {
    const bool wide = split_rows && cols > chunk_columns;
    cols_per_item = wide ? chunk_columns : cols;
    chunks_per_row = wide ? (cols + chunk_columns - 1) / chunk_columns : 1;
    rows_per_item = cols == 0 || cols >= tile_elements ? 1 : tile_elements / cols;
    if (rows_per_item < min_rows_per_item) rows_per_item = min_rows_per_item;
    items = (rows + rows_per_item - 1) / rows_per_item * chunks_per_row;
  }

  int64_t grain() const {
    const int64_t elements = rows_per_item * cols_per_item;
    return elements >= grain_elements ? 1 : grain_elements / (elements + 1) + 1;
  }

  struct Item {
    int64_t row, rows, col, cols;
  };

  Item item(int64_t index) const {
    const int64_t row = index / chunks_per_row * rows_per_item, col = index % chunks_per_row * cols_per_item;
    const int64_t rows_left = rows - row, cols_left = cols - col;
    return {row, rows_left < rows_per_item ? rows_left : rows_per_item, col,
            cols_left < cols_per_item ? cols_left : cols_per_item};
  }
};

// What a kernel works on at a time: some whole rows of an item, or a stretch of one row. At most tile_elements
// elements, neighbours in the contiguous order of the problem.
struct Piece {
  int64_t item, row, rows, col, cols;
  int64_t first;     // of its elements
  bool begins_rows;  // no earlier piece of the item has elements of these rows
  bool begins_cols;  // no earlier piece of the item has elements of these columns
  int64_t count() const { return rows * cols; }
};

template <class F>
inline void for_each_piece(const RowTiles& tiles, int64_t index, F&& f) {
  const RowTiles::Item item = tiles.item(index);
  const bool whole_rows = item.cols == tiles.cols && item.cols <= tile_elements;
  const int64_t cols_at_once = whole_rows ? item.cols : tile_elements;
  const int64_t rows_at_once = whole_rows && item.cols > 0 ? tile_elements / item.cols : 1;
  for (int64_t r = 0; r < item.rows; r += rows_at_once) {
    for (int64_t c = 0; c < item.cols; c += cols_at_once) {
      const int64_t rows = item.rows - r < rows_at_once ? item.rows - r : rows_at_once;
      const int64_t cols = item.cols - c < cols_at_once ? item.cols - c : cols_at_once;
      const int64_t row = item.row + r, col = item.col + c;
      f(Piece{index, row, rows, col, cols, row * tiles.cols + col, c == 0, r == 0});
    }
  }
}

}  // namespace
}  // namespace isthmus
