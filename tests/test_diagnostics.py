"""Diagnostics of latent codes, and the posterior collapse that linear models are known to have."""

import math

import pytest
import torch
from torch import nn

import isthmus
from isthmus import diagnostics, objectives, ops

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(logvar, num=256):
    return logvar.expand(num, -1)


# ---- each diagnostic -------------------------------------------------------------------------------------------------


def test_active_units_count_the_means_that_move():
    mean = torch.randn(4000, 3) * torch.tensor([1.0, 0.2, 0.05]) + torch.tensor([0.0, 0.0, 5.0])
    assert diagnostics.active_units(mean).tolist() == [True, True, False]
    assert diagnostics.active_units(mean, threshold=0.1).tolist() == [True, False, False]


def test_code_histogram_counts_what_was_chosen():
    indices = torch.randint(-1, 9, (4, 5, 6))
    counts = diagnostics.code_histogram(indices, 12)
    assert torch.equal(counts, indices[indices >= 0].bincount(minlength=12).float())
    assert diagnostics.code_usage(counts) == (counts > 0).sum() / 12


def test_perplexity_is_the_number_of_codes_in_even_use():
    counts = torch.zeros(3, 16)
    counts[0, 3] = 7
    counts[1, ::2] = 5
    counts[2] = torch.rand(16) + 0.1
    found = diagnostics.perplexity(counts)
    entropy = torch.distributions.Categorical(probs=counts[2]).entropy()
    torch.testing.assert_close(found, torch.stack([torch.tensor(1.0), torch.tensor(8.0), entropy.exp()]))
    assert diagnostics.code_usage(counts).tolist() == [1 / 16, 0.5, 1.0]
    assert diagnostics.perplexity(torch.zeros(4)).isnan()


@pytest.mark.parametrize("scale_type", ["logvar", "std", "softplus", "square"])
def test_kl_per_dimension_adds_up_to_the_mean_divergence(scale_type):
    mean, prior_mean = torch.randn(2, 50, 4, dtype=torch.float64).unbind()
    scale, prior_scale = torch.rand(2, 50, 4, dtype=torch.float64).add(0.5).unbind()
    arguments = (mean, scale, prior_mean, prior_scale)
    table = diagnostics.kl_per_dimension(*arguments, scale_type=scale_type)
    assert table.shape == (4,)
    torch.testing.assert_close(table.sum(), ops.gaussian_kl(*arguments, scale_type=scale_type, reduction="mean"))


def test_mutual_information_of_a_gaussian_channel():
    # x ~ N(0, 1) and z = a x + s e give I(x; z) = log(1 + a² / s²) / 2. The x are quantiles of the normal.
    x = torch.special.ndtri((torch.arange(1500, dtype=torch.float64) + 0.5) / 1500).unsqueeze(-1)
    gain, std = torch.tensor([2.0, 0.5, 0.0]).double(), torch.tensor([1.0, 0.5, 1.0]).double()
    expected = 0.5 * torch.log1p((gain / std).square()).sum()
    # Dimensions of their own x: shuffled, they are independent of each other.
    mean = torch.cat([x[torch.randperm(len(x))] for _ in gain], dim=-1) * gain
    estimate = diagnostics.mutual_information(mean[:, :1], std[:1].expand(1500, 1), scale_type="std", num_samples=4)
    assert estimate.item() == pytest.approx(0.5 * math.log(5.0), abs=0.03)
    estimate = diagnostics.mutual_information(mean, std.expand(1500, 3), scale_type="std", key=isthmus.key(1))
    assert estimate.item() == pytest.approx(expected.item(), abs=0.1)


def test_mutual_information_is_between_zero_and_log_n():
    # Far from the origin and in half precision too, where a rounded z is no exact sample any more.
    for dtype in (torch.float32, torch.bfloat16):
        apart = 1e3 * torch.arange(8.0).unsqueeze(-1).to(dtype)
        information = diagnostics.mutual_information(apart, torch.zeros_like(apart))
        assert information.item() == pytest.approx(math.log(8), rel=1e-6)
        same = torch.full((8, 2), 1e3, dtype=dtype)
        assert diagnostics.mutual_information(same, torch.zeros_like(same)).item() == pytest.approx(0.0, abs=1e-5)


def code_with_every_kind(num=1000):
    """An active, a passive and a mixed dimension: the last is used by 40 % of the inputs."""
    used = torch.arange(num) % 5 < 2
    mean = torch.randn(num, 3)
    mean[:, 1] = 0.0
    mean[~used, 2] = 0.0
    logvar = torch.full((num, 3), -4.0)
    logvar[:, 1] = 0.0
    logvar[~used, 2] = 0.0
    return mean, logvar


