"""What is particular to likelihoods; the rest is in tests/test_every_op.py."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from torch.distributions import Normal

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


def predictions(*shape, device="cpu", dtype=torch.float32):
    """x, mean and standard deviation."""
    x, mean, std = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    return x, mean, std.abs() + 0.3


def wide(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


# ---- gaussian_nll ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_type", SCALE_TYPES)
def test_gaussian_equals_torch_distributions(scale_type, isa, device):
    x, mean, std = predictions(7, 33, device=device, dtype=torch.float64)
    found = ops.gaussian_nll(x, mean, scale_of(std, scale_type), scale_type=scale_type, reduction="none")
    torch.testing.assert_close(found, -Normal(mean, std).log_prob(x), rtol=1e-12, atol=1e-14)


# Rows narrower and wider than a vector, a tile, a chunk of a CPU thread and a segment of a GPU warp.
SHAPES = [(), (1,), (4097,), (3, 1), (300, 2), (65, 17), (7, 1, 40), (3, 1025), (2, 5000), (2, 16_385), (1, 40_001)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shared", (False, True), ids=("elementwise", "shared"))
def test_gaussian_every_shape(shape, reduction, shared, isa, device):
    x, mean, _ = predictions(*shape, device=device)
    scale = torch.tensor(0.3, device=device) if shared else 0.3 * torch.randn(shape, device=device)
    leaves = [t.requires_grad_() for t in (x, mean, scale)]
    doubles = wide(*leaves)
    found = ops.gaussian_nll(*leaves, reduction=reduction)
    expected = reference.gaussian_nll(*doubles, reduction=reduction)
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=1e-6)
    grad = torch.randn_like(found)
    for a, e in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, doubles, grad.double()), strict=True
    ):
        torch.testing.assert_close(a.double(), e, rtol=3e-6, atol=2e-6 * max(1.0, e.abs().max().item()))


@pytest.mark.parametrize("logvar", (80.0, -80.0))
def test_gaussian_extreme_logvar(logvar, isa, device):
    x = torch.full((2, 5), 3.0, device=device, requires_grad=True)
    mean = torch.zeros(2, 5, device=device, requires_grad=True)
    scale = torch.full((2, 5), logvar, device=device, requires_grad=True)
    found = ops.gaussian_nll(x, mean, scale)
    q2 = 9 * math.exp(-logvar)
    torch.testing.assert_close(
        found.cpu(), torch.full((2,), 2.5 * (q2 + logvar + math.log(2 * math.pi))), rtol=1e-5, atol=0
    )
    found.sum().backward()
    for leaf, slope in ((x, q2 / 3), (mean, -q2 / 3), (scale, 0.5 * (1 - q2))):
        torch.testing.assert_close(leaf.grad.cpu(), torch.full((2, 5), slope), rtol=1e-5, atol=0)


def test_gaussian_beta_weighs_without_a_gradient(isa, device):
    x, mean, std = predictions(6, 11, device=device, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (mean, std)]
    for beta in (0.5, 1.0):
        plain = ops.gaussian_nll(x, *leaves, scale_type="std", reduction="none")
        found = ops.gaussian_nll(x, *leaves, scale_type="std", beta=beta, reduction="none")
        factor = std.detach() ** (2 * beta)
        torch.testing.assert_close(found, factor * plain)
        expected = torch.autograd.grad((factor * plain).sum(), leaves)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), leaves), expected)


def test_gaussian_scale_may_be_a_number(device):
    x, mean, _ = predictions(6, 11, device=device)
    for half in (torch.float32, torch.bfloat16):
        found = ops.gaussian_nll(x.to(half), mean.to(half), 0.1, scale_type="std")
        expected = reference.gaussian_nll(x.to(half).double(), mean.to(half).double(), 0.1, scale_type="std")
        # The number is not rounded to the half type: that would cost four in a thousand.
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)


def test_gaussian_shared_sigma_is_not_expanded():
    x = mean = torch.zeros(1000, 1000)
    scale = torch.zeros((), requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        nll = ops.gaussian_nll(x, mean, scale, reduction="sum")
        torch.autograd.grad(nll, scale)
    assert max(event.cpu_memory_usage for event in profile.events()) < 1000


def test_gaussian_shared_sigma_gradient_is_accurate_and_repeatable():
    x, mean = torch.randn(3, 700_001), torch.zeros(3, 700_001)
    scale = torch.zeros(1, requires_grad=True)
    exact = torch.autograd.grad(
        reference.gaussian_nll(x.double(), mean.double(), scale.double(), reduction="sum"), scale
    )[0]
    gradients = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        gradients += torch.autograd.grad(ops.gaussian_nll(x, mean, scale, reduction="sum"), scale)
    torch.testing.assert_close(gradients[0], exact.float(), rtol=0, atol=0.3)  # of terms that sum to 2.1e6
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_gaussian_only_wanted_gradients_are_computed():
    x, mean, std = predictions(64, 64)
    mean.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(ops.gaussian_nll(x, mean, std, scale_type="std", reduction="sum"), mean)
    backward = [e for e in profile.events() if e.name == "isthmus::gaussian_nll_backward"]
    assert backward and sum(e.cpu_memory_usage for e in backward) <= 64 * 64 * 4


def test_gaussian_nan_stays_in_its_row(isa, device):
    x, mean, std = predictions(50, 9, device=device)
    expected = ops.gaussian_nll(x, mean, std)
    mean[7, 3] = torch.nan
    found = ops.gaussian_nll(x, mean, std)
    assert found[7].isnan()
    found[7] = expected[7]
    assert torch.equal(found, expected)


def test_gaussian_empty(device):
    rows, cols = torch.zeros(0, 4, device=device), torch.zeros(4, 0, device=device)
    assert ops.gaussian_nll(rows, rows, rows).shape == (0,)
    assert ops.gaussian_nll(rows, rows, rows, reduction="sum") == 0
    assert ops.gaussian_nll(rows, rows, rows, reduction="mean").isnan()
    assert torch.equal(ops.gaussian_nll(cols, cols, cols), torch.zeros(4, device=device))
    scale = torch.zeros(1, device=device, requires_grad=True)
    ops.gaussian_nll(rows, rows, scale, reduction="sum").backward()
    assert scale.grad == 0


# ---- discretized_logistic_mixture_nll --------------------------------------------------------------------------------

mixture_nll = ops.discretized_logistic_mixture_nll


def every_pixel(channels, bins):
    """One image whose pixels are all the values a pixel can take."""
    levels = torch.linspace(-1, 1, bins, dtype=torch.float64)
    return torch.cartesian_prod(*[levels] * channels).reshape(-1, channels).T.reshape(1, channels, 1, -1)


@pytest.mark.parametrize(("channels", "bins"), [(1, 256), (1, 2), (3, 5)])
@pytest.mark.parametrize("log_scale", (-4.0, -1.0, 3.0))
def test_mixture_probabilities_sum_to_one(channels, bins, log_scale, isa):
    x = every_pixel(channels, bins)
    parameters = torch.randn(1, 2 * (3 if channels == 1 else 10), 1, 1, dtype=torch.float64)
    for c in range(channels):
        kinds = 2 if channels == 1 else 3
        parameters[:, 2 + 2 * kinds * c + 2 : 2 + 2 * kinds * c + 4] += log_scale
    parameters = parameters.expand(-1, -1, *x.shape[2:])
    for function in (mixture_nll, reference.discretized_logistic_mixture_nll):
        nll = function(x, parameters, num_mixtures=2, bins=bins, reduction="none")
        torch.testing.assert_close(torch.exp(-nll).sum(), torch.ones((), dtype=torch.float64), rtol=1e-12, atol=0)


def one_logistic(x, mean, log_scale, dtype=torch.float32):
    """nll of a grey pixel under one component, and its gradients by mean and log-scale."""
    x = torch.tensor(x, dtype=dtype).reshape(1, 1, 1, 1)
    parameters = torch.tensor([0.0, mean, log_scale], dtype=dtype).reshape(1, 3, 1, 1).requires_grad_()
    nll = mixture_nll(x, parameters, num_mixtures=1, min_log_scale=-50.0)
    (grad,) = torch.autograd.grad(nll.sum(), parameters)
    return nll.item(), grad[0, 1].item(), grad[0, 2].item()


@pytest.mark.parametrize("log_scale", (3.0, 8.0, 20.0))
def test_mixture_bins_much_narrower_than_the_scale(log_scale, isa):
    """Density times width, to all digits of float32."""
    t = (0.25 - 0.75) * math.exp(-log_scale)
    expected = -math.log(2 / 255) + log_scale + t + 2 * math.log1p(math.exp(-t))
    assert one_logistic(0.25, 0.75, log_scale)[0] == pytest.approx(expected, rel=3e-7)


@pytest.mark.parametrize("log_scale", (-7.0, -10.0, -20.0))
def test_mixture_thousands_of_scales_away(log_scale, isa):
    """The probability is e^-near (1 - e^-width): its log and its slopes are finite."""
    inverse, half_bin = math.exp(-log_scale), 1 / 255
    near, width = (1.25 - half_bin) * inverse, 2 * half_bin * inverse
    nll, by_mean, by_log_scale = one_logistic(0.75, -0.5, log_scale)
    assert nll == pytest.approx(near - math.log(-math.expm1(-width)), rel=1e-6)
    assert by_mean == pytest.approx(-inverse, rel=1e-6)
    assert by_log_scale == pytest.approx(-near + width / math.expm1(min(width, 700)), rel=1e-6)


def test_mixture_floor_of_the_log_scale(isa):
    x = torch.full((1, 1, 1, 1), 0.25)
    parameters = torch.tensor([0.0, 0.3, -9.0]).reshape(1, 3, 1, 1).requires_grad_()
    at_floor = torch.tensor([0.0, 0.3, -7.0]).reshape(1, 3, 1, 1).requires_grad_()
    below, at = mixture_nll(x, parameters, num_mixtures=1), mixture_nll(x, at_floor, num_mixtures=1)
    assert torch.equal(below, at)
    (grad_below,), (grad_at,) = torch.autograd.grad(below, parameters), torch.autograd.grad(at, at_floor)
    assert grad_below[0, 2] == 0 and grad_at[0, 2] != 0
    assert torch.equal(grad_below[0, :2], grad_at[0, :2])


# Fewer pixels than a vector, ragged tiles, more than an item.
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (9, 15), (33, 40)], ids=str)
@pytest.mark.parametrize("channels", (1, 3))
@pytest.mark.parametrize("reduction", ("none", "image", "sum", "mean"))
def test_mixture_every_shape(size, channels, reduction, isa, device):
    x = torch.randint(0, 256, (3, channels, *size), device=device) / 127.5 - 1
    parameters = torch.randn(3, 3 * (3 if channels == 1 else 10), *size, device=device)
    leaves = [x.requires_grad_(), parameters.requires_grad_()]
    doubles = wide(*leaves)
    found = mixture_nll(*leaves, num_mixtures=3, reduction=reduction)
    expected = reference.discretized_logistic_mixture_nll(*doubles, num_mixtures=3, reduction=reduction)
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=3e-6)
    grad = torch.randn_like(found)
    for a, e in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, doubles, grad.double()), strict=True
    ):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=3e-6 * e.abs().max().item())


def test_mixture_nan_stays_in_its_pixel(isa, device):
    x, parameters = torch.zeros(2, 3, 4, 5, device=device), torch.randn(2, 20, 4, 5, device=device)
    expected = mixture_nll(x, parameters, num_mixtures=2, reduction="none")
    parameters[1, 7, 2, 3] = torch.nan
    found = mixture_nll(x, parameters, num_mixtures=2, reduction="none")
    assert found[1, 2, 3].isnan()
    found[1, 2, 3] = expected[1, 2, 3]
    assert torch.equal(found, expected)


def test_mixture_empty(device):
    for images, height in ((0, 4), (2, 0)):
        x, parameters = (
            torch.zeros(images, 3, height, 4, device=device),
            torch.zeros(images, 20, height, 4, device=device),
        )
        assert torch.equal(mixture_nll(x, parameters, num_mixtures=2), torch.zeros(images, device=device))
        assert mixture_nll(x, parameters, num_mixtures=2, reduction="sum") == 0


def test_mixture_keeps_nothing_of_the_size_of_its_parameters():
    x, parameters = torch.zeros(4, 3, 32, 32), torch.zeros(4, 100, 32, 32)
    with torch.profiler.profile(profile_memory=True) as profile:
        mixture_nll(x, parameters)
    assert max(event.cpu_memory_usage for event in profile.events()) < 1000


# ---- discretized_gaussian_nll ----------------------------------------------------------------------------------------


NODES, PANELS = list(zip(*(map(float, column) for column in np.polynomial.legendre.leggauss(24)), strict=True)), 16


def exact_discretized(x, mean, std, width):
    """-log of the bin's probability and its derivatives by x and log std, from 50-digit arithmetic."""
    with localcontext() as context:
        context.prec = 60
        x, mean, std, width = map(Decimal, (x, mean, std, width))
        a, b = (abs(x - mean) - width / 2) / std, (abs(x - mean) + width / 2) / std
        density_a, density_b = ((-z * z / 2).exp() for z in (a, b))
        # Gauss-Legendre on panels; the integrand e^-(z² - a²)/2 is smooth, and 1 at a.
        step = (b - a) / PANELS
        places = [(a + (i + Decimal(0.5 + 0.5 * t)) * step, w) for i in range(PANELS) for t, w in NODES]
        integral = sum(Decimal(w) * ((a * a - z * z) / 2).exp() for z, w in places) * step / 2 * density_a
        root = (2 * Decimal(math.pi)).sqrt()
        sign = 1 if x > mean else -1
        by_x = sign * (density_a - density_b) / integral / std
        by_log_std = (b * density_b - a * density_a) / integral
        return float(-(integral / root).ln()), float(by_x), float(by_log_std)


