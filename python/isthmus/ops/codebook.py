"""Vector quantization: nearest codes without a distance matrix, their gradients, and codebooks that learn."""

import torch
from torch import Tensor

from isthmus import reference
from isthmus.ops._arguments import accumulate_dtype, check_choice
from isthmus.ops._register import (
    eager,
    gradient_of,
    none_if_absent,
    register_autocast,
    register_gradient,
    register_in_place,
    register_second_order,
    register_vmap_by_loop,
)

_METRICS = ("euclidean", "cosine", "inner_product")
_GRADIENTS = ("straight_through", "rotation", "codebook")


def vq_assign(
    x: Tensor, codebook: Tensor, *, metric: str = "euclidean", topk: int = 1, mask: Tensor | None = None
) -> Tensor:
    """Index of the best code for each vector of ``x``.

    O(N·K·D) time, O(N + K·D) memory: scores of size N × K never exist. Exact: codes are screened at speed with a
    proven error bound, and the survivors compared in float64, so every instruction set and thread count gives the same
    indices.

    Args:
        x: [..., D]; float32, float64, bfloat16 or float16. With heads [H, ..., D]. Read without a copy if its vectors
            are contiguous and lie at one stride within a head, as in ``x.movedim(-2, 0)`` of a contiguous [N, H, D].
        codebook: [K, D], or [H, K, D], a codebook for each head; K ≥ 1, dtype of ``x``.
        metric: what the best code has most of. "euclidean": −|x − c|². "cosine": x·c / |c|, 0 for a code of zeros;
            the length of x does not matter. "inner_product": x·c.
        topk: how many codes to return, 1 to K.
        mask: bool, the leading shape of ``x``: vectors that are False are not searched and get −1.

    Returns:
        int64 [...], or [..., topk] if topk > 1, best first. Equal scores: the lower index first. A vector with NaN:
        0, 1, …; a code with NaN comes last. Not differentiable.

    Raises:
        ValueError: another ``metric``.
        RuntimeError: dtypes, devices or shapes do not fit, there is no code, or topk is out of range.

    Example:
        >>> codebook = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> vq_assign(torch.tensor([[0.9, 0.8], [0.1, 0.3]]), codebook)
        tensor([1, 0])
        >>> vq_assign(torch.tensor([[0.9, 0.8], [0.1, 0.3]]), codebook, topk=2)
        tensor([[1, 0],
                [0, 1]])
    """
    check_choice("metric", metric, _METRICS)
    return _vq_assign(x, codebook, mask, metric, topk)


def vq_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "euclidean",
    gradient: str = "straight_through",
    commitment_weight: float = 1.0,
    mask: Tensor | None = None,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace each vector by its best code, differentiably (van den Oord et al. 2017, arXiv 1711.00937).

    ``squared_error.mean()`` trains like |sg(x) − c|² + commitment_weight · |x − sg(c)|², the loss of the paper.

    Args:
        x, codebook, metric, mask: as in ``vq_assign``.
        gradient: how ``quantized`` passes its gradient on, see below.
        commitment_weight: weight of the pull of a vector towards its code; it does not change the value.
        indices: int64, the leading shape of ``x``: codes chosen elsewhere, −1 for none. Nothing is searched then;
            give no ``mask``.

    Returns:
        (quantized, indices, squared_error): quantized [..., D], the codes themselves for every metric, in the dtype of
        ``x``; indices int64 [...] as in ``vq_assign``; squared_error [...] = |x − c|², float32 for bfloat16 and
        float16, taken from the difference and not from the score. A vector without a code (−1): zeros, no error. A
        vector with NaN: code 0, and its error is NaN.

    Gradients:
        ``squared_error`` gives −2(x − c) to ``codebook`` and commitment_weight · 2(x − c) to ``x``. ``quantized``:

        - "straight_through": to ``x`` unchanged, none to ``codebook``.
        - "rotation": to ``x`` as λRᵀg, where R is the rotation in the plane of x and c, and λ = |c| / |x|, for which
          c = λRx; both are held constant (Fifty et al. 2024, arXiv 2410.06424). Where x and c are opposed, R is a
          reflection; where x = 0 the gradient passes unchanged.
        - "codebook": to the code, none to ``x``: for codes that are functions of parameters.

        Vectors without a code pass no gradient. Sums over the vectors of a code run in a fixed order: bitwise
        repeatable. Twice differentiable, the assignment (and R and λ) held fixed.

    Raises:
        ValueError: another ``metric`` or ``gradient``, or both ``mask`` and ``indices``.
        RuntimeError: dtypes, devices or shapes do not fit, there is no code, or an index is out of range.

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
    check_choice("metric", metric, _METRICS)
    check_choice("gradient", gradient, _GRADIENTS)
    if indices is None:
        return _vq_quantize(x, codebook, mask, metric, gradient, commitment_weight)
    if mask is not None:
        raise ValueError("mask and indices were both given; expected -1 in indices where a vector is masked")
    quantized, squared_error = _vq_gather(x, codebook, indices, gradient, commitment_weight)
    return quantized, indices, squared_error


