"""What is particular to divergences; the rest is in tests/test_every_op.py."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from isthmus import ops, reference

SCALE_TYPES = ("logvar", "std", "softplus", "square")
REDUCTIONS = ("none", "row", "group", "batch", "dim", "sum", "mean")


def scale_of(std, scale_type):
    """The scale that means the standard deviation `std`."""
    return {
        "logvar": lambda: 2 * std.log(),
        "std": lambda: std,
        "softplus": lambda: std.expm1().log(),
        "square": lambda: std.sqrt(),
    }[scale_type]()


def gaussians(*shape, device="cpu", dtype=torch.float32):
    mean = torch.randn(shape, device=device, dtype=dtype)
    std = torch.rand(shape, device=device, dtype=dtype) + 0.3
    return mean, std


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_type", SCALE_TYPES)
@pytest.mark.parametrize("prior", (False, True), ids=("standard", "prior"))
def test_equals_torch_distributions(scale_type, prior, isa, device):
    mean, std = gaussians(7, 33, device=device, dtype=torch.float64)
    prior_mean, prior_std = gaussians(7, 33, device=device, dtype=torch.float64)
    if not prior:
        prior_mean, prior_std = torch.zeros_like(mean), torch.ones_like(std)
    expected = kl_divergence(Normal(mean, std), Normal(prior_mean, prior_std))
    tensors = (mean, scale_of(std, scale_type))
    if prior:
        tensors += (prior_mean, scale_of(prior_std, scale_type))
    found = ops.gaussian_kl(*tensors, scale_type=scale_type, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


# Rows narrower and wider than a vector, a tile, a chunk of a CPU thread and a segment of a GPU warp.
SHAPES = [(1,), (4097,), (3, 1), (300, 2), (65, 17), (7, 1, 40), (3, 1025), (2, 5000), (2, 16_385), (1, 40_001)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, reduction, isa, device):
    names = ("mean", "scale", "prior_mean", "prior_scale")
    leaves = [torch.randn(shape, device=device) * factor for factor in (1, 0.3, 1, 0.3)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found = ops.gaussian_kl(*leaves, reduction=reduction)
    expected = reference.gaussian_kl(*wide, reduction=reduction)
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=1e-6)

    grad = torch.randn_like(found)
    for name, a, e in zip(
        names,
        torch.autograd.grad(found, leaves, grad),
        torch.autograd.grad(expected, wide, grad.double()),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), e, rtol=3e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_empty(device):
    rows, cols = torch.zeros(0, 4, device=device), torch.zeros(4, 0, device=device)
    for reduction, shape in {"none": (0, 4), "row": (0,), "group": (0, 1), "batch": (0,)}.items():
        assert ops.gaussian_kl(rows, rows, reduction=reduction).shape == shape
    assert ops.gaussian_kl(rows, rows, reduction="sum") == 0
    for reduction in ("mean", "dim"):
        assert ops.gaussian_kl(rows, rows, reduction=reduction).isnan().all()
    for reduction in ("row", "batch", "sum", "mean"):
        assert (ops.gaussian_kl(cols, cols, reduction=reduction) == 0).all()


@pytest.mark.parametrize("reduction", ("none", "row", "dim", "sum", "mean"))
def test_a_single_number(reduction, device):
    number = torch.tensor(1.0, device=device)
    kl = ops.gaussian_kl(number, 0 * number, reduction=reduction)
    assert kl.shape == () and kl == 0.5


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("exact", (1e-1, 1e-2, 1e-3, 1e-4, 1e-5))
@pytest.mark.parametrize("part", ("mean", "scale", "both"))
def test_near_the_prior_no_digit_is_lost(part, exact, dtype, isa, device):
    """From half-precision inputs: within 0.1 % of the divergence of the numbers that the inputs are."""
    # KL is about m² / 2 + v² / 4
    mean = math.sqrt(exact) * torch.tensor([[1.0, -1.0]], device=device) * (part != "scale")
    logvar = math.sqrt(exact) * torch.tensor([[1.0, -1.0]], device=device) * (part != "mean")
    mean, logvar = mean.to(dtype), logvar.to(dtype)
    m, v = mean.double(), logvar.double()
    expected = 0.5 * (m * m + torch.expm1(v) - v)
    assert exact / 10 < expected.max() < exact
    found = ops.gaussian_kl(mean, logvar, reduction="none")
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)
    _, found = ops.gaussian_sample_kl(mean, logvar, reduction="none")
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale_type", SCALE_TYPES)
def test_near_a_tensor_prior_no_digit_is_lost(scale_type, isa, device):
    """A relative change of the scale by 1/64: a divergence of some 1e-4, from numbers of the order of 1."""
    prior_scale = torch.tensor([0.75, 1.5], device=device)
    scale = prior_scale * (1 + 2**-6)
    found = ops.gaussian_kl(
        torch.zeros_like(scale), scale, torch.zeros_like(scale), prior_scale, scale_type=scale_type, reduction="none"
    )
    wide = [t.double() for t in (torch.zeros_like(scale), scale, torch.zeros_like(scale), prior_scale)]
    expected = reference.gaussian_kl(*wide, scale_type=scale_type, reduction="none")
    assert (expected < 1e-3).all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_a_posterior_equal_to_its_prior_has_no_divergence(isa, device):
    mean, std = gaussians(5, 37, device=device)
    for scale_type in SCALE_TYPES:
        scale = scale_of(std, scale_type)
        assert torch.equal(
            ops.gaussian_kl(mean, scale, mean, scale, scale_type=scale_type), torch.zeros(5, device=device)
        )


@pytest.mark.parametrize("logvar", (80.0, -80.0))
def test_extreme_logvar(logvar, isa, device):
    mean = torch.ones(2, 5, device=device, requires_grad=True)
    scale = torch.full((2, 5), logvar, device=device, requires_grad=True)
    kl = ops.gaussian_kl(mean, scale)
    exact = 2.5 * (1 + torch.tensor(logvar, dtype=torch.float64).exp() - 1 - logvar)
    torch.testing.assert_close(kl.double().cpu(), exact.expand(2), rtol=1e-5, atol=0)
    kl.sum().backward()
    slope = torch.expm1(torch.tensor(logvar, dtype=torch.float64)) / 2
    torch.testing.assert_close(scale.grad.double().cpu(), slope.expand(2, 5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("logvar", (80.0, -80.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_extreme_priors(dtype, logvar, isa, device):
    """Both Gaussians of one extreme width: a divergence of order 1, and gradients that are all finite."""
    scale = torch.full((2, 5), logvar, device=device, dtype=dtype)
    mean = torch.zeros_like(scale)
    kl, grads = leaves_and(ops.gaussian_kl, mean, scale + 1, mean, scale)
    expected = 2.5 * (math.expm1(float(scale[0, 0] + 1) - float(scale[0, 0])) - float(scale[0, 0] + 1 - scale[0, 0]))
    torch.testing.assert_close(kl.double().cpu(), torch.full((2,), expected, dtype=torch.float64), rtol=1e-5, atol=0)
    assert all(grad.isfinite().all() for grad in grads)


def test_a_nan_stays_in_its_row(isa, device):
    mean, logvar = torch.randn(50, 9, device=device), torch.randn(50, 9, device=device)
    expected = ops.gaussian_kl(mean, logvar)
    mean[7, 3] = torch.nan
    found = ops.gaussian_kl(mean, logvar)
    assert found[7].isnan()
    found[7] = expected[7]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_dtype_of_the_result(dtype, reduction, device):
    mean = torch.zeros(3, 4, dtype=dtype, device=device)
    kl = ops.gaussian_kl(mean, mean, reduction=reduction)
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# ---- priors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("scale_type", SCALE_TYPES)
def test_a_prior_of_one_element_is_that_prior_everywhere(scale_type, reduction, isa, device):
    """Expanded priors take a path of their own, which must give the bits of the ordinary one."""
    mean, std = gaussians(9, 21, device=device)
    scale = scale_of(std, scale_type)
    prior = torch.tensor(0.3, device=device), torch.tensor(0.8, device=device)
    found, written = [], []
    for tensors in ([t.expand(9, 21) for t in prior], [t.expand(9, 21).contiguous() for t in prior]):
        leaves = [t.detach().requires_grad_() for t in (mean, scale, *tensors)]
        kl = ops.gaussian_kl(*leaves, scale_type=scale_type, reduction=reduction)
        found.append(kl.detach())
        written.append(torch.autograd.grad(kl.sum(), leaves))
    assert torch.equal(*found)
    assert all(map(torch.equal, *written))


def test_gradients_of_broadcast_priors_are_sums(device):
    mean, std = gaussians(6, 4, device=device)
    prior_mean = torch.randn(4, device=device, requires_grad=True)
    prior_std = torch.tensor(1.7, device=device, requires_grad=True)
    ops.gaussian_kl(mean, std, prior_mean, prior_std, scale_type="std", reduction="sum").backward()
    torch.testing.assert_close(prior_mean.grad, (-(mean - prior_mean) / prior_std**2).sum(0).detach())
    assert prior_std.grad.shape == ()


def test_a_residual_posterior_is_relative_to_its_prior(isa, device):
    mean, log_ratio, prior_mean, prior_logvar = torch.randn(4, 6, 9, device=device, dtype=torch.float64)
    found = ops.gaussian_kl(mean, log_ratio, prior_mean, prior_logvar, residual=True)
    expected = ops.gaussian_kl(prior_mean + mean, prior_logvar + log_ratio, prior_mean, prior_logvar)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


# ---- layouts ---------------------------------------------------------------------------------------------------------


def allocated(call):
    """Sizes in bytes of the tensors that a call allocates, the largest first."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    return sorted((event.self_cpu_memory_usage for event in profile.events()), reverse=True)


