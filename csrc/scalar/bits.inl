// Quantizers of one bit a number: signs, also on the sphere, and sampled bits. Forward reads its input once, backward
// again together with the gradient; soft bits, errors and entropies are summed in the same pass.
//
// Bits are gathered from comparison masks into strings of 64, of which an index is a shift and a reversal.

#pragma once

#include "core/math.h"
#include "scalar/noise.h"
#include "scalar/rows.inl"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// Of Bernoulli(σ(a)), from e^-|a|: nothing cancels for large |a|.
template <class C>
struct SoftBit {
  Vec<C> probability, entropy, variance;  // variance = σ(a) σ(-a), the slope of σ

  ISTHMUS_INLINE explicit SoftBit(Vec<C> a) {
    const Vec<C> m = abs(a), e = exp(-m), larger = C(1) / (C(1) + e), smaller = e * larger;
    probability = a < C(0) ? smaller : larger;
    entropy = log1p(e) + m * smaller;
    variance = larger * smaller;
  }
};

// ---- signs ---------------------------------------------------------------------------------------------------------

// The vectors u of a group, in working memory.
template <class T>
class LfqRows {
 public:
  using C = Compute<T>;
  using V = Vec<C>;

  LfqRows(const Lfq& args, const RowGroups& groups)
      : args_(args),
        u_(groups.elements()),
        table_(groups.elements()),
        per_row_(groups.rows_per_group * args.codebooks) {}

  // The group as rows of bits.
  Group vectors(const Group& group) const {
    return {group.row * args_.codebooks, group.rows * args_.codebooks, args_.bits};
  }

  const C* u(const Group& group) {
    C* u = u_[0];
    const T* x = static_cast<const T*>(args_.x) + group.first();
    for_vectors<C>(group.count(), [&](int64_t j, int64_t left) { store(u + j, load_first(x + j, left)); });
    if (args_.spherical) normalize(vectors(group), u);
    return u;
  }

  // From the gradient of u, in working memory, to that of x.
  void through_sphere(const Group& group, C* grad) {
    const Group rows = vectors(group);
    const C* u = u_[0];
    const C inverse = static_cast<C>(1 / (args_.scale * args_.scale));
    for_vectors<C>(rows.count(), [&](int64_t j, int64_t) { store(table_[1] + j, load(u + j) * load(grad + j)); });
    sum_rows(rows, table_[1], per_row_[1]);
    const PerRow<C> along(rows, per_row_[1], table_[1]), length(rows, per_row_[0], table_[0]);
    for_vectors<C>(rows.count(), [&](int64_t j, int64_t) {
      store(grad + j, length.at(j) * (load(grad + j) - load(u + j) * along.at(j) * inverse));
    });
  }

 private:
  // per_row_[0]: scale / |x|, 0 for a zero vector.
  void normalize(const Group& rows, C* u) {
    for_vectors<C>(rows.count(), [&](int64_t j, int64_t) { store(table_[0] + j, load(u + j) * load(u + j)); });
    sum_rows(rows, table_[0], per_row_[0]);
    for_vectors<C>(rows.rows, [&](int64_t r, int64_t) {
      const V square = load(per_row_[0] + r);
      store(per_row_[0] + r, square == C(0) ? V{} : static_cast<C>(args_.scale) / sqrt(square));
    });
    const PerRow<C> length(rows, per_row_[0], table_[0]);
    for_vectors<C>(rows.count(), [&](int64_t j, int64_t) { store(u + j, load(u + j) * length.at(j)); });
  }

  const Lfq& args_;
  Scratch<C, 1> u_;
  Scratch<C, 2> table_, per_row_;
};

template <class C>
ISTHMUS_INLINE Vec<C> corner(Vec<C> u, C value) {
  const Vec<C> signed_value = u > C(0) ? splat(value) : splat(-value);
  return u == u ? signed_value : u;
}

template <class T, bool Entropy>
class LfqForward {
 public:
  using C = Compute<T>;
  using V = Vec<C>;

