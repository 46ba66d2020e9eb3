"""Sparse autoencoders whose features decide for themselves when they are active: ReLU, JumpReLU and gates."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from isthmus import ops
from isthmus.objectives.sparse import fraction_of_variance_unexplained, l0_target_loss, l1

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
    ``sparsity_loss`` is the mean over rows of the number of active features, L0; or, with ``target_l0``,
    (L0 / target_l0 − 1)², which needs no weight to be tried out.

    Both f and L0 are steps in θ, whose derivatives are 0 almost everywhere. In training their expectation over a
    density of a that is flat within ε, the bandwidth, stands in for them: with K = 1 where |a − θ| < ε / 2,
    ∂f / ∂θ = −(θ / ε) K and ∂L0 / ∂θ = −K / ε. To that end entries between θ − ε / 2 and θ are in the code, with value
    0.

    Units: θ and ε are in those of a. For x with a mean square norm of D, as ``isthmus train sae`` makes it, a of a
    random direction is about 1; the paper's 0.001 for both is for a mean square norm of 1. :meth:`init_from` scales θ
    with the encoder, and with ``target_l0`` begins where that many features are active, whatever the scale of x, or
    ``start_l0``, if that is given: features that are silent at the start tend to remain so.
    An ε far below θ meets so few entries that θ learns next to nothing; by default it is as wide as θ itself.

    An optimizer like Adam moves log θ by no more than its learning rate in a step, however strong the penalty: a θ that
    has to become ten times as large needs 2.3 / lr steps.

    The number of entries depends on the data: :func:`isthmus.ops.threshold_encode` says what ``torch.compile`` makes of
    that.

    Args:
        dim: size D of the input.
        num_features: size F of the dictionary.
        sparsity_weight: of ``sparsity_loss``; ``None``: 0.001, the fraction of variance that a feature must explain of
            a row to be worth its place, or with ``target_l0`` 1.
        target_l0: active features per row that are asked for; ``None``: as few as ``sparsity_weight`` makes them.
        start_l0: active features per row that :meth:`init_from` begins with; ``None``: ``target_l0``.
        threshold: θ of all features at the start, before :meth:`init_from`.
        bandwidth: ε; the wider, the less noise and the more bias in the gradients of θ. ``None``: θ itself.
        aux_k: dead features per row in the auxiliary loss of :class:`TopKSAE`; 0 for none.
        aux_weight: weight of the auxiliary loss.
        dead_after: rows without firing after which a feature counts as dead.
        sync_firing: under ``torch.distributed``, count what fired on all ranks.

    Raises:
        ValueError: ``threshold`` or ``bandwidth`` is not positive, or ``target_l0``, ``start_l0`` or ``aux_k`` is out
            of range.

    Shapes:
        x ``[..., D]``; reconstruction ``[..., D]``; ragged values and indices ``[E]``, offsets ``[N + 1]``; losses
        ``[]``.

    Source: Rajamanoharan et al., Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders,
    2024 (arXiv 2407.14435).

    Example:
        >>> sae = nn.JumpReLUSAE(dim=16, num_features=64, target_l0=4)
        >>> x = torch.randn(32, 16)
        >>> sae.init_from(x)
        >>> sae(x).loss.backward()
        >>> sae.log_threshold.grad.shape
        torch.Size([64])
    """

    options = ("sparsity_weight", "target_l0", "bandwidth", "aux_k", "aux_weight", "dead_after")

    def __init__(
        self,
        dim: int,
        num_features: int,
        *,
        sparsity_weight: float | None = None,
        target_l0: float | None = None,
        start_l0: float | None = None,
        threshold: float = 1.0,
        bandwidth: float | None = None,
        aux_k: int = 0,
        aux_weight: float = 1 / 32,
        dead_after: int = 10_000_000,
        sync_firing: bool = True,
    ) -> None:
        for name, value in (("threshold", threshold), ("bandwidth", bandwidth)):
            if value is not None and not value > 0.0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name, value in (("target_l0", target_l0), ("start_l0", start_l0)):
            if value is not None and not 0.0 < value <= num_features:
                raise ValueError(f"{name} must be in (0, num_features={num_features}], got {value}")
        if sparsity_weight is None:
            sparsity_weight = 0.001 if target_l0 is None else 1.0
        super().__init__(
            (dim,),
            num_features,
            aux_k=aux_k,
            aux_weight=aux_weight,
            sparsity_weight=sparsity_weight,
            dead_after=dead_after,
            sync_firing=sync_firing,
        )
        self.target_l0 = target_l0
        self.start_l0 = target_l0 if start_l0 is None else start_l0
        self.bandwidth = bandwidth
        self.log_threshold = nn.Parameter(torch.full((num_features,), math.log(threshold)))

    def _code(self, centred: Tensor) -> SparseCode:
        threshold = self.log_threshold.exp()
        if not self.training:
            return self._above(centred, threshold)
        still = threshold.detach()
        bandwidth = still if self.bandwidth is None else torch.full_like(still, self.bandwidth)
        code = self._above(centred, still - bandwidth / 2)
        values, active = _jump(code.values, threshold[code.indices], bandwidth[code.indices])
        return code._replace(values=values, penalty=active, fired=self._count(code.indices, active))

    def _sparsity(self, code: SparseCode) -> Tensor:
        # In evaluation all entries of the code are active.
        active = torch.ones_like(code.values) if code.penalty is None else code.penalty
        l0 = super()._sparsity(code._replace(penalty=active))
        return l0 if self.target_l0 is None else l0_target_loss(l0, self.target_l0)

    def _fit_selection(self, centred: Tensor) -> None:
        if self.start_l0 is not None:
            *_, threshold = ops.batch_topk_encode(centred, self.encoder_weight, self.encoder_bias, self.start_l0)
            # No threshold stands for more features than are positive.
            if 0.0 < threshold < math.inf:
                self.log_threshold.fill_(threshold.log())

    def _scale_scores(self, factor: Tensor) -> None:
        super()._scale_scores(factor)
        self.log_threshold.add_(factor.log())


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


def _jump(scores: Tensor, threshold: Tensor, bandwidth: Tensor) -> tuple[Tensor, Tensor]:
    """The values of entries and whether they are active, with the gradients that stand in for those of a step."""
    active = (scores > threshold).to(scores.dtype)
    near = ((scores - threshold).abs() < bandwidth / 2).to(scores.dtype)
    # 0, with the derivative of a step in the threshold, up to sign.
    pull = near / bandwidth * (threshold - threshold.detach())
    return scores * active - threshold.detach() * pull, active - pull
