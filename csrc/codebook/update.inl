// Included by cpu.inl: one step of a codebook that learns by moving averages.
//
// Usages are a vector of K numbers and come first, because every code's share needs their total. Then one pass over
// the codebook does the rest: it reads batch_sums once and reads and writes sums and codebook once.

template <class T>
struct CodebookHead {
  using C = Compute<T>;
  using V = Vec<C>;

  const CodebookUpdate& args;
  const int64_t first;  // code of this head, counted over all heads
  const C* counts = part<const C>(args.counts, 1);
  const C* batch_sums = part<const C>(args.batch_sums, args.dim);
  const C* code_weight = part<const C>(args.code_weight, 1);
  const T* candidates = part<const T>(args.candidates, args.dim);
  C* usage = part<C>(args.usage, 1);
  C* sums = part<C>(args.sums, args.dim);
  T* codebook = part<T>(args.codebook, args.dim);

  template <class U, class Pointer>
  U* part(Pointer base, int64_t width) const {
    return base == nullptr ? nullptr : static_cast<U*>(base) + first * width;
  }

  C rate(int64_t code) const {
    const C weight = code_weight == nullptr ? C(1) : code_weight[code];
    return static_cast<C>(1 - args.decay) * weight;
  }

  void run() const {
    const C hits = total(counts);
    if (hits == 0) return;
    const C per_hit = static_cast<C>(args.codes) / hits;
    for (int64_t code = 0; code < args.codes; ++code) {
      usage[code] += rate(code) * (counts[code] * per_hit - usage[code]);
    }
    const C used = total(usage), epsilon = static_cast<C>(args.epsilon);
    const C shrink = used / (used + static_cast<C>(args.codes) * epsilon);
    parallel_for(args.codes, grain_of(args.dim), [&](int64_t begin, int64_t end) {
      for (int64_t code = begin; code < end; ++code) {
        if (sums != nullptr) average(code, per_hit, (usage[code] + epsilon) * shrink);
        if (candidates != nullptr && usage[code] < static_cast<C>(args.revive_below)) revive(code);
      }
    });
  }

  C total(const C* values) const {
    V sum = {};
    for (int64_t k = 0; k < args.codes; k += lanes<C>) sum += load_first(values + k, args.codes - k);
    return sum_lanes<C>(sum);
  }

  void average(int64_t code, C per_hit, C share) const {
    constexpr C forgotten = static_cast<C>(1e-12);
    const C r = rate(code);
    C* sum = sums + code * args.dim;
    V squares = {};
    for (int64_t k = 0; k < args.dim; k += lanes<C>) {
      const int64_t left = args.dim - k;
      const V old = load_first(sum + k, left), batch = per_hit * load_first(batch_sums + code * args.dim + k, left);
      const V moved = old + r * (batch - old);
      store_first(sum + k, moved, left);
      squares += moved * moved;
    }
    if (usage[code] > forgotten) write(code, sum, args.normalize ? per_length(squares) : 1 / share);
  }

  void revive(int64_t code) const {
    const T* candidate = candidates + code * args.dim;
    V squares = {};
    for (int64_t k = 0; k < args.dim; k += lanes<C>) {
      const V c = load_first(candidate + k, args.dim - k);
      squares += c * c;
    }
    if (sum_lanes<C>(squares) != sum_lanes<C>(squares)) return;
    const C scale = args.normalize ? per_length(squares) : C(1);
    write(code, candidate, scale);
    for (int64_t k = 0; sums != nullptr && k < args.dim; k += lanes<C>) {
      store_first(sums + code * args.dim + k, scale * load_first(candidate + k, args.dim - k), args.dim - k);
    }
    usage[code] = 1;
  }

  template <class From>
  void write(int64_t code, const From* from, C scale) const {
    for (int64_t k = 0; k < args.dim; k += lanes<C>) {
      store_first(codebook + code * args.dim + k, scale * load_first(from + k, args.dim - k), args.dim - k);
    }
  }

  // 1 for a vector of zeros, which has no direction to keep.
  static C per_length(V squares) {
    const C sum = sum_lanes<C>(squares);
    return sum > 0 ? 1 / static_cast<C>(__builtin_sqrt(sum)) : C(1);
  }
};

void update(const CodebookUpdate& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    for (int64_t head = 0; head < args.heads; ++head) CodebookHead<T>{args, head * args.codes}.run();
  });
}
