"""What is particular to Bayesian layers; the rest is in tests/test_every_op.py."""

import pytest
import torch
from torch.nn.functional import linear, softplus
from torch.utils.checkpoint import checkpoint

import isthmus
from isthmus import ops, reference

ESTIMATORS = ("weight", "local")
both_estimators = pytest.mark.parametrize("estimator", ESTIMATORS)


def layer(rows, inputs, features, device="cpu", dtype=torch.float32):
    """x, weight_mean, weight_scale, bias_mean, bias_scale for scale_type "softplus"."""
    tensors = (
        torch.randn(rows, inputs),
        torch.randn(features, inputs) / max(inputs, 1) ** 0.5,
        torch.randn(features, inputs) - 2,
        torch.randn(features),
        torch.randn(features) - 2,
    )
    return [t.to(device, dtype) for t in tensors]


def noises(key, x, weight_mean, estimator, dtype=torch.float32):
    """The noise of a call, as the arguments of the reference."""
    features = weight_mean.shape[0]
    if estimator == "local":
        return {"noise": ops.gaussian_noise(key, (*x.shape[:-1], features), dtype).double()}
    return {
        "noise": ops.gaussian_noise(key, weight_mean.shape, dtype).double(),
        "bias_noise": ops.gaussian_noise(isthmus.fold_in(key, 1), (features,), dtype).double(),
    }


def assert_close(found, expected, tolerance):
    """Relative to the largest entry: that is what the errors of a product are relative to."""
    assert found.shape == expected.shape
    if found.numel():
        error = (found.double() - expected.double()).abs().max() / expected.abs().max()
        assert error <= tolerance, f"off by {error:.3g} of the largest entry"


# ---- values ----------------------------------------------------------------------------------------------------------


def test_the_weight_is_the_stream_of_its_key(isa, device):
    """The weight estimator is a linear layer with the weight one can draw oneself."""
    key = isthmus.key(12, device=device)
    x, mean, rho, bias_mean, bias_rho = layer(50, 70, 90, device)
    weight = mean + softplus(rho) * ops.gaussian_noise(key, mean.shape)
    bias = bias_mean + softplus(bias_rho) * ops.gaussian_noise(isthmus.fold_in(key, 1), bias_mean.shape)
    found = ops.bayes_linear(x, mean, rho, bias_mean, bias_rho, key=key)
    assert_close(found, linear(x.double(), weight.double(), bias.double()), 1e-6)
    identity = torch.eye(70, device=device)
    torch.testing.assert_close(ops.bayes_linear(identity, mean, rho, key=key), weight.T, rtol=1e-6, atol=1e-6)


# Less and more than a tile of rows, a strip of columns, a chunk of depth; odd sizes, and multiples of everything.
SIZES = [
    (1, 1, 1), (5, 3, 2), (13, 64, 65), (12, 256, 64), (37, 257, 129), (129, 70, 30), (300, 513, 10), (30, 10, 530),
    (2100, 20, 33), (4100, 7, 70),
]  # fmt: skip


