// Divergences between Gaussians on CUDA devices.
//
// A row is cut into segments of at most 2048 columns. A segment belongs to a group of 1 to 32 neighbouring lanes of a
// warp, few for narrow rows, so that short rows leave no lanes idle and long ones have many loads of 16 bytes in
// flight. The lanes' sums are added by shuffles; a second kernel adds the segments of a row. All orders are fixed by
// the shape: results are bitwise repeatable. Backward uses the same cut and writes all gradients in one pass.

#include "core/launch.cuh"
#include "core/normal.cuh"
#include "divergence/kernels.h"

namespace isthmus::cuda {
namespace {

constexpr int threads_per_block = 256;
constexpr int64_t segment_columns = 2048;

int64_t segments_per_row(int64_t cols) { return cols > segment_columns ? divide_up(cols, segment_columns) : 1; }

struct Segments {
  int64_t cols, per_row, count;
  int group;  // lanes of one segment, a power of two

  Segments(int64_t rows, int64_t cols_, int pack) : cols(cols_), per_row(segments_per_row(cols)) {
    count = rows * per_row;
    for (group = 1; group < warp_size && group * pack < cols; group *= 2) {
    }
  }

  int64_t blocks() const { return divide_up(count * group, threads_per_block); }
};

// The part of a segment that one lane of its group works on: elements first, first + step, … below end.
struct Lane {
  int64_t segment, row, first, end, step;
  bool leads;  // lane 0 of its group

  __device__ __forceinline__ Lane(const Segments& segments, int pack) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * threads_per_block + threadIdx.x;
    const int lane = static_cast<int>(thread % segments.group);
    segment = thread / segments.group;
    row = segment / segments.per_row;
    const int64_t begin = segment % segments.per_row * segment_columns;
    const int64_t left = segments.cols - begin;
    first = row * segments.cols + begin + lane * pack;
    end = segment < segments.count ? row * segments.cols + begin + (left < segment_columns ? left : segment_columns)
                                   : first;  // beyond the last segment: no work
    step = segments.group * pack;
    leads = lane == 0 && segment < segments.count;
  }
};

enum class Prior { standard, shared, elementwise };

template <class T, Prior P>
struct Operands {
  const T *mean, *scale, *prior_mean, *prior_scale;

  template <class Args>
  explicit Operands(const Args& args)
      : mean(static_cast<const T*>(args.mean)),
        scale(static_cast<const T*>(args.scale)),
        prior_mean(static_cast<const T*>(args.prior_mean)),
        prior_scale(static_cast<const T*>(args.prior_scale)) {}
};

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <int N, class T>
__device__ __forceinline__ void store(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// The operands of N neighbouring elements.
template <class T, Prior P, int N>
struct Loaded {
  Pack<T, N> mean, scale, prior_mean, prior_scale;

  __device__ __forceinline__ Loaded(const Operands<T, P>& in, int64_t i)
      : mean(load<N>(in.mean + i)), scale(load<N>(in.scale + i)) {
    if constexpr (P == Prior::elementwise) {
      prior_mean = load<N>(in.prior_mean + i);
      prior_scale = load<N>(in.prior_scale + i);
    }
    if constexpr (P == Prior::shared) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        prior_mean.values[j] = *in.prior_mean;
        prior_scale.values[j] = *in.prior_scale;
      }
    }
  }

  template <ScaleType S>
  __device__ __forceinline__ Compute<T> kl(int j) const {
    const auto m = to_compute(mean.values[j]), s = to_compute(scale.values[j]);
    if constexpr (P == Prior::standard) {
      return kl_to_standard<S>(m, s);
    } else {
      return kl_to_prior<S>(m, s, to_compute(prior_mean.values[j]), to_compute(prior_scale.values[j]));
    }
  }

  template <ScaleType S>
  __device__ __forceinline__ KlGradient<Compute<T>> gradient(int j) const {
    const auto m = to_compute(mean.values[j]), s = to_compute(scale.values[j]);
    if constexpr (P == Prior::standard) {
      return kl_to_standard_gradient<S>(m, s);
    } else {
      return kl_to_prior_gradient<S>(m, s, to_compute(prior_mean.values[j]), to_compute(prior_scale.values[j]));
    }
  }
};

template <class T, ScaleType S, Prior P, int N>
__global__ void __launch_bounds__(threads_per_block)
    sum_segments(Operands<T, P> in, Segments segments, Compute<T> weight, Compute<T>* sums) {
  const Lane lane(segments, N);
  Compute<T> sum = 0;
  for (int64_t i = lane.first; i < lane.end; i += lane.step) {
    const Loaded<T, P, N> loaded(in, i);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += loaded.template kl<S>(j);
  }
  // Every lane of the warp takes part, those without a segment too.
  for (int offset = segments.group / 2; offset > 0; offset /= 2) {
    sum += __shfl_down_sync(0xffffffffu, sum, offset, segments.group);
  }
  if (lane.leads) sums[lane.segment] = weight * sum;
}

