"""Every op of Isthmus in plain PyTorch: the specification, and the oracle of the tests.

The functions have the names and arguments of ``isthmus.ops`` and are differentiable, in float64
too. Two things differ. What is random there takes its ``noise`` as a tensor here; and what
searches also accepts the ``indices`` of an earlier search, to hold a selection fixed.
"""

from isthmus.reference.adam import adam_rows_
from isthmus.reference.assignment import vq_cross_entropy, vq_sample, vq_soft_quantize, vq_soft_statistics
from isthmus.reference.bayes import bayes_linear
from isthmus.reference.categorical import categorical_kl, gumbel_noise, gumbel_softmax, gumbel_softmax_kl
from isthmus.reference.codebook import code_statistics, code_totals, update_codebook_, vq_assign, vq_match, vq_quantize
from isthmus.reference.divergence import gaussian_kl, log_mean_exp
from isthmus.reference.gaussian import (
    gaussian_noise,
    gaussian_sample,
    gaussian_sample_kl,
    gaussian_sample_log_prob,
)
from isthmus.reference.likelihood import (
    discretized_gaussian_nll,
    discretized_logistic_mixture_nll,
    gaussian_nll,
    generalized_gaussian_nll,
)
from isthmus.reference.pairwise import aggregate_log_prob, component_log_prob, mixture_log_prob, mmd
from isthmus.reference.residual import residual_code_totals, residual_vq_quantize
from isthmus.reference.scalar import (
    binary_map,
    fsq_decode,
    fsq_quantize,
    latent_decode,
    latent_quantize,
    lfq_code_counts,
    lfq_decode,
    lfq_quantize,
    lfq_quantize_entropy,
    pack_indices,
    residual_fsq_quantize,
    unpack_indices,
)
from isthmus.reference.selection import batch_topk_encode, threshold_encode
from isthmus.reference.sparse import LatentOrder, latent_order, sparse_decode, sparse_reconstruct
from isthmus.reference.topk import topk_encode

__all__ = [
    "LatentOrder",
    "adam_rows_",
    "aggregate_log_prob",
    "batch_topk_encode",
    "bayes_linear",
    "binary_map",
    "categorical_kl",
    "code_statistics",
    "code_totals",
    "component_log_prob",
    "discretized_gaussian_nll",
    "discretized_logistic_mixture_nll",
    "fsq_decode",
    "fsq_quantize",
    "gaussian_kl",
    "gaussian_nll",
    "gaussian_noise",
    "gaussian_sample",
    "gaussian_sample_kl",
    "gaussian_sample_log_prob",
    "generalized_gaussian_nll",
    "gumbel_noise",
    "gumbel_softmax",
    "gumbel_softmax_kl",
    "latent_decode",
    "latent_order",
    "latent_quantize",
    "lfq_code_counts",
    "lfq_decode",
    "lfq_quantize",
    "lfq_quantize_entropy",
    "log_mean_exp",
    "mixture_log_prob",
    "mmd",
    "pack_indices",
    "residual_code_totals",
    "residual_fsq_quantize",
    "residual_vq_quantize",
    "sparse_decode",
    "sparse_reconstruct",
    "threshold_encode",
    "topk_encode",
    "unpack_indices",
    "update_codebook_",
    "vq_assign",
    "vq_cross_entropy",
    "vq_match",
    "vq_quantize",
    "vq_sample",
    "vq_soft_quantize",
    "vq_soft_statistics",
]
