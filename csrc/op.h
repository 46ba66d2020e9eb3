// What the host entries of all families share: argument checks with one wording, and the way to the kernels.
// Host code sees tensors only through libtorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/metric.h"
#include "core/scale_type.h"
#include "core/sort.h"

namespace isthmus {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::StableLibrary;
using OptionalTensor = std::optional<Tensor>;

// ---- errors --------------------------------------------------------------------------------------------------------

template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
}

inline std::string shape_of(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t d = 0; d < sizes.size(); ++d) text << (d ? ", " : "") << sizes[d];
  text << ']';
  return text.str();
}

inline std::string shape_of(const Tensor& t) { return shape_of(sizes_of(t)); }

inline const char* name_of(ScalarType type) { return torch::headeronly::toString(type); }

// ---- dtypes --------------------------------------------------------------------------------------------------------

inline DType dtype_of(ScalarType type, const char* argument) {
  switch (type) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      fail(argument, " has dtype ", name_of(type), "; expected float32, float64, bfloat16 or float16");
  }
}

inline DType dtype_of(const Tensor& t, const char* argument) { return dtype_of(t.scalar_type(), argument); }

inline ScalarType accumulate_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline ScaleType parse_scale_type(const std::string& name) {
  if (name == "logvar") return ScaleType::logvar;
  if (name == "std") return ScaleType::std;
  if (name == "softplus") return ScaleType::softplus;
  if (name == "square") return ScaleType::square;
  fail("scale_type is '", name, "'; expected one of 'logvar', 'std', 'softplus', 'square'");
}

inline Metric parse_metric(const std::string& name) {
  if (name == "euclidean") return Metric::euclidean;
  if (name == "cosine") return Metric::cosine;
  if (name == "inner_product") return Metric::inner_product;
  fail("metric is '", name, "'; expected one of 'euclidean', 'cosine', 'inner_product'");
}

// ---- checks --------------------------------------------------------------------------------------------------------

inline void check_device(const Tensor& t, const char* argument, const Tensor& like, const char* like_name) {
  if (t.is_cuda() != like.is_cuda() || t.get_device_index() != like.get_device_index()) {
    fail(argument, " and ", like_name, " are on different devices");
  }
}

