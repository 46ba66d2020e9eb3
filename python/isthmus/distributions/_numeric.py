"""Differences that cancel, written so that they do not."""

import torch
from torch import Tensor

from isthmus.reference._numeric import exp_tail

__all__ = ["exp_tail", "lgamma_gap", "log1p_tail", "triangular_gap"]

# Gauss-Legendre nodes and weights on [0, 1], exact for polynomials of degree 19.
_NODES = (0.01304673574141414, 0.06746831665550774, 0.16029521585048779, 0.28330230293537640, 0.42556283050918439)
_WEIGHTS = (0.03333567215434407, 0.07472567457529030, 0.10954318125799102, 0.13463335965499818, 0.14776211235737644)


def log1p_tail(x: Tensor) -> Tensor:
    """x - log(1 + x), accurate where it is about x² / 2."""
    return exp_tail(torch.log1p(x))


def lgamma_gap(y: Tensor, step: Tensor) -> Tensor:
    """lgamma(y + step) - lgamma(y) - digamma(y) step, which is never negative: about trigamma(y) step² / 2 for small
    steps.

    There it is the integral of the second derivative, step² ∫ (1 - t) trigamma(y + t step) dt, by ten nodes: a sum of
    positive terms, as good as torch's trigamma for |step| < y / 2.
    """
    near = step.abs() < 0.5 * y
    small = torch.where(near, step, 0.0)
    integral = torch.zeros_like(small)
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        for t in (node, 1 - node):
            integral = integral + weight * (1 - t) * torch.polygamma(1, y + t * small)
    far = torch.lgamma(y + step) - torch.lgamma(y) - torch.digamma(y) * step
    return torch.where(near, small.square() * integral, far)


def triangular_gap(scale_tril: Tensor, prior_scale_tril: Tensor) -> tuple[Tensor, Tensor]:
    """(tr R - D - log det R, tr R - D) of R = Σ_prior⁻¹ Σ, from the Cholesky factors of both.

    With E = L_prior⁻¹ (L - L_prior), which is lower triangular and small where the two are close, L_prior⁻¹ L is I + E:
    both results are sums of functions of E, without the D that would cancel. The first is never negative.
    """
    e = torch.linalg.solve_triangular(prior_scale_tril, scale_tril - prior_scale_tril, upper=False)
    diagonal = e.diagonal(dim1=-2, dim2=-1)
    below = e.tril(-1).square().sum((-2, -1))
    gap = below + exp_tail(2 * torch.log1p(diagonal)).sum(-1)
    return gap, below + (diagonal * (diagonal + 2)).sum(-1)
