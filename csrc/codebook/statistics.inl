// Included by cpu.inl: how many rows each code received, and their sum.

void statistics(const CodeStatistics& args) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    using C = Compute<T>;
    const T* x = static_cast<const T*>(args.x);
    const int64_t dim = args.dim;
    const Groups groups(args.indices, args.rows, args.codes);
    for (int64_t code = 0; code < args.codes; ++code) {
      static_cast<C*>(args.counts)[code] = static_cast<C>(groups.starts.data[code + 1] - groups.starts.data[code]);
    }
    sum_groups<C>(
        groups, dim,
        [&](int64_t row, int64_t, C* sum) {
          for (int64_t k = 0; k < dim; k += lanes<C>) {
            store_first(sum + k, load_first(sum + k, dim - k) + load_first(x + row * dim + k, dim - k), dim - k);
          }
        },
        [&](int64_t code, const C* sum) {
          for (int64_t k = 0; k < dim; ++k) static_cast<C*>(args.sums)[code * dim + k] = sum[k];
        });
  });
}
