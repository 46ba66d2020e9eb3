"""Top-k sparse codes: encode without storing the pre-activations."""

from typing import Literal, overload

import torch
from torch import Tensor

from isthmus.ops._arguments import as_rows, check_choice
from isthmus.ops._register import register_autocast, register_gradient, register_vmap_by_loop
from isthmus.ops.sparse import encode_gradients
from isthmus.reference import LatentOrder


@overload
def topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    activation: str = "relu",
    groups: int = 1,
    among: Tensor | None = None,
    return_order: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...


@overload
def topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    activation: str = "relu",
    groups: int = 1,
    among: Tensor | None = None,
    return_order: Literal[True],
) -> tuple[Tensor, Tensor, LatentOrder]: ...


def topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    activation: str = "relu",
    groups: int = 1,
    among: Tensor | None = None,
    return_order: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, LatentOrder]:
    """The k largest of ``activation(x @ weight.T + bias)`` in each row, largest first.

    The encoder of a k-sparse autoencoder (Makhzani & Frey 2014, arXiv 1312.5663; Gao et al. 2024, arXiv
    2406.04093). The [N, F] pre-activations never exist: they leave the matrix product tile by tile, and only the
    few that may exceed a row's running k-th best are looked at. Exact: features rank by their float64 scores, at every
    instruction set and for any number of threads; the product that excludes the others may be in bytes (see "Top-k" in
    docs/numerics.md). O(N F D) time, O(N k + F D) memory forward and backward; the CPU needs about 20 MB beside that.

    Several k at once (Multi-TopK) cost no more than the largest: the result for a smaller k is the first k columns.

    Args:
        x: [*, D]; float32, float64, bfloat16 or float16.
        weight: [F, D], dtype of ``x``; row f is what feature f listens to. F < 2³¹.
        bias: [F], dtype of ``x``, or None.
        k: 1 to F.
        activation: "relu", applied before the selection; "identity"; or "abs", which selects by magnitude and keeps
            the sign.
        groups: a divisor of F and k. The features are this many equal ranges, each of which gives its ``k / groups``
            best; results stand group after group. ``groups=k`` takes the largest of every range (GroupMax).
        among: bool [F]; only features that are True take part, as with dead latents. The cost on the CPU is that of
            those features alone.
        return_order: also return the entries sorted by latent, which the gradients of encoder and decoder share.

    Returns:
        values [*, k] of the dtype of ``x``, descending (by magnitude for "abs"), each a float64 score rounded once;
        their indices [*, k], int64; with ``return_order``, the ``LatentOrder`` of the code, without the entries where
        relu is 0.
        Ties go to the lowest index: with "relu" a row of fewer than k positive features is filled with zeros, the
        lowest indices first. Where fewer than k features take part, the places behind them have value 0 and index -1.
        A row with a NaN among its pre-activations has NaN values and index 0 throughout; other rows are not
        affected.

    Gradients:
        To ``x``, ``weight`` and ``bias`` through the selected entries, the selection held fixed; none through an
        entry where relu is 0. Weight gradients are dense tensors, summed in the order of rows: bitwise repeatable
        for any number of threads. Twice differentiable. A row of NaN values reaches the gradient of feature 0 only.

    Raises:
        ValueError: ``activation`` is none of its choices, or ``x`` has no dimension.
        RuntimeError: ``k`` or ``groups`` is out of range, or dtypes, devices or shapes do not fit.

    Example:
        >>> values, indices = topk_encode(torch.tensor([[1.0, 3.0, 2.0]]), torch.eye(3), None, 2)
        >>> values, indices
        (tensor([[3., 2.]]), tensor([[1, 2]]))
        >>> topk_encode(torch.tensor([1.0, -3.0, 2.0]), torch.eye(3), None, 2, activation="abs")
        (tensor([-3.,  2.]), tensor([1, 2]))
    """
    check_choice("activation", activation, ("relu", "identity", "abs"))
    rows = x if x.dim() == 2 else as_rows("x", x)
    values, indices, *order = _topk_encode(rows, weight, bias, k, activation, groups, among, return_order)
    if x.dim() != 2:
        values, indices = (t.reshape(*x.shape[:-1], k) for t in (values, indices))
    return (values, indices, LatentOrder(*order)) if return_order else (values, indices)


# ---- shapes without data ---------------------------------------------------------------------------------------------


@torch.library.register_fake("isthmus::topk_encode")
def _(x, weight, bias, k, activation, groups, among, return_order):
    rows, entries = x.shape[0], x.shape[0] * k
    sizes = (entries, entries, weight.shape[0] + 1) if return_order else (0, 0, 0)
    return x.new_empty((rows, k)), *(x.new_empty(size, dtype=torch.int64) for size in ((rows, k), *sizes))


# ---- gradients -------------------------------------------------------------------------------------------------------


def _encode_setup(ctx, inputs, output):
    x, weight, _, _, activation, _, _, return_order = inputs
    values, indices, *order = output
    ctx.activation = activation
    ctx.mark_non_differentiable(indices, *order)
    ctx.save_for_backward(x, weight, values, indices, *(order if return_order else ()))


def _encode_backward(ctx, grad, *_):
    x, weight, values, indices, *order = ctx.saved_tensors
    if ctx.activation == "relu":
        grad = torch.where(values > 0, grad, 0)
    order = LatentOrder(*order) if order else None
    grads = encode_gradients(grad, x, weight, indices, None, order, ctx.needs_input_grad[:3])
    return *grads, None, None, None, None, None


_topk_encode = register_gradient("topk_encode", _encode_backward, _encode_setup)

register_autocast("topk_encode")
register_vmap_by_loop("topk_encode")
