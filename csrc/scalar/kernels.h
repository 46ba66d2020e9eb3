// Quantizers without a codebook table: the kernels, free of torch. All pointers are to contiguous memory.
//
// A row has one digit for each of its numbers; its index is their mixed-radix number. A row whose mask is false is
// zeros, index -1, and adds nothing to any sum.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"

namespace isthmus {

// Indices stay below 2^63 and every dimension has at least two levels, so there are never more dimensions than this.
constexpr int max_scalar_dims = 62;

struct Levels {
  int dims;
  int64_t size[max_scalar_dims];

  constexpr int64_t total() const {
    int64_t sum = 0;
    for (int d = 0; d < dims; ++d) sum += size[d];
    return sum;
  }
};

// The formula of one dimension: round(u), u = half · s(x + shift) - offset, value = (round(u) + centre) / width.
struct Grid {
  double shift, half, offset, centre, width;
};

struct Fsq {
  DType dtype;
  int64_t rows;
  Levels levels;
  Grid grid[max_scalar_dims];
  bool hard_clamp;   // s is a clamp to [-1, 1], not tanh
  const bool* mask;  // [rows] or null
  const void* x;     // [rows, dims]
};

struct FsqQuantize : Fsq {
  double noise_dropout;
  const int64_t* key;  // [2]: seed, offset; null: nothing is dropped
  void* quantized;     // [rows, dims]
  int64_t* indices;    // [rows]
};

struct FsqBackward : Fsq {
  const void* grad;  // [rows, dims]
  void* grad_x;
};

// Rounds in stages: with b = L / (L - 1) and at first left = b · s(x / b), stage q takes the nearest of L levels in
// [-1, 1], adds it at scale L^-q, and hands (left - level) · L on.
struct ResidualFsq {
  DType dtype;
  int64_t rows, stages;
  Levels levels;
  bool hard_clamp;      // s is a clamp to [-1, 1], not tanh
  const int64_t* kept;  // [rows]: stages of each row, or null: all of them
  const void* x;        // [rows, dims]
};

struct ResidualFsqQuantize : ResidualFsq {
  void* quantized;   // [rows, dims]
  int64_t* indices;  // [rows, stages]; -1 where a row has no such stage
};

struct ResidualFsqBackward : ResidualFsq {
  const void* grad;  // [rows, dims]
  void* grad_x;
};

// u = x, or scale · x / |x| on the sphere; quantized = ±value. Bits are Bernoulli(σ(sharpness · u)). The temperature is
// read where the kernel runs, so that annealing it needs no host, no new graph and no new compilation.
struct Lfq {
  DType dtype;
  int64_t rows, codebooks, bits;
  bool spherical;
  double scale, value;
  const double* inverse_temperature;  // [1], or null: no soft bits
  const bool* mask;                   // [rows] or null
  const void* x;                      // [rows, codebooks, bits]

  constexpr double sharpness() const { return inverse_temperature == nullptr ? 0 : 4 * *inverse_temperature * value; }
};

struct LfqQuantize : Lfq {
  void* quantized;   // [rows, codebooks, bits]
  int64_t* indices;  // [rows, codebooks]
  void* error;       // [rows, codebooks] in the accumulate type, as are the next two
  void* entropy;     // [rows, codebooks], if there are bit_counts
  void* bit_counts;  // [codebooks, bits], or null: no soft bits
  void* workspace;   // CUDA: lfq_workspace() doubles, if there are bit_counts; else null
};

struct LfqBackward : Lfq {
  const void* grad_quantized;   // [rows, codebooks, bits]
  const void* grad_error;       // [rows, codebooks]
  const void* grad_entropy;     // [rows, codebooks], if there is grad_bit_counts
  const void* grad_bit_counts;  // [codebooks, bits], or null
  void* grad_x;
};

// The nearest of the values of its dimension.
struct Latent {
  DType dtype;
  int64_t rows;
  Levels levels;
  const bool* mask;       // [rows] or null
  const void* x;          // [rows, dims]
  const void* codebooks;  // [levels.total()]
};

struct LatentQuantize : Latent {
  void* quantized;   // [rows, dims]
  int64_t* indices;  // [rows]
  void* error;       // [rows] in the accumulate type
};

struct LatentBackward : Latent {
  double commitment_weight;
  const void* grad_quantized;
  const void* grad_error;
  void* grad_x;
  void* grad_codebooks;  // null where nobody asks
  void* workspace;       // CUDA: latent_workspace() doubles, if there is grad_codebooks; else null
};

// out[row, d] = scale times the value of digit d of the index; zeros for index -1.
struct FsqDecode {
  DType dtype;
  int64_t rows;
  Levels levels;
  Grid grid[max_scalar_dims];
  bool first_highest;  // the first dimension is the most significant digit, not the least
  double scale;
  const int64_t* indices;
  void* out;  // [rows, dims]
};

// The same with values from codebooks.
struct LatentDecode {
  DType dtype;
  int64_t rows;
  Levels levels;
  const int64_t* indices;
  const void* codebooks;  // [levels.total()]
  void* out;              // [rows, dims]
};

struct LatentDecodeBackward {
  DType dtype;
  int64_t rows;
  Levels levels;
  const int64_t* indices;
  const void* grad;      // [rows, dims]
  void* grad_codebooks;  // [levels.total()]
  void* workspace;       // CUDA: latent_workspace() doubles; else null
};

// bit = [logit + logistic noise > 0].
struct BinaryMap {
  DType dtype;
  int64_t rows, bits;
  const int64_t* key;  // [2]: seed, offset; null: no noise
  const void* logits;  // [rows, bits]
  void* out;           // [rows, bits]: zeros and ones
  int64_t* indices;    // [rows]
  void* entropy;       // [rows] in the accumulate type
};

struct BinaryMapBackward {
  DType dtype;
  int64_t rows, bits;
  const int64_t* key;
  bool relaxed;  // the gradient of σ((logit + noise) / temperature), not of σ(logit)
  double temperature;
  const void* logits;
  const void* grad_bits;     // [rows, bits]
  const void* grad_entropy;  // [rows]
  void* grad_logits;
};

// Streams of `width` bits for each index, lowest first; a row of `length` indices begins at a byte.
struct BitStream {
  int64_t rows, length;
  int width;

