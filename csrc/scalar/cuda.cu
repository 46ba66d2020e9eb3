// Quantizers without a codebook table on CUDA: one thread a row (rows.cuh), signs and sampled bits in bits.cuh, scalar
// codebooks in latent.cuh, stages of finite scalars in residual.cuh, single ones and storage here. What is computed
// stands in the .inl files of the CPU.

#include <cmath>
#include <cstdio>

#include "scalar/bits.cuh"
#include "scalar/latent.cuh"
#include "scalar/residual.cuh"

namespace isthmus::cuda {
namespace {

// ---- finite scalars ------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(rows_per_block) fsq_kernel(FsqQuantize args) {
  using C = Compute<T>;
  const int64_t row = own_row(), first = row * args.levels.dims;
  if (row >= args.rows) return;
  const bool out = excluded(args.mask, row), noisy = args.key != nullptr;
  const int64_t none[2] = {0, 0};
  Uniforms<C> noise(noisy ? args.key : none);
  const C dropout = static_cast<C>(args.noise_dropout);
  int64_t index = 0, stride = 1;
  for (int d = 0; d < args.levels.dims; ++d) {
    const Grid& grid = args.grid[d];
    const C t = to_compute(static_cast<const T*>(args.x)[first + d]) + static_cast<C>(grid.shift);
    const C u =
        static_cast<C>(grid.half) * (args.hard_clamp ? clamped(t, C(1)) : tanh(t)) - static_cast<C>(grid.offset);
    const C rounded = rint(u);
    C value = rounded;
    if (noisy) {
      const C word = noise.at(first + d);
      if (word <= dropout) value = u + (word / dropout - C(0.5));
    }
    value = (value + static_cast<C>(grid.centre)) / static_cast<C>(grid.width);
    static_cast<T*>(args.quantized)[first + d] = from_compute<T>(out ? C(0) : value);
    if (rounded == rounded) index += stride * (static_cast<int64_t>(rounded) + args.levels.size[d] / 2);
    stride *= args.levels.size[d];
  }
  args.indices[row] = out ? -1 : index;
}

template <class T>
__global__ void __launch_bounds__(rows_per_block) fsq_backward_kernel(FsqBackward args) {
  using C = Compute<T>;
  const int64_t row = own_row(), first = row * args.levels.dims;
  if (row >= args.rows) return;
  const bool out = excluded(args.mask, row);
  for (int d = 0; d < args.levels.dims; ++d) {
    const Grid& grid = args.grid[d];
    const C t = to_compute(static_cast<const T*>(args.x)[first + d]) + static_cast<C>(grid.shift), s = tanh(t);
    const C squash = args.hard_clamp ? C(t >= C(-1) && t <= C(1)) : C(1) - s * s;
    const C slope = static_cast<C>(grid.half / grid.width) * squash;
    const C grad = to_compute(static_cast<const T*>(args.grad)[first + d]);
    static_cast<T*>(args.grad_x)[first + d] = from_compute<T>(out ? C(0) : slope * grad);
  }
}

template <class T>
__global__ void __launch_bounds__(rows_per_block) fsq_decode_kernel(FsqDecode args, uint64_t codes) {
  using C = Compute<T>;
  const int64_t row = own_row();
  if (row >= args.rows) return;
  const int64_t index = args.indices[row];
  check_index(index, -1, codes);
  T* out = static_cast<T*>(args.out) + row * args.levels.dims;
  each_digit(args.levels, args.first_highest, index < 0 ? 0 : index, [&](int d, int64_t digit) {
    const Grid& grid = args.grid[d];
    const C rounded = static_cast<C>(digit - args.levels.size[d] / 2);
    const C value = (rounded + static_cast<C>(grid.centre)) / static_cast<C>(grid.width);
    out[d] = from_compute<T>(index < 0 ? C(0) : static_cast<C>(args.scale) * value);
  });
}

// ---- storage -------------------------------------------------------------------------------------------------------

constexpr int storage_threads = 256;

__device__ __forceinline__ int64_t own_item() {
  return static_cast<int64_t>(blockIdx.x) * storage_threads + threadIdx.x;
}

// A thread makes one byte of the indices that reach into it.
__global__ void __launch_bounds__(storage_threads) pack_kernel(PackBits args) {
  const int64_t item = own_item(), bytes = args.row_bytes();
  if (item >= args.rows * bytes) return;
  const int64_t *row = args.indices + item / bytes * args.length, begin = item % bytes * 8;
  uint32_t byte = 0;
  for (int64_t i = begin / args.width; i < args.length && i * args.width < begin + 8; ++i) {
    check_index(row[i], 0, uint64_t{1} << args.width);
    const int64_t shift = i * args.width - begin;
    const uint64_t index = static_cast<uint64_t>(row[i]);
    byte |= static_cast<uint32_t>(shift < 0 ? index >> -shift : index << shift);
  }
  args.packed[item] = static_cast<uint8_t>(byte);
}

__global__ void __launch_bounds__(storage_threads) unpack_kernel(UnpackBits args) {
  const int64_t item = own_item();
  if (item >= args.rows * args.length) return;
  const uint8_t* row = args.packed + item / args.length * args.row_bytes();
  const int64_t begin = item % args.length * args.width, end = begin + args.width;
  uint64_t index = 0;
  for (int64_t byte = begin / 8; byte * 8 < end; ++byte) {
    const int64_t shift = byte * 8 - begin;
    index |= shift < 0 ? static_cast<uint64_t>(row[byte]) >> -shift : static_cast<uint64_t>(row[byte]) << shift;
  }
  args.indices[item] = static_cast<int64_t>(index & ((uint64_t{1} << args.width) - 1));
}

template <class To>
__global__ void __launch_bounds__(storage_threads) narrow_kernel(Narrow args) {
  const int64_t item = own_item();
  if (item >= args.count) return;
  check_index(args.indices[item], 0, static_cast<uint64_t>(args.num_codes));
  static_cast<To*>(args.out)[item] = static_cast<To>(args.indices[item]);
}

template <class Kernel, class Args>
void launch_items(const char* name, Kernel kernel, int64_t items, void* stream, const Args& args) {
  launch(name, kernel, divide_up(items, storage_threads), storage_threads, 0, stream, args);
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

void scalar_fsq_quantize(const FsqQuantize& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() { launch_rows("fsq_quantize", fsq_kernel<T>, args.rows, stream, args); });
}

void scalar_fsq_backward(const FsqBackward& args, void* stream) {
  dispatch_dtype(args.dtype,
                 [&]<class T>() { launch_rows("fsq_backward", fsq_backward_kernel<T>, args.rows, stream, args); });
}

void scalar_residual_fsq_quantize(const ResidualFsqQuantize& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    launch_rows("residual_fsq_quantize", residual_fsq_kernel<T>, args.rows, stream, args);
  });
}

