"""What is particular to soft and stochastic assignment; the rest is in tests/test_every_op.py."""

import math

import pytest
import torch
from checks import assert_near, extra_memory, measures_memory
from torch.nn import functional

import isthmus
from isthmus import ops, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
METRICS = ("euclidean", "cosine", "inner_product")
every_metric = pytest.mark.parametrize("metric", METRICS)

# Rows, codes, dims around the borders of tiles (6, 12), panels (4 to 32 rows), strips (192 codes), blocks and chunks.
SHAPES = [
    (1, 1, 1), (2, 5, 0), (3, 1, 4), (7, 13, 3), (33, 191, 12), (8, 192, 16), (31, 193, 17), (64, 385, 5),
    (259, 31, 13), (5, 24, 300), (1100, 9, 2),
]  # fmt: skip


def draw(rows, codes, dim, dtype=torch.float32, device="cpu"):
    return [torch.randn(n, dim, dtype=torch.float64).to(device, dtype) for n in (rows, codes)]


def wide(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def gumbel(key, rows, codes, dtype):
    return reference.gumbel_noise(key, (rows, codes), dtype).double()


# ---- every shape -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_metric
def test_every_shape(metric, shape, dtype, isa, device):
    rows, codes, dim = shape
    x, codebook = (t.requires_grad_() for t in draw(*shape, dtype, device))
    key, indices = isthmus.key(5), torch.randint(-1, codes, (rows,), device=device)
    mask, options = torch.rand(rows, device=device) < 0.9, {"metric": metric, "temperature": 0.8}
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    noise, drawn = gumbel(key, rows, codes, accumulate).to(device), {"gumbel": True, "relaxation": 0.7}
    leaves = wide(x, codebook)
    pairs = [
        (
            ops.vq_soft_quantize(x, codebook, key=key.to(device), mask=mask, **options, **drawn)[0],
            reference.vq_soft_quantize(*leaves, noise=noise, mask=mask, **options, **drawn)[0],
        ),
        (
            ops.vq_cross_entropy(x, codebook, indices, **options),
            reference.vq_cross_entropy(*leaves, indices, **options),
        ),
        *zip(
            ops.vq_soft_statistics(x, codebook, mask=mask, **options),
            reference.vq_soft_statistics(*leaves, mask=mask, **options),
            strict=True,
        ),
    ]
    for found, expected in pairs:
        assert_near(found, expected, factor=4 + dim)  # a score carries the rounding of a sum over D
        pull = torch.randn_like(found)
        grads = torch.autograd.grad(found, (x, codebook), pull, retain_graph=True)
        for g, e in zip(grads, torch.autograd.grad(expected, leaves, pull.double(), retain_graph=True), strict=True):
            assert_near(g, e, factor=4 + dim)


@every_metric
def test_heads_are_separate_codebooks(metric):
    x, codebook = torch.randn(3, 4, 5, 6), torch.randn(3, 17, 6)
    indices, mask, key = torch.randint(-1, 17, (3, 4, 5)), torch.rand(3, 4, 5) < 0.6, isthmus.key(1)
    options = {"metric": metric, "temperature": 0.9}
    found = [
        *ops.vq_soft_quantize(x, codebook, mask=mask, **options),
        *ops.vq_soft_statistics(x, codebook, mask=mask, **options),
        ops.vq_cross_entropy(x, codebook, indices, **options),
    ]
    each = [
        (
            *ops.vq_soft_quantize(x[h], codebook[h], mask=mask[h], **options),
            *ops.vq_soft_statistics(x[h], codebook[h], mask=mask[h], **options),
            ops.vq_cross_entropy(x[h], codebook[h], indices[h], **options),
        )
        for h in range(3)
    ]
    for whole, parts in zip(found, zip(*each, strict=True), strict=True):
        assert torch.equal(whole, torch.stack(parts))
    noise = ops.gumbel_noise(key, (3, 4, 5, 17))
    expected = reference.vq_sample(x.double(), codebook.double(), noise=noise.double(), **options)
    assert torch.equal(ops.vq_sample(x, codebook, key=key, **options), expected)


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", (1e-3, 0.3, 3.0, 100.0))
@pytest.mark.parametrize("codes", (3, 190, 400, 1001))
def test_samples_are_those_of_the_stream(codes, temperature, isa, device):
    """Also where most codes draw no noise as they cannot win, and where rows begin within a block of the stream."""
    x, codebook = draw(70, codes, 4, device=device)
    key = isthmus.key(9)
    found = ops.vq_sample(x, codebook, temperature=temperature, key=key.to(device))
    noise = gumbel(key, 70, codes, torch.float32).to(device)
    perturbed = -torch.cdist(x.double(), codebook.double()).square() / temperature + noise
    best, chosen = perturbed.max(-1).values, perturbed.gather(-1, found.unsqueeze(-1)).squeeze(-1)
    assert (best - chosen <= 1e-5 * (1 + 1 / temperature)).all()
    assert (found == perturbed.argmax(-1)).sum() >= 69


def test_samples_have_the_frequencies_of_the_softmax():
    codebook, draws = torch.tensor([[0.0], [0.5], [1.5], [-2.0]]), 40_000
    p = (-(0.3 - codebook.double().squeeze(-1)).square() / 0.7).softmax(-1)
    found = ops.vq_sample(torch.full((draws, 1), 0.3), codebook, temperature=0.7, key=isthmus.key(2)).bincount()
    chi_square = ((found - draws * p).square() / (draws * p)).sum()
    assert chi_square < 16.3  # 99.9 % of three degrees of freedom


@every_metric
def test_no_temperature_is_the_nearest_code(metric, isa):
    x, codebook = draw(50, 300, 8)
    assert torch.equal(
        ops.vq_sample(x, codebook, metric=metric, temperature=0), ops.vq_assign(x, codebook, metric=metric)
    )
    _, indices = ops.vq_soft_quantize(x, codebook, metric=metric)
    assert torch.equal(indices, ops.vq_assign(x, codebook, metric=metric))


def test_fresh_keys_follow_torch():
    x, codebook = torch.zeros(50, 2), torch.randn(30, 2)
    torch.manual_seed(3)
    first, second = ops.vq_sample(x, codebook), ops.vq_sample(x, codebook)
    torch.manual_seed(3)
    assert torch.equal(first, ops.vq_sample(x, codebook)) and not torch.equal(first, second)


def test_a_hard_gumbel_quantizer_takes_the_sample():
    x, codebook = draw(40, 60, 5)
    key = isthmus.key(4)
    quantized, indices = ops.vq_soft_quantize(x, codebook, gumbel=True, hard=True, relaxation=0.3, key=key)
    assert torch.equal(indices, ops.vq_sample(x, codebook, key=key))
    assert torch.equal(quantized, codebook[indices])


# ---- against plain formulas ------------------------------------------------------------------------------------------


def test_agrees_with_torch():
    x, codebook = draw(30, 21, 6, torch.float64)
    indices = torch.randint(21, (30,))
    logits = -torch.cdist(x, codebook).square() / 1.7
    loss = ops.vq_cross_entropy(x, codebook, indices, temperature=1.7)
    torch.testing.assert_close(loss, functional.cross_entropy(logits, indices, reduction="none"))
    attention = functional.scaled_dot_product_attention(x[None], codebook[None], codebook[None], scale=0.4)[0]
    soft, _ = ops.vq_soft_quantize(x, codebook, metric="inner_product", temperature=2.5)
    torch.testing.assert_close(soft, attention)
    entropy, mean = ops.vq_soft_statistics(x, codebook, temperature=1.7)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())
    torch.testing.assert_close(mean, logits.softmax(-1).mean(0))


