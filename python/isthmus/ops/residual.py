"""Residual vector quantization: all stages in one pass, with a beam, without a distance matrix."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from isthmus import reference
from isthmus.ops._arguments import accumulate_dtype, active_stages, check_choice
from isthmus.ops._register import (
    eager,
    gradient_of,
    none_if_absent,
    register_autocast,
    register_gradient,
    register_second_order,
    register_vmap_by_loop,
)


def residual_vq_quantize(
    x: Tensor,
    codebooks: Tensor | Sequence[Tensor],
    *,
    gradient: str = "straight_through",
    commitment_weight: float = 1.0,
    beam: int = 1,
    stages: Tensor | int | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each vector in stages, each coding what the stages before it left over, differentiably.

    The residual vector quantizer of SoundStream (Zeghidour et al. 2021, arXiv 2107.03312) and of neural audio codecs
    since: r_0 = x, c_q is the code of stage q nearest to r_q, r_{q+1} = r_q − c_q, and x ≈ c_0 + c_1 + …

    Residuals are computed in float32 (float64 for float64), by these subtractions alone, in this order: the same bits
    on every instruction set. Of each the nearest code is exact, as in ``vq_assign``.

    ``beam`` > 1 keeps the ``beam`` sequences of codes that leave the least |r|² after each stage, instead of one, and
    returns the best (the beam search of additive quantization: Babenko & Lempitsky 2014, Martinez et al. 2014). Of
    sequences that leave equally much the one whose beginning was better comes first, then that of the lower last index.

    All stages run on one block of vectors while it is in cache. O(N·D·ΣK·beam) time; memory beside the results: the
    codebooks and a few blocks; never N × K, nor N × Q × D. The gradient to the codebooks keeps N × D numbers while it
    is computed.

    Args:
        x: [..., D], or [G, ..., D] for grouped codebooks; float32, float64, bfloat16 or float16.
        codebooks: [Q, K, D], dtype of ``x``; or a sequence of Q tensors [K_q, D], of different sizes or the same tensor
            Q times. Grouped: [G, Q, K, D], or a sequence of [G, K_q, D]. K ≥ 1. A sequence is copied into one tensor.
        gradient: how the gradient of ``quantized`` reaches ``x``: "straight_through" or "rotation", both as in
            ``vq_quantize``, with the sum of all codes as the code.
        commitment_weight: weight of the pull of a residual towards its code; it does not change the value.
        beam: number of sequences kept, ≥ 1.
        stages: how many stages code a vector, 0 to Q: int64 of the leading shape of ``x``, or one number for all. For
            quantizer dropout. Default Q.
        mask: bool, the leading shape of ``x``; False is ``stages`` = 0, whatever the vector holds.

    Returns:
        (quantized, indices, squared_error): quantized [..., D], c_0 + c_1 + … added in this order in float32 (float64
        for float64) and rounded once to the dtype of ``x``, 0 where there is no stage; indices int64 [..., Q], −1 for a
        stage that is not used; squared_error [..., Q] = |r_q − c_q|², float32 for bfloat16 and float16, 0 for a stage
        that is not used. A vector with NaN: indices 0, and its errors are NaN.

    Gradients:
        ``quantized`` passes its gradient to ``x``, once and not once for each stage, and none to ``codebooks``. In
        ``squared_error`` the codes of earlier stages are constants: entry q gives −2(r_q − c_q) to its code and
        commitment_weight · 2(r_q − c_q) to ``x``. Sums over the vectors of a code run in a fixed order: bitwise
        repeatable. Twice differentiable, the assignment held fixed.

    Raises:
        ValueError: another ``gradient``, or ``codebooks`` do not fit together.
        RuntimeError: dtypes, devices or shapes do not fit, ``beam`` < 1, or ``stages`` beyond 0 to Q (on CUDA, where
            reading ``stages`` would wait for the device, that stops the device with a message).

    Example:
        >>> codebooks = torch.tensor([[[0.0], [4.0]], [[-1.0], [1.0]]])
        >>> quantized, indices, squared_error = residual_vq_quantize(torch.tensor([[2.75]]), codebooks)
        >>> quantized, indices, squared_error
        (tensor([[3.]]), tensor([[1, 0]]), tensor([[1.5625, 0.0625]]))
    """
    check_choice("gradient", gradient, ("straight_through", "rotation"))
    table, sizes = _as_table(codebooks)
    active = active_stages(x, len(sizes), stages, mask)
    return _residual_vq_quantize(x, table, active, sizes, beam, gradient, commitment_weight)


