// Included by search.inl: which groups hold nothing but codes that repeat earlier ones, bit by bit. A code that `best`
// earlier ones equal is not among the best.
//
// In a codebook that has not learned yet, or has collapsed, most codes may be the same: no screen can tell them apart,
// and all would be scored in float64 only to tie. They are looked for when a row first keeps very many groups.

template <class T>
struct Repetitions {
  using C = Compute<T>;

  const T* const codebook;
  const int64_t codes, dim;
  bool known = false;
  Buffer<uint64_t> novel;  // of 64 groups each, those that hold something else

  explicit Repetitions(const CodeGroups<T>& all)
      : codebook(all.codebook), codes(all.codes), dim(all.dim), novel(all.groups / 64 + 1) {
    for (int64_t span = 0; span <= all.groups / 64; ++span) novel.data[span] = ~uint64_t{0};
  }

  // By a hash table of the first of each kind.
  void find(int64_t best) {
    known = true;
    for (int64_t span = 0; span * 64 * group_codes < codes; ++span) novel.data[span] = 0;
    uint64_t slots = 2;
    while (slots < 2 * static_cast<uint64_t>(codes)) slots *= 2;
    const Buffer<int64_t> table(static_cast<int64_t>(slots)), equals(codes);
    for (uint64_t slot = 0; slot < slots; ++slot) table.data[slot] = -1;
    for (int64_t code = 0; code < codes; ++code) {
      uint64_t slot = hash(code) & (slots - 1);
      while (table.data[slot] >= 0 && !equal(table.data[slot], code)) slot = (slot + 1) & (slots - 1);
      if (table.data[slot] < 0) equals.data[table.data[slot] = code] = 0;
      const int64_t group = code / group_codes;
      if (equals.data[table.data[slot]]++ < best) novel.data[group / 64] |= uint64_t{1} << group % 64;
    }
  }

  uint64_t hash(int64_t code) const {
    u64v sums = {};
    for (int64_t k = 0; k < dim; k += lanes<C>) {
      sums = (sums ^ sums >> 29) * 0xff51afd7ed558ccd + (u64v)load_first(codebook + code * dim + k, dim - k);
    }
    uint64_t sum = 0;
    for (int i = 0; i < lanes<double>; ++i) sum = (sum ^ sum >> 29) * 0xff51afd7ed558ccd + sums[i];
    return sum ^ sum >> 32;
  }

  bool equal(int64_t a, int64_t b) const {
    return std::memcmp(codebook + a * dim, codebook + b * dim, static_cast<size_t>(dim) * sizeof(T)) == 0;
  }
};
