// KL(q ‖ p) of categoricals, q = softmax(logits), p = softmax(prior_logits) or uniform, with every digit near p.
//
// With d = log q - log p, and because q and p sum to one,
//     KL = Σ q d = Σ q (e^-d - 1 + d) = Σ q expm1mx(-d),
// where no term of the last sum is negative and none cancels. The first sum is cheaper and as good where it is not
// small: its negative terms add up to no more than one. So it is taken where it exceeds 1/4, row by row.
//
// An error in the normalisers shifts all d alike, which the last sum feels only squared. Next to the prior d itself
// must be exact: with x and y the logits less their maxima, log(Σ e^x / Σ e^y) is then
// log1p(Σ e^y expm1(x - y) / Σ e^y).
//
// Gradients are q (d - KL) and p - q = -p expm1(d).
#pragma once

#include "categorical/kernels.h"
#include "categorical/rows.inl"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

template <class T, bool HasPrior>
class Divergence {
 public:
  using C = Compute<T>;
  using V = Vec<C>;

  Divergence(const Categories& in, const RowGroups& groups)
      : in_(in), arrays_(groups.elements()), tables_(groups), row_values_(groups.rows_per_group) {}

  void write_kl(const Group& group, C* kl) {
    measure(group);
    sum_products(group, kl);
    const auto is_small = [&](int64_t r) { return kl[r] < C(0.25); };
    if (!any_row(group, is_small)) return;
    for_vectors<C>(group.count(), [&](int64_t j, int64_t) {
      const V q = q_at(j), p = p_at(j), d = d_at(j);
      // Far below the prior e^-d overflows where q e^-d = p does not; and 0 log 0 = 0.
      const V term = d < -1 ? p - q + q * d : q * expm1mx(-d);
      store(t_ + j, q == 0 ? p : term);
    });
    for (int64_t r = 0; r < group.rows; ++r) {
      if (is_small(r)) kl[r] = row_sum(t_ + r * group.cols, group.cols);
    }
  }

  // grad[row] times the gradient of the row's divergence: to the logits as the result, in working memory; to the prior
  // at `grad_prior` unless that is null.
  const C* gradients(const Group& group, const C* grad, T* grad_prior) {
    measure(group);
    sum_products(group, row_values_[0]);
    const PerRow<C> mean(group, row_values_[0], tables_[3]), factor(group, grad, tables_[4]);
    for_vectors<C>(group.count(), [&](int64_t j, int64_t left) {
      const V q = q_at(j), d = d_at(j), g = factor.at(j);
      store(t_ + j, q == 0 ? V{} : g * (q * (d - mean.at(j))));
      if (grad_prior == nullptr) return;
      const V p = p_at(j), near = -p * expm1(d);
      store_first(grad_prior + j, g * ((d > -1) & (d < 1) ? near : p - q), left);
    });
    return t_;
  }

 private:
  // Prepares q, p and d of the group: e^x, e^y and x - y, and for each row what normalises them.
  void measure(const Group& group) {
    read_logits(group);
    if constexpr (HasPrior) read_prior(group);
    exponentiate(group);
    C *sum = row_values_[0], *prior_sum = row_values_[1], *shift = row_values_[2];
    row_sums(group, e_x_, sum);
    if constexpr (HasPrior) row_sums(group, e_y_, prior_sum);
    for_vectors<C>(group.rows, [&](int64_t r, int64_t) {
      const V s = load(sum + r), sp = HasPrior ? load(prior_sum + r) : splat(static_cast<C>(group.cols));
      store(prior_sum + r, sp);
      store(shift + r, log(s / sp));
      store(sum + r, C(1) / s);
    });
    measure_near_rows(group, shift, prior_sum);
    for_vectors<C>(group.rows, [&](int64_t r, int64_t) { store(prior_sum + r, C(1) / load(prior_sum + r)); });
    inverse_ = PerRow<C>(group, sum, tables_[0]);
    prior_inverse_ = PerRow<C>(group, prior_sum, tables_[1]);
    shift_ = PerRow<C>(group, shift, tables_[2]);
  }

