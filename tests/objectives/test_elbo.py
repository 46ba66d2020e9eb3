import pytest
import torch
from torch.distributions import Normal, kl_divergence

from isthmus import objectives, ops


def double(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_negative_elbo_bounds_the_evidence_and_is_tight_at_the_posterior():
    # p(z) = N(0, 1), p(x | z) = N(z, 1): the evidence is N(0, 2), the posterior of x is N(x / 2, 1/2).
    x = torch.linspace(-3, 3, 7, dtype=torch.float64).unsqueeze(-1)
    evidence = Normal(0.0, 2.0**0.5).log_prob(x).squeeze(-1)

    def loss(mean, variance):
        expected_square = (x - mean).square() + variance
        nll = 0.5 * (expected_square + torch.log(torch.tensor(2 * torch.pi))).sum(-1)
        return objectives.negative_elbo(nll, ops.gaussian_kl(mean, variance.log().expand_as(mean)))

    half = torch.tensor(0.5, dtype=torch.float64)
    torch.testing.assert_close(loss(x / 2, half), -evidence)
    assert (loss(x / 3, half) > -evidence + 1e-3)[x.squeeze(-1) != 0].all()
    assert (loss(x / 2, 2 * half) > -evidence + 1e-3).all()


def test_beta_weighs_the_divergence_alone():
    nll, kl = double(1.0, 2.0), double(3.0, 4.0)
    objectives.negative_elbo(nll, kl, beta=5.0).sum().backward()
    assert nll.grad.tolist() == [1.0, 1.0]
    assert kl.grad.tolist() == [5.0, 5.0]


@pytest.mark.parametrize(("capacity", "sign"), [(1.0, 1.0), (5.0, -1.0)])
def test_capacity_pulls_the_mean_divergence_to_the_capacity(capacity, sign):
    kl = double(2.0, 4.0)
    penalty = objectives.capacity_penalty(kl, capacity, gamma=10.0)
    assert penalty.item() == 10.0 * abs(3.0 - capacity)
    penalty.backward()
    assert kl.grad.tolist() == [sign * 5.0, sign * 5.0]


def test_joint_vae_sets_each_kind_of_latent_its_own_capacity():
    nll, continuous, discrete = double(9.0, 11.0), double(3.0, 5.0), double(0.2, 0.4)
    loss = objectives.joint_vae_loss(
        nll, continuous, discrete, capacity_continuous=1.0, capacity_discrete=0.5, gamma=10.0
    )
    assert loss.item() == pytest.approx(10.0 + 10.0 * 3.0 + 10.0 * 0.2)
    loss.backward()
    assert continuous.grad.tolist() == [5.0, 5.0]
    assert discrete.grad.tolist() == [-5.0, -5.0]


def test_free_bits_give_no_gradient_below_the_floor():
    kl = torch.tensor([[0.1, 3.0], [0.3, 1.0]], requires_grad=True)
    objectives.free_bits(kl, 0.5).backward()
    assert kl.grad.tolist() == [[0.0, 0.5], [0.0, 0.5]]


def test_free_bits_of_a_sample_are_not_lent_to_another():
    # The mean of the dimension is above the floor, its first entry below.
    kl = torch.tensor([[0.1], [3.0]], requires_grad=True)
    loss = objectives.free_bits(kl, 0.5, per_sample=True)
    torch.testing.assert_close(loss, torch.tensor([0.5, 3.0]))
    loss.sum().backward()
    assert kl.grad.tolist() == [[0.0], [1.0]]
    assert objectives.free_bits(kl, 0.5).item() == pytest.approx(1.55)


def test_free_bits_of_groups():
    kl = torch.rand(3, 5, 6, dtype=torch.float64)
    means = kl.mean((0, 1))
    expected = sum(max(1.2, (means[a] + means[a + 1]).item()) for a in (0, 2, 4))
    assert objectives.free_bits(kl, 1.2, groups=3).item() == pytest.approx(expected)
    assert objectives.free_bits(kl, 0.0).item() == pytest.approx(means.sum().item())
    assert objectives.free_bits(kl, 100.0, groups=1).item() == 100.0


def test_free_bits_refuse_divergences_that_are_already_summed():
    with pytest.raises(ValueError, match=r"kl has shape \[4\]; expected \[..., D\]"):
        objectives.free_bits(torch.rand(4), 0.5)
    with pytest.raises(ValueError, match="groups is 4; expected a divisor of the 6"):
        objectives.free_bits(torch.rand(2, 6), 0.5, groups=4)
    with pytest.raises(ValueError, match="floor is -1"):
        objectives.free_bits(torch.rand(2, 6), -1.0)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_balanced_kl_has_the_gradients_of_the_two_stopped_terms(share):
    tensors = torch.randn(4, 3, 5, dtype=torch.float64).requires_grad_().unbind()
    posterior, prior = tensors[:2], tensors[2:]

    def gaussian(mean, logvar):
        return Normal(mean, (logvar / 2).exp())

    to_prior = kl_divergence(gaussian(*(t.detach() for t in posterior)), gaussian(*prior)).sum(-1)
    to_posterior = kl_divergence(gaussian(*posterior), gaussian(*(t.detach() for t in prior))).sum(-1)
    expected = share * to_prior + (1 - share) * to_posterior
    actual = objectives.balanced_kl(ops.gaussian_kl, posterior, prior, prior_share=share)
    torch.testing.assert_close(actual, expected)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(actual @ weights, tensors), torch.autograd.grad(expected @ weights, tensors)
    )


