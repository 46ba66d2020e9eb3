// Included by cpu.inl: upper bounds of the scores of a tile of rows with a panel of features, and which of them pass.
//
// With v~ for what is multiplied in place of a vector v and δv = v - v~,
//
//     |x·w - x~·w~| <= |δx| |w| + |x~| |δw| <= |x~| (slope · |w| + |δw|),     slope = largest |δx| / |x~| of the tile
//
// so a bound costs one multiply-add for a vector of scores. slope also has the roundings of the sum; the proof is in
// docs/numerics.md under "Top-k". Whatever is not a number passes.

#include "topk/words.inl"

// The rows of a tile and their words [depth][tile_rows].
template <class C>
struct RowTile {
  const C* words;
  const C* units;    // [tile_rows]
  const C* lengths;  // [tile_rows]
  C slope;
};

// Features and their words [depth][panel_width].
template <class C>
struct Panel {
  enum Term { start, unit, bias, slack, norm, loss, terms };
  C* words;
  C* of_features;  // [terms][panel_width]

  C* term(Term t) const { return of_features + t * panel_width<C>; }
};

template <class Words>
struct Screen {
  using C = typename Words::C;
  static constexpr int width = panel_width<C>;

  const int64_t cols;
  const bool magnitudes;  // whether signs do not count
  const int64_t depth = Words::depth(cols), padded = divide_up(depth, lanes<C>) * lanes<C>;

  // The share of the roundings in a slope.
  double rounding() const { return Words::roundings(cols) * rounding_unit<C>; }

  // rows: [count, cols]; scratch: [tile_rows, padded] words.
  template <class T>
  C pack_tile(const T* rows, int64_t count, C* words, C* units, C* lengths, C* scratch) const {
    double slope = 0;
    for (int64_t i = count; i < tile_rows; ++i) units[i] = lengths[i] = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Extent extent = Words::template write<true>(rows + i * cols, cols, scratch + i * padded);
      if (!extent.is_wild() && extent.loss > slope * extent.length) slope = extent.loss / extent.length;
      units[i] = static_cast<C>(extent.unit);
      lengths[i] = static_cast<C>(extent.length * outward);
    }
    pack_rows<tile_rows>(scratch, padded, count, depth, words);
    return static_cast<C>((slope + rounding()) * outward);
  }

  // weight(i), bias(i): of feature i < count; scratch: [width, padded] words.
  template <class Weight, class Bias>
  void pack_panel(const Weight& weight, const Bias& offset, int64_t count, const Panel<C>& panel, C* scratch) const {
    for (int64_t i = 0; i < width * Panel<C>::terms; ++i) panel.of_features[i] = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Extent extent = Words::template write<false>(weight(i), cols, scratch + i * padded);
      const C bias = static_cast<C>(offset(i)), size = bias < 0 ? -bias : bias;
      const bool infinite = size == static_cast<C>(__builtin_inf());
      const bool huge = !infinite && static_cast<double>(size) * static_cast<double>(size) >= tame_square<C>;
      const double norm = huge ? __builtin_inf() : extent.length + extent.loss;
      const int32_t start = -128 * extent.sum;
      std::memcpy(panel.term(Panel<C>::start) + i, &start, sizeof start);
      panel.term(Panel<C>::unit)[i] = static_cast<C>(extent.unit);
      panel.term(Panel<C>::bias)[i] = bias;
      panel.term(Panel<C>::slack)[i] = infinite ? 0 : static_cast<C>(4 * rounding_unit<C>) * size;
      panel.term(Panel<C>::norm)[i] = static_cast<C>(norm * outward);
      panel.term(Panel<C>::loss)[i] = static_cast<C>(extent.loss * outward);
    }
    pack_rows<width>(scratch, padded, count, depth, panel.words);
  }

  // bounds: [tile_rows][width]. Bit j of passed[r] is set unless the bound of row r and feature j is at most
  // thresholds[r].
  ISTHMUS_NOINLINE void meet(const RowTile<C>& tile, int64_t rows, const Panel<C>& panel, const C* thresholds,
                             C* bounds, uint32_t* passed) const {
    dispatch_rows(rows, [&]<int Rows>() {
      using Sum = typename Words::Sum;
      Sum sums[Rows][2], start[2];
      std::memcpy(start, panel.term(Panel<C>::start), sizeof start);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        sums[r][0] = start[0];
        sums[r][1] = start[1];
      }
      const C *x = tile.words, *words = panel.words;
      for (int64_t k = 0; k < depth; ++k, x += tile_rows, words += width) {
        const Vec<C> w0 = load(words), w1 = load(words + lanes<C>);
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
          sums[r][0] = Words::multiply_add(x[r], w0, sums[r][0]);
          sums[r][1] = Words::multiply_add(x[r], w1, sums[r][1]);
        }
      }
      constexpr Ordered<C> no_sign = static_cast<Ordered<C>>(~uint64_t{0} >> (65 - 8 * sizeof(C)));
      const Mask<C> kept = Mask<C>{} + (magnitudes ? no_sign : Ordered<C>{-1});
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const auto of = [&](typename Panel<C>::Term t) { return load(panel.term(t) + v * lanes<C>); };
        const Vec<C> unit = of(Panel<C>::unit), bias = of(Panel<C>::bias), slack = of(Panel<C>::slack);
        const Vec<C> error = of(Panel<C>::norm) * tile.slope + of(Panel<C>::loss);
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
          Vec<C> score = Words::number(sums[r][v]) * unit * tile.units[r] + bias;
          score = (Vec<C>)((Mask<C>)score & kept);
          const Vec<C> bound = score + (error * tile.lengths[r] + slack);
          store(bounds + r * width + v * lanes<C>, bound);
          const uint32_t bits = ~lane_bits<C>(bound <= splat(thresholds[r])) & ((1u << lanes<C>)-1);
          passed[r] = v == 0 ? bits : passed[r] | bits << lanes<C>;
        }
      }
    });
  }
};

// What coarse words leave out of some vectors from all over a matrix, on average, in parts of their length.
template <class Words, bool Row, class Vector>
double average_loss(const Vector& vector, int64_t count, int64_t cols) {
  constexpr int64_t sample = 16;
  const Buffer<float> words(divide_up(cols, lanes<float>) * lanes<float>);
  double sum = 0;
  for (int64_t i = 0; i < sample; ++i) {
    const Extent extent = Words::template write<Row>(vector(i * count / sample), cols, words.data);
    if (!extent.is_wild() && extent.length > 0) sum += extent.loss / extent.length;
  }
  return sum / sample;
}
