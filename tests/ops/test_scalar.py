"""What is particular to quantizers without a codebook table."""

import itertools
import math

import pytest
import torch

import isthmus
from isthmus import ops, reference

# ---- finite scalars --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("hard_clamp", [False, True])
@pytest.mark.parametrize("levels", [2, 3, 4, 5, 8, 16, 255, 500])
def test_fsq_reaches_every_level_and_no_other(levels, symmetric, hard_clamp, isa):
    x = torch.tensor([-math.inf, *torch.linspace(-9, 9, 5001), math.inf]).unsqueeze(-1)
    quantized, indices = ops.fsq_quantize(x, (levels,), symmetric=symmetric, hard_clamp=hard_clamp)
    assert indices.unique().tolist() == list(range(levels))
    assert (indices.diff() >= 0).all()
    assert quantized.min() == -1 and (not symmetric or quantized.max() == 1)
    assert torch.equal(ops.fsq_decode(indices, (levels,), symmetric=symmetric), quantized)


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (7, 3, 16), (65536, 1001)])
def test_fsq_of_zero_is_zero_unless_symmetric(levels):
    quantized, _ = ops.fsq_quantize(torch.zeros(2, len(levels)), levels)
    assert not quantized.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_fsq_round_trip(dtype, symmetric):
    levels = (8, 5, 5, 6)
    indices = torch.arange(math.prod(levels))
    codes = ops.fsq_decode(indices, levels, symmetric=symmetric, dtype=dtype)
    assert codes.unique(dim=0).shape == codes.shape
    quantized, found = ops.fsq_quantize(torch.randn(4000, 4).to(dtype), levels, symmetric=symmetric)
    assert torch.equal(ops.fsq_decode(found, levels, symmetric=symmetric, dtype=dtype), quantized)


def test_fsq_with_indices_beyond_float_precision():
    levels = (1000,) * 6
    indices = torch.randint(0, 10**18, (500,))
    codes = ops.fsq_decode(indices, levels, symmetric=True, dtype=torch.float64)
    assert torch.equal(ops.fsq_quantize(codes * (1 - 1e-9), levels, symmetric=True, hard_clamp=True)[1], indices)


def test_fsq_equals_the_peer():
    peer = pytest.importorskip("vector_quantize_pytorch")
    levels = [8, 5, 5, 5]
    x = torch.randn(40, 20, 4)
    for symmetric in (False, True):
        expected, indices = peer.FSQ(levels, preserve_symmetry=symmetric)(x)
        quantized, found = ops.fsq_quantize(x, levels, symmetric=symmetric)
        assert torch.equal(found, indices.long())
        torch.testing.assert_close(quantized, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_stage_of_fsq_is_a_digit(dtype, isa):
    """Each prefix of the stages decodes to the middle of the bin of so many digits that holds the number."""
    levels, stages = torch.tensor([8, 5, 3, 2]), 4
    x = (1.5 * torch.randn(2000, 4)).to(dtype)
    quantized, indices = ops.residual_fsq_quantize(x, levels.tolist(), stages, hard_clamp=True)
    bound = levels / (levels - 1.0)
    bounded, decoded = x.double().clamp(-bound, bound), 0.0
    for q in range(stages):
        decoded = decoded + ops.fsq_decode(indices[:, q], levels.tolist(), symmetric=True).double() / levels**q
        assert ((decoded - bounded).abs() <= bound * (1 / levels.double() ** (q + 1) + 1e-6)).all()
    torch.testing.assert_close(quantized.double(), decoded, rtol=0, atol=max(1e-6, torch.finfo(dtype).eps))


def test_stages_of_fsq_equal_the_peer():
    peer = pytest.importorskip("vector_quantize_pytorch")
    x = torch.randn(40, 20, 4)
    expected, indices = peer.ResidualFSQ(levels=[8, 5, 5, 3], num_quantizers=4)(x)
    quantized, found = ops.residual_fsq_quantize(x, (8, 5, 5, 3), 4)
    assert torch.equal(found, indices.long())
    torch.testing.assert_close(quantized, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_quantizers": 0}, "num_quantizers is 0"),
        ({"num_quantizers": 2, "stages": 3}, "stages holds 3; expected 0 to 2"),
        ({"num_quantizers": 2, "stages": torch.zeros(2, dtype=torch.int64)}, "stages has shape \\[2\\]"),
        ({"num_quantizers": 2, "levels": (8,)}, "expected \\[..., 1\\]"),
    ],
)
def test_stages_of_fsq_are_refused(options, message):
    with pytest.raises(RuntimeError, match=message):
        ops.residual_fsq_quantize(torch.zeros(3, 2), **{"levels": (8, 5)} | options)


