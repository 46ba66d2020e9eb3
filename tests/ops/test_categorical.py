"""What is particular to categoricals; the rest is in tests/test_every_op.py."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import isthmus
from isthmus import ops, reference

INF = math.inf


# ---- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_noise_is_the_stream_of_its_definition(dtype, isa, device):
    """To three units of max(1, |noise|)."""
    key = isthmus.key(5, device=device)
    found = ops.gumbel_noise(key, (1_000_003,), dtype).cpu()
    expected = reference.gumbel_noise(key.cpu(), (1_000_003,), dtype)
    unit = torch.finfo(dtype).eps / 2 * expected.double().abs().clamp(min=1)
    assert ((found.double() - expected.double()).abs() <= 3 * unit).all()


def test_noise_has_the_law_of_gumbel(device):
    noise = ops.gumbel_noise(isthmus.key(1, device=device), (2_000_000,)).double().cpu()
    assert abs(noise.mean() - 0.5772156649) < 6 * math.pi / math.sqrt(6 * len(noise))
    for x in (-1.5, -0.5, 0.5, 2.0, 6.0, 9.0):
        expected = math.exp(-math.exp(-x))
        error = 6 * math.sqrt(expected * (1 - expected) / len(noise))
        assert abs((noise <= x).double().mean() - expected) < error


# Blocks of the stream of seed 0, found by search, whose first word is among the smallest or the largest of 2^32.
SMALL_WORD, LARGE_WORD = 14_883_995, 38_471_471


def test_extreme_words_give_finite_noise(isa):
    small, large = (isthmus.random.philox4x32(torch.tensor(0), torch.tensor(b))[0] for b in (SMALL_WORD, LARGE_WORD))
    assert small < 2**8
    assert large > 2**32 - 2**7  # its uniform number rounds to one
    for block, expected in (
        (SMALL_WORD, -math.log((small.item() + 0.5) * 2**-32)),
        (LARGE_WORD, -math.log(24 * math.log(2))),
    ):
        noise = ops.gumbel_noise(torch.tensor([0, block]), (1,)).item()
        assert noise == pytest.approx(expected, rel=1e-6)


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_the_winner_has_the_law_of_softmax(device):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -INF], device=device)
    y = ops.gumbel_softmax(logits.expand(400_000, 5), hard=True, temperature=3.0, key=isthmus.key(3, device=device))
    assert ((y == 0) | (y == 1)).all()
    assert (y.sum(-1) == 1).all()
    frequency, expected = y.mean(0), logits.softmax(-1)
    assert ((frequency - expected).abs() <= 6 * (expected * (1 - expected) / len(y)).sqrt()).all()


# Rows narrower and wider than a vector, a tile, and a block of sums.
SHAPES = [(), (1,), (4097,), (3, 1), (300, 2), (65, 17), (7, 1, 40), (3, 1025), (2, 5000), (1, 40_001)]


@pytest.mark.parametrize("hard", (False, True), ids=("soft", "hard"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, hard, isa, device):
    key = isthmus.key(9, device=device)
    logits = torch.randn(shape, device=device, requires_grad=True)
    prior = torch.randn(shape, device=device, requires_grad=True)
    wide = [t.detach().double().reshape(shape or (1,)).requires_grad_() for t in (logits, prior)]
    noise = ops.gumbel_noise(key, wide[0].shape).double()
    y, kl = ops.gumbel_softmax_kl(logits, prior, temperature=0.6, hard=hard, key=key)
    expected_y, expected_kl = reference.gumbel_softmax_kl(*wide, temperature=0.6, hard=hard, noise=noise)
    tolerance = {"rtol": 2e-5, "atol": 1e-6}
    torch.testing.assert_close(y.double(), expected_y.reshape(shape), **tolerance)
    torch.testing.assert_close(kl.double(), expected_kl.reshape(shape[:-1]), **tolerance)
    grads = torch.randn_like(y), torch.randn_like(kl)
    found = torch.autograd.grad((y, kl), (logits, prior), grads)
    expected = torch.autograd.grad(
        (expected_y, expected_kl),
        wide,
        [grads[0].double().reshape(expected_y.shape), grads[1].double().reshape(expected_kl.shape)],
    )
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), e.reshape(shape), **tolerance)


def test_ties_go_to_the_lowest_index(isa, device):
    """At a vanishing temperature of the noise, equal logits tie: the noise is lost against logits of 1e9."""
    logits = torch.full((4, 40), -1e9, device=device)
    logits[:, 7::9] = 1e9
    y = ops.gumbel_softmax(logits, hard=True, key=isthmus.key(0, device=device))
    assert torch.equal(y.argmax(-1), torch.full((4,), 7, device=device))
    assert torch.equal(y.sum(-1), torch.ones(4, device=device))


@pytest.mark.parametrize("hard", (False, True), ids=("soft", "hard"))
@pytest.mark.parametrize("spoiler", ([3, math.nan], [3, INF], [slice(None), -INF]), ids=("nan", "inf", "nothing"))
@pytest.mark.parametrize("cols", (9, 37))
def test_a_spoilt_row_is_nan_and_its_neighbours_are_not(cols, spoiler, hard, isa, device):
    key = isthmus.key(2, device=device)
    logits = torch.randn(50, cols, device=device)
    expected, expected_kl = ops.gumbel_softmax_kl(logits, hard=hard, key=key)
    logits[7, spoiler[0]] = spoiler[1]
    y, kl = ops.gumbel_softmax_kl(logits, hard=hard, key=key)
    assert y[7].isnan().all()
    assert kl[7].isnan()
    y[7], kl[7] = expected[7], expected_kl[7]
    assert torch.equal(y, expected)
    assert torch.equal(kl, expected_kl)


def test_the_two_ops_are_the_halves_of_the_third(device):
    key = isthmus.key(4, device=device)
    logits, prior = torch.randn(2, 33, 21, device=device)
    y, kl = ops.gumbel_softmax_kl(logits, prior, temperature=0.5, key=key)
    assert torch.equal(y, ops.gumbel_softmax(logits, temperature=0.5, key=key))
    assert torch.equal(kl, ops.categorical_kl(logits, prior))


def test_straight_through_gradients_are_those_of_the_soft_sample(device):
    key = isthmus.key(4, device=device)
    logits = torch.randn(33, 21, device=device, requires_grad=True)
    weight = torch.randn(33, 21, device=device)
    grads = []
    for hard in (False, True):
        y = ops.gumbel_softmax(logits, temperature=0.5, hard=hard, key=key)
        grads += torch.autograd.grad((y * weight).sum(), logits)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


# ---- divergences -----------------------------------------------------------------------------------------------------


def test_equals_torch_distributions(isa, device):
    logits, prior = torch.randn(2, 8, 5, 33, device=device, dtype=torch.float64) * 3
    q = Categorical(logits=logits)
    uniform = Categorical(logits=torch.zeros_like(logits))
    tolerance = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(ops.categorical_kl(logits), kl_divergence(q, uniform), **tolerance)
    expected = kl_divergence(q, Categorical(logits=prior))
    torch.testing.assert_close(ops.categorical_kl(logits, prior), expected, **tolerance)


@pytest.mark.parametrize("classes", (2, 10, 1000))
@pytest.mark.parametrize("step", (1e-1, 1e-3, 1e-5))
@pytest.mark.parametrize("with_prior", (False, True), ids=("uniform", "prior"))
def test_near_the_prior_no_digit_is_lost(with_prior, step, classes, isa, device):
    """Divergences down to 1e-11, from float32 inputs: within 1e-4 of the exact value, and so are the gradients."""
    prior = torch.randn(classes, device=device).mul(8).round().div(8) if with_prior else None
    logits = step * torch.randn(classes, device=device)
    logits = (logits if prior is None else prior + logits).requires_grad_()
    found = ops.categorical_kl(logits, prior)
    wide = logits.detach().double().requires_grad_()
    expected = reference.categorical_kl(wide, None if prior is None else prior.double())
    assert 0 < expected < 1e-2
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    (grad,) = torch.autograd.grad(found, logits)
    (expected_grad,) = torch.autograd.grad(expected, wide)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-3, atol=1e-4 * expected_grad.abs().max().item())


def test_equal_distributions_have_no_divergence(isa, device):
    logits = torch.randn(5, 37, device=device)
    assert torch.equal(ops.categorical_kl(logits, logits), torch.zeros(5, device=device))
    assert torch.equal(ops.categorical_kl(torch.full((5, 37), 3.5, device=device)), torch.zeros(5, device=device))
    for shift in (-40.0, 512.0):
        assert (ops.categorical_kl(torch.full((3, 8), shift, device=device)) == 0).all()


def test_zero_probabilities(isa, device):
    """0 log 0 is 0; what the prior excludes costs infinitely much."""
    logits = torch.tensor([[0.0, 0.0, -INF, -INF], [5.0, -INF, -INF, -INF], [0.0, 0.0, 0.0, -200.0]], device=device)
    logits.requires_grad_()
    kl = ops.categorical_kl(logits)
    exact = torch.tensor([math.log(2), math.log(4), math.log(4 / 3)], device=device)
    torch.testing.assert_close(kl, exact)
    kl.sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-6)

    prior = torch.tensor([0.0, 0.0, 0.0, -INF], device=device)
    kl = ops.categorical_kl(logits, prior)
    torch.testing.assert_close(kl[:2], torch.tensor([math.log(1.5), math.log(3)], device=device))
    assert ops.categorical_kl(torch.zeros(4, device=device), prior) == INF


@pytest.mark.parametrize("size", (30.0, 100.0, 1e4))
def test_extreme_logits(size, isa, device):
    logits = (torch.randn(6, 50, device=device) * size).requires_grad_()
    prior = (torch.randn(6, 50, device=device) * size).requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (logits, prior)]
    kl, expected = ops.categorical_kl(logits, prior), reference.categorical_kl(*wide)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(kl.sum(), (logits, prior))
    for a, e in zip(grads, torch.autograd.grad(expected.sum(), wide), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("reduction", ("row", "sum", "mean"))
def test_dtype_of_the_result(dtype, reduction, device):
    kl = ops.categorical_kl(torch.zeros(3, 4, dtype=dtype, device=device), reduction=reduction)
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_shared_prior_is_that_prior_in_every_row(isa, device):
    """One row for all takes a path of its own, which must give the bits of the ordinary one."""
    key = isthmus.key(1, device=device)
    logits, prior = torch.randn(30, 21, device=device), torch.randn(21, device=device)
    found = []
    for row in (prior.expand(30, 21), prior.expand(30, 21).contiguous()):
        leaves = [t.detach().requires_grad_() for t in (logits, row)]
        y, kl = ops.gumbel_softmax_kl(*leaves, key=key)
        found.append((y.detach(), kl.detach(), *torch.autograd.grad((y * logits).sum() + kl.sum(), leaves)))
    assert all(map(torch.equal, *found))


def test_long_rows_keep_their_accuracy(isa, device):
    logits = torch.randn(1, 1_000_003, device=device)
    found = ops.categorical_kl(logits)
    torch.testing.assert_close(found.double(), reference.categorical_kl(logits.double()), rtol=1e-5, atol=0)
    y = ops.gumbel_softmax(logits, key=isthmus.key(0, device=device))
    torch.testing.assert_close(y.double().sum(), torch.ones((), dtype=torch.float64, device=device), rtol=2e-6, atol=0)


def test_empty(device):
    rows, cols = torch.zeros(0, 4, device=device), torch.zeros(4, 0, device=device)
    assert ops.gumbel_softmax(rows).shape == (0, 4)
    assert ops.gumbel_softmax(cols, hard=True).shape == (4, 0)
    assert ops.categorical_kl(rows).shape == (0,)
    assert ops.categorical_kl(rows, reduction="mean").isnan()
    assert torch.equal(ops.categorical_kl(cols), torch.zeros(4, device=device))


# ---- what is kept, and what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("hard", (False, True), ids=("soft", "hard"))
def test_saved_are_the_sample_or_logits_and_key(hard):
    logits, key = torch.zeros(64, 32, requires_grad=True), isthmus.key(0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.gumbel_softmax(logits, hard=hard, key=key)
    allowed = {logits.data_ptr(), key.data_ptr()} if hard else {y.data_ptr()}
    assert {t.data_ptr() for t in saved} == allowed


def test_saved_with_the_divergence_are_logits_prior_and_key():
    logits, prior, key = torch.zeros(64, 32, requires_grad=True), torch.zeros(64, 32), isthmus.key(0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.gumbel_softmax_kl(logits, prior, key=key)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (logits, prior, key)}


def test_generators_and_seeds_repeat(device):
    logits = torch.zeros(5, 7, device=device)
    draws = [
        ops.gumbel_softmax(logits, generator=torch.Generator(device=device).manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


LOGITS, KEY = torch.zeros(3, 4), torch.tensor([0, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.gumbel_softmax(LOGITS, temperature=0.0), "temperature is 0; expected a positive number"),
        (lambda: ops.gumbel_softmax(LOGITS, temperature=math.nan), "temperature is nan; expected a positive number"),
        (lambda: ops.gumbel_softmax(LOGITS.int()), "logits has dtype Int; expected float32"),
        (lambda: ops.gumbel_softmax(LOGITS, key=KEY[:1]), r"key has shape \[1\]; expected \[2\]"),
        (lambda: ops.gumbel_softmax(LOGITS, key=KEY, generator=torch.Generator()), "key and generator were both given"),
        (lambda: ops.gumbel_noise(KEY, (2,), torch.int32), "dtype has dtype Int; expected float32"),
        (lambda: ops.categorical_kl(LOGITS, reduction="none"), "reduction is 'none'; expected one of 'row', 'sum'"),
        (lambda: ops.gumbel_softmax_kl(LOGITS, reduction="all"), "reduction is 'all'; expected one of 'row', 'sum'"),
        (lambda: ops.categorical_kl(LOGITS, LOGITS.double()), "prior_logits has dtype Double; expected Float, like"),
        (lambda: ops.categorical_kl(LOGITS, torch.zeros(5)), r"prior_logits has shape \[5\], which does not broadcast"),
        (
            lambda: torch.ops.isthmus.categorical_kl_backward(LOGITS, LOGITS, None, False),
            r"grad is Float\[3, 4\]; expected Float\[3\]",
        ),
        (
            lambda: torch.ops.isthmus.categorical_kl_backward(LOGITS[:, 0], LOGITS, None, True),
            "prior_gradient is true without prior_logits",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()
