// Sparse codes on the CPU: decoding, gradients of decoders and encoders, the order by latent. All are gathers of rows:
// memory bound, rows prefetched ahead of their use.

#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/sort.h"
#include "sparse/kernels.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where the entries of a row begin: those of the row before end here.
inline int64_t first_entry(const CodeLayout& code, int64_t row) {
  return code.offsets != nullptr ? code.offsets[row] : row * code.k;
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
