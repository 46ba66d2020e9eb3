// Tests of kernels.h, the way a C++ program without torch calls the library: typed arrays, real threads, every
// instruction set this CPU has. References are plain loops in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "check.h"
#include "core/dtype.h"
#include "core/parallel.h"

namespace isthmus {

constexpr DType all_dtypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

// A number format by its definition: significand bits with the hidden one, and exponent range.
struct Format {
  int precision, lowest, highest;
};
inline Format format_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return {24, -126, 127};
    case DType::f64:
      return {53, -1022, 1023};
    case DType::bf16:
      return {8, -126, 127};
    default:
      return {11, -14, 15};
  }
}

// Half the distance between 1 and the next number: the relative error of one rounding.
inline double rounding_unit(DType dtype) { return std::ldexp(1.0, -format_of(dtype).precision); }

inline double decode_half(uint16_t bits, DType dtype) {
  const Format format = format_of(dtype);
  const int fraction_bits = format.precision - 1;
  const int field = (bits & 0x7fff) >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (field == 2 * format.highest + 1) return fraction != 0 ? __builtin_nan("") : sign * __builtin_inf();
  const int significand = field == 0 ? fraction : fraction + (1 << fraction_bits);
  return sign * std::ldexp(significand, std::max(field, 1) + format.lowest - 1 - fraction_bits);
}

inline uint16_t encode_half(double x, DType dtype) {
  const Format format = format_of(dtype);
  const int fraction_bits = format.precision - 1;
  if (std::isnan(x)) return static_cast<uint16_t>((4 * format.highest + 3) << (fraction_bits - 1));
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const int exponent = x == 0 ? format.lowest : std::max(std::ilogb(x), format.lowest);
  // In units of the last place; a carry out of the fraction runs into the exponent field, as it should.
  const int units = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(x), fraction_bits - exponent)));
  return static_cast<uint16_t>(sign + ((exponent - format.lowest) << fraction_bits) + units);
}

// Numbers in one of the four element types. An array of a count alone is full of rubbish, for kernels to overwrite.
class Array {
 public:
  Array(DType dtype, int64_t count) : dtype_(dtype), bytes_(static_cast<size_t>(count * element_size(dtype)), 0xcd) {}

  Array(DType dtype, const std::vector<double>& values) : Array(dtype, static_cast<int64_t>(values.size())) {
    for (size_t i = 0; i < values.size(); ++i) {
      if (dtype == DType::f64) {
        write(i, values[i]);
      } else if (dtype == DType::f32) {
        write(i, static_cast<float>(values[i]));
      } else {
        write(i, encode_half(values[i], dtype));
      }
    }
  }

  double operator[](int64_t index) const {
    const size_t i = static_cast<size_t>(index);
    if (dtype_ == DType::f64) return read<double>(i);
    if (dtype_ == DType::f32) return static_cast<double>(read<float>(i));
    return decode_half(read<uint16_t>(i), dtype_);
  }

  int64_t size() const { return static_cast<int64_t>(bytes_.size()) / element_size(dtype_); }
  DType dtype() const { return dtype_; }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  bool operator==(const Array& other) const { return bytes_ == other.bytes_; }

 private:
  template <class T>
  void write(size_t i, T value) {
    std::memcpy(bytes_.data() + i * sizeof(T), &value, sizeof(T));
  }
  template <class T>
  T read(size_t i) const {
    T value;
    std::memcpy(&value, bytes_.data() + i * sizeof(T), sizeof(T));
    return value;
  }

  DType dtype_;
  std::vector<unsigned char> bytes_;
};

// Reproducible numbers of the order of 1.
class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  Array normal(DType dtype, int64_t count) {
    std::vector<double> values(static_cast<size_t>(count));
    for (double& value : values) value = normal_(engine_);
    return Array(dtype, values);
  }
  Array uniform(DType dtype, int64_t count, double low, double high) {
    std::vector<double> values(static_cast<size_t>(count));
    for (double& value : values) value = std::uniform_real_distribution<double>(low, high)(engine_);
    return Array(dtype, values);
  }
  // Small integers: sums of their products are exact in every type, so results must be equal and ties are frequent.
  Array integers(DType dtype, int64_t count, int largest = 2) {
    std::vector<double> values(static_cast<size_t>(count));
    for (double& value : values) value = std::uniform_int_distribution<int>(-largest, largest)(engine_);
    return Array(dtype, values);
  }
  std::vector<int64_t> indices(int64_t count, int64_t bound) {
    std::vector<int64_t> values(static_cast<size_t>(count));
    for (int64_t& value : values) value = std::uniform_int_distribution<int64_t>(0, bound - 1)(engine_);
    return values;
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<double> normal_;
};

inline int thread_count = 1;

// As many threads as asked for, whatever the grain: the more cuts, the better the test.
inline void run_threads(int64_t count, int64_t, RangeBody body, void* context) {
  std::vector<std::thread> threads;
  for (int t = 0; t < thread_count; ++t) {
    const int64_t begin = count * t / thread_count, end = count * (t + 1) / thread_count;
    if (begin < end) threads.emplace_back([=] { body(begin, end, context); });
  }
  for (std::thread& thread : threads) thread.join();
}

// compute() returns its outputs as a tuple of arrays or index vectors; they must have the same bits for every number
// of threads. check(outputs) judges them, once for each instruction set.
template <class Compute, class Check>
void on_every_level(Compute compute, Check check) {
  set_parallel_backend(run_threads);
  for (Isa isa : available_isas()) {
    set_isa(isa);
    thread_count = 1;
    const auto outputs = compute();
    check(outputs);
    for (int threads : {2, 7}) {
      thread_count = threads;
      CHECK_THAT(compute() == outputs, "%d threads change the result at level %s", threads, isa_name(isa));
    }
  }
  set_parallel_backend(nullptr);
}

// Half results are rounded once, from float32 arithmetic. On top come `roundings` of the arithmetic, relative to `want`
// or to `size`, whichever is larger.
inline bool check_close(const char* what, const Array& got, int64_t i, double want, double roundings, double size) {
  const DType type = got.dtype(), arithmetic = accumulate_dtype(type);
  const double once = type == arithmetic ? 0 : std::fabs(want) + std::ldexp(1.0, format_of(type).lowest);
  const double errors = roundings * std::max({std::fabs(want), size, std::ldexp(1.0, format_of(arithmetic).lowest)});
  const double allowed = 1.001 * rounding_unit(type) * once + rounding_unit(arithmetic) * errors;
  const bool close = std::isnan(want) ? std::isnan(got[i]) : std::fabs(got[i] - want) <= allowed;
  return CHECK_THAT(close, "%s[%ld] = %.9g, expected %.9g (level %s, dtype %d)", what, static_cast<long>(i), got[i],
                    want, isa_name(current_isa()), static_cast<int>(type));
}

}  // namespace isthmus