def test_dimensions_are_told_apart_by_who_uses_them():
    mean, logvar = code_with_every_kind()
    usage = diagnostics.dimension_usage(mean, logvar)
    torch.testing.assert_close(usage, torch.tensor([1.0, 0.0, 0.4]))
    assert diagnostics.classify_dimensions(usage) == ["active", "passive", "mixed"]
    assert diagnostics.classify_dimensions(usage, tolerance=0.5) == ["active", "passive", "passive"]


def test_report_agrees_with_the_samples(tmp_path):
    mean, logvar = code_with_every_kind()
    report = diagnostics.collapse_report(mean, logvar, key=isthmus.key(0))
    z = ops.gaussian_sample(mean, logvar, num_samples=50, key=isthmus.key(1)).flatten(0, 1)
    torch.testing.assert_close(report.sample_variance, z.var(0), rtol=0.03, atol=0)
    torch.testing.assert_close(report.mean_variance, mean.var(0, correction=0))
    assert report.num_data == 1000
    assert report.mutual_information <= min(math.log(1000), report.kl.sum().item() + 0.05)
    lines = str(report).splitlines()
    assert lines[0] == "3 dimensions: 1 active, 1 mixed, 1 passive"
    # One line for each dimension, the most informative first.
    assert [line.split()[0] for line in lines[4:]] == ["0", "2", "1"]
    assert [line.split()[-1] for line in lines[4:]] == ["active", "mixed", "passive"]


def test_report_is_drawn_to_a_file(tmp_path):
    pytest.importorskip("matplotlib")
    report = diagnostics.collapse_report(*code_with_every_kind(100))
    report.plot(tmp_path / "collapse.png")
    assert (tmp_path / "collapse.png").read_bytes().startswith(b"\x89PNG")


def test_reports_take_no_gradients_and_half_types():
    mean, logvar = (t.bfloat16().requires_grad_() for t in code_with_every_kind(100))
    report = diagnostics.collapse_report(mean, logvar)
    assert not report.kl.requires_grad
    assert report.kl.dtype == report.sample_variance.dtype == torch.float32


@pytest.mark.parametrize("shape", [(5,), (1, 3), (2, 3, 4)])
def test_what_is_no_data_set_is_refused(shape):
    with pytest.raises(ValueError, match="mean has shape"):
        diagnostics.collapse_report(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(ValueError, match="mean has shape"):
        diagnostics.active_units(torch.zeros(shape))


# ---- collapse of linear models ---------------------------------------------------------------------------------------


def data_with_eigenvalues(values, num=256):
    """Rows whose covariance has exactly these eigenvalues, along random directions."""
    dim = len(values)
    noise = torch.randn(num, dim, dtype=torch.float64)
    white = torch.linalg.qr(noise - noise.mean(0)).Q * math.sqrt(num)
    rotation = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64)).Q
    return white * torch.tensor(values, dtype=torch.float64).sqrt() @ rotation


def linear(dim):
    return nn.Linear(dim, dim, bias=False, dtype=torch.float64)


def minimise(loss, parameters, steps):
    optimizer = torch.optim.Adam(parameters)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = objectives.schedules.cosine(step, steps, start=0.02, end=0.0)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def test_linear_vae_collapses_where_the_data_vary_less_than_the_noise():
    """A latent direction survives iff its eigenvalue λ of the data covariance exceeds the decoder's variance σ².

    p(z) = N(0, I), p(x | z) = N(W z, σ² I), q(z | x) = N(V x, diag s²). In the eigenbasis of the data all directions
    are alike: x has variance λ, x = w z, z has mean v x and variance s². Up to constants the loss of one is

        [λ (1 − w v)² + w² s²] / (2 σ²) + [v² λ + s² − 1 − log s²] / 2

    For given w the exact posterior is optimal, s² = σ² / (w² + σ²), v = w / (w² + σ²), and what is left is minus the
    likelihood of a Gaussian with variance w² + σ²:

        λ / (2 (w² + σ²)) + ½ log(w² + σ²),    with minimum at w² = max(0, λ − σ²).

    So for λ ≤ σ² the direction collapses, w = v = 0 and s² = 1; else s² = σ² / λ, the means have variance 1 − σ² / λ,
    and KL = ½ log(λ / σ²). (Tipping & Bishop 1999; Lucas et al. 2019, arXiv 1911.02469.)
    """
    eigenvalues = (4.0, 2.5, 1.6, 0.6, 0.3, 0.1)
    noise_variance = 1.0
    x = data_with_eigenvalues(eigenvalues)
    encoder, decoder = linear(6), linear(6)
    logvar = torch.zeros(6, dtype=torch.float64, requires_grad=True)

    def loss():
        z, kl = ops.gaussian_sample_kl(encoder(x), rows(logvar))
        nll = (x - decoder(z)).square().sum(-1) / (2 * noise_variance)
        return objectives.negative_elbo(nll, kl).mean()

    minimise(loss, [*encoder.parameters(), *decoder.parameters(), logvar], steps=1000)
    report = diagnostics.collapse_report(encoder(x), rows(logvar))
    assert diagnostics.active_units(encoder(x)).sum() == 3
    assert report.kinds.count("active") == report.kinds.count("passive") == 3
    expected = torch.tensor([max(0.0, 0.5 * math.log(value / noise_variance)) for value in eigenvalues])
    torch.testing.assert_close(report.kl.sort(descending=True).values, expected.double(), atol=0.02, rtol=0)


