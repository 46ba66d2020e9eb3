// Categorical distributions on the CPU: Gumbel-softmax sampling and its divergence.
//
//     x = (logits + noise(key)) / temperature        y = softmax(x), or the one-hot of its maximum
//     kl[row] = KL(softmax(logits) ‖ prior)
//
// Traffic: forward reads the logits once and writes y; backward reads grad_y and either y or, where y is one-hot or the
// divergence asks for them, the logits, and draws the noise again. Nothing else is stored.
// Bound by arithmetic: Philox and two logarithms an element, then one exponential. Rows stay in cache from the first
// touch to the last (rows.inl), however many steps they go through.

#include "categorical/divergence.inl"
#include "categorical/kernels.h"
#include "categorical/rows.inl"
#include "core/dispatch.h"
#include "core/gumbel.h"
#include "core/parallel.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// Calls f<T, HasPrior>() for the dtype and the prior of `in`.
template <class F>
void dispatch(const Categories& in, F&& f) {
  dispatch_dtype(in.dtype, [&]<class T>() {
    in.prior_logits == nullptr ? f.template operator()<T, false>() : f.template operator()<T, true>();
  });
}

void noise(const GumbelNoise& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    const RowGroups tiles(args.count, 1);
    parallel_for(tiles.count, tiles.grain(), [&](int64_t begin, int64_t end) {
      alignas(64) C values[tile_elements + lanes<C>];
      for (int64_t index = begin; index < end; ++index) {
        const Group tile = tiles[index];
        T* out = static_cast<T*>(args.noise) + tile.first();
        fill_gumbel(Key(args.key), tile.first(), tile.count(), values);
        for_vectors<C>(tile.count(), [&](int64_t j, int64_t left) { store_first(out + j, load(values + j), left); });
      }
    });
  });
}

// Perturbed logits of a group, and their softmax.
template <class T>
class Sampler {
 public:
  using C = Compute<T>;
  using V = Vec<C>;

  Sampler(const Categories& in, const int64_t* key, double temperature, const RowGroups& groups)
      : logits_(static_cast<const T*>(in.logits)),
        key_(key),
        inverse_temperature_(splat(static_cast<C>(1 / temperature))),
        x_(groups.elements()),
        table_(groups),
        row_values_(groups.rows_per_group) {}

  const C* perturb(const Group& group) {
    C* x = x_[0];
    const T* logits = logits_ + group.first();
    fill_gumbel(key_, group.first(), group.count(), x);
    for_vectors<C>(group.count(), [&](int64_t j, int64_t left) {
      store(x + j, (load_first(logits + j, left) + load(x + j)) * inverse_temperature_);
    });
    return x;
  }

  // Of the perturbed group: calls write(j, left, y) for each vector.
  template <class Write>
  void softmax(const Group& group, Write&& write) {
    C* x = x_[0];
    subtract_max(group, x, row_values_[0], table_[0]);
    for_vectors<C>(group.count(), [&](int64_t j, int64_t) { store(x + j, exp(load(x + j))); });
    row_sums(group, x, row_values_[0]);
    for_vectors<C>(group.rows, [&](int64_t r, int64_t) { store(row_values_[0] + r, C(1) / load(row_values_[0] + r)); });
    const PerRow<C> inverse(group, row_values_[0], table_[0]);
    for_vectors<C>(group.count(), [&](int64_t j, int64_t left) { write(j, left, load(x + j) * inverse.at(j)); });
  }

  // The same, in working memory.
  const C* soft_sample(const Group& group) {
    perturb(group);
    softmax(group, [&](int64_t j, int64_t, V y) { store(x_[0] + j, y); });
    return x_[0];
  }

 private:
  const T* logits_;
  Key key_;
  V inverse_temperature_;
  Scratch<C, 1> x_;
  Tables<C, 1> table_;
  Scratch<C, 1> row_values_;
};

// ---- forward -------------------------------------------------------------------------------------------------------

template <class T>
void write_one_hots(const Group& group, const Compute<T>* x, T* y) {
  using C = Compute<T>;
  const auto fill = [](C value, T* to, int64_t count) {
    for_vectors<C>(count, [&](int64_t j, int64_t left) { store_first(to + j, splat(value), left); });
  };
  fill(C(0), y, group.count());
  for (int64_t r = 0; r < group.rows; ++r) {
    T* row = y + r * group.cols;
    const int64_t winner = first_max(x + r * group.cols, group.cols);
    winner < 0 ? fill(static_cast<C>(not_a_number), row, group.cols) : store_one(row + winner, C(1));
  }
}

void gumbel_softmax(const GumbelSoftmax& args) {
  dispatch(args.in, [&]<class T, bool HasPrior>() {
    using C = Compute<T>;
    const RowGroups groups(args.in.rows, args.in.cols);
    parallel_for(groups.count, groups.grain(), [&](int64_t begin, int64_t end) {
      Sampler<T> sampler(args.in, args.key, args.temperature, groups);
      Divergence<T, HasPrior> divergence(args.in, groups);
      for (int64_t index = begin; index < end; ++index) {
        const Group group = groups[index];
        T* y = static_cast<T*>(args.y) + group.first();
        const C* x = sampler.perturb(group);
        if (args.hard) {
          write_one_hots(group, x, y);
        } else {
          sampler.softmax(group, [&](int64_t j, int64_t left, Vec<C> value) { store_first(y + j, value, left); });
        }
        if (args.kl != nullptr) divergence.write_kl(group, static_cast<C*>(args.kl) + group.row);
      }
    });
  });
}

