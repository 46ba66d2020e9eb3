"""What is particular to terms over all pairs; the rest is in tests/test_every_op.py."""

import math

import pytest
import torch
from checks import assert_near, extra_memory, measures_memory
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from isthmus import ops, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Around the borders of tiles (4, 6, 8, 12 rows), panels (4 to 32 components), vectors, blocks and chunks, and primes.
SHAPES = [
    (1, 1, 1), (0, 3, 2), (2, 5, 0), (1, 2, 3), (3, 1, 4), (7, 16, 1), (12, 32, 8), (13, 33, 17), (24, 31, 16),
    (97, 64, 5), (5, 257, 64), (389, 101, 13), (31, 9, 300), (1155, 3, 2),
]  # fmt: skip


def draw(rows, components, dim, dtype=torch.float32, device="cpu"):
    shapes = (rows, dim), (components, dim), (components, dim)
    return [torch.randn(*shape, dtype=torch.float64).to(device, dtype) for shape in shapes]


# ---- mixtures --------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, dtype, isa, device):
    z, mean, scale = draw(*shape, dtype, device)
    wide = [t.double() for t in (z, mean, scale)]
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    found = ops.mixture_log_prob(z, mean, scale)
    assert found.dtype == accumulate
    assert_near(found, reference.mixture_log_prob(*wide))
    if shape[0] > 0:
        found = ops.component_log_prob(z, mean, scale)
        assert found.dtype == accumulate
        assert_near(found, reference.component_log_prob(*wide))