@both_estimators
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_size(sizes, estimator, isa, device):
    key = isthmus.key(5, device=device)
    leaves = [t.requires_grad_() for t in layer(*sizes, device)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    found = ops.bayes_linear(*leaves, estimator=estimator, key=key)
    expected = reference.bayes_linear(*wide, estimator=estimator, **noises(key, leaves[0], leaves[1], estimator))
    assert_close(found, expected, 3e-6)
    grad = torch.randn_like(found)
    found_gradients = torch.autograd.grad(found, leaves, grad)
    for a, e in zip(found_gradients, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        assert_close(a, e, 1e-5)


@both_estimators
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_every_dtype_across_chunks(dtype, estimator, isa, device):
    """Rounded once, however many chunks the sum has: half types accumulate in float32."""
    key = isthmus.key(8, device=device)
    leaves = [t.requires_grad_() for t in layer(31, 520, 66, device, dtype)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    stream = torch.float64 if dtype == torch.float64 else torch.float32
    found = ops.bayes_linear(*leaves, estimator=estimator, key=key)
    noise = noises(key, leaves[0], leaves[1], estimator, stream)
    expected = reference.bayes_linear(*wide, estimator=estimator, **noise)
    tolerance = {torch.float64: 1e-14, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert_close(found, expected, tolerance)
    grad = torch.randn_like(found)
    found_gradients = torch.autograd.grad(found, leaves, grad)
    for a, e in zip(found_gradients, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        assert_close(a, e, tolerance)


@both_estimators
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4), (0, 0)], ids=str)
def test_empty(shape, estimator, device):
    """No rows: gradients of zero. No inputs: the bias alone."""
    key = isthmus.key(1, device=device)
    leaves = [t.requires_grad_() for t in layer(1, shape[-1], 6, device)]
    leaves[0] = torch.zeros(shape, device=device, requires_grad=True)
    out = ops.bayes_linear(*leaves, estimator=estimator, key=key)
    expected = reference.bayes_linear(
        *(t.detach().double() for t in leaves), estimator=estimator, **noises(key, leaves[0], leaves[1], estimator)
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert [g.shape for g in gradients] == [t.shape for t in leaves]
    if out.numel() == 0:
        assert all((g == 0).all() for g in gradients)


@both_estimators
def test_no_features(estimator, device):
    leaves = [t.requires_grad_() for t in layer(3, 4, 0, device)]
    out = ops.bayes_linear(*leaves, estimator=estimator)
    assert out.shape == (3, 0)
    grad_x, *_ = torch.autograd.grad(out.sum(), leaves)
    assert torch.equal(grad_x, torch.zeros(3, 4, device=device))


@both_estimators
def test_leading_dimensions_are_rows(estimator, device):
    key = isthmus.key(3, device=device)
    x, *parameters = layer(24, 5, 7, device)
    flat = ops.bayes_linear(x, *parameters, estimator=estimator, key=key)
    assert torch.equal(
        ops.bayes_linear(x.reshape(2, 3, 4, 5), *parameters, estimator=estimator, key=key), flat.reshape(2, 3, 4, 7)
    )
    assert torch.equal(ops.bayes_linear(x[0], *parameters, estimator=estimator, key=key), flat[0])


@both_estimators
def test_a_bias_without_scale_is_not_random(estimator, device):
    x, mean, _, bias_mean, _ = layer(4, 3, 5, device)
    bias_mean.requires_grad_()
    no_width = torch.zeros_like(mean)
    out = ops.bayes_linear(x, mean, no_width, bias_mean, scale_type="std", estimator=estimator)
    torch.testing.assert_close(out, linear(x, mean, bias_mean))
    out.sum().backward()
    assert torch.equal(bias_mean.grad, torch.full((5,), 4.0, device=device))


# ---- the distribution ------------------------------------------------------------------------------------------------


@both_estimators
def test_moments_of_an_output(estimator):
    """Over many keys, both estimators give each output the mean and the variance of the layer."""
    draws = 4000
    x, mean, rho, bias_mean, bias_rho = layer(3, 6, 4)
    keys = isthmus.split(isthmus.key(2), draws)
    out = torch.stack([ops.bayes_linear(x, mean, rho, bias_mean, bias_rho, estimator=estimator, key=k) for k in keys])
    location = linear(x, mean, bias_mean)
    variance = linear(x**2, softplus(rho) ** 2, softplus(bias_rho) ** 2)
    score = (out - location) / variance.sqrt()
    assert score.mean(0).abs().max() < 4.5 * draws**-0.5
    assert (score.var(0) - 1).abs().max() < 4.5 * (2 / draws) ** 0.5


def test_rows_share_a_weight_but_not_the_local_noise():
    x, *parameters = layer(1, 8, 16)
    x = x.expand(2, 8)
    weight, local = (ops.bayes_linear(x, *parameters, estimator=e, key=isthmus.key(4)) for e in ESTIMATORS)
    assert torch.equal(weight[0], weight[1])
    assert (local[0] != local[1]).all()


def test_zero_variance_has_no_gradient_instead_of_nan(isa, device):
    """A zero row of x and no bias_scale: √0 has no slope, and nothing flows through it."""
    x, mean, rho, bias_mean, _ = layer(5, 7, 9, device)
    x[2] = 0
    leaves = [t.requires_grad_() for t in (x, mean, rho, bias_mean)]
    key = isthmus.key(6, device=device)
    out = ops.bayes_linear(*leaves, estimator="local", key=key)
    assert torch.equal(out[2], bias_mean)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, grad)
    assert all(torch.isfinite(g).all() for g in found)
    torch.testing.assert_close(found[0][2], grad[2] @ mean)
    others = [0, 1, 3, 4]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    noise = noises(key, x, mean, "local")["noise"]
    expected = reference.bayes_linear(wide[0][others], *wide[1:], estimator="local", noise=noise[others])
    rest = torch.autograd.grad(expected, wide[2], grad[others].double())[0]
    assert_close(found[2], rest, 1e-6)


@both_estimators
def test_a_nan_stays_in_its_row(estimator, isa, device):
    x, *parameters = layer(40, 9, 70, device)
    key = isthmus.key(0, device=device)
    expected = ops.bayes_linear(x, *parameters, estimator=estimator, key=key)
    x[17, 4] = torch.nan
    found = ops.bayes_linear(x, *parameters, estimator=estimator, key=key)
    assert found[17].isnan().all()
    found[17] = expected[17]
    assert torch.equal(found, expected)


# ---- determinism, memory, randomness ---------------------------------------------------------------------------------


@both_estimators
@pytest.mark.parametrize("sizes", [(50, 300, 200), (2300, 40, 10), (4500, 20, 70)], ids=str)
def test_threads_do_not_matter(sizes, estimator):
    leaves = [t.requires_grad_() for t in layer(*sizes)]

    def run(threads):
        torch.set_num_threads(threads)
        out = ops.bayes_linear(*leaves, estimator=estimator, key=isthmus.key(9))
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    expected = run(1)
    for threads in (2, 7):
        assert all(map(torch.equal, run(threads), expected))


@both_estimators
def test_only_inputs_and_the_key_are_saved(estimator):
    leaves = [t.requires_grad_() for t in layer(8, 16, 32)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.bayes_linear(*leaves, estimator=estimator)
    inputs = {t.data_ptr() for t in leaves}
    extra = [t for t in saved if t is not None and t.data_ptr() not in inputs]
    assert sum(t.numel() * t.element_size() for t in extra) == 16


@both_estimators
def test_several_draws_before_one_backward_keep_their_own_noise(estimator):
    x, mean, _, _, _ = layer(1, 6, 5)
    std = torch.ones(5, 6, requires_grad=True)
    keys = isthmus.split(isthmus.key(4), 3)

    def draw(key):
        return ops.bayes_linear(x, mean, std, scale_type="std", estimator=estimator, key=key).sum()

    together = torch.autograd.grad(sum(map(draw, keys)), std)[0]
    one_by_one = sum(torch.autograd.grad(draw(key), std)[0] for key in keys)
    torch.testing.assert_close(together, one_by_one)


def test_manual_seed_and_generators_govern_fresh_keys():
    tensors = layer(4, 3, 5)
    torch.manual_seed(1)
    first, second = (ops.bayes_linear(*tensors) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(ops.bayes_linear(*tensors), first)
    assert not torch.equal(first, second)
    drawn = [ops.bayes_linear(*tensors, generator=torch.Generator().manual_seed(9)) for _ in range(2)]
    assert torch.equal(*drawn)


@both_estimators
def test_checkpointing_draws_the_same_noise(estimator):
    leaves = [t.requires_grad_() for t in layer(8, 4, 6)]

    def run(forward):
        torch.manual_seed(2)
        return torch.autograd.grad((forward() ** 2).sum(), leaves)

    def forward():
        return ops.bayes_linear(*leaves, estimator=estimator)

    assert all(map(torch.equal, run(lambda: checkpoint(forward, use_reentrant=False)), run(forward)))


@both_estimators
def test_autocast_is_that_of_a_linear_layer(estimator):
    """The lower precision inside, whatever mixture comes in; gradients in the dtype of the parameters."""
    leaves = [t.requires_grad_() for t in layer(8, 16, 5)]
    key = isthmus.key(3)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.bayes_linear(leaves[0].bfloat16(), *leaves[1:], estimator=estimator, key=key)
        assert linear(leaves[0], leaves[1]).dtype == out.dtype == torch.bfloat16
    lowered = [t.detach().bfloat16() for t in leaves]
    assert torch.equal(out, ops.bayes_linear(*lowered, estimator=estimator, key=key))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), leaves))


# ---- refused arguments -----------------------------------------------------------------------------------------------

X, MEAN, RHO, BIAS = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(5, 4), torch.zeros(5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.bayes_linear(X, MEAN, RHO, scale_type="rho"), "scale_type is 'rho'; expected one of"),
        (lambda: ops.bayes_linear(X, MEAN, RHO, estimator="flip"), "estimator is 'flip'; expected one of"),
        (lambda: ops.bayes_linear(X, MEAN, RHO[:4]), r"weight_scale has shape \[4, 4\]; expected \[5, 4\]"),
        (lambda: ops.bayes_linear(X, MEAN.T, RHO.T), r"weight_mean has shape \[4, 5\]; expected \[\*, 4\]"),
        (lambda: ops.bayes_linear(X[0, 0], MEAN, RHO), r"x has shape \[\]; expected \[..., 4\]"),
        (lambda: ops.bayes_linear(X, MEAN.double(), RHO), "weight_mean has dtype Double; expected Float, like x"),
        (lambda: ops.bayes_linear(X.long(), MEAN.long(), RHO.long()), "x has dtype Long; expected float32"),
        (lambda: ops.bayes_linear(X, MEAN, RHO, BIAS[:4]), r"bias_mean has shape \[4\]; expected \[5\]"),
        (lambda: ops.bayes_linear(X, MEAN, RHO, BIAS, BIAS[:4]), r"bias_scale has shape \[4\]; expected \[5\]"),
        (lambda: ops.bayes_linear(X, MEAN, RHO, bias_scale=BIAS), "bias_mean is missing; bias_scale"),
        (lambda: ops.bayes_linear(X, MEAN, RHO, key=torch.zeros(2)), "key has dtype Float; expected int64"),
        (
            lambda: ops.bayes_linear(X, MEAN, RHO, key=isthmus.key(0), generator=torch.Generator()),
            "key and generator were both given",
        ),
        (
            lambda: torch.ops.isthmus.bayes_linear_backward(
                X, X, MEAN, RHO, None, isthmus.key(0), "softplus", "weight"
            ),
            r"grad has shape \[3, 4\]; expected that of the output",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()
