// The operands of Gaussians by pieces: widened, in contiguous order, the posterior's scale clamped; and what the mask
// and the clamp do to results.
#pragma once

#include "core/access.h"
#include "core/dispatch.h"
#include "core/normal.h"
#include "core/tiles.h"

namespace isthmus {
namespace {

// One piece: an element of all operands is `at` its place. Absent operands are null.
template <class C>
struct GaussianPiece {
  const C *mean, *scale, *prior_mean, *prior_scale;
  const C* raw_scale;  // before the clamp

  template <Prior P>
  ISTHMUS_INLINE Parameters<Vec<C>> at(int64_t j, int64_t left) const {
    if constexpr (P == Prior::standard)
      return {load_first(mean + j, left), load_first(scale + j, left), Vec<C>{}, Vec<C>{}};
    return {load_first(mean + j, left), load_first(scale + j, left), load_first(prior_mean + j, left),
            load_first(prior_scale + j, left)};
  }
};

template <class C>
inline void clamp_elements(const Clamp& clamp, const C* from, int64_t count, C* to) {
  const C low = static_cast<C>(clamp.low), high = static_cast<C>(clamp.high);
  const C center = static_cast<C>(0.5 * (clamp.low + clamp.high)),
          half = static_cast<C>(0.5 * (clamp.high - clamp.low));
  for (int64_t j = 0; j < count; j += lanes<C>) {
    const Vec<C> x = load_first(from + j, count - j);
    if (clamp.mode == Clamp::Mode::tanh) {
      store(to + j, center + half * tanh((x - center) / half));
    } else {
      const Vec<C> raised = x < low ? splat(low) : x;  // NaN compares false and stays
      store(to + j, raised > high ? splat(high) : raised);
    }
  }
}

// grad *= slope of the clamp at `x`.
template <class C>
inline void clamp_gradient(const Clamp& clamp, const C* x, int64_t count, C* grad) {
  const C low = static_cast<C>(clamp.low), high = static_cast<C>(clamp.high);
  const C center = static_cast<C>(0.5 * (clamp.low + clamp.high)),
          half = static_cast<C>(0.5 * (clamp.high - clamp.low));
  for (int64_t j = 0; j < count; j += lanes<C>) {
    const int64_t left = count - j;
    const Vec<C> v = load_first(x + j, left), g = load_first(grad + j, left);
    if (clamp.mode == Clamp::Mode::tanh) {
      const Vec<C> t = tanh((v - center) / half);
      store_first(grad + j, g * (1 - t * t), left);
    } else {
      auto blocked = (v < low) | (v > high);
      if (clamp.mode == Clamp::Mode::pass_through) blocked = ((v < low) & (g >= 0)) | ((v > high) & (g <= 0));
      store_first(grad + j, blocked ? Vec<C>{} : g, left);
    }
  }
}

// Zeros where the mask of the Gaussians is false, among the elements from `first` on. No-op without mask or elements.
template <class T>
inline void clear_masked(const Gaussians& q, int64_t first, int64_t count, T* elements) {
  if (q.mask == nullptr || elements == nullptr) return;
  for (int64_t i = first, end = first + count; i < end;) {
    const int64_t row = i / q.mask_cols, row_end = (row + 1) * q.mask_cols, stop = row_end < end ? row_end : end;
    if (!q.mask[row]) std::memset(elements + (i - first), 0, static_cast<size_t>(stop - i) * sizeof(T));
    i = stop;
  }
}

template <class T>
class GaussianReader {
  using C = Compute<T>;

 public:
  explicit GaussianReader(const Gaussians& q)
      : clamp_(q.clamp), mean_(q.mean), scale_(q.scale), prior_mean_(q.prior_mean), prior_scale_(q.prior_scale) {}

  GaussianPiece<C> read(int64_t first, int64_t count) {
    const C* raw = scale_.read(first, count);
    const C* scale = raw;
    if (clamp_.mode != Clamp::Mode::none) {
      clamp_elements(clamp_, raw, count, clamped_.values);
      scale = clamped_.values;
    }
    return {mean_.read(first, count), scale, prior_mean_.read(first, count), prior_scale_.read(first, count), raw};
  }

  // For the piece that begins at `first`; at once, or later.
  template <class... Later>
  void prefetch(int64_t first, Later&... later) const {
    mean_.prefetch(first, later...);
    scale_.prefetch(first, later...);
    prior_mean_.prefetch(first, later...);
    prior_scale_.prefetch(first, later...);
  }

 private:
  const Clamp& clamp_;
  Reader<T> mean_, scale_, prior_mean_, prior_scale_;
  Tile<C> clamped_;
};

template <class T>
class GaussianWriter {
  using C = Compute<T>;

 public:
  C *mean, *scale, *prior_mean, *prior_scale;  // where the gradients of the current piece go

  explicit GaussianWriter(const GaussianGradients& grads)
      : mean_(grads.mean), scale_(grads.scale), prior_mean_(grads.prior_mean), prior_scale_(grads.prior_scale) {}

  void begin(int64_t first, int64_t count) {
    mean = mean_.begin(first, count);
    scale = scale_.begin(first, count);
    prior_mean = prior_mean_.begin(first, count);
    prior_scale = prior_scale_.begin(first, count);
  }

  template <class... Later>
  void prefetch(int64_t first, Later&... later) const {
    mean_.prefetch(first, later...);
    scale_.prefetch(first, later...);
    prior_mean_.prefetch(first, later...);
    prior_scale_.prefetch(first, later...);
  }

  void clear_masked(const Gaussians& q, int64_t first, int64_t count) const {
    isthmus::clear_masked(q, first, count, mean);
    isthmus::clear_masked(q, first, count, scale);
    isthmus::clear_masked(q, first, count, prior_mean);
    isthmus::clear_masked(q, first, count, prior_scale);
  }

  void write(int64_t first, int64_t count) const {
    mean_.write(mean, first, count);
    scale_.write(scale, first, count);
    prior_mean_.write(prior_mean, first, count);
    prior_scale_.write(prior_scale, first, count);
  }

 private:
  Writer<T> mean_, scale_, prior_mean_, prior_scale_;
};

// Calls f<S, P>() for the scale type and the prior of `q`.
template <class F>
inline void dispatch_gaussians(const Gaussians& q, F&& f) {
  dispatch_scale(q.scale_type, [&]<ScaleType S>() {
    switch (q.prior) {
      case Prior::standard:
        return f.template operator()<S, Prior::standard>();
      case Prior::given:
        return f.template operator()<S, Prior::given>();
      case Prior::residual:
        return f.template operator()<S, Prior::residual>();
    }
  });
}

}  // namespace
}  // namespace isthmus
