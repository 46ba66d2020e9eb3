"""What all sparse autoencoders share: parameters, the course of a forward, dead features, steering and unit norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from isthmus import ops
from isthmus.objectives.sparse import aux_k_loss, fraction_of_variance_unexplained
from isthmus.ops._arguments import accumulate_dtype

from ._ranks import all_reduce, has_ranks


class SAEOutput(NamedTuple):
    """What sparse autoencoders return.

    A padded code has values and indices [..., k] and no offsets; index −1 marks an empty place of value 0. In a ragged
    code all rows lie one after the other: values and indices [E], and of N rows row n owns the entries from offsets[n]
    up to offsets[n + 1], in ascending order of features.

    ``loss`` is reconstruction_loss + sparsity_weight · sparsity_loss + aux_weight · aux_loss. Terms that a model lacks
    are 0.
    """

    reconstruction: Tensor
    values: Tensor
    indices: Tensor
    offsets: Tensor | None
    loss: Tensor
    reconstruction_loss: Tensor
    sparsity_loss: Tensor
    aux_loss: Tensor


class SparseCode(NamedTuple):
    """A code of N rows, and what training wants to know of it.

    Args:
        values, indices: padded [N, k], or ragged [E].
        offsets: [N + 1] of a ragged code.
        order: entries sorted by feature, which all weight gradients share; made in training.
        fired: int64 [F], in how many rows each feature is active; made in training.
        penalty: [E], what each entry adds to the sparsity loss of its row, where that is not made of the values.
        threshold: [], the smallest value that was selected, where the batch chose it.
        more: values and indices of the next best entries, for a second reconstruction.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor | None = None
    order: ops.LatentOrder | None = None
    fired: Tensor | None = None
    penalty: Tensor | None = None
    threshold: Tensor | None = None
    more: tuple[Tensor, Tensor] | None = None


