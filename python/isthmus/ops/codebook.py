"""Vector quantization: the nearest code of each vector, without a distance matrix."""

import torch
from torch import Tensor

from isthmus import reference
from isthmus.ops._arguments import accumulate_dtype, check_choice
from isthmus.ops._register import (
    eager,
    gradient_of,
    register_autocast,
    register_gradient,
    register_second_order,
    register_vmap_by_loop,
)

_ops = torch.ops.isthmus


def vq_assign(x: Tensor, codebook: Tensor, *, metric: str = "euclidean", topk: int = 1) -> Tensor:
    """Index of the code nearest to each vector of ``x``.

    Maximises x·c − |c|²/2 while the products are still in registers: O(N·K·D) time, O(N + K·D) memory; scores
    of size N × K never exist. bfloat16 and float16 are searched with float32 arithmetic.

    Args:
        x: [..., D]; float32, float64, bfloat16 or float16.
        codebook: [K, D], K ≥ 1, dtype of ``x``.
        metric: "euclidean".
        topk: 1.

    Returns:
        int64 [...]. Equally near codes: the lowest index. A vector with NaN: 0. A code with NaN is never chosen.
        Two codes whose distances differ by less than the rounding of x·c may swap. Not differentiable.

    Raises:
        ValueError: another ``metric`` or ``topk``.
        RuntimeError: dtypes, devices or shapes do not fit, or there is no code.

    Example:
        >>> codebook = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> vq_assign(torch.tensor([[0.9, 0.8], [0.1, 0.3]]), codebook)
        tensor([1, 0])
    """
    check_choice("metric", metric, ("euclidean",))
    if topk != 1:
        raise ValueError(f"topk is {topk}; expected 1")
    return _ops.vq_assign(x, codebook)


def vq_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "euclidean",
    gradient: str = "straight_through",
    commitment_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace each vector by its nearest code, differentiably (van den Oord et al. 2017, arXiv 1711.00937).

    ``squared_error.mean()`` trains like |sg(x) − c|² + commitment_weight · |x − sg(c)|², the loss of the paper.

    Args:
        x: [..., D]; float32, float64, bfloat16 or float16.
        codebook: [K, D], K ≥ 1, dtype of ``x``.
        metric: "euclidean".
        gradient: "straight_through".
        commitment_weight: weight of the pull of a vector towards its code; it does not change the value.

    Returns:
        (quantized, indices, squared_error): quantized [..., D], the codes themselves in the dtype of ``x``;
        indices int64 [...] as in ``vq_assign``; squared_error [...] = |x − c|², float32 for bfloat16 and
        float16, taken from the difference and not from the score. A vector with NaN: code 0, and its error is
        NaN.

    Gradients:
        ``quantized`` passes its gradient to ``x`` unchanged and none to ``codebook``. ``squared_error`` gives
        −2(x − c) to ``codebook`` and commitment_weight · 2(x − c) to ``x``. Sums over the vectors of a code run
        in a fixed order: bitwise repeatable. Twice differentiable, the assignment held fixed.

    Raises:
        ValueError: another ``metric`` or ``gradient``.
        RuntimeError: dtypes, devices or shapes do not fit, or there is no code.

    Example:
        >>> x = torch.tensor([[0.75], [0.25]], requires_grad=True)
        >>> codebook = torch.tensor([[0.0], [1.0]], requires_grad=True)
        >>> quantized, indices, squared_error = vq_quantize(x, codebook, commitment_weight=0.5)
        >>> indices, squared_error.detach()
        (tensor([1, 0]), tensor([0.0625, 0.0625]))
        >>> squared_error.sum().backward()
        >>> x.grad.flatten(), codebook.grad.flatten()
        (tensor([-0.2500,  0.2500]), tensor([-0.5000,  0.5000]))
    """
    check_choice("metric", metric, ("euclidean",))
    check_choice("gradient", gradient, ("straight_through",))
    return _vq_quantize(x, codebook, commitment_weight)


def code_statistics(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How many vectors each code received, and their sum: what k-means and moving-average codebooks need.

    One counting sort by code, then sums in a fixed order: bitwise repeatable, and balanced over threads even if
    one code received everything. O(N·D + K·D) time, O(N + K) memory beside the result.

    Args:
        x: [..., D]; float32, float64, bfloat16 or float16.
        indices: int64 [...], the leading shape of ``x``, each in [0, num_codes).
        num_codes: K.

    Returns:
        (counts, sums): counts [K] and sums [K, D], float64 for float64 and float32 for all others. Not
        differentiable.

    Raises:
        RuntimeError: dtypes, devices or shapes do not fit, or an index is out of range. On CUDA, where reading an
            index would wait for the device, a bad index stops the device with a message, as in torch's indexing.

    Example:
        >>> code_statistics(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([2, 0, 2]), num_codes=3)
        (tensor([1., 0., 2.]), tensor([[2.],
                [0.],
                [5.]]))
    """
    return _code_statistics(x, indices, num_codes)


# ---- shapes without data ---------------------------------------------------------------------------------------------


@torch.library.register_fake("isthmus::vq_assign")
def _(x, codebook):
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


@torch.library.register_fake("isthmus::vq_quantize")
def _(x, codebook, commitment_weight):
    indices = x.new_empty(x.shape[:-1], dtype=torch.int64)
    return x.new_empty(x.shape), indices, x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x))


@torch.library.register_fake("isthmus::vq_quantize_backward")
def _(grad_quantized, grad_error, x, codebook, indices, commitment_weight):
    return x.new_empty(x.shape), codebook.new_empty(codebook.shape)


@torch.library.register_fake("isthmus::code_statistics")
def _(x, indices, num_codes):
    dtype = accumulate_dtype(x)
    return x.new_empty(num_codes, dtype=dtype), x.new_empty((num_codes, x.shape[-1]), dtype=dtype)


# ---- gradients -------------------------------------------------------------------------------------------------------

_vq_quantize_backward = eager("vq_quantize_backward")


def _quantize_setup(ctx, inputs, output):
    x, codebook, ctx.commitment_weight = inputs
    ctx.save_for_backward(x, codebook, output[1])


def _quantize_backward(ctx, grad_quantized, _, grad_error):
    x, codebook, indices = ctx.saved_tensors
    grads = _vq_quantize_backward(grad_quantized, grad_error, x, codebook, indices, ctx.commitment_weight)
    return *grads, None


def _statistics_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output)


def _statistics_backward(ctx, *grads):
    return None, None, None


def _quantize_gradients(grad_quantized, grad_error, x, codebook, indices, commitment_weight):
    def quantize(x, codebook):
        quantized, _, error = reference.vq_quantize(x, codebook, commitment_weight=commitment_weight, indices=indices)
        return quantized, error

    return gradient_of(quantize, (x, codebook), (grad_quantized, grad_error))


_vq_quantize = register_gradient("vq_quantize", _quantize_backward, _quantize_setup)
_code_statistics = register_gradient("code_statistics", _statistics_backward, _statistics_setup)
register_second_order("vq_quantize_backward", _quantize_gradients)

for _name in ("vq_assign", "vq_quantize"):
    register_autocast(_name)
for _name in ("vq_assign", "vq_quantize", "vq_quantize_backward", "code_statistics"):
    register_vmap_by_loop(_name)
