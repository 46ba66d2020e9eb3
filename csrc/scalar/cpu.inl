// Quantizers without a codebook table on the CPU: finite scalars (fsq.inl, residual.inl), signs and sampled bits
// (bits.inl), a scalar codebook for each dimension (latent.inl), indices back to values (digits.inl) and in few bits
// (storage.inl).
//
// All are elementwise but for sums over rows of at most 62 numbers: every tensor is touched once, in groups of rows
// that stay in L1 from the first step to the last (rows.inl).

#include "core/dispatch.h"
#include "scalar/bits.inl"
#include "scalar/fsq.inl"
#include "scalar/latent.inl"
#include "scalar/residual.inl"
#include "scalar/storage.inl"

namespace isthmus::ISTHMUS_LEVEL {

extern const ScalarKernels scalar_table;
const ScalarKernels scalar_table = {
    fsq_quantize,
    fsq_backward,
    residual_fsq_quantize,
    residual_fsq_backward,
    lfq_quantize,
    lfq_backward,
    latent_quantize,
    latent_backward,
    fsq_decode,
    latent_decode,
    latent_decode_backward,
    binary_map,
    binary_map_backward,
    pack_bits,
    unpack_bits,
    narrow,
};

}  // namespace isthmus::ISTHMUS_LEVEL
