"""Normal-inverse-Wishart: the conjugate prior of a Gaussian's mean and covariance."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.kl import register_kl

from isthmus.distributions._numeric import exp_tail, lgamma_gap, triangular_gap
from isthmus.distributions._sampling import second_stream
from isthmus.ops import gaussian_noise
from isthmus.ops._arguments import key_for

__all__ = ["NormalInverseWishart"]


class NormalInverseWishart(Distribution):
    """Σ ~ InverseWishart(Ψ, df), mean | Σ ~ N(loc, Σ / precision), Ψ = L Lᵀ (Gelman et al., Bayesian Data Analysis,
    section 3.6; Murphy, Conjugate Bayesian analysis of the Gaussian distribution, 2007).

    A value is a pair: mean [*, D] and covariance [*, D, D].

    Args:
        loc: [*, D].
        precision: how many observations the belief about the mean is worth, above 0; [*].
        scale_tril: L, the Cholesky factor of Ψ, [*, D, D].
        df: degrees of freedom, above D - 1; [*].
        validate_args: as in torch.

    Raises:
        ValueError: the shapes do not fit, or an argument is not valid, where validation is on.

    Example:
        >>> q = NormalInverseWishart(torch.zeros(2), torch.tensor(1.0), torch.eye(2), torch.tensor(5.0))
        >>> mean, covariance = q.sample((7,), key=isthmus.key(0))
        >>> mean.shape, covariance.shape
        (torch.Size([7, 2]), torch.Size([7, 2, 2]))
        >>> torch.distributions.kl_divergence(q, q)
        tensor(0.)
    """

    arg_constraints = {  # noqa: RUF012
        "loc": constraints.real_vector,
        "precision": constraints.positive,
        "scale_tril": constraints.lower_cholesky,
        "df": constraints.positive,
    }
    has_rsample = False

    def __init__(
        self, loc: Tensor, precision: Tensor, scale_tril: Tensor, df: Tensor, validate_args: bool | None = None
    ) -> None:
        dim = loc.shape[-1]
        if scale_tril.shape[-2:] != (dim, dim):
            raise ValueError(f"scale_tril has shape {list(scale_tril.shape)}; expected [..., {dim}, {dim}], like loc")
        batch = torch.broadcast_shapes(loc.shape[:-1], precision.shape, scale_tril.shape[:-2], df.shape)
        self.loc = loc.expand(*batch, dim)
        self.precision, self.df = precision.expand(batch), df.expand(batch)
        self.scale_tril = scale_tril.expand(*batch, dim, dim)
        super().__init__(batch, torch.Size((dim,)), validate_args)
        if self._validate_args and not (self.df > dim - 1).all():
            raise ValueError(f"df is as low as {float(self.df.min())}; expected more than D - 1 = {dim - 1}")

    def expand(self, batch_shape: Any, _instance: Any = None) -> "NormalInverseWishart":
        batch, dim = torch.Size(batch_shape), self.event_shape[0]
        return NormalInverseWishart(
            self.loc.expand(*batch, dim),
            self.precision.expand(batch),
            self.scale_tril.expand(*batch, dim, dim),
            self.df.expand(batch),
            validate_args=False,
        )

    @property
    def mean(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Of the mean and of the covariance; the latter exists for df > D + 1."""
        excess = self.df - self.event_shape[0] - 1
        psi = self.scale_tril @ self.scale_tril.mT
        return self.loc, psi / torch.where(excess > 0, excess, torch.nan)[..., None, None]

    def sample(  # type: ignore[override]
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(mean, covariance), [*sample_shape, *batch_shape, D] and [..., D, D], by Bartlett's decomposition.

        The normals come from the key; the chi-squares, which need rejection, from a generator seeded with it: reading
        the seed waits for the device.
        """
        shape, dim = torch.Size(sample_shape) + self.batch_shape, self.event_shape[0]
        key = key_for(self.loc, key, generator)
        with torch.no_grad():
            normals = gaussian_noise(key, (*shape, dim, dim), self.loc.dtype)
            seeded = Generator(device=self.loc.device).manual_seed(int(key[0] ^ key[1]))
            halves = 0.5 * (self.df.unsqueeze(-1) - torch.arange(dim, device=self.df.device, dtype=self.df.dtype))
            chi = (2 * torch._standard_gamma(halves.expand(*shape, dim), generator=seeded)).sqrt()
            bartlett = normals.tril(-1) + torch.diag_embed(chi)
            # The precision is L⁻ᵀ A Aᵀ L⁻¹, the covariance B Bᵀ with B = L A⁻ᵀ.
            scale = self.scale_tril.expand(*shape, dim, dim)
            root = torch.linalg.solve_triangular(bartlett, scale.mT, upper=False).mT
            noise = gaussian_noise(second_stream(key), (*shape, dim, 1), self.loc.dtype)
            mean = self.loc + (root @ noise).squeeze(-1) / self.precision.sqrt().unsqueeze(-1)
        return mean, root @ root.mT

    def log_prob(self, value: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        """log-density of the pair (mean, covariance), [*]."""
        mean, covariance = value
        dim = self.event_shape[0]
        tril = torch.linalg.cholesky(covariance)
        log_det = 2 * _log_diagonal(tril)
        spread = _solve(tril, self.scale_tril).square().sum((-2, -1))
        distance = _solve(tril, (mean - self.loc).unsqueeze(-1)).square().sum((-2, -1))
        log_normalizer = (
            0.5 * self.df * dim * math.log(2)
            + torch.mvlgamma(0.5 * self.df, dim)
            + 0.5 * dim * (math.log(2 * math.pi) - self.precision.log())
            - self.df * _log_diagonal(self.scale_tril)
        )
        return -0.5 * ((self.df + dim + 2) * log_det + spread + self.precision * distance) - log_normalizer


def _solve(tril: Tensor, right: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(tril.shape[:-2], right.shape[:-2])
    left, right = (t.expand(batch + t.shape[-2:]) for t in (tril, right))
    return torch.linalg.solve_triangular(left, right, upper=False)


def _log_diagonal(tril: Tensor) -> Tensor:
    return tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


@register_kl(NormalInverseWishart, NormalInverseWishart)
def _niw_niw(q: NormalInverseWishart, p: NormalInverseWishart) -> Tensor:
    """Of the mean given the covariance: ½ [D (k - 1 - log k) + κ_p ν_q ‖L_q⁻¹ (m_q - m_p)‖²], k = κ_p / κ_q.

    Of the covariance, with R = Ψ_q⁻¹ Ψ_p: ½ ν_p (tr R - D - log det R) + ½ (ν_q - ν_p) (tr R - D)
    + Σ_j gap((ν_q - j) / 2, (ν_p - ν_q) / 2), gap that of lgamma over its tangent. Every term is small near equality.
    """
    dim = q.event_shape[0]
    ratio = (p.precision - q.precision) / q.precision
    distance = _solve(q.scale_tril, (q.loc - p.loc).unsqueeze(-1)).square().sum((-2, -1))
    of_mean = 0.5 * (dim * exp_tail(torch.log1p(ratio)) + p.precision * q.df * distance)

    gap, excess = triangular_gap(p.scale_tril, q.scale_tril)
    steps = torch.arange(dim, device=q.df.device, dtype=q.df.dtype)
    gammas = lgamma_gap(0.5 * (q.df.unsqueeze(-1) - steps), 0.5 * (p.df - q.df).unsqueeze(-1)).sum(-1)
    return of_mean + 0.5 * (p.df * gap + (q.df - p.df) * excess) + gammas