def test_balanced_kl_does_not_change_the_value():
    tensors = torch.randn(4, 3, 5).unbind()
    balanced = objectives.balanced_kl(ops.gaussian_kl, tensors[:2], tensors[2:], prior_share=0.1)
    assert torch.equal(balanced, ops.gaussian_kl(*tensors))


def test_bits_per_dim():
    # A uniform density on [0, 1] in every dimension: log₂ 256 bits for one of 256 levels.
    assert objectives.bits_per_dim(torch.zeros(2), 12, bin_width=1 / 256).tolist() == [8.0, 8.0]
    # The same as a probability of each level.
    nats = 12 * torch.tensor(256.0).log()
    torch.testing.assert_close(objectives.bits_per_dim(nats, 12), torch.tensor(8.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: objectives.capacity_penalty(torch.ones(2), -1.0), "capacity is -1.0"),
        (lambda: objectives.balanced_kl(ops.gaussian_kl, (), (), prior_share=1.5), "prior_share is 1.5"),
        (lambda: objectives.bits_per_dim(torch.ones(2), 0), "num_dims is 0"),
        (lambda: objectives.bits_per_dim(torch.ones(2), 1, bin_width=0.0), "bin_width is 0.0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- the same inside the op ------------------------------------------------------------------------------------------


def gaussians(*shape):
    return torch.randn(4, *shape, dtype=torch.float64).requires_grad_().unbind()


IN_THE_OP = {
    "beta": (
        lambda kl: objectives.negative_elbo(torch.zeros(5), kl.sum(-1), beta=7.0),
        {"beta": 7.0},
    ),
    "capacity": (
        lambda kl: objectives.capacity_penalty(kl.sum(-1), 3.0, gamma=7.0),
        {"reduction": "mean", "capacity": 3.0, "beta": 7.0},
    ),
    "free_bits": (
        lambda kl: objectives.free_bits(kl, 2.0),
        {"reduction": "dim", "free_bits": 2.0},
    ),
    "free_bits_of_samples": (
        lambda kl: objectives.free_bits(kl, 4.0, groups=2, per_sample=True),
        {"reduction": "group", "groups": 2, "free_bits": 4.0},
    ),
}


@pytest.mark.parametrize(("composed", "options"), IN_THE_OP.values(), ids=IN_THE_OP)
def test_the_op_does_the_same_in_its_pass(composed, options):
    tensors = gaussians(5, 6)
    expected = composed(ops.gaussian_kl(*tensors, reduction="none")).sum()
    inside = ops.gaussian_kl(*tensors, **options).sum()
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(torch.autograd.grad(inside, tensors), torch.autograd.grad(expected, tensors))


def test_the_op_balances_alike():
    tensors = gaussians(5, 6)
    expected = objectives.balanced_kl(ops.gaussian_kl, tensors[:2], tensors[2:], prior_share=0.7)
    inside = ops.gaussian_kl(*tensors, balance=0.7)
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(torch.autograd.grad(inside.sum(), tensors), torch.autograd.grad(expected.sum(), tensors))
