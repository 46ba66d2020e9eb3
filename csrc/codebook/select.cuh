// The exact half of a search: which groups of codes survive screening, the float64 scores of their codes, and the best
// of these. A warp takes a row.
#pragma once

#include "codebook/gather.cuh"
#include "codebook/prepare.cuh"

namespace isthmus::cuda {
namespace {

struct Candidate {
  double score;
  int code;

  // Greater scores first, then lower indices; a score that is not a number comes last.
  __device__ __forceinline__ bool precedes(const Candidate& other) const {
    if (score > other.score) return true;
    if (score < other.score) return false;
    const bool number = score == score, other_number = other.score == other.score;
    return number == other_number ? code < other.code : number;
  }
  __device__ __forceinline__ Candidate of_lane(int lane) const {
    return {__shfl_sync(0xffffffffu, score, lane), __shfl_sync(0xffffffffu, code, lane)};
  }
  __device__ __forceinline__ Candidate above() const {
    return {__shfl_up_sync(0xffffffffu, score, 1), __shfl_up_sync(0xffffffffu, code, 1)};
  }
  // The first of all lanes' candidates.
  __device__ __forceinline__ Candidate first_of_warp() const {
    Candidate first = *this;
#pragma unroll
    for (int offset = warp_size / 2; offset > 0; offset /= 2) {
      const Candidate other = {__shfl_xor_sync(0xffffffffu, first.score, offset),
                               __shfl_xor_sync(0xffffffffu, first.code, offset)};
      if (other.precedes(first)) first = other;
    }
    return first;
  }
};

// Behind every code there is.
__device__ __forceinline__ Candidate nobody() { return {__longlong_as_double(0x7ff8000000000000ll), 0x7fffffff}; }

// The maxima of the rows of a block, which neighbour each other in memory: read by all threads together. Those of the
// first 32 Ki codes (float64: 16 Ki); a warp reads what is beyond them itself.
template <class C>
struct BlockMaxima {
  static constexpr int rows = block_threads / warp_size, groups = 4096 / sizeof(C);
  C values[rows][groups + warp_size / rows];  // the padding keeps the threads of a warp in different banks

  template <class Plan>
  __device__ __forceinline__ void fill(const Plan& plan) {
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * rows, stride = plan.chunk_tiles * Plan::tile;
    const int row = threadIdx.x % rows;
    for (int g = threadIdx.x / rows; g < groups && g < plan.groups; g += block_threads / rows) {
      values[row][g] = plan.maxima[g * stride + first_row + row];
    }
  }
};

// The search of one row.
template <class T, class Operand>
struct RowSearch {
  using C = Compute<Operand>;
  const SearchPlan<T, Operand>& plan;
  const BlockMaxima<C>& maxima;
  const int64_t head, chunk_row;
  const T* x;
  const RowBound bound;
  int count;        // of codes wanted, at most one a lane
  Candidate after;  // only codes behind this one are wanted
  Candidate mine;   // lane i has the i-th best so far
  Candidate last;   // of those wanted

  __device__ __forceinline__ RowSearch(const SearchPlan<T, Operand>& plan_, const BlockMaxima<C>& maxima_,
                                       const RowPlace& place, int64_t chunk_row_)
      : plan(plan_),
        maxima(maxima_),
        head(place.head),
        chunk_row(chunk_row_),
        x(static_cast<const T*>(plan.args.x) + place.head * plan.args.head_stride + place.row * plan.args.row_stride),
        bound(plan.row_bounds[chunk_row]),
        after{infinity<double>(), -1} {}

  // The next codes in order, up to 32 of them, one in each lane.
  __device__ __forceinline__ void find_next(int count_) {
    count = count_;
    mine = last = nobody();
    // The groups with the greatest bounds first: after them the last of those wanted is a high bar for all others.
    Candidate leader = {infinity<double>(), -1};  // the bound of a group, and its number
    for (int i = 0; i < count; ++i) {
      Candidate next = nobody();
      for (int64_t g = warp_lane(); g < plan.groups; g += warp_size) {
        const Candidate group = {upper(g), static_cast<int>(g)};
        if (leader.precedes(group) && group.precedes(next)) next = group;
      }
      next = next.first_of_warp();
      if (next.score < last.score || next.code >= plan.groups) return;  // so are all others
      visit(next.code);
      leader = next;
    }
    for (int64_t first = 0; first < plan.groups; first += warp_size) {
      const int64_t g = first + warp_lane();
      const Candidate group = {g < plan.groups ? upper(g) : 0, static_cast<int>(g)};
      bool open = g < plan.groups && leader.precedes(group);
      for (;;) {
        open = open && !(group.score < last.score);
        const unsigned lanes = __ballot_sync(0xffffffffu, open);
        if (lanes == 0) break;
        const int next = __ffs(lanes) - 1;
        visit(first + next);
        open = open && warp_lane() != next;
      }
    }
  }