@every_dtype
@pytest.mark.parametrize("shape", [s for s in SHAPES if min(s) > 0], ids=str)
@pytest.mark.parametrize("op", ("mixture_log_prob", "component_log_prob"))
def test_gradients_of_every_shape(shape, dtype, op, isa):
    rows, components, _ = shape
    log_weight = torch.randn(components if op == "mixture_log_prob" else rows).to(dtype)
    leaves = [t.requires_grad_() for t in (*draw(*shape, dtype), log_weight)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    found, expected = getattr(ops, op)(*leaves), getattr(reference, op)(*wide)
    pull = torch.randn_like(found)
    grads = torch.autograd.grad(found, leaves, pull)
    for g, e in zip(grads, torch.autograd.grad(expected, wide, pull.double()), strict=True):
        assert_near(g, e, factor=4 + shape[2])  # a score carries the rounding of a sum over D


@pytest.mark.parametrize("components", (1, 5, 40))
def test_agrees_with_torch_distributions(components):
    z, mean, logvar = draw(50, components, 3, torch.float64)
    logits = torch.randn(components, dtype=torch.float64)
    law = MixtureSameFamily(Categorical(logits=logits), Independent(Normal(mean, (logvar / 2).exp()), 1))
    found = ops.mixture_log_prob(z, mean, logvar, torch.log_softmax(logits, 0))
    torch.testing.assert_close(found, law.log_prob(z), rtol=1e-13, atol=1e-13)


def test_a_mixture_density_integrates_to_one():
    grid = torch.linspace(-25, 25, 10_001, dtype=torch.float64)
    mean, logvar = torch.tensor([[-3.0], [0.5], [4.0]]).double(), torch.tensor([[0.3], [-2.0], [1.0]]).double()
    total = torch.trapezoid(ops.mixture_log_prob(grid.unsqueeze(1), mean, logvar).exp(), grid)
    assert total.item() == pytest.approx(1, abs=1e-8)


def test_leading_dimensions():
    z, mean, scale = draw(24, 7, 5)
    expected = ops.mixture_log_prob(z, mean, scale)
    for shape in ((24,), (2, 12), (2, 3, 4), (1, 24, 1)):
        assert torch.equal(ops.mixture_log_prob(z.reshape(*shape, 5), mean, scale), expected.reshape(shape))
    assert ops.mixture_log_prob(z[3], mean, scale) == expected[3]


def test_the_two_sums_are_transposes_of_each_other(isa):
    """With unit scales a density is symmetric in its point and its mean."""
    z, mean, _ = draw(70, 41, 6)
    rows = ops.component_log_prob(z, mean, torch.zeros(41, 6))
    columns = ops.mixture_log_prob(mean, z, torch.zeros(70, 6))
    torch.testing.assert_close(rows, columns, rtol=1e-6, atol=1e-5)


def test_far_points_keep_finite_densities(isa, device):
    """Every density underflows; their logarithms do not, and the nearest component takes the whole gradient."""
    mean = torch.tensor([[-1.0], [1.0]], device=device)
    z = torch.tensor([[1e4], [-1e8], [1e15]], device=device, requires_grad=True)
    logvar = torch.zeros(2, 1, device=device)
    found = ops.mixture_log_prob(z, mean, logvar)
    expected = reference.mixture_log_prob(z.double(), mean.double(), logvar.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(found.sum(), z)
    torch.testing.assert_close(grad, -z.detach(), rtol=1e-3, atol=1.0)
    support = ops.component_log_prob(z[:1], mean, logvar)
    assert support.isfinite().all() and (support < -4e7).all()


def test_digits_far_from_the_origin():
    """An expanded square would be off by more than its value here."""
    mean = torch.tensor([[4096.0] * 16, [-4096.0] * 16])
    z = mean[:1] + 0.25
    found = ops.mixture_log_prob(z, mean, torch.zeros(2, 16), torch.zeros(2)).item()
    assert found == pytest.approx(-0.5 * 16 * 0.25**2 - 8 * math.log(2 * math.pi), rel=1e-6)


@every_dtype
def test_nan_stays_in_its_row(dtype, isa, device):
    z, mean, scale = draw(30, 70, 5, dtype, device)
    expected = ops.mixture_log_prob(z, mean, scale)
    z[[0, 7, 29], [0, 4, 2]] = torch.nan
    bad = z.isnan().any(1)
    z.requires_grad_()
    found = ops.mixture_log_prob(z, mean, scale)
    assert found[bad].isnan().all() and torch.equal(found[~bad], expected[~bad])
    (grad,) = torch.autograd.grad(found.sum(), z)
    assert grad[~bad].isfinite().all() and grad[bad].isnan().all()


def test_infinite_points_and_weights(isa):
    z, mean, scale = draw(9, 5, 3)
    z[4, 1] = torch.inf
    log_weight = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf, -1.0])
    leaves = [t.requires_grad_() for t in (z, mean, scale)]
    found = ops.mixture_log_prob(*leaves, log_weight)
    kept = log_weight.isfinite()
    expected = ops.mixture_log_prob(z, mean[kept], scale[kept], log_weight[kept])
    assert found[4] == -torch.inf
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    rest = torch.tensor([i for i in range(9) if i != 4])
    to_mean, to_scale = torch.autograd.grad(ops.mixture_log_prob(z[rest], mean, scale, log_weight).sum(), leaves[1:])
    assert not to_mean[~kept].any() and not to_scale[~kept].any()
    everything = ops.mixture_log_prob(z, mean, scale, torch.full((5,), -torch.inf))
    assert (everything == -torch.inf).all()


def test_only_wanted_gradients_are_returned():
    z, mean, scale = draw(20, 6, 4)
    log_weight = torch.zeros(6)
    tensors = [z, mean, scale, log_weight]
    leaves = [t.clone().requires_grad_() for t in tensors]
    everything = torch.autograd.grad(ops.mixture_log_prob(*leaves).sum(), leaves)
    for i, leaf in enumerate(leaves):
        alone = [leaf if j == i else t for j, t in enumerate(tensors)]
        (grad,) = torch.autograd.grad(ops.mixture_log_prob(*alone).sum(), leaf)
        assert torch.equal(grad, everything[i])
    rows = torch.zeros(20, requires_grad=True)
    (share,) = torch.autograd.grad(ops.component_log_prob(z, mean, scale, rows).sum(), rows)
    assert share.sum().item() == pytest.approx(6, rel=1e-5)


