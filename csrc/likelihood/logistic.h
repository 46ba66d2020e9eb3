// The probability of one bin of a discretized logistic, exact in every regime.
//
// Bins are centred on equally spaced values from -1 to 1; the first reaches to -inf, the last to inf. With a and b the
// standardised edges of a bin and σ the logistic function,
//
//     σ(b) - σ(a) = σ(b) σ(-a) (1 - e^-(b-a))
//
// so the log is a sum of three logs, none of which cancels: neither for bins much narrower than the scale nor for
// values far from the mean. By symmetry only |x - mean| matters: near and far are the distances of the edges.
#pragma once

#include "likelihood/formula.h"

ISTHMUS_FORMULAS_BEGIN

template <class C>
struct LogisticBin {
  C half_bin, min_log_scale;

  LogisticBin(int64_t bins, double min_log_scale_)
      : half_bin(static_cast<C>(1.0 / static_cast<double>(bins - 1))), min_log_scale(static_cast<C>(min_log_scale_)) {}

  // log probability of the bin around x.
  template <class V>
  ISTHMUS_FORMULA V log_probability(V x, V mean, V log_scale) const {
    return terms(x, mean, log_scale).log_probability;
  }

  // The same, and its slopes. Below the floor of the log-scale its slope is zero.
  template <class V>
  ISTHMUS_FORMULA V log_probability(V x, V mean, V log_scale, V& by_mean, V& by_log_scale) const {
    const Terms<V> t = terms(x, mean, log_scale);
    const V zero = V{}, one = zero + C(1);
    const V by_near = -(t.near > C(0) ? one : t.e_near) / (C(1) + t.e_near);
    const V by_far = t.inside ? t.e_far / (C(1) + t.e_far) : zero;
    by_mean = (by_near + by_far) * (t.upwards ? -t.inverse : t.inverse);
    const V by_width = t.inside ? t.width * (C(1) - t.mass) / t.mass : zero;
    const V by_scale = -(t.near * by_near + t.far * by_far) - by_width;
    by_log_scale = log_scale < min_log_scale ? zero : by_scale;
    return t.log_probability;
  }

 private:
  template <class V>
  struct Terms {
    using Mask = decltype(V{} < V{});
    V inverse;        // 1 / scale
    V near, far;      // the edges' distances from the mean, in scales; on the open side there is no far edge
    V e_near, e_far;  // e^-|near|, e^-far
    V width, mass;    // far - near, and 1 - e^-width
    Mask inside;      // neither the first nor the last bin
    Mask upwards;     // near grows with x
    V log_probability;
  };

  template <class V>
  ISTHMUS_FORMULA Terms<V> terms(V x, V mean, V log_scale) const {
    Terms<V> t;
    const V zero = V{}, one = zero + C(1), d = x - mean;
    const auto first = x<half_bin - C(1), last = x> C(1) - half_bin;
    t.inside = (x >= half_bin - C(1)) & (x <= C(1) - half_bin);
    t.upwards = last | (t.inside & (d > C(0)));
    t.inverse = exp(-(log_scale < min_log_scale ? zero + min_log_scale : log_scale));
    const V distance = first ? -d : (last ? d : abs(d));
    t.near = (distance - half_bin) * t.inverse;
    t.far = (distance + half_bin) * t.inverse;
    t.width = C(2) * half_bin * t.inverse;
    t.e_near = exp(-abs(t.near));
    t.e_far = exp(-t.far);
    t.mass = -expm1(-t.width);
    const V ratio = (t.inside ? t.mass : one) / ((C(1) + t.e_near) * (t.inside ? C(1) + t.e_far : one));
    t.log_probability = log(ratio) - (t.near < C(0) ? zero : t.near);
    return t;
  }
};

ISTHMUS_FORMULAS_END
