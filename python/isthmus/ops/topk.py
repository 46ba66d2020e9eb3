"""Top-k sparse codes: encode without storing the pre-activations."""

import torch
from torch import Tensor

from isthmus.ops._arguments import as_rows, check_choice
from isthmus.ops._register import (
    eager,
    gradient_of,
    none_if_absent,
    register_autocast,
    register_gradient,
    register_second_order,
    register_vmap_by_loop,
)


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


@torch.library.register_fake("isthmus::topk_encode_backward")
def _(grad, x, weight, values, indices, activation):
    shapes = (x.shape, weight.shape, (weight.shape[0],))
    return tuple(x.new_empty(shape) for shape in shapes)


# ---- gradients -------------------------------------------------------------------------------------------------------

_topk_encode_backward = eager("topk_encode_backward")


def _encode_setup(ctx, inputs, output):
    x, weight, bias, _, activation = inputs
    values, indices = output
    ctx.has_bias, ctx.activation = bias is not None, activation
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(x, weight, values, indices)


def _encode_backward(ctx, grad, _):
    grads = _topk_encode_backward(grad, *ctx.saved_tensors, ctx.activation)
    return grads[0], grads[1], none_if_absent(grads[2], ctx.has_bias), None, None


_topk_encode = register_gradient("topk_encode", _encode_backward, _encode_setup)


def _encode_gradients(grad, x, weight, values, indices, activation):
    # With the selection fixed and relu's mask known, the values are bilinear in x and weight.
    def selected(x, weight, bias):
        return torch.einsum("nd,nkd->nk", x, weight[indices]) + bias[indices]

    if activation == "relu":
        grad = torch.where(values > 0, grad, 0)
    bias = torch.zeros_like(weight[:, 0], requires_grad=True)
    return gradient_of(selected, (x, weight, bias), grad)


register_second_order("topk_encode_backward", _encode_gradients)

register_autocast("topk_encode")
register_vmap_by_loop("topk_encode")
register_vmap_by_loop("topk_encode_backward")
