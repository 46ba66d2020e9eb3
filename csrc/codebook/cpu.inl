// Vector quantization on the CPU.
//
//     index(x) = argmax_k  x·c_k - |c_k|²/2          the code of least |x - c|², without the term |x|² all codes share
//
// A register tile of the product (core/product.h) starts from -|c|²/2 and ends as scores. Each lane of each row keeps
// the best score it has met and the code it came from, so the epilogue is one comparison and two blends a vector, and
// the [N, K] scores never exist. Lanes meet only once per row, after the last code.
//
// Arithmetic: 2·N·K·D operations at the rate of the FMA ports. Traffic: the codebook is packed once (K·D) and streamed
// past each block of rows, which waits in L2 with its leaders.

#include "codebook/kernels.h"
#include "core/dispatch.h"
#include "core/product.h"
#include "core/sort.h"
#include "core/tiles.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// Work items of `elements` elements each: how many a second thread must bring to be worth its while.
inline int64_t grain_of(int64_t elements) { return grain_elements / (elements + 1) + 1; }

// ---- search --------------------------------------------------------------------------------------------------------

// The codebook as panels of columns, with the score that each column starts from.
template <class T>
struct Codes {
  using C = Compute<T>;
  static constexpr int width = panel_width<C>;

  const int64_t dim, panels;
  Buffer<C> columns;  // [panels, dim, width]
  Buffer<C> offsets;  // [panels, width]: -|c|²/2; -inf in the padding, which therefore never wins

  Codes(const T* codebook, int64_t codes, int64_t dim_)
      : dim(dim_), panels((codes + width - 1) / width), columns(panels * dim * width), offsets(panels * width) {
    parallel_for(panels, grain_of(dim * width), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t left = codes - p * width;
        const int64_t count = left < width ? left : width;
        pack_rows<width>(codebook + p * width * dim, dim, count, dim, columns.data + p * dim * width);
        set_offsets(p, count);
      }
    });
  }

  void set_offsets(int64_t p, int64_t count) const {
    for (int64_t j = 0; j < width; j += lanes<C>) {
      Vec<C> offset = {};
      for (int64_t k = 0; k < dim; ++k) {
        const Vec<C> c = load(columns.data + (p * dim + k) * width + j);
        offset -= C(0.5) * c * c;
      }
      store(offsets.data + p * width + j, first_lanes<C>(count - j) ? offset : offset - C(__builtin_inf()));
    }
  }
};

// Of one row, lane by lane: the best score so far, and whose it is.
template <class C>
struct Leader {
  Vec<C> score;
  Mask<C> code;

  // Strictly greater: the earlier of two equal scores stays, and one that is not a number never enters.
  ISTHMUS_INLINE void meet(Vec<C> challenger, Mask<C> its_code) {
    const Mask<C> wins = challenger > score;
    score = wins ? challenger : score;
    code = wins ? its_code : code;
  }

  // Between lanes equal scores do meet out of order: there the lower code stays.
  template <int Step = lanes<C> / 2>
  ISTHMUS_INLINE int64_t winner() {
    Mask<C> partner;
    for (int i = 0; i < lanes<C>; ++i) partner[i] = i ^ Step;
    const Vec<C> other = __builtin_shuffle(score, partner);
    const Mask<C> its_code = __builtin_shuffle(code, partner);
    const Mask<C> wins = (other > score) | ((other == score) & (its_code < code));
    score = wins ? other : score;
    code = wins ? its_code : code;
    if constexpr (Step > 1) {
      return winner<Step / 2>();
    } else {
      return code[0];
    }
  }
};

// A few tiles of rows that stay in L2 while all panels pass.
template <class T>
struct RowBlock {
  using C = Compute<T>;
  static constexpr int64_t max_tiles = 8;

  const Codes<T>& codes;
  Buffer<C> tiles;  // [max_tiles, dim, tile_rows]
  Leader<C> leaders[max_tiles * tile_rows];

  explicit RowBlock(const Codes<T>& codes_) : codes(codes_), tiles(max_tiles * codes.dim * tile_rows) {}

  void search(const T* x, int64_t rows, int64_t* indices) {
    for (int64_t row = 0; row < rows; row += tile_rows) {
      const int64_t count = rows - row < tile_rows ? rows - row : tile_rows;
      pack_rows<tile_rows>(x + row * codes.dim, codes.dim, count, codes.dim, tiles.data + row * codes.dim);
    }
    for (Leader<C>& leader : leaders) leader = {Vec<C>{} - C(__builtin_inf()), Mask<C>{}};
    for (int64_t p = 0; p < codes.panels; ++p) {
      for (int64_t row = 0; row < rows; row += tile_rows) {
        dispatch_rows(rows - row, [&]<int Rows>() { meet_panel<Rows>(row, p); });
      }
    }
    for (int64_t row = 0; row < rows; ++row) indices[row] = leaders[row].winner();
  }

  template <int Rows>
  ISTHMUS_NOINLINE void meet_panel(int64_t row, int64_t p) {
    const C* offsets = codes.offsets.data + p * codes.width;
    Vec<C> scores[Rows][2];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      scores[r][0] = load(offsets);
      scores[r][1] = load(offsets + lanes<C>);
    }
    multiply_tile(tiles.data + row * codes.dim, codes.columns.data + p * codes.dim * codes.width, codes.dim, scores);
    const Mask<C> first = iota<C>() + static_cast<decltype(+Mask<C>{}[0])>(p * codes.width);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      Leader<C> leader = leaders[row + r];
      leader.meet(scores[r][0], first);
      leader.meet(scores[r][1], first + lanes<C>);
      leaders[row + r] = leader;
    }
  }
};

