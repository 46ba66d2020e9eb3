// Decoding: a block makes a row of the result, a thread some packs of its columns.
#pragma once

#include "sparse/code.cuh"

namespace isthmus::cuda {
namespace {

constexpr int gathered_at_once = 8;  // rows of the weight matrix on their way to a thread

template <class T, int N>
__global__ void __launch_bounds__(block_threads) decode_kernel(SparseDecode args) {
  using C = Compute<T>;
  const int64_t row = blockIdx.x, first = first_entry(args.code, row), last = first_entry(args.code, row + 1);
  const T *values = static_cast<const T*>(args.values), *weight = static_cast<const T*>(args.weight);
  C distance = 0;
  for (int64_t col = threadIdx.x * N; col < args.cols; col += static_cast<int64_t>(blockDim.x) * N) {
    C sum[N] = {};
    if (args.bias != nullptr) {
      const auto bias = load_pack<T, N>(static_cast<const T*>(args.bias) + col);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] = to_compute(bias.values[i]);
    }
    for (int64_t e = first; e < last; e += gathered_at_once) {
      C coefficients[gathered_at_once];
      Pack<T, N> directions[gathered_at_once];
#pragma unroll
      for (int g = 0; g < gathered_at_once; ++g) {
        const int64_t latent = e + g < last ? __ldg(args.code.indices + e + g) : -1;
        coefficients[g] = 0;
        directions[g] = {};
        if (latent >= 0) {
          coefficients[g] = to_compute(__ldg(values + e + g));
          directions[g] = load_pack<T, N>(weight + latent * args.cols + col);
        }
      }
#pragma unroll
      for (int g = 0; g < gathered_at_once; ++g) {
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] += coefficients[g] * to_compute(directions[g].values[i]);
      }
    }
    store(static_cast<T*>(args.out) + row * args.cols + col, sum);
    if (args.target == nullptr) continue;
    const auto target = load_pack<T, N>(static_cast<const T*>(args.target) + row * args.cols + col);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const C error = to_compute(target.values[i]) - sum[i];
      distance += error * error;
    }
  }
  if (args.target == nullptr) return;
  distance = block_sum(distance);
  if (threadIdx.x == 0) static_cast<C*>(args.squared_error)[row] = distance;
}

template <class T>
void decode_rows(const SparseDecode& args, void* stream) {
  dispatch_pack<T>(
      args.cols,
      [&]<int N>() {
        launch("sparse_decode", decode_kernel<T, N>, args.code.rows, threads_for(args.cols / N, block_threads), 0,
               stream, args);
      },
      args.weight, args.bias, args.target, args.out);
}

inline void decode(const SparseDecode& args, void* stream) {
  check_code(args.code, args.features, stream);
  dispatch_dtype(args.dtype, [&]<class T>() { decode_rows<T>(args, stream); });
}

}  // namespace
}  // namespace isthmus::cuda
