// Categorical distributions on CUDA; what is computed stands in cpu.inl and divergence.inl.
//
// A row belongs to a team: 1 to 32 neighbouring lanes of a warp for narrow rows, a block for wide ones. The team goes
// over its row two or three times (maxima and sums, then results); the first time brings it into the cache, and the
// noise is drawn again each time, which costs less than writing it down. Traffic to memory stays at the floor.
// A thread takes one Philox block: four neighbouring float32 elements (two float64) in one access. Where the columns
// are no multiple of that, or a pointer is not aligned, it takes one element: slower, the same numbers.
// The team's values are combined in an order fixed by the shape: no atomics, bitwise repeatable.

#include "categorical/kernels.h"
#include "core/gumbel.cuh"
#include "core/launch.cuh"
#include "core/normal.cuh"

namespace isthmus::cuda {
namespace {

constexpr int threads_per_block = 256;
constexpr int64_t wide_row = 2048;  // from here on a whole block works on one row

template <class C>
constexpr int words_per_block = sizeof(C) == 8 ? 2 : 4;  // Gumbel values of one Philox block

template <class C>
__device__ __forceinline__ C lowest() {
  return -static_cast<C>(INFINITY);
}

// ---- access --------------------------------------------------------------------------------------------------------

template <class T, int Width>
__device__ __forceinline__ void load(const T* from, Compute<T> (&out)[Width]) {
  const Pack<T, Width> pack = *reinterpret_cast<const Pack<T, Width>*>(from);
#pragma unroll
  for (int j = 0; j < Width; ++j) out[j] = to_compute(pack.values[j]);
}

template <class T, int Width>
__device__ __forceinline__ void store(T* to, const Compute<T> (&values)[Width]) {
  Pack<T, Width> pack;
#pragma unroll
  for (int j = 0; j < Width; ++j) pack.values[j] = from_compute<T>(values[j]);
  *reinterpret_cast<Pack<T, Width>*>(to) = pack;
}

// Noise of elements [first, first + Width) of the key's stream. Width is 1 or the size of a Philox block.
template <class C, int Width>
__device__ __forceinline__ void gumbels(const int64_t* key, int64_t first, C (&out)[Width]) {
  constexpr int size = words_per_block<C>;
  C block[size];
  gumbel_block(static_cast<uint64_t>(key[0]), static_cast<uint64_t>(key[1]) + static_cast<uint64_t>(first / size),
               block);
  if constexpr (Width == size) {
#pragma unroll
    for (int j = 0; j < Width; ++j) out[j] = block[j];
  } else {
    const int lane = static_cast<int>(first % size);
    out[0] = block[0];
#pragma unroll
    for (int j = 1; j < size; ++j) out[0] = lane == j ? block[j] : out[0];
  }
}

// ---- teams ---------------------------------------------------------------------------------------------------------

template <class C>
struct Candidate {
  C value;
  int64_t col;
};

struct Add {
  template <class C>
  __device__ __forceinline__ C operator()(C a, C b) const {
    return a + b;
  }
};
struct Larger {  // passes NaN over; of equal candidates the first column
  template <class C>
  __device__ __forceinline__ C operator()(C a, C b) const {
    return b > a ? b : a;
  }
  template <class C>
  __device__ __forceinline__ Candidate<C> operator()(Candidate<C> a, Candidate<C> b) const {
    return b.value > a.value || (b.value == a.value && b.col < a.col) ? b : a;
  }
};

template <class C>
__device__ __forceinline__ C shuffle_xor(C value, int offset) {
  return __shfl_xor_sync(0xffffffffu, value, offset);
}
template <class C>
__device__ __forceinline__ Candidate<C> shuffle_xor(Candidate<C> c, int offset) {
  return {shuffle_xor(c.value, offset), shuffle_xor(c.col, offset)};
}

// The threads that work on one row. Those without a row take part in every reduction, as the shuffles require.
template <bool Block>
struct Team {
  int64_t row;
  int member, size;

  __device__ __forceinline__ explicit Team(int lanes_per_row) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * threads_per_block + threadIdx.x;
    size = Block ? threads_per_block : lanes_per_row;
    row = Block ? blockIdx.x : thread / size;
    member = Block ? threadIdx.x : static_cast<int>(thread % size);
  }

