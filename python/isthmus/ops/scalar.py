"""Quantizers without a codebook table: finite scalars, signs, scalar codebooks, sampled bits; indices in few bits."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from isthmus import reference
from isthmus.ops._arguments import accumulate_dtype, check_choice, gradients_like, key_for, like, row_values
from isthmus.ops._code_entropy import temperature_of
from isthmus.ops._register import (
    eager,
    gradient_of,
    none_if_absent,
    register_autocast,
    register_gradient,
    register_second_order,
    register_vmap_by_loop,
)
from isthmus.reference.scalar import logistic_noise

_ops = torch.ops.isthmus


# ---- finite scalars --------------------------------------------------------------------------------------------------


def fsq_quantize(
    x: Tensor,
    levels: Sequence[int],
    *,
    symmetric: bool = False,
    hard_clamp: bool = False,
    noise_dropout: float = 0.0,
    mask: Tensor | None = None,
    key: Tensor | None = None,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Finite scalar quantization: bound each number, round it to one of L levels, and number the combinations
    (Mentzer et al. 2023, arXiv 2309.15505), in one pass each way and without a table of codes.

    With s = tanh and o = 1/2 for even L, else 0: u = half · s(x + shift) - o, digit = round(u) + ⌊L/2⌋ and value =
    round(u) / ⌊L/2⌋, where shift lets x = 0 give value 0. half is (L - 1)/2 and a little, so that the outermost levels
    are reached; ``isthmus.reference.fsq_quantize`` has the formulas.

    Args:
        x: [..., D]; float32, float64, bfloat16 or float16.
        levels: D numbers of levels, 2 to 65536 each, with fewer than 2^63 codes in all.
        symmetric: levels spread evenly over [-1, 1] (Parker et al. 2024, arXiv 2411.19842): for even L no value is 0.
        hard_clamp: s clamps to [-1, 1] instead; its gradient is 1 inside and on the border, 0 outside.
        noise_dropout: with this probability a value is u plus uniform noise in ±1/2 instead of round(u), for the whole
            batch element by element; the index stays that of the rounded value.
        mask: bool [...]; rows that are False become zeros with index -1 and get no gradient.
        key: int64 [2], of the noise. Default: a fresh key drawn from ``generator``, or from torch's generator of the
            device, if there is dropout.
        generator: where a fresh key is drawn from.

    Returns:
        (quantized [..., D] in [-1, 1], dtype of ``x``; indices int64 [...]). The first dimension is the least
        significant digit. NaN: quantized is NaN there, its digit 0.

    Gradients:
        quantized to ``x``: that of u / ⌊L/2⌋, the rounding passed straight through; twice differentiable.

    Raises:
        ValueError: key and generator are both given.
        RuntimeError: ``levels`` does not fit ``x`` or int64, or one of them or ``noise_dropout`` is out of range.

    Example:
        >>> fsq_quantize(torch.tensor([[0.0, 9.0], [-9.0, 0.4]]), (8, 5))
        (tensor([[ 0.0000,  1.0000],
                [-1.0000,  0.5000]]), tensor([36, 24]))
    """
    drawn = key_for(x, key, generator) if noise_dropout > 0 else None
    return _fsq_quantize(x, tuple(levels), mask, drawn, symmetric, hard_clamp, noise_dropout)


