"""Objectives are traced without a graph break."""

import pytest
import torch

import isthmus
from isthmus import objectives, ops

B, K, D = 6, 4, 3


def balanced(x, y):
    return objectives.balanced_kl(ops.gaussian_kl, (x[0], x[1]), (y[0], y[1]))


def decomposed(x, y):
    z = ops.gaussian_sample(x[0], x[1], key=isthmus.key(0))
    return objectives.beta_tc_loss(z.sum(-1), objectives.kl_decomposition(z, x[0], x[1], 100))


CASES = {
    "free_bits": lambda x, y: objectives.free_bits(x, 0.1, groups=3),
    "balanced_kl": balanced,
    "capacity": lambda x, y: objectives.capacity_penalty(x, 0.5, gamma=10.0),
    "iwae": lambda x, y: objectives.iwae_bound(x[..., 0]),
    "piwae": lambda x, y: sum(objectives.piwae_bounds(x, groups=2)),
    "beta_tc": decomposed,
    "dip": lambda x, y: objectives.dip_penalty(x[0], y[0]),
    "wae": lambda x, y: objectives.wae_loss(x, objectives.adversarial_penalty(y), weight=2.0),
    "sliced": lambda x, y: objectives.sliced_wasserstein(x, y[:, :4], torch.eye(D)),
    "sinkhorn": lambda x, y: objectives.sinkhorn_divergence(x, y, epsilon=0.5, iterations=3),
    "frechet": lambda x, y: objectives.frechet_distance(x, y),
}


@pytest.mark.parametrize("name", CASES)
def test_fullgraph(name):
    torch._dynamo.reset()
    x, y = torch.randn(K, B, D).requires_grad_(), torch.randn(K, B, D)
    eager = CASES[name](x, y)
    compiled = torch.compile(CASES[name], fullgraph=True, backend="eager")(x, y)
    torch.testing.assert_close(compiled, eager)
    (expected,) = torch.autograd.grad(eager.sum(), x)
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), x), (expected,))
