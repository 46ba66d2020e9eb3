// Batches of Gaussians as kernels take them, in every layout, and what each of their elements means.
#pragma once

#include <cstring>
#include <memory>

#include "core/gaussians.h"
#include "gaussian_reference.h"

namespace isthmus {

constexpr Prior all_priors[] = {Prior::standard, Prior::given, Prior::residual};
constexpr Clamp::Mode all_clamps[] = {Clamp::Mode::hard, Clamp::Mode::pass_through, Clamp::Mode::tanh};

struct Setup {
  DType dtype = DType::f32;
  ScaleType scale_type = ScaleType::logvar;
  Prior prior = Prior::standard;
  int64_t rows = 3, cols = 7;
  bool over_rows = false;
  int64_t packed_block = 0;  // means and scales alternate in blocks of this size; 0: one after the other
  int64_t prior_period = 0;  // the prior repeats after so many elements; 0: it does not
  Clamp::Mode clamp = Clamp::Mode::none;
  int64_t mask_cols = 0;  // every second such row is left out; 0: none
};

// Two numbers for each element, as the halves of one array.
struct Halves {
  Array array;
  int64_t block;

  Halves(DType dtype, int64_t elements, int64_t block_)
      : array(dtype, 2 * elements),
        block(block_ > 0     ? block_
              : elements > 0 ? elements
                             : 1) {}

  void* half(int n) {
    return array.size() == 0 ? nullptr : static_cast<char*>(array.data()) + n * block * element_size(array.dtype());
  }
  int64_t index(int n, int64_t i) const { return i / block * 2 * block + i % block + n * block; }
  double at(int n, int64_t i) const { return array[index(n, i)]; }
};

struct Batch : Setup {
  static constexpr double weight = 0.75;

  Halves posterior, priors;
  std::unique_ptr<bool[]> mask;

  explicit Batch(const Setup& setup, unsigned seed = 7)
      : Setup(setup), posterior(dtype, elements(), packed_block), priors(dtype, prior_elements(), 0) {
    Random random(seed);
    fill(posterior, random);
    fill(priors, random);
    if (mask_cols == 0) return;
    mask = std::make_unique<bool[]>(static_cast<size_t>(elements() / mask_cols));
    for (int64_t i = 0; i < elements(); ++i) {
      mask[static_cast<size_t>(i / mask_cols)] = i / mask_cols % 2 == 1;
      if (!kept(i)) make_nan(posterior, i);
    }
  }

  int64_t elements() const { return rows * cols; }
  int64_t prior_elements() const { return prior == Prior::standard ? 0 : prior_period > 0 ? prior_period : elements(); }
  bool kept(int64_t i) const { return mask == nullptr || mask[static_cast<size_t>(i / mask_cols)]; }
  Reduction reduction() const { return {rows, cols, over_rows, weight}; }
  int64_t sum_of(int64_t i) const { return over_rows ? i % cols : i / cols; }

  Gaussians gaussians() {
    const int64_t block = posterior.block;
    const auto prior_operand = [&](int n) { return Operand{priors.half(n), priors.block, 0}; };
    return {dtype,
            scale_type,
            prior,
            {clamp, low(), high()},
            {posterior.half(0), block, 2 * block},
            {posterior.half(1), block, 2 * block},
            prior_operand(0),
            prior_operand(1),
            mask.get(),
            mask_cols};
  }

  GaussianPair operator[](int64_t i) const {
    const long double mean = posterior.at(0, i), std = std_of(scale_type, clamped(i));
    if (prior == Prior::standard) return {mean, std, 0, 1};
    const long double prior_mean = priors.at(0, prior_index(i)), prior_std = std_of(scale_type, prior_scale(i));
    if (prior == Prior::given) return {mean, std, prior_mean, prior_std};
    return {prior_mean + mean, prior_std * std, prior_mean, prior_std};
  }

  // From gradients to means and standard deviations on to the tensors.
  Slopes chain(int64_t i, const Slopes& g) const {
    const long double prior_slope = prior == Prior::standard ? 0 : std_slope(scale_type, prior_scale(i));
    Slopes result = {g.mean, g.scale * std_slope(scale_type, clamped(i)), g.prior_mean, g.prior_scale * prior_slope};
    if (prior == Prior::residual) {
      result.scale = result.scale * std_of(scale_type, prior_scale(i));
      result.prior_mean = g.prior_mean + g.mean;
      result.prior_scale = (g.prior_scale + g.scale * std_of(scale_type, clamped(i))) * prior_slope;
    }
    result.scale.value *= clamp_slope(posterior.at(1, i), result.scale.value);
    return result;
  }