void scalar_residual_fsq_backward(const ResidualFsqBackward& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    launch_rows("residual_fsq_backward", residual_fsq_backward_kernel<T>, args.rows, stream, args);
  });
}

void scalar_fsq_decode(const FsqDecode& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    launch_rows("fsq_decode", fsq_decode_kernel<T>, args.rows, stream, args, codes_of(args.levels));
  });
}

int64_t lfq_workspace(int64_t rows, int64_t columns) { return divide_up(rows, rows_per_block) * columns; }

void scalar_lfq_quantize(const LfqQuantize& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    const bool counted = args.bit_counts != nullptr;
    const int64_t columns = args.codebooks * args.bits;
    launch_codebooks("lfq_quantize", lfq_kernel<T>,
                     counted ? static_cast<size_t>(rows_per_block * args.bits) * sizeof(C) : 0, stream, args);
    if (!counted) return;
    launch("bit_counts", sum_blocks<C>, columns, rows_per_block, 0, stream, static_cast<const double*>(args.workspace),
           divide_up(args.rows, rows_per_block), columns, static_cast<C*>(args.bit_counts));
  });
}

void scalar_lfq_backward(const LfqBackward& args, void* stream) {
  dispatch_dtype(args.dtype,
                 [&]<class T>() { launch_codebooks("lfq_backward", lfq_backward_kernel<T>, 0, stream, args); });
}

int64_t latent_workspace(int64_t rows, int64_t dims, int64_t entries) {
  return SumBlocks(rows, dims, entries).count * entries;
}

void scalar_latent_quantize(const LatentQuantize& args, void* stream) {
  dispatch_dtype(args.dtype,
                 [&]<class T>() { launch_rows("latent_quantize", latent_kernel<T>, args.rows, stream, args); });
}

void scalar_latent_backward(const LatentBackward& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    if (args.grad_codebooks == nullptr) {
      launch_rows("latent_backward", latent_backward_kernel<T>, args.rows, stream, args);
      return;
    }
    const int64_t entries = args.levels.total();
    const SumBlocks blocks(args.rows, args.levels.dims, entries);
    launch("latent_backward", latent_sums_kernel<T>, blocks.count, rows_per_block,
           digit_memory<Compute<T>>(args.levels.dims), stream, args, blocks.rows);
    launch("latent_sums", sum_blocks<T>, entries, rows_per_block, 0, stream, static_cast<const double*>(args.workspace),
           blocks.count, entries, static_cast<T*>(args.grad_codebooks));
  });
}

void scalar_latent_decode(const LatentDecode& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    launch_rows("latent_decode", latent_decode_kernel<T>, args.rows, stream, args, codes_of(args.levels));
  });
}

void scalar_latent_decode_backward(const LatentDecodeBackward& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const int64_t entries = args.levels.total();
    const SumBlocks blocks(args.rows, args.levels.dims, entries);
    launch("latent_decode_backward", latent_decode_sums_kernel<T>, blocks.count, rows_per_block,
           digit_memory<Compute<T>>(args.levels.dims), stream, args, blocks.rows, codes_of(args.levels));
    launch("latent_sums", sum_blocks<T>, entries, rows_per_block, 0, stream, static_cast<const double*>(args.workspace),
           blocks.count, entries, static_cast<T*>(args.grad_codebooks));
  });
}

void scalar_binary_map(const BinaryMap& args, void* stream) {
  dispatch_dtype(args.dtype,
                 [&]<class T>() { launch_rows("binary_map", binary_map_kernel<T>, args.rows, stream, args); });
}

void scalar_binary_map_backward(const BinaryMapBackward& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    launch_rows("binary_map_backward", binary_map_backward_kernel<T>, args.rows, stream, args);
  });
}

void scalar_pack_bits(const PackBits& args, void* stream) {
  launch_items("pack_bits", pack_kernel, args.rows * args.row_bytes(), stream, args);
}

void scalar_unpack_bits(const UnpackBits& args, void* stream) {
  launch_items("unpack_bits", unpack_kernel, args.rows * args.length, stream, args);
}

void scalar_narrow(const Narrow& args, void* stream) {
  switch (args.bytes) {
    case 1:
      return launch_items("narrow", narrow_kernel<uint8_t>, args.count, stream, args);
    case 2:
      return launch_items("narrow", narrow_kernel<int16_t>, args.count, stream, args);
    case 4:
      return launch_items("narrow", narrow_kernel<int32_t>, args.count, stream, args);
    default:
      return launch_items("narrow", narrow_kernel<int64_t>, args.count, stream, args);
  }
}

}  // namespace isthmus::cuda