  // Every member gets the result.
  template <class V, class Op>
  __device__ __forceinline__ V reduce(V value, Op op) const {
    for (int offset = (Block ? warp_size : size) / 2; offset > 0; offset /= 2) {
      value = op(value, shuffle_xor(value, offset));
    }
    if constexpr (Block) {
      constexpr int warps = threads_per_block / warp_size;
      __shared__ V of_warp[warps];
      __syncthreads();  // the previous use of `of_warp` is over
      if (threadIdx.x % warp_size == 0) of_warp[threadIdx.x / warp_size] = value;
      __syncthreads();
      value = of_warp[0];
      for (int w = 1; w < warps; ++w) value = op(value, of_warp[w]);
    }
    return value;
  }
};

// Calls f(col) for the first column of each pack that this member works on.
template <int Width, bool Block, class F>
__device__ __forceinline__ void for_columns(const Team<Block>& team, int64_t rows, int64_t cols, F&& f) {
  if (team.row >= rows) return;
  for (int64_t col = static_cast<int64_t>(team.member) * Width; col < cols; col += team.size * Width) f(col);
}

// ---- the relaxed sample --------------------------------------------------------------------------------------------

template <class T>
struct Perturbed {
  using C = Compute<T>;
  const T* logits;
  const int64_t* key;
  C inverse_temperature;

  template <int Width>
  __device__ __forceinline__ void at(int64_t i, C (&x)[Width]) const {
    C noise[Width];
    load(logits + i, x);
    gumbels(key, i, noise);
#pragma unroll
    for (int j = 0; j < Width; ++j) x[j] = (x[j] + noise[j]) * inverse_temperature;
  }
};

// Σ e^(x - max) and Σ weight e^(x - max), with the maximum found on the way.
template <class C>
struct OnlineSums {
  C top = lowest<C>(), sum = 0, weighted = 0;

  __device__ __forceinline__ void add(C x, C weight) {
    if (x > top) {
      const C shrink = exp(top - x), e = exp(x - x);  // x - x: an infinite x makes the row NaN
      sum = sum * shrink + e;
      weighted = weighted * shrink + weight * e;
      top = x;
    } else if (x != lowest<C>()) {
      const C e = exp(x - top);
      sum += e;
      weighted += weight * e;
    }
  }

  template <bool Block>
  __device__ __forceinline__ void combine(const Team<Block>& team) {
    const C team_top = team.reduce(top, Larger());
    const C shrink = top == lowest<C>() ? C(0) : exp(top - team_top);
    sum = team.reduce(sum * shrink, Add());
    weighted = team.reduce(weighted * shrink, Add());
    top = team_top;
  }
};

// ---- the divergence ------------------------------------------------------------------------------------------------

template <class C>
struct Terms {
  C q, p, d;
};

template <class T, bool HasPrior>
struct Divergence {
  using C = Compute<T>;
  const T *logits, *prior;
  int64_t cols;
  bool shared;
  C top = 0, prior_top = 0, inverse = 0, prior_inverse = 0, shift = 0;

  __device__ __forceinline__ explicit Divergence(const Categories& in)
      : logits(static_cast<const T*>(in.logits)),
        prior(static_cast<const T*>(in.prior_logits)),
        cols(in.cols),
        shared(in.shared_prior) {}

  // x and y, the logits less their maxima, and a = x - y: as the difference of the logits less that of their maxima,
  // since near the prior these two are exact, x and y are not.
  template <int Width>
  __device__ __forceinline__ void read(int64_t row, int64_t col, C (&x)[Width], C (&y)[Width], C (&a)[Width]) const {
    load(logits + row * cols + col, x);
    if constexpr (HasPrior) load(prior + (shared ? col : row * cols + col), y);
#pragma unroll
    for (int j = 0; j < Width; ++j) {
      if constexpr (!HasPrior) y[j] = 0;
      a[j] = (x[j] - y[j]) - (top - prior_top);
      x[j] -= top;
      y[j] -= prior_top;
    }
  }

