import itertools

import numpy
import pytest
import torch

import isthmus
from isthmus import objectives


def cheapest_pairing(x, y, p):
    """min over permutations of the mean cost, by looking at all of them."""
    cost = torch.cdist(x, y) ** p
    rows = range(len(x))
    return min(sum(cost[i, j] for i, j in zip(rows, columns, strict=True)) for columns in itertools.permutations(rows))


def samples(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- directions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3, 5, 16])
@pytest.mark.parametrize("key", [None, isthmus.key(3)])
def test_quasi_directions_are_unit_vectors_spread_evenly(dim, key):
    directions = objectives.quasi_directions(512, dim, key, torch.float64)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(512, dtype=torch.float64))
    second_moment = directions.mT @ directions / 512
    torch.testing.assert_close(second_moment, torch.eye(dim, dtype=torch.float64) / dim, atol=0.01, rtol=0)


def test_a_key_rotates_quasi_directions():
    fixed = objectives.quasi_directions(32, 4)
    assert torch.equal(fixed, objectives.quasi_directions(32, 4))
    turned = objectives.quasi_directions(32, 4, isthmus.key(1))
    assert not torch.allclose(fixed, turned)
    torch.testing.assert_close(turned @ turned.mT, fixed @ fixed.mT)


def test_rotated_quasi_directions_are_unbiased():
    keys = isthmus.split(isthmus.key(5), 400)
    first = torch.stack([objectives.quasi_directions(1, 3, key, torch.float64)[0] for key in keys])
    # A uniform direction has mean 0 and second moment I / 3; 400 of them, to 4 standard errors.
    assert first.mean(0).abs().max() < 4 * (1 / 3 / 400) ** 0.5
    assert (first.mT @ first / 400 - torch.eye(3) / 3).abs().max() < 4 * (4 / 45 / 400) ** 0.5


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_quasi_monte_carlo_has_the_smaller_error(dim):
    x, y = samples(30, dim), samples(30, dim, seed=1) * torch.linspace(0.5, 2.0, dim, dtype=torch.float64)
    truth = objectives.sliced_wasserstein(x, y, objectives.quasi_directions(20_000, dim, dtype=torch.float64))

    def error(make):
        keys = isthmus.split(isthmus.key(dim), 20)
        estimates = [objectives.sliced_wasserstein(x, y, make(64, dim, key, torch.float64)) for key in keys]
        return (torch.stack(estimates) - truth).square().mean().sqrt()

    assert error(objectives.quasi_directions) < 0.7 * error(objectives.random_directions)


# ---- sliced Wasserstein ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_projected_cost_is_the_cheapest_pairing_on_the_line(p):
    x, y = samples(5, 3), samples(5, 3, seed=1)
    directions = objectives.random_directions(4, 3, isthmus.key(0), torch.float64)
    expected = sum(cheapest_pairing((x @ d).unsqueeze(-1), (y @ d).unsqueeze(-1), p) / 5 for d in directions)
    torch.testing.assert_close(objectives.sliced_wasserstein(x, y, directions, p=p), expected / 4)


@pytest.mark.parametrize(("n", "m"), [(6, 4), (3, 9), (1, 5), (7, 3)])
def test_unequal_sizes_are_equal_sizes_with_repeated_points(n, m):
    x, y = samples(n, 3), samples(m, 3, seed=1)
    directions = objectives.random_directions(8, 3, isthmus.key(0), torch.float64)
    repeated = objectives.sliced_wasserstein(x.repeat(m, 1), y.repeat(n, 1), directions)
    torch.testing.assert_close(objectives.sliced_wasserstein(x, y, directions), repeated)


@pytest.mark.parametrize("dim", [2, 3, 6])
def test_a_translation_costs_its_square_over_the_dimension(dim):
    x, shift = samples(20, dim), samples(dim, seed=1)
    directions = objectives.quasi_directions(4096, dim, dtype=torch.float64)
    cost = objectives.sliced_wasserstein(x, x + shift, directions)
    torch.testing.assert_close(cost, shift.square().sum() / dim, rtol=2e-3, atol=0)


