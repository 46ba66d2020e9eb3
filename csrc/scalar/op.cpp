// Host entries of the scalar family: checks, allocation, dispatch. Schemas in csrc/library.cpp.

#include <cmath>

#include "op.h"
#include "scalar/kernels.h"

namespace isthmus {
namespace {

// ---- arguments -----------------------------------------------------------------------------------------------------

// Each of at least two and at most `most` levels, and fewer than 2^63 codes in all.
Levels parse_levels(const std::vector<int64_t>& levels, int64_t most) {
  Levels parsed{};
  int64_t codes = 1;
  for (const int64_t size : levels) {
    if (size < 2 || size > most) fail("levels holds ", size, "; expected 2 to ", most, " levels in each dimension");
    if (codes > INT64_MAX / size) fail("levels make 2^63 codes or more; expected indices that fit int64");
    codes *= size;
    parsed.size[parsed.dims++] = size;
  }
  if (parsed.dims == 0) fail("levels is empty; expected the number of levels of each dimension");
  return parsed;
}

int64_t codes_of(const Levels& levels) {
  int64_t codes = 1;
  for (int d = 0; d < levels.dims; ++d) codes *= levels.size[d];
  return codes;
}

void check_columns(const Tensor& x, const char* argument, const Levels& levels) {
  if (x.dim() == 0 || last_size(x) != levels.dims) {
    fail(argument, " has shape ", shape_of(x), "; expected [..., ", levels.dims, "], one column for each of levels");
  }
}

void check_bits(const Tensor& x, const char* argument) {
  if (x.dim() == 0 || last_size(x) < 1 || last_size(x) > max_scalar_dims) {
    fail(argument, " has shape ", shape_of(x), "; expected [..., bits] with 1 to ", max_scalar_dims, " bits");
  }
}

// A mask of the first `dims` dimensions of x.
const bool* mask_data(const OptionalTensor& mask, const Tensor& x, int64_t dims) {
  if (!mask) return nullptr;
  check_device(*mask, "mask", x, "x");
  std::vector<int64_t> expected = sizes_of(x);
  expected.resize(static_cast<size_t>(dims));
  if (mask->scalar_type() != ScalarType::Bool || sizes_of(*mask) != expected) {
    fail("mask has dtype ", name_of(mask->scalar_type()), " and shape ", shape_of(*mask),
         "; expected bool and the leading shape of x, which has shape ", shape_of(x));
  }
  return static_cast<const bool*>(mask->const_data_ptr());
}

const int64_t* key_data(const OptionalTensor& key, const Tensor& like, const char* like_name) {
  if (!key) return nullptr;
  check_key(*key);
  check_device(*key, "key", like, like_name);
  return int64_data(*key);
}

Tensor like(const Tensor& x) { return empty(sizes_of(x), x.scalar_type(), x); }
Tensor row_values(const Tensor& x) { return empty(leading_sizes(x), accumulate_type(x), x); }
Tensor row_indices(const Tensor& x) { return empty(leading_sizes(x), ScalarType::Long, x); }
int64_t* index_data(const Tensor& t) { return static_cast<int64_t*>(mutable_data(t)); }

void check_row_gradient(const Tensor& grad, const char* argument, const Tensor& x) {
  check_accumulated(grad, argument, leading_sizes(x), x, "x");
}

// Memory for partial sums of a CUDA kernel; CPU kernels allocate their own.
Tensor workspace([[maybe_unused]] const Tensor& x, int64_t doubles) {
  return empty({x.is_cuda() ? doubles : 0}, ScalarType::Double, x);
}

// ---- finite scalars ------------------------------------------------------------------------------------------------

constexpr int64_t most_fsq_levels = 1 << 16;  // beyond, float32 does not tell neighbouring levels apart

// The formula of python/isthmus/reference/scalar.py.
Grid grid_of(int64_t levels, bool symmetric, bool hard_clamp) {
  const double offset = levels % 2 == 0 ? 0.5 : 0, reach = static_cast<double>(levels - 1), half = reach / 2;
  if (symmetric) return {0, half, offset, offset, half};
  const double wider = half * (1 + std::fmin(1e-3, 0.25 / reach)), shift = offset / wider;
  return {hard_clamp ? shift : std::atanh(shift), wider, offset, 0, static_cast<double>(levels / 2)};
}

Fsq fsq(const Tensor& x, const std::vector<int64_t>& levels, const OptionalTensor& mask, bool symmetric,
        bool hard_clamp) {
  Fsq args{dtype_of(x, "x"), leading_size(x), parse_levels(levels, most_fsq_levels), {}, hard_clamp, nullptr, data(x)};
  check_columns(x, "x", args.levels);
  args.mask = mask_data(mask, x, x.dim() - 1);
  for (int d = 0; d < args.levels.dims; ++d) args.grid[d] = grid_of(args.levels.size[d], symmetric, hard_clamp);
  return args;
}

std::tuple<Tensor, Tensor> fsq_quantize(const Tensor& x_, const std::vector<int64_t>& levels,
                                        const OptionalTensor& mask_, const OptionalTensor& key_, bool symmetric,
                                        bool hard_clamp, double noise_dropout) {
  if (!(noise_dropout >= 0 && noise_dropout <= 1)) {
    fail("noise_dropout is ", noise_dropout, "; expected a probability");
  }
  const Tensor x = as_contiguous(x_);
  const OptionalTensor mask = as_contiguous(mask_), key = as_contiguous(key_);
  const Fsq in = fsq(x, levels, mask, symmetric, hard_clamp);
  const Tensor quantized = like(x), indices = row_indices(x);
  const FsqQuantize args{in, noise_dropout, key_data(key, x, "x"), mutable_data(quantized), index_data(indices)};
  ISTHMUS_LAUNCH(x, scalar, fsq_quantize, args);
  return {quantized, indices};
}

Tensor fsq_quantize_backward(const Tensor& grad_, const Tensor& x_, const std::vector<int64_t>& levels,
                             const OptionalTensor& mask_, bool symmetric, bool hard_clamp) {
  check_like(grad_, "grad", x_, "x");
  const Tensor grad = as_contiguous(grad_), x = as_contiguous(x_), grad_x = like(x);
  const OptionalTensor mask = as_contiguous(mask_);
  const FsqBackward args{fsq(x, levels, mask, symmetric, hard_clamp), data(grad), mutable_data(grad_x)};
  ISTHMUS_LAUNCH(x, scalar, fsq_backward, args);
  return grad_x;
}

// kept: how many stages each row has, for all stages if absent.
ResidualFsq residual_fsq(const Tensor& x, const std::vector<int64_t>& levels, int64_t stages,
                         const OptionalTensor& kept, bool hard_clamp) {
  if (stages < 1) fail("num_quantizers is ", stages, "; expected at least 1");
  const Levels parsed = parse_levels(levels, most_fsq_levels);
  check_columns(x, "x", parsed);
  if (kept) {
    check_int64(*kept, "stages");
    check_device(*kept, "stages", x, "x");
    if (sizes_of(*kept) != leading_sizes(x)) {
      fail("stages has shape ", shape_of(*kept), "; expected the leading shape of x, which has shape ", shape_of(x));
    }
  }
  return {dtype_of(x, "x"), leading_size(x), stages, parsed, hard_clamp, kept ? int64_data(*kept) : nullptr, data(x)};
}

std::tuple<Tensor, Tensor> residual_fsq_quantize(const Tensor& x_, const std::vector<int64_t>& levels, int64_t stages,
                                                 const OptionalTensor& kept_, bool hard_clamp) {
  const Tensor x = as_contiguous(x_);
  const OptionalTensor kept = as_contiguous(kept_);
  const ResidualFsq in = residual_fsq(x, levels, stages, kept, hard_clamp);
  for (int64_t row = 0; kept && !x.is_cuda() && row < in.rows; ++row) {
    if (in.kept[row] < 0 || in.kept[row] > stages) fail("stages holds ", in.kept[row], "; expected 0 to ", stages);
  }
  std::vector<int64_t> sizes = leading_sizes(x);
  sizes.push_back(stages);
  const Tensor quantized = like(x), indices = empty(sizes, ScalarType::Long, x);
  const ResidualFsqQuantize args{in, mutable_data(quantized), index_data(indices)};
  ISTHMUS_LAUNCH(x, scalar, residual_fsq_quantize, args);
  return {quantized, indices};
}

Tensor residual_fsq_quantize_backward(const Tensor& grad_, const Tensor& x_, const std::vector<int64_t>& levels,
                                      const OptionalTensor& kept_, bool hard_clamp) {
  check_like(grad_, "grad", x_, "x");
  const Tensor grad = as_contiguous(grad_), x = as_contiguous(x_), grad_x = like(x);
  const OptionalTensor kept = as_contiguous(kept_);
  const ResidualFsqBackward args{residual_fsq(x, levels, 1, kept, hard_clamp), data(grad), mutable_data(grad_x)};
  ISTHMUS_LAUNCH(x, scalar, residual_fsq_backward, args);
  return grad_x;
}

// ---- signs ---------------------------------------------------------------------------------------------------------

// Its number is looked at on the CPU alone: on CUDA that would wait for the device.
const double* temperature_data(const Tensor& inverse_temperature, const Tensor& x) {
  check_device(inverse_temperature, "inverse_temperature", x, "x");
  if (inverse_temperature.scalar_type() != ScalarType::Double || inverse_temperature.numel() != 1) {
    fail("inverse_temperature has dtype ", name_of(inverse_temperature.scalar_type()), " and shape ",
         shape_of(inverse_temperature), "; expected one float64 number");
  }
  const double* value = static_cast<const double*>(data(inverse_temperature));
  if (!x.is_cuda() && !(*value > 0)) fail("inverse_temperature is ", *value, "; expected a positive number");
  return value;
}

// codebooks: size of the dimension before the last, or 0 if all but the last are rows.
Lfq lfq(const Tensor& x, const OptionalTensor& mask, double scale, bool spherical, const double* inverse_temperature,
        int64_t codebooks) {
  check_bits(x, "x");
  if (!(scale > 0)) fail("scale is ", scale, "; expected a positive number");
  if (codebooks != 0 && (x.dim() < 2 || x.size(x.dim() - 2) != codebooks)) {
    fail("x has shape ", shape_of(x), "; expected [..., ", codebooks, ", bits], one row for each of num_codebooks");
  }
  const int64_t bits = last_size(x), dims = x.dim() - (codebooks == 0 ? 1 : 2);
  const double value = spherical ? scale / std::sqrt(static_cast<double>(bits)) : scale;
  return {dtype_of(x, "x"),
          product(x, dims),
          codebooks == 0 ? 1 : codebooks,
          bits,
          spherical,
          scale,
          value,
          inverse_temperature,
          mask_data(mask, x, dims),
          data(x)};
}

std::tuple<Tensor, Tensor, Tensor> lfq_quantize(const Tensor& x_, const OptionalTensor& mask_, double scale,
                                                bool spherical) {
  const Tensor x = as_contiguous(x_);
  const OptionalTensor mask = as_contiguous(mask_);
  const Lfq in = lfq(x, mask, scale, spherical, nullptr, 0);
  const Tensor quantized = like(x), indices = row_indices(x), error = row_values(x);
  const LfqQuantize args{in,     mutable_data(quantized), index_data(indices), mutable_data(error), nullptr, nullptr,
                         nullptr};
  ISTHMUS_LAUNCH(x, scalar, lfq_quantize, args);
  return {quantized, indices, error};
}

Tensor lfq_quantize_backward(const Tensor& grad_quantized_, const Tensor& grad_error_, const Tensor& x_,
                             const OptionalTensor& mask_, double scale, bool spherical) {
  check_like(grad_quantized_, "grad_quantized", x_, "x");
  check_row_gradient(grad_error_, "grad_error", x_);
  const Tensor grad_quantized = as_contiguous(grad_quantized_), grad_error = as_contiguous(grad_error_);
  const Tensor x = as_contiguous(x_), grad_x = like(x);
  const OptionalTensor mask = as_contiguous(mask_);
  const LfqBackward args{lfq(x, mask, scale, spherical, nullptr, 0),
                         data(grad_quantized),
                         data(grad_error),
                         nullptr,
                         nullptr,
                         mutable_data(grad_x)};
  ISTHMUS_LAUNCH(x, scalar, lfq_backward, args);
  return grad_x;
}

// Sizes of the soft histogram of bits: [bits], or [codebooks, bits].
std::vector<int64_t> count_sizes(const Lfq& in, int64_t codebooks) {
  return codebooks == 0 ? std::vector<int64_t>{in.bits} : std::vector<int64_t>{in.codebooks, in.bits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lfq_quantize_entropy(const Tensor& x_, const OptionalTensor& mask_,
                                                                        double scale, bool spherical,
                                                                        const Tensor& inverse_temperature,
                                                                        int64_t codebooks) {
  const Tensor x = as_contiguous(x_);
  const OptionalTensor mask = as_contiguous(mask_);
  const Lfq in = lfq(x, mask, scale, spherical, temperature_data(inverse_temperature, x), codebooks);
  const Tensor quantized = like(x), indices = row_indices(x), error = row_values(x), entropy = row_values(x);
  const Tensor counts = empty(count_sizes(in, codebooks), accumulate_type(x), x);
  int64_t doubles = 0;
#if defined(ISTHMUS_CUDA)
  doubles = cuda::lfq_workspace(in.rows, in.codebooks * in.bits);
#endif
  const Tensor memory = workspace(x, doubles);
  const LfqQuantize args{in,
                         mutable_data(quantized),
                         index_data(indices),
                         mutable_data(error),
                         mutable_data(entropy),
                         mutable_data(counts),
                         mutable_data(memory)};
  ISTHMUS_LAUNCH(x, scalar, lfq_quantize, args);
  return {quantized, indices, error, entropy, counts};
}

Tensor lfq_quantize_entropy_backward(const Tensor& grad_quantized_, const Tensor& grad_error_,
                                     const Tensor& grad_entropy_, const Tensor& grad_counts_, const Tensor& x_,
                                     const OptionalTensor& mask_, double scale, bool spherical,
                                     const Tensor& inverse_temperature, int64_t codebooks) {
  check_like(grad_quantized_, "grad_quantized", x_, "x");
  check_row_gradient(grad_error_, "grad_error", x_);
  check_row_gradient(grad_entropy_, "grad_entropy", x_);
  const Tensor x = as_contiguous(x_), grad_x = like(x);
  const OptionalTensor mask = as_contiguous(mask_);
  const Lfq in = lfq(x, mask, scale, spherical, temperature_data(inverse_temperature, x), codebooks);
  check_accumulated(grad_counts_, "grad_bit_counts", count_sizes(in, codebooks), x, "x");
  const Tensor grad_quantized = as_contiguous(grad_quantized_), grad_error = as_contiguous(grad_error_);
  const Tensor grad_entropy = as_contiguous(grad_entropy_), grad_counts = as_contiguous(grad_counts_);
  const LfqBackward args{
      in, data(grad_quantized), data(grad_error), data(grad_entropy), data(grad_counts), mutable_data(grad_x)};
  ISTHMUS_LAUNCH(x, scalar, lfq_backward, args);
  return grad_x;
}

// ---- one scalar codebook a dimension -------------------------------------------------------------------------------

constexpr int64_t most_latent_levels = 1 << 16;

void check_entries(const Tensor& codebooks, const Levels& levels) {
  if (codebooks.numel() != levels.total()) {
    fail("codebooks has shape ", shape_of(codebooks), "; expected ", levels.total(), " values, the sum of levels");
  }
}

Latent latent(const Tensor& x, const Tensor& codebooks, const std::vector<int64_t>& levels,
              const OptionalTensor& mask) {
  const Levels parsed = parse_levels(levels, most_latent_levels);
  check_columns(x, "x", parsed);
  check_device(codebooks, "codebooks", x, "x");
  check_dtype(codebooks, "codebooks", x, "x");
  check_entries(codebooks, parsed);
  return {dtype_of(x, "x"), leading_size(x), parsed, mask_data(mask, x, x.dim() - 1), data(x), data(codebooks)};
}

std::tuple<Tensor, Tensor, Tensor> latent_quantize(const Tensor& x_, const Tensor& codebooks_,
                                                   const std::vector<int64_t>& levels, const OptionalTensor& mask_,
                                                   double) {
  const Tensor x = as_contiguous(x_), codebooks = as_contiguous(codebooks_);
  const OptionalTensor mask = as_contiguous(mask_);
  const Latent in = latent(x, codebooks, levels, mask);
  const Tensor quantized = like(x), indices = row_indices(x), error = row_values(x);
  const LatentQuantize args{in, mutable_data(quantized), index_data(indices), mutable_data(error)};
  ISTHMUS_LAUNCH(x, scalar, latent_quantize, args);
  return {quantized, indices, error};
}

std::tuple<Tensor, Tensor> latent_quantize_backward(const Tensor& grad_quantized_, const Tensor& grad_error_,
                                                    const Tensor& x_, const Tensor& codebooks_,
                                                    const std::vector<int64_t>& levels, const OptionalTensor& mask_,
                                                    double commitment_weight, bool need_codebooks) {
  check_like(grad_quantized_, "grad_quantized", x_, "x");
  check_row_gradient(grad_error_, "grad_error", x_);
  const Tensor x = as_contiguous(x_), codebooks = as_contiguous(codebooks_);
  const Tensor grad_quantized = as_contiguous(grad_quantized_), grad_error = as_contiguous(grad_error_);
  const OptionalTensor mask = as_contiguous(mask_);
  const Latent in = latent(x, codebooks, levels, mask);
  const Tensor grad_x = like(x), grad_codebooks = need_codebooks ? like(codebooks) : absent(codebooks);
  int64_t doubles = 0;
#if defined(ISTHMUS_CUDA)
  if (need_codebooks) doubles = cuda::latent_workspace(in.rows, in.levels.dims, in.levels.total());
#endif
  const Tensor memory = workspace(x, doubles);
  const LatentBackward args{in,
                            commitment_weight,
                            data(grad_quantized),
                            data(grad_error),
                            mutable_data(grad_x),
                            need_codebooks ? mutable_data(grad_codebooks) : nullptr,
                            mutable_data(memory)};
  ISTHMUS_LAUNCH(x, scalar, latent_backward, args);
  return {grad_x, grad_codebooks};
}

// ---- decoding ------------------------------------------------------------------------------------------------------

std::vector<int64_t> with_columns(const Tensor& indices, int64_t columns) {
  std::vector<int64_t> sizes = sizes_of(indices);
  sizes.push_back(columns);
  return sizes;
}

Tensor fsq_decode(const Tensor& indices_, const std::vector<int64_t>& levels, bool symmetric, bool first_highest,
                  double scale, ScalarType dtype) {
  const Tensor indices = as_contiguous(indices_);
  FsqDecode args{dtype_of(dtype, "dtype"),
                 indices.numel(),
                 parse_levels(levels, most_fsq_levels),
                 {},
                 first_highest,
                 scale,
                 nullptr,
                 nullptr};
  check_codes(indices, "indices", codes_of(args.levels));
  const Tensor out = empty(with_columns(indices, args.levels.dims), dtype, indices);
  for (int d = 0; d < args.levels.dims; ++d) args.grid[d] = grid_of(args.levels.size[d], symmetric, false);
  args.indices = int64_data(indices);
  args.out = mutable_data(out);
  ISTHMUS_LAUNCH(indices, scalar, fsq_decode, args);
  return out;
}

Tensor latent_decode(const Tensor& indices_, const Tensor& codebooks_, const std::vector<int64_t>& levels_) {
  const Levels levels = parse_levels(levels_, most_latent_levels);
  check_device(codebooks_, "codebooks", indices_, "indices");
  check_entries(codebooks_, levels);
  const Tensor indices = as_contiguous(indices_), codebooks = as_contiguous(codebooks_);
  check_codes(indices, "indices", codes_of(levels));
  const Tensor out = empty(with_columns(indices, levels.dims), codebooks.scalar_type(), codebooks);
  const LatentDecode args{dtype_of(codebooks, "codebooks"),
                          indices.numel(),
                          levels,
                          int64_data(indices),
                          data(codebooks),
                          mutable_data(out)};
  ISTHMUS_LAUNCH(indices, scalar, latent_decode, args);
  return out;
}

Tensor latent_decode_backward(const Tensor& grad_, const Tensor& indices_, const std::vector<int64_t>& levels_) {
  const Levels levels = parse_levels(levels_, most_latent_levels);
  check_device(grad_, "grad", indices_, "indices");
  if (sizes_of(grad_) != with_columns(indices_, levels.dims)) {
    fail("grad has shape ", shape_of(grad_), "; expected that of indices, ", shape_of(indices_), ", and ", levels.dims);
  }
  const Tensor grad = as_contiguous(grad_), indices = as_contiguous(indices_);
  check_codes(indices, "indices", codes_of(levels));
  const Tensor grad_codebooks = empty({levels.total()}, grad.scalar_type(), grad);
  int64_t doubles = 0;
#if defined(ISTHMUS_CUDA)
  doubles = cuda::latent_workspace(indices.numel(), levels.dims, levels.total());
#endif
  const Tensor memory = workspace(grad, doubles);
  const LatentDecodeBackward args{dtype_of(grad, "grad"), indices.numel(), levels,
                                  int64_data(indices),    data(grad),      mutable_data(grad_codebooks),
                                  mutable_data(memory)};
  ISTHMUS_LAUNCH(grad, scalar, latent_decode_backward, args);
  return grad_codebooks;
}

// ---- sampled bits --------------------------------------------------------------------------------------------------

bool is_relaxed(const std::string& gradient) {
  if (gradient == "mean") return false;
  if (gradient == "gumbel") return true;
  fail("gradient is '", gradient, "'; expected 'mean' or 'gumbel'");
}

void check_temperature(double temperature) {
  if (!(temperature > 0)) fail("temperature is ", temperature, "; expected a positive number");
}

std::tuple<Tensor, Tensor, Tensor> binary_map(const Tensor& logits_, const OptionalTensor& key_,
                                              const std::string& gradient, double temperature) {
  check_bits(logits_, "logits");
  check_temperature(temperature);
  is_relaxed(gradient);
  const Tensor logits = as_contiguous(logits_);
  const OptionalTensor key = as_contiguous(key_);
  const Tensor bits = like(logits), indices = row_indices(logits), entropy = row_values(logits);
  const BinaryMap args{dtype_of(logits, "logits"),
                       leading_size(logits),
                       last_size(logits),
                       key_data(key, logits, "logits"),
                       data(logits),
                       mutable_data(bits),
                       index_data(indices),
                       mutable_data(entropy)};
  ISTHMUS_LAUNCH(logits, scalar, binary_map, args);
  return {bits, indices, entropy};
}

Tensor binary_map_backward(const Tensor& grad_bits_, const Tensor& grad_entropy_, const Tensor& logits_,
                           const OptionalTensor& key_, const std::string& gradient, double temperature) {
  check_bits(logits_, "logits");
  check_temperature(temperature);
  check_like(grad_bits_, "grad_bits", logits_, "logits");
  check_row_gradient(grad_entropy_, "grad_entropy", logits_);
  const Tensor logits = as_contiguous(logits_), grad_bits = as_contiguous(grad_bits_);
  const Tensor grad_entropy = as_contiguous(grad_entropy_), grad_logits = like(logits);
  const OptionalTensor key = as_contiguous(key_);
  const BinaryMapBackward args{dtype_of(logits, "logits"),
                               leading_size(logits),
                               last_size(logits),
                               key_data(key, logits, "logits"),
                               is_relaxed(gradient),
                               temperature,
                               data(logits),
                               data(grad_bits),
                               data(grad_entropy),
                               mutable_data(grad_logits)};
  ISTHMUS_LAUNCH(logits, scalar, binary_map_backward, args);
  return grad_logits;
}

// ---- storage -------------------------------------------------------------------------------------------------------

BitStream bit_stream(const Tensor& t, const char* argument, int64_t bits, int64_t length) {
  if (bits < 1 || bits > 63) fail("bits is ", bits, "; expected 1 to 63");
  if (t.dim() == 0) fail(argument, " has shape []; expected at least one dimension");
  return {leading_size(t), length, static_cast<int>(bits)};
}

// In [0, limit), the largest of them said as it was asked for. CUDA indices are checked by the kernels.
void check_range(const Tensor& indices, int64_t largest) {
  check_int64(indices, "indices");
  if (indices.is_cuda()) return;
  const int64_t* values = int64_data(indices);
  for (int64_t i = 0, count = indices.numel(); i < count; ++i) {
    if (values[i] < 0 || values[i] > largest) fail("indices holds ", values[i], "; expected 0 to ", largest);
  }
}

Tensor pack_bits(const Tensor& indices_, int64_t bits) {
  const Tensor indices = as_contiguous(indices_);
  const BitStream stream = bit_stream(indices, "indices", bits, last_size(indices));
  check_range(indices, static_cast<int64_t>((uint64_t{1} << bits) - 1));
  std::vector<int64_t> sizes = sizes_of(indices);
  sizes.back() = stream.row_bytes();
  const Tensor packed = empty(sizes, ScalarType::Byte, indices);
  const PackBits args{stream, int64_data(indices), static_cast<uint8_t*>(mutable_data(packed))};
  ISTHMUS_LAUNCH(indices, scalar, pack_bits, args);
  return packed;
}

Tensor unpack_bits(const Tensor& packed_, int64_t bits, int64_t length) {
  const Tensor packed = as_contiguous(packed_);
  if (length < 0) fail("length is ", length, "; expected the number of indices in a row");
  const BitStream stream = bit_stream(packed, "packed", bits, length);
  if (packed.scalar_type() != ScalarType::Byte || last_size(packed) != stream.row_bytes()) {
    fail("packed has dtype ", name_of(packed.scalar_type()), " and shape ", shape_of(packed),
         "; expected uint8 and [..., ", stream.row_bytes(), "], the bytes of ", length, " indices of ", bits, " bits");
  }
  std::vector<int64_t> sizes = sizes_of(packed);
  sizes.back() = length;
  const Tensor indices = empty(sizes, ScalarType::Long, packed);
  const UnpackBits args{stream, static_cast<const uint8_t*>(data(packed)), index_data(indices)};
  ISTHMUS_LAUNCH(packed, scalar, unpack_bits, args);
  return indices;
}

// The smallest type that holds num_codes; the rule of python/isthmus/ops/scalar.py.
ScalarType narrowest(int64_t num_codes) {
  if (num_codes <= 1 << 8) return ScalarType::Byte;
  if (num_codes <= 1 << 15) return ScalarType::Short;
  return num_codes <= int64_t{1} << 31 ? ScalarType::Int : ScalarType::Long;
}

int bytes_of(ScalarType type) {
  return type == ScalarType::Byte ? 1 : type == ScalarType::Short ? 2 : type == ScalarType::Int ? 4 : 8;
}

Tensor narrow_indices(const Tensor& indices_, int64_t num_codes) {
  if (num_codes < 1) fail("num_codes is ", num_codes, "; expected at least 1");
  const Tensor indices = as_contiguous(indices_);
  check_range(indices, num_codes - 1);
  const ScalarType type = narrowest(num_codes);
  const Tensor out = empty(sizes_of(indices), type, indices);
  const Narrow args{indices.numel(), num_codes, bytes_of(type), int64_data(indices), mutable_data(out)};
  ISTHMUS_LAUNCH(indices, scalar, narrow, args);
  return out;
}

}  // namespace

void register_scalar(StableLibrary& m) {
  m.impl("fsq_quantize", TORCH_BOX(&fsq_quantize));
  m.impl("fsq_quantize_backward", TORCH_BOX(&fsq_quantize_backward));
  m.impl("residual_fsq_quantize", TORCH_BOX(&residual_fsq_quantize));
  m.impl("residual_fsq_quantize_backward", TORCH_BOX(&residual_fsq_quantize_backward));
  m.impl("lfq_quantize", TORCH_BOX(&lfq_quantize));
  m.impl("lfq_quantize_backward", TORCH_BOX(&lfq_quantize_backward));
  m.impl("lfq_quantize_entropy", TORCH_BOX(&lfq_quantize_entropy));
  m.impl("lfq_quantize_entropy_backward", TORCH_BOX(&lfq_quantize_entropy_backward));
  m.impl("latent_quantize", TORCH_BOX(&latent_quantize));
  m.impl("latent_quantize_backward", TORCH_BOX(&latent_quantize_backward));
  m.impl("fsq_decode", TORCH_BOX(&fsq_decode));
  m.impl("latent_decode", TORCH_BOX(&latent_decode));
  m.impl("latent_decode_backward", TORCH_BOX(&latent_decode_backward));
  m.impl("binary_map", TORCH_BOX(&binary_map));
  m.impl("binary_map_backward", TORCH_BOX(&binary_map_backward));
  m.impl("pack_bits", TORCH_BOX(&pack_bits));
  m.impl("unpack_bits", TORCH_BOX(&unpack_bits));
  m.impl("narrow_indices", TORCH_BOX(&narrow_indices));
}

}  // namespace isthmus
