// Included by cpu.inl: log (1/K Σ_k exp(w_k)), the bound of K importance weights, vectors across columns.
//
// A strip of columns, samples deep, is read twice: for the maximum, then for the sum. The second reading comes from
// cache.

template <class T>
struct Strip {
  using C = Compute<T>;
  using V = Vec<C>;

  const T* weights;  // of the first column and sample
  int64_t samples, cols, left;

  V at(int64_t k) const { return load_first(weights + k * cols, left); }

  // All -inf: no weight at all. An infinite or NaN weight makes the result so.
  V bound() const {
    V highest = at(0);
    for (int64_t k = 1; k < samples; ++k) {
      const V w = at(k);
      highest = w > highest ? w : highest;
    }
    const V finite = abs(highest) < C(__builtin_inf()) ? highest : V{};
    V sum = {};
    for (int64_t k = 0; k < samples; ++k) sum += exp(at(k) - finite);
    return finite + log(sum / static_cast<C>(samples));
  }
};

// Calls f(group, col) for the strips of [groups, cols].
template <class C, class F>
void for_each_strip(int64_t groups, int64_t samples, int64_t cols, F&& f) {
  const int64_t per_group = (cols + lanes<C> - 1) / lanes<C>;
  parallel_for(groups * per_group, grain_elements / (samples * lanes<C>)+1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) f(strip / per_group, strip % per_group * lanes<C>);
  });
}

void log_mean_exp(const LogMeanExp& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    for_each_strip<C>(args.groups, args.samples, args.cols, [&](int64_t group, int64_t col) {
      const T* weights = static_cast<const T*>(args.log_weights) + group * args.samples * args.cols + col;
      const Strip<T> strip{weights, args.samples, args.cols, args.cols - col};
      store_first(static_cast<C*>(args.bound) + group * args.cols + col, strip.bound(), args.cols - col);
    });
  });
}

void log_mean_exp_backward(const LogMeanExpBackward& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    using V = Vec<C>;
    for_each_strip<C>(args.groups, args.samples, args.cols, [&](int64_t group, int64_t col) {
      const int64_t first = group * args.samples * args.cols + col, left = args.cols - col;
      const Strip<T> strip{static_cast<const T*>(args.log_weights) + first, args.samples, args.cols, left};
      const V bound = load_first(static_cast<const C*>(args.bound) + group * args.cols + col, left);
      const V grad = load_first(static_cast<const C*>(args.grad) + group * args.cols + col, left);
      const V share = grad / static_cast<C>(args.samples);
      // Without any weight every sample has the same part in the bound: none.
      const V finite = bound == -C(__builtin_inf()) ? V{} : bound;
      T* out = static_cast<T*>(args.grad_log_weights) + first;
      for (int64_t k = 0; k < args.samples; ++k) {
        store_first(out + k * args.cols, share * exp(strip.at(k) - finite), left);
      }
    });
  });
}
