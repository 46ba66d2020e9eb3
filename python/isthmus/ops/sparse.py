"""Top-k sparse codes: encode without storing the pre-activations, decode without a dense code."""

import math

import torch
from torch import Tensor

from isthmus import reference
from isthmus.ops._arguments import check_choice
from isthmus.ops._register import (
    eager,
    gradient_of,
    none_if_absent,
    register_autocast,
    register_gradient,
    register_second_order,
    register_vmap_by_loop,
)

_ops = torch.ops.isthmus


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
    values, indices = _topk_encode(_as_rows("x", x), weight, bias, k, activation)
    shape = (*x.shape[:-1], k)
    return values.reshape(shape), indices.reshape(shape)


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum of ``values[..., j] * weight[indices[..., j]]`` over j, plus ``bias``.

    The decoder that belongs to ``topk_encode``: a gather of k rows instead of a product with a dense [N, F] code.
    An index that occurs twice counts twice. O(N k D) time; no memory beyond the result.

    Args:
        values: [*, k]; float32, float64, bfloat16 or float16.
        indices: int64 [*, k], in [0, F). On a GPU a wrong index stops the device with a message, as torch's own
            indexing does: the host does not wait for a check.
        weight: [F, D], dtype of ``values``; row f is the direction of feature f.
        bias: [D], dtype of ``values``, or None.

    Returns:
        [*, D], dtype of ``values``, rounded once from a float32 (float64) sum over j in order.

    Gradients:
        To ``values``, ``weight`` (dense, summed in the order of rows: bitwise repeatable for any number of
        threads) and ``bias``. Twice differentiable.

    Raises:
        ValueError: ``values`` has no dimension, or the shapes of ``values`` and ``indices`` differ.
        RuntimeError: an index is out of range, or dtypes, devices or shapes do not fit.

    Example:
        >>> sparse_decode(torch.tensor([3.0, 2.0]), torch.tensor([1, 2]), torch.eye(3))
        tensor([0., 3., 2.])
    """
    if values.shape != indices.shape:
        raise ValueError(f"indices has shape {list(indices.shape)}; expected {list(values.shape)}, like values")
    if values.dim() == 2:
        return _sparse_decode(values, indices, weight, bias)
    out = _sparse_decode(_as_rows("values", values), _as_rows("indices", indices), weight, bias)
    return out.reshape(*values.shape[:-1], weight.shape[-1])


def _as_rows(name: str, t: Tensor) -> Tensor:
    if t.dim() == 0:
        raise ValueError(f"{name} has shape []; expected at least one dimension")
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


# ---- shapes without data ---------------------------------------------------------------------------------------------


@torch.library.register_fake("isthmus::topk_encode")
def _(x, weight, bias, k, activation):
    shape = (x.shape[0], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("isthmus::topk_encode_backward")
def _(grad, x, weight, values, indices, activation):
    shapes = (x.shape, weight.shape, (weight.shape[0],))
    return tuple(x.new_empty(shape) for shape in shapes)


@torch.library.register_fake("isthmus::sparse_decode")
def _(values, indices, weight, bias):
    return values.new_empty((values.shape[0], weight.shape[1]))


@torch.library.register_fake("isthmus::sparse_decode_backward")
def _(grad, values, indices, weight):
    shapes = (values.shape, weight.shape, (weight.shape[1],))
    return tuple(values.new_empty(shape) for shape in shapes)


# ---- gradients -------------------------------------------------------------------------------------------------------

_sparse_decode_backward = eager("sparse_decode_backward")
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


def _decode_setup(ctx, inputs, output):
    values, indices, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(values, indices, weight)


def _decode_backward(ctx, grad):
    grad_values, grad_weight, grad_bias = _sparse_decode_backward(grad, *ctx.saved_tensors)
    return grad_values, None, grad_weight, none_if_absent(grad_bias, ctx.has_bias)


_topk_encode = register_gradient("topk_encode", _encode_backward, _encode_setup)
_sparse_decode = register_gradient("sparse_decode", _decode_backward, _decode_setup)


def _encode_gradients(grad, x, weight, values, indices, activation):
    # With the selection fixed and relu's mask known, the values are bilinear in x and weight.
    def selected(x, weight, bias):
        return torch.einsum("nd,nkd->nk", x, weight[indices]) + bias[indices]

    if activation == "relu":
        grad = torch.where(values > 0, grad, 0)
    bias = torch.zeros_like(weight[:, 0], requires_grad=True)
    return gradient_of(selected, (x, weight, bias), grad)


def _decode_gradients(grad, values, indices, weight):
    def decode(values, weight, bias):
        return reference.sparse_decode(values, indices, weight, bias)

    bias = torch.zeros_like(weight[0], requires_grad=True)
    return gradient_of(decode, (values, weight, bias), grad)


register_second_order("topk_encode_backward", _encode_gradients)
register_second_order("sparse_decode_backward", _decode_gradients)

for _name in ("topk_encode", "sparse_decode"):
    register_autocast(_name)
    register_vmap_by_loop(_name)
    register_vmap_by_loop(f"{_name}_backward")
