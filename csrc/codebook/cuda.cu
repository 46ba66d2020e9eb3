// Vector quantization on CUDA devices; what is computed stands in cpu.inl.
//
// Search is a matrix product whose result stays in registers (core/product.cuh): a block multiplies 128 rows of x with
// one tile of 128 codes after the other, and each thread remembers the best score and code of its rows. The 16 threads
// that share a row meet once, by shuffles. Few rows do not fill the device: then the codebook is cut into ranges that
// different blocks search, and the winners of the ranges are compared in order.
//
// Arithmetic bounds it: 2·N·K·D operations on the FMA units; half types are widened, so every answer is the float32
// answer. Memory: O(N + K) beside inputs and outputs.
//
// Backward and statistics are sums over the rows of each code (core/sort.cuh), bound by memory.

#include "codebook/kernels.h"
#include "core/product.cuh"
#include "core/sort.cuh"

namespace isthmus::cuda {
namespace {

// ---- search --------------------------------------------------------------------------------------------------------

template <class C>
__device__ constexpr C infinity() {
  return static_cast<C>(__builtin_huge_val());
}

// How a search is cut into blocks, and its scratch memory. Depends on the problem alone.
template <class C>
struct SearchPlan {
  int64_t row_tiles, tiles_per_range, ranges;
  C* half_norms;  // [codes]: |c|²/2
  C* scores;      // [ranges, rows]: the best score in each range of codes
  int* winners;   // [ranges, rows]: whose it is

  SearchPlan(const CodeSearch& args, Arena& arena) {
    constexpr int64_t enough_blocks = 512;  // two for each multiprocessor of the largest devices
    const int64_t code_tiles = divide_up(args.codes, tile_size<C>);
    row_tiles = divide_up(args.rows, tile_size<C>);
    const int64_t wanted = row_tiles == 0 ? 1 : divide_up(enough_blocks, row_tiles);
    tiles_per_range = divide_up(code_tiles, wanted < code_tiles ? wanted : code_tiles);
    ranges = divide_up(code_tiles, tiles_per_range);
    half_norms = arena.take<C>(args.codes);
    scores = arena.take<C>(ranges * args.rows);
    winners = arena.take<int>(ranges * args.rows);
  }
};

template <class T>
__global__ void __launch_bounds__(block_threads) half_norms_kernel(CodeSearch args, Compute<T>* half_norms) {
  const int64_t code = (static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x) / warp_size;
  if (code >= args.codes) return;
  const T* c = static_cast<const T*>(args.codebook) + code * args.dim;
  Compute<T> sum = 0;
  for (int64_t k = threadIdx.x % warp_size; k < args.dim; k += warp_size) sum += to_compute(c[k]) * to_compute(c[k]);
  sum = warp_sum(sum);
  if (threadIdx.x % warp_size == 0) half_norms[code] = sum / 2;
}

template <class T>
__global__ void __launch_bounds__(block_threads, 2) search_kernel(CodeSearch args, SearchPlan<Compute<T>> plan) {
  using C = Compute<T>;
  constexpr int n = per_thread<C>;
  __shared__ ProductSlices<C> slices;
  const T* x = static_cast<const T*>(args.x);
  const T* codebook = static_cast<const T*>(args.codebook);
  const int tx = threadIdx.x % block_side, ty = threadIdx.x / block_side;
  const int64_t range = blockIdx.x % plan.ranges;
  const int64_t first_row = blockIdx.x / plan.ranges * tile_size<C>;
  const int64_t begin = range * plan.tiles_per_range * tile_size<C>,
                limit = begin + plan.tiles_per_range * tile_size<C>;
  const int64_t end = limit < args.codes ? limit : args.codes;

  C best[n];
  int winner[n];
#pragma unroll
  for (int r = 0; r < n; ++r) {
    best[r] = -infinity<C>();
    winner[r] = 0;
  }

  for (int64_t first_code = begin; first_code < end; first_code += tile_size<C>) {
    C products[n][n] = {};
    multiply_tiles(MatrixRows<T>{x, first_row, args.rows, args.dim}, MatrixRows<T>{codebook, first_code, end, args.dim},
                   slices, products);
    // Codes come in ascending order and only a greater score wins: the lowest of equals stays, a NaN never enters.
#pragma unroll
    for (int c = 0; c < n; ++c) {
      const int64_t code = first_code + place<C>(tx, c);
      const C half_norm = code < end ? plan.half_norms[code] : infinity<C>();
#pragma unroll
      for (int r = 0; r < n; ++r) {
        const C score = products[r][c] - half_norm;
        if (score > best[r]) {
          best[r] = score;
          winner[r] = static_cast<int>(code);
        }
      }
    }
  }

#pragma unroll
  for (int r = 0; r < n; ++r) {
#pragma unroll
    for (int offset = block_side / 2; offset > 0; offset /= 2) {
      const C score = __shfl_xor_sync(0xffffffffu, best[r], offset);
      const int code = __shfl_xor_sync(0xffffffffu, winner[r], offset);
      if (score > best[r] || (score == best[r] && code < winner[r])) {
        best[r] = score;
        winner[r] = code;
      }
    }
    const int64_t row = first_row + place<C>(ty, r);
    if (tx == 0 && row < args.rows) {
      plan.scores[range * args.rows + row] = best[r];
      plan.winners[range * args.rows + row] = winner[r];
    }
  }
}

template <class C>
__global__ void __launch_bounds__(block_threads) compare_ranges_kernel(CodeSearch args, SearchPlan<C> plan) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (row >= args.rows) return;
  C best = -infinity<C>();
  int winner = 0;
  for (int64_t range = 0; range < plan.ranges; ++range) {
    const C score = plan.scores[range * args.rows + row];
    if (score > best) {
      best = score;
      winner = plan.winners[range * args.rows + row];
    }
  }
  args.indices[row] = winner;
}

// The code of each row, and how far it is: from the difference, not from the score, which cancels. A warp takes a row.
template <class T>
__global__ void __launch_bounds__(block_threads) gather_kernel(CodeSearch args) {
  using C = Compute<T>;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x) / warp_size;
  if (row >= args.rows) return;
  const T* x = static_cast<const T*>(args.x) + row * args.dim;
  const T* code = static_cast<const T*>(args.codebook) + args.indices[row] * args.dim;
  T* quantized = static_cast<T*>(args.quantized) + row * args.dim;
  C sum = 0;
  for (int64_t k = threadIdx.x % warp_size; k < args.dim; k += warp_size) {
    const C difference = to_compute(x[k]) - to_compute(code[k]);
    sum += difference * difference;
    quantized[k] = code[k];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % warp_size == 0) static_cast<C*>(args.squared_error)[row] = sum;
}

