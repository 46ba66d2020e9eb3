// The four element types every op supports, and what each accumulates in.
#pragma once

#include <cstdint>

namespace isthmus {

enum class DType : int { f32, f64, bf16, f16 };

// Storage-only half types: kernels load them into float vectors and store rounded results.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Sums, losses and statistics of half inputs are kept and returned in float32.
inline DType accumulate_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

}  // namespace isthmus