  // shift[row] = log(Σ e^x / Σ e^y) again, where it is small.
  void measure_near_rows(const Group& group, C* shift, const C* prior_sum) {
    const auto is_small = [&](int64_t r) { return shift[r] > C(-0.5) && shift[r] < C(0.5); };
    if (!any_row(group, is_small)) return;
    for_vectors<C>(group.count(), [&](int64_t j, int64_t) {
      const V a = load(a_ + j), growth = expm1(a);
      if constexpr (HasPrior) {
        const V e_y = load(e_y_ + j);
        store(t_ + j, (a > -0.5f) & (a < 0.5f) ? e_y * growth : load(e_x_ + j) - e_y);
      } else {
        store(t_ + j, growth);
      }
    });
    for (int64_t r = 0; r < group.rows; ++r) {
      if (!is_small(r)) continue;
      const C growth = row_sum(t_ + r * group.cols, group.cols) / prior_sum[r];
      shift[r] = log1p(splat(growth))[0];
    }
  }

  template <class F>
  static bool any_row(const Group& group, F&& condition) {
    for (int64_t r = 0; r < group.rows; ++r) {
      if (condition(r)) return true;
    }
    return false;
  }

  // Σ q d of each row, where 0 log 0 = 0.
  void sum_products(const Group& group, C* sums) {
    for_vectors<C>(group.count(), [&](int64_t j, int64_t) {
      const V q = q_at(j);
      store(t_ + j, q == 0 ? V{} : q * d_at(j));
    });
    row_sums(group, t_, sums);
  }

  // x to e_x; the logits themselves to a, their maxima to the first row values.
  void read_logits(const Group& group) {
    const T* logits = static_cast<const T*>(in_.logits) + group.first();
    for_vectors<C>(group.count(), [&](int64_t j, int64_t left) {
      const V value = load_first(logits + j, left);
      store(e_x_ + j, value);
      store(a_ + j, value);
    });
    subtract_max(group, e_x_, row_values_[0], tables_[0]);
  }

  // y to e_y, and its logits out of a.
  void read_prior(const Group& group) {
    const T* prior = static_cast<const T*>(in_.prior_logits);
    const auto copy = [&](const T* from, int64_t first, int64_t count) {
      for_vectors<C>(count, [&](int64_t j, int64_t left) { store(e_y_ + first + j, load_first(from + j, left)); });
    };
    if (in_.shared_prior) {
      for (int64_t r = 0; r < group.rows; ++r) copy(prior, r * group.cols, group.cols);
    } else {
      copy(prior + group.first(), 0, group.count());
    }
    for_vectors<C>(group.count(), [&](int64_t j, int64_t) { store(a_ + j, load(a_ + j) - load(e_y_ + j)); });
    subtract_max(group, e_y_, row_values_[1], tables_[0]);
  }

  // e^x and e^y in their places, and x - y to a: as the difference of the logits less that of their maxima, since near
  // the prior these two are exact, x and y are not.
  void exponentiate(const Group& group) {
    C *top = row_values_[0], *prior_top = row_values_[1];
    if constexpr (HasPrior) {
      for_vectors<C>(group.rows, [&](int64_t r, int64_t) { store(top + r, load(top + r) - load(prior_top + r)); });
    }
    const PerRow<C> offset(group, top, tables_[0]);
    for_vectors<C>(group.count(), [&](int64_t j, int64_t) {
      store(a_ + j, load(a_ + j) - offset.at(j));
      store(e_x_ + j, exp(load(e_x_ + j)));
      if constexpr (HasPrior) store(e_y_ + j, exp(load(e_y_ + j)));
    });
  }

  ISTHMUS_INLINE V q_at(int64_t j) const { return load(e_x_ + j) * inverse_.at(j); }
  ISTHMUS_INLINE V p_at(int64_t j) const {
    return HasPrior ? load(e_y_ + j) * prior_inverse_.at(j) : prior_inverse_.at(j);
  }
  ISTHMUS_INLINE V d_at(int64_t j) const { return load(a_ + j) - shift_.at(j); }

  const Categories& in_;
  Scratch<C, HasPrior ? 4 : 3> arrays_;
  Tables<C, 5> tables_;
  Scratch<C, 3> row_values_;
  // e^x, x - y, terms to be summed, e^y
  C *e_x_ = arrays_[0], *a_ = arrays_[1], *t_ = arrays_[2], *e_y_ = HasPrior ? arrays_[3] : nullptr;
  PerRow<C> inverse_, prior_inverse_, shift_;
};

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