def test_fsq_dropout_is_uniform_around_the_bounded_value():
    x = torch.full((200_000, 1), 0.3)
    rounded, index = ops.fsq_quantize(x[:1], (9,))
    quantized, indices = ops.fsq_quantize(x, (9,), noise_dropout=0.25, key=isthmus.key(5))
    assert (indices == index).all()
    dropped = quantized[quantized != rounded] * 4  # in units of a level
    assert abs(len(dropped) / len(x) - 0.25) < 0.005
    bounded = 4 * 1.001 * math.tanh(0.3)
    assert abs(dropped.mean() - bounded) < 0.005 and abs(dropped.std() - math.sqrt(1 / 12)) < 0.005
    assert (dropped - bounded).abs().max() <= 0.5 + 1e-5


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((8, 1), "levels holds 1"),
        ((8,), "expected \\[..., 1\\]"),
        ((), "levels is empty"),
        ((2**16 + 1, 2), "levels holds"),
    ],
)
def test_fsq_refuses_levels(levels, message):
    with pytest.raises(RuntimeError, match=message):
        ops.fsq_quantize(torch.zeros(3, 2), levels)


def test_indices_that_do_not_fit_are_refused():
    ops.fsq_quantize(torch.zeros(1, 62), (2,) * 62)
    with pytest.raises(RuntimeError, match="2\\^63"):
        ops.fsq_quantize(torch.zeros(1, 63), (2,) * 63)
    with pytest.raises(RuntimeError, match="1 to 62 bits"):
        ops.lfq_quantize(torch.zeros(1, 63))


@pytest.mark.parametrize("outside", [-2, 40])
def test_decoding_refuses_indices(outside):
    for decode in (
        lambda i: ops.fsq_decode(i, (8, 5)),
        lambda i: ops.latent_decode(i, torch.zeros(13), (8, 5)),
    ):
        with pytest.raises(RuntimeError, match=f"indices holds {outside}; expected 0 <= index < 40"):
            decode(torch.tensor([3, outside]))


def test_a_nan_stays_in_its_number():
    x = torch.zeros(3, 4)
    x[1, 2] = math.nan
    for quantized, indices, *errors in (
        ops.fsq_quantize(x, (5,) * 4),
        (ops.residual_fsq_quantize(x, (5,) * 4, 1)[0], ops.residual_fsq_quantize(x, (5,) * 4, 3)[1][:, 2]),
        ops.lfq_quantize(x),
        ops.latent_quantize(x, torch.tensor([[-1.0, 0.0, 2.0]] * 4)),
    ):
        assert quantized.isnan().nonzero().tolist() == [[1, 2]]
        assert indices[0] == indices[2] != -1
        for error in errors:
            assert error.isnan().tolist() == [False, True, False]


def test_masked_rows_touch_nothing():
    """Not even infinities and NaNs in them."""
    x, mask = torch.randn(40, 6), torch.rand(40) < 0.5
    x[~mask] = math.nan
    x.requires_grad_()
    codebooks = torch.randn(6, 4, requires_grad=True)
    runs = {
        "fsq": lambda x, mask: ops.fsq_quantize(x, (5,) * 6, mask=mask),
        "residual-fsq": lambda x, mask: ops.residual_fsq_quantize(x, (5,) * 6, 3, mask=mask),
        "lfq": lambda x, mask: ops.lfq_quantize_entropy(x, spherical=True, mask=mask),
        "latent": lambda x, mask: ops.latent_quantize(x, codebooks, mask=mask),
    }
    for run in runs.values():
        found, expected = run(x, mask), run(x[mask], None)
        assert (found[1][~mask] == -1).all() and not found[0][~mask].any()
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f[mask] if f.shape[:1] == mask.shape else f, e)
        inputs = (x, codebooks) if run is runs["latent"] else (x,)
        floats = [sum(o.sum() for o in outputs if o.is_floating_point()) for outputs in (found, expected)]
        grads, wanted = (torch.autograd.grad(total, inputs) for total in floats)
        for g, w in zip(grads, wanted, strict=True):
            torch.testing.assert_close(g, w)


# ---- signs -----------------------------------------------------------------------------------------------------------


