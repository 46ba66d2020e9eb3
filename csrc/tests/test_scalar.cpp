// The kernels of scalar/kernels.h against plain loops: indices and values exactly, sums to their rounding.
#include <tuple>

#include "kernel_test.h"
#include "scalar/kernels.h"

using namespace isthmus;

namespace {

// Levels spread over [-1, 1] behind a clamp: every step is exact or rounds the same way in a plain loop.
void test_fsq(DType dtype, int64_t rows) {
  FsqQuantize args{};
  args.dtype = dtype;
  args.rows = rows;
  args.levels = {3, {5, 3, 9}};
  args.hard_clamp = true;
  for (int d = 0; d < 3; ++d) {
    const double half = static_cast<double>(args.levels.size[d] - 1) / 2;
    args.grid[d] = {0, half, 0, 0, half};
  }
  const Array x = Random(1).normal(dtype, rows * 3);
  args.x = x.data();
  const auto compute = [&] {
    std::vector<int64_t> indices(static_cast<size_t>(rows), -7), again = indices;
    Array quantized(dtype, rows * 3), decoded(dtype, rows * 3);
    args.quantized = quantized.data();
    args.indices = indices.data();
    scalar_kernels().fsq_quantize(args);
    FsqDecode decode{dtype, rows, args.levels, {}, false, 1.0, indices.data(), decoded.data()};
    std::copy(std::begin(args.grid), std::end(args.grid), std::begin(decode.grid));
    scalar_kernels().fsq_decode(decode);
    return std::tuple(indices, quantized, decoded);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [indices, quantized, decoded] = outputs;
    for (int64_t row = 0; row < rows; ++row) {
      int64_t want = 0, stride = 1;
      for (int d = 0; d < 3; ++d) {
        const double half = args.grid[d].half;
        const double digit = std::nearbyint(std::fmin(std::fmax(x[row * 3 + d], -1), 1) * half) + half;
        want += stride * static_cast<int64_t>(digit);
        stride *= args.levels.size[d];
        check_close("value", quantized, row * 3 + d, digit / half - 1, 0, 0);
      }
      CHECK_THAT(indices[static_cast<size_t>(row)] == want, "row %ld got index %ld, expected %ld (level %s)",
                 static_cast<long>(row), static_cast<long>(indices[static_cast<size_t>(row)]), static_cast<long>(want),
                 isa_name(current_isa()));
    }
    CHECK_THAT(decoded == quantized, "decoding gives other values (level %s)", isa_name(current_isa()));
  });
}

// Each prefix of the stages names the bin of so many digits that holds the number.
void test_stages(DType dtype, int64_t rows) {
  constexpr int64_t stages = 4;
  ResidualFsqQuantize args{};
  args.dtype = dtype;
  args.rows = rows;
  args.stages = stages;
  args.levels = {3, {8, 5, 2}};
  args.hard_clamp = true;
  const Array x = Random(3).normal(dtype, rows * 3);
  std::vector<int64_t> kept(static_cast<size_t>(rows));
  for (int64_t row = 0; row < rows; ++row) kept[static_cast<size_t>(row)] = row % (stages + 1);
  args.x = x.data();
  args.kept = kept.data();
  const auto compute = [&] {
    std::vector<int64_t> indices(static_cast<size_t>(rows * stages), -7);
    Array quantized(dtype, rows * 3);
    args.quantized = quantized.data();
    args.indices = indices.data();
    scalar_kernels().residual_fsq_quantize(args);
    return std::tuple(indices, quantized);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [indices, quantized] = outputs;
    const double rounding = dtype == DType::bf16 ? 0x1p-8 : dtype == DType::f16 ? 0x1p-11 : 0;
    for (int64_t row = 0; row < rows; ++row) {
      int64_t stride = 1;
      for (int d = 0; d < 3; ++d) {
        const double size = static_cast<double>(args.levels.size[d]), bound = size / (size - 1);
        const double number = std::fmin(std::fmax(x[row * 3 + d], -bound), bound);
        double value = 0, bin = bound;
        for (int64_t q = 0; q < stages; ++q) {
          const int64_t index = indices[static_cast<size_t>(row * stages + q)];
          CHECK_THAT((index >= 0) == (q < row % (stages + 1)), "row %ld stage %ld has index %ld (level %s)",
                     static_cast<long>(row), static_cast<long>(q), static_cast<long>(index), isa_name(current_isa()));
          if (index < 0) continue;
          const double digit = static_cast<double>(index / stride % args.levels.size[d]);
          value += (2 * digit / (size - 1) - 1) * std::pow(size, -static_cast<double>(q));
          bin /= size;
          CHECK_THAT(std::fabs(value - number) <= bin + 1e-6, "row %ld stage %ld is in another bin (level %s)",
                     static_cast<long>(row), static_cast<long>(q), isa_name(current_isa()));
        }
        CHECK_THAT(std::fabs(quantized[row * 3 + d] - value) <= 1e-6 + rounding * bound,
                   "row %ld has another value (level %s)", static_cast<long>(row), isa_name(current_isa()));
        stride *= args.levels.size[d];
      }
    }
  });
}

