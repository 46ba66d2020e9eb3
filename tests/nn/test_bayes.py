import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import cross_entropy, linear, softplus

import isthmus
from isthmus import nn

STD = {
    "logvar": lambda scale: (scale / 2).exp(),
    "softplus": softplus,
    "square": lambda scale: scale.square(),
}
ESTIMATORS = ["weight", "local"]


def spread(layer):
    """Move the parameters away from their constant start."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.0 + 0.5 * torch.rand_like(parameter))
    return layer


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("bias", [True, False])
def test_shapes_and_parameters(estimator, bias):
    layer = nn.BayesLinear(5, 3, bias, estimator=estimator)
    assert layer(torch.randn(2, 4, 5)).shape == (2, 4, 3)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 2 * (15 + 3 * bias)


@pytest.mark.parametrize("scale_type", STD)
@pytest.mark.parametrize("prior_std", [1.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_kl_equals_torch_distributions(scale_type, prior_std, bias):
    layer = nn.BayesLinear(5, 3, bias, scale_type=scale_type, prior_std=prior_std)
    layer = spread(layer.double())
    pairs = [(layer.weight_mean, layer.weight_scale)]
    if bias:
        pairs.append((layer.bias_mean, layer.bias_scale))
    prior = Normal(0.0, STD[scale_type](layer.prior_scale))
    expected = sum(kl_divergence(Normal(mean, STD[scale_type](scale)), prior).sum() for mean, scale in pairs)
    assert STD[scale_type](layer.prior_scale).item() == pytest.approx(prior_std, rel=1e-6)
    torch.testing.assert_close(layer.kl(), expected)
    parameters = list(layer.parameters())
    torch.testing.assert_close(torch.autograd.grad(layer.kl(), parameters), torch.autograd.grad(expected, parameters))


@pytest.mark.parametrize("scale_type", STD)
def test_every_weight_starts_with_init_std(scale_type):
    layer = nn.BayesLinear(5, 3, scale_type=scale_type, init_std=0.02)
    torch.testing.assert_close(STD[scale_type](layer.weight_scale), torch.full((3, 5), 0.02))
    torch.testing.assert_close(STD[scale_type](layer.bias_scale), torch.full((3,), 0.02))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_outputs_have_the_mean_and_variance_of_the_weights(estimator):
    torch.manual_seed(0)
    layer = spread(nn.BayesLinear(5, 3, estimator=estimator, init_std=0.5)).eval()
    x = torch.randn(4, 5)
    with torch.no_grad():
        draws = torch.stack([layer(x) for _ in range(4000)])
        weight_var = softplus(layer.weight_scale).square()
        variance = linear(x.square(), weight_var, softplus(layer.bias_scale).square())
        mean = linear(x, layer.weight_mean, layer.bias_mean)
    standard_error = (variance / 4000).sqrt()
    assert ((draws.mean(0) - mean).abs() < 5 * standard_error).all()
    torch.testing.assert_close(draws.var(0), variance, rtol=0.15, atol=0.0)


def test_one_network_per_batch_or_per_row():
    x = torch.randn(1, 5).expand(4, 5)
    shared = nn.BayesLinear(5, 3, estimator="weight")(x)
    torch.testing.assert_close(shared, shared[:1].expand(4, 3))
    separate = nn.BayesLinear(5, 3, estimator="local")(x)
    assert separate.unique(dim=0).shape[0] == 4


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_noise_follows_the_key_in_training_and_evaluation(estimator):
    layer, x = nn.BayesLinear(5, 3, estimator=estimator), torch.randn(4, 5)
    one, two = isthmus.key(1), isthmus.key(2)
    for mode in (True, False):
        layer.train(mode)
        assert torch.equal(layer(x, key=one), layer(x, key=one))
        assert not torch.equal(layer(x, key=one), layer(x, key=two))
        assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_each_forward_is_differentiated_with_its_own_noise(estimator):
    layer, x = spread(nn.BayesLinear(5, 3, estimator=estimator)), torch.randn(4, 5)
    one, two = isthmus.key(1), isthmus.key(2)
    parameters = list(layer.parameters())
    together = layer(x, key=one).square().sum() + layer(x, key=two).square().sum()
    apart = [torch.autograd.grad(layer(x, key=key).square().sum(), parameters) for key in (one, two)]
    expected = [first + second for first, second in zip(*apart, strict=True)]
    torch.testing.assert_close(list(torch.autograd.grad(together, parameters)), expected)


def test_mean_only_covers_a_model_and_ends_with_the_block():
    model = torch.nn.Sequential(nn.BayesLinear(5, 4), torch.nn.Tanh(), nn.BayesLinear(4, 3))
    model[0].deterministic = True
    x = torch.randn(6, 5)
    with nn.mean_only(model):
        hidden = linear(x, model[0].weight_mean, model[0].bias_mean).tanh()
        expected = linear(hidden, model[2].weight_mean, model[2].bias_mean)
        assert torch.equal(model(x), expected)
    assert [model[0].deterministic, model[2].deterministic] == [True, False]
    with pytest.raises(RuntimeError, match="stop"), nn.mean_only(model):
        raise RuntimeError("stop")
    assert not model[2].deterministic


@pytest.mark.parametrize("scale_type", STD)
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_takes_weights_and_relative_deviations(scale_type, bias):
    linear_layer = torch.nn.Linear(5, 3, bias).double()
    with torch.no_grad():
        linear_layer.weight[0, 0] = 0.0
    layer = nn.BayesLinear.from_linear(linear_layer, relative_std=0.2, scale_type=scale_type)
    std = STD[scale_type](layer.weight_scale)
    torch.testing.assert_close(std, (0.2 * linear_layer.weight.abs()).clamp_min(1e-4))
    x = torch.randn(4, 5, dtype=torch.float64)
    with nn.mean_only(layer):
        torch.testing.assert_close(layer(x), linear_layer(x))
    assert layer.kl().isfinite()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scale_type": "std"}, "scale_type"),
        ({"estimator": "flip"}, "estimator"),
        ({"prior_std": 0.0}, "prior_std"),
        ({"init_std": -1.0}, "init_std"),
    ],
)
def test_arguments_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        nn.BayesLinear(5, 3, **options)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_training_lowers_the_negative_bound(estimator, digits):
    datasets = pytest.importorskip("sklearn.datasets")
    target = torch.tensor(datasets.load_digits().target[:512])
    torch.manual_seed(0)
    layer = nn.BayesLinear(64, 10, estimator=estimator)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)

    def loss():
        return cross_entropy(layer(digits), target) + 0.01 * layer.kl() / 512

    start = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.5 * start
    with nn.mean_only(layer):
        assert (layer(digits).argmax(-1) == target).float().mean() > 0.9
