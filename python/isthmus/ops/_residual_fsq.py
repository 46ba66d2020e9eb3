"""Finite scalars in stages: part of the scalar family."""

from collections.abc import Sequence

import torch
from torch import Tensor

from isthmus import reference
from isthmus.ops._arguments import active_stages, like
from isthmus.ops._register import (
    eager,
    gradient_of,
    register_autocast,
    register_gradient,
    register_second_order,
    register_vmap_by_loop,
)


def residual_fsq_quantize(
    x: Tensor,
    levels: Sequence[int],
    num_quantizers: int,
    *,
    hard_clamp: bool = False,
    stages: Tensor | int | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Finite scalar quantization in Q stages, each coding what the stages before it left over, in one pass.

    With s = tanh and b = L / (L - 1), a number becomes r_0 = b · s(x / b). Stage q takes the nearest v_q to r_q of L
    levels spread evenly over [-1, 1], and hands r_{q+1} = L · (r_q - v_q) on; x ≈ Σ_q v_q · L^-q. All L bins of a stage
    are 2 / (L - 1) wide, so residuals span the same range in every stage, and Q stages are the digits of one uniform
    quantizer with L^Q levels. Numbers stay in registers: memory is that of the results.

    Args:
        x: [..., D]; float32, float64, bfloat16 or float16.
        levels: D numbers L of levels, 2 to 65536 each, with fewer than 2^63 codes in all.
        num_quantizers: number Q of stages. Rounding (2^-24, float64: 2^-53) is what stages beyond it code.
        hard_clamp: s clamps to [-1, 1] instead; its gradient is 1 inside and on the border, 0 outside.
        stages: how many stages code a vector, 0 to Q: int64 of the leading shape of ``x``, or one number for all. For
            quantizer dropout. Default Q.
        mask: bool, the leading shape of ``x``; False is ``stages`` = 0, whatever the vector holds.

    Returns:
        (quantized [..., D] in ±b, dtype of ``x``, zeros where there is no stage; indices int64 [..., Q], the first
        dimension the least significant digit, -1 for a stage that is not used). NaN: quantized is NaN there, its digits
        0.

    Gradients:
        quantized to ``x``: that of b · s(x / b), once and not once for each stage; twice differentiable.

    Raises:
        ValueError: ``mask`` does not fit.
        RuntimeError: ``levels`` does not fit ``x`` or int64, an argument is out of range, or ``stages`` beyond 0 to Q
            (on CUDA the device stops).

    Example:
        >>> residual_fsq_quantize(torch.tensor([[0.0, 0.5]]), (3, 5), 3, hard_clamp=True)
        (tensor([[0.0000, 0.5000]]), tensor([[10,  7,  7]]))
    """
    kept = active_stages(x, num_quantizers, stages, mask)
    return _residual_fsq_quantize(x, tuple(levels), num_quantizers, kept, hard_clamp)


@torch.library.register_fake("isthmus::residual_fsq_quantize")
def _(x, levels, num_quantizers, stages, hard_clamp):
    return like(x), x.new_empty((*x.shape[:-1], num_quantizers), dtype=torch.int64)


@torch.library.register_fake("isthmus::residual_fsq_quantize_backward")
def _(grad, x, levels, stages, hard_clamp):
    return like(x)


_residual_fsq_quantize_backward = eager("residual_fsq_quantize_backward")


def _setup(ctx, inputs, output):
    x, ctx.levels, _, stages, ctx.hard_clamp = inputs
    ctx.save_for_backward(x, stages)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    x, stages = ctx.saved_tensors
    return _residual_fsq_quantize_backward(grad, x, ctx.levels, stages, ctx.hard_clamp), *[None] * 4


_residual_fsq_quantize = register_gradient("residual_fsq_quantize", _backward, _setup)


def _gradients(grad, x, levels, stages, hard_clamp):
    mask = None if stages is None else stages > 0

    def quantized(x):
        return reference.residual_fsq_quantize(x, levels, 1, hard_clamp=hard_clamp, mask=mask)[0]

    return gradient_of(quantized, (x,), grad)


register_second_order("residual_fsq_quantize_backward", _gradients)
register_autocast("residual_fsq_quantize")
for _name in ("residual_fsq_quantize", "residual_fsq_quantize_backward"):
    register_vmap_by_loop(_name)