// ---- backward and statistics ---------------------------------------------------------------------------------------

// Reads go through __ldg: grad_x is written between them, and they may still overtake it.
template <class T>
struct QuantizeSlopes {
  using Number = Compute<T>;
  QuantizeBackward args;

  __device__ __forceinline__ Number share(int64_t row, int64_t code, int64_t k) const {
    const int64_t i = row * args.dim + k;
    const Number difference = to_compute(__ldg(static_cast<const T*>(args.x) + i)) -
                              to_compute(__ldg(static_cast<const T*>(args.codebook) + code * args.dim + k));
    const Number pull = 2 * __ldg(static_cast<const Number*>(args.grad_error) + row) * difference;
    const Number through = to_compute(__ldg(static_cast<const T*>(args.grad_quantized) + i));
    static_cast<T*>(args.grad_x)[i] = from_compute<T>(through + static_cast<Number>(args.commitment_weight) * pull);
    return -pull;
  }
  __device__ __forceinline__ void write(int64_t code, int64_t k, Number sum) const {
    static_cast<T*>(args.grad_codebook)[code * args.dim + k] = from_compute<T>(sum);
  }
};

template <class T>
struct CodeSums {
  using Number = Compute<T>;
  CodeStatistics args;

  __device__ __forceinline__ Number share(int64_t row, int64_t, int64_t k) const {
    return to_compute(static_cast<const T*>(args.x)[row * args.dim + k]);
  }
  __device__ __forceinline__ void write(int64_t code, int64_t k, Number sum) const {
    static_cast<Number*>(args.sums)[code * args.dim + k] = sum;
  }
};

template <class C>
__global__ void __launch_bounds__(block_threads) counts_kernel(CodeStatistics args, const int64_t* starts) {
  const int64_t code = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (code < args.codes) static_cast<C*>(args.counts)[code] = static_cast<C>(starts[code + 1] - starts[code]);
}

template <class Args>
int64_t group_sums_workspace(const Args& args) {
  Arena arena(nullptr);
  dispatch_dtype(args.dtype, [&]<class T>() { GroupSums<Compute<T>>(args.rows, args.codes, args.dim, arena); });
  return arena.used;
}

}  // namespace

int64_t codebook_workspace(const CodeSearch& args) {
  Arena arena(nullptr);
  dispatch_dtype(args.dtype, [&]<class T>() { SearchPlan<Compute<T>>(args, arena); });
  return arena.used;
}
int64_t codebook_workspace(const QuantizeBackward& args) { return group_sums_workspace(args); }
int64_t codebook_workspace(const CodeStatistics& args) { return group_sums_workspace(args); }

void codebook_search(const CodeSearch& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    Arena arena(args.workspace);
    const SearchPlan<C> plan(args, arena);
    launch("half_norms", half_norms_kernel<T>, divide_up(args.codes * warp_size, block_threads), block_threads, 0,
           stream, args, plan.half_norms);
    launch("search", search_kernel<T>, plan.row_tiles * plan.ranges, block_threads, 0, stream, args, plan);
    launch("compare_ranges", compare_ranges_kernel<C>, divide_up(args.rows, block_threads), block_threads, 0, stream,
           args, plan);
    if (args.squared_error != nullptr) {
      launch("gather", gather_kernel<T>, divide_up(args.rows * warp_size, block_threads), block_threads, 0, stream,
             args);
    }
  });
}

void codebook_backward(const QuantizeBackward& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    Arena arena(args.workspace);
    GroupSums<Compute<T>> sums(args.rows, args.codes, args.dim, arena);
    sums.run(args.indices, QuantizeSlopes<T>{args}, stream);
  });
}

void codebook_statistics(const CodeStatistics& args, void* stream) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    Arena arena(args.workspace);
    GroupSums<Compute<T>> sums(args.rows, args.codes, args.dim, arena);
    sums.run(args.indices, CodeSums<T>{args}, stream);
    launch("counts", counts_kernel<Compute<T>>, divide_up(args.codes, block_threads), block_threads, 0, stream, args,
           static_cast<const int64_t*>(sums.groups.starts));
  });
}

}  // namespace isthmus::cuda