def residual_code_totals(x: Tensor, codebooks: Tensor | Sequence[Tensor], indices: Tensor) -> Tensor:
    """How many residuals each code received, and their sum: what moving-average codebooks of all stages need.

    One flat buffer, so that a distributed step needs one all-reduce. With T codes in all, ``totals[:T]`` are the counts
    and ``totals[T:].view(T, D)`` the sums; codes stand group by group, in a group stage by stage. Residuals are found
    again from ``x`` and ``indices``. Sums run in a fixed order: bitwise repeatable. O(N·Q·D + T·D) time, N × D numbers
    of memory beside the result.

    Args:
        x: [..., D], or [G, ..., D] for grouped codebooks; float32, float64, bfloat16 or float16.
        codebooks: as for ``residual_vq_quantize``.
        indices: int64 [..., Q] from ``residual_vq_quantize``; −1 is left out.

    Returns:
        [T · (1 + D)]; float64 for float64, float32 for all others. Not differentiable.

    Raises:
        ValueError: ``codebooks`` do not fit together.
        RuntimeError: dtypes, devices or shapes do not fit, or an index is out of range (on CUDA that stops the device
            with a message).

    Example:
        >>> codebooks = torch.tensor([[[0.0], [4.0]], [[-1.0], [1.0]]])
        >>> totals = residual_code_totals(torch.tensor([[2.75]]), codebooks, torch.tensor([[1, 0]]))
        >>> totals[:4], totals[4:]
        (tensor([0., 1., 1., 0.]), tensor([ 0.0000,  2.7500, -1.2500,  0.0000]))
    """
    table, sizes = _as_table(codebooks)
    return _residual_code_totals(x, table, indices, sizes)


def _as_table(codebooks: Tensor | Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """The codebooks of all stages one behind the other, [K, D] or [G, K, D], and the size of each."""
    if isinstance(codebooks, Tensor):
        if codebooks.dim() not in (3, 4):
            raise ValueError(f"codebooks has shape {list(codebooks.shape)}; expected [Q, K, D] or [G, Q, K, D]")
        return codebooks.flatten(-3, -2), [codebooks.shape[-2]] * codebooks.shape[-3]
    books = list(codebooks)
    if not books:
        raise ValueError("codebooks is empty; expected one tensor for each stage")
    first = books[0]
    for stage, book in enumerate(books):
        if book.dim() not in (2, 3) or (*book.shape[:-2], book.shape[-1]) != (*first.shape[:-2], first.shape[-1]):
            raise ValueError(
                f"codebooks[{stage}] has shape {list(book.shape)} and codebooks[0] {list(first.shape)}; "
                "expected [K, D] or [G, K, D] with the same G and D"
            )
        if book.dtype != first.dtype:
            raise ValueError(f"codebooks[{stage}] has dtype {book.dtype}; expected {first.dtype}, like codebooks[0]")
    return torch.cat(books, -2), [book.shape[-2] for book in books]


# ---- shapes without data ---------------------------------------------------------------------------------------------


@torch.library.register_fake("isthmus::residual_vq_quantize")
def _(x, codebooks, stages, sizes, beam, gradient, commitment_weight):
    shape = *x.shape[:-1], len(sizes)
    indices = x.new_empty(shape, dtype=torch.int64)
    return x.new_empty(x.shape), indices, x.new_empty(shape, dtype=accumulate_dtype(x))


@torch.library.register_fake("isthmus::residual_vq_quantize_backward")
def _(grad_quantized, grad_error, x, codebooks, indices, sizes, gradient, weight, need_x, need_codebooks):
    pairs = (x, need_x), (codebooks, need_codebooks)
    return tuple(t.new_empty(t.shape if needed else (0,)) for t, needed in pairs)


@torch.library.register_fake("isthmus::residual_code_totals")
def _(x, codebooks, indices, sizes):
    return x.new_empty(math.prod(codebooks.shape[:-1]) * (1 + x.shape[-1]), dtype=accumulate_dtype(x))


# ---- gradients -------------------------------------------------------------------------------------------------------

_residual_vq_quantize_backward = eager("residual_vq_quantize_backward")


def _quantize_setup(ctx, inputs, output):
    x, codebooks, _, sizes, _, gradient, commitment_weight = inputs
    ctx.options = sizes, gradient, commitment_weight
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, codebooks, output[1])


def _quantize_backward(ctx, grad_quantized, _, grad_error):
    needs = ctx.needs_input_grad[:2]
    grads = _residual_vq_quantize_backward(grad_quantized, grad_error, *ctx.saved_tensors, *ctx.options, *needs)
    return *(none_if_absent(g, n) for g, n in zip(grads, needs, strict=True)), None, None, None, None, None


def _quantize_gradients(grad_quantized, grad_error, x, codebooks, indices, sizes, gradient, weight, *needs):
    def quantize(x, codebooks):
        quantized, _, error = reference.residual_vq_quantize(
            x, codebooks.split(sizes, -2), gradient=gradient, commitment_weight=weight, indices=indices
        )
        return quantized, error

    gradients = gradient_of(quantize, (x, codebooks), (grad_quantized, grad_error))
    return [g if n else None for g, n in zip(gradients, needs, strict=True)]


def _totals_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output)


def _totals_backward(ctx, grad):
    return None, None, None, None


_residual_vq_quantize = register_gradient("residual_vq_quantize", _quantize_backward, _quantize_setup)
_residual_code_totals = register_gradient("residual_code_totals", _totals_backward, _totals_setup)
register_second_order("residual_vq_quantize_backward", _quantize_gradients)

for _name in ("residual_vq_quantize", "residual_code_totals"):
    register_autocast(_name)
for _name in ("residual_vq_quantize", "residual_vq_quantize_backward", "residual_code_totals"):
    register_vmap_by_loop(_name)
