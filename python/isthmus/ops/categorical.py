"""Categorical latents: Gumbel-softmax samples, whose noise is never stored, and divergences between categoricals."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from isthmus import reference
from isthmus.ops._arguments import accumulate_dtype, broadcast, check_choice, gradients_like, key_for, like, row_values
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


def gumbel_noise(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard Gumbel noise, -log(-log u): element i of the result is a function of (key, i) alone.

    The stream of ``gumbel_softmax``, defined in ``isthmus.reference.gumbel_noise``. u is never 0 or 1, so every value
    is finite: in [-2.82, 22.88] in float32.

    Args:
        key: int64 [2], from ``isthmus.key``; the result lives on its device.
        shape: shape of the result.
        dtype: float32, float64 (a stream of its own), bfloat16 or float16 (the float32 stream, rounded).

    Returns:
        Tensor of ``shape``. Not differentiable.

    Raises:
        RuntimeError: ``key`` is not an int64 pair, or ``dtype`` is not one of the four.

    Example:
        >>> noise = gumbel_noise(isthmus.key(0), (2, 3))
        >>> sample = (torch.zeros(2, 3) + noise).argmax(-1)  # of softmax(zeros): the Gumbel-max trick
    """
    return _ops.gumbel_noise(key, shape, dtype)


def gumbel_softmax(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    hard: bool = False,
    key: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Sample y = softmax((logits + Gumbel noise) / temperature) (Jang et al. 2017, arXiv 1611.01144; Maddison et al.
    2017, arXiv 1611.00712).

    One pass forward, one pass backward: noise and perturbed logits never exist in memory. Kept for backward is y
    itself, or, where y is one-hot, the logits and 16 bytes of key from which the soft sample is computed again.

    Args:
        logits: [..., K], unnormalised log-probabilities; float32, float64, bfloat16 or float16. -inf: probability 0.
        temperature: above 0. Towards 0 samples become one-hot and gradients large.
        hard: return the exact one-hot of the largest entry (the first of equals), with the gradient of the soft
            sample: straight-through. The one-hot is an exact sample of softmax(logits), whatever the temperature.
        key: int64 [2]; the noise of element i is ``gumbel_noise(key, …)[i]``. Default: a fresh key drawn from
            ``generator``, or from torch's generator of the device.
        generator: where a fresh key is drawn from.

    Returns:
        y, [..., K], dtype of ``logits``. A row that holds NaN or +inf, or no finite logit, is NaN.

    Gradients:
        To ``logits``; twice differentiable.

    Raises:
        ValueError: key and generator are both given.
        RuntimeError: ``temperature`` is not positive, or the dtype is none of the four.

    Example:
        >>> gumbel_softmax(torch.zeros(2, 3), hard=True, key=isthmus.key(0)).sum(-1)
        tensor([1., 1.])
    """
    return _gumbel_softmax(logits, key_for(logits, key, generator), temperature, hard)


def categorical_kl(logits: Tensor, prior_logits: Tensor | None = None, *, reduction: str = "row") -> Tensor:
    """KL(softmax(logits) ‖ softmax(prior_logits)) of categoricals, in nats; by default from the uniform distribution.

    With d = log q - log p a row is Σ q (exp(-d) - 1 + d), which equals Σ q d and cancels nowhere: near the prior, where
    the textbook form subtracts nearly equal numbers, this one keeps its relative accuracy.

    Args:
        logits: [..., K], unnormalised log-probabilities; float32, float64, bfloat16 or float16. -inf means
            probability 0 and adds 0 · log 0 = 0.
        prior_logits: same dtype, broadcastable with ``logits``; one row for all is read as one row, never copied.
            None: uniform.
        reduction: "row" sums over the last dimension, "sum" over everything, "mean" averages the row sums.

    Returns:
        [...] for "row", [] for "sum" and "mean". float64 for float64 inputs, else float32. Infinite where the prior
        excludes what ``logits`` allow.

    Gradients:
        To both tensors; twice differentiable. An infinite divergence has NaN gradients.

    Raises:
        ValueError: ``reduction`` is none of its choices, or the shapes do not broadcast.
        RuntimeError: dtypes or devices do not fit.

    Example:
        >>> categorical_kl(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]))
        tensor([0.0000, 0.6931])
    """
    check_choice("reduction", reduction, ("row", "sum", "mean"))
    return _reduce(_categorical_kl(*broadcast(logits=logits, prior_logits=prior_logits)), reduction)


def gumbel_softmax_kl(
    logits: Tensor,
    prior_logits: Tensor | None = None,
    *,
    temperature: float = 1.0,
    hard: bool = False,
    reduction: str = "row",
    key: Tensor | None = None,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample y and its posterior's divergence from the prior, in one pass each way.

    Equals ``gumbel_softmax`` and ``categorical_kl`` with the same arguments: the divergence is that of the categorical
    distributions, not of their relaxations. Kept for backward are the logits and the key.

    Args:
        logits, temperature, hard, key, generator: as in ``gumbel_softmax``.
        prior_logits, reduction: as in ``categorical_kl``.

    Returns:
        (y, kl): y as in ``gumbel_softmax``, kl as in ``categorical_kl``.

    Gradients:
        To both tensors; twice differentiable.

    Raises:
        ValueError: an option is none of its choices, key and generator are both given, or shapes do not broadcast.
        RuntimeError: dtypes or devices do not fit, or ``temperature`` is not positive.

    Example:
        >>> y, kl = gumbel_softmax_kl(torch.zeros(4, 10), temperature=0.5)
        >>> kl
        tensor([0., 0., 0., 0.])
    """
    check_choice("reduction", reduction, ("row", "sum", "mean"))
    logits, prior_logits = broadcast(logits=logits, prior_logits=prior_logits)
    y, kl = _gumbel_softmax_kl(logits, prior_logits, key_for(logits, key, generator), temperature, hard)
    return y, _reduce(kl, reduction)


