"""Gaussians with a diagonal plus low-rank covariance, diag(s²) + F Fᵀ; rank one is the case F [D, 1]."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, distributions

from isthmus import ops
from isthmus.distributions._numeric import log1p_tail
from isthmus.distributions._sampling import ReparameterizedFromKey, second_stream
from isthmus.distributions.normal import _STANDARD_DEVIATION
from isthmus.ops._arguments import check_choice, key_for

__all__ = ["LowRankMultivariateNormal", "low_rank_kl", "low_rank_sample"]


def low_rank_sample(
    mean: Tensor,
    scale: Tensor,
    factor: Tensor,
    *,
    scale_type: str = "logvar",
    num_samples: int | None = None,
    key: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Sample z = mean + s · ε₁ + F ε₂, differentiably (Rezende, Mohamed & Wierstra 2014, arXiv 1401.4082).

    The diagonal part is one pass each way, and only the R numbers ε₂ of a row are ever in memory.

    Args:
        mean: [*, D]; float32, float64, bfloat16 or float16.
        scale: same dtype, broadcastable with ``mean``; what it means is set by ``scale_type``.
        factor: F, [*, D, R] or broadcastable with it.
        scale_type: "logvar" (s = exp(scale/2)), "std", "softplus" or "square".
        num_samples: None for one sample without a sample axis, else the size of a new leading axis.
        key: int64 [2]. ε₁ is the stream of the key, ε₂ the same stream 2^62 blocks further on. Default: a fresh key
            drawn from ``generator``, or from torch's generator of the device.
        generator: where a fresh key is drawn from.

    Returns:
        z, [*, D] or [num_samples, *, D].

    Raises:
        ValueError: ``factor`` has another D, or an option is none of its choices.

    Example:
        >>> mean, logvar, direction = torch.zeros(4, 8), torch.zeros(4, 8), torch.ones(4, 8)
        >>> low_rank_sample(mean, logvar, direction.unsqueeze(-1), num_samples=3).shape
        torch.Size([3, 4, 8])
    """
    _check_factor(factor, mean)
    key = key_for(mean, key, generator)
    z = ops.gaussian_sample(mean, scale, scale_type=scale_type, num_samples=num_samples, key=key)
    coordinates = ops.gaussian_noise(second_stream(key), (*z.shape[:-1], factor.shape[-1]), z.dtype)
    return z + (factor @ coordinates.unsqueeze(-1)).squeeze(-1)


def low_rank_kl(mean: Tensor, scale: Tensor, factor: Tensor, *, scale_type: str = "logvar") -> Tensor:
    """KL(N(mean, diag(s²) + F Fᵀ) ‖ N(0, I)) of each row, in nats, in O(D R²).

    With G = Fᵀ diag(s⁻²) F, of which I + G is the capacitance matrix, and λ the eigenvalues of G:
    KL(N(mean, s²) ‖ N(0, 1)) + ½ Σ F² (1 - s⁻²) + ½ Σ (λ - log(1 + λ)). The determinant is never formed, and near the
    standard normal nothing cancels.

    Args:
        mean, scale, factor, scale_type: as in ``low_rank_sample``.

    Returns:
        [*], the divergence of each row.

    Gradients:
        To all three; once differentiable where G has equal eigenvalues, else twice.

    Raises:
        ValueError: ``factor`` has another D, or an option is none of its choices.

    Example:
        >>> low_rank_kl(torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(4, 8, 2))
        tensor([0., 0., 0., 0.])
    """
    check_choice("scale_type", scale_type, tuple(_STANDARD_DEVIATION))
    _check_factor(factor, mean)
    std = _STANDARD_DEVIATION[scale_type](scale)
    whitened = factor / std.unsqueeze(-1)
    eigenvalues = torch.linalg.eigvalsh(whitened.mT @ whitened)
    # 1 - s⁻² without cancellation at s = 1.
    excess = ((std - 1) * (std + 1) / std.square()).unsqueeze(-1)
    if scale_type == "logvar":
        excess = -torch.expm1(-scale).unsqueeze(-1)
    through_factor = (factor.square() * excess).sum((-2, -1)) + log1p_tail(eigenvalues).sum(-1)
    return ops.gaussian_kl(mean, scale, scale_type=scale_type) + 0.5 * through_factor


class LowRankMultivariateNormal(ReparameterizedFromKey, distributions.LowRankMultivariateNormal):
    """``torch.distributions.LowRankMultivariateNormal`` with samples by ``low_rank_sample``.

    Example:
        >>> q = LowRankMultivariateNormal(torch.zeros(8), torch.ones(8, 2), torch.ones(8))
        >>> q.rsample((3,), key=isthmus.key(0)).shape
        torch.Size([3, 8])
    """

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LowRankMultivariateNormal":
        return super().expand(batch_shape, self._get_checked_instance(LowRankMultivariateNormal, _instance))

    def rsample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None, key: Tensor | None = None
    ) -> Tensor:
        """A differentiable sample, [*sample_shape, *batch_shape, D]; ``key``, ``generator``: as in ``Normal``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        samples = math.prod(sample_shape)
        if samples == 0:
            return self.loc.new_empty(shape)
        std, factor = self._unbroadcasted_cov_diag.sqrt(), self._unbroadcasted_cov_factor
        z = low_rank_sample(self.loc, std, factor, scale_type="std", num_samples=samples, key=key, generator=generator)
        return z.view(shape)


def _check_factor(factor: Tensor, mean: Tensor) -> None:
    if factor.dim() < 2 or factor.shape[-2] != mean.shape[-1]:
        raise ValueError(f"factor has shape {list(factor.shape)}; expected [..., {mean.shape[-1]}, R], like mean")