 private:
  double low() const { return positive_scales() ? 0.6 : -0.7; }
  double high() const { return positive_scales() ? 1.1 : 0.9; }
  bool positive_scales() const { return scale_type == ScaleType::std || scale_type == ScaleType::square; }
  int64_t prior_index(int64_t i) const { return i % prior_elements(); }
  double prior_scale(int64_t i) const { return priors.at(1, prior_index(i)); }

  long double clamped(int64_t i) const {
    const long double x = posterior.at(1, i), center = (low() + high()) / 2, half = (high() - low()) / 2;
    if (clamp == Clamp::Mode::none) return x;
    if (clamp == Clamp::Mode::tanh) return center + half * std::tanh((x - center) / half);
    return x < low() ? low() : x > high() ? high() : x;
  }

  long double clamp_slope(long double x, long double grad) const {
    if (clamp == Clamp::Mode::none) return 1;
    if (clamp == Clamp::Mode::tanh) {
      const long double center = (low() + high()) / 2, half = (high() - low()) / 2;
      const long double t = std::tanh((x - center) / half);
      return 1 - t * t;
    }
    if (low() <= x && x <= high()) return 1;
    // A step against the gradient leads back into the range.
    return clamp == Clamp::Mode::pass_through && (x < low() ? grad < 0 : grad > 0);
  }

  void fill(Halves& halves, Random& random) const {
    const int64_t count = halves.array.size() / 2, size = element_size(dtype);
    const Array means = random.normal(dtype, count), scales = random_scale(random, dtype, scale_type, count);
    for (int64_t i = 0; i < count; ++i) {
      for (const auto& [n, values] : {std::pair(0, &means), std::pair(1, &scales)}) {
        std::memcpy(static_cast<char*>(halves.array.data()) + halves.index(n, i) * size,
                    static_cast<const char*>(values->data()) + i * size, static_cast<size_t>(size));
      }
    }
  }

  // All bits set are a NaN in every format.
  static void make_nan(Halves& halves, int64_t i) {
    const int64_t size = element_size(halves.array.dtype());
    std::memset(static_cast<char*>(halves.array.data()) + halves.index(0, i) * size, 0xff, static_cast<size_t>(size));
    std::memset(static_cast<char*>(halves.array.data()) + halves.index(1, i) * size, 0xff, static_cast<size_t>(size));
  }
};

// Where a kernel puts its four gradients: in the layout of the posterior.
struct GradientArrays {
  Halves posterior, priors;

  explicit GradientArrays(const Batch& batch)
      : posterior(batch.dtype, batch.elements(), batch.packed_block),
        priors(batch.dtype, batch.prior == Prior::standard ? 0 : batch.elements(), batch.packed_block) {}

  GaussianGradients results() {
    const auto result = [](Halves& halves, int n) { return Result{halves.half(n), halves.block, 2 * halves.block}; };
    return {result(posterior, 0), result(posterior, 1), result(priors, 0), result(priors, 1)};
  }
  bool operator==(const GradientArrays& other) const {
    return posterior.array == other.posterior.array && priors.array == other.priors.array;
  }
};

// want(i): slopes of mean and standard deviation of both sides, at an element that the mask keeps.
template <class Want>
void check_gradients(const Batch& batch, const GradientArrays& got, double roundings, Want want) {
  for (int64_t i = 0; i < batch.elements(); ++i) {
    const Slopes slopes = batch.kept(i) ? batch.chain(i, want(i)) : Slopes{};
    const Halves &posterior = got.posterior, &priors = got.priors;
    check_close("grad mean", posterior.array, posterior.index(0, i), slopes.mean, roundings);
    check_close("grad scale", posterior.array, posterior.index(1, i), slopes.scale, roundings);
    if (batch.prior == Prior::standard) continue;
    check_close("grad prior mean", priors.array, priors.index(0, i), slopes.prior_mean, roundings);
    check_close("grad prior scale", priors.array, priors.index(1, i), slopes.prior_scale, roundings);
  }
}

// The divergence of all elements, summed as the reduction says.
inline void check_divergence(const Batch& batch, const Array& got) {
  std::vector<Sum> sums(static_cast<size_t>(batch.reduction().sums()));
  for (int64_t i = 0; i < batch.elements(); ++i) {
    if (!batch.kept(i)) continue;
    const long double kl = batch[i].kl();
    sums[static_cast<size_t>(batch.sum_of(i))].add(kl, kl + 0.1);
  }
  for (int64_t i = 0; i < got.size(); ++i) {
    check_close("kl", got, i, sums[static_cast<size_t>(i)] * Batch::weight, 40);
  }
}

}  // namespace isthmus
