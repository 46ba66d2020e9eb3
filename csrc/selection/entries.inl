// Included by cpu.inl: entries that were found, and the ragged result they become.

// Positions order entries by (row, feature).
inline int64_t position_of(int64_t row, int64_t feature) { return row << 31 | feature; }
inline int64_t row_of(int64_t position) { return position >> 31; }
inline int64_t feature_of(int64_t position) { return position & 0x7fffffff; }

// Values with their positions. Grows by realloc: the system moves long arrays without copying them.
template <class V>
struct List {
  V* values = nullptr;
  int64_t* positions = nullptr;
  int64_t count = 0, capacity = 0;

  List() = default;
  List(const List&) = delete;
  List& operator=(const List&) = delete;
  ~List() {
    __builtin_free(values);
    __builtin_free(positions);
  }

  // The place of a new entry.
  int64_t grow() {
    if (count == capacity) reserve(larger(2 * capacity, least));
    return count++;
  }

  // Gives back what is not used.
  void fit() {
    if (capacity > least) reserve(larger(count, least));
  }

 private:
  static constexpr int64_t least = 1024;

  void reserve(int64_t wanted) {
    resize(values, wanted);
    resize(positions, wanted);
    capacity = wanted;
  }

  template <class E>
  static void resize(E*& array, int64_t count) {
    void* moved = __builtin_realloc(array, static_cast<size_t>(count) * sizeof(E));
    if (moved == nullptr) throw std::bad_alloc();
    array = static_cast<E*>(moved);
  }
};

// The lists of the items of work, in their order: each row's entries lie in order of feature.
template <class V>
struct Lists {
  const int64_t count;
  List<V>* const data;

  explicit Lists(int64_t count_) : count(count_), data(new List<V>[static_cast<size_t>(count)]) {}
  ~Lists() { delete[] data; }
  Lists(const Lists&) = delete;
  Lists& operator=(const Lists&) = delete;
};

// Which rows have a NaN among their scores.
struct BrokenRows {
  const int64_t rows;
  Buffer<bool> flags{rows};

  explicit BrokenRows(int64_t rows_) : rows(rows_) { std::memset(flags.data, 0, static_cast<size_t>(rows)); }
  bool operator[](int64_t row) const { return __atomic_load_n(flags.data + row, __ATOMIC_RELAXED); }
  void add(int64_t row) const { __atomic_store_n(flags.data + row, true, __ATOMIC_RELAXED); }
  int64_t count() const {
    int64_t total = 0;
    for (int64_t row = 0; row < rows; ++row) total += flags.data[row];
    return total;
  }
};

// offsets[row + 1] holds how many entries a row has; afterwards offsets are where rows begin.
inline void accumulate(int64_t* offsets, int64_t rows) {
  offsets[0] = 0;
  for (int64_t row = 0; row < rows; ++row) offsets[row + 1] += offsets[row];
}
