"""Matrix normal, that is Gaussians with a Kronecker-factored covariance."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.kl import register_kl

from isthmus.distributions._numeric import triangular_gap
from isthmus.distributions._sampling import ReparameterizedFromKey, standard_normal

__all__ = ["MatrixNormal"]


class MatrixNormal(ReparameterizedFromKey, Distribution):
    """X = loc + L_row E L_columnᵀ, E of independent standard normals: rows covary by U = L_row L_rowᵀ, columns by
    V = L_column L_columnᵀ, and vec(X), columns stacked, by the Kronecker product V ⊗ U (Dawid 1981; Louizos & Welling
    2016, arXiv 1603.04733).

    Never forms the nm × nm covariance: sampling, density and divergence take O(n³ + m³ + nm (n + m)).

    Args:
        loc: mean, [*, n, m].
        row_scale_tril: L_row, [*, n, n], lower triangular with a positive diagonal.
        column_scale_tril: L_column, [*, m, m], likewise; batches broadcast.
        validate_args: as in torch.

    Raises:
        ValueError: the shapes do not fit, or an argument is not valid, where validation is on.

    Example:
        >>> q = MatrixNormal(torch.zeros(3, 2), torch.eye(3), 2 * torch.eye(2))
        >>> q.rsample((5,), key=isthmus.key(0)).shape
        torch.Size([5, 3, 2])
        >>> torch.distributions.kl_divergence(q, q)
        tensor(0.)
    """

    arg_constraints = {  # noqa: RUF012
        "loc": constraints.independent(constraints.real, 2),
        "row_scale_tril": constraints.lower_cholesky,
        "column_scale_tril": constraints.lower_cholesky,
    }
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self, loc: Tensor, row_scale_tril: Tensor, column_scale_tril: Tensor, validate_args: bool | None = None
    ) -> None:
        event = loc.shape[-2:]
        for name, factor, size in (
            ("row_scale_tril", row_scale_tril, event[:1]),
            ("column_scale_tril", column_scale_tril, event[1:]),
        ):
            if len(event) != 2 or factor.shape[-2:] != size * 2:
                raise ValueError(
                    f"{name} has shape {list(factor.shape)}; expected [..., {list(size * 2)}] for loc of shape "
                    f"{list(loc.shape)}, which is [..., n, m]"
                )
        factors = (loc, row_scale_tril, column_scale_tril)
        batch = torch.broadcast_shapes(*(t.shape[:-2] for t in factors))
        self.loc, self.row_scale_tril, self.column_scale_tril = (t.expand(batch + t.shape[-2:]) for t in factors)
        super().__init__(batch, event, validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "MatrixNormal":
        batch = torch.Size(batch_shape)
        loc, rows, columns = (
            t.expand(batch + t.shape[-2:]) for t in (self.loc, self.row_scale_tril, self.column_scale_tril)
        )
        return MatrixNormal(loc, rows, columns, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        rows, columns = (t.square().sum(-1) for t in (self.row_scale_tril, self.column_scale_tril))
        return rows.unsqueeze(-1) * columns.unsqueeze(-2)

    def rsample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None, key: Tensor | None = None
    ) -> Tensor:
        """A differentiable sample, [*sample_shape, *batch_shape, n, m]; ``key``, ``generator``: as in ``Normal``."""
        noise = standard_normal(self.loc, self._extended_shape(torch.Size(sample_shape)), key, generator)
        return self.loc + self.row_scale_tril @ noise @ self.column_scale_tril.mT

    def log_prob(self, value: Tensor) -> Tensor:
        """-½ [nm log 2π + ‖L_row⁻¹ (value - loc) L_column⁻ᵀ‖²] - m log det L_row - n log det L_column."""
        if self._validate_args:
            self._validate_sample(value)
        return -0.5 * self._whitened(value - self.loc).square().sum((-2, -1)) - self._log_normalizer()

    def entropy(self) -> Tensor:
        n, m = self.event_shape
        return 0.5 * n * m + self._log_normalizer()

    def _log_normalizer(self) -> Tensor:
        n, m = self.event_shape
        rows, columns = (
            t.diagonal(dim1=-2, dim2=-1).log().sum(-1) for t in (self.row_scale_tril, self.column_scale_tril)
        )
        return 0.5 * n * m * math.log(2 * math.pi) + m * rows + n * columns

    def _whitened(self, x: Tensor) -> Tensor:
        """L_row⁻¹ x L_column⁻ᵀ"""
        rows, columns = (t.expand(x.shape[:-2] + t.shape[-2:]) for t in (self.row_scale_tril, self.column_scale_tril))
        return torch.linalg.solve_triangular(
            columns, torch.linalg.solve_triangular(rows, x, upper=False).mT, upper=False
        ).mT


@register_kl(MatrixNormal, MatrixNormal)
def _matrix_matrix(q: MatrixNormal, p: MatrixNormal) -> Tensor:
    """½ [m gap(U) + n gap(V) + τ_U τ_V + ‖L_row⁻¹ (difference of loc) L_column⁻ᵀ‖²].

    gap is tr R - D - log det R and τ is tr R - D, R the quotient of the covariances: the same as in one dimension,
    arranged so that the sizes n, m cancel on paper instead of in floating point.
    """
    n, m = q.event_shape
    row_gap, row_excess = triangular_gap(q.row_scale_tril, p.row_scale_tril)
    column_gap, column_excess = triangular_gap(q.column_scale_tril, p.column_scale_tril)
    distance = p._whitened(q.loc - p.loc).square().sum((-2, -1))
    return 0.5 * (m * row_gap + n * column_gap + row_excess * column_excess + distance)
