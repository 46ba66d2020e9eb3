"""Ragged sparse codes: everything above a threshold, or the best of a whole batch, without stored pre-activations."""

from typing import Literal, overload

import torch
from torch import Tensor

from isthmus.ops._arguments import accumulate_dtype, as_rows, check_choice
from isthmus.ops._register import register_autocast, register_gradient, register_vmap_by_loop
from isthmus.ops.sparse import encode_gradients
from isthmus.reference import LatentOrder


@overload
def threshold_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | float,
    *,
    return_order: Literal[False] = False,
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def threshold_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor | float, *, return_order: Literal[True]
) -> tuple[Tensor, Tensor, Tensor, LatentOrder]: ...


def threshold_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor | float, *, return_order: bool = False
) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, LatentOrder]:
    """All pre-activations ``x @ weight.T + bias`` above a threshold, as a ragged code.

    The encoder of sparse autoencoders whose number of active features varies: threshold 0 is ReLU, a threshold for each
    feature is JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435) or the gate of a gated encoder (arXiv 2404.16014),
    a running mean of the thresholds of ``batch_topk_encode`` is BatchTopK at inference. The [N, F] pre-activations
    never exist. Exact: an entry is there if its float64 score is greater than the threshold. O(N F D) time, O(E) memory
    forward and backward.

    E may come to N F / 2, as it does early in training, but nothing is saved then: each entry is scored a second time,
    in float64, which takes several times as long as the product, and values and indices take 12 bytes an entry in
    float32, 24 while they are put in order.

    Args:
        x: [*, D]; float32, float64, bfloat16 or float16. Its rows are counted in order, N in all.
        weight: [F, D], dtype of ``x``; row f is what feature f listens to. F < 2³¹.
        bias: [F], dtype of ``x``, or None.
        threshold: [F] or [], of any floating dtype, or a number. Infinity switches a feature off.
        return_order: also return the entries sorted by latent, which the gradients of encoder and decoder share.

    Returns:
        values [E] of the dtype of ``x``: the float64 scores, rounded once. indices [E], int64: their features. offsets
        [N + 1], int64: row n has the entries ``offsets[n]`` to ``offsets[n + 1] - 1``, in ascending order of feature.
        A row with a NaN among its pre-activations gives one entry, of value NaN and index 0; other rows are not
        affected. All bits are the same for every instruction set and number of threads. With ``return_order``, the
        ``LatentOrder`` of all entries.

    Gradients:
        To ``x``, ``weight`` and ``bias`` through the entries, the selection held fixed; only those asked for are
        computed. None to ``threshold``: its estimators need entries on both sides of it, which a call with a lower
        threshold gives. Twice differentiable. A row of NaN reaches the gradient of feature 0 only.

    Compilation:
        E depends on the data. ``torch.compile(fullgraph=True)`` traces it; without ``fullgraph`` the graph breaks here,
        unless ``torch._dynamo.config.capture_dynamic_output_shape_ops`` is True. vmap works where all calls find
        equally many entries. On a GPU the host waits for E.

    Raises:
        ValueError: ``x`` has no dimension; under vmap, calls find different numbers of entries.
        RuntimeError: dtypes, devices or shapes do not fit.

    Example:
        >>> x = torch.tensor([[1.0, 3.0, 2.0], [0.0, 1.0, -1.0]])
        >>> threshold_encode(x, torch.eye(3), None, 0.5)
        (tensor([1., 3., 2., 1.]), tensor([0, 1, 2, 1]), tensor([0, 3, 4]))
    """
    if not isinstance(threshold, Tensor):
        threshold = x.new_full((), threshold, dtype=torch.float64)
    rows = as_rows("x", x)
    *code, entries, order_rows, starts = _threshold_encode(
        rows, weight, bias, threshold.detach().double(), return_order
    )
    return (*code, LatentOrder(entries, order_rows, starts)) if return_order else tuple(code)


@overload
def batch_topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: float,
    *,
    activation: str = "relu",
    return_order: Literal[False] = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


@overload
def batch_topk_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: float, *, activation: str = "relu", return_order: Literal[True]
) -> tuple[Tensor, Tensor, Tensor, Tensor, LatentOrder]: ...