  LfqForward(const LfqQuantize& args, const RowGroups& groups)
      : args_(args), rows_(args, groups), bits_(groups), terms_(groups.elements()) {}

  // counts: of the soft bits of the item, if there is an entropy.
  void operator()(const Group& group, double* counts) {
    const C* u = rows_.u(group);
    T* quantized = static_cast<T*>(args_.quantized);
    const C value = static_cast<C>(args_.value), sharpness = static_cast<C>(args_.sharpness());
    bits_.clear();
    for_vectors<C>(group.count(), [&](int64_t j, int64_t left) {
      const V v = load(u + j), q = corner(v, value), off = v - q;
      store_first(quantized + group.first() + j, q, left);
      bits_.put(j, v > C(0));
      store(terms_[0] + j, off * off);
      if constexpr (Entropy) {
        const SoftBit<C> bit(sharpness * v);
        store(terms_[1] + j, bit.entropy);
        store(terms_[2] + j, bit.probability);
      }
    });
    const Group rows = rows_.vectors(group);
    bits_.write_indices(rows, args_.indices);
    sum_rows(rows, terms_[0], static_cast<C*>(args_.error) + rows.row);
    if constexpr (Entropy) {
      sum_rows(rows, terms_[1], static_cast<C*>(args_.entropy) + rows.row);
      clear_masked(args_.mask, group, terms_[2]);
      add_column_sums(group, terms_[2], counts);
    }
    mask(group);
  }

 private:
  void mask(const Group& group) const {
    const Group values{group.row, group.rows, args_.codebooks};
    fill_masked(args_.mask, group, static_cast<T*>(args_.quantized), T{});
    fill_masked(args_.mask, values, args_.indices, int64_t(-1));
    fill_masked(args_.mask, values, static_cast<C*>(args_.error), C(0));
    if constexpr (Entropy) fill_masked(args_.mask, values, static_cast<C*>(args_.entropy), C(0));
  }

  const LfqQuantize& args_;
  LfqRows<T> rows_;
  BitString bits_;
  Scratch<C, Entropy ? 3 : 1> terms_;
};

void lfq_quantize(const LfqQuantize& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    const int64_t columns = args.codebooks * args.bits;
    const RowGroups groups(args.rows, columns);
    if (args.bit_counts != nullptr) {
      sum_over_groups(groups, columns, static_cast<C*>(args.bit_counts),
                      [&] { return LfqForward<T, true>(args, groups); });
      return;
    }
    over_groups(groups, [&] {
      return [forward = LfqForward<T, false>(args, groups)](const Group& group) mutable { forward(group, nullptr); };
    });
  });
}

template <class T, bool Entropy>
class LfqGradient {
 public:
  using C = Compute<T>;
  using V = Vec<C>;

  LfqGradient(const LfqBackward& args, const RowGroups& groups, const Columns<C, 1>& counts)
      : args_(args), counts_(counts), rows_(args, groups), grad_(groups.elements()), table_(groups.elements()) {}

  void operator()(const Group& group) {
    const C* u = rows_.u(group);
    const Group rows = rows_.vectors(group);
    C* grad = grad_[0];
    const T* grad_quantized = static_cast<const T*>(args_.grad_quantized) + group.first();
    const C value = static_cast<C>(args_.value), sharpness = static_cast<C>(args_.sharpness());
    const PerRow<C> error(rows, static_cast<const C*>(args_.grad_error) + rows.row, table_[0]);
    PerRow<C> entropy;
    if constexpr (Entropy) {
      entropy = PerRow<C>(rows, static_cast<const C*>(args_.grad_entropy) + rows.row, table_[1]);
    }
    for_vectors<C>(group.count(), [&](int64_t j, int64_t left) {
      const V v = load(u + j);
      V g = load_first(grad_quantized + j, left) + C(2) * error.at(j) * (v - corner(v, value));
      if constexpr (Entropy) {
        const V a = sharpness * v;
        g += sharpness * SoftBit<C>(a).variance * (counts_.at(0, j) - entropy.at(j) * a);
      }
      store(grad + j, g);
    });
    if (args_.spherical) rows_.through_sphere(group, grad);
    T* out = static_cast<T*>(args_.grad_x);
    for_vectors<C>(group.count(),
                   [&](int64_t j, int64_t left) { store_first(out + group.first() + j, load(grad + j), left); });
    fill_masked(args_.mask, group, out, T{});
  }