def as_halves(packed, dim):
    return tuple(half.contiguous() for half in packed.chunk(2, dim))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("dim", (0, 1, 2, -1))
def test_packed_posteriors_equal_separate_ones(dim, dtype, isa, device):
    packed = torch.randn(4, 6, 10, device=device).to(dtype).requires_grad_()
    halves = [half.detach().requires_grad_() for half in as_halves(packed, dim)]
    found, expected = ops.gaussian_kl(packed, packed_dim=dim), ops.gaussian_kl(*halves)
    assert torch.equal(found, expected)
    grad = torch.randn_like(found)
    expected = torch.cat(torch.autograd.grad(expected, halves, grad), dim)
    assert torch.equal(torch.autograd.grad(found, packed, grad)[0], expected)


SMALL = 4096  # bytes: sums, never elements


def test_packed_posteriors_are_not_copied():
    packed = torch.randn(4, 8, 50, 50, requires_grad=True)
    assert max(allocated(lambda: ops.gaussian_kl(packed, packed_dim=1, reduction="batch"))) < SMALL
    kl = ops.gaussian_kl(packed, packed_dim=1, reduction="sum")
    gradient, *others = allocated(lambda: torch.autograd.grad(kl, packed))
    assert gradient == packed.numel() * 4 and max(others) < SMALL


