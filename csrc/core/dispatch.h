// From run-time tags to template arguments. The callee is a lambda: [&]<class T>() {…} or [&]<ScaleType S>() {…}.
#pragma once

#include "core/dtype.h"
#include "core/scale_type.h"

namespace isthmus {
namespace {

template <class F>
inline void dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::f64:
      return f.template operator()<double>();
    case DType::bf16:
      return f.template operator()<BFloat16>();
    case DType::f16:
      return f.template operator()<Half>();
  }
}

template <class F>
inline void dispatch_scale(ScaleType scale_type, F&& f) {
  switch (scale_type) {
    case ScaleType::logvar:
      return f.template operator()<ScaleType::logvar>();
    case ScaleType::std:
      return f.template operator()<ScaleType::std>();
    case ScaleType::softplus:
      return f.template operator()<ScaleType::softplus>();
    case ScaleType::square:
      return f.template operator()<ScaleType::square>();
  }
}

}  // namespace
}  // namespace isthmus