  template <int Width, bool Block>
  __device__ __forceinline__ void measure(const Team<Block>& team, int64_t rows) {
    C top_of_mine = lowest<C>(), prior_of_mine = lowest<C>();
    for_columns<Width>(team, rows, cols, [&](int64_t col) {
      C x[Width], y[Width], a[Width];
      read(team.row, col, x, y, a);
#pragma unroll
      for (int j = 0; j < Width; ++j) {
        top_of_mine = Larger()(top_of_mine, x[j]);
        prior_of_mine = Larger()(prior_of_mine, y[j]);
      }
    });
    top = team.reduce(top_of_mine, Larger());
    if constexpr (HasPrior) prior_top = team.reduce(prior_of_mine, Larger());

    C sum = 0, prior_sum = 0, growth = 0;
    for_columns<Width>(team, rows, cols, [&](int64_t col) {
      C x[Width], y[Width], a[Width];
      read(team.row, col, x, y, a);
#pragma unroll
      for (int j = 0; j < Width; ++j) {
        const C e_x = exp(x[j]), e_y = exp(y[j]);
        sum += e_x;
        prior_sum += e_y;
        growth += fabs(a[j]) < C(0.5) ? e_y * expm1(a[j]) : e_x - e_y;
      }
    });
    sum = team.reduce(sum, Add());
    prior_sum = team.reduce(prior_sum, Add());
    growth = team.reduce(growth, Add()) / prior_sum;
    shift = fabs(growth) < C(0.5) ? log1p(growth) : log(sum / prior_sum);
    inverse = C(1) / sum;
    prior_inverse = C(1) / prior_sum;
  }

  template <int Width>
  __device__ __forceinline__ void terms(int64_t row, int64_t col, Terms<C> (&out)[Width]) const {
    C x[Width], y[Width], a[Width];
    read(row, col, x, y, a);
#pragma unroll
    for (int j = 0; j < Width; ++j) out[j] = {exp(x[j]) * inverse, exp(y[j]) * prior_inverse, a[j] - shift};
  }

  // Σ q expm1mx(-d), as in divergence.inl.
  template <int Width, bool Block>
  __device__ __forceinline__ C kl(const Team<Block>& team, int64_t rows) const {
    C sum = 0;
    for_columns<Width>(team, rows, cols, [&](int64_t col) {
      Terms<C> t[Width];
      terms(team.row, col, t);
#pragma unroll
      for (int j = 0; j < Width; ++j) {
        const C term = t[j].d < C(-1) ? t[j].p - t[j].q + t[j].q * t[j].d : t[j].q * expm1mx(-t[j].d);
        sum += t[j].q == C(0) ? t[j].p : term;
      }
    });
    return team.reduce(sum, Add());
  }

  template <int Width, bool Block>
  __device__ __forceinline__ C mean_of_d(const Team<Block>& team, int64_t rows) const {
    C sum = 0;
    for_columns<Width>(team, rows, cols, [&](int64_t col) {
      Terms<C> t[Width];
      terms(team.row, col, t);
#pragma unroll
      for (int j = 0; j < Width; ++j) sum += t[j].q == C(0) ? C(0) : t[j].q * t[j].d;
    });
    return team.reduce(sum, Add());
  }
};

template <class C>
__device__ __forceinline__ C gradient_to_logits(const Terms<C>& t, C mean_of_d) {
  return t.q == C(0) ? C(0) : t.q * (t.d - mean_of_d);
}
template <class C>
__device__ __forceinline__ C gradient_to_prior(const Terms<C>& t) {
  return fabs(t.d) < C(1) ? -t.p * expm1(t.d) : t.p - t.q;
}

// ---- kernels -------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(threads_per_block) noise_kernel(GumbelNoise args) {
  using C = Compute<T>;
  constexpr int size = words_per_block<C>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * threads_per_block + threadIdx.x) * size;
  if (first >= args.count) return;
  C out[size];
  gumbels(args.key, first, out);
#pragma unroll
  for (int j = 0; j < size; ++j) {
    if (first + j < args.count) static_cast<T*>(args.noise)[first + j] = from_compute<T>(out[j]);
  }
}

template <class T, bool Block, int Width>
__device__ __forceinline__ void write_soft(const Team<Block>& team, const Categories& in, const Perturbed<T>& x, T* y) {
  using C = Compute<T>;
  OnlineSums<C> sums;
  for_columns<Width>(team, in.rows, in.cols, [&](int64_t col) {
    C values[Width];
    x.at(team.row * in.cols + col, values);
#pragma unroll
    for (int j = 0; j < Width; ++j) sums.add(values[j], C(0));
  });
  sums.combine(team);
  const C inverse = C(1) / sums.sum;
  for_columns<Width>(team, in.rows, in.cols, [&](int64_t col) {
    C values[Width];
    x.at(team.row * in.cols + col, values);
#pragma unroll
    for (int j = 0; j < Width; ++j) values[j] = exp(values[j] - sums.top) * inverse;
    store(y + team.row * in.cols + col, values);
  });
}

