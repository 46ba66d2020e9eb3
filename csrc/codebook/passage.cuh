// How the gradient of a quantized vector passes to the vector it stands for; the mathematics stands in passage.inl.
#pragma once

#include "codebook/warps.cuh"

namespace isthmus::cuda {
namespace {

// What reaches x is of_grad · g + of_x · x + of_code · c.
template <class C>
struct Passage {
  C of_grad = 1, of_x = 0, of_code = 0;
};

// λ Rᵀ of one row, by a warp. The code may come in the type of x or in the type it computes in.
template <class T, class U>
__device__ __forceinline__ Passage<Compute<T>> rotation(const T* x, const U* code, const T* grad, int64_t dim) {
  using C = Compute<T>;
  C xx = 0, cc = 0;
  for (int64_t k = warp_lane(); k < dim; k += warp_size) {
    const C a = to_compute(x[k]), b = to_compute(code[k]);
    xx += a * a;
    cc += b * b;
  }
  const C x_length = sqrt(warp_total(xx)), c_length = sqrt(warp_total(cc));
  if (x_length == 0) return {};
  if (c_length == 0) return {0, 0, 0};
  const C per_x = 1 / x_length, per_c = 1 / c_length;
  C uu = 0, ug = 0, cg = 0;
  for (int64_t k = warp_lane(); k < dim; k += warp_size) {
    const C b = per_c * to_compute(code[k]), u = per_x * to_compute(x[k]) + b, g = to_compute(grad[k]);
    uu += u * u;
    ug += u * g;
    cg += b * g;
  }
  constexpr C epsilon = sizeof(C) == 4 ? C(0x1p-23) : C(0x1p-52);
  uu = warp_total(uu);
  ug = warp_total(ug);
  cg = warp_total(cg);
  const C scale = c_length * per_x;
  const C along_u = uu <= 16 * epsilon * epsilon ? C(0) : -2 * ug / uu, along_x = along_u + 2 * cg;
  return {scale, scale * along_x * per_x, scale * along_u * per_c};
}

}  // namespace
}  // namespace isthmus::cuda
