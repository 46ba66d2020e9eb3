"""What is particular to reparameterised sampling; the rest is in tests/test_every_op.py."""

import re

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import isthmus
from isthmus import ops, reference

needs_torch_stream = pytest.mark.skipif(
    tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 14),
    reason="torch.func._random has CPU kernels from torch 2.14 on",
)


# ---- the stream ------------------------------------------------------------------------------------------------------


def test_known_answers(isa, device):
    key = isthmus.key(0, device=device)
    expected = [0.99113774, -0.92466241, -0.61760885, -0.48206875, -0.15363818, 0.18082580]
    torch.testing.assert_close(ops.gaussian_noise(key, (6,)).cpu(), torch.tensor(expected), rtol=3e-7, atol=0)
    expected = [-0.12151797595308224, -1.35003265985765508, -0.08187420991589159]
    torch.testing.assert_close(
        ops.gaussian_noise(key, (3,), torch.float64).cpu(),
        torch.tensor(expected, dtype=torch.float64), rtol=4e-16, atol=0,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("key", ((0, 0), (-1, 2**32 - 3), (2**63 - 1, -5)), ids=str)
def test_noise_is_the_reference_stream(key, dtype, isa, device):
    """Within 4 units in the last place, with offsets that carry into the high word and wrap around."""
    key = torch.tensor(key, device=device)
    found = ops.gaussian_noise(key, (20_001,), dtype).cpu()
    expected = reference.gaussian_noise(key.cpu(), (20_001,), dtype)
    spacing = torch.finfo(dtype).eps * expected.abs().clamp_min(torch.finfo(dtype).tiny)
    assert ((found - expected).abs() / spacing).max() <= 4


@needs_torch_stream
def test_noise_is_torchs_stream():
    from torch.func import _random

    expected = _random.normal(_random.key(42), (4096,))
    found = ops.gaussian_noise(isthmus.key(42), (4096,))
    assert ((found - expected).abs() / (expected.abs() * 2**-23)).max() <= 6


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_noise_depends_on_key_and_index_alone(dtype, device):
    key = isthmus.key(7, device=device)
    long = ops.gaussian_noise(key, (5000,), dtype)
    for size in (0, 1, 3, 4, 5, 63, 64, 65, 1023, 1025, 4097):
        assert torch.equal(ops.gaussian_noise(key, (size,), dtype), long[:size])
    assert torch.equal(ops.gaussian_noise(key, (50, 100), dtype).flatten(), long)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_noise_is_the_rounded_float32_stream(dtype, device):
    key = isthmus.key(3, device=device)
    assert torch.equal(ops.gaussian_noise(key, (999,), dtype), ops.gaussian_noise(key, (999,)).to(dtype))


def test_moments():
    noise = ops.gaussian_noise(isthmus.key(5), (1 << 20,)).double()
    error = (1 << 20) ** -0.5
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(noise.pow(power).mean() - moment) < 4 * variance**0.5 * error
    neighbours = torch.corrcoef(noise.reshape(-1, 4).T) - torch.eye(4)
    assert neighbours.abs().max() < 5 * 2 * error


# ---- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", (None, 1, 3))
@pytest.mark.parametrize(
    "shape",
    [(), (1,), (4097,), (3, 1), (7, 5), (65, 17), (2, 1024), (3, 1025), (2, 20_000), (1, 40_001), (2, 0)],
    ids=str,
)  # fmt: skip
def test_every_shape(shape, samples, isa, device):
    """Rows narrower and wider than a tile and a chunk, whatever the vector length leaves over."""
    mean, logvar = torch.randn(shape, device=device), 0.3 * torch.randn(shape, device=device)
    prior = torch.randn(shape, device=device), 0.3 * torch.randn(shape, device=device)
    key = isthmus.key(11, device=device)
    drawn = ops.gaussian_noise(key, shape if samples is None else (samples, *shape))
    z, kl = ops.gaussian_sample_kl(mean, logvar, *prior, num_samples=samples, key=key)
    wide = (t.double() for t in (mean, logvar, *prior))
    expected = reference.gaussian_sample_kl(*wide, num_samples=samples, noise=drawn.double())
    torch.testing.assert_close(z.double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kl.double(), expected[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(z, ops.gaussian_sample(mean, logvar, num_samples=samples, key=key))


def test_wide_rows_do_not_depend_on_threads():
    mean, logvar = torch.randn(2, 100_003), torch.randn(2, 100_003)
    key = isthmus.key(1)
    torch.set_num_threads(1)
    expected = ops.gaussian_sample_kl(mean, logvar, key=key)
    for threads in (2, 7):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, ops.gaussian_sample_kl(mean, logvar, key=key), expected))


def test_only_inputs_and_the_key_are_saved():
    mean, logvar = (torch.zeros(64, 32, requires_grad=True) for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.gaussian_sample_kl(mean, logvar)
    inputs = {mean.data_ptr(), logvar.data_ptr()}
    extra = [t for t in saved if t is not None and t.data_ptr() not in inputs]
    assert sum(t.numel() * t.element_size() for t in extra) == 16


def test_a_nan_stays_in_its_row(isa):
    mean, logvar = torch.randn(5, 40), torch.randn(5, 40)
    key = isthmus.key(0)
    z, kl = ops.gaussian_sample_kl(mean, logvar, key=key)
    mean[2, 7] = torch.nan
    broken_z, broken_kl = ops.gaussian_sample_kl(mean, logvar, key=key)
    assert broken_z[2, 7].isnan() and broken_kl[2].isnan()
    z[2, 7], kl[2] = 0, 0
    broken_z[2, 7], broken_kl[2] = 0, 0
    assert torch.equal(z, broken_z) and torch.equal(kl, broken_kl)


def test_extreme_logvar_has_finite_gradients(isa, device):
    mean = torch.ones(2, 3, device=device, requires_grad=True)
    logvar = torch.tensor([[80.0, -80.0, 0.0]] * 2, device=device, requires_grad=True)
    z, kl = ops.gaussian_sample_kl(mean, logvar, key=isthmus.key(0, device=device))
    (z.sum() + kl.sum()).backward()
    assert torch.isfinite(mean.grad).all() and torch.isfinite(logvar.grad).all()
    # ∂KL/∂logvar = (exp(logvar) - 1) / 2
    assert torch.allclose(kl[0], 0.5 * torch.tensor(80.0, device=device).exp(), rtol=1e-5)


@pytest.mark.parametrize("logvar", (80.0, -80.0))
@pytest.mark.parametrize("prior", (False, True), ids=("standard", "prior"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("op", (ops.gaussian_sample_kl, ops.gaussian_sample_log_prob), ids=("sample_kl", "log_prob"))
def test_extreme_scales_have_finite_gradients(op, dtype, prior, logvar, isa, device):
    scale = torch.full((2, 3), logvar, device=device, dtype=dtype)
    mean = torch.zeros_like(scale)
    leaves = [mean, scale, mean.clone(), scale.clone()] if prior else [mean, scale]
    leaves = [t.requires_grad_() for t in leaves]
    outputs = op(*leaves, num_samples=2, key=isthmus.key(0, device=device))
    assert all(t.isfinite().all() for t in outputs)
    grads = torch.autograd.grad(sum(t.double().sum() for t in outputs), leaves)
    assert all(grad.isfinite().all() for grad in grads)


def test_priors_broadcast():
    mean, logvar = torch.randn(6, 4), torch.randn(6, 4)
    prior_mean = torch.randn(4, requires_grad=True)
    prior_logvar = torch.zeros((), requires_grad=True)
    _, kl = ops.gaussian_sample_kl(mean, logvar, prior_mean, prior_logvar)
    kl.sum().backward()
    expected = -(mean - prior_mean).sum(0)
    torch.testing.assert_close(prior_mean.grad, expected.detach())
    assert prior_logvar.grad.shape == ()


def test_temperature_zero_is_the_mean():
    mean, logvar = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(ops.gaussian_sample(mean, logvar, temperature=0.0), mean)


# ---- every option draws from the stream ------------------------------------------------------------------------------


def drawn(key, samples, antithetic, *shape, dtype=torch.float64):
    """The noise of samples: a new leading axis, unless samples is None."""
    if samples is None:
        return ops.gaussian_noise(key, shape, dtype)
    if not antithetic:
        return ops.gaussian_noise(key, (samples, *shape), dtype)
    noise = ops.gaussian_noise(key, (samples // 2, *shape), dtype)
    return torch.stack((noise, -noise), 1).flatten(0, 1)


DRAWS = ((None, False, 1.0), (1, False, 1.0), (3, False, 0.7), (4, True, 1.0), (2, True, 0.3))


@pytest.mark.parametrize(("samples", "antithetic", "temperature"), DRAWS)
def test_every_op_draws_the_stream(samples, antithetic, temperature, isa, device):
    mean, logvar, prior_mean, prior_logvar = torch.randn(4, 5, 700, device=device, dtype=torch.float64)
    key = isthmus.key(17, device=device)
    draw = {"num_samples": samples, "antithetic": antithetic, "temperature": temperature, "key": key}
    noise = temperature * drawn(key, samples, antithetic, 5, 700)
    expected = mean + (logvar / 2).exp() * noise
    prior = prior_mean, prior_logvar
    packed = torch.cat((mean, logvar), 0)
    clamped = mean + (logvar.clamp(-0.5, 0.5) / 2).exp() * noise
    residual = prior_mean + mean + ((prior_logvar + logvar) / 2).exp() * noise
    mask = torch.arange(5, device=device) % 2 == 0
    for z, wanted in (
        (ops.gaussian_sample(mean, logvar, **draw), expected),
        (ops.gaussian_sample(packed, packed_dim=0, **draw), expected),
        (ops.gaussian_sample(mean, (logvar / 2).exp(), scale_type="std", **draw), expected),
        (ops.gaussian_sample(mean, logvar, clamp=(-0.5, 0.5), **draw), clamped),
        (ops.gaussian_sample_kl(mean, logvar, *prior, **draw)[0], expected),
        (ops.gaussian_sample_kl(mean, logvar, *prior, residual=True, **draw)[0], residual),
        (ops.gaussian_sample_kl(mean, logvar, mask=mask, **draw)[0], expected * mask.unsqueeze(-1)),
        (ops.gaussian_sample_kl(mean, logvar, reduction="dim", **draw)[0], expected),
        (ops.gaussian_sample_log_prob(packed, packed_dim=0, **draw)[0], expected),
        (ops.gaussian_sample_log_prob(mean, logvar, *prior, residual=True, **draw)[0], residual),
    ):
        torch.testing.assert_close(z, wanted, rtol=1e-13, atol=1e-13)


def test_densities_are_those_of_the_samples(device):
    mean, logvar, prior_mean, prior_logvar = torch.randn(4, 5, 700, device=device, dtype=torch.float64)
    z, _, log_q, log_p = ops.gaussian_sample_log_prob(mean, logvar, prior_mean, prior_logvar, num_samples=3)
    for found, center, scale in ((log_q, mean, logvar), (log_p, prior_mean, prior_logvar)):
        expected = torch.distributions.Normal(center, (scale / 2).exp()).log_prob(z).sum(-1)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_densities_of_nothing_are_zero():
    empty = torch.zeros(4, 0)
    for density in ops.gaussian_sample_log_prob(empty, empty, num_samples=3)[2:]:
        assert torch.equal(density, torch.zeros(3, 4))


def test_antithetic_pairs_mirror_each_other(device):
    mean, logvar = torch.randn(2, 50, device=device)
    z = ops.gaussian_sample(mean, logvar, num_samples=6, antithetic=True)
    torch.testing.assert_close(z.unflatten(0, (3, 2)).mean(1), mean.expand(3, 50), rtol=1e-6, atol=1e-6)
    assert not torch.equal(z[0], z[2])


@needs_torch_stream
def test_samples_are_torchs_normals():
    from torch.func import _random

    mean, logvar = torch.randn(2, 3, 40)
    noise = _random.normal(_random.key(42), (4, 3, 40))
    found = ops.gaussian_sample(mean, logvar, num_samples=8, antithetic=True, key=isthmus.key(42))
    expected = torch.stack((mean + (logvar / 2).exp() * noise, mean - (logvar / 2).exp() * noise), 1).flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# ---- layouts and masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", (0, 1, -1))
@pytest.mark.parametrize("op", (ops.gaussian_sample, ops.gaussian_sample_kl, ops.gaussian_sample_log_prob))
def test_packed_posteriors_equal_separate_ones(op, dim, isa, device):
    packed = torch.randn(4, 6, 10, device=device, requires_grad=True)
    halves = [half.detach().contiguous().requires_grad_() for half in packed.chunk(2, dim)]
    key = isthmus.key(3, device=device)
    found = op(packed, packed_dim=dim, num_samples=2, key=key)
    expected = op(*halves, num_samples=2, key=key)
    if op is ops.gaussian_sample:
        found, expected = (found,), (expected,)
    assert all(map(torch.equal, found, expected))
    weights = [torch.randn_like(t) for t in found]
    (grad,) = torch.autograd.grad(found, packed, weights)
    assert torch.equal(grad, torch.cat(torch.autograd.grad(expected, halves, weights), dim))


def largest_allocations(call):
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    sizes = sorted((event.self_cpu_memory_usage for event in profile.events()), reverse=True)
    return [size for size in sizes if size > 4096]  # bytes; less is a key or a sum


def test_nothing_but_results_is_allocated():
    """Packed, constant, expanded: no operand is copied, forward or backward."""
    packed = torch.randn(4, 8, 50, 50, requires_grad=True)
    size = packed.numel() * 4
    prior = torch.randn(50).expand(4, 4, 50, 50), torch.zeros(()).expand(4, 4, 50, 50)
    options = {"packed_dim": 1, "reduction": "sum", "key": isthmus.key(0)}
    assert largest_allocations(lambda: ops.gaussian_sample_kl(packed, None, *prior, **options)) == [size // 2]
    z, kl = ops.gaussian_sample_kl(packed, None, *prior, **options)
    grads = torch.ones_like(z), torch.ones_like(kl)
    assert largest_allocations(lambda: torch.autograd.grad((z, kl), packed, grads)) == [size]


def test_a_packed_posterior_is_saved_as_it_is():
    packed, saved = torch.zeros(64, 32, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.gaussian_sample_kl(packed)
    assert {t.data_ptr() for t in saved if t is not None and t.is_floating_point()} == {packed.data_ptr()}


@pytest.mark.parametrize("rubbish", (torch.nan, torch.inf, -torch.inf))
def test_rows_left_out_have_samples_and_gradients_of_zero(rubbish, isa, device):
    tensors = torch.randn(4, 6, 5, 10, device=device)
    mask = torch.rand(6, 5, device=device) < 0.5
    clean = torch.where(mask.unsqueeze(-1), tensors, 0)
    tensors[:, ~mask] = rubbish

    def run(tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        z, kl = ops.gaussian_sample_kl(*leaves, mask=mask, num_samples=2, key=isthmus.key(0, device=device))
        weights = torch.linspace(0.5, 1.5, z.numel(), device=device).reshape(z.shape), torch.ones_like(kl)
        return z, kl, *torch.autograd.grad((z, kl), leaves, weights)

    for found, expected in zip(run(tensors), run(clean), strict=True):
        assert torch.equal(found, expected) and found.isfinite().all()
    z, _, *grads = run(tensors)
    assert (z[:, ~mask] == 0).all() and all((grad[~mask] == 0).all() for grad in grads)


def test_rows_left_out_have_second_derivatives_of_zero():
    tensors = torch.randn(4, 6, 5, dtype=torch.float64)
    mask = torch.arange(6) % 2 == 0
    tensors[:, ~mask] = torch.nan
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = ops.gaussian_sample_kl(*leaves, mask=mask)
    grads = torch.autograd.grad(sum(t.square().sum() for t in outputs), leaves, create_graph=True)
    second = torch.autograd.grad(sum(t.square().sum() for t in grads), leaves)
    assert all((t[mask] != 0).all() and (t[~mask] == 0).all() for t in second)


# ---- randomness ------------------------------------------------------------------------------------------------------


def test_manual_seed_and_generators_govern_fresh_keys():
    mean, logvar = torch.zeros(50), torch.zeros(50)
    torch.manual_seed(1)
    first, second = (ops.gaussian_sample(mean, logvar) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(ops.gaussian_sample(mean, logvar), first)
    assert not torch.equal(first, second)
    from_generator = [ops.gaussian_sample(mean, logvar, generator=torch.Generator().manual_seed(9)) for _ in range(2)]
    assert torch.equal(*from_generator)


def test_checkpointing_draws_the_same_noise():
    mean, logvar = (torch.randn(8, 4, requires_grad=True) for _ in range(2))
    torch.manual_seed(2)
    (checkpoint(ops.gaussian_sample, mean, logvar, use_reentrant=False) ** 2).sum().backward()
    recomputed = logvar.grad.clone()
    logvar.grad = None
    torch.manual_seed(2)
    (ops.gaussian_sample(mean, logvar) ** 2).sum().backward()
    assert torch.equal(logvar.grad, recomputed)


def test_accumulated_samples_each_keep_their_noise():
    """Several draws before one backward: peers that refill one noise buffer give the last draw's gradient."""
    mean, std = torch.zeros(100), torch.ones(100, requires_grad=True)
    keys = isthmus.split(isthmus.key(4), 3)
    total = sum(ops.gaussian_sample(mean, std, scale_type="std", key=key).sum() for key in keys)
    total.backward()
    torch.testing.assert_close(std.grad, sum(ops.gaussian_noise(key, (100,)) for key in keys))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graph_replays_draw_fresh_noise():
    mean, logvar = (torch.zeros(64, 32, device="cuda") for _ in range(2))
    ops.gaussian_sample(mean, logvar)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = ops.gaussian_sample(mean, logvar)
    graph.replay()
    first = z.clone()
    graph.replay()
    assert not torch.equal(first, z)


# ---- refused arguments -----------------------------------------------------------------------------------------------

MEAN, LOGVAR = torch.zeros(3, 4), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.gaussian_sample(MEAN, LOGVAR, scale_type="variance"), "scale_type is 'variance'; expected"),
        (lambda: ops.gaussian_sample(MEAN, LOGVAR.double()), "scale has dtype Double; expected Float, like mean"),
        (lambda: ops.gaussian_sample(MEAN.int(), LOGVAR.int()), "mean has dtype Int; expected float32"),
        (lambda: ops.gaussian_sample(MEAN, LOGVAR, num_samples=0), "num_samples is 0; expected None or at least 1"),
        (lambda: ops.gaussian_sample(MEAN, LOGVAR, key=torch.zeros(3)), "key has dtype Float; expected int64"),
        (lambda: ops.gaussian_sample(MEAN, LOGVAR, key=torch.zeros(3, dtype=torch.int64)), "key has shape"),
        (
            lambda: ops.gaussian_sample(MEAN, torch.zeros(3, 5)),
            r"scale has shape \[3, 5\], which does not broadcast with mean",
        ),
        (lambda: ops.gaussian_sample(MEAN, LOGVAR, antithetic=True), "num_samples is None; expected an even number"),
        (
            lambda: ops.gaussian_sample(MEAN, LOGVAR, antithetic=True, num_samples=3),
            "num_samples is 3; expected an even number of antithetic samples",
        ),
        (
            lambda: ops.gaussian_sample(torch.zeros(3, 5)),
            "there is no scale; expected an even size",
        ),
        (lambda: ops.gaussian_sample(MEAN, packed_dim=-3), "expected an even size along packed_dim -3"),
        (lambda: ops.gaussian_sample(MEAN, LOGVAR, clamp=(2.0, 1.0)), r"clamp is \(2.0, 1.0\); expected \(low, high\)"),
        (lambda: ops.gaussian_sample(MEAN, LOGVAR, clamp_mode="soft"), "clamp_mode is 'soft'; expected one of"),
        (lambda: ops.gaussian_sample_kl(MEAN, LOGVAR, mask=MEAN[:, 0]), "mask has dtype Float; expected bool"),
        (lambda: ops.gaussian_sample_kl(MEAN, LOGVAR, mask=MEAN == 0), "mask has shape .*, which does not expand to"),
        (lambda: ops.gaussian_sample_kl(MEAN, LOGVAR, residual=True), "residual is true without a prior; expected"),
        (lambda: ops.gaussian_sample_kl(MEAN, LOGVAR, unit="bytes"), "unit is 'bytes'; expected one of"),
        (lambda: ops.gaussian_sample_kl(MEAN, LOGVAR, balance=-1.0), "balance is -1.0; expected a share"),
        (lambda: ops.gaussian_sample_kl(MEAN, LOGVAR, reduction="group", groups=3), "groups is 3; expected a divisor"),
        (lambda: ops.gaussian_sample_log_prob(MEAN, LOGVAR, residual=True), "residual is true without a prior"),
        (
            lambda: ops.gaussian_sample_log_prob(MEAN, LOGVAR, gradient="stl"),
            "gradient is 'stl'; expected one of",
        ),
        (
            lambda: ops.gaussian_sample_log_prob(MEAN, LOGVAR, gradient="doubly_reparameterized"),
            "groups is 1, num_samples None; expected a divisor of the number of samples",
        ),
        (
            lambda: ops.gaussian_sample_log_prob(MEAN, LOGVAR, gradient="partial", num_samples=3, groups=2),
            "groups is 2, num_samples 3; expected a divisor",
        ),
        (lambda: ops.gaussian_sample_log_prob(MEAN, LOGVAR, MEAN), "prior_scale is missing; give both"),
        (lambda: ops.gaussian_sample_kl(MEAN, LOGVAR, MEAN), "prior_scale is missing; give both"),
        (lambda: ops.gaussian_sample_kl(MEAN, LOGVAR, None, LOGVAR), "prior_mean is missing; give both"),
        (lambda: ops.gaussian_sample_kl(MEAN, LOGVAR, reduction="rows"), "reduction is 'rows'; expected one of"),
        (lambda: ops.gaussian_noise(isthmus.key(0), (2,), torch.int32), "dtype has dtype Int; expected float32"),
        (
            lambda: ops.gaussian_sample(MEAN, LOGVAR, key=isthmus.key(0), generator=torch.Generator()),
            "key and generator were both given",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()