void test_signs(DType dtype, int64_t rows, int64_t bits) {
  const Array x = Random(2).normal(dtype, rows * bits);
  const DType wide = accumulate_dtype(dtype);
  const auto compute = [&] {
    std::vector<int64_t> indices(static_cast<size_t>(rows), -7);
    Array quantized(dtype, rows * bits), error(wide, rows), entropy(wide, rows), counts(wide, bits);
    LfqQuantize args{};
    const double inverse_temperature = 0.125;
    static_cast<Lfq&>(args) = {dtype, rows, 1, bits, false, 1.0, 1.0, &inverse_temperature, nullptr, x.data()};
    args.quantized = quantized.data();
    args.indices = indices.data();
    args.error = error.data();
    args.entropy = entropy.data();
    args.bit_counts = counts.data();
    scalar_kernels().lfq_quantize(args);
    return std::tuple(indices, error, entropy, counts);
  };
  on_every_level(compute, [&](const auto& outputs) {
    const auto& [indices, error, entropy, counts] = outputs;
    std::vector<double> ones(static_cast<size_t>(bits));
    for (int64_t row = 0; row < rows; ++row) {
      uint64_t index = 0;
      double off = 0, uncertain = 0;
      for (int64_t c = 0; c < bits; ++c) {
        const double v = x[row * bits + c], p = 1 / (1 + std::exp(-0.5 * v));
        index = 2 * index + (v > 0);
        off += std::pow(v - (v > 0 ? 1 : -1), 2);
        uncertain -= p * std::log(p) + (1 - p) * std::log(1 - p);
        ones[static_cast<size_t>(c)] += p;
      }
      CHECK_THAT(indices[static_cast<size_t>(row)] == static_cast<int64_t>(index),
                 "row %ld has another index (level %s)", static_cast<long>(row), isa_name(current_isa()));
      check_close("error", error, row, off, 100, 0);
      check_close("entropy", entropy, row, uncertain, 100, 0);
    }
    for (int64_t c = 0; c < bits; ++c) check_close("bit count", counts, c, ones[static_cast<size_t>(c)], 100, 0);
  });
}

void test_streams(int width, int64_t length) {
  std::vector<int64_t> indices(static_cast<size_t>(2 * length));
  for (size_t i = 0; i < indices.size(); ++i) {
    indices[i] = static_cast<int64_t>((i * 0x9e3779b97f4a7c15u) >> (64 - width));
  }
  const BitStream stream{2, length, width};
  const auto compute = [&] {
    std::vector<uint8_t> packed(static_cast<size_t>(2 * stream.row_bytes()), 0xcd);
    std::vector<int64_t> found(indices.size(), -7);
    scalar_kernels().pack_bits({stream, indices.data(), packed.data()});
    scalar_kernels().unpack_bits({stream, packed.data(), found.data()});
    return std::tuple(packed, found);
  };
  on_every_level(compute, [&](const auto& outputs) {
    CHECK_THAT(std::get<1>(outputs) == indices, "%d bits do not come back (level %s)", width, isa_name(current_isa()));
  });
}

}  // namespace

int main() {
  for (const DType dtype : all_dtypes) {
    for (const int64_t rows : {0, 1, 37, 5000}) {
      test_fsq(dtype, rows);
      test_stages(dtype, rows);
      for (const int64_t bits : {1, 7, 18, 62}) test_signs(dtype, rows, bits);
    }
  }
  for (int width = 1; width < 64; ++width) test_streams(width, 8203);
  return failed_checks > 0;
}