def test_limits_of_the_temperature():
    x, codebook = draw(20, 30, 3)
    hot, _ = ops.vq_soft_quantize(x, codebook, temperature=1e9)
    torch.testing.assert_close(hot, codebook.mean(0).expand(20, 3), atol=1e-6, rtol=0)
    cold, indices = ops.vq_soft_quantize(x, codebook, temperature=1e-6)
    torch.testing.assert_close(cold, codebook[indices], atol=1e-6, rtol=0)
    entropy, mean = ops.vq_soft_statistics(x, codebook, temperature=1e9)
    torch.testing.assert_close(entropy, torch.full((20,), math.log(30)))
    torch.testing.assert_close(mean, torch.full((30,), 1 / 30))
    entropy, mean = ops.vq_soft_statistics(x, codebook, temperature=1e-7)
    assert (entropy >= 0).all() and entropy.max() < 1e-6
    torch.testing.assert_close(mean, indices.bincount(minlength=30) / 20)


# ---- extremes --------------------------------------------------------------------------------------------------------


def test_digits_far_from_the_origin(isa, device):
    """Products of the vectors themselves would be off by more than any distance here."""
    x, codebook = draw(40, 50, 8, device=device)
    far, far_codes = x + 4096, codebook + 4096
    leaves, exact = [far.requires_grad_(), far_codes.requires_grad_()], wide(far, far_codes)
    found, expected = ops.vq_soft_quantize(*leaves)[0], reference.vq_soft_quantize(*exact)[0]
    torch.testing.assert_close(found.double(), expected, rtol=2e-7, atol=0)
    grads = torch.autograd.grad(found.sum(), leaves)
    for g, e in zip(grads, torch.autograd.grad(expected.sum(), exact), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", (1e-30, 1e-6, 1e15))
def test_cosines_do_not_depend_on_norms(size, isa):
    x, codebook = draw(20, 30, 7)
    expected = ops.vq_cross_entropy(x, codebook, torch.arange(20), metric="cosine", temperature=0.1)
    found = ops.vq_cross_entropy(size * x, size * codebook, torch.arange(20), metric="cosine", temperature=0.1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_zero_vectors_have_cosine_zero(isa, device):
    x, codebook = torch.zeros(2, 3, device=device, requires_grad=True), torch.randn(4, 3, device=device)
    codebook[1] = 0
    codebook.requires_grad_()
    soft, indices = ops.vq_soft_quantize(x, codebook, metric="cosine", temperature=0.1)
    torch.testing.assert_close(soft, codebook.mean(0).expand(2, 3))
    assert (indices == 0).all()
    to_x, to_codes = torch.autograd.grad(soft.sum(), (x, codebook))
    assert (to_x == 0).all()
    torch.testing.assert_close(to_codes, torch.full((4, 3), 0.5, device=device))


def test_large_vectors(isa):
    """|x|² would overflow; differences decide, and one code takes everything."""
    x, codebook = torch.tensor([[3e18, 0.0], [0.0, -1e18]]), torch.tensor([[3e18, 1e17], [-1e18, 0.0], [0.0, -2e18]])
    soft, indices = ops.vq_soft_quantize(x, codebook)
    assert indices.tolist() == [0, 2]
    torch.testing.assert_close(soft, codebook[indices], rtol=1e-6, atol=1e12)
    assert torch.equal(ops.vq_soft_statistics(x, codebook)[0], torch.zeros(2))
    assert ops.vq_sample(x, codebook).tolist() == [0, 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_metric
def test_nan_stays_in_its_row(metric, dtype, isa, device):
    x, codebook = draw(40, 21, 5, dtype, device)
    spoiled = x.clone()
    spoiled[7, 2] = math.nan
    others, key = torch.arange(40, device=device) != 7, isthmus.key(0).to(device)
    calls = (
        lambda x: ops.vq_soft_quantize(x, codebook, metric=metric)[0],
        lambda x: ops.vq_soft_statistics(x, codebook, metric=metric)[0],
        lambda x: ops.vq_cross_entropy(x, codebook, torch.zeros(40, dtype=torch.int64, device=device), metric=metric),
    )
    for call in calls:
        assert torch.equal(call(spoiled)[others], call(x)[others])
        assert call(spoiled)[7].isnan().all()
    sample = ops.vq_sample(spoiled, codebook, metric=metric, key=key)
    assert sample[7] == 0
    assert torch.equal(sample[others], ops.vq_sample(x, codebook, metric=metric, key=key)[others])
    quantized, indices = ops.vq_soft_quantize(spoiled, codebook, metric=metric, hard=True)
    assert indices[7] == 0 and torch.equal(quantized[7], codebook[0])


def test_a_code_with_nan_is_never_drawn(isa):
    x, codebook = draw(40, 21, 5)
    codebook[3, 1] = math.nan
    found = ops.vq_sample(x, codebook, temperature=50.0)
    assert (found != 3).all() and len(found.unique()) > 5


# ---- masks -----------------------------------------------------------------------------------------------------------


@every_metric
def test_padding_does_not_matter(metric, isa, device):
    """Whatever stands in a masked row: not even NaN gets out, and no gradient gets in."""
    x, codebook = draw(300, 40, 6, device=device)
    mask = torch.rand(300, device=device) < 0.6
    x[~mask] = math.nan
    full, codes = x.clone().requires_grad_(), codebook.clone().requires_grad_()
    only, same_codes = x[mask].requires_grad_(), codebook.clone().requires_grad_()
    indices = torch.where(mask, torch.randint(40, (300,), device=device), -1)
    options = {"metric": metric, "temperature": 0.8}

    def outputs(x, codes, indices, **mask):
        quantized, chosen = ops.vq_soft_quantize(x, codes, **options, **mask)
        return (
            quantized,
            *ops.vq_soft_statistics(x, codes, **options, **mask),
            ops.vq_cross_entropy(x, codes, indices, **options),
            chosen,
        )

    *found, chosen = outputs(full, codes, indices, mask=mask)
    *expected, chosen_only = outputs(only, same_codes, indices[mask])
    assert (chosen[~mask] == -1).all() and torch.equal(chosen[mask], chosen_only)
    for a, e in zip(found, expected, strict=True):
        if len(a) == 300:
            assert (a[~mask] == 0).all()
            a = a[mask]
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad([o.sin().sum() for o in found], (full, codes))
    wanted = torch.autograd.grad([o.sin().sum() for o in expected], (only, same_codes))
    assert (grads[0][~mask] == 0).all()
    torch.testing.assert_close(grads[0][mask], wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads[1], wanted[1], rtol=1e-4, atol=1e-4)
    assert (ops.vq_sample(x, codebook, mask=mask, **options)[~mask] == -1).all()


def test_nothing_to_average():
    x, codebook = draw(5, 4, 3)
    nothing = torch.zeros(5, dtype=torch.bool)
    entropy, mean = ops.vq_soft_statistics(x, codebook, mask=nothing)
    assert torch.equal(mean, torch.zeros(4)) and torch.equal(entropy, torch.zeros(5))


# ---- gradients -------------------------------------------------------------------------------------------------------

GRADIENT_CALLS = {
    "soft": lambda x, c: ops.vq_soft_quantize(x, c, metric="cosine")[0].sin().sum(),
    "gumbel": lambda x, c: ops.vq_soft_quantize(x, c, gumbel=True, hard=True, key=isthmus.key(1))[0].sin().sum(),
    "entropy": lambda x, c: ops.vq_soft_statistics(x, c)[0].sin().sum(),
    "usage": lambda x, c: ops.vq_soft_statistics(x, c)[1].square().sum(),
    "cross_entropy": lambda x, c: ops.vq_cross_entropy(x, c, torch.zeros(len(x), dtype=torch.int64)).sin().sum(),
}
every_call = pytest.mark.parametrize("call", GRADIENT_CALLS.values(), ids=GRADIENT_CALLS)


@every_call
def test_only_wanted_gradients_are_returned(call):
    x, codebook = (t.requires_grad_() for t in draw(30, 20, 4))
    to_x, to_codes = torch.autograd.grad(call(x, codebook), (x, codebook))
    assert torch.equal(torch.autograd.grad(call(x, codebook.detach()), x)[0], to_x)
    assert torch.equal(torch.autograd.grad(call(x.detach(), codebook), codebook)[0], to_codes)


@every_call
def test_gradients_do_not_depend_on_threads(call, isa):
    """Many chunks of rows, the last one ragged."""
    x, codebook = (t.requires_grad_() for t in draw(2001, 33, 7))
    torch.set_num_threads(1)
    expected = torch.autograd.grad(call(x, codebook), (x, codebook))
    for threads in (2, 7):
        torch.set_num_threads(threads)
        for a, e in zip(torch.autograd.grad(call(x, codebook), (x, codebook)), expected, strict=True):
            assert torch.equal(a, e)


@every_call
def test_without_rows_gradients_are_zero(call):
    x, codebook = torch.zeros(0, 3, requires_grad=True), torch.randn(4, 3).requires_grad_()
    to_x, to_codes = torch.autograd.grad(call(x, codebook), (x, codebook))
    assert to_x.shape == (0, 3) and torch.equal(to_codes, torch.zeros(4, 3))


def test_a_codebook_learns_to_be_used():
    """Confident rows and evenly used codes: the losses of a tokenizer, on two clusters and a spare code."""
    x = torch.cat([torch.randn(100, 2) * 0.1 + centre for centre in (2.0, -2.0)])
    codebook = torch.tensor([[1.0, 0.5], [0.9, 0.6], [3.0, 3.0]], requires_grad=True)
    optimizer = torch.optim.Adam([codebook], 0.1)
    for _ in range(100):
        entropy, mean = ops.vq_soft_statistics(x, codebook, temperature=2.0)
        soft, _ = ops.vq_soft_quantize(x, codebook, temperature=2.0)
        loss = entropy.mean() + (mean * mean.log()).sum() + (soft - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(ops.vq_assign(x, codebook.detach()).unique()) >= 2
    assert (ops.vq_soft_quantize(x, codebook, temperature=2.0)[0] - x).square().mean() < 0.1


# ---- memory, errors --------------------------------------------------------------------------------------------------


@measures_memory
@every_call
def test_memory_stays_linear(call):
    """The probabilities of this call would take 128 MB."""
    leaves = [t.requires_grad_() for t in draw(16_000, 2000, 8)]
    assert extra_memory(lambda: torch.autograd.grad(call(*leaves), leaves)) < 10e6


X, CODES, INDICES = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.vq_sample(X, CODES, metric="l1"), ValueError, "metric is 'l1'; expected one of"),
        (lambda: ops.vq_sample(X, CODES, temperature=-1.0), RuntimeError, "temperature is -1; expected a positive"),
        (
            lambda: ops.vq_soft_quantize(X, CODES, temperature=0.0),
            RuntimeError,
            "temperature is 0; expected a positive",
        ),
        (
            lambda: ops.vq_soft_quantize(X, CODES, gumbel=True, relaxation=math.nan),
            RuntimeError,
            "relaxation is nan; expected",
        ),
        (
            lambda: ops.vq_soft_quantize(X, CODES, key=isthmus.key(0)),
            ValueError,
            "key or generator was given without gumbel=True",
        ),
        (lambda: ops.vq_sample(X, CODES, key=X), RuntimeError, "key has dtype Float; expected int64"),
        (lambda: ops.vq_sample(X, CODES[:, :2]), RuntimeError, r"codebook has shape \[5, 2\]; expected \[K, D\] or"),
        (lambda: ops.vq_sample(X, CODES[:0]), RuntimeError, r"codebook has shape \[0, 3\]; expected"),
        (
            lambda: ops.vq_sample(X, CODES[None]),
            RuntimeError,
            r"codebook has shape \[1, 5, 3\]; expected .* \[H, K, D\]",
        ),
        (lambda: ops.vq_sample(X[0, 0], CODES), RuntimeError, r"x has shape \[\]; expected \[..., D\]"),
        (lambda: ops.vq_sample(X.double(), CODES), RuntimeError, "codebook has dtype Float; expected Double"),
        (lambda: ops.vq_sample(X.int(), CODES.int()), RuntimeError, "x has dtype Int; expected"),
        (lambda: ops.vq_sample(X, CODES, mask=X[:, 0]), RuntimeError, r"mask is Float\[4\]; expected Bool"),
        (lambda: ops.vq_sample(X, CODES, mask=X[:2, 0] == 0), RuntimeError, r"mask is Bool\[2\]; expected Bool\[4\]"),
        (lambda: ops.vq_cross_entropy(X, CODES, INDICES[:3]), RuntimeError, r"indices is Long\[3\]; expected Long"),
        (
            lambda: ops.vq_cross_entropy(X, CODES, INDICES + 5),
            RuntimeError,
            "indices holds 5; expected 0 <= index < 5",
        ),
        (lambda: ops.vq_cross_entropy(X, CODES, INDICES - 2), RuntimeError, "indices holds -2; expected 0 <= index"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