@pytest.mark.parametrize("op", ("mixture_log_prob", "component_log_prob"))
def test_threads_do_not_matter(op):
    leaves = [t.requires_grad_() for t in draw(1500, 130, 19)]

    def everything():
        out = getattr(ops, op)(*leaves)
        return out, *torch.autograd.grad(out.sum(), leaves)

    torch.set_num_threads(1)
    expected = everything()
    for threads in (2, 7):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, everything(), expected))


def test_a_mixture_is_fitted():
    """Gradients good enough to find three blobs, up to their order."""
    truth = torch.tensor([[-6.0, 0.0], [0.0, 6.0], [6.0, -3.0]])
    z = (truth.unsqueeze(1) + 0.5 * torch.randn(3, 100, 2)).flatten(0, 1)
    mean = truth + torch.randn(3, 2)
    leaves = [t.requires_grad_() for t in (mean, torch.zeros(3, 2))]
    optimizer = torch.optim.Adam(leaves, lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        (-ops.mixture_log_prob(z, *leaves).mean()).backward()
        optimizer.step()
    torch.testing.assert_close(mean.detach(), truth, rtol=0, atol=0.25)
    torch.testing.assert_close((leaves[1].detach() / 2).exp(), torch.full((3, 2), 0.5), rtol=0, atol=0.12)


# ---- the aggregate posterior -----------------------------------------------------------------------------------------


def brute_force(z, mean, std, dataset_size, estimator):
    """The estimators of Chen et al. (2018), appendix C, written out as loops over Python floats."""
    batch, dim = z.shape
    others = batch - 1

    def weight(i, j):
        if estimator == "weighted":
            return 1 / (dataset_size * batch)
        if j == i:
            return 1 / dataset_size
        if j == (i + 1) % batch:
            return (dataset_size - others) / (dataset_size * others)
        return 1 / others

    def density(i, j, d):
        t = (z[i, d] - mean[j, d]) / std[j, d]
        return math.exp(-0.5 * t * t) / (std[j, d] * math.sqrt(2 * math.pi))

    joint, marginals = [], []
    for i in range(batch):
        pairs = [(weight(i, j), [density(i, j, d) for d in range(dim)]) for j in range(batch)]
        joint.append(math.log(sum(w * math.prod(p) for w, p in pairs)))
        marginals.append(sum(math.log(sum(w * p[d] for w, p in pairs)) for d in range(dim)))
    return torch.tensor(joint, dtype=torch.float64), torch.tensor(marginals, dtype=torch.float64)


@pytest.mark.parametrize("estimator", ("weighted", "stratified"))
@pytest.mark.parametrize(("batch", "dim"), [(2, 1), (3, 2), (19, 4), (40, 3)])
def test_aggregate_equals_brute_force(batch, dim, estimator, isa):
    z, mean, std = torch.randn(batch, dim), torch.randn(batch, dim), torch.rand(batch, dim) + 0.5
    wide = [t.double() for t in (z, mean, std)]
    expected = brute_force(*(t.numpy() for t in wide), 100, estimator)
    for inputs, tolerance in ((wide, 1e-12), ((z, mean, std), 3e-6)):
        found = ops.aggregate_log_prob(*inputs, 100, estimator=estimator, scale_type="std")
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f.double(), e, rtol=tolerance, atol=tolerance)