def vq_match(x: Tensor, codebook: Tensor, *, metric: str = "euclidean") -> tuple[Tensor, Tensor]:
    """The best code of each vector, and the best vector of each code: what prototype losses pull together.

    The vectors of a code are ranked by the same score with the roles exchanged: for "cosine" by x·c / |x|. On the CPU
    one screen of N·K·D products serves both, in O((N + K)·D) memory and 120 bytes a thread for each of the fewer of
    vectors and codes. Both are exact, bit for bit the answers of two calls of ``vq_assign``.

    Args:
        x: [N, D], N ≥ 1; with heads [H, N, D].
        codebook: [K, D]; with heads [H, K, D].
        metric: as in ``vq_assign``.

    Returns:
        (nearest_code, nearest_row): int64 [N] and [K], with heads [H, N] and [H, K]. Ties and NaN as in ``vq_assign``.
        Not differentiable; gather with them, ``(x - codebook[nearest_code])`` and ``(x[nearest_row] - codebook)``.

    Raises:
        ValueError: another ``metric``.
        RuntimeError: dtypes, devices or shapes do not fit, or there is no vector or no code.

    Source: the two interpretability terms of Li et al. 2018, arXiv 1710.04806.

    Example:
        >>> vq_match(torch.tensor([[0.9], [0.1], [0.2]]), torch.tensor([[0.0], [1.0]]))
        (tensor([1, 0, 0]), tensor([1, 0]))
    """
    check_choice("metric", metric, _METRICS)
    return _vq_match(x, codebook, metric)