void kl(const CategoricalKl& args) {
  dispatch(args.in, [&]<class T, bool HasPrior>() {
    const RowGroups groups(args.in.rows, args.in.cols);
    parallel_for(groups.count, groups.grain(), [&](int64_t begin, int64_t end) {
      Divergence<T, HasPrior> divergence(args.in, groups);
      for (int64_t index = begin; index < end; ++index) {
        const Group group = groups[index];
        divergence.write_kl(group, static_cast<Compute<T>*>(args.kl) + group.row);
      }
    });
  });
}

// ---- backward ------------------------------------------------------------------------------------------------------

// Through a softmax: y (grad - Σ grad y) / temperature. y may be in memory or in working memory: T or Compute<T>.
template <class T>
class SoftmaxGradient {
 public:
  using C = Compute<T>;
  using V = Vec<C>;

  SoftmaxGradient(double temperature, const RowGroups& groups)
      : inverse_temperature_(splat(static_cast<C>(1 / temperature))),
        products_(groups.elements()),
        table_(groups),
        row_values_(groups.rows_per_group) {}

  // more: a gradient to be added, in working memory; or null.
  template <class Y>
  void write(const Group& group, const T* grad, const Y* y, const C* more, T* out) {
    for_vectors<C>(group.count(), [&](int64_t j, int64_t left) {
      store(products_[0] + j, load_first(grad + j, left) * load_first(y + j, left));
    });
    row_sums(group, products_[0], row_values_[0]);
    const PerRow<C> mean(group, row_values_[0], table_[0]);
    for_vectors<C>(group.count(), [&](int64_t j, int64_t left) {
      const V centred = load_first(grad + j, left) - mean.at(j);
      const V through = load_first(y + j, left) * centred * inverse_temperature_;
      store_first(out + j, more == nullptr ? through : through + load(more + j), left);
    });
  }

 private:
  V inverse_temperature_;
  Scratch<C, 1> products_;
  Tables<C, 1> table_;
  Scratch<C, 1> row_values_;
};

void softmax_backward(const SoftmaxBackward& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const RowGroups groups(args.rows, args.cols);
    parallel_for(groups.count, groups.grain(), [&](int64_t begin, int64_t end) {
      SoftmaxGradient<T> gradient(args.temperature, groups);
      for (int64_t index = begin; index < end; ++index) {
        const Group group = groups[index];
        const int64_t first = group.first();
        gradient.write(group, static_cast<const T*>(args.grad_y) + first, static_cast<const T*>(args.y) + first,
                       nullptr, static_cast<T*>(args.grad_logits) + first);
      }
    });
  });
}

template <class T>
T* at(void* tensor, const Group& group) {
  return tensor == nullptr ? nullptr : static_cast<T*>(tensor) + group.first();
}

void gumbel_softmax_backward(const GumbelSoftmaxBackward& args) {
  dispatch(args.in, [&]<class T, bool HasPrior>() {
    using C = Compute<T>;
    const RowGroups groups(args.in.rows, args.in.cols);
    parallel_for(groups.count, groups.grain(), [&](int64_t begin, int64_t end) {
      Sampler<T> sampler(args.in, args.key, args.temperature, groups);
      Divergence<T, HasPrior> divergence(args.in, groups);
      SoftmaxGradient<T> gradient(args.temperature, groups);
      for (int64_t index = begin; index < end; ++index) {
        const Group group = groups[index];
        const C* grad_kl = static_cast<const C*>(args.grad_kl);
        const C* through_kl = nullptr;
        if (grad_kl != nullptr) {
          through_kl = divergence.gradients(group, grad_kl + group.row, at<T>(args.grad_prior, group));
        }
        gradient.write(group, static_cast<const T*>(args.grad_y) + group.first(), sampler.soft_sample(group),
                       through_kl, at<T>(args.grad_logits, group));
      }
    });
  });
}

void kl_backward(const CategoricalKlBackward& args) {
  dispatch(args.in, [&]<class T, bool HasPrior>() {
    using C = Compute<T>;
    const RowGroups groups(args.in.rows, args.in.cols);
    parallel_for(groups.count, groups.grain(), [&](int64_t begin, int64_t end) {
      Divergence<T, HasPrior> divergence(args.in, groups);
      for (int64_t index = begin; index < end; ++index) {
        const Group group = groups[index];
        T* out = at<T>(args.grad_logits, group);
        const C* grads =
            divergence.gradients(group, static_cast<const C*>(args.grad) + group.row, at<T>(args.grad_prior, group));
        for_vectors<C>(group.count(), [&](int64_t j, int64_t left) { store_first(out + j, load(grads + j), left); });
      }
    });
  });
}

}  // namespace

extern const CategoricalKernels categorical_table;
const CategoricalKernels categorical_table = {noise, gumbel_softmax, gumbel_softmax_backward, softmax_backward,
                                              kl,    kl_backward};

}  // namespace isthmus::ISTHMUS_LEVEL
