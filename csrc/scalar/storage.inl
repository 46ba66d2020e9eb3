// Indices in fewer bytes. Bound by memory: one pass, cut where an index begins at a byte.

#pragma once

#include <cstring>

#include "core/parallel.h"
#include "core/tiles.h"
#include "scalar/kernels.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

// Calls f(row, first, count) for stretches of a row's indices that begin at a whole byte.
template <class F>
void over_stretches(const BitStream& args, F&& f) {
  constexpr int64_t most = grain_elements;  // a multiple of 8 indices
  const int64_t per_row = (args.length + most - 1) / most;
  const int64_t longest = args.length < most ? args.length : most;
  parallel_for(args.rows * per_row, grain_elements / (longest + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / per_row, first = item % per_row * most, left = args.length - first;
      f(row, first, left < most ? left : most);
    }
  });
}

void pack_bits(const PackBits& args) {
  over_stretches(args, [&](int64_t row, int64_t first, int64_t count) {
    const int64_t* indices = args.indices + row * args.length + first;
    uint8_t* out = args.packed + row * args.row_bytes() + first * args.width / 8;
    const uint8_t* end = out + (count * args.width + 7) / 8;
    // Up to 7 bits wait for their byte; an index may bring 63 more.
    unsigned __int128 waiting = 0;
    int held = 0;
    int64_t i = 0;
    if (args.width <= 57) {  // while a whole word may be written, one store an index
      uint64_t word = 0;
      for (; i < count && end - out >= 8; ++i) {
        word |= static_cast<uint64_t>(indices[i]) << held;
        std::memcpy(out, &word, 8);
        held += args.width;
        out += held / 8;
        word = held < 64 ? word >> (held & ~7) : 0;
        held &= 7;
      }
      waiting = word;
    }
    for (; i < count; ++i) {
      waiting |= static_cast<unsigned __int128>(static_cast<uint64_t>(indices[i])) << held;
      for (held += args.width; held >= 8; held -= 8, waiting >>= 8) *out++ = static_cast<uint8_t>(waiting);
    }
    if (held > 0) *out = static_cast<uint8_t>(waiting);
  });
}

void unpack_bits(const UnpackBits& args) {
  over_stretches(args, [&](int64_t row, int64_t first, int64_t count) {
    const uint8_t* in = args.packed + row * args.row_bytes() + first * args.width / 8;
    int64_t* indices = args.indices + row * args.length + first;
    const uint64_t mask = (uint64_t{1} << args.width) - 1;
    int64_t i = 0;
    if (args.width <= 57) {  // while a whole word may be read, one load an index
      const int64_t bytes = args.row_bytes() - first * args.width / 8;
      for (; i < count && i * args.width / 8 + 8 <= bytes; ++i) {
        uint64_t word;
        std::memcpy(&word, in + i * args.width / 8, 8);
        indices[i] = static_cast<int64_t>(word >> (i * args.width % 8) & mask);
      }
      in += i * args.width / 8;
    }
    int held = -static_cast<int>(i * args.width % 8);
    unsigned __int128 waiting = 0;
    if (i < count && held < 0) {
      waiting = *in++ >> -held;
      held += 8;
    }
    for (; i < count; ++i, held -= args.width, waiting >>= args.width) {
      for (; held < args.width; held += 8) waiting |= static_cast<unsigned __int128>(*in++) << held;
      indices[i] = static_cast<int64_t>(static_cast<uint64_t>(waiting) & mask);
    }
  });
}

template <class To>
void narrow_to(const Narrow& args) {
  parallel_for(args.count, grain_elements, [&](int64_t begin, int64_t end) {
    const int64_t* __restrict from = args.indices;
    To* __restrict to = static_cast<To*>(args.out);
    for (int64_t i = begin; i < end; ++i) to[i] = static_cast<To>(from[i]);
  });
}

void narrow(const Narrow& args) {
  switch (args.bytes) {
    case 1:
      return narrow_to<uint8_t>(args);
    case 2:
      return narrow_to<int16_t>(args);
    case 4:
      return narrow_to<int32_t>(args);
    default:
      return narrow_to<int64_t>(args);
  }
}

}  // namespace
}  // namespace isthmus::ISTHMUS_LEVEL
