"""Terms to add to the loss of a :class:`VectorQuantizer`, through its argument ``losses``.

Each is called with the vectors ``[N, d]``, the codes in use ``[K, d]`` (or ``[H, N, d]`` and ``[H, K, d]``) and the
indices of the vectors, −1 where they are masked, and returns a number.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import ops

from ._codebook_learning import mean_of_live


class CommitmentCrossEntropy(nn.Module):
    """−log p(chosen code | x) with p = softmax(−|x − c|² / temperature): mean over vectors, in nats.

    Pulls a vector towards its code by comparison with all other codes. Use it in place of the squared commitment,
    with ``commitment_weight=0``.

    Args:
        weight: factor of the term.
        temperature: above 0, in units of squared distance.

    Example:
        >>> import torch, isthmus
        >>> loss = isthmus.nn.CommitmentCrossEntropy(weight=0.1)
        >>> quantizer = isthmus.nn.VectorQuantizer(16, 4, commitment_weight=0.0, losses=[loss])
        >>> out, terms = quantizer(torch.randn(8, 4), return_loss_breakdown=True)
        >>> torch.equal(terms["CommitmentCrossEntropy"], out.loss)
        True
    """

    def __init__(self, weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.temperature = temperature

    def forward(self, x: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
        """The weighted term."""
        loss = ops.vq_cross_entropy(x, codes, indices, temperature=self.temperature)
        return self.weight * mean_of_live(loss, indices >= 0)

    def extra_repr(self) -> str:
        return f"weight={self.weight}, temperature={self.temperature}"


class CodeDiversity(nn.Module):
    """Minus the entropy, in nats, of the mean of p = softmax(−|x − c|² / temperature) over the vectors.

    Its minimum, −log K, uses all codes alike. Distributed: of the vectors of this rank.

    Args:
        weight: factor of the term.
        temperature: above 0, in units of squared distance.

    Example:
        >>> import torch, isthmus
        >>> loss = isthmus.nn.CodeDiversity(weight=1.0, temperature=1e6)
        >>> term = loss(torch.randn(8, 4), torch.randn(16, 4), torch.zeros(8, dtype=torch.int64))
        >>> round(float(term.exp()) * 16, 3)
        1.0
    """

    def __init__(self, weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.temperature = temperature

    def forward(self, x: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
        """The weighted term."""
        _, usage = ops.vq_soft_statistics(x, codes, temperature=self.temperature, mask=indices >= 0)
        return -self.weight * torch.special.entr(usage).sum(dim=-1).mean()

    def extra_repr(self) -> str:
        return f"weight={self.weight}, temperature={self.temperature}"


class CodeOrthogonality(nn.Module):
    """Mean squared cosine between codes: Σ_{i≠j} cos²(c_i, c_j) / n², n the number of codes compared.

    Needs codes that learn by gradient. Memory O(n²): bound it by ``max_codes`` for large codebooks.

    Args:
        weight: factor of the term.
        active_codes_only: compare only codes that vectors of the batch chose.
        max_codes: compare at most this many codes, a new random choice in each step.

    Source: Shin et al., Exploration into Translation-Equivariant Image Quantization, 2021.

    Example:
        >>> import torch, isthmus
        >>> loss = isthmus.nn.CodeOrthogonality(weight=10.0)
        >>> x, none = torch.randn(8, 4), torch.zeros(8, dtype=torch.int64)
        >>> loss(x, torch.eye(4), none), loss(x, torch.ones(4, 4), none)
        (tensor(0.), tensor(7.5000))
    """

    def __init__(self, weight: float = 1.0, *, active_codes_only: bool = False, max_codes: int | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.active_codes_only = active_codes_only
        self.max_codes = max_codes

    def forward(self, x: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
        """The weighted term."""
        if codes.dim() == 3:
            return torch.stack([self(*of_head) for of_head in zip(x, codes, indices, strict=True)]).mean()
        live = codes.new_ones(len(codes))
        if self.active_codes_only:
            # One place more than there are codes: masked vectors hit that.
            hits = codes.new_zeros(len(codes) + 1).index_fill(0, indices.flatten() % (len(codes) + 1), 1.0)
            live = hits[:-1]
        if self.max_codes is not None and self.max_codes < len(codes):
            chosen = (live + torch.rand_like(live)).topk(self.max_codes).indices
            codes, live = codes[chosen], live[chosen]
        unit = F.normalize(codes, dim=-1) * live.unsqueeze(-1)
        cosine = unit @ unit.T
        off_diagonal = cosine.square().sum() - cosine.diagonal().square().sum()
        return self.weight * off_diagonal / live.sum().clamp_min(1.0).square()

    def extra_repr(self) -> str:
        return f"weight={self.weight}, active_codes_only={self.active_codes_only}, max_codes={self.max_codes}"
