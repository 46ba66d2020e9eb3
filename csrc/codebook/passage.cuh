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

// A product that is rounded before it is added to something: those of opposed vectors then cancel to 0.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }

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
    const C b = rounded_product(per_c, to_compute(code[k])), g = to_compute(grad[k]);
    const C u = rounded_product(per_x, to_compute(x[k])) + b;
    uu += u * u;
    ug += u * g;
    cg += b * g;
  }
  uu = warp_total(uu);
  const C along_u = uu > 0 ? -2 * warp_total(ug) / uu : 0, along_x = along_u + 2 * warp_total(cg);
  const C scale = c_length * per_x;
  return {scale, scale * along_x * per_x, scale * along_u * per_c};
}

}  // namespace
}  // namespace isthmus::cuda
