// Residual vector quantization on the CPU.
//
//     r_0 = x,    c_q = the code of stage q nearest to r_q,    r_{q+1} = r_q - c_q
//
// All stages in one pass: a block of rows is loaded once, and its residuals stay in L2 while the packed codebooks of
// the stages stream past (codebook/search.inl). A residual is a rounded number of the compute type, made by
// subtractions alone: the same bits at every level, so that the exact nearest code of it is the same code.
//
// Arithmetic: 2·N·D·ΣK operations in the search, times the beam. Memory: the packed codebooks and one block per thread.
// Nothing of size N × Q × D exists: what a code is given is found again from x and the indices.

#include "codebook/kernels.h"
#include "core/dispatch.h"
#include "core/product.h"
#include "core/rounding.h"
#include "core/sort.h"
#include "core/tiles.h"
#include "residual/kernels.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

#include "codebook/passage.inl"
#include "codebook/search.inl"
// after search
#include "codebook/direct.inl"
#include "residual/path.inl"
// after path
#include "residual/backward.inl"
#include "residual/beam.inl"

}  // namespace

extern const ResidualKernels residual_table;
const ResidualKernels residual_table = {search, backward, totals};

}  // namespace isthmus::ISTHMUS_LEVEL
