// How a [rows, cols] problem with row sums is cut into work items. The cut depends on the shape alone, so sums are the
// same for every thread count: narrow rows are grouped, very wide rows are split into column chunks whose partial sums
// are added in order.
#pragma once

#include <cstdint>

namespace isthmus {
namespace {

constexpr int64_t tile_elements = 1024;       // working buffers of this many elements stay in L1
constexpr int64_t chunk_columns = 16 * 1024;  // wider rows are shared between threads
constexpr int64_t grain_elements = 8 * 1024;  // below this much work a second thread costs more than it brings

struct RowTiles {
  int64_t rows, cols;
  int64_t rows_per_item, cols_per_item, chunks_per_row, items;

  RowTiles(int64_t rows_, int64_t cols_) : rows(rows_), cols(cols_) {
    const bool wide = cols > chunk_columns;
    cols_per_item = wide ? chunk_columns : cols;
    chunks_per_row = wide ? (cols + chunk_columns - 1) / chunk_columns : 1;
    rows_per_item = cols == 0 || cols >= tile_elements ? 1 : tile_elements / cols;
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

// Where the row sums of a kernel go: straight to `sums` when an item holds whole rows, else through partial sums
// [rows, chunks_per_row] that finish() adds in chunk order. sums may be null: nothing to sum.
template <class C>
struct RowSums {
  const RowTiles& tiles;
  C* sums;
  C* partial;

  RowSums(const RowTiles& tiles_, void* sums_) : tiles(tiles_), sums(static_cast<C*>(sums_)), partial(sums) {
    if (sums != nullptr && tiles.chunks_per_row > 1) partial = new C[tiles.rows * tiles.chunks_per_row];
  }
  ~RowSums() {
    if (partial != sums) delete[] partial;
  }
  RowSums(const RowSums&) = delete;
  RowSums& operator=(const RowSums&) = delete;

  void finish() const {
    if (partial == sums) return;
    for (int64_t row = 0; row < tiles.rows; ++row) {
      sums[row] = 0;
      for (int64_t chunk = 0; chunk < tiles.chunks_per_row; ++chunk) {
        sums[row] += partial[row * tiles.chunks_per_row + chunk];
      }
    }
  }
};

}  // namespace
}  // namespace isthmus