def _reduce(kl: Tensor, reduction: str) -> Tensor:
    if reduction == "row":
        return kl
    return kl.sum() if reduction == "sum" else kl.mean()


# ---- shapes without data ---------------------------------------------------------------------------------------------


@torch.library.register_fake("isthmus::gumbel_noise")
def _(key, shape, dtype):
    return key.new_empty(shape, dtype=dtype)


@torch.library.register_fake("isthmus::gumbel_softmax")
def _(logits, key, temperature, hard):
    return like(logits)


@torch.library.register_fake("isthmus::gumbel_softmax_backward")
def _(grad, y, temperature):
    return like(y)


@torch.library.register_fake("isthmus::gumbel_softmax_hard_backward")
def _(grad, logits, key, temperature):
    return like(logits)


@torch.library.register_fake("isthmus::gumbel_softmax_kl")
def _(logits, prior_logits, key, temperature, hard):
    return like(logits), row_values(logits)


@torch.library.register_fake("isthmus::gumbel_softmax_kl_backward")
def _(grad_y, grad_kl, logits, prior_logits, key, temperature, prior_gradient):
    return gradients_like((logits, True), (logits, prior_gradient))


@torch.library.register_fake("isthmus::categorical_kl")
def _(logits, prior_logits):
    return row_values(logits)


@torch.library.register_fake("isthmus::categorical_kl_backward")
def _(grad, logits, prior_logits, prior_gradient):
    return gradients_like((logits, True), (logits, prior_gradient))


# ---- gradients -------------------------------------------------------------------------------------------------------

_gumbel_softmax_backward = eager("gumbel_softmax_backward")
_gumbel_softmax_hard_backward = eager("gumbel_softmax_hard_backward")
_gumbel_softmax_kl_backward = eager("gumbel_softmax_kl_backward")
_categorical_kl_backward = eager("categorical_kl_backward")


