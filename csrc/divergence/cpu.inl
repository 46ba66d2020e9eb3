// Divergences between Gaussians, and the streaming mean of importance weights, on the CPU.
//
// One pass each way: forward reads each input once and writes the sums; backward reads them again and writes every
// gradient. Bound by arithmetic in cache and by memory beyond it.
//
// Work goes through pieces of 512 elements: the divergence is computed over a piece as if it were one row, at full
// vector width whatever the shape, and summed from L1 as the reduction asks (core/reduce.h).

#include "core/gaussian_tiles.h"
#include "core/parallel.h"
#include "core/reduce.h"
#include "divergence/kernels.h"

namespace isthmus::ISTHMUS_LEVEL {
namespace {

#include "divergence/kl.inl"
#include "divergence/log_mean_exp.inl"

}  // namespace

extern const DivergenceKernels divergence_table;
const DivergenceKernels divergence_table = {gaussian_kl, gaussian_kl_backward, log_mean_exp, log_mean_exp_backward};

}  // namespace isthmus::ISTHMUS_LEVEL
