// Decoding: each row of the result is a sum of rows of the weight matrix, held in registers while they pass.

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// Columns held in registers while the rows pass. Of a weight they are 512 bytes: of a dictionary of 24576 latents then
// 12 MB, which the third-level cache keeps while all rows read them.
template <class T>
constexpr int block_vectors = smaller(512 / (lanes<Compute<T>> * int64_t(sizeof(T))), vector_bytes == 64 ? 16 : 8);

// What makes the rows of a result: Σ_e values[e] · weight[indices[e]], plus bias unless null. With a target, unless
// null, each row comes with its squared distance from it.
template <class T>
struct Decoder {
  using C = Compute<T>;

  const CodeLayout& code;
  int64_t cols;
  const T *values, *weight, *bias, *target;

  // The columns from c on that Vectors vectors hold, of the row with the entries first … last - 1; only a single vector
  // may be less than full. Rows up to `known` may be prefetched: towards the end of a row, what it fetches are the same
  // columns for the next one. Returns lane sums of the squared distance.
  template <int Vectors>
  Vec<C> columns(int64_t first, int64_t last, int64_t known, int64_t c, const T* goal, T* out) const {
    constexpr int64_t prefetch_ahead = entries_ahead(Vectors * lanes<C> * sizeof(T));
    Vec<C> acc[Vectors] = {};
    if (bias != nullptr) each_column<Vectors>(bias + c, cols - c, [&](int v, Vec<C> b) { acc[v] = b; });
    for (int64_t e = first; e < last; ++e) {
      const int64_t soon = code.indices[smaller(e + prefetch_ahead, known - 1)], latent = code.indices[e];
      prefetch_columns<Vectors>(weight + larger(soon, 0) * cols + c);
      if (latent < 0) continue;
      const C value = load_number(values + e);
      each_column<Vectors>(weight + latent * cols + c, cols - c, [&](int v, Vec<C> w) { acc[v] += value * w; });
    }
    store_columns<Vectors>(out + c, cols - c, acc);
    Vec<C> squares = {};
    if (goal != nullptr) {
      each_column<Vectors>(goal + c, cols - c, [&](int v, Vec<C> t) {
        const Vec<C> error = t - acc[v];  // behind the last column both are zero
        squares += error * error;
      });
    }
    return squares;
  }

  // Blocks of columns outermost: what all rows read of the weight matrix is then a few times less than all of it, and
  // comes from main memory once.
  void run(T* out, C* squared_error) const {
    parallel_for(code.rows, row_grain(code, cols), [&](int64_t begin, int64_t end) {
      const int64_t known = first_entry(code, end);
      for (int64_t n = begin; n < end && squared_error != nullptr; ++n) squared_error[n] = 0;
      int64_t c = 0;
      const auto pass = [&]<int Vectors>() {
        constexpr int64_t width = Vectors * lanes<C>;
        for (; Vectors == 1 ? c < cols : c + width <= cols; c += width) {
          for (int64_t n = begin; n < end; ++n) {
            const T* goal = target != nullptr ? target + n * cols : nullptr;
            const int64_t first = first_entry(code, n), last = first_entry(code, n + 1);
            const Vec<C> squares = columns<Vectors>(first, last, known, c, goal, out + n * cols);
            if (squared_error != nullptr) squared_error[n] += sum_lanes<C>(squares);
          }
        }
      };
      pass.template operator()<block_vectors<T>>();
      pass.template operator()<4>();
      pass.template operator()<1>();
    });
  }
};

void decode(const SparseDecode& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    const Decoder<T> decoder{args.code,
                             args.cols,
                             static_cast<const T*>(args.values),
                             static_cast<const T*>(args.weight),
                             static_cast<const T*>(args.bias),
                             static_cast<const T*>(args.target)};
    decoder.run(static_cast<T*>(args.out), static_cast<Compute<T>*>(args.squared_error));
  });
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