@every_dtype
@pytest.mark.parametrize(("batch", "dim"), [(2, 1), (7, 3), (33, 17), (97, 5), (131, 40)])
@pytest.mark.parametrize("estimator", ("weighted", "stratified"))
def test_aggregate_gradients_of_every_shape(batch, dim, estimator, dtype, isa):
    leaves = [t.requires_grad_() for t in draw(batch, batch, dim, dtype)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    found = ops.aggregate_log_prob(*leaves, 1000, estimator=estimator)
    expected = reference.aggregate_log_prob(*wide, 1000, estimator=estimator)
    for f, e in zip(found, expected, strict=True):
        assert_near(f, e.detach())
    pulls = [torch.randn_like(f) for f in found]
    grads = torch.autograd.grad(found, leaves, pulls)
    for g, e in zip(grads, torch.autograd.grad(expected, wide, [p.double() for p in pulls]), strict=True):
        assert_near(g, e, factor=4)


def test_stratified_sampling_is_unbiased():
    """Averaged over all batches that hold row 0, the estimated density is that of the whole data set."""
    size, batch = 6, 4
    mean, logvar = torch.randn(size, 2).double(), torch.randn(size, 2).double()
    z = torch.randn(2).double()
    whole = ops.mixture_log_prob(z, mean, logvar).exp()
    estimates = []
    for order in torch.cartesian_prod(*[torch.arange(1, size)] * (batch - 1)):
        if len(set(order.tolist())) < batch - 1:
            continue
        chosen = torch.cat([torch.zeros(1, dtype=torch.int64), order])
        log_joint, _ = ops.aggregate_log_prob(
            z.expand(batch, 2), mean[chosen], logvar[chosen], size, estimator="stratified"
        )
        estimates.append(log_joint[0].exp())
    torch.testing.assert_close(torch.stack(estimates).mean(), whole, rtol=1e-12, atol=0)


def test_a_whole_data_set_is_exact():
    """With N = B the stratified weights are not uniform, the weighted ones are, but for a factor of 1/N."""
    z, mean, logvar = draw(20, 20, 3, torch.float64)
    log_joint, _ = ops.aggregate_log_prob(z, mean, logvar, 20)
    torch.testing.assert_close(log_joint, ops.mixture_log_prob(z, mean, logvar) - math.log(20), rtol=1e-12, atol=1e-12)


def test_one_dimension_has_no_total_correlation():
    for estimator in ("weighted", "stratified"):
        log_joint, log_marginals = ops.aggregate_log_prob(*draw(50, 50, 1), 1000, estimator=estimator)
        torch.testing.assert_close(log_joint, log_marginals, rtol=1e-6, atol=1e-6)


def test_aggregate_of_far_points_and_nan(isa):
    z, mean, logvar = draw(40, 40, 6)
    expected = ops.aggregate_log_prob(z, mean, logvar, 100)
    z[3], z[17, 2] = 1e6, torch.nan
    z.requires_grad_()
    found = ops.aggregate_log_prob(z, mean, logvar, 100, estimator="weighted")
    others = [i for i in range(40) if i not in (3, 17)]
    for f, e in zip(found, expected, strict=True):
        assert f[3].isfinite() and f[17].isnan() and torch.equal(f[others], e[others])
    (grad,) = torch.autograd.grad(found[0].sum() + found[1].sum(), z)
    assert grad[others].isfinite().all() and grad[3].isfinite().all()


# ---- maximum mean discrepancy ----------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize(("first", "second", "dim"), [(2, 2, 1), (5, 33, 3), (13, 12, 17), (131, 70, 5), (40, 300, 64)])
@pytest.mark.parametrize("kernel", ("rbf", "imq"))
def test_mmd_of_every_shape(first, second, dim, kernel, dtype, isa):
    leaves = [torch.randn(n, dim).to(dtype).requires_grad_() for n in (first, second)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    for estimator in ("unbiased", "biased"):
        found = ops.mmd(*leaves, kernel=kernel, estimator=estimator)
        expected = reference.mmd(*wide, kernel=kernel, estimator=estimator)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_near(found.detach(), expected.detach(), factor=4)
        grads = torch.autograd.grad(found, leaves)
        for g, e in zip(grads, torch.autograd.grad(expected, wide), strict=True):
            assert_near(g, e)


@pytest.mark.parametrize("kernel", ("rbf", "imq"))
def test_mmd_is_zero_in_expectation_for_equal_laws_and_positive_otherwise(kernel):
    def estimates(shift):
        pairs = ((torch.randn(50, 3), torch.randn(40, 3) + shift) for _ in range(200))
        return torch.stack([ops.mmd(x, y, kernel=kernel) for x, y in pairs]).double()

    equal, apart = estimates(0.0), estimates(1.0)
    error = equal.std() / math.sqrt(len(equal))
    assert equal.mean().abs() < 4 * error and (equal < 0).any()
    assert (apart > 0).all() and apart.mean() > 100 * error


@pytest.mark.parametrize("kernel", ("rbf", "imq"))
def test_a_sample_is_at_no_distance_from_itself(kernel, isa):
    x = 100 * torch.randn(70, 9)
    assert ops.mmd(x, x, kernel=kernel, estimator="biased").abs() < 1e-5
    together = x[:1].expand(40, 9)
    assert ops.mmd(together, together, kernel=kernel).abs() < 1e-14
    to_x, to_y = torch.autograd.grad(ops.mmd(*(leaves := [together.clone().requires_grad_() for _ in "xy"])), leaves)
    assert not to_x.any() and not to_y.any()


def test_mmd_of_far_points():
    """No pair is near: only a point's likeness to itself is left."""
    x, y = 1e6 * torch.arange(1.0, 6).unsqueeze(1), -1e6 * torch.arange(1.0, 5).unsqueeze(1)
    assert ops.mmd(x, y, bandwidths=[1.0]).item() == 0
    assert ops.mmd(x, y, bandwidths=[1.0], estimator="biased").item() == pytest.approx(1 / 5 + 1 / 4, rel=1e-6)


def test_mmd_closed_form():
    """Of two normal laws and one Gaussian kernel, in the limit of many points."""
    dim, shift, h = 2, 1.5, 1.0
    x, y = torch.randn(6000, dim), torch.randn(6000, dim) + shift / math.sqrt(dim)
    spread = h**2 + 2
    within = (h**2 / spread) ** (dim / 2)
    expected = 2 * within * (1 - math.exp(-(shift**2) / (2 * spread)))
    assert ops.mmd(x, y, bandwidths=[h]).item() == pytest.approx(expected, abs=0.01)


def test_mmd_does_not_depend_on_threads():
    leaves = [torch.randn(n, 7).requires_grad_() for n in (700, 500)]

    def everything():
        value = ops.mmd(*leaves)
        return value, *torch.autograd.grad(value, leaves)

    torch.set_num_threads(1)
    expected = everything()
    for threads in (2, 7):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, everything(), expected))


