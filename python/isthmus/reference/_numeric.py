"""Number rules that all families share: the four scale types, how half types accumulate, and vectors of length 1."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """``x`` in the type its results accumulate in: float32 for half types, else its own."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1; zeros stay zeros, with gradient zero."""
    zero = (x == 0).all(-1, keepdim=True)
    length = torch.linalg.vector_norm(torch.where(zero, 1.0, x), dim=-1, keepdim=True)
    return torch.where(zero, 0.0, x / torch.where(length == 0, 1.0, length))


def standard_deviation(scale: Tensor, scale_type: str) -> Tensor:
    """The standard deviation s that a network's ``scale`` stands for.

    ======== ================
    logvar   s = exp(scale/2)
    std      s = scale
    softplus s = log(1 + exp(scale))
    square   s = scale^2
    ======== ================

    Raises:
        ValueError: ``scale_type`` is none of these.
    """
    if scale_type == "logvar":
        return torch.exp(scale / 2)
    if scale_type == "std":
        return scale
    if scale_type == "softplus":
        # torch's softplus is the identity above 20, which is 1e-10 off: too coarse for float64.
        return torch.logaddexp(scale, torch.zeros_like(scale))
    if scale_type == "square":
        return scale.square()
    raise ValueError(f"scale_type is {scale_type!r}; expected 'logvar', 'std', 'softplus' or 'square'")


def log_standard_deviation(scale: Tensor, scale_type: str) -> Tensor:
    """log s. Exact for "logvar", and without underflow of scale^2 for "square"."""
    if scale_type == "logvar":
        return scale / 2
    if scale_type == "square":
        return 2 * scale.abs().log()
    return standard_deviation(scale, scale_type).log()


def exp_tail(x: Tensor) -> Tensor:
    """exp(x) - 1 - x, accurate in every digit also where it is about x^2 / 2."""
    near = x.abs() < 0.25
    small = torch.where(near, x, 0.0)  # where the series is not used it must not overflow either
    series = torch.ones_like(x)
    for n in range(12, 2, -1):  # the first term left out is below 2^-53 of the sum
        series = 1 + small / n * series
    return torch.where(near, 0.5 * small.square() * series, torch.expm1(x) - x)
