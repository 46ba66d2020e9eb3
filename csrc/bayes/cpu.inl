// Linear layers with Gaussian weights on the CPU.
//
//     weight: out = x Wᵀ + b, W = mean + s · noise        local: out = x meanᵀ + b + √(x² (s²)ᵀ + s_b²) · noise
//
// Every product, forward and backward, is that of bayes/strips.h: weights, variances and noise are made inside it, so
// nothing of the size of the weight is ever stored. At AVX-512 making a weight costs about what multiplying it
// with 250 rows does; the product itself runs near the peak of the FMA units.
//
// With v = x² (s²)ᵀ + s_b² and h = ∂out/∂v ∘ grad = grad · noise / (2 √v), backward of the local estimator is
//     grad_x = grad mean + 2x ∘ (h s²)     grad_mean = gradᵀ x     grad_scale = (hᵀ x²) ∘ 2s · ds/dscale
// and where v is 0, whose root has no slope, h is 0. Only h is stored, [rows, features].

#include "bayes/kernels.h"
#include "bayes/strips.h"
#include "core/dispatch.h"
#include "core/noise.h"
#include "core/normal.h"
#include "core/tiles.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// ---- blocks of noise, of weights and of variances ------------------------------------------------------------------

// Calls f(first, count, at) for the runs of neighbouring elements of a block of a [*, total_cols] tensor; `at` is their
// place in `copy`, a [rows][cols] copy of the block.
template <class C, class F>
ISTHMUS_INLINE void for_each_run(int64_t total_cols, const Block& block, C* copy, F&& f) {
  const bool whole_rows = block.cols == total_cols;
  const int64_t runs = whole_rows ? 1 : block.rows, length = whole_rows ? block.rows * block.cols : block.cols;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t first = (block.row + run) * total_cols + block.col;
    for (int64_t i = 0; i < length; i += tile_elements) {
      f(first + i, smaller(tile_elements, length - i), copy + run * length + i);
    }
  }
}

template <class C>
void fill_noise(const Key& key, int64_t total_cols, const Block& block, C* noise) {
  for_each_run(total_cols, block, noise,
               [&](int64_t first, int64_t count, C* at) { fill_normal(key, first, count, at); });
}

template <class T>
struct Weights {
  using C = Compute<T>;
  using V = Vec<C>;

  const T *mean, *scale;
  ScaleType scale_type;
  int64_t inputs;
  Key key;

  template <class Args>
  explicit Weights(const Args& args)
      : mean(static_cast<const T*>(args.weight_mean)),
        scale(static_cast<const T*>(args.weight_scale)),
        scale_type(args.scale_type),
        inputs(args.inputs),
        key(args.key) {}

  // mean + s · noise
  void sample(const Block& block, C* weight) const {
    for_each_run(inputs, block, weight, [&](int64_t first, int64_t count, C* at) {
      fill_normal(key, first, count, at);
      dispatch_scale(scale_type, [&]<ScaleType S>() {
        for (int64_t j = 0; j < count; j += lanes<C>) {
          const int64_t left = count - j;
          const V m = load_first(mean + first + j, left), s = std_of<S>(load_first(scale + first + j, left));
          store_first(at + j, m + s * load_first(at + j, left), left);
        }
      });
    });
  }

  // s²
  void variance(const Block& block, C* out) const {
    for_each_run(inputs, block, out, [&](int64_t first, int64_t count, C* at) {
      dispatch_scale(scale_type, [&]<ScaleType S>() {
        for (int64_t j = 0; j < count; j += lanes<C>) {
          const V s = std_of<S>(load_first(scale + first + j, count - j));
          store_first(at + j, s * s, count - j);
        }
      });
    });
  }
};

// The key of the bias noise: fold_in(key, 1), which is block 1 of the key's own words.
inline Key bias_key(const int64_t* words) {
  const Key key(words);
  const Words w = philox(key.seed, key.offset + 1);
  const int64_t child[] = {static_cast<int64_t>(w.w[0] | static_cast<uint64_t>(w.w[1]) << 32),
                           static_cast<int64_t>(w.w[2] | static_cast<uint64_t>(w.w[3]) << 32)};
  return Key(child);
}

// A vector of a [rows][cols] block of a tensor.
struct Place {
  int64_t element;            // of the tensor
  int64_t col, left;          // of the tensor; columns left in the block
  int64_t in_block, in_copy;  // in [tile_rows][strip_width], in [rows][cols]
};

