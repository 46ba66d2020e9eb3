"""isthmus.distributions against torch.distributions, and, where torch has nothing, against samples and integrals."""

import math

import mpmath
import pytest
import torch
from torch import distributions as td
from torch.distributions import kl_divergence

import isthmus
from isthmus import distributions as d
from isthmus import ops

DOUBLE = {"dtype": torch.float64}
EXACT = {"rtol": 1e-10, "atol": 1e-12}
STD = {
    "logvar": lambda scale: torch.exp(0.5 * scale),
    "std": lambda scale: scale,
    "softplus": torch.nn.functional.softplus,
    "square": torch.square,
}
scale_types = pytest.mark.parametrize("scale_type", list(STD))


def positive(*shape, **options):
    return torch.rand(*shape, **options) + 0.5


def tril(*shape, **options):
    """Cholesky factors, well conditioned."""
    return torch.randn(*shape, shape[-1], **options).tril(-1) * 0.3 + torch.diag_embed(positive(*shape, **options))


def agrees_with_samples(kl, log_ratio):
    """A divergence is the mean of log q - log p under q, to six standard errors."""
    error = log_ratio.std(0) / math.sqrt(len(log_ratio))
    assert ((log_ratio.mean(0) - kl).abs() < 6 * error).all()


# ---- Normal ----------------------------------------------------------------------------------------------------------


def vae_step(normal, independent, seed=0):
    """A variational autoencoder as it is written on torch.distributions."""
    torch.manual_seed(seed)
    encoder, decoder = torch.nn.Linear(6, 4), torch.nn.Linear(2, 6)
    x = torch.randn(16, 6)
    mean, logvar = encoder(x).chunk(2, dim=-1)
    posterior = independent(normal(mean, (0.5 * logvar).exp()), 1)
    prior = independent(normal(torch.zeros(2), torch.ones(2)), 1)
    z = posterior.rsample()
    log_likelihood = independent(normal(decoder(z), torch.ones(6)), 1).log_prob(x)
    kl = kl_divergence(posterior, prior)
    (kl - log_likelihood).mean().backward()
    return z, kl, posterior.entropy(), encoder.weight.grad, decoder.weight.grad


@pytest.mark.parametrize("independent", (td.Independent, d.Independent), ids=("torch", "ours"))
def test_a_vae_changes_one_import(independent):
    z, kl, entropy, *grads = vae_step(d.Normal, independent)
    _, torch_kl, torch_entropy, *_ = vae_step(td.Normal, td.Independent)
    assert z.shape == (16, 2)
    torch.testing.assert_close(kl, torch_kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy, torch_entropy)
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)


@scale_types
def test_normal_equals_torch(scale_type):
    mean, scale = torch.randn(4, 3, **DOUBLE), positive(4, 3, **DOUBLE)
    q, expected = d.Normal.from_parameters(mean, scale, scale_type), td.Normal(mean, STD[scale_type](scale))
    value = torch.randn(5, 4, 3, **DOUBLE)
    torch.testing.assert_close(q.scale, expected.scale, **EXACT)
    torch.testing.assert_close(q.log_prob(value), expected.log_prob(value), **EXACT)
    torch.testing.assert_close(q.entropy(), expected.entropy(), **EXACT)
    torch.testing.assert_close(q.cdf(value), expected.cdf(value), **EXACT)
    torch.testing.assert_close(q.variance, expected.variance, **EXACT)
    for expanded in (q.expand((2, 4, 3)), td.Independent(q, 1).expand((2, 4)).base_dist):
        assert type(expanded) is d.Normal
        torch.testing.assert_close(expanded.log_prob(value[:2]), expected.log_prob(value[:2]), **EXACT)


