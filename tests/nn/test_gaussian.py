import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import softplus

import isthmus
from isthmus import nn, ops

STD = {
    "logvar": lambda scale: (scale / 2).exp(),
    "softplus": softplus,
    "square": lambda scale: scale.square(),
}


def test_shapes_with_leading_dimensions_and_samples():
    bottleneck = nn.GaussianBottleneck(12, 6)
    x = torch.randn(2, 3, 12)
    one = bottleneck(x)
    assert one.z.shape == one.mean.shape == one.scale.shape == (2, 3, 6)
    assert one.kl.shape == (2, 3)
    many = bottleneck(x, num_samples=5)
    assert many.z.shape == (5, 2, 3, 6)
    assert many.kl.shape == (2, 3)


@pytest.mark.parametrize("scale_type", STD)
def test_sample_and_kl_are_those_of_the_projected_gaussian(scale_type):
    bottleneck = nn.GaussianBottleneck(12, 6, scale_type=scale_type).double()
    x = torch.randn(4, 12, dtype=torch.float64)
    key = isthmus.key(7)
    out = bottleneck(x, temperature=0.5, key=key)
    noise = ops.gaussian_noise(key, (4, 6), torch.float64)
    std = STD[scale_type](out.scale)
    torch.testing.assert_close(out.z, out.mean + 0.5 * std * noise)
    expected = kl_divergence(Normal(out.mean, std), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(out.kl, expected)


def test_prior_tensors_receive_gradients():
    bottleneck = nn.GaussianBottleneck(12, 6).double()
    prior_mean, prior_scale = torch.randn(2, 4, 6, dtype=torch.float64).unbind()
    prior_mean.requires_grad_()
    prior_scale.requires_grad_()
    out = bottleneck(torch.randn(4, 12, dtype=torch.float64), prior_mean, prior_scale)
    posterior = Normal(out.mean, (out.scale / 2).exp())
    expected = kl_divergence(posterior, Normal(prior_mean, (prior_scale / 2).exp())).sum()
    torch.testing.assert_close(out.kl.sum(), expected)
    inputs = (prior_mean, prior_scale, bottleneck.projection.weight)
    actual = torch.autograd.grad(out.kl.sum(), inputs, retain_graph=True)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, inputs))


def test_a_scale_that_may_turn_negative_is_refused():
    with pytest.raises(ValueError, match="'std'"):
        nn.GaussianBottleneck(4, 2, scale_type="std")


def test_training_lowers_the_bound(digits):
    torch.manual_seed(0)
    bottleneck, decoder = nn.GaussianBottleneck(64, 8), torch.nn.Linear(8, 64)
    optimizer = torch.optim.Adam([*bottleneck.parameters(), *decoder.parameters()], lr=1e-2)

    def bound():
        z, kl, _, _ = bottleneck(digits)
        return (2.0 * (decoder(z) - digits).square().sum(-1) + kl).mean()

    start = bound().item()
    for _ in range(60):
        optimizer.zero_grad()
        bound().backward()
        optimizer.step()
    assert bound().item() < 0.5 * start