inline void check_dtype(const Tensor& t, const char* argument, const Tensor& like, const char* like_name) {
  if (t.scalar_type() != like.scalar_type()) {
    fail(argument, " has dtype ", name_of(t.scalar_type()), "; expected ", name_of(like.scalar_type()), ", like ",
         like_name);
  }
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

inline void check_like(const Tensor& t, const char* argument, const Tensor& like, const char* like_name) {
  check_device(t, argument, like, like_name);
  check_dtype(t, argument, like, like_name);
  if (!same_shape(t, like)) {
    fail(argument, " has shape ", shape_of(t), "; expected ", shape_of(like), ", like ", like_name);
  }
}

inline void check_tensor(const Tensor& t, const char* argument, ScalarType type, const std::vector<int64_t>& sizes,
                         const Tensor& like, const char* like_name) {
  check_device(t, argument, like, like_name);
  if (t.scalar_type() != type || sizes_of(t) != sizes) {
    fail(argument, " is ", name_of(t.scalar_type()), shape_of(t), "; expected ", name_of(type), shape_of(sizes));
  }
}

// What sums over `like` are kept in: results of a forward pass, and gradients with respect to them.
inline void check_accumulated(const Tensor& t, const char* argument, const std::vector<int64_t>& sizes,
                              const Tensor& like, const char* like_name) {
  check_tensor(t, argument, accumulate_type(like), sizes, like, like_name);
}

// A matrix [*, cols] of the dtype and on the device of `like`; pass rows < 0 to leave the row count free.
inline void check_matrix(const Tensor& t, const char* argument, int64_t rows, int64_t cols, const Tensor& like,
                         const char* like_name) {
  check_device(t, argument, like, like_name);
  check_dtype(t, argument, like, like_name);
  if (t.dim() != 2 || (rows >= 0 && t.size(0) != rows) || t.size(1) != cols) {
    std::ostringstream expected;
    expected << '[' << (rows < 0 ? std::string("*") : std::to_string(rows)) << ", " << cols << ']';
    fail(argument, " has shape ", shape_of(t), "; expected ", expected.str());
  }
}

inline void check_vector(const Tensor& t, const char* argument, int64_t size, const Tensor& like,
                         const char* like_name) {
  check_device(t, argument, like, like_name);
  check_dtype(t, argument, like, like_name);
  if (t.dim() != 1 || t.size(0) != size) fail(argument, " has shape ", shape_of(t), "; expected [", size, "]");
}

inline void check_int64(const Tensor& t, const char* argument) {
  if (t.scalar_type() != ScalarType::Long) {
    fail(argument, " has dtype ", name_of(t.scalar_type()), "; expected int64");
  }
}

// Contiguous indices of codes. Those on a GPU are checked by the kernels.
inline void check_codes(const Tensor& indices, const char* argument, int64_t codes) {
  check_int64(indices, argument);
  if (indices.is_cuda()) return;
  const int64_t* index = static_cast<const int64_t*>(indices.const_data_ptr());
  const int64_t outside = find_outside(index, indices.numel(), codes, -1);
  if (outside >= 0) {
    fail(argument, " holds ", index[outside], "; expected 0 <= index < ", codes,
         ", the number of codes, or -1 for no code");
  }
}

inline void check_key(const Tensor& key) {
  check_int64(key, "key");
  if (key.dim() != 1 || key.size(0) != 2) {
    fail("key has shape ", shape_of(key), "; expected [2]: (seed, offset), as isthmus.key() makes it");
  }
}

// ---- shapes and memory ---------------------------------------------------------------------------------------------

// Size of the last dimension; a 0-dimensional tensor counts as [1].
inline int64_t last_size(const Tensor& t) { return t.dim() == 0 ? 1 : t.size(t.dim() - 1); }

inline int64_t product(const Tensor& t, int64_t dims) {
  int64_t elements = 1;
  for (int64_t d = 0; d < dims; ++d) elements *= t.size(d);
  return elements;
}

// Number of rows when all dimensions but the last are flattened.
inline int64_t leading_size(const Tensor& t) { return product(t, t.dim() - 1); }

// The sizes without the last dimension.
inline std::vector<int64_t> leading_sizes(const Tensor& t) {
  std::vector<int64_t> sizes = sizes_of(t);
  if (!sizes.empty()) sizes.pop_back();
  return sizes;
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline OptionalTensor as_contiguous(const OptionalTensor& t) {
  return t.has_value() ? OptionalTensor(as_contiguous(*t)) : std::nullopt;
}

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  return torch::stable::new_empty(like, sizes, type);
}

// Stands for a gradient that was not asked for or does not exist; Python turns it into None.
inline Tensor absent(const Tensor& like) { return empty({0}, like.scalar_type(), like); }

inline const void* data(const Tensor& t) { return t.const_data_ptr(); }
inline const void* data(const OptionalTensor& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }
inline void* mutable_data(const Tensor& t) { return t.mutable_data_ptr(); }
inline const int64_t* int64_data(const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); }

// ---- to the device -------------------------------------------------------------------------------------------------

#if defined(ISTHMUS_CUDA)
// Makes the tensor's device current for as long as it lives, and holds that device's current stream.
struct CudaScope {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;

  explicit CudaScope(const Tensor& t) : guard(t.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
};
#define ISTHMUS_LAUNCH(tensor, family, kernel, args) \
  do {                                               \
    if ((tensor).is_cuda()) {                        \
      const CudaScope scope(tensor);                 \
      cuda::family##_##kernel(args, scope.stream);   \
    } else {                                         \
      family##_kernels().kernel(args);               \
    }                                                \
  } while (0)
#else
#define ISTHMUS_LAUNCH(tensor, family, kernel, args) family##_kernels().kernel(args)
#endif

// Scratch memory of a CUDA kernel: args.workspace points to it as long as the result lives. On the CPU, kernels bring
// their own.
#if defined(ISTHMUS_CUDA)
template <class Args, class Bytes>
Tensor allocate_workspace(const Tensor& like, Args& args, const Bytes& bytes) {
  if (!like.is_cuda()) return empty({0}, ScalarType::Byte, like);
  const CudaScope scope(like);
  const Tensor workspace = empty({bytes(args)}, ScalarType::Byte, like);
  args.workspace = mutable_data(workspace);
  return workspace;
}
#define ISTHMUS_ALLOCATE(tensor, family, args) \
  allocate_workspace(tensor, args, [](const auto& a) { return cuda::family##_workspace(a); })
#else
#define ISTHMUS_ALLOCATE(tensor, family, args) empty({0}, ScalarType::Byte, tensor)
#endif

}  // namespace isthmus
