// Included by cpu.inl: what the best features of a row become in the result.

// Brings together what the lists of a row hold, and sorts it.
template <class T>
struct Finisher {
  const TopkEncode& args;
  const Features<T>& features;
  const Plan& plan;
  const Best& best;
  Buffer<bool> positive{plan.k};
  Sorter sorter{plan.k};

  // place: of the first list of the row.
  void finish(int64_t row, int64_t place) const {
    T* values = static_cast<T*>(args.values) + row * args.k;
    int64_t* indices = args.indices + row * args.k;
    for (int64_t list = 0; list < plan.lists; ++list) {
      if (best.is_broken(place + list)) return fill(values, indices, args.k, __builtin_nan(""), 0);
    }
    for (int64_t g = 0; g < args.groups; ++g) {
      finish_group(g, place + g * plan.parts, values + g * plan.k, indices + g * plan.k);
    }
  }

  static void fill(T* values, int64_t* indices, int64_t count, double value, int64_t index) {
    for (int64_t j = 0; j < count; ++j) {
      store_score(values + j, value);
      indices[j] = index;
    }
  }

  void finish_group(int64_t group, int64_t place, T* values, int64_t* indices) const {
    for (int64_t part = 1; part < plan.parts; ++part) {
      const BestHeap other = best.heap(place + part);
      for (int64_t i = 0; i < other.count; ++i) {
        const int32_t note = other.notes[i];
        best.offer(place, Ranking::score(other.values[i], note), Ranking::position(note));
      }
    }
    const BestHeap heap = best.heap(place);
    sorter.sort(heap);
    int64_t filled = heap.count;
    if (args.activation == Activation::relu) filled += add_zeros(group, heap, values, indices);
    fill(values + filled, indices + filled, plan.k - filled, 0, -1);
    for (int64_t j = 0; j < heap.count; ++j) {
      store_score(values + j, Ranking::score(heap.values[j], heap.notes[j]));
      indices[j] = features.id(Ranking::position(heap.notes[j]));
    }
  }

  // A heap of fewer than k holds all features that are positive. Behind them, the first of the others count as 0.
  int64_t add_zeros(int64_t group, const BestHeap& heap, T* values, int64_t* indices) const {
    const int64_t first = features.starts.data[group], there = features.starts.data[group + 1] - first;
    const int64_t wanted = smaller(plan.k, there) - heap.count;
    for (int64_t p = 0; p < plan.k; ++p) positive.data[p] = false;
    for (int64_t i = 0; i < heap.count; ++i) {
      if (heap.notes[i] - first < plan.k) positive.data[heap.notes[i] - first] = true;
    }
    int64_t j = heap.count;
    for (int64_t p = 0; j < heap.count + wanted; ++p) {
      if (positive.data[p]) continue;
      store_score(values + j, 0.0);
      indices[j++] = features.id(first + p);
    }
    return wanted;
  }
};

template <class T>
void finish_rows(const Features<T>& features, const Plan& plan, const Best& best, int64_t first, int64_t rows) {
  parallel_for(rows, 16, [&](int64_t begin, int64_t end) {
    const Finisher<T> finisher{features.args, features, plan, best};
    for (int64_t row = begin; row < end; ++row) finisher.finish(first + row, row * plan.lists);
  });
}