// One block per row.
template <class C>
__global__ void __launch_bounds__(threads_per_block) sum_rows(const C* partial, int64_t per_row, C* sums) {
  const C* row = partial + static_cast<int64_t>(blockIdx.x) * per_row;
  C sum = 0;
  for (int64_t i = threadIdx.x; i < per_row; i += threads_per_block) sum += row[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <class T>
struct Gradients {
  T *mean, *scale, *prior_mean, *prior_scale;
};

template <class T, ScaleType S, Prior P, int N>
__global__ void __launch_bounds__(threads_per_block)
    write_gradients(Operands<T, P> in, Segments segments, Compute<T> weight, const Compute<T>* grad, Gradients<T> out) {
  const Lane lane(segments, N);
  if (lane.first >= lane.end) return;
  const Compute<T> g = weight * grad[lane.row];
  for (int64_t i = lane.first; i < lane.end; i += lane.step) {
    const Loaded<T, P, N> loaded(in, i);
    Pack<T, N> to_mean, to_scale, to_prior_mean, to_prior_scale;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const auto kl = loaded.template gradient<S>(j);
      to_mean.values[j] = from_compute<T>(g * kl.mean);
      to_scale.values[j] = from_compute<T>(g * kl.scale);
      to_prior_mean.values[j] = from_compute<T>(g * kl.prior_mean);
      to_prior_scale.values[j] = from_compute<T>(g * kl.prior_scale);
    }
    store(out.mean + i, to_mean);
    store(out.scale + i, to_scale);
    if constexpr (P != Prior::standard) {
      store(out.prior_mean + i, to_prior_mean);
      store(out.prior_scale + i, to_prior_scale);
    }
  }
}

// Packs need every row to begin at a multiple of 16 bytes. Null pointers do.
template <int N, class... Pointers>
bool rows_aligned(int64_t cols, Pointers... pointers) {
  return cols % N == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Calls f<T, S, P>() for the dtype, the scale type and the prior of `args`.
template <class Args, class F>
void dispatch(const Args& args, F&& f) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    dispatch_scale(args.scale_type, [&]<ScaleType S>() {
      if (args.prior_mean == nullptr) return f.template operator()<T, S, Prior::standard>();
      if (args.shared_prior) return f.template operator()<T, S, Prior::shared>();
      f.template operator()<T, S, Prior::elementwise>();
    });
  });
}

template <class T>
constexpr int widest_pack = 16 / sizeof(T);

// A shared prior is read one element at a time: its address does not matter.
template <class Args>
const void* packed_prior(const Args& args, const void* prior) {
  return args.shared_prior ? nullptr : prior;
}

}  // namespace

int64_t gaussian_kl_workspace(int64_t rows, int64_t cols) {
  const int64_t per_row = segments_per_row(cols);
  return per_row > 1 ? rows * per_row : 0;
}

void divergence_gaussian_kl(const GaussianKl& args, void* stream) {
  dispatch(args, [&]<class T, ScaleType S, Prior P>() {
    using C = Compute<T>;
    C* kl = static_cast<C*>(args.kl);
    const bool split = segments_per_row(args.cols) > 1;
    C* partial = split ? static_cast<C*>(args.workspace) : kl;
    const auto run = [&]<int N>() {
      const Segments segments(args.rows, args.cols, N);
      launch("gaussian_kl", sum_segments<T, S, P, N>, segments.blocks(), threads_per_block, 0, stream,
             Operands<T, P>(args), segments, static_cast<C>(args.weight), partial);
      if (split) {
        launch("gaussian_kl row sums", sum_rows<C>, args.rows, threads_per_block, 0, stream,
               static_cast<const C*>(partial), segments.per_row, kl);
      }
    };
    constexpr int pack = widest_pack<T>;
    const bool aligned = rows_aligned<pack>(args.cols, args.mean, args.scale, packed_prior(args, args.prior_mean),
                                            packed_prior(args, args.prior_scale));
    aligned ? run.template operator()<pack>() : run.template operator()<1>();
  });
}

void divergence_gaussian_kl_backward(const GaussianKlBackward& args, void* stream) {
  dispatch(args, [&]<class T, ScaleType S, Prior P>() {
    using C = Compute<T>;
    const Gradients<T> out{static_cast<T*>(args.grad_mean), static_cast<T*>(args.grad_scale),
                           static_cast<T*>(args.grad_prior_mean), static_cast<T*>(args.grad_prior_scale)};
    const auto run = [&]<int N>() {
      const Segments segments(args.rows, args.cols, N);
      launch("gaussian_kl_backward", write_gradients<T, S, P, N>, segments.blocks(), threads_per_block, 0, stream,
             Operands<T, P>(args), segments, static_cast<C>(args.weight), static_cast<const C*>(args.grad), out);
    };
    constexpr int pack = widest_pack<T>;
    const bool aligned =
        rows_aligned<pack>(args.cols, args.mean, args.scale, packed_prior(args, args.prior_mean),
                           packed_prior(args, args.prior_scale), out.mean, out.scale, out.prior_mean, out.prior_scale);
    aligned ? run.template operator()<pack>() : run.template operator()<1>();
  });
}

}  // namespace isthmus::cuda
