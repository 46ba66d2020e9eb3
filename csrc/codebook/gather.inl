// Included by cpu.inl: the code of each row, and how far it is: from the difference, not from the score, which cancels.

template <class T>
void gather_rows(const CodeSearch& args, int64_t head, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t dim = args.dim;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = head * args.rows + row, index = args.indices[at];
    T* quantized = static_cast<T*>(args.quantized) + at * dim;
    Vec<C> sum = {};
    if (index < 0) {
      for (int64_t k = 0; k < dim; ++k) quantized[k] = T{};
    } else {
      const T* x = static_cast<const T*>(args.x) + head * args.head_stride + row * args.row_stride;
      const T* code = static_cast<const T*>(args.codebook) + (head * args.codes + index) * dim;
      for (int64_t k = 0; k < dim; k += lanes<C>) {
        const Vec<C> difference = load_first(x + k, dim - k) - load_first(code + k, dim - k);
        sum += difference * difference;
      }
      for (int64_t k = 0; k < dim; ++k) quantized[k] = code[k];
    }
    static_cast<C*>(args.squared_error)[at] = sum_lanes<C>(sum);
  }
}

void gather(const CodeSearch& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    for (int64_t head = 0; head < args.heads; ++head) {
      parallel_for(args.rows, grain_of(args.dim),
                   [&](int64_t begin, int64_t end) { gather_rows<T>(args, head, begin, end); });
    }
  });
}
