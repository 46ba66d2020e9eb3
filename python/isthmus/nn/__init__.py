"""Bottleneck modules: the ops of :mod:`isthmus.ops` with parameters, buffers and an initialisation.

Every module keeps no arithmetic that an op already does, returns named tuples, and runs under
``torch.compile(fullgraph=True)`` and autocast.
"""

from .bayes import BayesLinear, mean_only
from .codebook import VectorQuantizer, VectorQuantizerOutput
from .gaussian import GaussianBottleneck, GaussianBottleneckOutput
from .sparse import TopKSAE, TopKSAEOutput

__all__ = [
    "BayesLinear",
    "GaussianBottleneck",
    "GaussianBottleneckOutput",
    "TopKSAE",
    "TopKSAEOutput",
    "VectorQuantizer",
    "VectorQuantizerOutput",
    "mean_only",
]
