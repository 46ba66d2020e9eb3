"""Sparse codes: decode without a dense code, and the order by latent that all weight gradients share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from isthmus import reference
from isthmus.ops._arguments import accumulate_dtype, as_rows
from isthmus.ops._register import (
    eager,
    gradient_of,
    register_autocast,
    register_gradient,
    register_second_order,
    register_vmap_by_loop,
)
from isthmus.reference import LatentOrder
from isthmus.reference.sparse import selected_scores


def sparse_decode(
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    order: LatentOrder | None = None,
) -> Tensor:
    """Sum of ``values[..., j] * weight[indices[..., j]]`` over j, plus ``bias``.

    The decoder of a sparse autoencoder: a gather of k rows instead of a product with a dense [N, F] code. O(N k D)
    time; no memory beyond the result.

    Args:
        values: padded [*, k], k places for each row, or, with ``offsets``, ragged [E], the entries of all rows;
            float32, float64, bfloat16 or float16.
        indices: int64, shape of ``values``, in [0, F). An index that occurs twice counts twice; -1 marks an empty
            place, whose value is not read. On a GPU a wrong index stops the device with a message, as torch's own
            indexing does: the host does not wait for a check.
        weight: [F, D], dtype of ``values``; row f is the direction of feature f.
        bias: [D], dtype of ``values``, or None.
        offsets: int64 [N + 1], ascending from 0 to E; row n has the entries ``offsets[n]`` to ``offsets[n + 1] - 1``.
        order: ``latent_order(indices, F, offsets=offsets)``, if it is at hand, saves the sort in the gradient of
            ``weight``. Entries that it leaves out do not reach that gradient; they do if it is None.

    Returns:
        [*, D], or [N, D] with ``offsets``; dtype of ``values``, rounded once from a float32 (float64) sum over the
        entries of a row in order.

    Gradients:
        To ``values`` (0 at empty places), ``weight`` (dense, summed in the order of rows: bitwise repeatable for any
        number of threads) and ``bias``; only those asked for are computed. Twice differentiable.

    Raises:
        ValueError: ``values`` has no dimension, or the shapes of ``values`` and ``indices`` differ.
        RuntimeError: an index is out of range, offsets or order are not of this code, or dtypes, devices or shapes do
            not fit.

    Example:
        >>> sparse_decode(torch.tensor([3.0, 2.0]), torch.tensor([1, 2]), torch.eye(3))
        tensor([0., 3., 2.])
        >>> sparse_decode(torch.tensor([3.0, 2.0]), torch.tensor([1, 2]), torch.eye(3), offsets=torch.tensor([0, 0, 2]))
        tensor([[0., 0., 0.],
                [0., 3., 2.]])
    """
    rows, shape = _as_code(values, indices, offsets)
    out = _sparse_decode(*rows, weight, bias, offsets, *_parts(order))
    return out if shape is None else out.reshape(*shape, weight.shape[-1])


def sparse_reconstruct(
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    offsets: Tensor | None = None,
    order: LatentOrder | None = None,
) -> tuple[Tensor, Tensor]:
    """``sparse_decode``, and in the same pass the squared distance of each row from its target.

    Args:
        values, indices, weight, bias, offsets, order: as in ``sparse_decode``.
        target: [*, D], or [N, D] with ``offsets``; dtype of ``values``.

    Returns:
        (reconstruction, squared_error): what ``sparse_decode`` returns, and |target - reconstruction|^2 of each row,
        [*] or [N], in float32 (float64 for float64), taken before the reconstruction is rounded to its dtype.

    Gradients:
        Of both results, to ``values``, ``weight``, ``bias`` and ``target``; as in ``sparse_decode``.

    Raises:
        ValueError, RuntimeError: as ``sparse_decode``, or ``target`` does not fit.

    Example:
        >>> target = torch.tensor([0.0, 1.0, 2.0])
        >>> sparse_reconstruct(torch.tensor([3.0, 2.0]), torch.tensor([1, 2]), torch.eye(3), None, target)
        (tensor([0., 3., 2.]), tensor(4.))
    """
    rows, shape = _as_code(values, indices, offsets)
    if shape is None:
        return _sparse_reconstruct(*rows, weight, bias, target, offsets, *_parts(order))
    if target.shape[:-1] != shape:
        raise ValueError(f"target has shape {list(target.shape)}; expected {[*shape, weight.shape[-1]]}")
    out, error = _sparse_reconstruct(*rows, weight, bias, as_rows("target", target), offsets, *_parts(order))
    return out.reshape(target.shape), error.reshape(shape)


def latent_order(
    indices: Tensor, num_features: int, *, values: Tensor | None = None, offsets: Tensor | None = None
) -> LatentOrder:
    """The entries of a sparse code sorted by latent, stably.

    One order serves the gradients of decoder weight, encoder weight and encoder bias, and its ``counts`` say how often
    each latent fired. O(E + F) time and memory.

    Args:
        indices: int64, padded [*, k] or, with ``offsets``, ragged [E]; in [0, F), or -1.
        num_features: F.
        values: shape of ``indices``. Entries whose value is exactly 0 are left out, as are those of index -1: such an
            entry of a relu encoder has no gradient, and its latent has not fired.
        offsets: int64 [N + 1], as in ``sparse_decode``.

    Returns:
        ``LatentOrder(entries, rows, starts)``: int64 [E], [E], [F + 1]. Latent f has the positions ``starts[f]`` to
        ``starts[f + 1] - 1``; there, ``entries`` says where in the flattened code, and ``rows`` in which row. From
        ``starts[F]`` on they are -1. Not differentiable.

    Raises:
        RuntimeError: an index is out of range, or shapes, dtypes or devices do not fit.

    Example:
        >>> order = latent_order(torch.tensor([[2, 0], [0, -1]]), 3)
        >>> order
        LatentOrder(entries=tensor([ 1,  2,  0, -1]), rows=tensor([ 0,  1,  0, -1]), starts=tensor([0, 2, 2, 3]))
        >>> order.counts
        tensor([2, 0, 1])
    """
    if offsets is None:
        indices = as_rows("indices", indices)
        values = None if values is None else as_rows("values", values)
    return LatentOrder(*_latent_order(indices, num_features, values, offsets))


def encode_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    order: LatentOrder | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias from those of the selected pre-activations: what sparse encoders share.

    Args:
        grad: of ``x[n] @ weight[f] + bias[f]`` for each entry, shape of ``indices``: [N, k], or [E] with ``offsets``.
        x: [N, D].
        weight: [F, D].
        indices, offsets, order: as in ``sparse_decode``; the gradients of weight and bias sum the entries of the order.
        needs: which gradients are wanted; the others are None. Twice differentiable.
    """
    grads = _sparse_encode_backward(grad, x, weight, indices, offsets, *_parts(order), *needs)
    to_x, to_weight, to_bias = _wanted(grads, needs)
    return to_x, to_weight, to_bias


