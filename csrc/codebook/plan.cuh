// How a search is laid out on the device, and the bound that makes it exact.
//
// Scores are computed twice: screened for all pairs in the arithmetic of the tensor cores or of float32, of which only
// the maximum of each group of 32 codes is kept, and exactly, in float64, for the codes of those groups whose maximum
// is not provably below the best exact score.
//
// A screened score is y·a + b: with a point m amid the codes,
//     euclidean       y = x - m    a = c - m          b = -|a|²/2    -|x - c|² = 2 (y·a + b) - |y|²
//     cosine          y = x        a = c / |c| - m    b = 0          x·c / |c| = y·a + x·m
//     inner product   y = x        a = c - m          b = 0                x·c = y·a + x·m
// m matters to float32 inputs, which tensor cores round to bfloat16: where x and the codes are far from 0 but close
// together, rounding differences loses less. Half types are multiplied as they are, with m = 0.
//
// y and a are rounded to operands, y = fl(y) + δy, so that
//     |y·a - fl(y)·fl(a)| <= |δy| |a| + |fl(y)| |δa|
// where the norms on the right are those of the actual errors: nothing is given away where inputs are narrow already.
#pragma once

#include "codebook/kernels.h"
#include "core/product.cuh"
#include "core/sort.cuh"

namespace isthmus::cuda {
namespace {

constexpr int group_codes = warp_size;  // a lane for each when they are scored exactly

// What bounds the error of a row's and of a group's screened scores. Lengths are Euclidean norms; of a group, the
// largest among its codes that hold no NaN.
struct RowBound {
  double length, error;  // of y and of δy
  double shift;          // from screened to exact scores: -|y|², or x·m
};
struct GroupBound {
  double length, error;  // of a and of δa
  double reach;          // of a (euclidean), else |a + m| + |m|
  double offset;         // |b|
};

// Screening on tensor cores multiplies the half types, else the FMA units multiply `Operand` itself.
template <class Operand>
constexpr bool on_tensor_cores = sizeof(Operand) == 2;
template <class Operand>
constexpr int screen_tile = on_tensor_cores<Operand> ? 128 : tile_size<Compute<Operand>>;
constexpr int64_t depth_step = 32;  // the depth of operands is padded to a multiple

// No code of a group scores more than this, in exact arithmetic or in float64.
template <class Operand>
__device__ __forceinline__ double upper_bound(Metric metric, double screened, const RowBound& x, const GroupBound& c,
                                              int64_t depth) {
  constexpr bool wide = std::is_same_v<Operand, double>;
  // Twice what a sum of `depth` terms loses if every addition truncates, and what underflow may take from each.
  constexpr double unit = wide ? 0x1p-51 : 0x1p-22, underflow = wide ? 0x1p-1000 : 0x1p-124;
  constexpr double overflow = wide ? 0x1p1000 : 0x1p126;
  constexpr double vanished = wide ? 0x1p-500 : 0;  // of a length, where the squares of float64 underflow
  const double length = x.length + vanished, steps = static_cast<double>(depth + 32);
  const double size = length * (c.length + vanished) + c.offset;
  const double narrowing = x.error * c.length + (x.length + x.error) * c.error;
  const double margin = 1.0001 * narrowing + steps * (unit * size + underflow);
  const double sum = x.length + c.reach;
  const double bound = metric == Metric::euclidean
                           ? 2 * (screened + margin) + x.shift + steps * 0x1p-51 * sum * sum
                           : screened + margin + x.shift + steps * 0x1p-51 * length * (c.reach + vanished);
  // No bound at all where partial sums may have overflowed or something is not a number.
  return size < overflow && bound == bound ? bound : infinity<double>();
}

// T: of x and the codebook. Operand: what is multiplied.
template <class T, class Operand>
struct SearchPlan {
  using C = Compute<Operand>;  // of screened scores
  static constexpr int tile = screen_tile<Operand>;
  static constexpr bool centred = sizeof(Operand) < sizeof(T);