@pytest.mark.parametrize("q_type", STD)
@pytest.mark.parametrize("p_type", [*STD, "torch"])
def test_normal_kl_equals_torch(q_type, p_type):
    q_mean, p_mean = torch.randn(2, 4, 3, **DOUBLE)
    q_scale, p_scale = positive(4, 3, **DOUBLE), positive(3, **DOUBLE)
    q, torch_q = d.Normal.from_parameters(q_mean, q_scale, q_type), td.Normal(q_mean, STD[q_type](q_scale))
    torch_p = td.Normal(p_mean, p_scale if p_type == "torch" else STD[p_type](p_scale))
    p = torch_p if p_type == "torch" else d.Normal.from_parameters(p_mean, p_scale, p_type)
    torch.testing.assert_close(kl_divergence(q, p), kl_divergence(torch_q, torch_p), **EXACT)
    torch.testing.assert_close(kl_divergence(p, q), kl_divergence(torch_p, torch_q), **EXACT)


@pytest.mark.parametrize("event_dims", (0, 1, 2))
def test_independent_equals_torch(event_dims):
    mean, std, value = torch.randn(4, 3, **DOUBLE), positive(4, 3, **DOUBLE), torch.randn(5, 4, 3, **DOUBLE)
    q, p = (d.Independent(d.Normal(m, std), event_dims) for m in (mean, 0 * mean))
    torch_q, torch_p = (td.Independent(td.Normal(m, std), event_dims) for m in (mean, 0 * mean))
    torch.testing.assert_close(q.log_prob(value), torch_q.log_prob(value), **EXACT)
    for left, right in ((q, p), (q, torch_p), (torch_q, p)):
        torch.testing.assert_close(kl_divergence(left, right), kl_divergence(torch_q, torch_p), **EXACT)
    key = isthmus.key(0)
    assert torch.equal(q.rsample((2,), key=key), q.base_dist.rsample((2,), key=key))
    assert torch.equal(q.sample((2,), key=key), q.base_dist.sample((2,), key=key))
    assert type(q.expand((2, *q.batch_shape))) is d.Independent


def test_independent_of_other_distributions():
    logits = torch.randn(4, 3, 5)
    q, p = d.Independent(d.Categorical(logits=logits), 1), d.Independent(d.Categorical(logits=0 * logits), 1)
    expected = kl_divergence(td.Categorical(logits=logits), td.Categorical(logits=0 * logits)).sum(-1)
    torch.testing.assert_close(kl_divergence(q, p), expected, rtol=1e-5, atol=1e-6)
    assert q.sample(key=isthmus.key(0)).shape == (4, 3)


def test_normal_of_numbers_and_other_divergences():
    standard = d.Normal(0.0, 1.0)
    assert standard.log_prob(torch.tensor(0.0)).item() == pytest.approx(-0.5 * math.log(2 * math.pi), rel=1e-6)
    assert standard.rsample().shape == ()
    q = d.Normal(torch.ones(2, 3), torch.full((3,), 2.0))
    torch.testing.assert_close(kl_divergence(q, standard), kl_divergence(q, td.Normal(0.0, 1.0)))
    torch.testing.assert_close(
        kl_divergence(q, td.Laplace(0.0, 1.0)), kl_divergence(td.Normal(1.0, 2.0), td.Laplace(0.0, 1.0)).expand(2, 3)
    )
    wide = torch.zeros(3, **DOUBLE)
    torch.testing.assert_close(q.log_prob(wide), td.Normal(1.0, 2.0).log_prob(wide).expand(2, 3))