def _as_code(
    values: Tensor, indices: Tensor, offsets: Tensor | None
) -> tuple[tuple[Tensor, Tensor], torch.Size | None]:
    """Values and indices as the ops take them; and the leading shape of the result, where that is not theirs."""
    if values.shape != indices.shape:
        raise ValueError(f"indices has shape {list(indices.shape)}; expected {list(values.shape)}, like values")
    if offsets is not None or values.dim() == 2:
        return (values, indices), None
    return (as_rows("values", values), as_rows("indices", indices)), values.shape[:-1]


def _parts(order: LatentOrder | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if order is None else (order.entries, order.rows, order.starts)


def _order_of(entries: Tensor | None, rows: Tensor | None, starts: Tensor | None) -> LatentOrder | None:
    return None if entries is None or rows is None or starts is None else LatentOrder(entries, rows, starts)


def _wanted(grads: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    return [g if needed else None for g, needed in zip(grads, needs, strict=True)]


# ---- shapes without data ---------------------------------------------------------------------------------------------


def _num_rows(indices, offsets):
    return indices.shape[0] if offsets is None else offsets.shape[0] - 1


def _gradients(like, shapes, needs):
    return tuple(like.new_empty(shape if needed else 0) for shape, needed in zip(shapes, needs, strict=True))


@torch.library.register_fake("isthmus::latent_order")
def _(indices, num_features, values, offsets):
    entries = indices.numel()
    return tuple(indices.new_empty(size) for size in (entries, entries, num_features + 1))


@torch.library.register_fake("isthmus::sparse_decode")
def _(values, indices, weight, bias, offsets, entries, rows, starts):
    return values.new_empty((_num_rows(indices, offsets), weight.shape[1]))


@torch.library.register_fake("isthmus::sparse_reconstruct")
def _(values, indices, weight, bias, target, offsets, entries, rows, starts):
    count = _num_rows(indices, offsets)
    return values.new_empty((count, weight.shape[1])), values.new_empty(count, dtype=accumulate_dtype(values))


@torch.library.register_fake("isthmus::sparse_decode_backward")
def _(grad, values, indices, weight, offsets, entries, rows, starts, *needs):
    return _gradients(values, (values.shape, weight.shape, weight.shape[1:]), needs)


@torch.library.register_fake("isthmus::sparse_reconstruct_backward")
def _(grad, grad_error, values, indices, weight, target, reconstruction, offsets, entries, rows, starts, *needs):
    return _gradients(values, (values.shape, weight.shape, weight.shape[1:], target.shape), needs)


@torch.library.register_fake("isthmus::sparse_encode_backward")
def _(grad, x, weight, indices, offsets, entries, rows, starts, *needs):
    return _gradients(x, (x.shape, weight.shape, weight.shape[:1]), needs)


# ---- gradients -------------------------------------------------------------------------------------------------------

_latent_order = eager("latent_order")
_sparse_decode_backward = eager("sparse_decode_backward")
_sparse_reconstruct_backward = eager("sparse_reconstruct_backward")
_sparse_encode_backward = eager("sparse_encode_backward")


def _decode_setup(ctx, inputs, output):
    values, indices, weight, _, *code = inputs
    ctx.save_for_backward(values, indices, weight, *code)


def _decode_backward(ctx, grad):
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
    to_values, to_weight, to_bias = _wanted(_sparse_decode_backward(grad, *ctx.saved_tensors, *needs), needs)
    return to_values, None, to_weight, to_bias, None, None, None, None


_sparse_decode = register_gradient("sparse_decode", _decode_backward, _decode_setup)


def _reconstruct_setup(ctx, inputs, output):
    values, indices, weight, _, target, *code = inputs
    ctx.set_materialize_grads(False)  # a result that nobody uses saves a pass
    ctx.save_for_backward(values, indices, weight, target, output[0], *code)


def _reconstruct_backward(ctx, grad, grad_error):
    if grad is None and grad_error is None:
        return (None,) * 9
    values, indices, weight, target, reconstruction, *code = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
    if grad_error is None:
        grads = *_sparse_decode_backward(grad, values, indices, weight, *code, *needs[:3]), None
    else:
        tensors = values, indices, weight, target, reconstruction, *code
        grads = _sparse_reconstruct_backward(grad, grad_error, *tensors, *needs)
    to_values, to_weight, to_bias, to_target = _wanted(grads, needs)
    return to_values, None, to_weight, to_bias, to_target, None, None, None, None


_sparse_reconstruct = register_gradient("sparse_reconstruct", _reconstruct_backward, _reconstruct_setup)


def _decode_gradients(grad, values, indices, weight, offsets, entries, rows, starts, *needs):
    def decode(values, weight, bias):
        order = _order_of(entries, rows, starts)
        return reference.sparse_decode(values, indices, weight, bias, offsets=offsets, order=order)

    bias = weight.new_zeros(weight.shape[1], requires_grad=True)
    return _wanted(gradient_of(decode, (values, weight, bias), grad), needs)


def _reconstruct_gradients(grad, grad_error, values, indices, weight, target, reconstruction, *others):
    code, needs = others[:4], others[4:]
    pull = 2 * grad_error.unsqueeze(-1) * (reconstruction - target)
    total = pull if grad is None else grad + pull
    grads = _decode_gradients(total.to(values.dtype), values, indices, weight, *code, *needs[:3])
    return _wanted((*grads, -pull.to(target.dtype)), needs)


def _encode_gradients(grad, x, weight, indices, offsets, entries, rows, starts, *needs):
    def scores(x, weight, bias):
        order = _order_of(entries, rows, starts)
        return selected_scores(x, weight, bias, indices, offsets, order).to(grad.dtype)

    bias = weight.new_zeros(weight.shape[0], requires_grad=True)
    return _wanted(gradient_of(scores, (x, weight, bias), grad), needs)


register_second_order("sparse_decode_backward", _decode_gradients)
register_second_order("sparse_reconstruct_backward", _reconstruct_gradients)
register_second_order("sparse_encode_backward", _encode_gradients)

register_autocast("sparse_decode")
register_autocast("sparse_reconstruct")
for _name in ("latent_order", "sparse_decode", "sparse_reconstruct"):
    register_vmap_by_loop(_name)
for _name in ("sparse_decode", "sparse_reconstruct", "sparse_encode"):
    register_vmap_by_loop(f"{_name}_backward")