def soft_codes(x, n, scale, spherical, inverse_temperature):
    """softmax(-inverse_temperature · |u - c|²) over all codes, straight from the definition."""
    codes = ops.lfq_decode(torch.arange(2**n), n, scale=scale, spherical=spherical, dtype=torch.float64)
    u = scale * x / x.norm(dim=-1, keepdim=True) if spherical else x
    return (-inverse_temperature * torch.cdist(u, codes).square()).softmax(-1)


@pytest.mark.parametrize("spherical", [False, True])
def test_entropy_factorises_over_bits(spherical):
    x = torch.randn(50, 7, dtype=torch.float64)
    options = {"scale": 0.7, "spherical": spherical, "inverse_temperature": 1.3}
    p = soft_codes(x, 7, 0.7, spherical, 1.3)
    *_, entropy, bit_counts = ops.lfq_quantize_entropy(x, **options)
    torch.testing.assert_close(entropy, torch.special.entr(p).sum(-1))
    counts = ops.lfq_code_counts(x, **options)
    torch.testing.assert_close(counts, p.sum(0))
    ones = ops.lfq_decode(torch.arange(128), 7).double() > 0
    torch.testing.assert_close(bit_counts, counts @ ones.double())
    exact = ops.code_entropy(counts)
    torch.testing.assert_close(exact, torch.special.entr(p.mean(0)).sum())
    assert exact < ops.bit_entropy(bit_counts, 50)  # independent bits have the largest entropy of all with their means


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_temperature_may_be_a_tensor(dtype):
    x = torch.randn(30, 5, dtype=dtype, requires_grad=True)
    found, expected = (
        (*ops.lfq_quantize_entropy(x, **options), ops.lfq_code_counts(x, **options))
        for options in ({"inverse_temperature": t, "scale": 0.5} for t in (torch.tensor(1.25), 1.25))
    )
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)
        if f.requires_grad:
            assert torch.equal(*(torch.autograd.grad(t.sum(), x, retain_graph=True)[0] for t in (f, e)))
    by_temperature = torch.func.vmap(lambda t: ops.lfq_quantize_entropy(x, inverse_temperature=t)[3])
    rows = by_temperature(torch.tensor([0.5, 2.0]))
    for row, t in zip(rows, (0.5, 2.0), strict=True):
        assert torch.equal(row, ops.lfq_quantize_entropy(x, inverse_temperature=t)[3])


@pytest.mark.parametrize("function", [ops.lfq_quantize_entropy, ops.lfq_code_counts])
def test_a_temperature_is_a_constant(function):
    with pytest.raises(ValueError, match="inverse_temperature requires a gradient"):
        function(torch.zeros(2, 3), inverse_temperature=torch.tensor(1.0, requires_grad=True))


@pytest.mark.parametrize(("value", "message"), [(0.0, "is 0"), (torch.tensor(-1.0), "is -1")])
def test_a_temperature_is_positive(value, message):
    with pytest.raises(RuntimeError, match=f"inverse_temperature {message}"):
        ops.lfq_quantize_entropy(torch.zeros(2, 3), inverse_temperature=value)


def test_entropy_has_the_peers_values_and_gradients():
    peer = pytest.importorskip("vector_quantize_pytorch")
    for spherical in (False, True):
        module = peer.LFQ(codebook_size=2**6, dim=6, spherical=spherical, commitment_loss_weight=1.0)
        x = torch.randn(2, 60, 6, requires_grad=True)
        (expected, indices, _), losses = module(x, inv_temperature=0.8, return_loss_breakdown=True)
        options = {"spherical": spherical, "inverse_temperature": 0.8}
        quantized, found, error, entropy, _ = ops.lfq_quantize_entropy(x, **options)
        assert torch.equal(found, indices.long())
        torch.testing.assert_close(quantized, expected)
        batch = ops.code_entropy(ops.lfq_code_counts(x, **options))
        ours = entropy.mean(), batch, error.mean() / 6
        theirs = losses.per_sample_entropy, losses.batch_entropy, losses.commitment
        for our, their in zip(ours, theirs, strict=True):
            # Loose, because the peer takes the logarithm of no probability below 1e-5.
            torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)
            grads = (torch.autograd.grad(t, x, retain_graph=True)[0] for t in (our, their))
            torch.testing.assert_close(*grads, rtol=2e-3, atol=2e-5)