def test_equal_sets_are_at_distance_zero():
    x = samples(20, 4)
    directions = objectives.random_directions(16, 4, isthmus.key(0), torch.float64)
    assert objectives.sliced_wasserstein(x, x[torch.randperm(20)], directions) == 0.0


def test_sliced_wasserstein_gradients_and_batches():
    x, y = samples(2, 5, 3).requires_grad_(), samples(2, 4, 3, seed=1).requires_grad_()
    directions = objectives.random_directions(6, 3, isthmus.key(0), torch.float64)
    assert torch.autograd.gradcheck(lambda x, y: objectives.sliced_wasserstein(x, y, directions), (x, y))
    both = objectives.sliced_wasserstein(x, y, directions)
    each = [objectives.sliced_wasserstein(x[i], y[i], directions) for i in range(2)]
    torch.testing.assert_close(both, torch.stack(each))


@pytest.mark.parametrize(
    "distance",
    [
        lambda x, y: objectives.sliced_wasserstein(x, y, objectives.quasi_directions(64, 3)),
        lambda x, y: objectives.sinkhorn_divergence(x, y, epsilon=0.5, iterations=10),
        objectives.frechet_distance,
    ],
    ids=["sliced", "sinkhorn", "frechet"],
)
def test_half_inputs_are_summed_in_float32(distance):
    x, y = samples(50, 3).bfloat16(), samples(50, 3, seed=1).bfloat16()
    assert distance(x, y).dtype == torch.float32
    assert torch.equal(distance(x, y), distance(x.float(), y.float()))


def test_max_direction_finds_the_difference():
    # Equal but for the spread along one diagonal of five dimensions.
    x, diagonal = samples(100, 5), torch.ones(5, dtype=torch.float64) / 5**0.5
    y = x + 3.0 * (x @ diagonal).unsqueeze(-1) * diagonal
    found = objectives.max_direction(x, y, isthmus.key(0))
    assert (found[0] @ diagonal).abs() > 0.999
    largest = objectives.sliced_wasserstein(x, y, found)
    average = objectives.sliced_wasserstein(x, y, objectives.quasi_directions(256, 5))
    torch.testing.assert_close(largest, 9.0 * (x @ diagonal).square().mean(), rtol=1e-2, atol=0)
    assert largest > 4.0 * average


