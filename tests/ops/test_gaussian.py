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
