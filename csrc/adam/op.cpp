// Host entry of the adam family: checks and dispatch. Schema in csrc/library.cpp.

#include <cmath>

#include "adam/kernels.h"
#include "op.h"

namespace isthmus {
namespace {

// What is written in place must be the tensor itself, not a copy.
void check_written(const Tensor& t, const char* argument) {
  if (!t.is_contiguous()) fail(argument, " is not contiguous; expected contiguous memory, as it is written in place");
}

void check_not_negative(double value, const char* argument) {
  if (!(value >= 0)) fail(argument, " is ", value, "; expected 0 or more");
}

void check_beta(double value, const char* argument) {
  if (!(value >= 0 && value < 1)) fail(argument, " is ", value, "; expected 0 or more, and less than 1");
}

void adam_rows_(const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& grad_,
                int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay, bool unit_norm,
                bool skip_zero_rows) {
  check_accumulated(exp_avg, "exp_avg", sizes_of(weight), weight, "weight");
  check_accumulated(exp_avg_sq, "exp_avg_sq", sizes_of(weight), weight, "weight");
  check_like(grad_, "grad", weight, "weight");
  check_written(weight, "weight");
  check_written(exp_avg, "exp_avg");
  check_written(exp_avg_sq, "exp_avg_sq");
  if (step < 1) fail("step is ", step, "; expected 1 for the first step");
  check_not_negative(lr, "lr");
  check_not_negative(eps, "eps");
  check_not_negative(weight_decay, "weight_decay");
  check_beta(beta1, "beta1");
  check_beta(beta2, "beta2");
  const Tensor grad = as_contiguous(grad_);
  const int64_t rows = weight.dim() == 0 ? 1 : weight.size(0);
  const AdamRows args{.dtype = dtype_of(weight, "weight"),
                      .rows = rows,
                      .cols = rows == 0 ? 0 : weight.numel() / rows,
                      .beta1 = beta1,
                      .beta2 = beta2,
                      .epsilon = eps,
                      .keep = 1 - lr * weight_decay,
                      .rate = lr / (1 - std::pow(beta1, step)),
                      .spread = 1 / std::sqrt(1 - std::pow(beta2, step)),
                      .unit_norm = unit_norm,
                      .skip_zero_rows = skip_zero_rows,
                      .grad = data(grad),
                      .weight = mutable_data(weight),
                      .exp_avg = mutable_data(exp_avg),
                      .exp_avg_sq = mutable_data(exp_avg_sq)};
  ISTHMUS_LAUNCH(weight, adam, rows, args);
}

}  // namespace

void register_adam(StableLibrary& m) { m.impl("adam_rows_", TORCH_BOX(&adam_rows_)); }

}  // namespace isthmus
