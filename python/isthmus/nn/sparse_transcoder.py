"""Sparse maps between activations, and dictionaries that several layers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isthmus import ops
from isthmus.objectives.sparse import fraction_of_variance_unexplained

from ._sparse_coder import SAEOutput, SparseCode, SparseCoder, check_k, geometric_median
from .sparse import TopKSAE


class Transcoder(SparseCoder):
    """Sparse map from one activation to another, such as from what goes into an MLP to what comes out.

    values, indices = topk(relu(x encoderᵀ + encoder_bias)) and
    y ≈ Σ values · decoder[indices] + decoder_bias + x skipᵀ. The skip path takes over what is linear in the map, and
    leaves the features the rest. It starts at 0.

    ``loss`` is the fraction of the variance of y that stays unexplained, plus AuxK as in :class:`TopKSAE`.
    :meth:`encode` and :meth:`activations` read x; :meth:`decode` leaves the skip path out, which a code knows nothing
    of; :meth:`steer` changes the map's output.

    Args:
        dim: size of x.
        target_dim: size of y.
        num_features: size F of the dictionary.
        k: features kept per row.
        skip: whether there is a skip path.
        aux_k: dead features per row in the auxiliary loss; ``None`` means target_dim / 2, at most F.
        aux_weight: weight of the auxiliary loss.
        dead_after: rows without firing after which a feature counts as dead.
        sync_firing: under ``torch.distributed``, count what fired on all ranks.

    Raises:
        ValueError: ``k`` or ``aux_k`` is out of range.

    Shapes:
        x ``[..., dim]``; y and reconstruction ``[..., target_dim]``; values and indices ``[..., k]``; losses ``[]``.

    Source: Dunefsky et al., Transcoders Find Interpretable LLM Feature Circuits, 2024 (arXiv 2406.11944); the skip path
    of Paulo et al., Transcoders Beat Sparse Autoencoders for Interpretability, 2025 (arXiv 2501.18823).

    Example:
        >>> transcoder = nn.Transcoder(16, 24, num_features=64, k=4)
        >>> x, y = torch.randn(32, 16), torch.randn(32, 24)
        >>> transcoder.init_from(x, y)
        >>> transcoder(x, y).loss.backward()
        >>> transcoder.steer(x, [5], clamp=3.0).shape
        torch.Size([32, 24])
    """

    options = ("k", "skip", "aux_k", "aux_weight", "dead_after")

    def __init__(
        self,
        dim: int,
        target_dim: int,
        num_features: int,
        k: int,
        *,
        skip: bool = True,
        aux_k: int | None = None,
        aux_weight: float = 1 / 32,
        dead_after: int = 10_000_000,
        sync_firing: bool = True,
    ) -> None:
        check_k(k, num_features)
        super().__init__(
            (dim,),
            num_features,
            write_shape=(target_dim,),
            aux_k=min(num_features, target_dim // 2) if aux_k is None else aux_k,
            aux_weight=aux_weight,
            dead_after=dead_after,
            sync_firing=sync_firing,
        )
        self.k = k
        self.skip = skip
        self.skip_weight = nn.Parameter(torch.zeros(target_dim, dim)) if skip else None

    def forward(self, x: Tensor, target: Tensor) -> SAEOutput:  # type: ignore[override]
        """Predict ``target`` ``[..., target_dim]`` from ``x`` ``[..., dim]``; in training also note what fired."""
        if x.shape[:-1] != target.shape[:-1]:
            raise ValueError(f"x has shape {list(x.shape)} and target {list(target.shape)}; expected the same rows")
        return self._explain(x, target)

    def predict(self, x: Tensor) -> Tensor:
        """The map itself: ``[..., dim]`` to ``[..., target_dim]``."""
        prediction = self.decode(*self.encode(x))
        return prediction if self.skip_weight is None else prediction + nn.functional.linear(x, self.skip_weight)

    @torch.no_grad()
    def init_from(self, x: Tensor, target: Tensor, iterations: int = 20) -> None:  # type: ignore[override]
        """Set ``decoder_bias`` to the geometric median of ``target``. Features of x and of y start unrelated."""
        self.decoder_bias.copy_(geometric_median(self._target_rows(target).to(self.decoder_bias.dtype), iterations))

    def _code(self, centred: Tensor) -> SparseCode:
        return self._topk(centred, self.k)

    def _reconstruct(self, code: SparseCode, rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if self.skip_weight is None:
            return super()._reconstruct(code, rows, target)
        straight = nn.functional.linear(rows, self.skip_weight)
        rest, squared_error = ops.sparse_reconstruct(
            code.values, code.indices, self.decoder_weight, self.decoder_bias, target - straight, order=code.order
        )
        return rest + straight, fraction_of_variance_unexplained(squared_error, target)

    def _unsteered(self, x: Tensor) -> Tensor:
        return self.predict(x)


class Crosscoder(TopKSAE):
    """One code for the activations of several layers, or of several models: a shared dictionary.

    A feature reads all layers of a row and writes all of them: values, indices =
    topk(relu(Σ over layers of (x − pre_bias) encoderᵀ + encoder_bias)), and every layer has directions of its own in
    ``decoder_weight`` ``[F, L · D]``. How long they are in each layer, :attr:`layer_norms`, says where a feature lives.

    It is a :class:`TopKSAE` of the layers side by side, with all of its options. Layers with more variance weigh more
    in the loss: scale them to the same.

    Args:
        num_layers: L.
        dim: size D of an activation.
        num_features, k, options: as for :class:`TopKSAE`.

    Raises:
        ValueError: as :class:`TopKSAE`.

    Shapes:
        x and reconstruction ``[..., L, D]``; values and indices ``[..., k]``; losses ``[]``.

    Source: Lindsey et al., Sparse Crosscoders for Cross-Layer Features and Model Diffing, 2024.

    Example:
        >>> crosscoder = nn.Crosscoder(num_layers=3, dim=16, num_features=64, k=4)
        >>> out = crosscoder(torch.randn(32, 3, 16))
        >>> out.reconstruction.shape, out.indices.shape, crosscoder.layer_norms.shape
        (torch.Size([32, 3, 16]), torch.Size([32, 4]), torch.Size([64, 3]))
    """

    def __init__(self, num_layers: int, dim: int, num_features: int, k: int, **options: Any) -> None:
        super().__init__(num_layers * dim, num_features, k, **options)
        self.read_shape = self.write_shape = torch.Size((num_layers, dim))

    @property
    def layer_norms(self) -> Tensor:
        """``[F, L]``: length of each feature's direction in each layer."""
        return torch.linalg.vector_norm(self.decoder_weight.unflatten(-1, self.write_shape), dim=-1)
