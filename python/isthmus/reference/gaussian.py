"""The noise stream, and Gaussian sampling by reparameterisation (Kingma & Welling, 2014)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isthmus.random import philox4x32
from isthmus.reference._gaussians import Posterior, clamp_scale, posterior, unpack, without_masked_rows
from isthmus.reference._numeric import widen
from isthmus.reference.divergence import gaussian_kl

__all__ = ["gaussian_noise", "gaussian_sample", "gaussian_sample_kl", "gaussian_sample_log_prob"]


def gaussian_noise(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals of a key: the definition that every kernel reproduces.

    Block ``b`` of the stream is ``w0, w1, w2, w3 = philox4x32(seed, offset + b)``, the counter
    modulo 2^64. Elements are numbered in contiguous (row-major) order of ``shape``. Below, ``fl``
    rounds to nearest even, once.

    float32, four elements to a block: element i is lane i % 4 of block i // 4. ::

        u(w) = fl(fl(w) * 2^-32 + 2^-33)       in [2^-33, 1]; the product is exact
        t(w) = fl(fl(2 pi) * u(w))             fl(2 pi) = 6.2831855 = 0x40C90FDB
        r(w) = sqrt(-2 log u(w))
        lanes: r(w0) cos t(w1), r(w0) sin t(w1), r(w2) cos t(w3), r(w2) sin t(w3)

    The angle is the rounded float t: sine and cosine of the unrounded product are other numbers
    where they are near zero. Log, root, sine and cosine are evaluated in float64 here and the
    result rounded once; float32 kernels may differ by a few ulp. u = 1 occurs (for the largest
    words) and gives 0. |noise| < 6.77. bfloat16 and float16 round the float32 value.

    float64, two elements to a block: element i is lane i % 2 of block i // 2. ::

        u(a, b) = fl((a * 2^32 + b + 1/2) * 2^-64)      in [2^-65, 1]
        t(a, b) = fl(fl(2 pi) * u(a, b))                fl(2 pi) = 0x401921FB54442D18
        r(a, b) = sqrt(-2 log u(a, b))
        lanes: r(w0, w1) cos t(w2, w3), r(w0, w1) sin t(w2, w3)

    This is the stream of ``torch.func._random.normal`` of torch 2.14 and later, which agrees
    within 3 ulp on the CPU. Box-Muller: Box & Muller, 1958.

    Args:
        key: int64, shape [2].
        shape: shape of the result.
        dtype: float32, float64, bfloat16 or float16.

    Returns:
        Tensor of ``shape`` and ``dtype`` on the device of ``key``.

    Example:
        >>> gaussian_noise(torch.tensor([0, 0]), [2, 2])
        tensor([[ 0.9911, -0.9247],
                [-0.6176, -0.4821]])
    """
    numel = math.prod(shape)
    blocks = torch.arange(-(-numel // (2 if dtype == torch.float64 else 4)), device=key.device)
    w0, w1, w2, w3 = philox4x32(key[0], key[1] + blocks)
    if dtype == torch.float64:
        normals = _box_muller(_uniform64(w0, w1), _uniform64(w2, w3))
    else:
        first = _box_muller(_uniform32(w0), _uniform32(w1))
        second = _box_muller(_uniform32(w2), _uniform32(w3))
        normals = torch.cat((first, second), dim=-1)
    return normals.flatten()[:numel].reshape(tuple(shape)).to(dtype)


def gaussian_sample(
    mean: Tensor,
    scale: Tensor | None = None,
    *,
    num_samples: int | None = None,
    antithetic: bool = False,
    temperature: float = 1.0,
    noise: Tensor,
    **parameters: Any,
) -> Tensor:
    """Samples ``z = mean + temperature * s(scale) * noise``.

    Gradients: 1 to ``mean``, ``temperature * noise * s'(scale)`` to ``scale``, none to ``noise``.
    Half inputs are computed in float32 and rounded once, with the noise as it is given.

    Args:
        mean: [...]; without a scale, mean and scale as halves along ``packed_dim``.
        scale: shape of ``mean``; ``scale_type`` says what it stands for.
        num_samples: S, for an extra leading axis of samples; ``None`` for one sample without it.
        antithetic: samples 2j and 2j + 1 take ``noise[j]`` and its negative.
        noise: [...], [S, ...], or [S / 2, ...] for antithetic samples.
        parameters: scale_type, packed_dim, clamp, clamp_mode.

    Returns:
        z: [...] or [S, ...], dtype of ``mean``.

    Raises:
        ValueError: an unknown option, or ``noise`` of another shape.

    Example:
        >>> mean, logvar = torch.zeros(2, 3), torch.zeros(2, 3)
        >>> noise = gaussian_noise(torch.tensor([7, 0]), [5, 2, 3])
        >>> torch.equal(gaussian_sample(mean, logvar, num_samples=5, noise=noise), noise)
        True
    """
    q = posterior(mean, scale, **parameters)
    return _draw(q, num_samples, antithetic, temperature, noise).to(mean.dtype)


def gaussian_sample_kl(
    mean: Tensor,
    scale: Tensor | None = None,
    prior_mean: Tensor | float | None = None,
    prior_scale: Tensor | float | None = None,
    *,
    mask: Tensor | None = None,
    num_samples: int | None = None,
    antithetic: bool = False,
    temperature: float = 1.0,
    noise: Tensor,
    scale_type: str = "logvar",
    packed_dim: int = -1,
    residual: bool = False,
    clamp: tuple[float, float] | None = None,
    clamp_mode: str = "hard",
    **divergence: Any,
) -> tuple[Tensor, Tensor]:
    """``gaussian_sample`` and ``gaussian_kl`` of the same posterior.

    The temperature changes the samples only, and the divergence has no sample axis. ``divergence`` holds the
    options of ``gaussian_kl``. Samples of rows that the mask leaves out are 0.

    Returns:
        z and kl, as the two functions give them.

    Example:
        >>> z, kl = gaussian_sample_kl(torch.ones(2, 3), torch.zeros(2, 3), noise=torch.ones(2, 3))
        >>> z[0], kl
        (tensor([2., 2., 2.]), tensor([1.5000, 1.5000]))
    """
    mean, scale = unpack(mean, scale, packed_dim)
    mean, scale, prior_mean, prior_scale = without_masked_rows(mask, mean, scale, prior_mean, prior_scale)
    scale = clamp_scale(scale, clamp, clamp_mode)  # once: a clamp may look at the gradient that reaches it
    tensors = (mean, scale, prior_mean, prior_scale)
    parameters: dict[str, Any] = {"scale_type": scale_type, "residual": residual}
    z = _draw(posterior(*tensors, **parameters), num_samples, antithetic, temperature, noise).to(mean.dtype)
    if mask is not None:
        z = torch.where(mask.unsqueeze(-1), z, 0)
    return z, gaussian_kl(mean, scale, prior_mean, prior_scale, mask=mask, **parameters, **divergence)


def gaussian_sample_log_prob(
    mean: Tensor,
    scale: Tensor | None = None,
    prior_mean: Tensor | float | None = None,
    prior_scale: Tensor | float | None = None,
    *,
    num_samples: int | None = None,
    antithetic: bool = False,
    temperature: float = 1.0,
    noise: Tensor,
    scale_type: str = "logvar",
    packed_dim: int = -1,
    residual: bool = False,
    clamp: tuple[float, float] | None = None,
    clamp_mode: str = "hard",
    path_only: bool = False,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples, their posterior's divergence, and the log-densities of the samples.

    ``log_q = sum_d log N(z; mean, s^2)`` and ``log_p = sum_d log prior(z)``. With ``path_only`` the parameters
    inside log_q are held constant, so that its gradient flows through z alone (Roeder et al., Sticking the
    Landing, 2017). ``gate`` multiplies the gradient that reaches the posterior through a sample.

    Args:
        gate: [S, ...], without the last dimension of ``mean``.

    Returns:
        z [S, ..., D], kl [...], log_q [S, ...], log_p [S, ...]; without S if ``num_samples`` is None.
    """
    mean, scale = unpack(mean, scale, packed_dim)
    tensors = (mean, clamp_scale(scale, clamp, clamp_mode), prior_mean, prior_scale)
    parameters: dict[str, Any] = {"scale_type": scale_type, "residual": residual}
    q = posterior(*tensors, **parameters)
    wide_z = _draw(q, num_samples, antithetic, temperature, noise)
    density: tuple[Tensor, ...] = (q.mean, q.log_std)
    if path_only:
        density = (density[0].detach(), density[1].detach())
    if gate is not None:
        # The value stays, the gradient is multiplied; the posterior sees z and its own density through the gate.
        wide_z = _scale_gradient(wide_z, gate.unsqueeze(-1))
        expanded = (t.expand_as(wide_z) for t in density)
        density = tuple(_scale_gradient(t, gate.unsqueeze(-1)) for t in expanded)
    log_q = _log_normal(wide_z, *density)
    log_p = _log_normal(wide_z, q.prior_mean, q.log_prior_std)
    return wide_z.to(mean.dtype), gaussian_kl(*tensors, **parameters), log_q, log_p


def _draw(q: Posterior, num_samples: int | None, antithetic: bool, temperature: float, noise: Tensor) -> Tensor:
    if antithetic:
        noise = torch.stack((noise, -noise), 1).flatten(0, 1)
    expected = q.mean.shape if num_samples is None else (num_samples, *q.mean.shape)
    if noise.shape != expected:
        raise ValueError(f"noise has shape {list(noise.shape)}; expected {list(expected)}")
    return q.mean + temperature * q.std * widen(noise)


def _scale_gradient(t: Tensor, factor: Tensor) -> Tensor:
    return t.detach() + factor * (t - t.detach())


def _log_normal(z: Tensor, mean: Tensor | float, log_std: Tensor | float) -> Tensor:
    log_std = torch.as_tensor(log_std, dtype=z.dtype)
    u = (z - mean) * torch.exp(-log_std)
    return (-0.5 * u.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def _uniform32(word: Tensor) -> Tensor:
    return word.float() * 2.0**-32 + 2.0**-33


def _uniform64(high: Tensor, low: Tensor) -> Tensor:
    return high.double() * 2.0**-32 + (low.double() * 2.0**-64 + 2.0**-65)


def _box_muller(radius_uniform: Tensor, angle_uniform: Tensor) -> Tensor:
    """The cosine and the sine normal, along a new last dimension."""
    angle = (2 * math.pi * angle_uniform).double()  # the product rounds in the stream's own type
    radius = torch.sqrt(-2 * radius_uniform.double().log())
    pair = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return pair.to(radius_uniform.dtype)
