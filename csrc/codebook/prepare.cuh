// What a search computes before it screens: the codebook laid out for exact scores, and operands with their bounds.
#pragma once

#include "codebook/exact.cuh"
#include "codebook/plan.cuh"
#include "codebook/warps.cuh"

namespace isthmus::cuda {
namespace {

// ---- codes ---------------------------------------------------------------------------------------------------------

// A warp takes a group, a lane a code of it.
template <class T, class Operand>
__global__ void __launch_bounds__(block_threads) pack_codes_kernel(SearchPlan<T, Operand> plan) {
  const CodeSearch& args = plan.args;
  const int64_t group = warp_number(), lane = warp_lane(), head = group / plan.groups;
  if (head >= args.heads) return;
  const int64_t code = group % plan.groups * group_codes + lane;
  const T* c = static_cast<const T*>(args.codebook) + (head * args.codes + code) * args.dim;
  T* packed = plan.packed + group * args.dim * group_codes + lane;
#pragma unroll 4
  for (int64_t k = 0; k < args.dim; ++k) packed[k * group_codes] = code < args.codes ? c[k] : from_compute<T>(0);
  if (args.metric != Metric::cosine) return;
  const double square = exact_sum(args.dim, [&](int64_t k) {
    const double value = widen(packed[k * group_codes]);
    return __dmul_rn(value, value);
  });
  plan.lengths[group * group_codes + lane] = sqrt(square);
}

// What the operand of a code is made of: c or c / |c|, where a code of zeros has no direction.
template <class T, class Operand>
__device__ __forceinline__ double direction(const SearchPlan<T, Operand>& plan, T value, int64_t head, int64_t code) {
  if (plan.args.metric != Metric::cosine) return widen(value);
  const double length = plan.lengths[head * plan.groups * group_codes + code];
  return length == 0 ? 0 : widen(value) / length;
}

// m: the mean of at most 256 codes. Any point is right, this one is near. A block takes 32 components of it.
template <class T, class Operand>
__global__ void __launch_bounds__(block_threads) centre_kernel(SearchPlan<T, Operand> plan) {
  constexpr int64_t max_samples = 256;
  constexpr int walkers = block_threads / warp_size;
  __shared__ double sums[walkers][warp_size];
  const CodeSearch& args = plan.args;
  const int64_t parts = (args.dim + warp_size - 1) / warp_size, head = blockIdx.x / parts;
  const int64_t k = blockIdx.x % parts * warp_size + warp_lane();
  const int64_t samples = args.codes < max_samples ? args.codes : max_samples;
  const int walker = threadIdx.x / warp_size;
  double sum = 0;
  for (int64_t s = walker; s < samples && k < args.dim; s += walkers) {
    const int64_t code = s * args.codes / samples;
    const T value = static_cast<const T*>(args.codebook)[(head * args.codes + code) * args.dim + k];
    sum += direction(plan, value, head, code);
  }
  sums[walker][warp_lane()] = sum;
  __syncthreads();
  if (walker > 0 || k >= args.dim) return;
  for (int w = 1; w < walkers; ++w) sum += sums[w][warp_lane()];
  const float mean = static_cast<float>(sum / static_cast<double>(samples));
  plan.centre[head * args.dim + k] = isfinite(mean) ? mean : 0.0f;
}

template <class Operand>
__device__ __forceinline__ Operand to_operand(double value) {
  if constexpr (on_tensor_cores<Operand>) {
    // Subnormal numbers become 0, and all of them error: whether tensor cores keep them does not matter then.
    const Operand narrow = from_compute<Operand>(static_cast<float>(value));
    return fabs(to_compute(narrow)) < (std::is_same_v<Operand, __half> ? 0x1p-14f : 0x1p-126f) ? Operand(0.0f) : narrow;
  } else {
    return static_cast<Operand>(value);
  }
}

__device__ __forceinline__ double warp_max(double value) {
#pragma unroll
  for (int offset = warp_size / 2; offset > 0; offset /= 2) {
    value = fmax(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

// Operands of the codes. A warp takes 32 codes, a lane a code, of which it writes 16 bytes at a time.
template <class T, class Operand>
__global__ void __launch_bounds__(block_threads) code_operands_kernel(SearchPlan<T, Operand> plan) {
  using C = Compute<Operand>;
  constexpr int n = 16 / sizeof(Operand);
  const CodeSearch& args = plan.args;
  const int64_t padded_groups = plan.code_tiles * (plan.tile / group_codes);
  const int64_t warp = warp_number(), head = warp / padded_groups, group = warp % padded_groups;
  if (head >= args.heads) return;
  const int64_t code = group * group_codes + warp_lane(), place = warp * group_codes + warp_lane();
  const T* packed = plan.packed + (head * plan.groups + group) * args.dim * group_codes + warp_lane();
  const bool exists = code < args.codes;
  Operand* operand = plan.codes + place * plan.depth;
  double square = 0, error = 0, target_square = 0, centre_square = 0;
  for (int64_t first = 0; first < plan.depth; first += n) {
    Pack<Operand, n> pack;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const int64_t k = first + j;
      double target = 0, centre = 0;
      if (exists && k < args.dim) {
        target = direction(plan, packed[k * group_codes], head, code);
        centre = plan.centre_at(head, k);
      }
      const double a = target - centre;
      pack.values[j] = to_operand<Operand>(a);
      const double lost = a - widen(pack.values[j]);
      square += a * a;
      error += lost * lost;
      target_square += target * target;
      centre_square += centre * centre;
    }
    *reinterpret_cast<Pack<Operand, n>*>(operand + first) = pack;
  }
  const bool euclidean = args.metric == Metric::euclidean;
  const double offset = euclidean ? square / 2 : 0;
  plan.offsets[place] = exists ? static_cast<C>(-offset) : -infinity<C>();
  // A maximum of doubles passes over NaN.
  const double length = sqrt(square), reach = euclidean ? length : sqrt(target_square) + sqrt(centre_square);
  const GroupBound bound = {warp_max(length), warp_max(sqrt(error)), warp_max(reach), warp_max(offset)};
  if (warp_lane() == 0 && group < plan.groups) plan.bounds[head * plan.groups + group] = bound;
}

// ---- rows ----------------------------------------------------------------------------------------------------------

// A warp takes a row of the chunk; one that does not exist is zeros.
template <class T, class Operand>
__global__ void __launch_bounds__(block_threads) row_operands_kernel(SearchPlan<T, Operand> plan, int64_t first_tile) {
  const CodeSearch& args = plan.args;
  const int64_t chunk_row = warp_number();
  const RowPlace place(plan, first_tile, chunk_row);
  const T* x = static_cast<const T*>(args.x) + place.head * args.head_stride + place.row * args.row_stride;
  Operand* operand = plan.rows + chunk_row * plan.depth;
  const bool euclidean = args.metric == Metric::euclidean;
  double square = 0, error = 0, across = 0;
  for (int64_t k = warp_lane(); k < plan.depth; k += warp_size) {
    double value = 0, centre = 0;
    if (place.exists && k < args.dim) {
      value = widen(x[k]);
      centre = plan.centre_at(place.head, k);
    }
    const double y = euclidean ? value - centre : value;
    operand[k] = to_operand<Operand>(y);
    const double lost = y - widen(operand[k]);
    square += y * y;
    error += lost * lost;
    across += value * centre;
  }
  square = warp_total(square);
  error = warp_total(error);
  across = warp_total(across);
  if (warp_lane() == 0) plan.row_bounds[chunk_row] = {sqrt(square), sqrt(error), euclidean ? -square : across};
}

}  // namespace
}  // namespace isthmus::cuda
