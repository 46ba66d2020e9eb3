"""Distributions on the kernels: drop-in subclasses of ``torch.distributions``, and what it lacks.

Normal, LogNormal, Categorical, RelaxedOneHotCategorical, MultivariateNormal, LowRankMultivariateNormal, Independent
    torch's classes with one-kernel samples, densities and divergences; samples take ``key=`` and ``generator=``.
MatrixNormal, NormalInverseWishart
    with density, samples and divergence.
low_rank_sample, low_rank_kl, product_of_experts
    diagonal plus low-rank Gaussians, and products of diagonal ones.
bernoulli_kl, beta_kl, dirichlet_kl, gamma_kl, laplace_kl, multivariate_normal_kl
    closed forms that keep their digits where the two distributions are close.
"""

from isthmus.distributions.categorical import Categorical, RelaxedOneHotCategorical
from isthmus.distributions.closed_forms import bernoulli_kl, beta_kl, dirichlet_kl, gamma_kl, laplace_kl
from isthmus.distributions.experts import product_of_experts
from isthmus.distributions.independent import Independent
from isthmus.distributions.low_rank import LowRankMultivariateNormal, low_rank_kl, low_rank_sample
from isthmus.distributions.matrix_normal import MatrixNormal
from isthmus.distributions.multivariate import MultivariateNormal, multivariate_normal_kl
from isthmus.distributions.normal import LogNormal, Normal
from isthmus.distributions.normal_inverse_wishart import NormalInverseWishart

__all__ = [
    "Categorical",
    "Independent",
    "LogNormal",
    "LowRankMultivariateNormal",
    "MatrixNormal",
    "MultivariateNormal",
    "Normal",
    "NormalInverseWishart",
    "RelaxedOneHotCategorical",
    "bernoulli_kl",
    "beta_kl",
    "dirichlet_kl",
    "gamma_kl",
    "laplace_kl",
    "low_rank_kl",
    "low_rank_sample",
    "multivariate_normal_kl",
    "product_of_experts",
]