template <class C, class F>
ISTHMUS_INLINE void for_each_vector(int64_t total_cols, const Block& block, F&& f) {
  for (int64_t r = 0; r < block.rows; ++r) {
    for (int64_t c = 0; c < block.cols; c += lanes<C>) {
      const int64_t col = block.col + c;
      f(Place{(block.row + r) * total_cols + col, col, block.cols - c, r * strip_width<C> + c, r * block.cols + c});
    }
  }
}

template <class C>
void square(const C* values, int64_t count, C* squares) {
  for (int64_t i = 0; i < count; ++i) squares[i] = values[i] * values[i];
}

// ---- forward -------------------------------------------------------------------------------------------------------

// The bias of every feature and, for the local estimator, its variance. Padded, so that whole vectors can be loaded.
template <class T>
struct Bias {
  using C = Compute<T>;
  using V = Vec<C>;

  const Buffer<C> value, variance;

  // mean and bias_scale may be null: no bias, or one that is not random.
  template <class Args>
  Bias(const Args& args, const void* mean_) : value(args.features + lanes<C>), variance(args.features + lanes<C>) {
    const T *mean = static_cast<const T*>(mean_), *scale = static_cast<const T*>(args.bias_scale);
    const bool drawn = scale != nullptr && args.estimator == Estimator::weight;
    if (drawn) fill_normal(bias_key(args.key), 0, args.features, value.data);
    dispatch_scale(args.scale_type, [&]<ScaleType S>() {
      for (int64_t f = 0; f < args.features; f += lanes<C>) {
        const int64_t left = args.features - f;
        const V m = mean == nullptr ? V{} : load_first(mean + f, left);
        const V s = scale == nullptr ? V{} : std_of<S>(load_first(scale + f, left));
        store(value.data + f, drawn ? m + s * load(value.data + f) : m);
        store(variance.data + f, s * s);
      }
    });
  }
};

template <class T, Estimator E>
struct Output {
  using C = Compute<T>;
  using V = Vec<C>;
  static constexpr int terms = E == Estimator::weight ? 1 : 2;

  const BayesLinear& args;
  const Bias<T>& bias;
  const int64_t rows = args.rows, depth = args.inputs, cols = args.features;
  const T* x = static_cast<const T*>(args.x);
  T* out = static_cast<T*>(args.out);
  const Weights<T> weights{args};

  void pack_tile(int64_t row, int64_t count, C* tiles) const {
    pack_rows<tile_rows>(x + row * depth, depth, count, depth, tiles);
    if (terms == 2) square(tiles, depth * tile_rows, tiles + depth * tile_rows);
  }

  void pack_strip(int64_t col, int64_t count, int64_t k, int64_t chunk, C* staging, C* strips) const {
    for_each_panel(col, count, chunk, strips, [&](int64_t feature, int64_t features, C* panel) {
      const Block block{feature, features, k, chunk};
      if constexpr (E == Estimator::weight) {
        weights.sample(block, staging);
        pack_rows<panel_width<C>>(staging, chunk, features, chunk, panel);
      } else {
        weights.variance(block, staging);
        pack_rows<panel_width<C>>(weights.mean + feature * depth + k, depth, features, chunk, panel);
        pack_rows<panel_width<C>>(staging, chunk, features, chunk, panel + chunk * strip_width<C>);
      }
    });
  }

  void finish(const Block& block, const C* blocks) const {
    C noise[block_elements<C> + lanes<C>];
    if constexpr (E == Estimator::local) fill_noise(weights.key, cols, block, noise);
    for_each_vector<C>(cols, block, [&](const Place& p) {
      V result = load(blocks + p.in_block) + load(bias.value.data + p.col);
      if constexpr (E == Estimator::local) {
        const V variance = load(blocks + block_elements<C> + p.in_block) + load(bias.variance.data + p.col);
        result += sqrt(variance) * load(noise + p.in_copy);
      }
      store_first(out + p.element, result, p.left);
    });
  }
};

template <class T, Estimator E>
void forward(const BayesLinear& args) {
  const Bias<T> bias(args, args.bias_mean);
  multiply(Output<T, E>{args, bias});
}

// ---- backward ------------------------------------------------------------------------------------------------------

// h of the local estimator: what the gradient of an output is to its variance.
template <class T>
struct VarianceGradient {
  using C = Compute<T>;
  using V = Vec<C>;
  static constexpr int terms = 1;

  const BayesLinearBackward& args;
  const Bias<T>& bias;
  const int64_t rows = args.rows, depth = args.inputs, cols = args.features;
  const T* x = static_cast<const T*>(args.x);
  const T* grad = static_cast<const T*>(args.grad);
  C* h = static_cast<C*>(args.workspace);
  const Weights<T> weights{args};

