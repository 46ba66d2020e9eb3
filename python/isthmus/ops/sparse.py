"""Sparse codes: decode without a dense code."""

import torch
from torch import Tensor

from isthmus import reference
from isthmus.ops._arguments import as_rows
from isthmus.ops._register import (
    eager,
    gradient_of,
    none_if_absent,
    register_autocast,
    register_gradient,
    register_second_order,
    register_vmap_by_loop,
)


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
    out = _sparse_decode(as_rows("values", values), as_rows("indices", indices), weight, bias)
    return out.reshape(*values.shape[:-1], weight.shape[-1])


# ---- shapes without data ---------------------------------------------------------------------------------------------


@torch.library.register_fake("isthmus::sparse_decode")
def _(values, indices, weight, bias):
    return values.new_empty((values.shape[0], weight.shape[1]))


@torch.library.register_fake("isthmus::sparse_decode_backward")
def _(grad, values, indices, weight):
    shapes = (values.shape, weight.shape, (weight.shape[1],))
    return tuple(values.new_empty(shape) for shape in shapes)


# ---- gradients -------------------------------------------------------------------------------------------------------

_sparse_decode_backward = eager("sparse_decode_backward")


def _decode_setup(ctx, inputs, output):
    values, indices, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(values, indices, weight)


def _decode_backward(ctx, grad):
    grad_values, grad_weight, grad_bias = _sparse_decode_backward(grad, *ctx.saved_tensors)
    return grad_values, None, grad_weight, none_if_absent(grad_bias, ctx.has_bias)


_sparse_decode = register_gradient("sparse_decode", _decode_backward, _decode_setup)


def _decode_gradients(grad, values, indices, weight):
    def decode(values, weight, bias):
        return reference.sparse_decode(values, indices, weight, bias)

    bias = torch.zeros_like(weight[0], requires_grad=True)
    return gradient_of(decode, (values, weight, bias), grad)


register_second_order("sparse_decode_backward", _decode_gradients)

register_autocast("sparse_decode")
register_vmap_by_loop("sparse_decode")
register_vmap_by_loop("sparse_decode_backward")