  CodeSearch args;
  int64_t depth;                    // of operands: dim, padded with zeros
  int64_t groups, code_tiles;       // of each head
  int64_t tiles_per_range, ranges;  // of codes: so that few rows fill the device, too
  int64_t row_tiles;                // of each head
  int64_t chunk_tiles;              // of rows, whose operands and maxima exist at a time
  // All codes.
  T* packed;           // [heads, groups, dim, group_codes]: of the codebook, for 32 lanes that score a group
  double* lengths;     // [heads, groups, group_codes]: |c|, for cosine
  float* centre;       // [heads, dim]: m
  Operand* codes;      // [heads, code_tiles, tile, depth]
  C* offsets;          // [heads, code_tiles, tile]: b; -inf in the padding
  GroupBound* bounds;  // [heads, groups]
  // A chunk of rows.
  Operand* rows;         // [chunk_tiles, tile, depth]
  RowBound* row_bounds;  // [chunk_tiles, tile]
  C* maxima;             // [code_tiles, groups of a tile, chunk_tiles, tile]

  SearchPlan(const CodeSearch& args_, Arena& arena) : args(args_) {
    constexpr int64_t chunk_bytes = 64 << 20;
    constexpr int64_t enough_blocks = 512;  // two for each multiprocessor of the largest devices
    depth = at_least_one(divide_up(args.dim, depth_step)) * depth_step;
    groups = divide_up(args.codes, group_codes);
    code_tiles = divide_up(args.codes, tile);
    row_tiles = divide_up(args.rows, tile);
    const int64_t padded_groups = code_tiles * tile / group_codes, all_tiles = args.heads * row_tiles;
    const int64_t row_bytes = padded_groups * sizeof(C) + depth * sizeof(Operand) + sizeof(RowBound);
    const int64_t chunks = divide_up(all_tiles, at_least_one(chunk_bytes / (tile * row_bytes)));
    chunk_tiles = divide_up(all_tiles, at_least_one(chunks));
    const int64_t wanted = divide_up(enough_blocks, at_least_one(chunk_tiles));
    tiles_per_range = divide_up(code_tiles, wanted < code_tiles ? wanted : code_tiles);
    ranges = divide_up(code_tiles, tiles_per_range);

    packed = arena.take<T>(args.heads * groups * args.dim * group_codes);
    lengths = arena.take<double>(args.metric == Metric::cosine ? args.heads * groups * group_codes : 0);
    centre = arena.take<float>(centred ? args.heads * args.dim : 0);
    codes = arena.take<Operand>(args.heads * code_tiles * tile * depth);
    offsets = arena.take<C>(args.heads * code_tiles * tile);
    bounds = arena.take<GroupBound>(args.heads * groups);
    rows = arena.take<Operand>(chunk_tiles * tile * depth);
    row_bounds = arena.take<RowBound>(chunk_tiles * tile);
    maxima = arena.take<C>(padded_groups * chunk_tiles * tile);
  }

  __device__ __forceinline__ double centre_at(int64_t head, int64_t k) const {
    if constexpr (centred) return centre[head * args.dim + k];
    return 0;
  }

 private:
  static int64_t at_least_one(int64_t value) { return value < 1 ? 1 : value; }
};

// A row of a chunk: where it is among all rows, and whether it is one at all.
struct RowPlace {
  int64_t head, row;
  bool exists;

  template <class Plan>
  __device__ __forceinline__ RowPlace(const Plan& plan, int64_t first_tile, int64_t chunk_row) {
    const int64_t tile = first_tile + chunk_row / Plan::tile;
    head = tile / plan.row_tiles;
    row = tile % plan.row_tiles * Plan::tile + chunk_row % Plan::tile;
    exists = head < plan.args.heads && row < plan.args.rows;
  }
};

}  // namespace
}  // namespace isthmus::cuda
