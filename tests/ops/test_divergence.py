"""What is particular to divergences; the rest is in tests/test_every_op.py."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from isthmus import ops, reference

SCALE_TYPES = ("logvar", "std", "softplus", "square")
REDUCTIONS = ("none", "row", "sum", "mean")


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
SHAPES = [(), (1,), (4097,), (3, 1), (300, 2), (65, 17), (7, 1, 40), (3, 1025), (2, 5000), (2, 16_385), (1, 40_001)]


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
    assert ops.gaussian_kl(rows, rows).shape == (0,)
    assert ops.gaussian_kl(rows, rows, reduction="none").shape == (0, 4)
    assert ops.gaussian_kl(rows, rows, reduction="sum") == 0
    assert ops.gaussian_kl(rows, rows, reduction="mean").isnan()
    assert torch.equal(ops.gaussian_kl(cols, cols), torch.zeros(4, device=device))
    assert ops.gaussian_kl(cols, cols, reduction="mean") == 0


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("offset", (1.0, 1e-1, 1e-2, 3e-3, -3e-3, -1e-1))
def test_near_the_prior_no_digit_is_lost(offset, dtype, isa, device):
    """Divergences down to 1e-5, from half-precision inputs: within 0.1 % of the exact value."""
    mean = torch.tensor([offset], dtype=dtype, device=device)
    logvar = torch.tensor([2 * offset], dtype=dtype, device=device)
    m, v = mean.double(), logvar.double()
    exact = 0.5 * (m * m + torch.expm1(v) - v)
    torch.testing.assert_close(ops.gaussian_kl(mean, logvar).double(), exact[0], rtol=1e-3, atol=0)


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


def test_an_expanded_prior_is_not_copied():
    """Nothing of the size of the weight is allocated on the way to the sum."""
    mean = torch.zeros(1000, 1000)
    prior = torch.zeros(()).expand_as(mean)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.gaussian_kl(mean, mean, prior, prior, reduction="sum")
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 1000


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


# ---- refused arguments -----------------------------------------------------------------------------------------------

MEAN, LOGVAR = torch.zeros(3, 4), torch.zeros(3, 4)


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
            lambda: torch.ops.isthmus.gaussian_kl(MEAN, LOGVAR[:2], None, None, "logvar", "row"),
            r"scale has shape \[2, 4\]; expected \[3, 4\], like mean",
        ),
        (
            lambda: torch.ops.isthmus.gaussian_kl_backward(MEAN, MEAN, LOGVAR, None, None, "logvar", "row"),
            r"grad has dtype Float and shape \[3, 4\]; expected those of the divergence",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()