def test_normal_samples_are_those_of_the_key():
    mean, logvar, key = torch.randn(4, 3), torch.randn(4, 3), isthmus.key(3)
    q = d.Normal.from_logvar(mean, logvar)
    z = q.rsample((2, 5), key=key)
    noise = ops.gaussian_noise(key, (2, 5, 4, 3))
    torch.testing.assert_close(z, mean + (0.5 * logvar).exp() * noise, rtol=1e-5, atol=1e-6)
    assert torch.equal(q.sample((2, 5), key=key), z)
    assert q.rsample((0, 2)).shape == (0, 2, 4, 3)
    draws = [q.rsample(generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not q.sample().requires_grad


def test_normal_never_forms_its_scale():
    mean, logvar = torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    q = d.Normal.from_logvar(mean, logvar)
    loss = kl_divergence(q, d.Normal.from_logvar(torch.zeros(3), torch.zeros(3))).sum() - q.log_prob(q.rsample()).sum()
    (loss + q.entropy().sum()).backward()
    assert "scale" not in q.__dict__


def test_normal_derivatives():
    mean, scale = torch.randn(3, 2, **DOUBLE).requires_grad_(), positive(3, 2, **DOUBLE).requires_grad_()
    value = torch.randn(3, 2, **DOUBLE).requires_grad_()

    def everything(mean, scale, value):
        q, p = d.Normal(mean, scale), d.Normal(value, 2 * scale)
        return q.rsample((2,), key=isthmus.key(0)), q.log_prob(value), kl_divergence(q, p), q.entropy()

    assert torch.autograd.gradcheck(everything, (mean, scale, value))
    assert torch.autograd.gradgradcheck(everything, (mean, scale, value))


def test_normal_validates():
    with pytest.raises(ValueError, match="scale"):
        d.Normal(torch.zeros(2), -torch.ones(2), validate_args=True)
    with pytest.raises(ValueError, match="scale of type 'logvar' holds NaN"):
        d.Normal.from_logvar(torch.zeros(2), torch.full((2,), math.nan), validate_args=True)
    with pytest.raises(ValueError, match="value"):
        d.Normal(torch.zeros(2), torch.ones(2), validate_args=True).log_prob(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match="scale_type is 'var'; expected one of"):
        d.Normal.from_parameters(torch.zeros(2), torch.zeros(2), "var")
    with pytest.raises(ValueError, match="key and generator were both given"):
        d.Normal(0.0, 1.0).rsample(key=isthmus.key(0), generator=torch.Generator())


def test_log_normal_equals_torch():
    loc, scale, value = torch.randn(3, **DOUBLE), positive(3, **DOUBLE), positive(5, 3, **DOUBLE)
    q, expected = d.LogNormal(loc, scale), td.LogNormal(loc, scale)
    torch.testing.assert_close(q.log_prob(value), expected.log_prob(value), **EXACT)
    torch.testing.assert_close(q.mean, expected.mean, **EXACT)
    p = d.LogNormal(0 * loc, 2 * scale)
    torch.testing.assert_close(kl_divergence(q, p), kl_divergence(expected, td.LogNormal(0 * loc, 2 * scale)), **EXACT)
    key = isthmus.key(1)
    assert torch.equal(q.sample((2,), key=key), q.base_dist.sample((2,), key=key).exp())


# ---- categoricals ----------------------------------------------------------------------------------------------------


def test_categorical_equals_torch():
    logits, other = torch.randn(2, 4, 3, 7, **DOUBLE)
    q, p = d.Categorical(logits=logits), d.Categorical(probs=other.softmax(-1))
    expected = kl_divergence(td.Categorical(logits=logits), td.Categorical(logits=other))
    for left, right in ((q, p), (q, td.Categorical(logits=other)), (td.Categorical(logits=logits), p)):
        torch.testing.assert_close(kl_divergence(left, right), expected, **EXACT)
    shared = d.Categorical(logits=other[0, 0])
    expected = kl_divergence(td.Categorical(logits=logits), td.Categorical(logits=other[:1, :1].expand(4, 3, 7)))
    torch.testing.assert_close(kl_divergence(q, shared), expected, **EXACT)
    assert type(q.expand((2, 4, 3))) is d.Categorical


def test_categorical_samples():
    q, key = d.Categorical(probs=torch.tensor([[0.1, 0.2, 0.7], [1.0, 0.0, 0.0]])), isthmus.key(0)
    drawn = q.sample((100_000,), key=key)
    assert drawn.shape == (100_000, 2)
    assert (drawn[:, 1] == 0).all()
    frequency = torch.bincount(drawn[:, 0], minlength=3) / len(drawn)
    assert (frequency - q.probs[0]).abs().max() < 0.01
    assert torch.equal(drawn, q.sample((100_000,), key=key))


def test_relaxed_one_hot_equals_its_op():
    logits, key = torch.randn(4, 5), isthmus.key(2)
    q = d.RelaxedOneHotCategorical(0.7, logits=logits)
    y = q.rsample((3,), key=key)
    expected = ops.gumbel_softmax(q.logits.expand(3, 4, 5), temperature=0.7, key=key)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7)
    same = td.RelaxedOneHotCategorical(torch.tensor(0.7), logits=logits)
    torch.testing.assert_close(q.log_prob(y), same.log_prob(y))
    assert q.expand((2, 4)).rsample().shape == (2, 4, 5)
    with pytest.raises(ValueError, match=r"temperature is a tensor of shape \[2\]"):
        d.RelaxedOneHotCategorical(torch.ones(2), logits=logits)


# ---- closed forms ----------------------------------------------------------------------------------------------------

CLOSED_FORMS = {
    "bernoulli": (d.bernoulli_kl, lambda logits: td.Bernoulli(logits=logits), 1, False),
    "laplace": (d.laplace_kl, td.Laplace, 2, True),
    "gamma": (d.gamma_kl, td.Gamma, 2, True),
    "beta": (d.beta_kl, td.Beta, 2, True),
    "dirichlet": (d.dirichlet_kl, td.Dirichlet, 1, True),
}
closed_forms = pytest.mark.parametrize("name", list(CLOSED_FORMS))


def parameters(name, size=5):
    _, _, count, is_positive = CLOSED_FORMS[name]
    draw = positive if is_positive else torch.randn
    return [draw(4, size, **DOUBLE) * (1 + 3 * i) for i in range(2 * count)]


@closed_forms
def test_closed_forms_equal_torch(name):
    kl, distribution, count, _ = CLOSED_FORMS[name]
    q, p = (values := parameters(name))[:count], values[count:]
    expected = kl_divergence(distribution(*q), distribution(*p))
    torch.testing.assert_close(kl(*q, *p), expected, **EXACT)
    if name != "dirichlet":
        torch.testing.assert_close(kl(*q, *(t[0] for t in p)), kl(*q, *(t[:1].expand(4, 5) for t in p)))


@closed_forms
def test_closed_forms_are_differentiable(name):
    kl, _, _, _ = CLOSED_FORMS[name]
    leaves = [t[:2, :3].clone().requires_grad_() for t in parameters(name)]
    assert torch.autograd.gradcheck(kl, leaves)
    near = [t.detach().clone().requires_grad_() for t in leaves[: len(leaves) // 2]]
    near += [(1.01 * t).detach().requires_grad_() for t in near]
    assert torch.autograd.gradcheck(kl, near)


def exact_closed_form(name, values):
    """The textbook form in 50 digits."""
    mp = mpmath
    if name == "bernoulli":
        q, p = (1 / (1 + mp.exp(-v)) for v in values)
        return q * mp.log(q / p) + (1 - q) * mp.log((1 - q) / (1 - p))
    if name == "laplace":
        m, s, m0, s0 = values
        t = abs(m - m0)
        return mp.log(s0 / s) + t / s0 + s / s0 * mp.exp(-t / s) - 1
    if name == "gamma":
        a, b, a0, b0 = values
        return (a - a0) * mp.digamma(a) - mp.loggamma(a) + mp.loggamma(a0) + a0 * mp.log(b / b0) + a * (b0 - b) / b
    half = len(values) // 2
    q, p = values[:half], values[half:]
    kl = mp.loggamma(sum(q)) - mp.loggamma(sum(p))
    for a, b in zip(q, p, strict=True):
        kl += mp.loggamma(b) - mp.loggamma(a) + (a - b) * (mp.digamma(a) - mp.digamma(sum(q)))
    return kl


@closed_forms
@pytest.mark.parametrize("step", (1e-2, 1e-4, 1e-6))
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float64, 1e-8), (torch.float32, 1e-3)], ids=("f64", "f32"))
def test_closed_forms_keep_their_digits_near_equality(name, step, dtype, digits):
    kl, _, count, _ = CLOSED_FORMS[name]
    size = 3 if name == "dirichlet" else 1
    q = [t[0, :size].to(dtype) for t in parameters(name)[:count]]
    p = [t * (1 + step * (i + 1) * torch.tensor([1.0, -0.5, 2.0], dtype=dtype)[:size]) for i, t in enumerate(q)]
    with mpmath.workdps(50):
        expected = float(exact_closed_form(name, [mpmath.mpf(v.item()) for t in (*q, *p) for v in t]))
    assert kl(*q, *p).item() == pytest.approx(expected, rel=digits, abs=0)


