"""Sparse autoencoders whose every row has k active features."""

from __future__ import annotations

from torch import Tensor, nn

from isthmus import ops
from isthmus.objectives.sparse import fraction_of_variance_unexplained

from ._sparse_coder import SAEOutput, SparseCode, SparseCoder, check_k

__all__ = ["KSparseAutoencoder", "SAEOutput", "TopKSAE"]


class TopKSAE(SparseCoder):
    """Sparse autoencoder that keeps the k largest features of every row.

    values, indices = topk(relu((x − pre_bias) encoderᵀ + encoder_bias)) and
    reconstruction = Σ values · decoder[indices] + pre_bias. No ``[rows, num_features]`` tensor is formed, forward or
    backward.

    ``loss`` = fraction of variance unexplained, |x − reconstruction|² / |x − mean of the batch|², plus
    ``aux_weight`` · ``aux_loss``. It needs a batch of at least two different rows.

    AuxK: a feature is dead when it has not fired for ``dead_after`` rows in training mode (``idle`` counts them). In
    training the ``aux_k`` strongest dead features of every row reconstruct what the live ones left over,
    x − reconstruction held constant and without ``pre_bias``; ``aux_loss`` is the fraction of it that stays
    unexplained. Its gradient reaches the decoder and the encoder of those features. It is 0 while no feature is dead,
    and costs as much as there are dead features; ``aux_k=0`` turns it off.

    Multi-TopK: with ``multi_k`` a second reconstruction from the best ``multi_k`` features is part of
    ``reconstruction_loss`` in training, so that features learn what they are for when they rank below the first k.

    Unit norm: rows of ``decoder_weight`` start with norm 1. After ``sae.keep_unit_norm(optimizer)`` each step of that
    optimizer first removes the part of the gradient parallel to each row and then normalises the rows, so a training
    loop has nothing to remember. Both halves are also public methods. ``isthmus.optim.RowAdam`` does the same in its
    own pass.

    Start: ``encoder_weight`` is the transpose of the decoder (the same ``[F, D]`` layout, so a copy). :meth:`init_from`
    then fits ``pre_bias`` and the encoder's magnitude to data.

    Distributed: with ``sync_firing`` the counts of fired features and of rows are summed over ranks by one collective,
    so that every rank judges death by all rows, as one process with the joint batch would. Gradient projection is
    linear and commutes with gradient averaging. Parameters flattened by FSDP cannot be projected row by row.

    Args:
        dim: size D of the input.
        num_features: size F of the dictionary.
        k: features kept per row.
        groups: GroupMax: the features are so many consecutive ranges of equal size, each of which gives its k / groups
            best; with ``groups=k`` the largest of each.
        multi_k: features of the second reconstruction, more than ``k``: 4 k in the paper. ``None``: there is none.
        multi_weight: weight of its loss.
        aux_k: dead features per row in the auxiliary loss; ``None`` means D / 2, at most F.
        aux_weight: weight of the auxiliary loss.
        dead_after: rows without firing after which a feature counts as dead.
        sync_firing: under ``torch.distributed``, count what fired on all ranks. ``False`` where ranks train different
            autoencoders.

    Raises:
        ValueError: ``k``, ``groups``, ``multi_k`` or ``aux_k`` is out of range.

    Shapes:
        x ``[..., D]``; reconstruction ``[..., D]``; values (descending, ≥ 0; with groups, group after group) and
        indices ``[..., k]``; losses ``[]``.

    Source: Gao et al., Scaling and evaluating sparse autoencoders, 2024 (arXiv 2406.04093).

    Example:
        >>> import torch, isthmus
        >>> sae = isthmus.nn.TopKSAE(dim=16, num_features=64, k=4)
        >>> optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
        >>> sae.keep_unit_norm(optimizer)
        >>> x = torch.randn(32, 16)
        >>> sae.init_from(x)
        >>> out = sae(x)
        >>> out.loss.backward()
        >>> optimizer.step()
        >>> out.reconstruction.shape, out.indices.shape
        (torch.Size([32, 16]), torch.Size([32, 4]))
        >>> stronger = sae.steer(x, [3, 7], add=2.0)
    """

    options = ("k", "groups", "multi_k", "aux_k", "aux_weight", "dead_after")

    def __init__(
        self,
        dim: int,
        num_features: int,
        k: int,
        *,
        groups: int = 1,
        multi_k: int | None = None,
        multi_weight: float = 1 / 8,
        aux_k: int | None = None,
        aux_weight: float = 1 / 32,
        dead_after: int = 10_000_000,
        sync_firing: bool = True,
    ) -> None:
        check_k(k, num_features)
        if groups < 1 or k % groups or num_features % groups:
            raise ValueError(f"groups must divide k={k} and num_features={num_features}, got {groups}")
        if multi_k is not None and not (k < multi_k <= num_features and groups == 1):
            raise ValueError(
                f"multi_k must be above k={k}, at most num_features={num_features}, without groups; got {multi_k}"
            )
        super().__init__(
            (dim,),
            num_features,
            aux_k=min(num_features, dim // 2) if aux_k is None else aux_k,
            aux_weight=aux_weight,
            dead_after=dead_after,
            sync_firing=sync_firing,
        )
        self.k = k
        self.groups = groups
        self.multi_k = multi_k
        self.multi_weight = multi_weight

    def _code(self, centred: Tensor) -> SparseCode:
        if self.multi_k is None or not self.training:
            return self._topk(centred, self.k, groups=self.groups)
        # The first k of the best multi_k are the best k.
        parts = [self.k, self.multi_k - self.k]
        (values, more), (indices, more_indices) = (
            part.split(parts, dim=-1)
            for part in ops.topk_encode(centred, self.encoder_weight, self.encoder_bias, self.multi_k)
        )
        order = ops.latent_order(indices, self.num_features, values=values)
        return SparseCode(values, indices, order=order, fired=order.counts, more=(more, more_indices))

    def _reconstruct(self, code: SparseCode, rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        reconstruction, loss = super()._reconstruct(code, rows, target)
        if code.more is not None:
            # The second reconstruction is the first and what the other features add to it.
            _, squared_error = ops.sparse_reconstruct(*code.more, self.decoder_weight, None, target - reconstruction)
            loss = loss + self.multi_weight * fraction_of_variance_unexplained(squared_error, target)
        return reconstruction, loss


class KSparseAutoencoder(SparseCoder):
    """The first of them: a linear code of which the k largest entries are kept, and nothing else.

    values, indices = topk(x encoderᵀ + encoder_bias), with values of either sign, and
    reconstruction = Σ values · decoder[indices] + decoder_bias. ``loss`` is the fraction of variance unexplained.

    With a small k many features never get to learn. The paper's cure is to begin with a larger one and let it fall:
    :meth:`anneal`. In evaluation ``alpha`` · k features are kept, which the paper finds best somewhat above 1.

    Args:
        dim: size D of the input.
        num_features: size F of the dictionary.
        k: features kept per row.
        tied: the decoder is the transposed encoder, one parameter; otherwise it only starts as that.
        alpha: features kept in evaluation are α · k, at least 1 and at most F.
        start_k: features kept per row before annealing; ``None``: ``k``.
        dead_after: rows without being selected after which a feature counts as ``dead``.
        sync_firing: under ``torch.distributed``, count what was selected on all ranks.

    Raises:
        ValueError: ``k``, ``start_k`` or ``alpha`` is out of range.

    Shapes:
        x ``[..., D]``; reconstruction ``[..., D]``; values (descending) and indices ``[..., k]``; losses ``[]``.

    Source: Makhzani and Frey, k-Sparse Autoencoders, 2014 (arXiv 1312.5663).

    Example:
        >>> model = nn.KSparseAutoencoder(16, 64, k=4, start_k=12, alpha=1.5)
        >>> for epoch in range(3):
        ...     model.anneal(epoch / 2)
        ...     model(torch.randn(32, 16)).indices.shape
        torch.Size([32, 12])
        torch.Size([32, 8])
        torch.Size([32, 4])
        >>> model.eval()(torch.randn(32, 16)).indices.shape
        torch.Size([32, 6])
    """

    options = ("k", "tied", "alpha", "start_k", "dead_after")

    def __init__(
        self,
        dim: int,
        num_features: int,
        k: int,
        *,
        tied: bool = True,
        alpha: float = 1.0,
        start_k: int | None = None,
        dead_after: int = 10_000_000,
        sync_firing: bool = True,
    ) -> None:
        check_k(k, num_features)
        start_k = k if start_k is None else start_k
        if not k <= start_k <= num_features:
            raise ValueError(f"start_k must be in [k={k}, num_features={num_features}], got {start_k}")
        if not alpha > 0.0:
            raise ValueError(f"alpha must be positive, got {alpha}")
        super().__init__(
            (dim,), num_features, write_shape=(dim,), aux_k=0, dead_after=dead_after, sync_firing=sync_firing
        )
        self.decoder_weight = self.encoder_weight if tied else nn.Parameter(self.encoder_weight.detach().clone())
        self.k = k
        self.tied = tied
        self.alpha = alpha
        self.start_k = start_k
        self.anneal(0.0)

    def anneal(self, progress: float) -> None:
        """Let k fall from ``start_k`` (``progress`` 0) to ``k`` (1), in a straight line.

        It is not part of the state: a resumed training calls it again.
        """
        self.training_k = round(self.start_k + min(max(progress, 0.0), 1.0) * (self.k - self.start_k))

    def _code(self, centred: Tensor) -> SparseCode:
        k = self.training_k if self.training else min(max(round(self.alpha * self.k), 1), self.num_features)
        return self._topk(centred, k, activation="identity")