# ---- Sinkhorn --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_sinkhorn_tends_to_the_cheapest_pairing(p):
    x, y = samples(5, 2), samples(5, 2, seed=1)
    exact = cheapest_pairing(x, y, p) / 5
    errors = [
        (objectives.sinkhorn_divergence(x, y, epsilon=epsilon, p=p, iterations=400) - exact).abs()
        for epsilon in (1.0, 0.1, 0.002)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


def test_sinkhorn_agrees_with_the_assignment_problem():
    optimize = pytest.importorskip("scipy.optimize")
    x, y = samples(40, 3), samples(40, 3, seed=1)
    cost = torch.cdist(x, y).square()
    rows, columns = optimize.linear_sum_assignment(cost.numpy())
    divergence = objectives.sinkhorn_divergence(x, y, epsilon=0.002, iterations=1000)
    torch.testing.assert_close(divergence, cost[rows, columns].mean(), rtol=2e-3, atol=0)


def test_sinkhorn_is_zero_for_equal_sets_and_symmetric():
    x, y = samples(6, 2), samples(9, 2, seed=1)
    assert objectives.sinkhorn_divergence(x, x, epsilon=0.3) == 0.0
    forth = objectives.sinkhorn_divergence(x, y, epsilon=0.3)
    torch.testing.assert_close(forth, objectives.sinkhorn_divergence(y, x, epsilon=0.3))
    assert forth > 0.0


def test_sinkhorn_for_large_epsilon_is_the_energy_of_the_means():
    # With the squared distance the limit is |mean x − mean y|².
    x, y = samples(6, 2), samples(9, 2, seed=1) + 1.0
    divergence = objectives.sinkhorn_divergence(x, y, epsilon=1e5)
    torch.testing.assert_close(divergence, (x.mean(0) - y.mean(0)).square().sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_sinkhorn_gradient_is_that_of_the_converged_value(p):
    x, y = samples(4, 2).requires_grad_(), samples(3, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, y: objectives.sinkhorn_divergence(x, y, epsilon=0.5, p=p, iterations=100), (x, y)
    )


def test_annealing_reaches_a_small_epsilon_sooner():
    x, y = samples(8, 2), samples(8, 2, seed=1)
    exact = objectives.sinkhorn_divergence(x, y, epsilon=1e-3, iterations=20_00)

    def error(anneal):
        return (objectives.sinkhorn_divergence(x, y, epsilon=1e-3, iterations=60, anneal=anneal) - exact).abs()

    assert error(True) < 0.1 * error(False)


def test_sinkhorn_batches():
    x, y = samples(3, 5, 2), samples(3, 4, 2, seed=1)
    each = [objectives.sinkhorn_divergence(x[i], y[i], epsilon=0.2) for i in range(3)]
    torch.testing.assert_close(objectives.sinkhorn_divergence(x, y, epsilon=0.2), torch.stack(each))


# ---- Fréchet ---------------------------------------------------------------------------------------------------------


def covariance(dim, seed):
    root = samples(dim, dim + 2, seed=seed)
    return root @ root.mT


def test_frechet_of_gaussians_is_the_formula_with_matrix_roots():
    def root(matrix):
        values, vectors = numpy.linalg.eigh(matrix)
        return (vectors * numpy.sqrt(values)) @ vectors.T

    a, b, mean, other = covariance(4, 0), covariance(4, 1), samples(4, seed=2), samples(4, seed=3)
    middle = root(root(a.numpy()) @ b.numpy() @ root(a.numpy()))
    expected = (mean - other).square().sum() + a.trace() + b.trace() - 2.0 * middle.trace()
    torch.testing.assert_close(objectives.gaussian_frechet(mean, a, other, b), expected)


def test_frechet_of_commuting_covariances_compares_standard_deviations():
    mean, zero = samples(3), torch.zeros(3, dtype=torch.float64)
    s, t = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 2.0, 5.0]).double()
    distance = objectives.gaussian_frechet(mean, s.square().diag(), zero, t.square().diag())
    torch.testing.assert_close(distance, mean.square().sum() + (s - t).square().sum())


def test_frechet_gradients():
    a, b = covariance(3, 0).requires_grad_(), covariance(3, 1).requires_grad_()
    mean = samples(3).requires_grad_()

    def distance(mean, a, b):
        return objectives.gaussian_frechet(mean, (a + a.mT) / 2, torch.zeros_like(mean), (b + b.mT) / 2)

    assert torch.autograd.gradcheck(distance, (mean, a, b))


def test_frechet_of_samples_is_that_of_their_moments():
    x, y = samples(30, 4), 2.0 * samples(20, 4, seed=1) + 1.0
    expected = objectives.gaussian_frechet(x.mean(0), x.mT.cov(), y.mean(0), y.mT.cov())
    torch.testing.assert_close(objectives.frechet_distance(x, y), expected)


def test_frechet_with_fewer_samples_than_dimensions():
    x, shift = samples(5, 20), samples(20, seed=1)
    torch.testing.assert_close(objectives.frechet_distance(x, x + shift), shift.square().sum())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, d: objectives.sliced_wasserstein(x, x[:, :2], d), r"\[4, 3\] and \[4, 2\]"),
        (lambda x, d: objectives.sliced_wasserstein(x, x, d[:, :2]), r"directions has shape \[5, 2\]"),
        (lambda x, d: objectives.sliced_wasserstein(x, x, d, p=0.5), "p is 0.5"),
        (lambda x, d: objectives.sliced_wasserstein(x, x[:0], d), r"\[0, 3\]"),
        (lambda x, d: objectives.quasi_directions(3, 1), "dim is 1"),
        (lambda x, d: objectives.sinkhorn_divergence(x, x, epsilon=0.0), "epsilon is 0.0"),
        (lambda x, d: objectives.sinkhorn_divergence(x, x, epsilon=1.0, p=3.0), "p is 3.0"),
        (lambda x, d: objectives.sinkhorn_divergence(x, x, epsilon=1.0, iterations=0), "iterations is 0"),
        (lambda x, d: objectives.frechet_distance(x, x[:1]), "4 and 1 samples"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(4, 3), torch.eye(5, 3))