# ---- full and structured covariances ---------------------------------------------------------------------------------


def test_multivariate_normal_equals_torch():
    loc, prior_loc = torch.randn(2, 4, 3, **DOUBLE)
    factor, prior_factor = tril(4, 3, **DOUBLE), tril(3, **DOUBLE)
    q, p = d.MultivariateNormal(loc, scale_tril=factor), d.MultivariateNormal(prior_loc, scale_tril=prior_factor)
    torch_q, torch_p = (td.MultivariateNormal(x.loc, scale_tril=x.scale_tril) for x in (q, p))
    expected = kl_divergence(torch_q, torch_p)
    for left, right in ((q, p), (q, torch_p), (torch_q, p)):
        torch.testing.assert_close(kl_divergence(left, right), expected, **EXACT)
    diagonal = positive(4, 3, **DOUBLE)
    expected = kl_divergence(td.MultivariateNormal(loc, scale_tril=torch.diag_embed(diagonal)), torch_p)
    for base in (td.Normal, d.Normal):
        torch.testing.assert_close(kl_divergence(td.Independent(base(loc, diagonal), 1), p), expected, **EXACT)
    z = q.rsample((5,), key=isthmus.key(0))
    noise = ops.gaussian_noise(isthmus.key(0), (5, 4, 3), torch.float64)
    torch.testing.assert_close(z, loc + (factor @ noise.unsqueeze(-1)).squeeze(-1), **EXACT)
    assert torch.equal(q.expand((2, 4)).sample(key=isthmus.key(1)), q.sample((2,), key=isthmus.key(1)))