def batch_topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: float,
    *,
    activation: str = "relu",
    return_order: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor, LatentOrder]:
    """The N k largest of ``activation(x @ weight.T + bias)`` in the whole batch, as a ragged code.

    The encoder of a BatchTopK sparse autoencoder (Bussmann et al. 2024, arXiv 2412.06410): rows share N k entries as
    they need them. The [N, F] pre-activations never exist and are never sorted: a sample of them tells what
    score the last entry will have, about, and only what is above is collected. Exact: entries rank by their float64
    scores. O(N F D) time, O(N k) memory.

    Args:
        x, weight, bias: as in ``threshold_encode``.
        k: entries for each row on average, 0 to F. There are ``round(N * k)`` in all.
        activation: "relu", applied before the selection, or "identity".
        return_order: as in ``threshold_encode``.

    Returns:
        values [E], indices [E], offsets [N + 1]: as in ``threshold_encode``, E = round(N * k). Ties go to the lowest
        row, then to the lowest feature: with "relu" a batch of fewer than E positive scores is filled with zeros,
        the lowest rows and features first. A row with a NaN among its pre-activations gives one entry, of value NaN and
        index 0, which ranks above all numbers (and more like it where everything else is used up); a batch with such
        rows is searched twice.
        threshold []: the smallest score that was selected, infinity if no number was; float32 (float64 for float64),
        without gradient. Its running mean is what ``threshold_encode`` takes at inference. With ``return_order``, the
        ``LatentOrder`` of the code, without the entries where relu is 0.

    Gradients:
        As for ``threshold_encode``; none through an entry where relu is 0.

    Raises:
        ValueError: ``activation`` is none of its choices, or ``x`` has no dimension.
        RuntimeError: ``k`` is out of range, or dtypes, devices or shapes do not fit.

    Example:
        >>> x = torch.tensor([[1.0, 3.0, 2.0], [0.0, 1.0, -1.0]])
        >>> batch_topk_encode(x, torch.eye(3), None, 1)
        (tensor([3., 2.]), tensor([1, 2]), tensor([0, 2, 2]), tensor(2.))
    """
    check_choice("activation", activation, ("relu", "identity"))
    rows = as_rows("x", x)
    *code, entries, order_rows, starts = _batch_topk_encode(
        rows, weight, bias, round(rows.shape[0] * k), activation, return_order
    )
    return (*code, LatentOrder(entries, order_rows, starts)) if return_order else tuple(code)


# ---- shapes without data ---------------------------------------------------------------------------------------------


def _ragged(x, entries):
    return x.new_empty(entries), x.new_empty(entries, dtype=torch.int64), x.new_empty(x.shape[0] + 1, dtype=torch.int64)


def _order(x, weight, entries, return_order):
    sizes = (entries, entries, weight.shape[0] + 1) if return_order else (0, 0, 0)
    return tuple(x.new_empty(size, dtype=torch.int64) for size in sizes)


@torch.library.register_fake("isthmus::threshold_encode")
def _(x, weight, bias, threshold, return_order):
    entries = torch.library.get_ctx().new_dynamic_size()
    return *_ragged(x, entries), *_order(x, weight, entries, return_order)


@torch.library.register_fake("isthmus::batch_topk_encode")
def _(x, weight, bias, entries, activation, return_order):
    threshold = x.new_empty((), dtype=accumulate_dtype(x))
    return *_ragged(x, entries), threshold, *_order(x, weight, entries, return_order)


# ---- gradients -------------------------------------------------------------------------------------------------------


def _threshold_setup(ctx, inputs, output):
    x, weight, _, _, return_order = inputs
    _, indices, offsets, *order = output
    ctx.mark_non_differentiable(indices, offsets, *order)
    ctx.save_for_backward(x, weight, indices, offsets, *(order if return_order else ()))


def _threshold_backward(ctx, grad, *_):
    return *_code_gradients(grad, *ctx.saved_tensors, needs=ctx.needs_input_grad[:3]), None, None


def _batch_setup(ctx, inputs, output):
    x, weight, _, _, activation, return_order = inputs
    values, indices, offsets, threshold, *order = output
    ctx.is_relu = activation == "relu"
    ctx.mark_non_differentiable(indices, offsets, threshold, *order)
    ctx.save_for_backward(values, x, weight, indices, offsets, *(order if return_order else ()))


def _batch_backward(ctx, grad, *_):
    values, *code = ctx.saved_tensors
    if ctx.is_relu:
        grad = torch.where(values > 0, grad, 0)
    return *_code_gradients(grad, *code, needs=ctx.needs_input_grad[:3]), None, None, None


def _code_gradients(grad, x, weight, indices, offsets, *order, needs):
    return encode_gradients(grad, x, weight, indices, offsets, LatentOrder(*order) if order else None, needs)


_threshold_encode = register_gradient("threshold_encode", _threshold_backward, _threshold_setup)
_batch_topk_encode = register_gradient("batch_topk_encode", _batch_backward, _batch_setup)

for _name in ("threshold_encode", "batch_topk_encode"):
    register_autocast(_name)
    register_vmap_by_loop(_name)