def test_slices_of_a_tensor_are_not_copied():
    hidden = torch.randn(500, 300)
    mean, logvar = hidden[:, 20:120], hidden[:, 200:]
    assert max(allocated(lambda: ops.gaussian_kl(mean, logvar, reduction="sum"))) < SMALL
    assert torch.equal(ops.gaussian_kl(mean, logvar), ops.gaussian_kl(mean.contiguous(), logvar.contiguous()))


@pytest.mark.parametrize("shape", ((), (1000,)), ids=("constant", "row"))
def test_expanded_priors_are_not_copied(shape):
    mean = torch.randn(500, 1000)
    prior = (0.3 + torch.rand(shape)).expand_as(mean)
    assert max(allocated(lambda: ops.gaussian_kl(mean, mean, prior, prior, reduction="sum"))) < SMALL


def test_numbers_as_prior_are_not_expanded():
    mean = torch.randn(500, 1000)
    assert max(allocated(lambda: ops.gaussian_kl(mean, mean, 0.5, -1.0, reduction="sum"))) < SMALL


def test_gradients_of_constant_priors_are_not_computed_unasked():
    mean = torch.randn(500, 1000, requires_grad=True)
    kl = ops.gaussian_kl(mean, torch.zeros(500, 1000), 0.5, -1.0, reduction="sum")
    sizes = allocated(lambda: torch.autograd.grad(kl, mean))
    assert sum(sizes) < 2 * mean.numel() * 4 + SMALL


