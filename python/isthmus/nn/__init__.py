"""Bottleneck modules: the ops of :mod:`isthmus.ops` with parameters, buffers and an initialisation.

Every module keeps no arithmetic that an op already does, returns named tuples, and runs under
``torch.compile(fullgraph=True)`` and autocast.
"""

from .bayes import BayesLinear, mean_only
from .codebook import VectorQuantizer, VectorQuantizerOutput
from .codebook_features import CodebookFeatures, CodebookFeaturesOutput
from .codebook_losses import CodeDiversity, CodeOrthogonality, CommitmentCrossEntropy
from .codebook_transforms import AffineCodebook, ResidualSimVQ, SimVQ
from .gaussian import GaussianBottleneck, GaussianBottleneckOutput
from .hierarchical import HierarchicalVQ, HierarchicalVQOutput
from .implicit_codebook import QINCo
from .key_value import KeyValueBottleneck, KeyValueBottleneckOutput
from .lookup_free import LFQ, LFQOutput
from .random_projection import RandomProjectionQuantizer
from .residual import GroupedResidualVQ, ResidualVQ, ResidualVQOutput
from .residual_scalar import GroupedResidualFSQ, GroupedResidualLFQ, ResidualFSQ, ResidualLFQ
from .scalar import FSQ, BinaryMapper, LatentQuantizer, ScalarQuantizerOutput
from .sparse import KSparseAutoencoder, SAEOutput, TopKSAE
from .sparse_batch import BatchTopKSAE, MatryoshkaSAE
from .sparse_matching import FeatureMatches, match_features
from .sparse_threshold import GatedSAE, JumpReLUSAE, ReLUSAE
from .sparse_transcoder import Crosscoder, Transcoder

__all__ = [
    "FSQ",
    "LFQ",
    "AffineCodebook",
    "BatchTopKSAE",
    "BayesLinear",
    "BinaryMapper",
    "CodeDiversity",
    "CodeOrthogonality",
    "CodebookFeatures",
    "CodebookFeaturesOutput",
    "CommitmentCrossEntropy",
    "Crosscoder",
    "FeatureMatches",
    "GatedSAE",
    "GaussianBottleneck",
    "GaussianBottleneckOutput",
    "GroupedResidualFSQ",
    "GroupedResidualLFQ",
    "GroupedResidualVQ",
    "HierarchicalVQ",
    "HierarchicalVQOutput",
    "JumpReLUSAE",
    "KSparseAutoencoder",
    "KeyValueBottleneck",
    "KeyValueBottleneckOutput",
    "LFQOutput",
    "LatentQuantizer",
    "MatryoshkaSAE",
    "QINCo",
    "RandomProjectionQuantizer",
    "ReLUSAE",
    "ResidualFSQ",
    "ResidualLFQ",
    "ResidualSimVQ",
    "ResidualVQ",
    "ResidualVQOutput",
    "SAEOutput",
    "ScalarQuantizerOutput",
    "SimVQ",
    "TopKSAE",
    "Transcoder",
    "VectorQuantizer",
    "VectorQuantizerOutput",
    "match_features",
    "mean_only",
]