def test_structured_divergences_keep_their_digits_near_equality():
    """In float32, posteriors within 1e-4 of the prior: divergences of some 1e-8, right to a thousandth."""
    rows, columns, loc, step = tril(4), tril(3), torch.randn(4, 3), 1e-4
    near_rows, near_columns, near_loc = (t + step * torch.randn(t.shape).tril() for t in (rows, columns, loc))
    precision, df = torch.tensor(2.0), torch.tensor(6.0)

    def both(dtype):
        cast = [t.to(dtype) for t in (rows, columns, loc, near_rows, near_columns, near_loc, precision, df)]
        rows_, columns_, loc_, near_rows_, near_columns_, near_loc_, precision_, df_ = cast
        return (
            d.multivariate_normal_kl(near_loc_[:, 0], near_rows_, loc_[:, 0], rows_),
            kl_divergence(d.MatrixNormal(near_loc_, near_rows_, near_columns_), d.MatrixNormal(loc_, rows_, columns_)),
            kl_divergence(
                d.NormalInverseWishart(near_loc_[:, 0], precision_ * (1 + 2**-12), near_rows_, df_ * (1 + 2**-13)),
                d.NormalInverseWishart(loc_[:, 0], precision_, rows_, df_),
            ),
        )

    for found, expected in zip(both(torch.float32), both(torch.float64), strict=True):
        assert 0 < expected < 1e-5
        assert found.item() == pytest.approx(expected.item(), rel=1e-3, abs=0)


