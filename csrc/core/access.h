// Reading and writing an Operand in pieces, as contiguous numbers of the compute type: in place where the tensor's own
// memory is that already, else through a tile in L1. Kernel loops then know neither half types nor strides.
#pragma once

#include "core/gaussians.h"
#include "core/simd.h"
#include "core/tiles.h"

namespace isthmus {
namespace {

template <class C>
struct alignas(64) Tile {
  C values[tile_elements + lanes<C>];  // the tail lets a last vector be stored whole
};

// Fetches the lines of [p, p + tile_elements) that a next piece will need. Pieces are as long as a page, where the
// hardware's own prefetch stops; issued before a long computation, this hides the memory behind it.
template <bool ForWriting, class T>
ISTHMUS_INLINE void prefetch(const T* p) {
  constexpr int64_t line = 64 / int64_t(sizeof(T));
  for (int64_t i = 0; i < tile_elements; i += line) __builtin_prefetch(p + i, ForWriting, 3);
}

// The same, bit by bit: requests for all lines of many tensors at once would wait for each other.
class Prefetches {
 public:
  template <bool ForWriting, class T>
  void add(const T* p) {
    streams_[count_++] = {reinterpret_cast<const char*>(p), sizeof(T), ForWriting};
  }

  // Of elements [first, first + count) from each address on.
  ISTHMUS_INLINE void operator()(int64_t first, int64_t count) const {
    for (const Stream* s = streams_; s < streams_ + count_; ++s) {
      const char *line = s->from + first * s->size, *end = line + count * s->size;
      for (; line < end; line += 64) s->for_writing ? __builtin_prefetch(line, 1, 3) : __builtin_prefetch(line, 0, 3);
    }
  }

 private:
  struct Stream {
    const char* from;
    int64_t size;
    bool for_writing;
  };
  Stream streams_[9];  // a gradient comes in; four operands, four results
  int count_ = 0;
};

template <class T>
class Reader {
  using C = Compute<T>;

 public:
  explicit Reader(const Operand& operand)
      : data_(static_cast<const T*>(operand.data)), block_(operand.block), stride_(operand.stride) {
    if (constant()) {
      for (int64_t j = 0; j < tile_elements; j += lanes<C>) store(tile_.values + j, splat(load_one(data_)));
    }
  }

  // Elements [first, first + count), count up to tile_elements; null for an absent operand.
  const C* read(int64_t first, int64_t count) {
    if (data_ == nullptr) return nullptr;
    if (constant()) return tile_.values;
    int64_t block = first / block_, within = first % block_;
    if constexpr (sizeof(T) == sizeof(C)) {
      if (within + count <= block_) return data_ + block * stride_ + within;
    }
    for (int64_t done = 0; done < count; ++block, within = 0) {
      const int64_t run = block_ - within < count - done ? block_ - within : count - done;
      const T* from = data_ + block * stride_ + within;
      int64_t j = 0;
      for (Vec<C> pair[2]; j + 2 * lanes<C> <= run; j += 2 * lanes<C>) {
        load_pair(from + j, pair);
        store_pair(tile_.values + done + j, pair);
      }
      for (; j < run; j += lanes<C>) store(tile_.values + done + j, load_first(from + j, run - j));
      done += run;
    }
    return tile_.values;
  }

  void prefetch(int64_t first) const {
    if (lies_at(first)) isthmus::prefetch<false>(data_ + first);
  }
  void prefetch(int64_t first, Prefetches& later) const {
    if (lies_at(first)) later.add<false>(data_ + first);
  }

 private:
  bool constant() const { return data_ != nullptr && block_ == 1 && stride_ == 0; }
  bool lies_at(int64_t first) const { return first < block_ && block_ > 1; }

  const T* data_;
  int64_t block_, stride_;
  Tile<C> tile_;
};

template <class T>
class Writer {
  using C = Compute<T>;

 public:
  explicit Writer(const Result& result)
      : data_(static_cast<T*>(result.data)), block_(result.block), stride_(result.stride) {}

  // Where to put elements [first, first + count); null for a result that is not wanted. write() completes it.
  C* begin(int64_t first, int64_t count) {
    if (data_ == nullptr) return nullptr;
    if constexpr (sizeof(T) == sizeof(C)) {
      if (first % block_ + count <= block_) return data_ + first / block_ * stride_ + first % block_;
    }
    return tile_.values;
  }

  void prefetch(int64_t first) const {
    if (data_ != nullptr && first < block_) isthmus::prefetch<true>(data_ + first);
  }
  void prefetch(int64_t first, Prefetches& later) const {
    if (data_ != nullptr && first < block_) later.add<true>(data_ + first);
  }

  void write(const C* from, int64_t first, int64_t count) const {
    if (from != tile_.values) return;
    int64_t block = first / block_, within = first % block_;
    for (int64_t done = 0; done < count; ++block, within = 0) {
      const int64_t run = block_ - within < count - done ? block_ - within : count - done;
      T* to = data_ + block * stride_ + within;
      int64_t j = 0;
      for (Vec<C> pair[2]; j + 2 * lanes<C> <= run; j += 2 * lanes<C>) {
        load_pair(from + done + j, pair);
        store_pair(to + j, pair);
      }
      for (; j < run; j += lanes<C>) store_first(to + j, load(from + done + j), run - j);
      done += run;
    }
  }

 private:
  T* data_;
  int64_t block_, stride_;
  Tile<C> tile_;
};

}  // namespace
}  // namespace isthmus
