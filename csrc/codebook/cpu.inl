// Vector quantization on the CPU.
//
// search.inl finds the best codes of rows in cache, direct.inl those of few rows, lookup.inl makes them the op,
// match.inl finds the best rows of codes on the way; the rest is what follows from indices.

#include "codebook/kernels.h"
#include "core/amx_tiles.h"
#include "core/dispatch.h"
#include "core/product.h"
#include "core/rounding.h"
#include "core/sort.h"
#include "core/tiles.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

#include "codebook/gather.inl"

#include "codebook/search.inl"
// after search
#include "codebook/direct.inl"
// after all three: searches, then gathers while rows are in cache
#include "codebook/lookup.inl"
// after lookup
#include "codebook/match.inl"

#include "codebook/passage.inl"
// after passage
#include "codebook/backward.inl"

#include "codebook/statistics.inl"
#include "codebook/update.inl"

}  // namespace

extern const CodebookKernels codebook_table;
const CodebookKernels codebook_table = {search, match, gather, backward, statistics, update};

}  // namespace isthmus::ISTHMUS_LEVEL