def vectorized(q):
    """The matrix normal as a Gaussian of the columns, stacked."""
    rows, columns = q.row_scale_tril[..., None, :, None, :], q.column_scale_tril[..., :, None, :, None]
    size = math.prod(q.event_shape)
    factor = (rows * columns).reshape(*q.batch_shape, size, size)
    return td.MultivariateNormal(q.loc.mT.flatten(-2), scale_tril=factor)


def test_matrix_normal_equals_its_vectorization():
    loc, prior_loc = torch.randn(2, 2, 4, 3, **DOUBLE)
    q = d.MatrixNormal(loc, tril(2, 4, **DOUBLE), tril(3, **DOUBLE), validate_args=True)
    p = d.MatrixNormal(prior_loc, tril(4, **DOUBLE), tril(2, 3, **DOUBLE))
    torch.testing.assert_close(kl_divergence(q, p), kl_divergence(vectorized(q), vectorized(p)), **EXACT)
    torch.testing.assert_close(q.entropy(), vectorized(q).entropy(), **EXACT)
    torch.testing.assert_close(q.variance.mT.flatten(-2), vectorized(q).variance, **EXACT)
    x = q.rsample((5,), key=isthmus.key(0))
    torch.testing.assert_close(q.log_prob(x), vectorized(q).log_prob(x.mT.flatten(-2)), **EXACT)
    assert q.expand((3, 2)).log_prob(x[:3]).shape == (3, 2)


def test_matrix_normal_samples_have_its_covariance():
    q = d.MatrixNormal(torch.randn(3, 2, **DOUBLE), tril(3, **DOUBLE), tril(2, **DOUBLE))
    x = q.sample((200_000,), key=isthmus.key(0)).mT.flatten(-2)
    torch.testing.assert_close(x.T.cov(), vectorized(q).covariance_matrix, rtol=0, atol=0.04)
    torch.testing.assert_close(x.mean(0), q.loc.mT.flatten(), rtol=0, atol=0.02)


def test_matrix_normal_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"column_scale_tril has shape \[3, 3\]; expected \[..., \[2, 2\]\]"):
        d.MatrixNormal(torch.zeros(3, 2), torch.eye(3), torch.eye(3))


def covariance(std, factor):
    return torch.diag_embed(std.square()) + factor @ factor.mT


@scale_types
@pytest.mark.parametrize("rank", (1, 3))
def test_low_rank_kl_equals_torch(scale_type, rank):
    mean, scale, factor = torch.randn(4, 5, **DOUBLE), positive(4, 5, **DOUBLE), torch.randn(4, 5, rank, **DOUBLE)
    q = td.MultivariateNormal(mean, covariance(STD[scale_type](scale), factor))
    expected = kl_divergence(q, td.MultivariateNormal(torch.zeros(5, **DOUBLE), torch.eye(5, **DOUBLE)))
    torch.testing.assert_close(d.low_rank_kl(mean, scale, factor, scale_type=scale_type), expected, **EXACT)
    leaves = [t.requires_grad_() for t in (mean, scale, factor)]
    assert torch.autograd.gradcheck(lambda *t: d.low_rank_kl(*t, scale_type=scale_type), leaves)


def test_low_rank_kl_near_the_standard_normal():
    mean, logvar, factor = (1e-3 * torch.randn(shape) for shape in ((5,), (5,), (5, 2)))
    expected = d.low_rank_kl(mean.double(), logvar.double(), factor.double())
    assert d.low_rank_kl(mean, logvar, factor).item() == pytest.approx(expected.item(), rel=1e-3)
    stacked = td.MultivariateNormal(mean.double(), covariance((0.5 * logvar.double()).exp(), factor.double()))
    textbook = kl_divergence(stacked, td.MultivariateNormal(torch.zeros(5, **DOUBLE), torch.eye(5, **DOUBLE)))
    assert expected.item() == pytest.approx(textbook.item(), rel=1e-6)