class SparseCoder(nn.Module):
    """F features that read rows of size D, and F directions that write them, or other rows, again.

    A subclass says in ``_code`` which features of a row are active and how much; the rest is here. Inside, rows are
    always ``[N, D]``.

    Args:
        read_shape: shape of one input; D is its product.
        write_shape: shape of one reconstruction; ``None``: that of an input, the decoder starts as the transposed
            encoder, and one ``pre_bias`` is taken off inputs and put onto reconstructions. Otherwise the decoder has
            directions and a ``decoder_bias`` of its own.
        num_features: F.
        aux_k: dead features per row in the auxiliary loss; 0 for none.
        sparsity_weight, aux_weight: of the terms of the loss.
        dead_after: rows without firing after which a feature counts as dead.
        sync_firing: under ``torch.distributed``, count what fired on all ranks.
    """

    idle: Tensor
    options: tuple[str, ...] = ("dead_after",)

    def __init__(
        self,
        read_shape: Sequence[int],
        num_features: int,
        *,
        write_shape: Sequence[int] | None = None,
        aux_k: int = 0,
        aux_weight: float = 0.0,
        sparsity_weight: float = 0.0,
        dead_after: int,
        sync_firing: bool,
    ) -> None:
        if not 0 <= aux_k <= num_features:
            raise ValueError(f"aux_k must be in [0, num_features={num_features}], got {aux_k}")
        if dead_after < 1:
            raise ValueError(f"dead_after must be at least 1, got {dead_after}")
        super().__init__()
        self.read_shape = torch.Size(read_shape)
        self.write_shape = self.read_shape if write_shape is None else torch.Size(write_shape)
        self.centred = write_shape is None
        self.num_features = num_features
        self.aux_k = aux_k
        self.aux_weight = aux_weight
        self.sparsity_weight = sparsity_weight
        self.dead_after = dead_after
        self.sync_firing = sync_firing
        directions = _directions(num_features, self.read_shape.numel())
        self.encoder_weight = nn.Parameter(directions)
        self.encoder_bias = nn.Parameter(torch.zeros(num_features))
        if self.centred:
            self.decoder_weight = nn.Parameter(directions.clone())
            self.pre_bias = nn.Parameter(torch.zeros(self.read_shape.numel()))
        else:
            self.decoder_weight = nn.Parameter(_directions(num_features, self.write_shape.numel()))
            self.decoder_bias = nn.Parameter(torch.zeros(self.write_shape.numel()))
        self.register_buffer("idle", torch.zeros(num_features, dtype=torch.int64))

    @property
    def bias(self) -> Tensor:
        """What a reconstruction has besides its features."""
        return self.pre_bias if self.centred else self.decoder_bias

    @property
    def dead(self) -> Tensor:
        """Bool ``[F]``: features that have not fired for ``dead_after`` rows."""
        return self.idle >= self.dead_after

    # ---- codes -------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> SAEOutput:
        """Reconstruct ``x`` ``[..., D]``; in training mode also note which features fired."""
        return self._explain(x, x)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """The code of ``x`` ``[..., D]``: values and indices ``[..., k]``, or ragged values, indices and offsets."""
        code = self._code(self._centred(self._rows(x)))
        if code.offsets is not None:
            return code.values, code.indices, code.offsets
        return self._like_inputs(code.values, x), self._like_inputs(code.indices, x)

    def decode(self, values: Tensor, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
        """The reconstruction from what :meth:`encode` returns: ``[..., D]``, or ``[N, D]`` from a ragged code."""
        return self._decode(values, indices, offsets, self.bias)

    def decode_sparse(self, values: Tensor, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
        """What these features add to a reconstruction: :meth:`decode` without the bias."""
        return self._decode(values, indices, offsets, None)

    def activations(self, x: Tensor, features: Tensor | Sequence[int]) -> Tensor:
        """How active S different features are in ``x`` ``[..., D]``: ``[..., S]``, 0 where they are not in the code."""
        rows = self._rows(x)
        code = self._code(self._centred(rows))
        features = self._chosen(features)
        columns = len(features) + 1
        # Each entry goes to the column of its feature; others, and empty places (−1), to one more, the last.
        column = features.new_full((self.num_features + 1,), len(features))
        column[features] = torch.arange(len(features), device=x.device)
        place = entry_rows(code.indices, code.offsets) * columns + column[code.indices].flatten()
        found = code.values.new_zeros(len(rows) * columns).index_add(0, place, code.values.flatten())
        return self._like_inputs(found.view(len(rows), columns)[:, :-1], x)

    def steer(
        self,
        x: Tensor,
        features: Tensor | Sequence[int],
        *,
        clamp: float | Tensor | None = None,
        add: float | Tensor | None = None,
    ) -> Tensor:
        """``x`` with some features changed; what the code does not explain of it stays.

        Args:
            x: ``[..., D]``.
            features: S different features.
            clamp: what their activations become: a number, or a tensor that broadcasts to ``[..., S]``.
            add: what is added to their activations, instead.

        Returns:
            ``[..., D]``, differentiable in ``x``, ``clamp`` and ``add``.

        Raises:
            ValueError: not exactly one of ``clamp`` and ``add`` is given, or ``features`` are not different numbers
                below F.
        """
        if (clamp is None) == (add is None):
            raise ValueError(f"steer takes one of clamp and add, got clamp={clamp} and add={add}")
        features = self._chosen(features)
        change = torch.as_tensor(add if clamp is None else clamp, dtype=x.dtype, device=x.device)
        if clamp is None:
            change = change.expand(*self._leading(x), len(features))
        else:
            change = change - self.activations(x, features)
        return self._unsteered(x) + self.decode_sparse(change, features.expand(change.shape))

    # ---- unit norm ---------------------------------------------------------------------------------------------------

    def keep_unit_norm(self, optimizer: Optimizer) -> None:
        """Project the decoder's gradient before, and normalise its rows after, every step.

        ``isthmus.optim.RowAdam`` does both in its own pass over a parameter with ``unit_norm=True``.
        """

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self.project_decoder_grad()

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self.normalize_decoder()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    @torch.no_grad()
    def project_decoder_grad(self) -> None:
        """Remove from the gradient of each (unit-norm) decoder row the part along the row.

        Without it an adaptive optimizer spends its step on a norm that is then thrown away.
        """
        weight, grad = self.decoder_weight, self.decoder_weight.grad
        if grad is not None:
            grad.addcmul_(torch.linalg.vecdot(grad, weight).unsqueeze(-1), weight, value=-1.0)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every decoder row to Euclidean norm 1."""
        norms = torch.linalg.vector_norm(self.decoder_weight, dim=-1, keepdim=True)
        self.decoder_weight.div_(norms.clamp_min(torch.finfo(norms.dtype).tiny))

    # ---- start -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_from(self, x: Tensor, iterations: int = 20) -> None:
        """Fit the start to ``x`` ``[..., D]``.

        The bias becomes the geometric median (Weiszfeld iterations from the mean); then the encoder is scaled so that
        the reconstruction has the least squared error that one factor can give. Memory O(N · D).

        Call it before wrapping in ``DistributedDataParallel``, which gives all ranks the start of the first.
        """
        x = x.to(self.bias.dtype)
        rows = self._rows(x)
        self.bias.copy_(geometric_median(rows, iterations))
        self._fit_selection(self._centred(rows))
        read = self.decode_sparse(*self.encode(x)).reshape(rows.shape)
        tiny = torch.finfo(rows.dtype).tiny
        factor = ((rows - self.bias) * read).sum() / (read * read).sum().clamp_min(tiny)
        # An encoder that finds nothing yet stays what it is.
        self._scale_scores(torch.where(factor > 0.0, factor, 1.0))

    # ---- what subclasses say -----------------------------------------------------------------------------------------

    def _code(self, centred: Tensor) -> SparseCode:
        """The code of rows ``[N, D]``, off which ``pre_bias`` has been taken."""
        raise NotImplementedError

    def _fit_selection(self, centred: Tensor) -> None:
        """Fit to rows what decides on the number of active features, if that is a parameter."""

    def _scale_scores(self, factor: Tensor) -> None:
        """Make reconstructions this much longer, from the same features."""
        # Tied weights read and write: each has half of the factor.
        self.encoder_weight.mul_(factor.sqrt() if self.encoder_weight is self.decoder_weight else factor)

    def _reconstruct(self, code: SparseCode, rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that come close to ``target``, and the reconstruction loss."""
        reconstruction, squared_error = ops.sparse_reconstruct(
            code.values, code.indices, self.decoder_weight, self.bias, target, offsets=code.offsets, order=code.order
        )
        return reconstruction, fraction_of_variance_unexplained(squared_error, target)

    def _topk(self, centred: Tensor, k: int, **options: Any) -> SparseCode:
        """The best k of each row, in training with their order."""
        weight, bias = self.encoder_weight, self.encoder_bias
        if not self.training:
            return SparseCode(*ops.topk_encode(centred, weight, bias, k, **options))
        values, indices, order = ops.topk_encode(centred, weight, bias, k, return_order=True, **options)
        return SparseCode(values, indices, order=order, fired=order.counts)

    def _above(self, centred: Tensor, threshold: Tensor | float) -> SparseCode:
        """All entries above a threshold, in training with their order."""
        weight, bias = self.encoder_weight, self.encoder_bias
        if not self.training:
            return SparseCode(*ops.threshold_encode(centred, weight, bias, threshold))
        values, indices, offsets, order = ops.threshold_encode(centred, weight, bias, threshold, return_order=True)
        return SparseCode(values, indices, offsets, order=order, fired=order.counts)

    def _count(self, indices: Tensor, active: Tensor) -> Tensor:
        """In how many rows each feature is active, where not all entries are."""
        return self.idle.new_zeros(self.num_features).index_add_(0, indices, active.long())

    def _sparsity(self, code: SparseCode) -> Tensor:
        """The mean over rows of the penalty on their entries."""
        if code.penalty is None:
            return _zero(code.values)
        assert code.offsets is not None
        return code.penalty.sum(dtype=accumulate_dtype(code.penalty)) / max(len(code.offsets) - 1, 1)

    def _aux_loss(self, code: SparseCode, centred: Tensor, target: Tensor, reconstruction: Tensor) -> Tensor:
        """AuxK: what dead features make of what the live ones left over."""
        if self.aux_k == 0 or self._knows_all_live():
            return _zero(code.values)
        values, indices, order = ops.topk_encode(
            centred, self.encoder_weight, self.encoder_bias, self.aux_k, among=self.dead, return_order=True
        )
        return aux_k_loss(target - reconstruction, values, indices, self.decoder_weight, order=order)

    def _knows_all_live(self) -> bool:
        """Whether nothing is dead, where that can be told without waiting for a device or breaking a graph."""
        return self.idle.is_cpu and not torch.compiler.is_compiling() and not bool(self.dead.any())

    def _learn_from(self, code: SparseCode, rows: int) -> None:
        """What training notes besides gradients."""
        assert code.fired is not None
        self._note_firing(code.fired, rows)

    def _note_firing(self, fired: Tensor, rows: int) -> None:
        """Note for each feature how many rows, of all ranks, have passed since it fired."""
        seen = torch.cat([fired, self.idle.new_full((1,), rows)])
        if self.sync_firing and has_ranks():
            (seen,) = all_reduce(seen)
        self.idle.copy_(torch.where(seen[:-1] > 0, 0, self.idle + seen[-1]))

    def _unsteered(self, x: Tensor) -> Tensor:
        """What steering adds features to."""
        return x

    # ---- rows --------------------------------------------------------------------------------------------------------

    def _explain(self, x: Tensor, target: Tensor) -> SAEOutput:
        rows, wanted = self._rows(x), self._target_rows(target)
        centred = self._centred(rows)
        code = self._code(centred)
        reconstruction, reconstruction_loss = self._reconstruct(code, rows, wanted)
        sparsity_loss, aux_loss = self._sparsity(code), _zero(code.values)
        if self.training:
            self._learn_from(code, len(rows))
            aux_loss = self._aux_loss(code, centred, wanted, reconstruction)
        values, indices = code.values, code.indices
        if code.offsets is None:
            values, indices = self._like_inputs(values, x), self._like_inputs(indices, x)
        loss = reconstruction_loss + self.sparsity_weight * sparsity_loss + self.aux_weight * aux_loss
        return SAEOutput(
            reconstruction=reconstruction.reshape(target.shape),
            values=values,
            indices=indices,
            offsets=code.offsets,
            loss=loss,
            reconstruction_loss=reconstruction_loss,
            sparsity_loss=sparsity_loss,
            aux_loss=aux_loss,
        )

    def _rows(self, x: Tensor) -> Tensor:
        return _as_rows("x", x, self.read_shape)

    def _target_rows(self, target: Tensor) -> Tensor:
        return _as_rows("target", target, self.write_shape)

    def _leading(self, x: Tensor) -> torch.Size:
        return x.shape[: x.dim() - len(self.read_shape)]

    def _like_inputs(self, rows: Tensor, x: Tensor) -> Tensor:
        """``[N, k]`` with the leading dimensions of ``x`` instead of N."""
        return rows.reshape(*self._leading(x), rows.shape[-1])

    def _chosen(self, features: Tensor | Sequence[int]) -> Tensor:
        """Features by number; checked unless that would mean waiting for a device or breaking a graph."""
        chosen = torch.as_tensor(features)
        if chosen.is_cpu and not torch.compiler.is_compiling():
            numbers = chosen.tolist()
            if len(set(numbers)) < len(numbers) or not all(0 <= number < self.num_features for number in numbers):
                raise ValueError(f"features must be different numbers in [0, {self.num_features}), got {numbers}")
        return chosen.to(self.idle.device)

    def _centred(self, rows: Tensor) -> Tensor:
        return rows - self.pre_bias if self.centred else rows

    def _decode(self, values: Tensor, indices: Tensor, offsets: Tensor | None, bias: Tensor | None) -> Tensor:
        out = ops.sparse_decode(values, indices, self.decoder_weight, bias, offsets=offsets)
        return out.unflatten(-1, self.write_shape)

    def extra_repr(self) -> str:
        shape = "×".join(map(str, self.read_shape))
        return ", ".join([shape, str(self.num_features)] + [f"{name}={getattr(self, name)}" for name in self.options])


def check_k(k: float, num_features: int) -> None:
    """Raise ``ValueError`` unless ``k`` of ``num_features`` can be kept."""
    if not 1 <= k <= num_features:
        raise ValueError(f"k must be in [1, num_features={num_features}], got {k}")


def entry_rows(indices: Tensor, offsets: Tensor | None) -> Tensor:
    """The row of each entry of a code, one entry after the other."""
    if offsets is None:
        rows, k = indices.shape
        return torch.arange(rows, device=indices.device).repeat_interleave(k)
    return torch.bucketize(torch.arange(len(indices), device=indices.device), offsets[1:], right=True)


def geometric_median(rows: Tensor, iterations: int) -> Tensor:
    """The point with the least sum of distances to ``rows`` ``[N, D]``, by Weiszfeld's iterations from the mean.

    One far outlier moves a mean as far as it likes, this point hardly.
    """
    rows = rows.to(accumulate_dtype(rows))
    median = rows.mean(dim=0)
    for _ in range(iterations):
        distance = torch.linalg.vector_norm(rows - median, dim=-1).clamp_min(torch.finfo(rows.dtype).tiny)
        # Relative to the least, weights are finite even where rows lie on the median.
        weight = distance.min() / distance
        median = (weight / weight.sum()) @ rows
    return median


def _as_rows(name: str, x: Tensor, shape: torch.Size) -> Tensor:
    if x.shape[-len(shape) :] != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}; expected [..., {', '.join(map(str, shape))}]")
    return x.reshape(-1, shape.numel())


def _directions(num_features: int, dim: int) -> Tensor:
    return nn.functional.normalize(torch.randn(num_features, dim), dim=-1)


def _zero(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=accumulate_dtype(like), device=like.device)