  void pack_tile(int64_t row, int64_t count, C* tile) const {
    pack_rows<tile_rows>(x + row * depth, depth, count, depth, tile);
    square(tile, depth * tile_rows, tile);
  }

  void pack_strip(int64_t col, int64_t count, int64_t k, int64_t chunk, C* staging, C* strip) const {
    for_each_panel(col, count, chunk, strip, [&](int64_t feature, int64_t features, C* panel) {
      weights.variance({feature, features, k, chunk}, staging);
      pack_rows<panel_width<C>>(staging, chunk, features, chunk, panel);
    });
  }

  void finish(const Block& block, const C* variances) const {
    C noise[block_elements<C> + lanes<C>];
    fill_noise(weights.key, cols, block, noise);
    for_each_vector<C>(cols, block, [&](const Place& p) {
      const V variance = load(variances + p.in_block) + load(bias.variance.data + p.col);
      const V g = load_first(grad + p.element, p.left);
      const V slope = 0.5f * g * load(noise + p.in_copy) / sqrt(variance);
      store_first(h + p.element, variance == 0.0f ? V{} : slope, p.left);
    });
  }
};

template <class T, Estimator E>
struct InputGradient {
  using C = Compute<T>;
  using V = Vec<C>;
  static constexpr int terms = E == Estimator::weight ? 1 : 2;

  const BayesLinearBackward& args;
  const int64_t rows = args.rows, depth = args.features, cols = args.inputs;
  const T* x = static_cast<const T*>(args.x);
  const T* grad = static_cast<const T*>(args.grad);
  const C* h = static_cast<const C*>(args.workspace);
  T* grad_x = static_cast<T*>(args.grad_x);
  const Weights<T> weights{args};

  void pack_tile(int64_t row, int64_t count, C* tiles) const {
    pack_rows<tile_rows>(grad + row * depth, depth, count, depth, tiles);
    if (terms == 2) pack_rows<tile_rows>(h + row * depth, depth, count, depth, tiles + depth * tile_rows);
  }

  void pack_strip(int64_t col, int64_t count, int64_t k, int64_t chunk, C* staging, C* strips) const {
    const Block block{k, chunk, col, count};
    if constexpr (E == Estimator::weight) {
      weights.sample(block, staging);
    } else {
      weights.variance(block, staging);
    }
    for_each_panel(col, count, chunk, strips, [&](int64_t input, int64_t inputs, C* panel) {
      C* made = panel + (terms - 1) * chunk * strip_width<C>;
      pack_columns<panel_width<C>>(staging + input - col, count, inputs, chunk, made);
      if (terms == 2) pack_columns<panel_width<C>>(weights.mean + k * cols + input, cols, inputs, chunk, panel);
    });
  }

  void finish(const Block& block, const C* blocks) const {
    for_each_vector<C>(cols, block, [&](const Place& p) {
      V g = load(blocks + p.in_block);
      if (terms == 2) {
        g += 2.0f * load_first(x + p.element, p.left) * load(blocks + (terms - 1) * block_elements<C> + p.in_block);
      }
      store_first(grad_x + p.element, g, p.left);
    });
  }
};

template <class T, Estimator E>
struct WeightGradient {
  using C = Compute<T>;
  using V = Vec<C>;
  static constexpr int terms = E == Estimator::weight ? 1 : 2;

  const BayesLinearBackward& args;
  const int64_t rows = args.features, depth = args.rows, cols = args.inputs;
  const T* x = static_cast<const T*>(args.x);
  const T* grad = static_cast<const T*>(args.grad);
  const C* h = static_cast<const C*>(args.workspace);
  T* grad_mean = static_cast<T*>(args.grad_weight_mean);
  T* grad_scale = static_cast<T*>(args.grad_weight_scale);
  const Weights<T> weights{args};

  void pack_tile(int64_t feature, int64_t count, C* tiles) const {
    pack_columns<tile_rows>(grad + feature, rows, count, depth, tiles);
    if (terms == 2) pack_columns<tile_rows>(h + feature, rows, count, depth, tiles + depth * tile_rows);
  }

  void pack_strip(int64_t col, int64_t count, int64_t k, int64_t chunk, C*, C* strips) const {
    for_each_panel(col, count, chunk, strips, [&](int64_t input, int64_t inputs, C* panel) {
      pack_columns<panel_width<C>>(x + k * cols + input, cols, inputs, chunk, panel);
      if (terms == 2) square(panel, chunk * panel_width<C>, panel + chunk * strip_width<C>);
    });
  }

