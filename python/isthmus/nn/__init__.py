"""Bottleneck modules: the ops of :mod:`isthmus.ops` with parameters, buffers and an initialisation.

Every module keeps no arithmetic that an op already does, returns named tuples, and runs under
``torch.compile(fullgraph=True)`` and autocast.
"""

from .bayes import BayesLinear, mean_only
from .codebook import VectorQuantizer, VectorQuantizerOutput
from .codebook_features import CodebookFeatures, CodebookFeaturesOutput
from .codebook_losses import CodeDiversity, CodeOrthogonality, CommitmentCrossEntropy
from .codebook_transforms import AffineCodebook, SimVQ
from .gaussian import GaussianBottleneck, GaussianBottleneckOutput
from .key_value import KeyValueBottleneck, KeyValueBottleneckOutput
from .random_projection import RandomProjectionQuantizer
from .residual import GroupedResidualVQ, ResidualVQ, ResidualVQOutput
from .scalar import FSQ, LFQ, BinaryMapper, LatentQuantizer, LFQOutput, ScalarQuantizerOutput
from .sparse import TopKSAE, TopKSAEOutput

__all__ = [
    "FSQ",
    "LFQ",
    "AffineCodebook",
    "BayesLinear",
    "BinaryMapper",
    "CodeDiversity",
    "CodeOrthogonality",
    "CodebookFeatures",
    "CodebookFeaturesOutput",
    "CommitmentCrossEntropy",
    "GaussianBottleneck",
    "GaussianBottleneckOutput",
    "GroupedResidualVQ",
    "KeyValueBottleneck",
    "KeyValueBottleneckOutput",
    "LFQOutput",
    "LatentQuantizer",
    "RandomProjectionQuantizer",
    "ResidualVQ",
    "ResidualVQOutput",
    "ScalarQuantizerOutput",
    "SimVQ",
    "TopKSAE",
    "TopKSAEOutput",
    "VectorQuantizer",
    "VectorQuantizerOutput",
    "mean_only",
]