def test_mmd_returns_only_wanted_gradients():
    x, y = torch.randn(20, 3), torch.randn(30, 3)
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    to_x, to_y = torch.autograd.grad(ops.mmd(*leaves), leaves)
    assert torch.equal(torch.autograd.grad(ops.mmd(leaves[0], y), leaves[0])[0], to_x)
    assert torch.equal(torch.autograd.grad(ops.mmd(x, leaves[1]), leaves[1])[0], to_y)


# ---- memory, errors --------------------------------------------------------------------------------------------------


@measures_memory
def test_mixture_memory_stays_linear():
    """The scores of this call would take 128 MB, the residuals 1 GB."""
    leaves = [t.requires_grad_() for t in draw(16_000, 2000, 8)]
    assert extra_memory(lambda: torch.autograd.grad(ops.mixture_log_prob(*leaves).sum(), leaves)) < 10e6


@measures_memory
def test_aggregate_memory_stays_linear():
    """The terms of this call would take 128 MB."""
    leaves = [t.requires_grad_() for t in draw(2000, 2000, 8)]
    assert extra_memory(lambda: torch.autograd.grad(sum(ops.aggregate_log_prob(*leaves, 10_000)).sum(), leaves)) < 10e6


@measures_memory
def test_mmd_memory_stays_linear():
    """The distances of this call would take 96 MB."""
    leaves = [torch.randn(n, 4).requires_grad_() for n in (6000, 4000)]
    assert extra_memory(lambda: torch.autograd.grad(ops.mmd(*leaves, bandwidths=[1.0]), leaves)) < 10e6