  __device__ __forceinline__ double upper(int64_t group) const {
    const double screened = group < maxima.groups ? maxima.values[threadIdx.x / warp_size][group]
                                                  : plan.maxima[group * plan.chunk_tiles * plan.tile + chunk_row];
    return upper_bound<Operand>(plan.args.metric, screened, bound, plan.bounds[head * plan.groups + group], plan.depth);
  }

  // Scores the codes of a group, and takes those in that are better than the last.
  __device__ __forceinline__ void visit(int64_t group) {
    const int64_t code = group * group_codes + warp_lane();
    Candidate challenger = nobody();
    if (code < plan.args.codes) challenger = {score(group), static_cast<int>(code)};
    bool open = after.precedes(challenger) && challenger.precedes(last);
    while (__any_sync(0xffffffffu, open)) {
      const Candidate first = (open ? challenger : nobody()).first_of_warp();
      insert(first);
      open = open && challenger.code != first.code && challenger.precedes(last);
    }
  }

  __device__ __forceinline__ void insert(const Candidate& candidate) {
    const Candidate above = mine.above();
    const bool moves = candidate.precedes(mine), above_moves = candidate.precedes(above) && warp_lane() > 0;
    if (moves) mine = above_moves ? above : candidate;
    last = mine.of_lane(count - 1);
  }

  // Of this lane's code, in the operations of the CPU kernels.
  __device__ __forceinline__ double score(int64_t group) const {
    const CodeSearch& args = plan.args;
    const int64_t place = head * plan.groups + group;
    const T* c = plan.packed + place * args.dim * group_codes + warp_lane();
    if (args.metric == Metric::euclidean) {
      return -exact_sum(args.dim, [&](int64_t k) {
        const double difference = __dsub_rn(widen(x[k]), widen(c[k * group_codes]));
        return __dmul_rn(difference, difference);
      });
    }
    const double product =
        exact_sum(args.dim, [&](int64_t k) { return __dmul_rn(widen(x[k]), widen(c[k * group_codes])); });
    if (args.metric == Metric::inner_product) return product;
    const double length = plan.lengths[place * group_codes + warp_lane()];
    return length == 0 ? product : product / length;
  }
};

template <class T, class Operand>
__global__ void __launch_bounds__(block_threads) select_kernel(SearchPlan<T, Operand> plan, int64_t first_tile) {
  const CodeSearch& args = plan.args;
  const int64_t chunk_row = warp_number();
  const RowPlace place(plan, first_tile, chunk_row);
  __shared__ BlockMaxima<Compute<Operand>> maxima;
  maxima.fill(plan);
  __syncthreads();
  if (!place.exists) return;
  const int64_t row = place.head * args.rows + place.row;
  int64_t* indices = args.indices + row * args.best;
  const bool masked = args.mask != nullptr && !args.mask[row];
  int64_t nearest = -1;
  if (masked) {
    for (int64_t i = warp_lane(); i < args.best; i += warp_size) indices[i] = -1;
  } else {
    RowSearch<T, Operand> search(plan, maxima, place, chunk_row);
    for (int64_t found = 0; found < args.best; found += warp_size) {
      const int64_t left = args.best - found;
      search.find_next(static_cast<int>(left < warp_size ? left : warp_size));
      if (warp_lane() < search.count) indices[found + warp_lane()] = search.mine.code;
      if (found == 0) nearest = search.mine.of_lane(0).code;
      search.after = search.last;
    }
  }
  if (args.squared_error != nullptr) gather_row<T>(args, place.head, place.row, nearest);
}

}  // namespace
}  // namespace isthmus::cuda