template <class T, bool Block, int Width>
__device__ __forceinline__ void write_one_hot(const Team<Block>& team, const Categories& in, const Perturbed<T>& x,
                                              T* y) {
  using C = Compute<T>;
  Candidate<C> best = {lowest<C>(), in.cols};
  C spoilt = 0;  // 1: an entry is NaN or plus infinity
  for_columns<Width>(team, in.rows, in.cols, [&](int64_t col) {
    C values[Width];
    x.at(team.row * in.cols + col, values);
#pragma unroll
    for (int j = 0; j < Width; ++j) {
      best = Larger()(best, Candidate<C>{values[j], col + j});
      if (!(values[j] < -lowest<C>())) spoilt = 1;
    }
  });
  best = team.reduce(best, Larger());
  spoilt = team.reduce(spoilt, Larger());
  const bool none = spoilt > C(0) || best.value == lowest<C>();
  const C others = none ? static_cast<C>(NAN) : C(0);
  for_columns<Width>(team, in.rows, in.cols, [&](int64_t col) {
    C values[Width];
#pragma unroll
    for (int j = 0; j < Width; ++j) values[j] = !none && col + j == best.col ? C(1) : others;
    store(y + team.row * in.cols + col, values);
  });
}

template <class T, bool HasPrior, bool Block, int Width>
__device__ __forceinline__ void write_kl(const Team<Block>& team, const Categories& in, void* kl) {
  Divergence<T, HasPrior> divergence(in);
  divergence.template measure<Width>(team, in.rows);
  const auto value = divergence.template kl<Width>(team, in.rows);
  if (team.member == 0 && team.row < in.rows) static_cast<Compute<T>*>(kl)[team.row] = value;
}

template <class T, bool HasPrior, bool Block, int Width>
__global__ void __launch_bounds__(threads_per_block) gumbel_softmax_kernel(GumbelSoftmax args, int lanes_per_row) {
  const Team<Block> team(lanes_per_row);
  const Perturbed<T> x = {static_cast<const T*>(args.in.logits), args.key,
                          static_cast<Compute<T>>(1 / args.temperature)};
  T* y = static_cast<T*>(args.y);
  args.hard ? write_one_hot<T, Block, Width>(team, args.in, x, y) : write_soft<T, Block, Width>(team, args.in, x, y);
  if (args.kl != nullptr) write_kl<T, HasPrior, Block, Width>(team, args.in, args.kl);
}

template <class T, bool HasPrior, bool Block, int Width>
__global__ void __launch_bounds__(threads_per_block) kl_kernel(CategoricalKl args, int lanes_per_row) {
  write_kl<T, HasPrior, Block, Width>(Team<Block>(lanes_per_row), args.in, args.kl);
}

// What the divergence adds to the gradients of the sample; without one, nothing.
template <class T, bool HasPrior>
struct DivergenceGradient {
  using C = Compute<T>;
  Divergence<T, HasPrior> divergence;
  C grad = 0, mean = 0;
  T* grad_prior;

  template <int Width, bool Block>
  __device__ __forceinline__ void prepare(const Team<Block>& team, int64_t rows, const void* grads) {
    divergence.template measure<Width>(team, rows);
    mean = divergence.template mean_of_d<Width>(team, rows);
    if (team.row < rows) grad = static_cast<const C*>(grads)[team.row];
  }

  template <int Width>
  __device__ __forceinline__ void add(int64_t row, int64_t col, C (&to_logits)[Width]) const {
    Terms<C> t[Width];
    divergence.terms(row, col, t);
#pragma unroll
    for (int j = 0; j < Width; ++j) to_logits[j] += grad * gradient_to_logits(t[j], mean);
    if (grad_prior == nullptr) return;
    C to_prior[Width];
#pragma unroll
    for (int j = 0; j < Width; ++j) to_prior[j] = grad * gradient_to_prior(t[j]);
    store(grad_prior + row * divergence.cols + col, to_prior);
  }
};

