// Included by cuda.cu: log (1/K Σ_k exp(w_k)), the bound of K importance weights.
//
// Threads of a block stand in `lanes` columns; those of a column share its samples. They read them twice: for the
// maximum, then for the sum. The second reading comes from cache.

struct Columns {
  int lanes;
  int64_t tiles;  // blocks of a group

  // A thread takes some 16 samples before a second one shares the column.
  Columns(int64_t samples, int64_t cols) : lanes(threads_per_block) {
    constexpr int sector = 8;  // fewer neighbours would waste what memory delivers at a time
    while (lanes > sector && threads_per_block / lanes * 16 < samples) lanes /= 2;
    while (lanes > 1 && lanes / 2 >= cols) lanes /= 2;
    tiles = divide_up(cols, lanes);
  }
};

template <class C>
__device__ __forceinline__ bool is_finite(C x) {
  return fabs(x) < C(INFINITY);
}

// All -inf: no weight at all. An infinite or NaN weight makes the result so.
template <class T>
__global__ void __launch_bounds__(threads_per_block) log_mean_exp_kernel(LogMeanExp args, Columns columns) {
  using C = Compute<T>;
  __shared__ C highest_of[threads_per_block];
  const int lane = threadIdx.x % columns.lanes, walkers = threads_per_block / columns.lanes;
  const int64_t group = blockIdx.x / columns.tiles, col = blockIdx.x % columns.tiles * columns.lanes + lane;
  const int64_t first = threadIdx.x / columns.lanes, samples = col < args.cols ? args.samples : 0;
  const T* weights = static_cast<const T*>(args.log_weights) + group * args.samples * args.cols + col;

  C highest = -C(INFINITY);
  for (int64_t k = first; k < samples; k += walkers) {
    const C w = to_compute(weights[k * args.cols]);
    highest = w > highest ? w : highest;
  }
  highest_of[threadIdx.x] = highest;
  __syncthreads();
  for (int walker = 0; walker < walkers; ++walker) {
    const C other = highest_of[walker * columns.lanes + lane];
    highest = other > highest ? other : highest;
  }
  const C finite = is_finite(highest) ? highest : C(0);
  C sum[1] = {0};
  for (int64_t k = first; k < samples; k += walkers) sum[0] += exp(to_compute(weights[k * args.cols]) - finite);
  stack_sum(sum, columns.lanes);
  if (first == 0 && col < args.cols) {
    static_cast<C*>(args.bound)[group * args.cols + col] = finite + log(sum[0] / static_cast<C>(args.samples));
  }
}

template <class T, int N>
__global__ void __launch_bounds__(threads_per_block) log_mean_exp_backward_kernel(LogMeanExpBackward args) {
  using C = Compute<T>;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * threads_per_block + threadIdx.x) * N;
  if (i >= args.groups * args.samples * args.cols) return;
  const int64_t column = i / (args.samples * args.cols) * args.cols + i % args.cols;
  C values[N];
  load(static_cast<const T*>(args.log_weights) + i, values);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const C bound = static_cast<const C*>(args.bound)[column + j];
    // Without any weight every sample has the same part in the bound: none.
    const C finite = bound == -C(INFINITY) ? C(0) : bound;
    const C share = static_cast<const C*>(args.grad)[column + j] / static_cast<C>(args.samples);
    values[j] = share * exp(values[j] - finite);
  }
  store(static_cast<T*>(args.grad_log_weights) + i, values);
}
