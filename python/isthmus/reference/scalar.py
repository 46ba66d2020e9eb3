"""Quantizers without a codebook table: finite scalars, signs, scalar codebooks of one dimension each, sampled bits."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from isthmus.random import philox4x32
from isthmus.reference._numeric import widen
from isthmus.reference.gaussian import _uniform32, _uniform64

__all__ = [
    "binary_map",
    "fsq_decode",
    "fsq_quantize",
    "latent_decode",
    "latent_quantize",
    "lfq_code_counts",
    "lfq_decode",
    "lfq_quantize",
    "lfq_quantize_entropy",
    "logistic_noise",
    "pack_indices",
    "residual_fsq_quantize",
    "uniform_noise",
    "unpack_indices",
]


# ---- noise -----------------------------------------------------------------------------------------------------------


def uniform_noise(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform noise in (0, 1] of a key: the u(w) of the Gaussian stream (docs/numerics.md), one word an element.

    float32: element i is of word i % 4 of block i // 4; float64: of words 2 (i % 2) and 2 (i % 2) + 1 of block i // 2.

    Example:
        >>> uniform_noise(torch.tensor([0, 0]), [2])
        tensor([0.3990, 0.8805])
    """
    numel = math.prod(shape)
    blocks = torch.arange(-(-numel // (2 if dtype == torch.float64 else 4)), device=key.device)
    w0, w1, w2, w3 = philox4x32(key[0], key[1] + blocks)
    if dtype == torch.float64:
        uniforms = torch.stack([_uniform64(w0, w1), _uniform64(w2, w3)], dim=-1)
    else:
        uniforms = torch.stack([_uniform32(w) for w in (w0, w1, w2, w3)], dim=-1)
    return uniforms.flatten()[:numel].reshape(tuple(shape)).to(dtype)


def logistic_noise(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard logistic noise log(v) - log(1 - v), v = min(u, 1 - 2^-24) (float64: 1 - 2^-53) of ``uniform_noise``.

    Example:
        >>> logistic_noise(torch.tensor([0, 0]), [2])
        tensor([-0.4094,  1.9974])
    """
    uniforms = uniform_noise(key, shape, dtype)
    v = uniforms.clamp(max=1 - torch.finfo(uniforms.dtype).eps / 2).double()
    return (v.log() - torch.log1p(-v)).to(dtype)


# ---- what they share -------------------------------------------------------------------------------------------------


def _straight_through(value: Tensor, through: Tensor) -> Tensor:
    """``value``, with the gradient of ``through``."""
    return value.detach() + torch.where(through.isfinite(), through - through.detach(), 0.0)


def _strides(levels: Sequence[int]) -> list[int]:
    return [math.prod(levels[:d]) for d in range(len(levels))]


def _ravel(digits: Tensor, levels: Sequence[int]) -> Tensor:
    """Mixed radix, the first digit the least significant."""
    return (digits * torch.tensor(_strides(levels), device=digits.device)).sum(-1)


def _unravel(indices: Tensor, levels: Sequence[int]) -> Tensor:
    device = indices.device
    strides, radices = torch.tensor(_strides(levels), device=device), torch.tensor(tuple(levels), device=device)
    return indices.clamp(min=0).unsqueeze(-1) // strides % radices


def _pack_bits(bits: Tensor) -> Tensor:
    """The index whose binary digits are the entries of the last dimension, the first the most significant."""
    return _ravel(bits.long().flip(-1), [2] * bits.shape[-1])


def _unpack_bits(indices: Tensor, bits: int) -> Tensor:
    return _unravel(indices, [2] * bits).flip(-1)


def _keep(mask: Tensor | None, t: Tensor, otherwise: float = 0.0) -> Tensor:
    """``t``, and ``otherwise`` in the rows that a mask excludes."""
    if mask is None:
        return t
    return torch.where(mask.reshape(*mask.shape, *[1] * (t.dim() - mask.dim())), t, otherwise)


# ---- finite scalars --------------------------------------------------------------------------------------------------


def fsq_quantize(
    x: Tensor,
    levels: Sequence[int],
    *,
    symmetric: bool = False,
    hard_clamp: bool = False,
    noise_dropout: float = 0.0,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Round each of D numbers to one of its L_d levels (Mentzer et al. 2023, arXiv 2309.15505).

    With s = tanh, or a clamp to [-1, 1], o = 1/2 for even L and else 0::

        u = half · s(x + shift) - o,     half = (L - 1)/2 · (1 + e),  e = min(10^-3, 1 / (4 (L - 1)))
        digit = round(u) + ⌊L/2⌋,  value = round(u) / ⌊L/2⌋,     s(shift) = o / half, so that x = 0 is value 0

    ``symmetric``: half = (L - 1)/2, shift = 0, value = (round(u) + o) / half: levels spread evenly over [-1, 1]. Halves
    round to even; e lets the outermost levels be reached, and is small enough that nothing rounds beyond them.

    ``noise_dropout``: where the uniform ``noise`` is at most this probability p, u + noise / p - 1/2 replaces round(u)
    in ``value``; the index is that of the rounded one. The gradient is that of u. A NaN counts as digit 0.

    Example:
        >>> fsq_quantize(torch.tensor([[0.0, 9.0], [-9.0, 0.4]]), (8, 5))
        (tensor([[ 0.0000,  1.0000],
                [-1.0000,  0.5000]]), tensor([36, 24]))
    """
    wide = widen(x)
    radices = torch.tensor(tuple(levels), dtype=wide.dtype, device=x.device)
    offset = torch.where(radices % 2 == 0, 0.5, 0.0).to(wide.dtype)
    middle = radices.div(2, rounding_mode="floor")
    half = (radices - 1) / 2
    shift, centre, width = torch.zeros_like(half), offset, half
    if not symmetric:
        half = half * (1 + (0.25 / (radices - 1)).clamp(max=1e-3))
        shift, centre, width = offset / half, torch.zeros_like(half), middle
        shift = shift if hard_clamp else shift.atanh()
    squashed = (wide + shift).clamp(-1, 1) if hard_clamp else (wide + shift).tanh()
    u = half * squashed - offset
    rounded = u.round()
    value = rounded
    if noise is not None:
        noise = widen(noise)
        value = torch.where(noise <= noise_dropout, u + (noise / noise_dropout - 0.5), rounded)
    quantized = _straight_through((value + centre) / width, u / width)
    indices = _ravel((rounded + middle).nan_to_num(0.0).long(), levels)
    return _keep(mask, quantized).to(x.dtype), _keep(mask, indices, -1)


def fsq_decode(
    indices: Tensor, levels: Sequence[int], *, symmetric: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values that ``fsq_quantize`` gives the index: int64 [...] to [..., D]. Index -1: zeros.

    Example:
        >>> fsq_decode(torch.tensor([36, -1]), (8, 5))
        tensor([[0., 1.],
                [0., 0.]])
    """
    radices = torch.tensor(tuple(levels), device=indices.device)
    digits = _unravel(indices, levels)
    values = (2 * digits - (radices - 1)) / (radices - 1) if symmetric else (digits - radices // 2) / (radices // 2)
    return _keep(indices >= 0, values).to(dtype)


def residual_fsq_quantize(
    x: Tensor,
    levels: Sequence[int],
    num_quantizers: int,
    *,
    hard_clamp: bool = False,
    stages: Tensor | int | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Round each number to one of L levels, and what that leaves over to one of L finer ones, and so on::

        r_0 = b · s(x / b),  b = L / (L - 1);   v_q = the nearest to r_q of L levels spread evenly over [-1, 1]
        r_{q+1} = L · (r_q - v_q);   quantized = Σ_q v_q · L^-q

    A row takes part in its first ``stages`` stages, none where ``mask`` is False; its other indices are -1. Halves
    round to the even distance from the middle. The gradient is that of r_0.

    Example:
        >>> residual_fsq_quantize(torch.tensor([[0.0, 0.5]]), (3, 5), 3, hard_clamp=True)
        (tensor([[0.0000, 0.5000]]), tensor([[10,  7,  7]]))
    """
    wide = widen(x)
    radices = torch.tensor(tuple(levels), dtype=wide.dtype, device=x.device)
    bound, half = radices / (radices - 1), (radices - 1) / 2
    middle = radices.div(2, rounding_mode="floor")
    offset = middle - half
    bounded = wide.clamp(-bound, bound) if hard_clamp else bound * (wide / bound).tanh()
    live = torch.ones(x.shape[:-1], dtype=torch.int64, device=x.device) * (num_quantizers if stages is None else stages)
    live = live if mask is None else live * mask
    left, total, indices = bounded.detach(), torch.zeros_like(wide), []
    for q in range(num_quantizers):
        digit = ((half * left - offset).round() + middle).clamp(0 * radices, radices - 1)
        value = digit / half - 1
        kept = live > q
        total = total + torch.where(kept.unsqueeze(-1), value * radices**-q, 0.0)
        indices.append(torch.where(kept, _ravel(digit.nan_to_num(0.0).long(), levels), -1))
        left = radices * (left - value)
    quantized = torch.where((live > 0).unsqueeze(-1), _straight_through(total, bounded), 0.0)
    return quantized.to(x.dtype), torch.stack(indices, dim=-1)


# ---- signs -----------------------------------------------------------------------------------------------------------


def _on_sphere(x: Tensor, scale: float) -> Tensor:
    """``x`` at norm ``scale``; a zero vector stays zero, with a zero gradient."""
    squares = x.square().sum(-1, keepdim=True)
    return torch.where(squares > 0, x * (scale * torch.where(squares > 0, squares, 1.0).rsqrt()), 0.0)


def _bit_value(bits: int, scale: float, spherical: bool) -> float:
    return scale / math.sqrt(bits) if spherical else scale


def lfq_quantize(
    x: Tensor, *, scale: float = 1.0, spherical: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Signs: each number becomes ±``scale`` (Yu et al. 2023, arXiv 2310.05737), a zero the negative one.

    ``spherical`` first moves each row onto the sphere of radius ``scale``, u = scale · x / |x|, whose nearest corners
    are ±scale/√n (Zhao et al. 2024, arXiv 2406.07548).

    Returns:
        (quantized [..., n], index [...], squared_error [...] = |u - quantized|²). The first number is the most
        significant bit. The gradient of quantized passes straight to u.

    Example:
        >>> lfq_quantize(torch.tensor([[0.5, -2.0, 0.0]]))
        (tensor([[ 1., -1., -1.]]), tensor([4]), tensor([2.2500]))
    """
    wide = widen(x)
    u = _on_sphere(wide, scale) if spherical else wide
    bits, value = u > 0, _bit_value(x.shape[-1], scale, spherical)
    corner = torch.where(u.isnan(), u, value * torch.where(bits, 1.0, -1.0).to(u.dtype)).detach()
    error = (u - corner).square().sum(-1)
    quantized = _straight_through(corner, u).to(x.dtype)
    return _keep(mask, quantized), _keep(mask, _pack_bits(bits), -1), _keep(mask, error)


def lfq_quantize_entropy(
    x: Tensor,
    *,
    scale: float = 1.0,
    spherical: bool = False,
    inverse_temperature: Tensor | float = 1.0,
    num_codebooks: int | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``lfq_quantize`` and the soft assignment softmax(-inverse_temperature · |u - c|²) over all 2^n codes c.

    As |u - c|² = |u|² + |c|² - 2 Σ u_i c_i and |c| is the same for all codes, the softmax is a product over bits::

        p(c) = Π_i σ(±a_i),   a_i = 4 · inverse_temperature · v · u_i,   v the value of a positive bit

    so bits are independent, and the entropy of a row is the sum of theirs, exactly.

    Returns:
        (quantized, index, squared_error, entropy [...] in nats, bit_counts [n]): bit_counts = Σ over rows of σ(a). With
        ``num_codebooks`` C, x is [..., C, n], the mask [...] and bit_counts [C, n].

    Example:
        >>> lfq_quantize_entropy(torch.zeros(4, 2))[3:]
        (tensor([1.3863, 1.3863, 1.3863, 1.3863]), tensor([2., 2.]))
    """
    quantized, indices, error = lfq_quantize(x, scale=scale, spherical=spherical, mask=mask)
    a = bit_logits(x, scale, spherical, inverse_temperature)
    kept = a.shape[-1 if num_codebooks is None else -2 :]
    counts = _keep(mask, a.sigmoid()).reshape(-1, *kept).sum(0)
    return quantized, indices, error, _keep(mask, _bernoulli_entropy(a)), counts


def bit_logits(x: Tensor, scale: float, spherical: bool, inverse_temperature: Tensor | float) -> Tensor:
    """The a of ``lfq_quantize_entropy``: bits are Bernoulli(σ(a))."""
    wide = widen(x)
    u = _on_sphere(wide, scale) if spherical else wide
    return 4 * inverse_temperature * _bit_value(x.shape[-1], scale, spherical) * u


def _bernoulli_entropy(logits: Tensor) -> Tensor:
    """Σ over the last dimension of the entropies of Bernoulli(σ(logit)): log(1 + e^-m) + m σ(-m), m = |logit|."""
    magnitude = torch.where(logits < 0, -logits, logits)  # unlike abs, with the slope of either side at zero
    return (torch.log1p((-magnitude).exp()) + magnitude * (-magnitude).sigmoid()).sum(-1)


def lfq_code_counts(
    x: Tensor,
    *,
    scale: float = 1.0,
    spherical: bool = False,
    inverse_temperature: Tensor | float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Σ over the rows of x [..., n] of p(c), for each of the 2^n codes: the soft histogram, by its definition.

    Example:
        >>> lfq_code_counts(torch.zeros(6, 1))
        tensor([3., 3.])
    """
    a = bit_logits(x, scale, spherical, inverse_temperature).unsqueeze(-2)
    bits = _unpack_bits(torch.arange(2 ** x.shape[-1], device=x.device), x.shape[-1])
    probabilities = torch.where(bits == 1, a.sigmoid(), (-a).sigmoid()).prod(-1)
    return _keep(mask, probabilities).reshape(-1, probabilities.shape[-1]).sum(0)


def lfq_decode(
    indices: Tensor, bits: int, *, scale: float = 1.0, spherical: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The corner of each index: int64 [...] to [..., bits]. Index -1: zeros.

    Example:
        >>> lfq_decode(torch.tensor([4, 1]), 3)
        tensor([[ 1., -1., -1.],
                [-1., -1.,  1.]])
    """
    value = _bit_value(bits, scale, spherical)
    return _keep(indices >= 0, (2 * _unpack_bits(indices, bits) - 1) * value).to(dtype)


# ---- one scalar codebook a dimension ---------------------------------------------------------------------------------


def _padded(codebooks: Tensor, levels: Sequence[int]) -> Tensor:
    """[D, largest level]: rows of the flat ``codebooks``, filled up with infinities that are never nearest."""
    rows = [
        torch.nn.functional.pad(row, (0, max(levels) - len(row)), value=math.inf) for row in codebooks.split(levels)
    ]
    return torch.stack(rows)


def latent_quantize(
    x: Tensor,
    codebooks: Tensor,
    levels: Sequence[int] | None = None,
    *,
    commitment_weight: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest of its own L_d learnable values for each of D numbers, the first of equals (Hsu et al. 2023, QLAE).

    ``codebooks`` is [D, L], or flat, Σ L_d long, with ``levels``. The gradient of quantized passes straight to x;
    squared_error = Σ_d (x_d - v_d)² gives -2 (x - v) to the codebooks and commitment_weight · 2 (x - v) to x.

    Returns:
        (quantized [..., D], index [...], squared_error [...]); the first dimension is the least significant digit.

    Example:
        >>> latent_quantize(torch.tensor([[0.1, 0.9]]), torch.tensor([[0.0, 1.0], [-1.0, 1.0]]))
        (tensor([[0., 1.]]), tensor([2]), tensor([0.0200]))
    """
    levels = tuple(levels or (codebooks.shape[-1],) * codebooks.shape[0])
    wide, table = widen(x), _padded(widen(codebooks).flatten(), levels)
    distances = (wide.detach().unsqueeze(-1) - table.detach()).abs()
    digits = torch.where(table.isinf(), math.inf, distances).nan_to_num(nan=-1.0).argmin(-1)
    chosen = torch.gather(table.expand(*x.shape, -1), -1, digits.unsqueeze(-1)).squeeze(-1)
    quantized = _straight_through(torch.where(wide.isnan(), wide, chosen), wide).to(x.dtype)
    pull = (wide - chosen.detach()).square()
    # The value of the error once, the gradient to x weighted.
    pull = pull.detach() + commitment_weight * (pull - pull.detach())
    push = (wide.detach() - chosen).square()
    error = (pull + (push - push.detach())).sum(-1)
    return _keep(mask, quantized), _keep(mask, _ravel(digits, levels), -1), _keep(mask, error)


def latent_decode(indices: Tensor, codebooks: Tensor, levels: Sequence[int] | None = None) -> Tensor:
    """The values of each index: int64 [...] to [..., D], differentiable with respect to ``codebooks``. Index -1: zeros.

    Example:
        >>> latent_decode(torch.tensor([2]), torch.tensor([[0.0, 1.0], [-1.0, 1.0]]))
        tensor([[0., 1.]])
    """
    levels = tuple(levels or (codebooks.shape[-1],) * codebooks.shape[0])
    starts = [sum(levels[:d]) for d in range(len(levels))]
    rows = _unravel(indices, levels) + torch.tensor(starts, device=indices.device)
    return _keep(indices >= 0, codebooks.flatten()[rows])


# ---- sampled bits ----------------------------------------------------------------------------------------------------


def binary_map(
    logits: Tensor,
    *,
    gradient: str = "mean",
    temperature: float = 1.0,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Independent bits b_i ~ Bernoulli(σ(logit_i)): b_i = [logit_i + logistic noise > 0]; without noise the likelier.

    The gradient of the bits is that of their mean σ(logit), or, with "gumbel", that of the relaxed bits
    σ((logit + noise) / temperature).

    Returns:
        (bits [..., n] of 0 and 1, index [...], entropy [...]); the first bit is the most significant.

    Example:
        >>> binary_map(torch.tensor([[2.0, -1.0, 0.0]]))[:2]
        (tensor([[1., 0., 0.]]), tensor([4]))
    """
    wide = widen(logits)
    perturbed = wide if noise is None else wide + widen(noise)
    bits = perturbed > 0
    soft = wide.sigmoid() if gradient == "mean" else (perturbed / temperature).sigmoid()
    hard = torch.where(wide.isnan(), wide, bits.to(wide.dtype))
    return _straight_through(hard, soft).to(logits.dtype), _pack_bits(bits), _bernoulli_entropy(wide)


# ---- storage ---------------------------------------------------------------------------------------------------------


def pack_indices(indices: Tensor, num_codes: int | None = None, *, bits: int | None = None) -> Tensor:
    """Indices in the smallest integer type that holds ``num_codes``, or in a stream of ``bits`` bits each.

    In the stream, index i of a row occupies bits i·bits to (i + 1)·bits - 1, lowest first; bit j of a row is bit j % 8
    of byte j // 8. A row is padded with zeros to whole bytes.

    Example:
        >>> pack_indices(torch.tensor([1, 2, 3]), bits=3)
        tensor([209,   0], dtype=torch.uint8)
    """
    if num_codes is not None:
        return indices.to(next(t for t, top in _INTEGERS if num_codes <= top))
    assert bits is not None
    stream = (indices.unsqueeze(-1) >> torch.arange(bits, device=indices.device) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (stream << torch.arange(8, device=indices.device)).sum(-1).to(torch.uint8)


_INTEGERS = ((torch.uint8, 1 << 8), (torch.int16, 1 << 15), (torch.int32, 1 << 31), (torch.int64, 1 << 63))


def unpack_indices(packed: Tensor, *, bits: int | None = None, length: int | None = None) -> Tensor:
    """What ``pack_indices`` packed, as int64; ``length`` is the number of indices in a row of the stream.

    Example:
        >>> unpack_indices(torch.tensor([209, 0], dtype=torch.uint8), bits=3, length=3)
        tensor([1, 2, 3])
    """
    if bits is None or length is None:
        return packed.long()
    stream = (packed.long().unsqueeze(-1) >> torch.arange(8, device=packed.device) & 1).flatten(-2)
    chunks = stream[..., : length * bits].unflatten(-1, (length, bits))
    return (chunks << torch.arange(bits, device=packed.device)).sum(-1)
