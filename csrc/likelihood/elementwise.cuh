// Row sums of a density that is evaluated element by element, and its gradients, on CUDA devices.
//
// A row is cut into segments of at most 2048 columns. A segment belongs to a group of 1 to 32 neighbouring lanes of a
// warp, few for narrow rows, so that short rows leave no lanes idle and long ones have many loads of 16 bytes in
// flight. The lanes' sums are added by shuffles; a second kernel adds the segments of a row. Backward uses the same cut
// and writes all gradients in one pass; the gradient of an argument of one element is summed by block, then over the
// blocks. All orders are fixed by the shape: results are bitwise repeatable.
#pragma once

#include "core/launch.cuh"
#include "likelihood/kernels.h"

namespace isthmus::cuda {
namespace {

constexpr int threads_per_block = 256;
constexpr int64_t segment_columns = 2048;

struct Segments {
  int64_t cols, per_row, count;
  int group;  // lanes of one segment, a power of two

  Segments(int64_t rows, int64_t cols_, int pack)
      : cols(cols_), per_row(cols > segment_columns ? divide_up(cols, segment_columns) : 1), count(rows * per_row) {
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

template <class T, class Density>
struct Arguments {
  using C = Compute<T>;
  static constexpr int count = Density::arguments;

  const T* elements[count];  // null: shared
  const C* shared[count];    // null with elements: the constant 1

  explicit Arguments(const Argument* in) {
    for (int k = 0; k < count; ++k) {
      elements[k] = in[k].shared ? nullptr : static_cast<const T*>(in[k].data);
      shared[k] = in[k].shared ? static_cast<const C*>(in[k].data) : nullptr;
    }
  }
};

// The arguments of N neighbouring elements.
template <class T, class Density, int N>
struct Loaded {
  using C = Compute<T>;
  C values[Density::arguments][N];

  __device__ __forceinline__ Loaded(const Arguments<T, Density>& arguments, int64_t i) {
#pragma unroll
    for (int k = 0; k < Density::arguments; ++k) {
      if (arguments.elements[k] != nullptr) {
        const auto pack = *reinterpret_cast<const Pack<T, N>*>(arguments.elements[k] + i);
#pragma unroll
        for (int j = 0; j < N; ++j) values[k][j] = to_compute(pack.values[j]);
      } else {
        const C one = arguments.shared[k] != nullptr ? *arguments.shared[k] : C(1);
#pragma unroll
        for (int j = 0; j < N; ++j) values[k][j] = one;
      }
    }
  }

  __device__ __forceinline__ void at(int j, C (&in)[Density::arguments]) const {
#pragma unroll
    for (int k = 0; k < Density::arguments; ++k) in[k] = values[k][j];
  }
};

template <class T, class Density, int N>
__global__ void __launch_bounds__(threads_per_block)
    sum_segments(Density density, Arguments<T, Density> arguments, Segments segments, Compute<T> weight,
                 Compute<T>* sums) {
  using C = Compute<T>;
  const Lane lane(segments, N);
  C sum = 0;
  for (int64_t i = lane.first; i < lane.end; i += lane.step) {
    const Loaded<T, Density, N> loaded(arguments, i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      C in[Density::arguments];
      loaded.at(j, in);
      sum += density.nll(in);
    }
  }
  // Every lane of the warp takes part, those without a segment too.
  for (int offset = segments.group / 2; offset > 0; offset /= 2) {
    sum += __shfl_down_sync(0xffffffffu, sum, offset, segments.group);
  }
  if (lane.leads) sums[lane.segment] = weight * sum;
}

// sums[blockIdx.x] = Σ of the parts of one block, which begin `stride` apart.
template <class C>
__global__ void __launch_bounds__(threads_per_block)
    sum_parts(const C* partial, int64_t parts, int64_t stride, C* sums) {
  const C* own = partial + static_cast<int64_t>(blockIdx.x) * stride;
  C sum = 0;
  for (int64_t i = threadIdx.x; i < parts; i += threads_per_block) sum += own[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <class T, class Density>
struct Gradients {
  T* elements[Density::gradients];       // null: shared, or not wanted
  Compute<T>* sums[Density::gradients];  // [blocks], of a shared argument; null: elementwise, or not wanted
};

template <class T, class Density, int N>
__global__ void __launch_bounds__(threads_per_block)
    write_gradients(Density density, Arguments<T, Density> arguments, Segments segments, Compute<T> weight,
                    const Compute<T>* grad, Gradients<T, Density> out) {
  using C = Compute<T>;
  const Lane lane(segments, N);
  const C g = lane.first < lane.end ? weight * grad[lane.row] : C(0);
  C sums[Density::gradients] = {};
  for (int64_t i = lane.first; i < lane.end; i += lane.step) {
    const Loaded<T, Density, N> loaded(arguments, i);
    Pack<T, N> packs[Density::gradients];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      C in[Density::arguments], slopes[Density::gradients];
      loaded.at(j, in);
      density.gradient(in, slopes);
#pragma unroll
      for (int k = 0; k < Density::gradients; ++k) {
        packs[k].values[j] = from_compute<T>(g * slopes[k]);
        sums[k] += g * slopes[k];
      }
    }
#pragma unroll
    for (int k = 0; k < Density::gradients; ++k) {
      if (out.elements[k] != nullptr) *reinterpret_cast<Pack<T, N>*>(out.elements[k] + i) = packs[k];
    }
  }
#pragma unroll
  for (int k = 0; k < Density::gradients; ++k) {
    if (out.sums[k] == nullptr) continue;  // the same choice in every thread
    const C sum = block_sum(sums[k]);
    if (threadIdx.x == 0) out.sums[k][blockIdx.x] = sum;
  }
}

// Calls run<N>() for the widest pack that fits: every row of every argument begins at a multiple of 16 bytes.
template <class T, class Args, class Run>
void with_widest_pack(const Args& args, void* const* out, Run&& run) {
  constexpr int pack = 16 / sizeof(T);
  bool aligned = args.cols % pack == 0;
  for (int k = 0; k < Nll::max_arguments; ++k) {
    const auto address = args.in[k].shared ? 0 : reinterpret_cast<uintptr_t>(args.in[k].data);
    const auto to = out == nullptr || args.in[k].shared ? 0 : reinterpret_cast<uintptr_t>(out[k]);
    aligned = aligned && address % 16 == 0 && to % 16 == 0;
  }
  aligned ? run.template operator()<pack>() : run.template operator()<1>();
}

template <class T, class Density>
void sum_nll(const char* name, const Nll& args, const Density& density, void* stream) {
  using C = Compute<T>;
  with_widest_pack<T>(args, nullptr, [&]<int N>() {
    const Segments segments(args.rows, args.cols, N);
    const bool split = segments.per_row > 1;
    C* nll = static_cast<C*>(args.nll);
    C* partial = split ? static_cast<C*>(args.workspace) : nll;
    launch(name, sum_segments<T, Density, N>, segments.blocks(), threads_per_block, 0, stream, density,
           Arguments<T, Density>(args.in), segments, static_cast<C>(args.weight), partial);
    if (!split) return;
    launch(name, sum_parts<C>, args.rows, threads_per_block, 0, stream, static_cast<const C*>(partial),
           segments.per_row, segments.per_row, nll);
  });
}

template <class T, class Density>
void write_nll_gradients(const char* name, const NllBackward& args, const Density& density, void* stream) {
  using C = Compute<T>;
  with_widest_pack<T>(args, args.out, [&]<int N>() {
    const Segments segments(args.rows, args.cols, N);
    C* partial = static_cast<C*>(args.workspace);
    Gradients<T, Density> out;
    for (int k = 0; k < Density::gradients; ++k) {
      const bool shared = args.in[k].shared;
      out.elements[k] = shared ? nullptr : static_cast<T*>(args.out[k]);
      out.sums[k] = shared && args.out[k] != nullptr ? partial + k * segments.blocks() : nullptr;
    }
    launch(name, write_gradients<T, Density, N>, segments.blocks(), threads_per_block, 0, stream, density,
           Arguments<T, Density>(args.in), segments, static_cast<C>(args.weight), static_cast<const C*>(args.grad),
           out);
    for (int k = 0; k < Density::gradients; ++k) {
      if (!args.in[k].shared || args.out[k] == nullptr) continue;
      launch(name, sum_parts<C>, 1, threads_per_block, 0, stream,
             static_cast<const C*>(partial) + k * segments.blocks(), segments.blocks(), int64_t(0),
             static_cast<C*>(args.out[k]));
    }
  });
}

}  // namespace
}  // namespace isthmus::cuda