def test_low_rank_samples():
    mean, logvar, factor, key = torch.randn(3), torch.randn(3), torch.randn(3, 2), isthmus.key(7)
    z = d.low_rank_sample(mean, logvar, factor, num_samples=400_000, key=key)
    torch.testing.assert_close(z.T.cov(), covariance((0.5 * logvar).exp(), factor), rtol=0, atol=0.06)
    torch.testing.assert_close(z.mean(0), mean, rtol=0, atol=0.02)
    assert torch.equal(z, d.low_rank_sample(mean, logvar, factor, num_samples=400_000, key=key))
    assert d.low_rank_sample(torch.zeros(4, 3), torch.zeros(4, 3), factor).shape == (4, 3)
    with pytest.raises(ValueError, match=r"factor has shape \[3\]; expected \[..., 3, R\]"):
        d.low_rank_sample(mean, logvar, mean)


def test_low_rank_normal_equals_torch():
    loc, factor, diagonal = torch.randn(4, 3, **DOUBLE), torch.randn(4, 3, 2, **DOUBLE), positive(4, 3, **DOUBLE)
    q, same = (kind(loc, factor, diagonal) for kind in (d.LowRankMultivariateNormal, td.LowRankMultivariateNormal))
    key = isthmus.key(3)
    z = q.rsample((2, 5), key=key)
    expected = d.low_rank_sample(loc, diagonal.log(), factor, num_samples=10, key=key)
    torch.testing.assert_close(z, expected.view(2, 5, 4, 3), **EXACT)
    torch.testing.assert_close(q.log_prob(z), same.log_prob(z), **EXACT)
    torch.testing.assert_close(kl_divergence(q, same), torch.zeros(4, **DOUBLE), **EXACT)
    assert q.expand((2, 4)).sample().shape == (2, 4, 3)
    assert q.sample((0,)).shape == (0, 4, 3)


# ---- products of experts ---------------------------------------------------------------------------------------------


@scale_types
@pytest.mark.parametrize("prior", ("none", "standard", "given"))
def test_product_of_experts_multiplies_densities(scale_type, prior):
    """The log-densities of the experts add up to that of the product, but for a constant."""
    means, scales = torch.randn(3, 4, **DOUBLE), positive(3, 4, **DOUBLE)
    given = torch.randn(4, **DOUBLE), positive(4, **DOUBLE)
    option = {"none": False, "standard": True, "given": given}[prior]
    mean, scale = d.product_of_experts(means, scales, scale_type=scale_type, prior=option)
    experts = [d.Normal.from_parameters(m, s, scale_type) for m, s in zip(means, scales, strict=True)]
    experts += {"none": [], "standard": [d.Normal(0.0, 1.0)], "given": [d.Normal.from_parameters(*given, scale_type)]}[
        prior
    ]
    x = torch.linspace(-3, 3, 7, **DOUBLE).unsqueeze(-1).expand(7, 4)
    total = sum(td.Normal(e.loc, e.scale).log_prob(x) for e in experts)
    difference = total - d.Normal.from_parameters(mean, scale, scale_type).log_prob(x)
    torch.testing.assert_close(difference, difference[:1].expand(7, 4), rtol=0, atol=1e-10)


@scale_types
def test_missing_experts_have_no_influence(scale_type):
    means, scales = torch.randn(4, 3, 2, **DOUBLE), positive(4, 3, 2, **DOUBLE)
    mask = torch.tensor([True, False, True])
    expected = d.product_of_experts(means[:, mask], scales[:, mask], dim=1, scale_type=scale_type)
    means[:, 1], scales[:, 1] = math.nan, -1.0 if scale_type == "std" else math.nan
    means.requires_grad_()
    scales.requires_grad_()
    found = d.product_of_experts(means, scales, mask[:, None], dim=1, scale_type=scale_type)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, **EXACT)
    for grad in torch.autograd.grad(sum(t.sum() for t in found), (means, scales)):
        assert grad.isfinite().all()
        assert (grad[:, 1] == 0).all()


