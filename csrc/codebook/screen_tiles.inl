// Included by screen.inl: the coarse screen on matrix units (core/amx_tiles.h).
//
// 32 rows by 2 vectors of codes at a time: four tiles of scores, which start from the offsets of the codes (a load of
// stride 0 repeats them in every row), two of rows, two of codes; four products for four loads. Tiles cannot be
// compared: the scores go through 4 KB of L1.

// columns: [2, depth, 4, 16] words, offsets: [8, 16]; depth is a multiple of 16. Reads the rows up to the next multiple
// of 32. view(row, vector): as Panels::meet says.
template <class ViewOf>
inline void meet_slab(const float* columns, const float* offsets, int64_t depth, const float* rows, int64_t stride,
                      int64_t count, float* maxima, int64_t step, const ViewOf& view) {
  static_assert(lanes<float> == tile_side && tile_vectors == 4);
  alignas(64) float scores[2][2][tile_side][tile_side];  // [rows, codes]
  for (int64_t row = 0; row < count; row += 2 * tile_side) {
    for (int v = 0; v < group_codes; v += 2) {
      load_tile<0>(offsets + v * tile_side, 0);
      load_tile<1>(offsets + (v + 1) * tile_side, 0);
      load_tile<2>(offsets + v * tile_side, 0);
      load_tile<3>(offsets + (v + 1) * tile_side, 0);
      const float* column = columns + (v / tile_vectors * depth * tile_vectors + v % tile_vectors) * tile_side;
      for (int64_t k = 0; k < depth; k += tile_side) {
        load_tile<4>(rows + row * stride + k, stride);
        load_tile<5>(rows + (row + tile_side) * stride + k, stride);
        load_tile<6>(column + k * tile_vectors * tile_side, tile_vectors * tile_side);
        load_tile<7>(column + (k * tile_vectors + 1) * tile_side, tile_vectors * tile_side);
        multiply_tiles<0, 4, 6>();
        multiply_tiles<1, 4, 7>();
        multiply_tiles<2, 5, 6>();
        multiply_tiles<3, 5, 7>();
      }
      store_tile<0>(scores[0][0][0]);
      store_tile<1>(scores[0][1][0]);
      store_tile<2>(scores[1][0][0]);
      store_tile<3>(scores[1][1][0]);
      for (int64_t r = 0; r < 2 * tile_side && row + r < count; ++r) {
        const auto& of_row = scores[r / tile_side];
        float* place = maxima + (row + r) * step;
        const f32v largest = greater(load(of_row[0][r % tile_side]), load(of_row[1][r % tile_side]));
        store(place, v == 0 ? largest : greater(largest, load(place)));
      }
      const auto show = [&]<int Rows>(int64_t r) {
        view(row + r, v).template meet<Rows, 2>([&](int i, int j, float gain, float shift) {
          return gain * load(scores[(r + i) / tile_side][j][(r + i) % tile_side]) + shift;
        });
        return Rows;
      };
      for (int64_t r = 0; r < 2 * tile_side && row + r < count;) {
        const bool whole =
            (row + r) % tile_height == 0 && r + tile_height <= 2 * tile_side && row + r + tile_height <= count;
        r += whole ? show.template operator()<tile_height>(r) : show.template operator()<1>(r);
      }
    }
  }
}