  void finish(const Block& block, const C* blocks) const {
    C noise[block_elements<C> + lanes<C>];
    if constexpr (E == Estimator::weight) fill_noise(weights.key, cols, block, noise);
    dispatch_scale(args.scale_type, [&]<ScaleType S>() {
      for_each_vector<C>(cols, block, [&](const Place& p) {
        const V to_mean = load(blocks + p.in_block), scale = load_first(weights.scale + p.element, p.left);
        V to_scale = std_slope<S>(scale);
        if constexpr (E == Estimator::weight) {
          to_scale *= to_mean * load(noise + p.in_copy);
        } else {
          to_scale *= 2.0f * std_of<S>(scale) * load(blocks + block_elements<C> + p.in_block);
        }
        store_first(grad_mean + p.element, to_mean, p.left);
        store_first(grad_scale + p.element, to_scale, p.left);
      });
    });
  }
};

// Sums over the rows of a [rows, cols] matrix, two-level so that long columns lose no accuracy.
template <class T>
void sum_columns(const T* matrix, int64_t rows, int64_t cols, Compute<T>* sums) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int64_t rows_at_once = 256;
  parallel_for(divide_up(cols, lanes<C>), 1 + grain_elements / (rows * lanes<C> + 1), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * lanes<C>; c < smaller(end * lanes<C>, cols); c += lanes<C>) {
      V sum = {};
      for (int64_t row = 0; row < rows; row += rows_at_once) {
        V part = {};
        for (int64_t r = row; r < smaller(row + rows_at_once, rows); ++r) {
          part += load_first(matrix + r * cols + c, cols - c);
        }
        sum += part;
      }
      store_first(sums + c, sum, cols - c);
    }
  });
}

template <class T, Estimator E>
void bias_gradients(const BayesLinearBackward& args) {
  using C = Compute<T>;
  using V = Vec<C>;
  const Buffer<C> sums(args.features), noise(args.features);
  T *grad_mean = static_cast<T*>(args.grad_bias_mean), *grad_scale = static_cast<T*>(args.grad_bias_scale);
  sum_columns(static_cast<const T*>(args.grad), args.rows, args.features, sums.data);
  for (int64_t f = 0; f < args.features; f += lanes<C>) {
    store_first(grad_mean + f, load_first(sums.data + f, args.features - f), args.features - f);
  }
  if (args.bias_scale == nullptr) return;
  if constexpr (E == Estimator::weight) {
    fill_normal(bias_key(args.key), 0, args.features, noise.data);
  } else {
    sum_columns(static_cast<const C*>(args.workspace), args.rows, args.features, sums.data);
  }
  dispatch_scale(args.scale_type, [&]<ScaleType S>() {
    for (int64_t f = 0; f < args.features; f += lanes<C>) {
      const int64_t left = args.features - f;
      const V scale = load_first(static_cast<const T*>(args.bias_scale) + f, left);
      V slope = std_slope<S>(scale);
      if constexpr (E == Estimator::weight) {
        slope *= load_first(noise.data + f, left);
      } else {
        slope *= 2.0f * std_of<S>(scale);
      }
      store_first(grad_scale + f, slope * load_first(sums.data + f, left), left);
    }
  });
}

template <class T, Estimator E>
void backward(const BayesLinearBackward& args) {
  if constexpr (E == Estimator::local) {
    const Bias<T> bias(args, nullptr);
    multiply(VarianceGradient<T>{args, bias});
  }
  multiply(InputGradient<T, E>{args});
  multiply(WeightGradient<T, E>{args});
  bias_gradients<T, E>(args);
}

// ---- the table -----------------------------------------------------------------------------------------------------

// Calls f<T, E>() for the dtype and the estimator of `args`. The scale type is looked at where scales are read, once
// for a run of them: it need not multiply the number of products to compile.
template <class Args, class F>
void dispatch(const Args& args, F&& f) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    if (args.estimator == Estimator::weight) return f.template operator()<T, Estimator::weight>();
    f.template operator()<T, Estimator::local>();
  });
}

void linear(const BayesLinear& args) {
  dispatch(args, [&]<class T, Estimator E>() { forward<T, E>(args); });
}

void linear_backward(const BayesLinearBackward& args) {
  dispatch(args, [&]<class T, Estimator E>() { backward<T, E>(args); });
}

}  // namespace

extern const BayesKernels bayes_table;
const BayesKernels bayes_table = {linear, linear_backward};

}  // namespace isthmus::ISTHMUS_LEVEL