def test_entropy_of_confident_bits_is_finite_and_right():
    """Saturated probabilities: the entropy is tiny, its gradient not NaN."""
    x = torch.tensor([[-30.0, 40.0, 5.0], [-20.0, 300.0, 10.0]], requires_grad=True)
    *_, entropy, counts = ops.lfq_quantize_entropy(x, inverse_temperature=0.25)
    wide = x.detach().double().abs()
    expected = (torch.log1p((-wide).exp()) + wide * (-wide).sigmoid()).sum(-1)
    assert ((entropy.double() - expected).abs() <= 3e-6 * expected).all()
    loss = entropy.sum() - ops.bit_entropy(counts, 2) - ops.code_entropy(ops.lfq_code_counts(x))
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


def test_code_counts_in_blocks(monkeypatch):
    x, mask = torch.randn(130, 8, dtype=torch.float64, requires_grad=True), torch.rand(130) < 0.8
    weights = torch.randn(256, dtype=torch.float64)
    whole = ops.lfq_code_counts(x, mask=mask)
    monkeypatch.setattr("isthmus.ops._code_entropy._ROWS_AT_ONCE", 32)
    blocks = ops.lfq_code_counts(x, mask=mask)
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(*(torch.autograd.grad(c @ weights, x)[0] for c in (blocks, whole)))


def test_code_counts_never_hold_rows_times_codes():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.numel = max([self.numel, *(o.numel() for o in (out,) if isinstance(o, torch.Tensor))])
            return out

    x = torch.randn(3000, 14, requires_grad=True)
    with Largest() as largest:
        ops.code_entropy(ops.lfq_code_counts(x)).backward()
    assert largest.numel <= 3000 * 2 * 2**7  # a table of half the bits, and the pair it grows from


@pytest.mark.parametrize("bits", [1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 57, 58, 61, 62])
def test_bits_make_indices(bits, isa):
    x = torch.randn(300, bits)
    powers = [2 ** (bits - 1 - d) for d in range(bits)]
    expected = [sum(p for p, v in zip(powers, row, strict=True) if v > 0) for row in x.tolist()]
    quantized, indices, _ = ops.lfq_quantize(x, scale=0.5)
    assert indices.tolist() == expected
    assert torch.equal(ops.lfq_decode(indices, bits, scale=0.5), quantized)


def test_zero_vectors_stay_finite_on_the_sphere():
    x = torch.randn(5, 6)
    x[2] = 0
    x.requires_grad_()
    quantized, indices, error, entropy, counts = ops.lfq_quantize_entropy(x, spherical=True)
    (grad,) = torch.autograd.grad((quantized.sum() + error.sum() + entropy.sum() + counts.sum()), x)
    assert indices[2] == 0 and not grad[2].any() and grad.isfinite().all()


# ---- scalar codebooks ------------------------------------------------------------------------------------------------


def test_latent_takes_the_first_of_equally_near_values(isa):
    codebooks = torch.tensor([[1.0, -1.0, 1.0, 3.0]])
    x = torch.tensor([[0.0], [2.0], [1.0], [-5.0], [math.inf]])
    assert ops.latent_quantize(x, codebooks)[1].tolist() == [0, 0, 0, 1, 0]


def test_latent_gradients_of_each_argument():
    """Each is the true derivative of the error while the other argument is held."""
    x, codebooks = torch.randn(12, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    for of_x, of_codebooks in itertools.product(
        (x, x.clone().requires_grad_()), (codebooks, codebooks.clone().requires_grad_())
    ):
        leaves = [t for t in (of_x, of_codebooks) if t.requires_grad]
        if len(leaves) != 1:
            continue
        (leaf,) = leaves

        def error(leaf, held=(of_x, of_codebooks), leaf_is=leaf):
            return ops.latent_quantize(*(leaf if t is leaf_is else t for t in held))[2]

        assert torch.autograd.gradcheck(error, leaf)
        assert torch.autograd.gradgradcheck(error, leaf)


@pytest.mark.parametrize("rows", [100, 70_000])
def test_latent_gradient_is_the_sum_over_its_rows(rows):
    x, codebooks = torch.randn(rows, 5), torch.randn(5, 7, requires_grad=True)
    _, indices, error = ops.latent_quantize(x, codebooks)
    weights = torch.rand(rows)
    (grad,) = torch.autograd.grad(error @ weights, codebooks)
    digits = indices.unsqueeze(-1) // 7 ** torch.arange(5) % 7
    pull = -2 * weights.double().unsqueeze(-1) * (x.double() - ops.latent_decode(indices, codebooks.detach()).double())
    expected = torch.zeros(5, 7, dtype=torch.float64)
    for d in range(5):
        expected[d].index_add_(0, digits[:, d], pull[:, d])
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-5)