def _softmax_setup(ctx, inputs, output):
    logits, key, ctx.temperature, ctx.hard = inputs
    ctx.save_for_backward(*((logits, key) if ctx.hard else (output,)))


def _softmax_backward(ctx, grad):
    backward = _gumbel_softmax_hard_backward if ctx.hard else _gumbel_softmax_backward
    return backward(grad, *ctx.saved_tensors, ctx.temperature), None, None, None


def _softmax_kl_setup(ctx, inputs, output):
    logits, prior_logits, key, ctx.temperature, _ = inputs
    ctx.save_for_backward(logits, prior_logits, key)


def _softmax_kl_backward(ctx, grad_y, grad_kl):
    to_prior = ctx.needs_input_grad[1]
    arguments = grad_y, grad_kl, *ctx.saved_tensors, ctx.temperature, to_prior
    grad_logits, grad_prior = _gumbel_softmax_kl_backward(*arguments)
    return grad_logits, none_if_absent(grad_prior, to_prior), None, None, None


def _kl_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _kl_backward(ctx, grad):
    to_prior = ctx.needs_input_grad[1]
    grad_logits, grad_prior = _categorical_kl_backward(grad, *ctx.saved_tensors, to_prior)
    return grad_logits, none_if_absent(grad_prior, to_prior)


_gumbel_softmax = register_gradient("gumbel_softmax", _softmax_backward, _softmax_setup)
_gumbel_softmax_kl = register_gradient("gumbel_softmax_kl", _softmax_kl_backward, _softmax_kl_setup)
_categorical_kl = register_gradient("categorical_kl", _kl_backward, _kl_setup)


def _noise_of(logits: Tensor, key: Tensor) -> Tensor:
    return _ops.gumbel_noise(key, logits.shape, accumulate_dtype(logits))


def _softmax_gradients(grad, y, temperature):
    grad_wide, y_wide = (t.to(accumulate_dtype(t)) for t in (grad, y))
    centred = grad_wide - (grad_wide * y_wide).sum(-1, keepdim=True)
    return [(y_wide * centred / temperature).to(y.dtype)]


def _softmax_hard_gradients(grad, logits, key, temperature):
    noise = _noise_of(logits, key)

    def soft_sample(logits):
        return reference.gumbel_softmax(logits, temperature=temperature, noise=noise)

    return gradient_of(soft_sample, (logits,), grad)


def _both_or_logits(
    function: Any, logits: Tensor, prior_logits: Tensor | None, grads: Any, prior_gradient: bool
) -> Any:
    to_logits, to_prior = gradient_of(function, (logits, prior_logits), grads)
    return [to_logits, to_prior if prior_gradient else None]


def _softmax_kl_gradients(grad_y, grad_kl, logits, prior_logits, key, temperature, prior_gradient):
    noise = _noise_of(logits, key)

    def sample_kl(logits, prior_logits):
        return reference.gumbel_softmax_kl(logits, prior_logits, temperature=temperature, noise=noise)

    return _both_or_logits(sample_kl, logits, prior_logits, (grad_y, grad_kl), prior_gradient)


def _kl_gradients(grad, logits, prior_logits, prior_gradient):
    return _both_or_logits(reference.categorical_kl, logits, prior_logits, grad, prior_gradient)


register_second_order("gumbel_softmax_backward", _softmax_gradients)
register_second_order("gumbel_softmax_hard_backward", _softmax_hard_gradients)
register_second_order("gumbel_softmax_kl_backward", _softmax_kl_gradients)
register_second_order("categorical_kl_backward", _kl_gradients)

for _name in ("gumbel_softmax", "gumbel_softmax_kl", "categorical_kl"):
    register_autocast(_name)
    register_vmap_by_loop(_name)
    register_vmap_by_loop(f"{_name}_backward")
for _name in ("gumbel_noise", "gumbel_softmax_hard_backward"):
    register_vmap_by_loop(_name)