template <class T, bool HasPrior, bool Block, int Width>
__global__ void __launch_bounds__(threads_per_block)
    gumbel_softmax_backward_kernel(GumbelSoftmaxBackward args, int lanes_per_row) {
  using C = Compute<T>;
  const Team<Block> team(lanes_per_row);
  const Categories& in = args.in;
  const T* grad_y = static_cast<const T*>(args.grad_y);
  T* grad_logits = static_cast<T*>(args.grad_logits);
  const C inverse_temperature = static_cast<C>(1 / args.temperature);
  const Perturbed<T> x = {static_cast<const T*>(in.logits), args.key, inverse_temperature};
  DivergenceGradient<T, HasPrior> through_kl = {Divergence<T, HasPrior>(in), 0, 0, static_cast<T*>(args.grad_prior)};
  if (args.grad_kl != nullptr) through_kl.template prepare<Width>(team, in.rows, args.grad_kl);

  OnlineSums<C> sums;
  for_columns<Width>(team, in.rows, in.cols, [&](int64_t col) {
    const int64_t i = team.row * in.cols + col;
    C values[Width], grads[Width];
    x.at(i, values);
    load(grad_y + i, grads);
#pragma unroll
    for (int j = 0; j < Width; ++j) sums.add(values[j], grads[j]);
  });
  sums.combine(team);
  const C inverse = C(1) / sums.sum, mean = sums.weighted * inverse;
  for_columns<Width>(team, in.rows, in.cols, [&](int64_t col) {
    const int64_t i = team.row * in.cols + col;
    C values[Width], grads[Width];
    x.at(i, values);
    load(grad_y + i, grads);
#pragma unroll
    for (int j = 0; j < Width; ++j) {
      values[j] = exp(values[j] - sums.top) * inverse * (grads[j] - mean) * inverse_temperature;
    }
    if (args.grad_kl != nullptr) through_kl.add(team.row, col, values);
    store(grad_logits + i, values);
  });
}

template <class T, bool HasPrior, bool Block, int Width>
__global__ void __launch_bounds__(threads_per_block) kl_backward_kernel(CategoricalKlBackward args, int lanes_per_row) {
  const Team<Block> team(lanes_per_row);
  const Categories& in = args.in;
  T* grad_logits = static_cast<T*>(args.grad_logits);
  DivergenceGradient<T, HasPrior> through_kl = {Divergence<T, HasPrior>(in), 0, 0, static_cast<T*>(args.grad_prior)};
  through_kl.template prepare<Width>(team, in.rows, args.grad);
  for_columns<Width>(team, in.rows, in.cols, [&](int64_t col) {
    Compute<T> values[Width] = {};
    through_kl.add(team.row, col, values);
    store(grad_logits + team.row * in.cols + col, values);
  });
}

template <class T, bool Block, int Width>
__global__ void __launch_bounds__(threads_per_block) softmax_backward_kernel(SoftmaxBackward args, int lanes_per_row) {
  using C = Compute<T>;
  const Team<Block> team(lanes_per_row);
  const T *grad_y = static_cast<const T*>(args.grad_y), *y = static_cast<const T*>(args.y);
  C sum = 0;
  for_columns<Width>(team, args.rows, args.cols, [&](int64_t col) {
    C grads[Width], values[Width];
    load(grad_y + team.row * args.cols + col, grads);
    load(y + team.row * args.cols + col, values);
#pragma unroll
    for (int j = 0; j < Width; ++j) sum += grads[j] * values[j];
  });
  const C mean = team.reduce(sum, Add()), inverse_temperature = static_cast<C>(1 / args.temperature);
  for_columns<Width>(team, args.rows, args.cols, [&](int64_t col) {
    const int64_t i = team.row * args.cols + col;
    C grads[Width], values[Width];
    load(grad_y + i, grads);
    load(y + i, values);
#pragma unroll
    for (int j = 0; j < Width; ++j) values[j] *= (grads[j] - mean) * inverse_temperature;
    store(static_cast<T*>(args.grad_logits) + i, values);
  });
}

// ---- launchers -----------------------------------------------------------------------------------------------------

template <bool Block, int Width>
struct Shape {
  static constexpr bool block = Block;
  static constexpr int width = Width;

  // Lanes of a row, a power of two.
  static int lanes(int64_t cols) {
    int lanes = 1;
    while (lanes < warp_size && lanes * Width < cols) lanes *= 2;
    return lanes;
  }
  static int64_t blocks(int64_t rows, int64_t cols) {
    return Block ? rows : divide_up(rows * lanes(cols), threads_per_block);
  }
};