# Standard deviations away, and bins in standard deviations: the middle, both tails, and next to every switch.
DISTANCES = (0.0, 1e-3, 0.3, 0.49, 0.51, 1.0, 1.9, 2.1, 5.0, 12.0, 50.0, -3.0, -50.0)
WIDTHS = (1e-6, 1e-3, 0.1, 0.9, 0.999, 1.001, 1.5, 4.0)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 3e-6)], ids=str)
def test_discretized_is_exact_everywhere(width, dtype, bound, isa):
    x = torch.tensor(DISTANCES, dtype=dtype, requires_grad=True)
    zero = torch.zeros(len(DISTANCES), dtype=dtype, requires_grad=True)
    logvar = torch.zeros(len(DISTANCES), dtype=dtype, requires_grad=True)
    functions = [ops.discretized_gaussian_nll]
    if dtype == torch.float64:
        functions.append(reference.discretized_gaussian_nll)
    for function in functions:
        nll = function(x, zero, logvar, bin_width=width, reduction="none")
        by_x, by_mean, by_logvar = torch.autograd.grad(nll.sum(), (x, zero, logvar))
        for i, distance in enumerate(x.tolist()):
            value, slope, slope_log_std = exact_discretized(distance, 0, 1, width)
            assert nll[i].item() == pytest.approx(value, rel=bound, abs=bound)
            assert by_x[i].item() == pytest.approx(slope, rel=bound, abs=bound)
            assert by_mean[i].item() == pytest.approx(-slope, rel=bound, abs=bound)
            assert by_logvar[i].item() == pytest.approx(slope_log_std / 2, rel=bound, abs=bound)