def test_linear_hierarchical_vae_collapses_level_by_level():
    """Two levels with a fixed width at the first: each level has a threshold of its own.

    q(z₁ | x) = N(W x, s² I) with s fixed, q(z₂ | z₁) = N(V z₁, diag t²); p(x | z₁) = N(U z₁, σ² I), p(z₁ | z₂) =
    N(R z₂, η² I), p(z₂) = N(0, I). For one direction with data variance λ, the second level at its exact posterior
    leaves the marginal p(z₁) = N(0, τ²), τ² = r² + η² ≥ η². With v = w² λ + s², the variance of z₁ under q, and the
    best decoder u = w λ / v, the loss is, up to constants,

        λ s² / (2 σ² v) + ½ (v / τ² + log τ²),    v ≥ s².

    The best τ² is max(η², v). While the second level is collapsed (τ = η) the minimum is at v = s η √λ / σ, clipped at
    s²: the first level is active iff λ > σ² s² / η². The second wakes when v passes η²: iff λ > σ² η² / s². Then
    v = τ² = λ s² / σ², and the means of q(z₂) have variance r² / τ² = 1 − η² / τ².

    Nothing depends on a rotation of z₁, so its directions are those of the covariance of its means. (Such models are
    the subject of Dang et al. 2024, arXiv 2306.05023.)
    """
    eigenvalues = (6.0, 3.5, 1.2, 0.7, 0.2)
    encoder_variance, prior_variance = 0.5, 1.0  # s² and η²; σ = 1
    first_active = sum(value > encoder_variance / prior_variance for value in eigenvalues)
    second_active = sum(value > prior_variance / encoder_variance for value in eigenvalues)
    assert (first_active, second_active) == (4, 2)

    x = data_with_eigenvalues(eigenvalues)
    up, up_again, down_again, down = layers = [linear(5) for _ in range(4)]
    fixed = torch.full_like(x, math.log(encoder_variance))
    logvar = torch.zeros(5, dtype=torch.float64, requires_grad=True)

    def loss():
        z1 = ops.gaussian_sample(up(x), fixed)
        z2, kl2 = ops.gaussian_sample_kl(up_again(z1), rows(logvar))
        # The entropy of q(z₁ | x) is a constant: what is left of its divergence is the cross entropy.
        cross_entropy = (z1 - down_again(z2)).square().sum(-1) / (2 * prior_variance)
        return objectives.negative_elbo((x - down(z1)).square().sum(-1) / 2 + cross_entropy, kl2).mean()

    minimise(loss, [*(p for layer in layers for p in layer.parameters()), logvar], steps=1500)
    with torch.no_grad():
        means = up(x)
        principal = means @ torch.linalg.eigh(means.mT @ means).eigenvectors
        assert diagnostics.active_units(principal).sum() == first_active
        deeper = up_again(ops.gaussian_sample(means, fixed))
        assert diagnostics.active_units(deeper).sum() == second_active

    s, eta = math.sqrt(encoder_variance), math.sqrt(prior_variance)
    spread = [encoder_variance * v if v > eta**2 / s**2 else max(s**2, s * eta * math.sqrt(v)) for v in eigenvalues]
    expected = torch.tensor(spread, dtype=torch.float64) - encoder_variance
    torch.testing.assert_close(principal.var(0, correction=0).flip(0), expected, atol=0.03, rtol=0.03)