// Calls f(Shape) for rows of `cols` elements: packs where every access is then aligned; null pointers are.
template <class T, class F, class... Pointers>
void dispatch_shape(int64_t cols, F&& f, Pointers... pointers) {
  constexpr int width = words_per_block<Compute<T>>;
  const uintptr_t bits = (reinterpret_cast<uintptr_t>(pointers) | ...);
  const bool packs = cols % width == 0 && bits % (width * sizeof(T)) == 0;
  if (cols >= wide_row) {
    packs ? f(Shape<true, width>()) : f(Shape<true, 1>());
  } else {
    packs ? f(Shape<false, width>()) : f(Shape<false, 1>());
  }
}

// Calls f<T, HasPrior>() for the dtype and the prior of `in`.
template <class F>
void dispatch(const Categories& in, F&& f) {
  dispatch_dtype(in.dtype, [&]<class T>() {
    in.prior_logits == nullptr ? f.template operator()<T, false>() : f.template operator()<T, true>();
  });
}

}  // namespace

void categorical_noise(const GumbelNoise& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const int64_t threads = divide_up(args.count, words_per_block<Compute<T>>);
    launch("gumbel_noise", noise_kernel<T>, divide_up(threads, threads_per_block), threads_per_block, 0, stream, args);
  });
}

void categorical_gumbel_softmax(const GumbelSoftmax& args, void* stream) {
  dispatch(args.in, [&]<class T, bool HasPrior>() {
    const auto run = [&](auto shape) {
      using S = decltype(shape);
      launch("gumbel_softmax", gumbel_softmax_kernel<T, HasPrior, S::block, S::width>,
             S::blocks(args.in.rows, args.in.cols), threads_per_block, 0, stream, args, S::lanes(args.in.cols));
    };
    dispatch_shape<T>(args.in.cols, run, args.in.logits, args.in.prior_logits, args.y);
  });
}

void categorical_gumbel_softmax_backward(const GumbelSoftmaxBackward& args, void* stream) {
  dispatch(args.in, [&]<class T, bool HasPrior>() {
    const auto run = [&](auto shape) {
      using S = decltype(shape);
      launch("gumbel_softmax_backward", gumbel_softmax_backward_kernel<T, HasPrior, S::block, S::width>,
             S::blocks(args.in.rows, args.in.cols), threads_per_block, 0, stream, args, S::lanes(args.in.cols));
    };
    dispatch_shape<T>(args.in.cols, run, args.in.logits, args.in.prior_logits, args.grad_y, args.grad_logits,
                      args.grad_prior);
  });
}

void categorical_softmax_backward(const SoftmaxBackward& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const auto run = [&](auto shape) {
      using S = decltype(shape);
      launch("softmax_backward", softmax_backward_kernel<T, S::block, S::width>, S::blocks(args.rows, args.cols),
             threads_per_block, 0, stream, args, S::lanes(args.cols));
    };
    dispatch_shape<T>(args.cols, run, args.grad_y, args.y, args.grad_logits);
  });
}

void categorical_kl(const CategoricalKl& args, void* stream) {
  dispatch(args.in, [&]<class T, bool HasPrior>() {
    const auto run = [&](auto shape) {
      using S = decltype(shape);
      launch("categorical_kl", kl_kernel<T, HasPrior, S::block, S::width>, S::blocks(args.in.rows, args.in.cols),
             threads_per_block, 0, stream, args, S::lanes(args.in.cols));
    };
    dispatch_shape<T>(args.in.cols, run, args.in.logits, args.in.prior_logits);
  });
}

void categorical_kl_backward(const CategoricalKlBackward& args, void* stream) {
  dispatch(args.in, [&]<class T, bool HasPrior>() {
    const auto run = [&](auto shape) {
      using S = decltype(shape);
      launch("categorical_kl_backward", kl_backward_kernel<T, HasPrior, S::block, S::width>,
             S::blocks(args.in.rows, args.in.cols), threads_per_block, 0, stream, args, S::lanes(args.in.cols));
    };
    dispatch_shape<T>(args.in.cols, run, args.in.logits, args.in.prior_logits, args.grad_logits, args.grad_prior);
  });
}

}  // namespace isthmus::cuda