def test_any_strides_will_do(isa, device):
    mean, logvar, prior_mean, prior_logvar = torch.randn(4, 5, 7, 9, device=device).transpose(1, 3)
    written = (t.contiguous() for t in (mean, logvar, prior_mean, prior_logvar))
    assert torch.equal(ops.gaussian_kl(mean, logvar, prior_mean, prior_logvar), ops.gaussian_kl(*written))


# ---- options ---------------------------------------------------------------------------------------------------------


def leaves_and(call, *tensors):
    """The result of `call`, and its gradients under a fixed weighting."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    result = call(*leaves)
    weights = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype, device=result.device)
    return result, torch.autograd.grad(result, leaves, weights.reshape(result.shape))


@pytest.mark.parametrize("reduction", ("none", "row", "group", "batch", "sum", "mean", "dim"))
@pytest.mark.parametrize("rubbish", (torch.nan, torch.inf, -torch.inf))
def test_rows_left_out_count_nothing_whatever_they_hold(rubbish, reduction, isa, device):
    tensors = torch.randn(4, 6, 5, 10, device=device)
    mask = torch.rand(6, 5, device=device) < 0.5
    clean = torch.where(mask.unsqueeze(-1), tensors, 0)
    tensors[:, ~mask] = rubbish
    options = {"mask": mask, "reduction": reduction, "groups": 5}
    found, grads = leaves_and(lambda *t: ops.gaussian_kl(*t, **options), *tensors)
    expected, clean_grads = leaves_and(lambda *t: ops.gaussian_kl(*t, **options), *clean)
    assert torch.equal(found, expected) and found.isfinite().all()
    for grad, clean_grad in zip(grads, clean_grads, strict=True):
        assert torch.equal(grad, clean_grad) and (grad[~mask] == 0).all()


def test_rows_left_out_have_second_derivatives_of_zero():
    tensors = torch.randn(4, 6, 5, dtype=torch.float64)
    mask = torch.arange(6) % 2 == 0
    tensors[:, ~mask] = torch.nan
    leaves = [t.clone().requires_grad_() for t in tensors]
    kl = ops.gaussian_kl(*leaves, mask=mask)
    grads = torch.autograd.grad(kl.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(t.square().sum() for t in grads), leaves)
    assert all((t[mask] != 0).all() and (t[~mask] == 0).all() for t in second)


@pytest.mark.parametrize("reduction", ("mean", "dim"))
def test_means_are_over_the_rows_that_count(reduction, device):
    mean, logvar = torch.randn(2, 40, 6, device=device)
    mask = torch.rand(40, device=device) < 0.3
    found = ops.gaussian_kl(mean, logvar, mask=mask, reduction=reduction)
    torch.testing.assert_close(found, ops.gaussian_kl(mean[mask], logvar[mask], reduction=reduction))


def test_a_mask_broadcasts(device):
    mean, logvar = torch.randn(2, 3, 4, 6, device=device)
    mask = torch.tensor([True, False, True, True], device=device)
    found = ops.gaussian_kl(mean, logvar, mask=mask)
    assert torch.equal(found, ops.gaussian_kl(mean, logvar) * mask)


def test_balance_divides_the_gradient_and_keeps_the_value(isa, device):
    tensors = torch.randn(4, 6, 10, device=device)
    value, grads = leaves_and(ops.gaussian_kl, *tensors)
    found, balanced = leaves_and(lambda *t: ops.gaussian_kl(*t, balance=0.75), *tensors)
    assert torch.equal(found, value)
    for grad, whole, share in zip(balanced, grads, (0.25, 0.25, 0.75, 0.75), strict=True):
        torch.testing.assert_close(grad, share * whole, rtol=1e-6, atol=1e-7)


def test_units_and_weights(device):
    mean, logvar = torch.randn(2, 6, 10, device=device, dtype=torch.float64)
    kl = ops.gaussian_kl(mean, logvar)
    for found, expected in (
        (ops.gaussian_kl(mean, logvar, unit="bits"), kl / math.log(2)),
        (ops.gaussian_kl(mean, logvar, beta=4.0), 4 * kl),
        (ops.gaussian_kl(mean, logvar, free_bits=7.0, beta=0.5), 0.5 * kl.clamp(min=7)),
        (ops.gaussian_kl(mean, logvar, capacity=7.0), (kl - 7).abs()),
        (ops.gaussian_kl(mean, logvar, unit="bits", free_bits=9.0), (kl / math.log(2)).clamp(min=9)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_free_bits_stop_the_gradient(device):
    logvar = torch.zeros(2, 4, device=device)
    mean = torch.tensor([[0.1], [1.0]], device=device).expand(2, 4)
    _, (grad, _) = leaves_and(lambda *t: ops.gaussian_kl(*t, free_bits=1.0), mean, logvar)
    assert (grad[0] == 0).all() and (grad[1] != 0).all()


def test_clamps_have_the_gradients_they_are_named_for(isa, device):
    # dKL/dlogvar = (exp(logvar) - 1) / 2: downhill is towards 0. Below and above the range, both sides of 0, inside.
    logvar = torch.tensor([[-3.0, 3.0, -0.5, 0.5]], device=device)
    mean, low, high = torch.zeros_like(logvar), -1.0, 2.0
    bounded = logvar.clamp(low, high)
    slope = torch.expm1(bounded) / 2
    inside = logvar == bounded

    def run(mode, low=low, high=high):
        kl, (_, grad) = leaves_and(
            lambda m, v: ops.gaussian_kl(m, v, clamp=(low, high), clamp_mode=mode, reduction="sum"), mean, logvar
        )
        return kl, grad / 0.5  # the weight of a single result

    for mode, expected in (("hard", slope * inside), ("pass_through", slope)):
        kl, grad = run(mode)
        torch.testing.assert_close(kl, ops.gaussian_kl(mean, bounded, reduction="sum"))
        torch.testing.assert_close(grad, expected)
    # From the far side of a range that excludes 0, downhill leads further out.
    _, grad = run("pass_through", low=1.0, high=2.0)
    torch.testing.assert_close(grad, torch.tensor([[0, math.expm1(2) / 2, 0, 0]], device=device))
    wide = logvar.double().requires_grad_()
    bounded = 0.5 + 1.5 * torch.tanh((wide - 0.5) / 1.5)
    expected = ops.gaussian_kl(mean.double(), bounded, reduction="sum")
    kl, grad = run("tanh")
    torch.testing.assert_close(kl.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), torch.autograd.grad(expected, wide)[0], rtol=1e-5, atol=1e-6)


# ---- determinism -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 300_007), (3, 100_003), (4096, 40), (100_003, 1)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_threads_do_not_matter(shape, reduction):
    mean, logvar = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)

    def run(threads):
        torch.set_num_threads(threads)
        kl = ops.gaussian_kl(mean, logvar, reduction=reduction)
        return kl, *torch.autograd.grad(kl, (mean, logvar), torch.ones_like(kl))

    expected = run(1)
    for threads in (2, 7):
        assert all(map(torch.equal, run(threads), expected))


def test_long_sums_keep_their_accuracy(isa, device):
    mean, logvar = torch.randn(1, 2_000_003, device=device), torch.randn(1, 2_000_003, device=device)
    expected = reference.gaussian_kl(mean.double(), logvar.double())
    for reduction in ("row", "sum", "mean"):
        found = ops.gaussian_kl(mean, logvar, reduction=reduction)
        torch.testing.assert_close(found.double().reshape(1), expected, rtol=2e-6, atol=0)


def test_nothing_but_inputs_is_saved():
    mean, logvar = (torch.zeros(64, 32, requires_grad=True) for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.gaussian_kl(mean, logvar)
    assert {t.data_ptr() for t in saved if t is not None} == {mean.data_ptr(), logvar.data_ptr()}


# ---- importance weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_weights_of_any_size(dtype, isa, device):
    """Log-weights whose exponentials overflow and vanish."""
    weights = 500 * torch.randn(7, 40, device=device, dtype=dtype) + torch.tensor([[-5e3]], device=device, dtype=dtype)
    found, (grad,) = leaves_and(ops.log_mean_exp, weights)
    wide = weights.double()
    torch.testing.assert_close(found[0].double(), wide.logsumexp(0) - math.log(7), rtol=1e-6, atol=0)
    factors = torch.linspace(0.5, 1.5, 40, dtype=torch.float64, device=device)
    torch.testing.assert_close(grad.double(), factors * wide.softmax(0), rtol=1e-3, atol=1e-6)


def test_impossible_samples_have_no_part_in_the_bound(isa, device):
    weights = torch.randn(4, 9, device=device)
    weights[1], weights[:, 3] = -torch.inf, -torch.inf
    bound, (grad,) = leaves_and(ops.log_mean_exp, weights)
    assert bound[0, 3] == -torch.inf and bound[0, [0, 1, 2]].isfinite().all()
    assert (grad[1] == 0).all() and (grad[:, 3] == 0).all() and grad.isfinite().all()


def test_a_nan_weight_stays_in_its_column(isa, device):
    weights = torch.randn(4, 40, device=device)
    bound, (grad,) = leaves_and(ops.log_mean_exp, weights)
    weights[2, 7] = torch.nan
    broken_bound, (broken_grad,) = leaves_and(ops.log_mean_exp, weights)
    assert broken_bound[0, 7].isnan() and broken_grad[:, 7].isnan().all()
    kept = torch.arange(40, device=device) != 7
    assert torch.equal(bound[:, kept], broken_bound[:, kept]) and torch.equal(grad[:, kept], broken_grad[:, kept])


def test_groups_are_bounds_of_their_own(device):
    weights = torch.randn(12, 5, device=device)
    expected = torch.cat([ops.log_mean_exp(part) for part in weights.chunk(3)])
    assert torch.equal(ops.log_mean_exp(weights, groups=3), expected)


# ---- refused arguments -----------------------------------------------------------------------------------------------

MEAN, LOGVAR = torch.zeros(3, 4), torch.zeros(3, 4)
PLAIN = ("logvar", -1, False, "none", 0.0, 0.0, "row", 1, 1.0, 1.0, 1.0)  # options of the op, in its schema's order


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.gaussian_kl(MEAN, LOGVAR, scale_type="variance"), "scale_type is 'variance'; expected one of"),
        (lambda: ops.gaussian_kl(MEAN, LOGVAR, reduction="rows"), "reduction is 'rows'; expected one of"),
        (lambda: ops.gaussian_kl(MEAN, LOGVAR.double()), "scale has dtype Double; expected Float, like mean"),
        (lambda: ops.gaussian_kl(MEAN.int(), LOGVAR.int()), "mean has dtype Int; expected float32"),
        (lambda: ops.gaussian_kl(MEAN, LOGVAR, MEAN), "prior_scale is missing; give both"),
        (lambda: ops.gaussian_kl(MEAN, LOGVAR, None, LOGVAR), "prior_mean is missing; give both"),
        (lambda: ops.gaussian_kl(MEAN, LOGVAR, MEAN.half(), LOGVAR), "prior_mean has dtype Half; expected Float"),
        (lambda: ops.gaussian_kl(MEAN, torch.zeros(3, 5)), r"scale has shape \[3, 5\], which does not broadcast"),
        (
            lambda: ops.gaussian_kl(torch.zeros(3, 5)),
            r"mean has shape \[3, 5\] and there is no scale; expected an even",
        ),
        (lambda: ops.gaussian_kl(MEAN, packed_dim=2), "expected an even size along packed_dim 2"),
        (lambda: ops.gaussian_kl(MEAN, None, MEAN, MEAN), r"prior_mean has shape \[3, 4\], which does not expand to"),
        (lambda: ops.gaussian_kl(MEAN, LOGVAR, residual=True), "residual is true without a prior; expected"),
        (lambda: ops.gaussian_kl(MEAN, LOGVAR, balance=1.5), "balance is 1.5; expected a share between 0 and 1"),
        (
            lambda: ops.gaussian_kl(MEAN, LOGVAR, 0.0, 0.0, residual=True, balance=0.5),
            "balance and residual were both given",
        ),
        (lambda: ops.gaussian_kl(MEAN, LOGVAR, clamp=(1.0, 1.0)), r"clamp is \(1.0, 1.0\); expected \(low, high\)"),
        (lambda: ops.gaussian_kl(MEAN, LOGVAR, clamp=(-1, 1), clamp_mode="soft"), "clamp_mode is 'soft'; expected one"),
        (lambda: ops.gaussian_kl(MEAN, LOGVAR, mask=torch.ones(3)), "mask has dtype Float; expected bool"),
        (lambda: ops.gaussian_kl(MEAN, LOGVAR, mask=MEAN == 0), r"mask has shape \[3, 4\], which does not expand to"),
        (
            lambda: ops.gaussian_kl(MEAN, LOGVAR, reduction="group", groups=3),
            "groups is 3; expected a divisor of the last size of mean, 4",
        ),
        (lambda: ops.gaussian_kl(MEAN[0, 0], LOGVAR[0, 0], reduction="batch"), "expected a batch dimension"),
        (lambda: ops.gaussian_kl(MEAN, LOGVAR, unit="bytes"), "unit is 'bytes'; expected one of 'nats', 'bits'"),
        (lambda: ops.log_mean_exp(torch.zeros(6, 2), groups=4), "groups is 4, log_weights has 6 samples; expected"),
        (lambda: ops.log_mean_exp(torch.zeros(0, 2)), "log_weights has 0 samples; expected"),
        (lambda: ops.log_mean_exp(torch.tensor(0.0)), r"log_weights has shape \[\]; expected"),
        (lambda: ops.log_mean_exp(torch.zeros(2).long()), "log_weights has dtype Long; expected float32"),
        (
            lambda: torch.ops.isthmus.gaussian_kl(MEAN, LOGVAR[:2], None, None, None, *PLAIN),
            r"scale has shape \[2, 4\]; expected \[3, 4\], like mean",
        ),
        (
            lambda: torch.ops.isthmus.gaussian_kl_backward(MEAN, MEAN, LOGVAR, None, None, None, *PLAIN, False),
            r"grad is Float\[3, 4\]; expected Float\[",
        ),
        (
            lambda: torch.ops.isthmus.log_mean_exp_backward(torch.zeros(3), torch.zeros(6, 2), torch.zeros(2, 2)),
            r"grad has shape \[3\]; expected \[2, 2\], like bound",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()