// The code of each row, and how far it is: from the difference, not from the score, which cancels.
template <class T>
void gather(const CodeSearch& args, int64_t begin, int64_t end) {
  using C = Compute<T>;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.dim;
    const T* code = static_cast<const T*>(args.codebook) + args.indices[row] * args.dim;
    T* quantized = static_cast<T*>(args.quantized) + row * args.dim;
    Vec<C> sum = {};
    for (int64_t k = 0; k < args.dim; k += lanes<C>) {
      const int64_t left = args.dim - k;
      const Vec<C> difference = load_first(x + k, left) - load_first(code + k, left);
      sum += difference * difference;
    }
    for (int64_t k = 0; k < args.dim; ++k) quantized[k] = code[k];
    static_cast<C*>(args.squared_error)[row] = sum_lanes<C>(sum);
  }
}

void search(const CodeSearch& args) {
  if (args.rows == 0) return;
  dispatch_dtype(args.dtype, [&]<class T>() {
    const T* x = static_cast<const T*>(args.x);
    const Codes<T> codes(static_cast<const T*>(args.codebook), args.codes, args.dim);
    // Large blocks spare the codebook's passage through the cache, but every thread needs some.
    const int64_t tiles = (args.rows + tile_rows - 1) / tile_rows, share = tiles / 16;
    const int64_t block_tiles = share < 1 ? 1 : share < RowBlock<T>::max_tiles ? share : RowBlock<T>::max_tiles;
    const int64_t block_rows = block_tiles * tile_rows;
    constexpr int64_t products_per_element = 64;  // as fast as moving one element in a loop bound by memory
    const int64_t grain = grain_of(args.codes * args.dim * block_rows / products_per_element);
    parallel_for((tiles + block_tiles - 1) / block_tiles, grain, [&](int64_t begin, int64_t end) {
      RowBlock<T> block(codes);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = b * block_rows, left = args.rows - first;
        const int64_t rows = left < block_rows ? left : block_rows;
        block.search(x + first * args.dim, rows, args.indices + first);
        if (args.squared_error != nullptr) gather<T>(args, first, first + rows);
      }
    });
  });
}

// ---- backward ------------------------------------------------------------------------------------------------------

// Rows are visited code by code, so x is read once for both gradients.
template <class T>
struct Backward {
  using C = Compute<T>;

  const QuantizeBackward& args;
  const T* grad_quantized = static_cast<const T*>(args.grad_quantized);
  const C* grad_error = static_cast<const C*>(args.grad_error);
  const T* x = static_cast<const T*>(args.x);
  const T* codebook = static_cast<const T*>(args.codebook);
  T* grad_x = static_cast<T*>(args.grad_x);
  T* grad_codebook = static_cast<T*>(args.grad_codebook);

  void add_row(int64_t row, int64_t code, C* sum) const {
    const C slope = 2 * grad_error[row], commitment = static_cast<C>(args.commitment_weight);
    for (int64_t k = 0; k < args.dim; k += lanes<C>) {
      const int64_t at = row * args.dim + k, left = args.dim - k;
      const Vec<C> pull = slope * (load_first(x + at, left) - load_first(codebook + code * args.dim + k, left));
      store_first(grad_x + at, load_first(grad_quantized + at, left) + commitment * pull, left);
      store_first(sum + k, load_first(sum + k, left) - pull, left);
    }
  }

  void write_code(int64_t code, const C* sum) const {
    for (int64_t k = 0; k < args.dim; k += lanes<C>) {
      store_first(grad_codebook + code * args.dim + k, load_first(sum + k, args.dim - k), args.dim - k);
    }
  }
};

void backward(const QuantizeBackward& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    const Backward<T> body{args};
    sum_groups<C>(
        Groups(args.indices, args.rows, args.codes), args.dim,
        [&](int64_t row, int64_t code, C* sum) { body.add_row(row, code, sum); },
        [&](int64_t code, const C* sum) { body.write_code(code, sum); });
  });
}

// ---- statistics ----------------------------------------------------------------------------------------------------

void statistics(const CodeStatistics& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    const T* x = static_cast<const T*>(args.x);
    const int64_t dim = args.dim;
    const Groups groups(args.indices, args.rows, args.codes);
    for (int64_t code = 0; code < args.codes; ++code) {
      static_cast<C*>(args.counts)[code] = static_cast<C>(groups.starts.data[code + 1] - groups.starts.data[code]);
    }
    sum_groups<C>(
        groups, dim,
        [&](int64_t row, int64_t, C* sum) {
          for (int64_t k = 0; k < dim; k += lanes<C>) {
            store_first(sum + k, load_first(sum + k, dim - k) + load_first(x + row * dim + k, dim - k), dim - k);
          }
        },
        [&](int64_t code, const C* sum) {
          for (int64_t k = 0; k < dim; ++k) static_cast<C*>(args.sums)[code * dim + k] = sum[k];
        });
  });
}

}  // namespace

extern const CodebookKernels codebook_table;
const CodebookKernels codebook_table = {search, backward, statistics};

}  // namespace isthmus::ISTHMUS_LEVEL
