// Included by cpu.inl: how the gradient of a quantized vector passes to the vector it stands for.
//
// With u = x/|x| + c/|c|, the rotation in the plane of x and c that takes x/|x| to c/|c| is
// R = I - 2 u uᵀ/|u|² + 2 (c/|c|) (x/|x|)ᵀ, and c = λ R x with λ = |c|/|x|. Held constant, they send g to λ Rᵀ g, which
// is a mixture of g, x and c: five sums over the row give its coefficients, and nothing of R is stored. |u|² is summed
// from the components, as 2 + 2 cos would lose its digits where x and c are nearly opposed. Where they are opposed but
// for rounding, |u| <= 4 ε, u has no direction: its term is left out, and R is the reflection that remains.

// What reaches x is of_grad · g + of_x · x + of_code · c.
template <class C>
struct Passage {
  C of_grad = 1, of_x = 0, of_code = 0;
};

// A vector of length 0 has no direction: x = 0 lets g pass unchanged, c = 0 stops it, as λ = 0. The code may come in
// the type of x or in the type it computes in.
template <class T, class U>
Passage<Compute<T>> rotation(const T* x, const U* code, const T* grad, int64_t dim) {
  using C = Compute<T>;
  using V = Vec<C>;
  V xx = {}, cc = {};
  for (int64_t k = 0; k < dim; k += lanes<C>) {
    const V a = load_first(x + k, dim - k), b = load_first(code + k, dim - k);
    xx += a * a;
    cc += b * b;
  }
  const C x_length = static_cast<C>(__builtin_sqrt(sum_lanes<C>(xx)));
  const C c_length = static_cast<C>(__builtin_sqrt(sum_lanes<C>(cc)));
  if (x_length == 0) return {};
  if (c_length == 0) return {0, 0, 0};
  const C per_x = 1 / x_length, per_c = 1 / c_length;
  V uu = {}, ug = {}, cg = {};
  for (int64_t k = 0; k < dim; k += lanes<C>) {
    const V a = per_x * load_first(x + k, dim - k), b = per_c * load_first(code + k, dim - k), u = a + b;
    const V g = load_first(grad + k, dim - k);
    uu += u * u;
    ug += u * g;
    cg += b * g;
  }
  constexpr C epsilon = sizeof(C) == 4 ? C(0x1p-23) : C(0x1p-52);
  const C length = sum_lanes<C>(uu), scale = c_length * per_x;
  const C along_u = length <= 16 * epsilon * epsilon ? 0 : -2 * sum_lanes<C>(ug) / length;
  const C along_x = along_u + 2 * sum_lanes<C>(cg);
  return {scale, scale * along_x * per_x, scale * along_u * per_c};
}