 private:
  const LfqBackward& args_;
  const Columns<C, 1>& counts_;
  LfqRows<T> rows_;
  Scratch<C, 1> grad_;
  Scratch<C, 2> table_;
};

void lfq_backward(const LfqBackward& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    const RowGroups groups(args.rows, args.codebooks * args.bits);
    Columns<C, 1> counts(groups);
    if (args.grad_bit_counts != nullptr) {
      counts.set(0, [&](int64_t c) { return static_cast<const C*>(args.grad_bit_counts)[c]; });
      over_groups(groups, [&] { return LfqGradient<T, true>(args, groups, counts); });
    } else {
      over_groups(groups, [&] { return LfqGradient<T, false>(args, groups, counts); });
    }
  });
}

// ---- sampled bits --------------------------------------------------------------------------------------------------

void binary_map(const BinaryMap& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    using V = Vec<C>;
    const RowGroups groups(args.rows, args.bits);
    over_groups(groups, [&] {
      return [&, bits = BitString(groups), noise = Scratch<C, 1>(args.key == nullptr ? 0 : groups.elements()),
              terms = Scratch<C, 1>(groups.elements())](const Group& group) mutable {
        const T* logits = static_cast<const T*>(args.logits) + group.first();
        T* out = static_cast<T*>(args.out) + group.first();
        if (args.key != nullptr) fill_logistic(Key(args.key), group.first(), group.count(), noise[0]);
        bits.clear();
        for_vectors<C>(group.count(), [&](int64_t j, int64_t left) {
          const V logit = load_first(logits + j, left);
          const Mask<C> one = (args.key == nullptr ? logit : logit + load(noise[0] + j)) > C(0);
          const V bit = one ? splat(C(1)) : V{};
          store_first(out + j, logit == logit ? bit : logit, left);
          bits.put(j, one);
          store(terms[0] + j, SoftBit<C>(logit).entropy);
        });
        bits.write_indices(group, args.indices);
        sum_rows(group, terms[0], static_cast<C*>(args.entropy) + group.row);
      };
    });
  });
}

void binary_map_backward(const BinaryMapBackward& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    using V = Vec<C>;
    const RowGroups groups(args.rows, args.bits);
    const bool noisy = args.relaxed && args.key != nullptr;
    const C inverse = static_cast<C>(1 / args.temperature);
    over_groups(groups, [&] {
      return [&, noise = Scratch<C, 1>(noisy ? groups.elements() : 0),
              table = Scratch<C, 1>(groups.elements())](const Group& group) {
        const int64_t first = group.first();
        const T* logits = static_cast<const T*>(args.logits) + first;
        const T* grad_bits = static_cast<const T*>(args.grad_bits) + first;
        T* out = static_cast<T*>(args.grad_logits) + first;
        const PerRow<C> grad_entropy(group, static_cast<const C*>(args.grad_entropy) + group.row, table[0]);
        if (noisy) fill_logistic(Key(args.key), first, group.count(), noise[0]);
        for_vectors<C>(group.count(), [&](int64_t j, int64_t left) {
          const V logit = load_first(logits + j, left), grad = load_first(grad_bits + j, left);
          const V variance = SoftBit<C>(logit).variance;
          V slope = variance;
          if (args.relaxed) {
            slope = SoftBit<C>((noisy ? logit + load(noise[0] + j) : logit) * inverse).variance * inverse;
          }
          store_first(out + j, grad * slope - grad_entropy.at(j) * logit * variance, left);
        });
      };
    });
  });
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