def test_no_expert_and_extreme_experts():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    mean, logvar = d.product_of_experts(torch.ones(2, 3), torch.zeros(2, 3), nothing, prior=False)
    assert (mean == 0).all() and (logvar == math.inf).all()
    means = torch.tensor([1.0, -1.0])
    mean, logvar = d.product_of_experts(means, torch.tensor([-200.0, 200.0]), prior=False)
    assert mean == 1 and logvar == -200
    mean, logvar = d.product_of_experts(means, torch.tensor([300.0, 300.0]), prior=False)
    assert mean == 0 and logvar.item() == pytest.approx(300 - math.log(2))


# ---- normal-inverse-Wishart ------------------------------------------------------------------------------------------


def random_niw(batch, dim):
    return d.NormalInverseWishart(
        torch.randn(batch, dim, **DOUBLE),
        positive(batch, **DOUBLE),
        tril(batch, dim, **DOUBLE),
        dim + 4 + 3 * torch.rand(batch, **DOUBLE),
        validate_args=True,
    )


def test_niw_density_is_that_of_its_parts():
    """Normal times Wishart of the inverse, whose volume element is det(covariance)^-(D + 1)."""
    q = random_niw(2, 3)
    mean, sigma = q.sample((5,), key=isthmus.key(0))
    normal = td.MultivariateNormal(q.loc, sigma / q.precision[:, None, None]).log_prob(mean)
    psi = q.scale_tril @ q.scale_tril.mT
    wishart = td.Wishart(q.df, precision_matrix=psi).log_prob(torch.linalg.inv(sigma))
    torch.testing.assert_close(q.log_prob((mean, sigma)), normal + wishart - 4 * sigma.logdet(), rtol=1e-8, atol=1e-8)


def test_niw_samples_have_its_moments():
    q = d.NormalInverseWishart(torch.tensor([1.0, -2.0]), torch.tensor(2.0), tril(2), torch.tensor(9.5))
    mean, sigma = q.sample((100_000,), key=isthmus.key(0))
    expected_mean, expected_sigma = q.mean
    torch.testing.assert_close(mean.mean(0), expected_mean, rtol=0, atol=0.01)
    torch.testing.assert_close(sigma.mean(0), expected_sigma, rtol=0, atol=0.01)
    # The mean's own covariance is E[covariance] / precision.
    torch.testing.assert_close(mean.T.cov(), expected_sigma / 2, rtol=0, atol=0.01)
    again = q.sample((100_000,), key=isthmus.key(0))
    assert all(map(torch.equal, (mean, sigma), again))
    assert not torch.equal(mean, q.sample((100_000,), generator=torch.Generator().manual_seed(1))[0])


def test_niw_divergence_agrees_with_samples():
    q, p = random_niw(3, 2), random_niw(3, 2)
    value = q.sample((100_000,), key=isthmus.key(0))
    agrees_with_samples(kl_divergence(q, p), q.log_prob(value) - p.log_prob(value))
    torch.testing.assert_close(kl_divergence(q, q), torch.zeros(3, **DOUBLE))
    assert torch.equal(kl_divergence(q.expand((2, 3)), p), kl_divergence(q, p).expand(2, 3))


def test_niw_refuses():
    with pytest.raises(ValueError, match=r"df is as low as 1\.0; expected more than D - 1 = 2"):
        d.NormalInverseWishart(torch.zeros(3), torch.tensor(1.0), torch.eye(3), torch.tensor(1.0), validate_args=True)
    with pytest.raises(ValueError, match=r"scale_tril has shape \[2, 2\]; expected \[..., 3, 3\]"):
        d.NormalInverseWishart(torch.zeros(3), torch.tensor(1.0), torch.eye(2), torch.tensor(5.0))