# ---- sampled bits ----------------------------------------------------------------------------------------------------


def test_bits_follow_their_probabilities():
    logits = torch.tensor([-3.0, -0.5, 0.0, 1.0, 4.0]).expand(100_000, 5)
    bits, indices, entropy = ops.binary_map(logits, key=isthmus.key(3))
    p = logits[0].sigmoid()
    assert ((bits.mean(0) - p).abs() < 5 * (p * (1 - p) / len(bits)).sqrt()).all()
    assert torch.equal((indices.unsqueeze(-1) >> torch.arange(4, -1, -1)) & 1, bits.long())
    torch.testing.assert_close(entropy[0], torch.distributions.Bernoulli(p).entropy().sum())
    assert torch.equal(ops.binary_map(logits, key=isthmus.key(3))[0], bits)
    assert not torch.equal(ops.binary_map(logits)[0], bits)


def test_mean_gradient_is_that_of_the_expected_bits():
    logits = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    bits, _, _ = ops.binary_map(logits)
    (grad,) = torch.autograd.grad(bits.sum(), logits)
    (expected,) = torch.autograd.grad(logits.sigmoid().sum(), logits)
    torch.testing.assert_close(grad, expected)


def test_noise_does_not_depend_on_where_a_group_begins(isa):
    """A tail of a batch draws what the whole batch draws there."""
    logits, key = torch.randn(1000, 7), isthmus.key(1)
    noise = reference.scalar.logistic_noise(key, logits.shape)
    clear = (logits + noise).abs() > 1e-4
    assert torch.equal((logits + noise > 0)[clear], ops.binary_map(logits, key=key)[0][clear].bool())


def test_binary_map_refuses():
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="gradient is 'soft'"):
        ops.binary_map(logits, gradient="soft")
    with pytest.raises(RuntimeError, match="temperature is 0"):
        ops.binary_map(logits, temperature=0.0)
    with pytest.raises(ValueError, match="key and generator"):
        ops.binary_map(logits, key=isthmus.key(0), generator=torch.Generator())


# ---- storage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 64))
@pytest.mark.parametrize("length", [1, 13, 8200])
def test_streams_round_trip(bits, length):
    indices = torch.randint(0, 2**bits - 1, (2, length))
    indices[0, 0], indices[-1, -1] = 2**bits - 1, 0
    packed = ops.pack_indices(indices, bits=bits)
    assert packed.shape == (2, -(-length * bits // 8)) and packed.dtype == torch.uint8
    assert torch.equal(ops.unpack_indices(packed, bits=bits, length=length), indices)
    if length < 100:
        assert torch.equal(packed, reference.pack_indices(indices, bits=bits))


@pytest.mark.parametrize(
    ("num_codes", "dtype"),
    [(1, torch.uint8), (256, torch.uint8), (257, torch.int16), (2**15, torch.int16), (2**15 + 1, torch.int32),
     (2**31, torch.int32), (2**31 + 1, torch.int64), (2**62, torch.int64)],
)  # fmt: skip
def test_the_smallest_integer_type(num_codes, dtype):
    indices = torch.tensor([0, num_codes - 1, num_codes // 2])
    packed = ops.pack_indices(indices, num_codes)
    assert packed.dtype == dtype
    assert torch.equal(ops.unpack_indices(packed), indices)
    for outside in (-1, num_codes):
        with pytest.raises(RuntimeError, match=f"indices holds {outside}; expected 0 to {num_codes - 1}"):
            ops.pack_indices(torch.tensor([0, outside]), num_codes)


def test_packing_refuses():
    with pytest.raises(ValueError, match="exactly one"):
        ops.pack_indices(torch.tensor([1]))
    with pytest.raises(RuntimeError, match="indices holds 8; expected 0 to 7"):
        ops.pack_indices(torch.tensor([8]), bits=3)
    with pytest.raises(RuntimeError, match="bits is 64"):
        ops.pack_indices(torch.tensor([8]), bits=64)
    with pytest.raises(ValueError, match="expected both or neither"):
        ops.unpack_indices(torch.zeros(3, dtype=torch.uint8), bits=3)
    with pytest.raises(RuntimeError, match=r"expected uint8 and \[\.\.\., 2\]"):
        ops.unpack_indices(torch.zeros(3, dtype=torch.uint8), bits=3, length=4)