  constexpr int64_t row_bytes() const { return (length * width + 7) / 8; }
};

struct PackBits : BitStream {
  const int64_t* indices;  // [rows, length]
  uint8_t* packed;         // [rows, row_bytes()]
};

struct UnpackBits : BitStream {
  const uint8_t* packed;
  int64_t* indices;
};

// To unsigned bytes, or to signed integers of 2, 4 or 8 bytes.
struct Narrow {
  int64_t count, num_codes;
  int bytes;
  const int64_t* indices;
  void* out;
};

struct ScalarKernels {
  void (*fsq_quantize)(const FsqQuantize&);
  void (*fsq_backward)(const FsqBackward&);
  void (*residual_fsq_quantize)(const ResidualFsqQuantize&);
  void (*residual_fsq_backward)(const ResidualFsqBackward&);
  void (*lfq_quantize)(const LfqQuantize&);
  void (*lfq_backward)(const LfqBackward&);
  void (*latent_quantize)(const LatentQuantize&);
  void (*latent_backward)(const LatentBackward&);
  void (*fsq_decode)(const FsqDecode&);
  void (*latent_decode)(const LatentDecode&);
  void (*latent_decode_backward)(const LatentDecodeBackward&);
  void (*binary_map)(const BinaryMap&);
  void (*binary_map_backward)(const BinaryMapBackward&);
  void (*pack_bits)(const PackBits&);
  void (*unpack_bits)(const UnpackBits&);
  void (*narrow)(const Narrow&);
};

ISTHMUS_DECLARE_KERNELS(ScalarKernels, scalar)

// CUDA: the same arguments with device pointers. Launches on `stream` (a cudaStream_t) of the current device and
// returns without waiting. An index out of range stops the device with a message, as torch's own indexing does.
namespace cuda {
int64_t lfq_workspace(int64_t rows, int64_t columns);
int64_t latent_workspace(int64_t rows, int64_t dims, int64_t entries);
void scalar_fsq_quantize(const FsqQuantize&, void* stream);
void scalar_fsq_backward(const FsqBackward&, void* stream);
void scalar_residual_fsq_quantize(const ResidualFsqQuantize&, void* stream);
void scalar_residual_fsq_backward(const ResidualFsqBackward&, void* stream);
void scalar_lfq_quantize(const LfqQuantize&, void* stream);
void scalar_lfq_backward(const LfqBackward&, void* stream);
void scalar_latent_quantize(const LatentQuantize&, void* stream);
void scalar_latent_backward(const LatentBackward&, void* stream);
void scalar_fsq_decode(const FsqDecode&, void* stream);
void scalar_latent_decode(const LatentDecode&, void* stream);
void scalar_latent_decode_backward(const LatentDecodeBackward&, void* stream);
void scalar_binary_map(const BinaryMap&, void* stream);
void scalar_binary_map_backward(const BinaryMapBackward&, void* stream);
void scalar_pack_bits(const PackBits&, void* stream);
void scalar_unpack_bits(const UnpackBits&, void* stream);
void scalar_narrow(const Narrow&, void* stream);
}  // namespace cuda

}  // namespace isthmus
