"""Stochastic embeddings: the chance that two inputs match, with the uncertainty of both."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import logsigmoid


def hedged_match_nll(z: Tensor, other: Tensor, same: Tensor, *, slope: Tensor, offset: Tensor) -> Tensor:
    """Soft contrastive loss of hedged instance embeddings (Oh et al. 2019, arXiv 1810.00319).

    Two inputs match with probability p = E σ(b − a |z − z'|), the mean over all pairs of a sample of one and a sample
    of the other. The loss is −log p where they match and −log(1 − p) where they do not; the divergences of both
    posteriors, with a small weight, make it the bound of the variational information bottleneck.

    Args:
        z: [K, B, D], samples of the first input of each pair.
        other: [J, B, D], samples of the second.
        same: bool [B], whether the pair matches.
        slope, offset: a > 0 and b, learned scalars.

    Returns:
        [B]. O(K J B) memory.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> z, same = torch.zeros(8, 2, 3), torch.tensor([True, False])
        >>> hedged_match_nll(z, z, same, slope=torch.tensor(1.0), offset=torch.tensor(0.0))
        tensor([0.6931, 0.6931])
    """
    if z.dim() != 3 or z.shape[1:] != other.shape[1:] or same.shape != z.shape[1:2]:
        raise ValueError(
            f"z, other and same have shapes {list(z.shape)}, {list(other.shape)} and {list(same.shape)}; "
            "expected [K, B, D], [J, B, D] and [B]"
        )
    distance = (z.unsqueeze(1) - other.unsqueeze(0)).norm(dim=-1)
    logits = offset - slope * distance
    # 1 − p is the mean of σ(−logit), so neither side is the difference of two numbers near 1.
    signed = logits.where(same, -logits)
    return math.log(distance.shape[0] * distance.shape[1]) - logsigmoid(signed).flatten(0, 1).logsumexp(0)
