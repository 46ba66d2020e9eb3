// core/product.h on small integers, where every product is exact: packing puts each element in its place and pads with
// zeros, and the tile adds what a triple loop adds.
#include "check.h"
#include "core/buffer.h"
#include "core/product.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

constexpr int64_t stride = 75, rows = 50;

// A matrix [rows, stride] of small integers, all different from their neighbours.
template <class T>
struct Matrix {
  Buffer<T> elements{rows * stride};

  Matrix() {
    for (int64_t i = 0; i < rows * stride; ++i)
      store_one(elements.data + i, static_cast<Compute<T>>(i * 37 % 101 - 50));
  }
  const T* at(int64_t row, int64_t col) const { return elements.data + row * stride + col; }
};

template <int Width, class T>
void test_packing(const char* name) {
  using C = Compute<T>;
  const Matrix<T> matrix;
  Buffer<C> by_rows(stride * Width + 1), by_columns(stride * Width + 1);
  constexpr C guard = 12345;
  for (int64_t count = 0; count <= Width; ++count) {
    for (int64_t depth : {0, 1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 50}) {
      by_rows.data[depth * Width] = by_columns.data[depth * Width] = guard;
      pack_rows<Width>(matrix.at(0, 1), stride, count, depth, by_rows.data);
      pack_columns<Width>(matrix.at(0, 1), stride, count, depth, by_columns.data);
      bool placed = by_rows.data[depth * Width] == guard && by_columns.data[depth * Width] == guard;
      for (int64_t k = 0; k < depth; ++k) {
        for (int64_t j = 0; j < Width; ++j) {
          const bool inside = j < count;
          placed &= by_rows.data[k * Width + j] == (inside ? load_one(matrix.at(j, 1 + k)) : C(0));
          placed &= by_columns.data[k * Width + j] == (inside ? load_one(matrix.at(k, 1 + j)) : C(0));
        }
      }
      CHECK_THAT(placed, "%s: packing %ld of %d at depth %ld", name, static_cast<long>(count), Width,
                 static_cast<long>(depth));
    }
  }
}

template <class C>
void test_tile(const char* name) {
  const Matrix<C> a, b;
  for (int64_t depth : {0, 1, 2, 5, 16, 50}) {
    Buffer<C> tile(depth * tile_rows + 1), panel(depth * panel_width<C> + 1);
    for (int64_t count = 1; count <= tile_rows; ++count) {
      pack_rows<tile_rows>(a.at(0, 0), stride, count, depth, tile.data);
      pack_columns<panel_width<C>>(b.at(0, 0), stride, panel_width<C>, depth, panel.data);
      bool exact = true;
      dispatch_rows(count, [&]<int Rows>() {
        static_assert(Rows <= tile_rows);
        Vec<C> acc[Rows][2];
        for (int r = 0; r < Rows; ++r) acc[r][0] = acc[r][1] = splat(C(1000));
        multiply_tile(tile.data, panel.data, depth, acc);
        exact &= Rows >= count;
        for (int r = 0; r < Rows; ++r) {
          for (int j = 0; j < panel_width<C>; ++j) {
            C want = 1000;
            for (int64_t k = 0; k < depth && r < count; ++k) want += *a.at(r, k) * *b.at(k, j);
            exact &= acc[r][j / lanes<C>][j % lanes<C>] == want;
          }
        }
      });
      CHECK_THAT(exact, "%s: %ld rows at depth %ld", name, static_cast<long>(count), static_cast<long>(depth));
    }
  }
}

void run() {
  test_packing<tile_rows, float>("f32");
  test_packing<panel_width<float>, float>("f32");
  test_packing<tile_rows, double>("f64");
  test_packing<panel_width<double>, double>("f64");
  test_packing<panel_width<float>, BFloat16>("bf16");
  test_packing<tile_rows, Half>("f16");
  test_tile<float>("f32");
  test_tile<double>("f64");
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL

ISTHMUS_LEVEL_TESTS(run)
