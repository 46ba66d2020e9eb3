// Included by cpu.inl: what was found in order, the best first.
//
// Long lists are sorted by their ranks as float32, a byte at a time, without a branch that depends on them: in a heap,
// every step is a guess of the CPU that goes wrong half of the time. Entries that are equal as float32, and short
// lists, are few enough for a heap.

class Sorter {
 public:
  explicit Sorter(int64_t most) : keys(most), sorted(most), ranks(most), notes(most) {}

  void sort(BestHeap list) const {
    if (is_sorted(list)) return;
    if (list.count <= few) return sort_few(list);
    const uint64_t* order = sort_keys(list);
    std::memcpy(ranks.data, list.values, static_cast<size_t>(list.count) * sizeof(double));
    std::memcpy(notes.data, list.notes, static_cast<size_t>(list.count) * sizeof(int32_t));
    for (int64_t i = 0; i < list.count; ++i) {
      list.values[i] = ranks.data[static_cast<uint32_t>(order[i])];
      list.notes[i] = notes.data[static_cast<uint32_t>(order[i])];
    }
    for (int64_t first = 0, end; first < list.count; first = end) {
      for (end = first + 1; end < list.count && order[end] >> 32 == order[first] >> 32;) ++end;
      if (end - first > 1) sort_few({list.values + first, list.notes + first, end - first});
    }
  }

 private:
  static constexpr int64_t few = 64;
  static constexpr int digits = 4, values = 256;

  const Buffer<uint64_t> keys, sorted;
  const Buffer<double> ranks;
  const Buffer<int32_t> notes;

  static bool is_sorted(const BestHeap& list) {
    bool wrong = false;
    for (int64_t i = 1; i < list.count; ++i) {
      wrong |= WorstFirst::before(list.values[i - 1], list.notes[i - 1], list.values[i], list.notes[i]);
    }
    return !wrong;
  }

  static void sort_few(const BestHeap& list) {
    BestHeap heap{list.values, list.notes, 0};
    while (heap.count < list.count) heap.push(list.values[heap.count], list.notes[heap.count]);
    while (heap.count > 0) {
      const double worst = heap.values[0];
      const int32_t note = heap.notes[0];
      heap.pop();
      heap.values[heap.count] = worst;
      heap.notes[heap.count] = note;
    }
  }

  // The places of entries, in order: the low halves of keys whose high halves ascend where float32 descend.
  const uint64_t* sort_keys(const BestHeap& list) const {
    uint32_t starts[digits][values] = {};
    for (int64_t i = 0; i < list.count; ++i) {
      const float rank = static_cast<float>(list.values[i]) + 0.0f;  // zeros of either sign are equal
      const uint32_t falling = static_cast<uint32_t>(~to_ordered(rank)) ^ 0x80000000u;
      keys.data[i] = uint64_t{falling} << 32 | static_cast<uint64_t>(i);
      for (int d = 0; d < digits; ++d) ++starts[d][falling >> 8 * d & 255];
    }
    uint64_t *from = keys.data, *to = sorted.data;
    for (int d = 0; d < digits; ++d) {
      uint32_t next = 0;
      for (uint32_t& start : starts[d]) {
        const uint32_t count = start;
        start = next;
        next += count;
      }
      for (int64_t i = 0; i < list.count; ++i) to[starts[d][from[i] >> (32 + 8 * d) & 255]++] = from[i];
      uint64_t* const other = from;
      from = to;
      to = other;
    }
    return from;
  }
};
