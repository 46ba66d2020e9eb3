"""Sparse autoencoders whose features decide for themselves when they are active: ReLU, JumpReLU and gates."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from isthmus import ops
from isthmus.objectives.sparse import fraction_of_variance_unexplained, l1

from ._sparse_coder import SparseCode, SparseCoder


class ReLUSAE(SparseCoder):
    """Sparse autoencoder with an L1 penalty.

    f = relu((x − pre_bias) encoderᵀ + encoder_bias), of which only what is positive is ever formed, and reconstruction
    = Σ f · decoder + pre_bias. ``sparsity_loss`` is the mean over rows of Σ f · |decoder row|: with the norms in the
    penalty the decoder needs no unit norm. It has the unit of x, and ``reconstruction_loss``, the fraction of variance
    unexplained, has none: scale the data, or ``sparsity_weight`` with it.

    At the start about half of all features are positive; the penalty needs some hundred steps to make codes sparse. As
    long as they are not, neither time nor memory is saved.

    The number of entries depends on the data: :func:`isthmus.ops.threshold_encode` says what ``torch.compile`` makes of
    that.

    Args:
        dim: size D of the input.
        num_features: size F of the dictionary.
        sparsity_weight: of the penalty.
        aux_k: dead features per row in the auxiliary loss of :class:`TopKSAE`; 0 for none.
        aux_weight: weight of the auxiliary loss.
        dead_after: rows without firing after which a feature counts as dead.
        sync_firing: under ``torch.distributed``, count what fired on all ranks.

    Raises:
        ValueError: ``aux_k`` is out of range.

    Shapes:
        x ``[..., D]``; reconstruction ``[..., D]``; ragged values and indices ``[E]``, offsets ``[N + 1]``; losses
        ``[]``.

    Source: Bricken et al., Towards Monosemanticity, 2023; the penalty of Conerly et al., Update on how we train SAEs,
    2024.

    Example:
        >>> sae = nn.ReLUSAE(dim=16, num_features=64, sparsity_weight=0.1)
        >>> out = sae(torch.randn(32, 16))
        >>> out.reconstruction.shape, len(out.offsets), out.values.shape == out.indices.shape
        (torch.Size([32, 16]), 33, True)
    """

    options = ("sparsity_weight", "aux_k", "aux_weight", "dead_after")

    def __init__(
        self,
        dim: int,
        num_features: int,
        *,
        sparsity_weight: float = 0.01,
        aux_k: int = 0,
        aux_weight: float = 1 / 32,
        dead_after: int = 10_000_000,
        sync_firing: bool = True,
    ) -> None:
        super().__init__(
            (dim,),
            num_features,
            aux_k=aux_k,
            aux_weight=aux_weight,
            sparsity_weight=sparsity_weight,
            dead_after=dead_after,
            sync_firing=sync_firing,
        )

    def _code(self, centred: Tensor) -> SparseCode:
        return self._above(centred, 0.0)

    def _sparsity(self, code: SparseCode) -> Tensor:
        return l1(code.values, code.indices, self.decoder_weight, code.offsets)


class JumpReLUSAE(SparseCoder):
    """Sparse autoencoder whose every feature has a threshold that it learns.

    With a = (x − pre_bias) encoderᵀ + encoder_bias and θ = exp(log_threshold), f = a where a > θ and 0 elsewhere.
    ``sparsity_loss`` is the mean over rows of the number of active features, L0.

    Both are steps in θ, whose derivatives are 0 almost everywhere. In training their expectation over a density of a
    that is flat within ε = ``bandwidth`` stands in for them: with K = 1 where |a − θ| < ε / 2,
    ∂f / ∂θ = −(θ / ε) K and ∂L0 / ∂θ = −K / ε. To that end entries between θ − ε / 2 and θ are in the code, with value
    0.

    The number of entries depends on the data: :func:`isthmus.ops.threshold_encode` says what ``torch.compile`` makes of
    that.

    Args:
        dim: size D of the input.
        num_features: size F of the dictionary.
        sparsity_weight: of L0.
        threshold: θ of all features at the start.
        bandwidth: ε; the wider, the less noise and the more bias in the gradients of θ. It has the unit of a: the
            paper's 0.001 is for x with a mean square norm of 1.
        aux_k: dead features per row in the auxiliary loss of :class:`TopKSAE`; 0 for none.
        aux_weight: weight of the auxiliary loss.
        dead_after: rows without firing after which a feature counts as dead.
        sync_firing: under ``torch.distributed``, count what fired on all ranks.

    Raises:
        ValueError: ``threshold`` or ``bandwidth`` is not positive, or ``aux_k`` is out of range.

    Shapes:
        x ``[..., D]``; reconstruction ``[..., D]``; ragged values and indices ``[E]``, offsets ``[N + 1]``; losses
        ``[]``.

    Source: Rajamanoharan et al., Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders,
    2024 (arXiv 2407.14435).

    Example:
        >>> sae = nn.JumpReLUSAE(dim=16, num_features=64, threshold=0.5, bandwidth=0.1)
        >>> sae(torch.randn(32, 16)).loss.backward()
        >>> sae.log_threshold.grad.shape
        torch.Size([64])
    """

    options = ("sparsity_weight", "bandwidth", "aux_k", "aux_weight", "dead_after")

    def __init__(
        self,
        dim: int,
        num_features: int,
        *,
        sparsity_weight: float = 0.001,
        threshold: float = 0.001,
        bandwidth: float = 0.001,
        aux_k: int = 0,
        aux_weight: float = 1 / 32,
        dead_after: int = 10_000_000,
        sync_firing: bool = True,
    ) -> None:
        for name, value in (("threshold", threshold), ("bandwidth", bandwidth)):
            if not value > 0.0:
                raise ValueError(f"{name} must be positive, got {value}")
        super().__init__(
            (dim,),
            num_features,
            aux_k=aux_k,
            aux_weight=aux_weight,
            sparsity_weight=sparsity_weight,
            dead_after=dead_after,
            sync_firing=sync_firing,
        )
        self.bandwidth = bandwidth
        self.log_threshold = nn.Parameter(torch.full((num_features,), math.log(threshold)))

    def _code(self, centred: Tensor) -> SparseCode:
        threshold = self.log_threshold.exp()
        if not self.training:
            return self._above(centred, threshold)
        code = self._above(centred, threshold.detach() - self.bandwidth / 2)
        values, active = _jump(code.values, threshold[code.indices], self.bandwidth)
        return code._replace(values=values, penalty=active, fired=self._count(code.indices, active))


class GatedSAE(SparseCoder):
    """Sparse autoencoder that decides which features are active, and how active they are, by different biases.

    With a = (x − pre_bias) encoderᵀ, a feature is active where a + encoder_bias > 0, and then has the value
    relu(exp(log_gain) · a + magnitude_bias). ``sparsity_loss`` is the L1 norm of relu(a + encoder_bias), mean over
    rows: it shrinks the gate and leaves the magnitude alone.

    The gate is a step, through which no gradient comes. In training it learns from ``aux_loss``, the fraction of
    variance that a reconstruction from relu(a + encoder_bias) leaves unexplained; the decoder and ``pre_bias`` are
    frozen in it. Train it with unit norm (:meth:`keep_unit_norm` or ``isthmus.optim.RowAdam``), or small values and
    long decoder rows meet the penalty.

    The number of entries depends on the data: :func:`isthmus.ops.threshold_encode` says what ``torch.compile`` makes of
    that.

    Args:
        dim: size D of the input.
        num_features: size F of the dictionary.
        sparsity_weight: of the penalty.
        aux_weight: of the loss that the gate learns from.
        dead_after: rows without firing after which a feature counts as ``dead``.
        sync_firing: under ``torch.distributed``, count what fired on all ranks.

    Shapes:
        x ``[..., D]``; reconstruction ``[..., D]``; ragged values and indices ``[E]``, offsets ``[N + 1]``; losses
        ``[]``.

    Source: Rajamanoharan et al., Improving Dictionary Learning with Gated Sparse Autoencoders, 2024 (arXiv 2404.16014).

    Example:
        >>> sae = nn.GatedSAE(dim=16, num_features=64, sparsity_weight=0.1)
        >>> sae(torch.randn(32, 16)).loss.backward()
        >>> bool(sae.encoder_bias.grad.any())
        True
    """

    options = ("sparsity_weight", "aux_weight", "dead_after")

    def __init__(
        self,
        dim: int,
        num_features: int,
        *,
        sparsity_weight: float = 0.01,
        aux_weight: float = 1.0,
        dead_after: int = 10_000_000,
        sync_firing: bool = True,
    ) -> None:
        super().__init__(
            (dim,),
            num_features,
            aux_weight=aux_weight,
            sparsity_weight=sparsity_weight,
            dead_after=dead_after,
            sync_firing=sync_firing,
        )
        self.log_gain = nn.Parameter(torch.zeros(num_features))
        self.magnitude_bias = nn.Parameter(torch.zeros(num_features))

    def _code(self, centred: Tensor) -> SparseCode:
        code = self._above(centred, 0.0)
        heard = code.values - self.encoder_bias[code.indices]
        values = torch.relu(heard * self.log_gain.exp()[code.indices] + self.magnitude_bias[code.indices])
        return code._replace(values=values, penalty=code.values, fired=self._count(code.indices, values > 0))

    def _aux_loss(self, code: SparseCode, centred: Tensor, target: Tensor, reconstruction: Tensor) -> Tensor:
        assert code.penalty is not None
        _, squared_error = ops.sparse_reconstruct(
            code.penalty,
            code.indices,
            self.decoder_weight.detach(),
            self.pre_bias.detach(),
            target,
            offsets=code.offsets,
        )
        return fraction_of_variance_unexplained(squared_error, target)


def _jump(scores: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """The values of entries and whether they are active, with the gradients that stand in for those of a step."""
    active = (scores > threshold).to(scores.dtype)
    near = ((scores - threshold).abs() < bandwidth / 2).to(scores.dtype)
    # 0, with the derivative of a step in the threshold, up to sign.
    pull = near / bandwidth * (threshold - threshold.detach())
    return scores * active - threshold.detach() * pull, active - pull