@pytest.mark.parametrize("scale_type", SCALE_TYPES)
@pytest.mark.parametrize("width", (0.01, 0.5, 3.0))
def test_discretized_probabilities_sum_to_one(scale_type, width, isa, device):
    levels = torch.arange(-40, 41, dtype=torch.float64, device=device) * width
    mean = torch.full_like(levels, 0.3)
    scale = scale_of(torch.full_like(levels, 0.8), scale_type)
    nll = ops.discretized_gaussian_nll(
        levels, mean, scale, bin_width=width, low=-40 * width, high=40 * width, scale_type=scale_type, reduction="none"
    )
    torch.testing.assert_close(torch.exp(-nll).sum().cpu(), torch.ones((), dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("distance", (-50.0, -9.0, -1.0, 0.0, 0.5, 4.0, 50.0))
def test_discretized_open_bins_are_one_sided_tails(distance, isa):
    x = torch.tensor([2.0, -2.0])
    mean = (x - torch.tensor([distance, -distance])).requires_grad_()
    nll = ops.discretized_gaussian_nll(x, mean, torch.zeros(2), bin_width=0.5, low=-2.0, high=2.0, reduction="none")
    (grad,) = torch.autograd.grad(nll.sum(), mean)
    edge = torch.tensor(distance - 0.25, dtype=torch.float64)
    torch.testing.assert_close(nll.double(), -torch.special.log_ndtr(-edge).expand(2), rtol=1e-6, atol=1e-30)
    hazard = math.sqrt(2 / math.pi) / torch.special.erfcx(edge / math.sqrt(2))
    torch.testing.assert_close(grad.double(), torch.stack((-hazard, hazard)), rtol=3e-6, atol=1e-30)


def test_discretized_many_sigmas_in_float32(isa, device):
    """1e4 standard deviations: the value is finite, and so is every gradient."""
    x = torch.tensor([1.0, -1.0], device=device, requires_grad=True)
    mean, scale = (torch.full((2,), v, device=device, requires_grad=True) for v in (0.0, 1e-4))
    nll = ops.discretized_gaussian_nll(x, mean, scale, bin_width=2 / 255, scale_type="std", reduction="none")
    near = (1 - 1 / 255) * 1e4
    torch.testing.assert_close(nll.cpu(), torch.full((2,), near**2 / 2), rtol=1e-6, atol=0)
    for grad in torch.autograd.grad(nll.sum(), (x, mean, scale)):
        assert grad.isfinite().all() and (grad != 0).all()


# ---- refused arguments -----------------------------------------------------------------------------------------------

X, IMAGE = torch.zeros(3, 4), torch.zeros(2, 3, 4, 4)
raw = torch.ops.isthmus


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.gaussian_nll(X, X, X, scale_type="variance"), "scale_type is 'variance'; expected one of"),
        (lambda: ops.gaussian_nll(X, X, X, reduction="rows"), "reduction is 'rows'; expected one of"),
        (lambda: ops.gaussian_nll(X, X.double(), X), "mean has dtype Double; expected Float, like x"),
        (lambda: ops.gaussian_nll(X.int(), X.int(), X.int()), "x has dtype Int; expected float32"),
        (lambda: ops.gaussian_nll(X, X, X, torch.zeros(5)), r"weight has shape \[5\], which does not broadcast"),
        (lambda: ops.discretized_gaussian_nll(X, X, X, bin_width=0.0), "bin_width is 0; expected a positive number"),
        (
            lambda: ops.discretized_gaussian_nll(X, X, X, bin_width=1.0, low=2.0, high=2.0),
            "low is 2 and high is 2; expected low < high",
        ),
        (lambda: mixture_nll(X, X), r"x has shape \[3, 4\]; expected \[B, C, H, W\] with C = 1 or 3"),
        (
            lambda: mixture_nll(IMAGE, torch.zeros(2, 10, 4, 4), num_mixtures=2),
            r"parameters has shape \[2, 10, 4, 4\]; expected \[2, 20, 4, 4\]: 2 mixtures of 3 channels",
        ),
        (lambda: mixture_nll(IMAGE, IMAGE.double()), "parameters has dtype Double; expected Float, like x"),
        (lambda: mixture_nll(IMAGE, IMAGE, num_mixtures=0), "num_mixtures is 0; expected at least 1"),
        (lambda: mixture_nll(IMAGE, IMAGE, bins=1), "bins is 1; expected at least 2"),
        (lambda: mixture_nll(IMAGE, IMAGE, reduction="row"), "reduction is 'row'; expected one of 'none', 'image'"),
        (
            lambda: raw.gaussian_nll(X, X, X[:2], None, "logvar", 0.0, "row"),
            r"scale has shape \[2, 4\]; expected \[3, 4\], like x",
        ),
        (
            lambda: raw.gaussian_nll(X.half(), X.half(), torch.zeros(1).half(), None, "logvar", 0.0, "row"),
            "scale has one element of dtype Half; expected Float, the type of sums",
        ),
        (
            lambda: raw.gaussian_nll_backward(X, X, X, X, None, "logvar", 0.0, "row", True, True, True),
            r"grad is Float\[3, 4\]; expected Float\[",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()
