"""Soft and stochastic assignment of vectors to codes: softmaxes over a codebook that are never stored."""

import torch
from torch import Generator, Tensor

from isthmus import reference
from isthmus.ops._arguments import accumulate_dtype, check_choice, gradients_like, key_for, row_values
from isthmus.ops._register import (
    eager,
    gradient_of,
    none_if_absent,
    register_autocast,
    register_gradient,
    register_second_order,
    register_vmap_by_loop,
)
from isthmus.ops.codebook import vq_assign
from isthmus.reference.assignment import soft_statistics_sums

_ops = torch.ops.isthmus

_METRICS = ("euclidean", "cosine", "inner_product")


def vq_sample(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "euclidean",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    key: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Draw a code for each vector from p(k | x) = softmax_k(score / temperature).

    The Gumbel-max trick: the largest score / temperature + noise, an exact sample. Noise is made inside the search and
    only where it can decide: a code that would lose with the greatest noise there is draws none. O(N·K·D) time,
    O(N + K·D) memory.

    Args:
        x: [..., D]; float32, float64, bfloat16 or float16.
        codebook: [K, D], K ≥ 1, dtype of ``x``; or [H, K, D], one for each head of ``x`` [H, ..., D].
        metric: what scores: "euclidean" −|x − c|², "cosine" x·c / (|x||c|), 0 if either is zero, or "inner_product"
            x·c.
        temperature: 0 or more; at 0 this is ``vq_assign``.
        mask: bool, the leading shape of ``x``; rows that are False get −1.
        key: int64 [2]; row i and code k take element i·K + k of the stream of ``gumbel_noise``. Default: a fresh key
            drawn from ``generator``, or from torch's generator of the device.
        generator: where a fresh key is drawn from.

    Returns:
        int64 [...]. Equal sums: the lowest index. A vector with NaN: 0. The same on every device and instruction set,
        but for sums that differ by the rounding of a score. Not differentiable.

    Raises:
        ValueError: ``metric`` is none of its choices, or key and generator are both given.
        RuntimeError: dtypes, devices or shapes do not fit, there is no code, or ``temperature`` is negative.

    Example:
        >>> codebook = torch.tensor([[0.0], [1.0], [2.0]])
        >>> vq_sample(torch.tensor([[0.1], [1.9]]), codebook, temperature=0.01, key=isthmus.key(0))
        tensor([0, 2])
    """
    check_choice("metric", metric, _METRICS)
    if temperature == 0:
        return vq_assign(x, codebook, metric=metric, mask=mask)
    return _vq_sample(x, codebook, mask, key_for(x, key, generator), metric, temperature)


def vq_soft_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "euclidean",
    temperature: float = 1.0,
    gumbel: bool = False,
    relaxation: float = 1.0,
    hard: bool = False,
    mask: Tensor | None = None,
    key: Tensor | None = None,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean code Σ_k p_k c_k of each vector, p = softmax(score / temperature), and its most probable code.

    An attention over the codebook with an online softmax. With ``gumbel``, p is instead the relaxed sample
    softmax((score / temperature + noise) / relaxation) (Jang et al. 2017, arXiv 1611.01144); with ``hard`` the code
    itself comes out and the gradients are those of the mean: straight-through. Both together are the stochastic
    quantizer of Gumbel-softmax tokenizers, its sample drawn from softmax(score / temperature).

    Scores, probabilities and noise exist for a few hundred codes at a time; backward makes them again. O(N·K·D) time.
    Memory beside inputs and outputs: 3·K·D + N·D numbers forward, 11·K·D + 2·N·D at most backward.

    Args:
        x, codebook, metric, mask: as in ``vq_sample``.
        temperature: above 0. For a learned temperature with "inner_product", scale ``x``.
        gumbel: add noise to the logits.
        relaxation: above 0; divides the logits once more. Towards 0 relaxed samples become one-hot.
        hard: return the most probable code instead of the mean.
        key, generator: as in ``vq_sample``; only with ``gumbel``.

    Returns:
        (quantized, indices): quantized [..., D], dtype of ``x``; indices int64 [...], the lowest of equals. A vector
        with NaN: NaN (with ``hard`` the code 0) and 0. A masked vector: 0 and −1.

    Gradients:
        To ``x`` and ``codebook``, through the scores and the average; twice differentiable. Sums over vectors run in
        a fixed order: bitwise repeatable.

    Raises:
        ValueError: ``metric`` is none of its choices, key and generator are both given, or one of them without
            ``gumbel``.
        RuntimeError: dtypes, devices or shapes do not fit, there is no code, or ``temperature`` or ``relaxation`` is
            not positive.

    Example:
        >>> codebook = torch.tensor([[0.0], [1.0]])
        >>> vq_soft_quantize(torch.tensor([[0.5], [9.0]]), codebook)
        (tensor([[0.5000],
                [1.0000]]), tensor([0, 1]))
    """
    check_choice("metric", metric, _METRICS)
    if not gumbel and (key is not None or generator is not None):
        raise ValueError("key or generator was given without gumbel=True; expected none where nothing is drawn")
    noise = key_for(x, key, generator) if gumbel else None
    quantized, indices, _, _ = _vq_soft_quantize(x, codebook, mask, noise, metric, temperature, relaxation, hard)
    return quantized, indices


def vq_soft_statistics(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "euclidean",
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How undecided each vector is between the codes, and how the vectors together use them.

    With p = softmax(score / temperature): the entropy H(p) of each row, and the mean p̄ of p over the rows. Small
    entropies and a large entropy of p̄ are the confidence and diversity terms of codebook losses (Jansen et al. 2020,
    arXiv 1911.05894; Yu et al. 2024, arXiv 2310.05737): −(p̄ · log p̄).sum(-1) is the diversity. Across processes,
    average p̄ before taking its entropy.

    Two passes over the codes, as p̄ needs the normaliser of each row; backward two more and the gradients. O(N·K·D)
    time. Memory beside inputs and outputs: 2·K·D + 64·K + N numbers at most forward, 7·K·D + N·D backward.

    Args:
        x, codebook, metric: as in ``vq_sample``.
        temperature: above 0.
        mask: bool, the leading shape of ``x``; rows that are False have entropy 0 and no part in the mean.

    Returns:
        (entropy, mean_probability): entropy [...] in nats, from two terms that are never negative;
        mean_probability [K] or [H, K], zeros if there is no row. float64 for float64 inputs, else float32. A vector
        with NaN: its entropy and every mean probability of its head NaN.

    Gradients:
        To ``x`` and ``codebook``; twice differentiable. Bitwise repeatable.

    Raises:
        ValueError: ``metric`` is none of its choices.
        RuntimeError: dtypes, devices or shapes do not fit, there is no code, or ``temperature`` is not positive.

    Example:
        >>> vq_soft_statistics(torch.tensor([[0.0], [1.0]]), torch.tensor([[-1.0], [1.0]]))
        (tensor([0.6931, 0.0901]), tensor([0.2590, 0.7410]))
    """
    check_choice("metric", metric, _METRICS)
    entropy, usage, _ = _vq_soft_statistics(x, codebook, mask, metric, temperature)
    if mask is None:
        rows = x.shape[:-1].numel() // usage.shape[:-1].numel() if usage.numel() else 0
        return entropy, usage / max(rows, 1)
    return entropy, usage / mask.flatten(codebook.dim() - 2).sum(-1, keepdim=True).clamp(min=1)


def vq_cross_entropy(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    *,
    metric: str = "euclidean",
    temperature: float = 1.0,
) -> Tensor:
    """−log p(index | x) under p = softmax(score / temperature): a classification loss on given codes.

    As a commitment loss with the indices of ``vq_assign`` it pulls a vector to its code and away from all others.
    O(N·K·D) time; memory beside inputs and outputs: 2·K·D numbers forward, 7·K·D + N·D backward.

    Args:
        x, codebook, metric: as in ``vq_sample``.
        indices: int64, the leading shape of ``x``, each in [0, K), or −1 to leave a row out.
        temperature: above 0.

    Returns:
        [...] in nats; float64 for float64 inputs, else float32; 0 where the index is −1. A vector with NaN: NaN.

    Gradients:
        To ``x`` and ``codebook``; twice differentiable. Bitwise repeatable.

    Raises:
        ValueError: ``metric`` is none of its choices.
        RuntimeError: dtypes, devices or shapes do not fit, an index is out of range, there is no code, or
            ``temperature`` is not positive. On CUDA, where reading an index would wait for the device, a bad index
            stops the device with a message, as in torch's indexing.

    Example:
        >>> vq_cross_entropy(torch.tensor([[0.0], [1.0]]), torch.tensor([[-1.0], [1.0]]), torch.tensor([0, -1]))
        tensor([0.6931, 0.0000])
    """
    check_choice("metric", metric, _METRICS)
    return _vq_cross_entropy(x, codebook, indices, metric, temperature)[0]


# ---- shapes without data ---------------------------------------------------------------------------------------------


def _normalizer(x: Tensor) -> Tensor:
    return x.new_empty((2, *x.shape[:-1]), dtype=accumulate_dtype(x))


@torch.library.register_fake("isthmus::vq_sample")
def _(x, codebook, mask, key, metric, temperature):
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


@torch.library.register_fake("isthmus::vq_soft_quantize")
def _(x, codebook, mask, key, metric, temperature, relaxation, hard):
    indices, centred = x.new_empty(x.shape[:-1], dtype=torch.int64), x.new_empty(x.shape, dtype=accumulate_dtype(x))
    return x.new_empty(x.shape), indices, centred, _normalizer(x)


@torch.library.register_fake("isthmus::vq_soft_quantize_backward")
def _(grad, centred, normalizer, x, codebook, mask, key, metric, temperature, relaxation, need_x, need_codebook):
    return gradients_like((x, need_x), (codebook, need_codebook))


@torch.library.register_fake("isthmus::vq_soft_statistics")
def _(x, codebook, mask, metric, temperature):
    usage = x.new_empty(codebook.shape[:-1], dtype=accumulate_dtype(x))
    return row_values(x), usage, _normalizer(x)


@torch.library.register_fake("isthmus::vq_soft_statistics_backward")
def _(grad_entropy, grad_usage, entropy, normalizer, x, codebook, mask, metric, temperature, need_x, need_codebook):
    return gradients_like((x, need_x), (codebook, need_codebook))


@torch.library.register_fake("isthmus::vq_cross_entropy")
def _(x, codebook, indices, metric, temperature):
    return row_values(x), _normalizer(x)


@torch.library.register_fake("isthmus::vq_cross_entropy_backward")
def _(grad, normalizer, x, codebook, indices, metric, temperature, need_x, need_codebook):
    return gradients_like((x, need_x), (codebook, need_codebook))


# ---- gradients -------------------------------------------------------------------------------------------------------

_vq_soft_quantize_backward = eager("vq_soft_quantize_backward")
_vq_soft_statistics_backward = eager("vq_soft_statistics_backward")
_vq_cross_entropy_backward = eager("vq_cross_entropy_backward")


def _for_inputs(ctx, grads, others):
    """Gradients of x and the codebook, and none of the other arguments."""
    pair = (none_if_absent(g, n) for g, n in zip(grads, ctx.needs_input_grad[:2], strict=True))
    return *pair, *[None] * others


def _keep(gradients, needs):
    return [g if n else None for g, n in zip(gradients, needs, strict=True)]


def _quantize_setup(ctx, inputs, output):
    x, codebook, mask, key, ctx.metric, ctx.temperature, ctx.relaxation, _ = inputs
    _, indices, centred, normalizer = output
    ctx.mark_non_differentiable(indices, centred, normalizer)
    ctx.save_for_backward(centred, normalizer, x, codebook, mask, key)


def _quantize_backward(ctx, grad, *_):
    options = ctx.metric, ctx.temperature, ctx.relaxation
    grads = _vq_soft_quantize_backward(grad, *ctx.saved_tensors, *options, *ctx.needs_input_grad[:2])
    return _for_inputs(ctx, grads, 6)


def _quantize_gradients(grad, centred, normalizer, x, codebook, mask, key, metric, temperature, relaxation, *needs):
    noise = None if key is None else _ops.gumbel_noise(key, (*x.shape[:-1], codebook.shape[-2]), accumulate_dtype(x))

    def quantize(x, codebook):
        return reference.vq_soft_quantize(
            x,
            codebook,
            metric=metric,
            temperature=temperature,
            gumbel=key is not None,
            relaxation=relaxation,
            mask=mask,
            noise=noise,
        )[0]

    return _keep(gradient_of(quantize, (x, codebook), grad), needs)


def _statistics_setup(ctx, inputs, output):
    x, codebook, mask, ctx.metric, ctx.temperature = inputs
    entropy, _, normalizer = output
    ctx.mark_non_differentiable(normalizer)
    ctx.set_materialize_grads(False)  # a term that nobody uses saves a pass
    ctx.save_for_backward(entropy, normalizer, x, codebook, mask)


def _statistics_backward(ctx, grad_entropy, grad_usage, _):
    grads = _vq_soft_statistics_backward(
        grad_entropy, grad_usage, *ctx.saved_tensors, ctx.metric, ctx.temperature, *ctx.needs_input_grad[:2]
    )
    return _for_inputs(ctx, grads, 3)


def _statistics_gradients(
    grad_entropy, grad_usage, entropy, normalizer, x, codebook, mask, metric, temperature, *needs
):
    def statistics(x, codebook):
        entropy, usage = soft_statistics_sums(x, codebook, metric=metric, temperature=temperature, mask=mask)
        return [o for o, g in ((entropy, grad_entropy), (usage, grad_usage)) if g is not None]

    grads = [g for g in (grad_entropy, grad_usage) if g is not None]
    return _keep(gradient_of(statistics, (x, codebook), grads), needs)


def _cross_entropy_setup(ctx, inputs, output):
    x, codebook, indices, ctx.metric, ctx.temperature = inputs
    _, normalizer = output
    ctx.mark_non_differentiable(normalizer)
    ctx.save_for_backward(normalizer, x, codebook, indices)


def _cross_entropy_backward(ctx, grad, _):
    grads = _vq_cross_entropy_backward(grad, *ctx.saved_tensors, ctx.metric, ctx.temperature, *ctx.needs_input_grad[:2])
    return _for_inputs(ctx, grads, 3)


def _cross_entropy_gradients(grad, normalizer, x, codebook, indices, metric, temperature, *needs):
    def cross_entropy(x, codebook):
        return reference.vq_cross_entropy(x, codebook, indices, metric=metric, temperature=temperature)

    return _keep(gradient_of(cross_entropy, (x, codebook), grad), needs)


_vq_sample = eager("vq_sample")
_vq_soft_quantize = register_gradient("vq_soft_quantize", _quantize_backward, _quantize_setup)
_vq_soft_statistics = register_gradient("vq_soft_statistics", _statistics_backward, _statistics_setup)
_vq_cross_entropy = register_gradient("vq_cross_entropy", _cross_entropy_backward, _cross_entropy_setup)
register_second_order("vq_soft_quantize_backward", _quantize_gradients)
register_second_order("vq_soft_statistics_backward", _statistics_gradients)
register_second_order("vq_cross_entropy_backward", _cross_entropy_gradients)

for _name in ("vq_sample", "vq_soft_quantize", "vq_soft_statistics", "vq_cross_entropy"):
    register_autocast(_name)
    register_vmap_by_loop(_name)
for _name in ("vq_soft_quantize_backward", "vq_soft_statistics_backward", "vq_cross_entropy_backward"):
    register_vmap_by_loop(_name)
