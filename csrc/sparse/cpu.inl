// Sparse codes on the CPU: decoding, gradients of decoders and encoders, the order by latent. All are gathers of rows:
// memory bound, rows prefetched ahead of their use.

#include <type_traits>

#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/sort.h"
#include "sparse/kernels.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// Where the entries of a row begin: those of the row before end here.
inline int64_t first_entry(const CodeLayout& code, int64_t row) {
  return code.offsets != nullptr ? code.offsets[row] : row * code.k;
}

// ---- a block of columns: Vectors vectors, all full; or one, of which only `left` columns may be there --------------

// Calls f(v, vector v of the columns).
template <int Vectors, class T, class F>
ISTHMUS_INLINE void each_column(const T* row, int64_t left, F&& f) {
  using C = Compute<T>;
  if constexpr (Vectors == 1) {
    f(0, load_first(row, left));
  } else {
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; v += 2) {
      Vec<C> pair[2];
      load_pair(row + v * lanes<C>, pair);
      f(v, pair[0]);
      f(v + 1, pair[1]);
    }
  }
}

template <int Vectors, class T>
ISTHMUS_INLINE void store_columns(T* row, int64_t left, const Vec<Compute<T>> (&columns)[Vectors]) {
  using C = Compute<T>;
  if constexpr (Vectors == 1) {
    store_first(row, columns[0], left);
  } else {
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; v += 2) store_pair(row + v * lanes<C>, {columns[v], columns[v + 1]});
  }
}

// How many entries ahead to fetch what one of them reads: far enough for main memory, near enough for the first-level
// cache.
constexpr int64_t entries_ahead(int64_t bytes) { return smaller(64, 16 * 1024 / larger(bytes, 1) + 1); }

template <int Vectors, class T>
ISTHMUS_INLINE void prefetch_columns(const T* row) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (size_t byte = 0; byte < Vectors * lanes<Compute<T>> * sizeof(T); byte += 64) __builtin_prefetch(bytes + byte);
}

// load_one without its detour through a vector, which takes longer than the row that the number multiplies.
template <class T>
ISTHMUS_INLINE Compute<T> load_number(const T* p) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    uint16_t upper;
    std::memcpy(&upper, p, sizeof upper);
    const uint32_t bits = uint32_t(upper) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
#if defined(__F16C__)
  } else if constexpr (std::is_same_v<T, Half>) {
    uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return _cvtsh_ss(bits);
#endif
  } else {
    return load_one(p);
  }
}

// Rows that make a second thread worth its start.
inline int64_t row_grain(const CodeLayout& code, int64_t cols) {
  return 32 * 1024 / (code.entries / larger(code.rows, 1) * cols + 1) + 1;
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL

#include "sparse/decode.inl"
#include "sparse/gradients.inl"
#include "sparse/order.inl"

namespace isthmus::ISTHMUS_LEVEL {

extern const SparseKernels sparse_table;
const SparseKernels sparse_table = {latent_order, decode, decode_backward, encode_backward, reconstruction_gradient};

}  // namespace isthmus::ISTHMUS_LEVEL