def code_totals(x: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    """The two results of ``code_statistics`` in one buffer, so that a distributed step needs one all-reduce.

    Args:
        x, indices, num_codes: as in ``code_statistics``.

    Returns:
        [K·(1 + D)]: the K counts, then the K·D sums; float64 for float64 and float32 for others. Not differentiable.

    Example:
        >>> code_totals(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([2, 0, 2]), num_codes=3)
        tensor([1., 0., 2., 2., 0., 5.])
    """
    return _code_totals(x, indices, num_codes)


def code_statistics(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How many vectors each code received, and their sum: what k-means and moving-average codebooks need.

    One counting sort by code, then sums in a fixed order: bitwise repeatable, and balanced over threads even if
    one code received everything. O(N·D + K·D) time, O(N + K) memory and at most some 40 MB beside the result.

    Args:
        x: [..., D]; float32, float64, bfloat16 or float16.
        indices: int64 [...], the leading shape of ``x``, each in [−1, num_codes); vectors of index −1 are left out.
            Codebooks of several heads: add h·K to the indices of head h and pass H·K codes.
        num_codes: K.

    Returns:
        (counts, sums): counts [K] and sums [K, D], float64 for float64 and float32 for all others; views of one
        buffer, ``code_totals``. Not differentiable.

    Raises:
        RuntimeError: dtypes, devices or shapes do not fit, or an index is out of range. On CUDA, where reading an
            index would wait for the device, a bad index stops the device with a message, as in torch's indexing.

    Example:
        >>> code_statistics(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([2, 0, 2]), num_codes=3)
        (tensor([1., 0., 2.]), tensor([[2.],
                [0.],
                [5.]]))
    """
    totals = _code_totals(x, indices, num_codes)
    return totals[:num_codes], totals[num_codes:].view(num_codes, x.shape[-1])


@torch.no_grad()
def update_codebook_(
    codebook: Tensor,
    usage: Tensor,
    sums: Tensor | None,
    counts: Tensor,
    batch_sums: Tensor | None,
    *,
    decay: float,
    eps: float = 0.0,
    code_weight: Tensor | None = None,
    candidates: Tensor | None = None,
    revive_below: float = 0.0,
    normalize: bool = False,
) -> None:
    """One training step of a codebook that learns by moving averages, in place and in one pass.

    With N = Σ counts and r = (1 − decay) · code_weight, for every code

        usage ← usage + r (counts · K / N − usage)
        sums ← sums + r (batch_sums · K / N − sums)
        code ← sums / smoothed,   smoothed = (usage + eps) · U / (U + K · eps),   U = Σ usage

    Usage counts hits in units of the mean hits of a code, so 1 is average whatever the batch size. A code whose usage
    has sunk to 1e-12 stays where it is. Then a code with ``usage < revive_below`` moves onto its candidate and starts
    again with a usage of 1. A batch without a hit changes nothing. Nothing waits for the device.

    Args:
        codebook: [K, D], or [H, K, D], where each head is updated on its own; contiguous. Any supported dtype; all
            other arguments but ``candidates`` are float32, or float64 if the codebook is.
        usage: [K] or [H, K], contiguous.
        sums: like ``codebook``, contiguous; None, with ``batch_sums``, if the codebook learns by gradient: then only
            usage is averaged and dead codes revived.
        counts, batch_sums: totals of the batch, as ``code_statistics`` returns them (or their sum over ranks).
        decay: of the averages, 0 to 1.
        eps: Laplace smoothing of the usage, in units of the mean hits.
        code_weight: [K] or [H, K]; rate of each code as a multiple of 1 − decay; 0 freezes a code.
        candidates: like ``codebook``, what a dead code turns into: usually random vectors of the batch. One with a NaN
            is no candidate. None: nothing is revived.
        revive_below: usage below which a code is dead.
        normalize: scale codes to length 1, for cosine codebooks.

    Raises:
        RuntimeError: dtypes, devices or shapes do not fit, or what is written is not contiguous.

    Source: van den Oord et al. 2017, appendix A.1; smoothing: Razavi et al. 2019; revival: Dhariwal et al. 2020.

    Example:
        >>> codebook, usage = torch.tensor([[0.0], [9.0]]), torch.ones(2)
        >>> sums = codebook.clone()
        >>> counts, batch_sums = code_statistics(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 0]), num_codes=2)
        >>> update_codebook_(codebook, usage, sums, counts, batch_sums, decay=0.5)
        >>> codebook.flatten(), usage
        (tensor([1., 9.]), tensor([1.5000, 0.5000]))
    """
    _update_codebook_(
        codebook, usage, sums, counts, batch_sums, code_weight, candidates, decay, eps, revive_below, normalize
    )


# ---- shapes without data ---------------------------------------------------------------------------------------------


@torch.library.register_fake("isthmus::vq_assign")
def _(x, codebook, mask, metric, topk):
    shape = (*x.shape[:-1], topk) if topk > 1 else x.shape[:-1]
    return x.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("isthmus::vq_match")
def _(x, codebook, metric):
    return tuple(t.new_empty(t.shape[:-1], dtype=torch.int64) for t in (x, codebook))


@torch.library.register_fake("isthmus::vq_quantize")
def _(x, codebook, mask, metric, gradient, commitment_weight):
    indices = x.new_empty(x.shape[:-1], dtype=torch.int64)
    return x.new_empty(x.shape), indices, x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x))


@torch.library.register_fake("isthmus::vq_gather")
def _(x, codebook, indices, gradient, commitment_weight):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x))


@torch.library.register_fake("isthmus::vq_quantize_backward")
def _(grad_quantized, grad_error, x, codebook, indices, gradient, commitment_weight, need_x, need_codebook):
    return x.new_empty(x.shape if need_x else 0), x.new_empty(codebook.shape if need_codebook else 0)


@torch.library.register_fake("isthmus::code_totals")
def _(x, indices, num_codes):
    return x.new_empty(num_codes * (1 + x.shape[-1]), dtype=accumulate_dtype(x))


@torch.library.register_fake("isthmus::update_codebook_")
def _(codebook, usage, sums, counts, batch_sums, code_weight, candidates, decay, eps, revive_below, normalize):
    return None


# ---- gradients -------------------------------------------------------------------------------------------------------

_vq_quantize_backward = eager("vq_quantize_backward")


def _backward(ctx, grad_quantized, grad_error):
    need_x, need_codebook = ctx.needs_input_grad[:2]
    grads = _vq_quantize_backward(grad_quantized, grad_error, *ctx.saved_tensors, *ctx.options, need_x, need_codebook)
    return none_if_absent(grads[0], need_x), none_if_absent(grads[1], need_codebook)


def _quantize_setup(ctx, inputs, output):
    x, codebook, _, _, *ctx.options = inputs
    ctx.save_for_backward(x, codebook, output[1])


def _quantize_backward(ctx, grad_quantized, _, grad_error):
    return *_backward(ctx, grad_quantized, grad_error), None, None, None, None


def _gather_setup(ctx, inputs, output):
    x, codebook, indices, *ctx.options = inputs
    ctx.save_for_backward(x, codebook, indices)


def _gather_backward(ctx, grad_quantized, grad_error):
    return *_backward(ctx, grad_quantized, grad_error), None, None, None


def _totals_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output)


def _totals_backward(ctx, grad):
    return None, None, None


def _quantize_gradients(
    grad_quantized, grad_error, x, codebook, indices, gradient, commitment_weight, need_x, need_codebook
):
    def quantize(x, codebook):
        quantized, _, error = reference.vq_quantize(
            x, codebook, gradient=gradient, commitment_weight=commitment_weight, indices=indices
        )
        return quantized, error

    to_x, to_codebook = gradient_of(quantize, (x, codebook), (grad_quantized, grad_error))
    return to_x if need_x else None, to_codebook if need_codebook else None


_vq_assign = eager("vq_assign")
_vq_match = eager("vq_match")
_vq_quantize = register_gradient("vq_quantize", _quantize_backward, _quantize_setup)
_vq_gather = register_gradient("vq_gather", _gather_backward, _gather_setup)
_code_totals = register_gradient("code_totals", _totals_backward, _totals_setup)
_update_codebook_ = eager("update_codebook_")
register_in_place("update_codebook_", written=3)
register_second_order("vq_quantize_backward", _quantize_gradients)

for _name in ("vq_assign", "vq_match", "vq_quantize", "vq_gather"):
    register_autocast(_name)
for _name in ("vq_assign", "vq_match", "vq_quantize", "vq_gather", "vq_quantize_backward", "code_totals"):
    register_vmap_by_loop(_name)