Z, MEAN = torch.zeros(4, 3), torch.zeros(5, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.mixture_log_prob(Z, MEAN, MEAN, scale_type="var"), ValueError, "scale_type is 'var'; expected"),
        (lambda: ops.mixture_log_prob(Z, MEAN[:, :2], MEAN), RuntimeError, r"mean has shape \[5, 2\]; expected"),
        (lambda: ops.mixture_log_prob(Z, MEAN, MEAN[:2]), RuntimeError, r"scale has shape \[2, 3\]; expected \[5, 3\]"),
        (lambda: ops.mixture_log_prob(Z, MEAN[:0], MEAN[:0]), RuntimeError, r"mean has shape \[0, 3\]; expected \[K"),
        (lambda: ops.mixture_log_prob(Z, MEAN, MEAN, Z[0]), RuntimeError, r"log_weight has shape \[3\]; expected \[5"),
        (lambda: ops.mixture_log_prob(Z[0, 0], MEAN, MEAN), RuntimeError, r"z has shape \[\]; expected \[..., D\]"),
        (lambda: ops.mixture_log_prob(Z, MEAN.double(), MEAN), RuntimeError, "mean has dtype Double; expected Float"),
        (lambda: ops.mixture_log_prob(Z.int(), MEAN.int(), MEAN.int()), RuntimeError, "z has dtype Int; expected"),
        (lambda: ops.component_log_prob(Z[0], MEAN, MEAN), ValueError, r"z has shape \[3\]; expected \[B, D\]"),
        (
            lambda: ops.component_log_prob(Z, MEAN, MEAN, torch.zeros(5)),
            RuntimeError,
            r"log_weight has shape \[5\]; expected \[4\]",
        ),
        (lambda: ops.aggregate_log_prob(Z, Z, Z, 3), RuntimeError, "dataset_size is 3; expected at least the number"),
        (lambda: ops.aggregate_log_prob(Z, Z, Z, 9, estimator="mss"), ValueError, "estimator is 'mss'; expected"),
        (lambda: ops.aggregate_log_prob(Z, MEAN, Z, 9), RuntimeError, r"mean has shape \[5, 3\]; expected \[4, 3\]"),
        (lambda: ops.aggregate_log_prob(Z[0], Z[0], Z[0], 9), RuntimeError, r"z has shape \[3\]; expected \[B, D\]"),
        (
            lambda: ops.aggregate_log_prob(Z[:1], Z[:1], Z[:1], 9, estimator="stratified"),
            RuntimeError,
            "z has 1 row; the stratified estimator expects at least 2",
        ),
        (
            lambda: torch.ops.isthmus.mixture_log_prob_backward(
                Z, torch.zeros(2, 4), Z, MEAN, MEAN, None, "logvar", "components", True, True, False
            ),
            RuntimeError,
            r"grad is Float\[4, 3\]; expected Float\[",
        ),
        (lambda: ops.mmd(Z, MEAN, kernel="laplace"), ValueError, "kernel is 'laplace'; expected one of 'rbf', 'imq'"),
        (lambda: ops.mmd(Z, MEAN, estimator="linear"), ValueError, "estimator is 'linear'; expected"),
        (lambda: ops.mmd(Z[0], MEAN), ValueError, r"x has shape \[3\]; expected \[N, D\]"),
        (lambda: ops.mmd(Z, MEAN[:, :2]), RuntimeError, r"y has shape \[5, 2\]; expected \[\*, 3\]"),
        (lambda: ops.mmd(Z[:1], MEAN), RuntimeError, "x has 1 rows; the unbiased estimator expects at least 2"),
        (lambda: ops.mmd(Z, MEAN[:1]), RuntimeError, "y has 1 rows; the unbiased estimator expects at least 2"),
        (lambda: ops.mmd(Z, MEAN[:0], estimator="biased"), RuntimeError, "y has 0 rows; the biased estimator"),
        (lambda: ops.mmd(Z, MEAN, bandwidths=[]), RuntimeError, "bandwidths has 0 entries; expected 1 to 32"),
        (lambda: ops.mmd(Z, MEAN, bandwidths=[1, 0]), RuntimeError, "bandwidths holds 0; expected positive"),
        (lambda: ops.mmd(Z, MEAN.double()), RuntimeError, "y has dtype Double; expected Float, like x"),
    ],
)  # fmt: skip
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
