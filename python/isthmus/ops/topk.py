"""Top-k sparse codes: encode without storing the pre-activations."""

import torch
from torch import Tensor

from isthmus.ops._arguments import as_rows, check_choice
from isthmus.ops._register import register_autocast, register_gradient, register_vmap_by_loop
from isthmus.ops.sparse import encode_gradients


def topk_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, *, activation: str = "relu"
) -> tuple[Tensor, Tensor]:
    """The k largest of ``activation(x @ weight.T + bias)`` in each row, largest first.

    The encoder of a k-sparse autoencoder (Makhzani & Frey 2014, arXiv 1312.5663; Gao et al. 2024, arXiv
    2406.04093). The [N, F] pre-activations never exist: they leave the matrix product tile by tile, and only the
    few above a row's running k-th best are kept. Exact: products accumulate in float32 (float64 for float64).
    O(N F D) time, O(N k + F D) memory forward and backward.

    Args:
        x: [*, D]; float32, float64, bfloat16 or float16.
        weight: [F, D], dtype of ``x``; row f is what feature f listens to. F < 2³¹.
        bias: [F], dtype of ``x``, or None.
        k: 1 to F.
        activation: "relu", applied before the selection, or "identity".

    Returns:
        values [*, k] of the dtype of ``x``, descending, and their indices [*, k], int64. Ties go to the lowest
        index: with "relu" a row of fewer than k positive features is filled with zeros, the lowest indices first.
        A row with a NaN among its pre-activations has NaN values and index 0 throughout; other rows are not
        affected.

    Gradients:
        To ``x``, ``weight`` and ``bias`` through the selected entries, the selection held fixed; none through an
        entry where relu is 0. Weight gradients are dense tensors, summed in the order of rows: bitwise repeatable
        for any number of threads. Twice differentiable. A row of NaN values reaches the gradient of feature 0 only.

    Raises:
        ValueError: ``activation`` is none of its choices, or ``x`` has no dimension.
        RuntimeError: ``k`` is out of range, or dtypes, devices or shapes do not fit.

    Example:
        >>> values, indices = topk_encode(torch.tensor([[1.0, 3.0, 2.0]]), torch.eye(3), None, 2)
        >>> values, indices
        (tensor([[3., 2.]]), tensor([[1, 2]]))
    """
    check_choice("activation", activation, ("relu", "identity"))
    if x.dim() == 2:
        return _topk_encode(x, weight, bias, k, activation)
    values, indices = _topk_encode(as_rows("x", x), weight, bias, k, activation)
    shape = (*x.shape[:-1], k)
    return values.reshape(shape), indices.reshape(shape)


# ---- shapes without data ---------------------------------------------------------------------------------------------


@torch.library.register_fake("isthmus::topk_encode")
def _(x, weight, bias, k, activation):
    shape = (x.shape[0], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


# ---- gradients -------------------------------------------------------------------------------------------------------


def _encode_setup(ctx, inputs, output):
    x, weight, _, _, activation = inputs
    values, indices = output
    ctx.activation = activation
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(x, weight, values, indices)


def _encode_backward(ctx, grad, _):
    x, weight, values, indices = ctx.saved_tensors
    if ctx.activation == "relu":
        grad = torch.where(values > 0, grad, 0)
    grads = encode_gradients(grad, x, weight, indices, None, None, ctx.needs_input_grad[:3])
    return *grads, None, None


_topk_encode = register_gradient("topk_encode", _encode_backward, _encode_setup)


register_autocast("topk_encode")
register_vmap_by_loop("topk_encode")
