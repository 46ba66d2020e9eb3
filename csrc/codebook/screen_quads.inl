// Included by screen.inl: words of four bytes, whose products (VNNI) run at twice the rate of those of bfloat16.
//
// A vector is a unit times integers: the rows of a tile share one, the codes of a group another. Sums of products are
// then exact integers, and the offsets of the codes become integers too, for each tile. The instruction multiplies
// unsigned bytes by signed ones, so rows have 128 added, and 128 Σ c is taken off at the start.

constexpr int64_t least_quad_dim = 32;
constexpr int64_t least_quad_codes = 512;
constexpr int64_t most_quad_dim = 8192;  // sums stay below 2²⁸
// Of no code, or a wild one. Others are above -2²⁹ - 2²⁸.
constexpr int32_t no_score = -(1 << 30);

ISTHMUS_INLINE i32v nearest_integers(f32v v) { return (i32v)_mm512_cvtps_epi32((__m512)v); }

// Four integers of each lane as bytes.
ISTHMUS_INLINE i32v join_bytes(const i32v (&q)[4]) {
  return (q[0] & 255) | (q[1] & 255) << 8 | (q[2] & 255) << 16 | q[3] << 24;
}

// A row in units plus 128. Returns the squared length of what is left out.
inline double write_bytes(const float* x, int64_t dim, float unit, float* words) {
  f32v lost = {};
  const float inverse = 1 / unit;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(words);
  for (int64_t k = 0; k < dim; k += lanes<float>) {
    const f32v whole = load_first(x + k, dim - k);
    const i32v units = nearest_integers(whole * inverse);
    const f32v rest = whole - unit * __builtin_convertvector(units, f32v);
    lost += rest * rest;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + k), _mm512_cvtepi32_epi8((__m512i)(units + 128)));
  }
  return static_cast<double>(sum_lanes<float>(lost));
}

// What a column [dim][lanes] leaves out, squared; `sums` gets 128 Σ of each lane.
inline f32v write_quads(const float* column, int64_t dim, f32v unit, float* words, int64_t step, int32_t* sums) {
  f32v lost = {};
  i32v sum = {};
  const f32v inverse = 1 / unit;
  for (int64_t k = 0; k < dim; k += 4, words += step) {
    i32v units[4] = {};
    for (int64_t j = 0; j < 4 && k + j < dim; ++j) {
      const f32v whole = load(column + (k + j) * lanes<float>);
      units[j] = nearest_integers(whole * inverse);
      const f32v rest = whole - unit * __builtin_convertvector(units[j], f32v);
      lost += rest * rest;
      sum += units[j];
    }
    store(words, (f32v)join_bytes(units));
  }
  sum *= 128;
  std::memcpy(sums, &sum, sizeof sum);
  return lost;
}

// units: of the groups, row_unit: of the tile.
template <int Rows, bool First, class View>
ISTHMUS_NOINLINE void meet_quads(const float* column, const float* offset, const int32_t* sums, int64_t depth,
                                 const float* units, float row_unit, const float* rows, int64_t stride, float* maxima,
                                 int64_t step, const View& view) {
  constexpr int size = lanes<float>;
  i32v scores[Rows][tile_vectors];
  const f32v unit = load(units) * row_unit, inverse = 1 / unit;
#pragma GCC unroll 16
  for (int v = 0; v < tile_vectors; ++v) {
    i32v sum;
    std::memcpy(&sum, sums + v * size, sizeof sum);
    const i32v start = nearest_integers(greater(load(offset + v * size) * inverse, f32v{} + float(no_score))) - sum;
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) scores[r][v] = start;
  }
  for (int64_t k = 0; k < depth; ++k, column += tile_vectors * size) {
    f32v c[tile_vectors];
#pragma GCC unroll 16
    for (int v = 0; v < tile_vectors; ++v) c[v] = load(column + v * size);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const __m512i x = (__m512i)_mm512_set1_ps(rows[r * stride + k]);
#pragma GCC unroll 16
      for (int v = 0; v < tile_vectors; ++v) {
        scores[r][v] = (i32v)_mm512_dpbusd_epi32((__m512i)scores[r][v], x, (__m512i)c[v]);
      }
    }
  }
  view.template meet<Rows, tile_vectors>([&](int r, int v, float gain, float shift) {
    return __builtin_convertvector(scores[r][v], f32v) * (gain * unit) + shift;
  });
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (int v = 1; v < tile_vectors; ++v) {
      scores[r][0] = (i32v)_mm512_max_epi32((__m512i)scores[r][v], (__m512i)scores[r][0]);
    }
    const f32v number = __builtin_convertvector(scores[r][0], f32v) * (load(units) * row_unit);
    const f32v largest = scores[r][0] == no_score ? f32v{} - __builtin_inff() : number;
    store(maxima + r * step, First ? largest : greater(largest, load(maxima + r * step)));
  }
}