def fsq_decode(
    indices: Tensor, levels: Sequence[int], *, symmetric: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values of the indices that ``fsq_quantize`` gives.

    Args:
        indices: int64 [...], in [0, product of levels); -1, a masked row, becomes zeros.
        levels, symmetric: as in ``fsq_quantize``.
        dtype: of the result.

    Returns:
        [..., D]: bit for bit the quantized values of that dtype.

    Raises:
        RuntimeError: an index is out of range (on CUDA the device stops), or ``levels`` as in ``fsq_quantize``.

    Example:
        >>> fsq_decode(torch.tensor([36, -1]), (8, 5))
        tensor([[0., 1.],
                [0., 0.]])
    """
    return _ops.fsq_decode(indices, tuple(levels), symmetric, False, 1.0, dtype)


# ---- signs -----------------------------------------------------------------------------------------------------------


def lfq_quantize(
    x: Tensor, *, scale: float = 1.0, spherical: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Lookup-free quantization: the sign of each number (Yu et al. 2023, arXiv 2310.05737), ±``scale``.

    ``spherical`` is binary spherical quantization (Zhao et al. 2024, arXiv 2406.07548): u = scale · x / |x| moves to
    the nearest corner ±scale/√n of the sphere. Otherwise u = x.

    Args:
        x: [..., n], n up to 62; float32, float64, bfloat16 or float16. A zero is negative.
        scale: above 0.
        spherical: normalise first. The squares of a row must not overflow or underflow; a zero row stays zero.
        mask: bool [...]; rows that are False become zeros with index -1 and error 0, and get no gradient.

    Returns:
        (quantized [..., n], dtype of ``x``; indices int64 [...], the first number the most significant bit;
        squared_error [...] = |u - quantized|², float64 for float64, else float32). NaN stays NaN, its bit 0.

    Gradients:
        quantized passes straight to u, squared_error gives 2 (u - quantized); twice differentiable.

    Raises:
        RuntimeError: a shape, a dtype or ``scale`` does not fit.

    Example:
        >>> lfq_quantize(torch.tensor([[0.5, -2.0, 0.0]]))
        (tensor([[ 1., -1., -1.]]), tensor([4]), tensor([2.2500]))
    """
    return _lfq_quantize(x, mask, scale, spherical)


def lfq_quantize_entropy(
    x: Tensor,
    *,
    scale: float = 1.0,
    spherical: bool = False,
    inverse_temperature: Tensor | float = 1.0,
    num_codebooks: int | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``lfq_quantize`` with the entropy of the soft assignment to all 2^n codes, in the same pass each way.

    The soft assignment is p(c | u) = softmax(-inverse_temperature · |u - c|²). |u - c|² is |u|² + |c|² - 2 Σ u_i c_i,
    and all corners have one |c|: p(c | u) is proportional to Π exp(2 · inverse_temperature · u_i c_i), a product of
    functions of one bit each. Normalised, it is Π σ(±a_i) with a_i = 4 · inverse_temperature · v · u_i and v the value
    of a positive bit. So bits are independent given u, and the entropy of a row is the sum of n entropies of single
    bits: exactly that over 2^n codes, at the price of n.

    The entropy of the batch's mean distribution does not factorise. ``bit_counts`` gives the factorised version,
    ``bit_entropy(bit_counts, rows)``, which is an upper bound as it ignores what bits tell of each other (BSQ uses it);
    ``lfq_code_counts`` gives the exact one.

    Args:
        x, scale, spherical: as in ``lfq_quantize``.
        inverse_temperature: above 0. A tensor of one number, without a gradient, is read where the kernel runs: under
            torch.compile or in a CUDA graph it may change from call to call.
        num_codebooks: None: x is [..., n] and every row counts alike. C: x is [..., C, n], the mask [...], and
            ``bit_counts`` is kept for each codebook.
        mask: as in ``lfq_quantize``; masked rows have entropy 0 and are not counted.

    Returns:
        (quantized, indices, squared_error, entropy [...] in nats, bit_counts [n] or [C, n] = Σ over rows of
        P(bit = 1)). The last three float64 for float64, else float32.

    Gradients:
        As ``lfq_quantize``, and from entropy and bit_counts to ``x``; twice differentiable.

    Raises:
        ValueError: ``inverse_temperature`` wants a gradient.
        RuntimeError: a shape, a dtype, ``scale`` or ``inverse_temperature`` does not fit. On CUDA a number that is not
            positive is not noticed.

    Example:
        >>> lfq_quantize_entropy(torch.zeros(4, 2))[3:]
        (tensor([1.3863, 1.3863, 1.3863, 1.3863]), tensor([2., 2.]))
    """
    temperature = temperature_of(x, inverse_temperature)
    return _lfq_quantize_entropy(x, mask, scale, spherical, temperature, num_codebooks or 0)


def lfq_decode(
    indices: Tensor, bits: int, *, scale: float = 1.0, spherical: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The corner of each index that ``lfq_quantize`` gives.

    Args:
        indices: int64 [...], in [0, 2^bits); -1, a masked row, becomes zeros.
        bits: n, up to 62.
        scale, spherical: as in ``lfq_quantize``.
        dtype: of the result.

    Returns:
        [..., n]: bit for bit the quantized values of that dtype.

    Raises:
        RuntimeError: an index is out of range (on CUDA the device stops).

    Example:
        >>> lfq_decode(torch.tensor([4, 1]), 3)
        tensor([[ 1., -1., -1.],
                [-1., -1.,  1.]])
    """
    value = scale / bits**0.5 if spherical else scale
    return _ops.fsq_decode(indices, (2,) * bits, True, True, value, dtype)


# ---- one scalar codebook a dimension ---------------------------------------------------------------------------------


def latent_quantize(
    x: Tensor,
    codebooks: Tensor,
    levels: Sequence[int] | None = None,
    *,
    commitment_weight: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest of its own few learnable values for each number (latent quantization, Hsu et al. 2023, arXiv
    2305.18378), in one pass each way.

    Args:
        x: [..., D]; float32, float64, bfloat16 or float16.
        codebooks: [D, L], same dtype; or with ``levels``, which may differ, their values one after the other.
        levels: D numbers of values, 2 to 65536 each, with fewer than 2^63 codes in all. Time is proportional to the
            largest. Default: (L,) · D.
        commitment_weight: of the gradient of ``squared_error`` to ``x``.
        mask: bool [...]; rows that are False become zeros with index -1 and error 0, and get and give no gradient.

    Returns:
        (quantized [..., D], dtype of ``x``; indices int64 [...], the first dimension the least significant digit;
        squared_error [...] = Σ (x - v)², float64 for float64, else float32). Of equally near values the first; NaN
        stays NaN, its digit 0.

    Gradients:
        quantized passes straight to ``x``. squared_error gives -2 (x - v) to the values that were chosen, summed in a
        fixed order, and commitment_weight · 2 (x - v) to ``x``: quantization and commitment loss in one.

    Raises:
        RuntimeError: shapes, dtypes or ``levels`` do not fit.

    Example:
        >>> latent_quantize(torch.tensor([[0.1, 0.9]]), torch.tensor([[0.0, 1.0], [-1.0, 1.0]]))
        (tensor([[0., 1.]]), tensor([2]), tensor([0.0200]))
    """
    return _latent_quantize(x, codebooks, _levels_of(codebooks, levels), mask, commitment_weight)


def latent_decode(indices: Tensor, codebooks: Tensor, levels: Sequence[int] | None = None) -> Tensor:
    """The values of the indices that ``latent_quantize`` gives, differentiable with respect to ``codebooks``.

    Args:
        indices: int64 [...], in [0, product of levels); -1, a masked row, becomes zeros.
        codebooks, levels: as in ``latent_quantize``.

    Returns:
        [..., D], dtype of ``codebooks``.

    Raises:
        RuntimeError: an index is out of range (on CUDA the device stops), or shapes do not fit.

    Example:
        >>> latent_decode(torch.tensor([2]), torch.tensor([[0.0, 1.0], [-1.0, 1.0]]))
        tensor([[0., 1.]])
    """
    return _latent_decode(indices, codebooks, _levels_of(codebooks, levels))


def _levels_of(codebooks: Tensor, levels: Sequence[int] | None) -> tuple[int, ...]:
    if levels is not None:
        return tuple(levels)
    if codebooks.dim() != 2:
        raise ValueError(f"codebooks has shape {list(codebooks.shape)}; expected [D, L], or levels beside it")
    return (codebooks.shape[1],) * codebooks.shape[0]


# ---- sampled bits ----------------------------------------------------------------------------------------------------


def binary_map(
    logits: Tensor,
    *,
    gradient: str = "mean",
    temperature: float = 1.0,
    deterministic: bool = False,
    key: Tensor | None = None,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample independent bits from their logits and number the combinations, as the binary mapper of the Free
    Transformer does (Fleuret 2025, arXiv 2510.17558). Noise is never stored.

    b_i = [logit_i + noise_i > 0] with logistic noise, so P(b_i = 1) = σ(logit_i).

    Args:
        logits: [..., n], n up to 62; float32, float64, bfloat16 or float16.
        gradient: "mean": that of the bits' mean σ(logit), straight through the draw. "gumbel": that of the relaxed bits
            σ((logit + noise) / temperature), whose noise is drawn again. (Fleuret's own estimator is the gradient of
            the probabilities of all 2^n one-hot outputs, in rows × 2^n memory; where the bits go through a linear layer
            first, "mean" is the same.)
        temperature: of "gumbel", above 0.
        deterministic: the likelier bit instead of a sample; a zero logit gives 0.
        key: int64 [2]. Default: a fresh key drawn from ``generator``, or from torch's generator of the device.
        generator: where a fresh key is drawn from.

    Returns:
        (bits [..., n] of 0 and 1, dtype of ``logits``; indices int64 [...], the first bit the most significant; entropy
        [...] of the bits' distribution in nats, float64 for float64, else float32). n · log 2 - entropy is the
        divergence from fair coins.

    Gradients:
        From bits and entropy to ``logits``; twice differentiable.

    Raises:
        ValueError: ``gradient`` is none of its choices, or key and generator are both given.
        RuntimeError: a shape, a dtype or ``temperature`` does not fit.

    Example:
        >>> binary_map(torch.tensor([[2.0, -1.0, 0.0]]), deterministic=True)[:2]
        (tensor([[1., 0., 0.]]), tensor([4]))
    """
    check_choice("gradient", gradient, ("mean", "gumbel"))
    drawn = None if deterministic else key_for(logits, key, generator)
    return _binary_map(logits, drawn, gradient, temperature)


# ---- storage ---------------------------------------------------------------------------------------------------------


def pack_indices(indices: Tensor, num_codes: int | None = None, *, bits: int | None = None) -> Tensor:
    """Indices in less memory: in the smallest integer type, or in a stream of so many bits each.

    Args:
        indices: int64 [..., T], none negative.
        num_codes: indices are below this; the result is uint8 up to 2^8, int16 up to 2^15, int32 up to 2^31, else
            int64.
        bits: 1 to 63; indices are below 2^bits, for K codes (K - 1).bit_length(). The result is a stream of bytes:
            index i of a row occupies bits i · bits to (i + 1) · bits - 1, lowest first, and bit j of a row is bit j % 8
            of byte j // 8. A row ends with its last byte.

    Returns:
        [..., T] of the integer type, or uint8 [..., ⌈T · bits / 8⌉].

    Raises:
        ValueError: not exactly one of ``num_codes`` and ``bits`` is given.
        RuntimeError: an index is out of range (on CUDA the device stops).

    Example:
        >>> pack_indices(torch.tensor([1, 2, 3]), bits=3)
        tensor([209,   0], dtype=torch.uint8)
    """
    if (num_codes is None) == (bits is None):
        raise ValueError(f"num_codes is {num_codes} and bits is {bits}; expected exactly one of them")
    return _ops.narrow_indices(indices, num_codes) if bits is None else _ops.pack_bits(indices, bits)


def unpack_indices(packed: Tensor, *, bits: int | None = None, length: int | None = None) -> Tensor:
    """The int64 indices that ``pack_indices`` packed.

    Args:
        packed: what it returned.
        bits: as given there; None if ``num_codes`` was.
        length: number T of indices in a row, for a stream of bits.

    Returns:
        int64 [..., T].

    Raises:
        ValueError: ``bits`` without ``length``, or the other way round.
        RuntimeError: ``packed`` is no stream of so many bits.

    Example:
        >>> unpack_indices(torch.tensor([209, 0], dtype=torch.uint8), bits=3, length=3)
        tensor([1, 2, 3])
    """
    if (bits is None) != (length is None):
        raise ValueError(f"bits is {bits} and length is {length}; expected both or neither")
    return packed.long() if bits is None else _ops.unpack_bits(packed, bits, length)


# ---- shapes without data ---------------------------------------------------------------------------------------------


def _row_indices(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


@torch.library.register_fake("isthmus::fsq_quantize")
def _(x, levels, mask, key, symmetric, hard_clamp, noise_dropout):
    return like(x), _row_indices(x)


@torch.library.register_fake("isthmus::fsq_quantize_backward")
def _(grad, x, levels, mask, symmetric, hard_clamp):
    return like(x)


@torch.library.register_fake("isthmus::fsq_decode")
def _(indices, levels, symmetric, first_highest, scale, dtype):
    return indices.new_empty((*indices.shape, len(levels)), dtype=dtype)


@torch.library.register_fake("isthmus::lfq_quantize")
def _(x, mask, scale, spherical):
    return like(x), _row_indices(x), row_values(x)


@torch.library.register_fake("isthmus::lfq_quantize_backward")
def _(grad_quantized, grad_error, x, mask, scale, spherical):
    return like(x)


@torch.library.register_fake("isthmus::lfq_quantize_entropy")
def _(x, mask, scale, spherical, inverse_temperature, codebooks):
    counts = x.new_empty(x.shape[-1:] if codebooks == 0 else x.shape[-2:], dtype=accumulate_dtype(x))
    return like(x), _row_indices(x), row_values(x), row_values(x), counts


@torch.library.register_fake("isthmus::lfq_quantize_entropy_backward")
def _(grad_quantized, grad_error, grad_entropy, grad_counts, x, mask, scale, spherical, inverse_temperature, codebooks):
    return like(x)


@torch.library.register_fake("isthmus::latent_quantize")
def _(x, codebooks, levels, mask, commitment_weight):
    return like(x), _row_indices(x), row_values(x)


@torch.library.register_fake("isthmus::latent_quantize_backward")
def _(grad_quantized, grad_error, x, codebooks, levels, mask, commitment_weight, need_codebooks):
    return gradients_like((x, True), (codebooks, need_codebooks))


@torch.library.register_fake("isthmus::latent_decode")
def _(indices, codebooks, levels):
    return codebooks.new_empty((*indices.shape, len(levels)))


@torch.library.register_fake("isthmus::latent_decode_backward")
def _(grad, indices, levels):
    return grad.new_empty(sum(levels))


@torch.library.register_fake("isthmus::binary_map")
def _(logits, key, gradient, temperature):
    return like(logits), _row_indices(logits), row_values(logits)


@torch.library.register_fake("isthmus::binary_map_backward")
def _(grad_bits, grad_entropy, logits, key, gradient, temperature):
    return like(logits)


@torch.library.register_fake("isthmus::pack_bits")
def _(indices, bits):
    return indices.new_empty((*indices.shape[:-1], (indices.shape[-1] * bits + 7) // 8), dtype=torch.uint8)


@torch.library.register_fake("isthmus::unpack_bits")
def _(packed, bits, length):
    return packed.new_empty((*packed.shape[:-1], length), dtype=torch.int64)


@torch.library.register_fake("isthmus::narrow_indices")
def _(indices, num_codes):
    sizes = (torch.uint8, 1 << 8), (torch.int16, 1 << 15), (torch.int32, 1 << 31), (torch.int64, num_codes)
    return indices.new_empty(indices.shape, dtype=next(dtype for dtype, top in sizes if num_codes <= top))


# ---- gradients -------------------------------------------------------------------------------------------------------

_fsq_quantize_backward = eager("fsq_quantize_backward")
_lfq_quantize_backward = eager("lfq_quantize_backward")
_lfq_quantize_entropy_backward = eager("lfq_quantize_entropy_backward")
_latent_quantize_backward = eager("latent_quantize_backward")
_latent_decode_backward = eager("latent_decode_backward")
_binary_map_backward = eager("binary_map_backward")


def _fsq_setup(ctx, inputs, output):
    x, ctx.levels, mask, _, ctx.symmetric, ctx.hard_clamp, _ = inputs
    ctx.save_for_backward(x, mask)
    ctx.mark_non_differentiable(output[1])


def _fsq_backward(ctx, grad, _):
    x, mask = ctx.saved_tensors
    return _fsq_quantize_backward(grad, x, ctx.levels, mask, ctx.symmetric, ctx.hard_clamp), *[None] * 6


def _lfq_setup(ctx, inputs, output):
    x, mask, *ctx.options = inputs
    ctx.save_for_backward(x, mask)
    ctx.mark_non_differentiable(output[1])


def _lfq_backward(ctx, grad_quantized, _, grad_error):
    return _lfq_quantize_backward(grad_quantized, grad_error, *ctx.saved_tensors, *ctx.options), *[None] * 3


def _lfq_entropy_setup(ctx, inputs, output):
    x, mask, ctx.scale, ctx.spherical, temperature, ctx.codebooks = inputs
    ctx.save_for_backward(x, mask, temperature)
    ctx.mark_non_differentiable(output[1])


def _lfq_entropy_backward(ctx, grad_quantized, _, *grads):
    x, mask, temperature = ctx.saved_tensors
    options = ctx.scale, ctx.spherical, temperature, ctx.codebooks
    return _lfq_quantize_entropy_backward(grad_quantized, *grads, x, mask, *options), *[None] * 5


def _latent_setup(ctx, inputs, output):
    x, codebooks, ctx.levels, mask, ctx.commitment_weight = inputs
    ctx.save_for_backward(x, codebooks, mask)
    ctx.mark_non_differentiable(output[1])


def _latent_backward(ctx, grad_quantized, _, grad_error):
    x, codebooks, mask = ctx.saved_tensors
    wanted = ctx.needs_input_grad[1]
    arguments = grad_quantized, grad_error, x, codebooks, ctx.levels, mask, ctx.commitment_weight, wanted
    grad_x, grad_codebooks = _latent_quantize_backward(*arguments)
    return grad_x, none_if_absent(grad_codebooks, wanted), None, None, None


def _latent_decode_setup(ctx, inputs, output):
    indices, codebooks, ctx.levels = inputs
    ctx.shape = codebooks.shape
    ctx.save_for_backward(indices)


def _latent_decode_gradient(ctx, grad):
    return None, _latent_decode_backward(grad, *ctx.saved_tensors, ctx.levels).reshape(ctx.shape), None


def _binary_setup(ctx, inputs, output):
    logits, key, *ctx.options = inputs
    ctx.save_for_backward(logits, key)
    ctx.mark_non_differentiable(output[1])


def _binary_backward(ctx, grad_bits, _, grad_entropy):
    return _binary_map_backward(grad_bits, grad_entropy, *ctx.saved_tensors, *ctx.options), None, None, None


_fsq_quantize = register_gradient("fsq_quantize", _fsq_backward, _fsq_setup)
_lfq_quantize = register_gradient("lfq_quantize", _lfq_backward, _lfq_setup)
_lfq_quantize_entropy = register_gradient("lfq_quantize_entropy", _lfq_entropy_backward, _lfq_entropy_setup)
_latent_quantize = register_gradient("latent_quantize", _latent_backward, _latent_setup)
_latent_decode = register_gradient("latent_decode", _latent_decode_gradient, _latent_decode_setup)
_binary_map = register_gradient("binary_map", _binary_backward, _binary_setup)


def _fsq_gradients(grad, x, levels, mask, symmetric, hard_clamp):
    def quantized(x):
        return reference.fsq_quantize(x, levels, symmetric=symmetric, hard_clamp=hard_clamp, mask=mask)[0]

    return gradient_of(quantized, (x,), grad)


def _lfq_gradients(grad_quantized, grad_error, x, mask, scale, spherical):
    def outputs(x):
        quantized, _, error = reference.lfq_quantize(x, scale=scale, spherical=spherical, mask=mask)
        return quantized, error

    return gradient_of(outputs, (x,), (grad_quantized, grad_error))


def _lfq_entropy_gradients(grad_quantized, grad_error, grad_entropy, grad_counts, x, mask, *options):
    scale, spherical, inverse_temperature, codebooks = options

    def outputs(x):
        quantized, _, *others = reference.lfq_quantize_entropy(
            x,
            scale=scale,
            spherical=spherical,
            inverse_temperature=inverse_temperature,
            num_codebooks=codebooks or None,
            mask=mask,
        )
        return quantized, *others

    return gradient_of(outputs, (x,), (grad_quantized, grad_error, grad_entropy, grad_counts))


def _latent_gradients(grad_quantized, grad_error, x, codebooks, levels, mask, commitment_weight, need_codebooks):
    def outputs(x, codebooks):
        quantized, _, error = reference.latent_quantize(
            x, codebooks, levels, commitment_weight=commitment_weight, mask=mask
        )
        return quantized, error

    grad_x, grad_codebooks = gradient_of(outputs, (x, codebooks), (grad_quantized, grad_error))
    return [grad_x, grad_codebooks if need_codebooks else None]


def _latent_decode_gradients(grad, indices, levels):
    codebooks = grad.new_zeros(sum(levels)).requires_grad_()
    return gradient_of(lambda codebooks: reference.latent_decode(indices, codebooks, levels), (codebooks,), grad)


def _binary_gradients(grad_bits, grad_entropy, logits, key, gradient, temperature):
    noise = None if key is None else logistic_noise(key, logits.shape, accumulate_dtype(logits))

    def outputs(logits):
        bits, _, entropy = reference.binary_map(logits, gradient=gradient, temperature=temperature, noise=noise)
        return bits, entropy

    return gradient_of(outputs, (logits,), (grad_bits, grad_entropy))


register_second_order("fsq_quantize_backward", _fsq_gradients)
register_second_order("lfq_quantize_backward", _lfq_gradients)
register_second_order("lfq_quantize_entropy_backward", _lfq_entropy_gradients)
register_second_order("latent_quantize_backward", _latent_gradients)
register_second_order("latent_decode_backward", _latent_decode_gradients)
register_second_order("binary_map_backward", _binary_gradients)

for _name in ("fsq_quantize", "lfq_quantize", "lfq_quantize_entropy", "latent_quantize", "latent_decode", "binary_map"):
    register_autocast(_name)
    register_vmap_by_loop(_name)
    register_vmap_by_loop(f"{_name}_backward")
for _name in ("fsq_decode", "pack_bits", "unpack_bits", "narrow_indices"):
    register_vmap_by_loop(_name)
