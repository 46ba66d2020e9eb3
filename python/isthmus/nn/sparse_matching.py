"""Which features of two dictionaries are the same."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from isthmus import ops
from isthmus.ops._arguments import accumulate_dtype


class FeatureMatches(NamedTuple):
    """What :func:`match_features` returns."""

    indices: Tensor
    cosine: Tensor


@torch.no_grad()
def match_features(directions: Tensor, dictionary: Tensor) -> FeatureMatches:
    """For each of some directions, the feature of a dictionary that points most nearly the same way.

    Follows features from layer to layer, from one training run to another, or compares what was learned with what is
    true. The matrix of cosines never exists: O(F · G · D) time, O(F + G) memory besides the dictionaries.

    Args:
        directions: [F, D], such as ``sae.decoder_weight``.
        dictionary: [G, D].

    Returns:
        indices int64 [F], into ``dictionary``, ties to the lowest; cosine [F], in float32 (float64 for float64).

    Source: feature flow of Laptev et al., Analyze Feature Flow to Enhance Interpretation and Steering in Language
    Models, 2025 (arXiv 2502.03032).

    Example:
        >>> match_features(torch.tensor([[2.0, 0.1], [0.0, -1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, -3.0]]))
        FeatureMatches(indices=tensor([1, 2]), cosine=tensor([0.9988, 1.0000]))
    """
    indices = ops.vq_assign(directions, dictionary, metric="cosine")
    dtype = accumulate_dtype(directions)
    cosine = torch.nn.functional.cosine_similarity(directions.to(dtype), dictionary[indices].to(dtype), dim=-1)
    return FeatureMatches(indices, cosine)
