"""What is particular to top-k codes; the rest is in tests/test_every_op.py."""

import subprocess
import sys

import pytest
import torch

from isthmus import ops, reference
from isthmus.ops.sparse import encode_gradients
from isthmus.reference.sparse import selected_scores

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def problem(rows, dim, features, dtype=torch.float32, device="cpu"):
    """x, weight and bias."""
    sizes = (rows, dim), (features, dim), (features,)
    return tuple(torch.randn(size, dtype=torch.float64).to(device, dtype) for size in sizes)


def whole_numbers(rows, dim, features, device="cpu"):
    """The same with small integers: every order of summation is exact, and ties are everywhere."""
    sizes = (rows, dim), (features, dim), (features,)
    return tuple(torch.randint(-2, 3, size).float().to(device) for size in sizes)


def gradients(outputs, grad, inputs):
    return torch.autograd.grad(outputs, inputs, grad)


# ---- which features are found ----------------------------------------------------------------------------------------

SHAPES = [
    (1, 1, 1, 1), (3, 5, 7, 7), (13, 3, 33, 1), (12, 16, 32, 32), (5, 17, 31, 2), (97, 8, 65, 9), (2, 40, 3000, 17),
    (200, 4, 1025, 64), (1, 100, 5003, 600), (26, 1, 500, 499), (4, 0, 9, 3),
]  # fmt: skip


@pytest.mark.parametrize("activation", ("relu", "identity"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_finds_what_a_stable_sort_finds(shape, activation, isa, device):
    """Exactly, ties and all: on whole numbers both sums are exact."""
    *sizes, k = shape
    x, weight, bias = whole_numbers(*sizes, device=device)
    for b in (bias, None):
        values, indices = ops.topk_encode(x, weight, b, k, activation=activation)
        expected = reference.topk_encode(x, weight, b, k, activation=activation)
        assert torch.equal(values, expected[0])
        assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_correctly_rounded_and_in_order(dtype, isa, device):
    x, weight, bias = problem(70, 48, 2000, dtype, device)
    values, indices = ops.topk_encode(x, weight, bias, 40)
    features = torch.nn.functional.linear(*(t.double() for t in (x, weight, bias))).relu()
    precision = torch.finfo(torch.float32 if dtype.itemsize == 2 else dtype).eps
    slack = 64 * precision * features.abs().max() + torch.finfo(dtype).eps / 2 * values.double()
    assert ((values.double() - features.gather(1, indices)).abs() <= slack).all()
    assert (values.double() - features.topk(40).values).abs().le(slack).all()
    assert (values.diff() <= 0).all()
    assert all(row.unique().numel() == 40 for row in indices)


def test_equals_linear_relu_topk(device):
    x, weight, bias = problem(300, 64, 3000, device=device)
    values, indices = ops.topk_encode(x, weight, bias, 16)
    plain = torch.nn.functional.linear(x, weight, bias).relu().topk(16)
    torch.testing.assert_close(values, plain.values)
    apart = (plain.values.diff().abs() > 1e-4).all(1)
    assert apart.sum() > 50
    assert torch.equal(indices[apart], plain.indices[apart])


def test_ties_go_to_the_lowest_index(isa, device):
    """Every latent exists a hundred times, spread over panels and ranges."""
    x, weight, _ = problem(30, 20, 40, device=device)
    values, indices = ops.topk_encode(x, weight.repeat(100, 1), None, 150, activation="identity")
    _, order = ops.topk_encode(x, weight, None, 2, activation="identity")
    copies = torch.arange(100, device=device) * 40
    expected = torch.cat([order[:, :1] + copies, order[:, 1:] + copies[:50]], dim=1)
    assert torch.equal(indices, expected)
    assert all(row.unique().numel() == 2 for row in values)


def test_rows_without_enough_positive_features_are_filled_with_zeros(isa, device):
    x = torch.tensor([[1.0], [-1.0], [0.0]], device=device)
    bias = torch.full((1000,), -3.0, device=device)
    bias[[5, 700]] = torch.tensor([0.5, 1.5], device=device)
    weight = torch.zeros(1000, 1, device=device)
    weight[5] = 1.0
    values, indices = ops.topk_encode(x, weight, bias, 4)
    assert values.tolist() == [[1.5, 1.5, 0, 0], [1.5, 0, 0, 0], [1.5, 0.5, 0, 0]]
    assert indices.tolist() == [[5, 700, 0, 1], [700, 0, 1, 2], [700, 5, 0, 1]]
    values, indices = ops.topk_encode(x - 10, weight, bias - 10, 4)
    assert (values == 0).all()
    assert (indices == torch.arange(4, device=device)).all()


def test_infinities(isa, device):
    """A bias of -inf takes a feature out, as AuxK does with live ones; +inf wins."""
    x, weight, bias = whole_numbers(40, 6, 900, device=device)
    bias[torch.arange(900, device=device) % 3 > 0] = -torch.inf
    bias[600] = torch.inf
    for activation in ("relu", "identity"):  # k is more than what is finite
        found = ops.topk_encode(x, weight, bias, 310, activation=activation)
        assert all(map(torch.equal, found, reference.topk_encode(x, weight, bias, 310, activation=activation)))
        assert (found[1][:, 0] == 600).all()


@pytest.mark.parametrize("where", (0, 1, 31, 500, 998, 999))
def test_a_nan_stays_in_its_row(where, isa, device):
    """Wherever among the features it appears; also in a row that is full of infinities."""
    x, weight, bias = problem(30, 5, 1000, device=device)
    clean = ops.topk_encode(x, weight, bias, 3)
    broken = x.clone()
    broken[7] = torch.nan
    weight, bias = weight.clone(), bias.clone()
    values, indices = ops.topk_encode(broken, weight, bias, 3)
    assert values[7].isnan().all()
    assert (indices[7] == 0).all()
    others = torch.arange(30, device=device) != 7
    assert torch.equal(values[others], clean[0][others])
    assert torch.equal(indices[others], clean[1][others])

    weight[:], bias[:] = 0, torch.inf
    bias[where] = torch.nan
    values, indices = ops.topk_encode(x, weight, bias, 3)
    assert values.isnan().all()
    assert (indices == 0).all()


def test_leading_dimensions_and_vectors(device):
    x, weight, bias = problem(24, 7, 50, device=device)
    values, indices = ops.topk_encode(x, weight, bias, 4)
    shaped = ops.topk_encode(x.reshape(2, 3, 4, 7), weight, bias, 4)
    assert torch.equal(shaped[0].reshape(24, 4), values)
    assert torch.equal(shaped[1].reshape(24, 4), indices)
    assert torch.equal(ops.topk_encode(x[3], weight, bias, 4)[0], values[3])
    out = ops.sparse_decode(values, indices, weight)
    assert torch.equal(ops.sparse_decode(*shaped, weight), out.reshape(2, 3, 4, 7))
    assert torch.equal(ops.sparse_decode(values[3], indices[3], weight), out[3])


@pytest.mark.parametrize("rows", (0, 1, 11, 300))
def test_threads_and_batch_do_not_matter(rows):
    """Ranges of features and blocks of rows are cut differently: the bits are the same."""
    x, weight, bias = problem(300, 24, 9000)
    torch.set_num_threads(1)
    expected = ops.topk_encode(x, weight, bias, 20)
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        found = ops.topk_encode(x[:rows], weight, bias, 20)
        assert all(torch.equal(f, e[:rows]) for f, e in zip(found, expected, strict=True))


# ---- decode ----------------------------------------------------------------------------------------------------------


def random_code(rows, k, features, dtype=torch.float32, device="cpu"):
    """Values and indices, padded, with a quarter of empty places."""
    indices = torch.randint(features, (rows, k)).masked_fill(torch.rand(rows, k) < 0.25, -1)
    return torch.randn(rows, k, dtype=torch.float64).to(device, dtype), indices.to(device)


def without_empty_places(values, indices):
    """The same code, ragged."""
    used = indices >= 0
    offsets = torch.cat([used.new_zeros(1, dtype=torch.int64), used.sum(1).cumsum(0)])
    return values[used], indices[used], offsets


@pytest.mark.parametrize("dim", (0, 1, 15, 64, 65, 127, 256, 300, 775))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_every_width(dim, dtype, isa, device):
    weight, bias, target = (torch.randn(size).to(device, dtype) for size in ((37, dim), (dim,), (5, dim)))
    values, indices = random_code(5, 11, 37, dtype, device)
    found = ops.sparse_decode(values, indices, weight, bias)
    wide = [t.double() if t.is_floating_point() else t for t in (values, indices, weight, bias, target)]
    expected, expected_error = reference.sparse_reconstruct(*wide)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    reconstruction, error = ops.sparse_reconstruct(values, indices, weight, bias, target)
    assert torch.equal(reconstruction, found)
    assert error.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(error.double(), expected_error, rtol=1e-5, atol=1e-5)


def test_decode_counts_repeated_features_and_no_features(isa, device):
    weight, bias = torch.randn(4, 9, device=device), torch.randn(9, device=device)
    values = torch.tensor([[1.0, 2.0, 4.0]], device=device)
    indices = torch.tensor([[2, 2, 2]], device=device)
    torch.testing.assert_close(ops.sparse_decode(values, indices, weight, bias), 7 * weight[2:3] + bias)
    assert torch.equal(ops.sparse_decode(values[:, :0], indices[:, :0], weight, bias), bias[None])


def test_empty_places_are_not_read(isa, device):
    """Neither their value, whatever it is, nor a row of weights."""
    values = torch.tensor([[2.0, torch.nan, 3.0], [torch.inf, torch.nan, -torch.inf]], device=device)
    indices = torch.tensor([[1, -1, 0], [-1, -1, -1]], device=device)
    weight = torch.randn(2, 21, device=device)
    values.requires_grad_()
    out = ops.sparse_decode(values, indices, weight)
    torch.testing.assert_close(out[0], 2 * weight[1] + 3 * weight[0])
    assert (out[1] == 0).all()
    (grad,) = torch.autograd.grad(out.sum(), values)
    assert (grad[indices < 0] == 0).all()
    torch.testing.assert_close(grad[0, [0, 2]], weight.sum(1)[[1, 0]])
    assert ops.sparse_decode(values[1:], indices[1:], weight[:0]).eq(0).all()  # without a single latent


@pytest.mark.parametrize(("rows", "k", "features", "dim"), [(40, 6, 30, 50), (3, 100, 7, 300), (500, 2, 900, 8)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_codes_equal_padded_ones(rows, k, features, dim, dtype, isa, device):
    """To the bit, gradients too: their entries come in the same order."""
    values, indices = random_code(rows, k, features, dtype, device)
    weight, bias, grad = (torch.randn(size).to(device, dtype) for size in ((features, dim), (dim,), (rows, dim)))
    numbers, latents, offsets = without_empty_places(values, indices)
    leaves = [t.requires_grad_() for t in (values, weight, bias, numbers)]
    padded = ops.sparse_decode(values, indices, weight, bias)
    ragged = ops.sparse_decode(numbers, latents, weight, bias, offsets=offsets)
    assert torch.equal(ragged, padded)
    expected = gradients(padded, grad, leaves[:3])
    found = gradients(ragged, grad, [numbers, *leaves[1:3]])
    assert torch.equal(found[0], expected[0][indices >= 0])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])


def test_rows_without_entries(isa, device):
    offsets = torch.tensor([0, 0, 2, 2], device=device)
    values, indices = torch.ones(2, device=device), torch.tensor([1, 1], device=device)
    weight, bias = torch.randn(3, 5, device=device), torch.randn(5, device=device)
    target = torch.zeros(3, 5, device=device)
    out, error = ops.sparse_reconstruct(values, indices, weight, bias, target, offsets=offsets)
    torch.testing.assert_close(out, torch.stack([bias, 2 * weight[1] + bias, bias]))
    torch.testing.assert_close(error, out.square().sum(1))
    none = ops.sparse_decode(values[:0], indices[:0], weight, bias, offsets=offsets * 0)
    assert torch.equal(none, bias.expand(3, 5))
    assert ops.sparse_decode(values[:0], indices[:0], weight, offsets=offsets[:1]).shape == (0, 5)
    assert ops.sparse_decode(values[:0].view(0, 4), indices[:0].view(0, 4), weight).shape == (0, 5)


def test_a_nan_stays_in_its_row_of_the_reconstruction(device):
    values, indices = random_code(9, 4, 20, device=device)
    indices[4, 0] = 3
    weight, target = torch.randn(20, 11, device=device), torch.randn(9, 11, device=device)
    clean = ops.sparse_reconstruct(values, indices, weight, None, target)
    values[4, 0] = torch.nan
    found = ops.sparse_reconstruct(values, indices, weight, None, target)
    others = torch.arange(9, device=device) != 4
    for f, c in zip(found, clean, strict=True):
        assert f[4].isnan().all()
        assert torch.equal(f[others], c[others])


def test_squared_error_is_not_that_of_the_rounded_reconstruction(device):
    """A bfloat16 reconstruction is off by up to 2^-9 of its size; the error is not."""
    values, indices = torch.full((1, 3), 1 / 3, device=device).bfloat16(), torch.arange(3, device=device)[None]
    weight = torch.ones(3, 100, device=device, dtype=torch.bfloat16)
    target = torch.ones(1, 100, device=device, dtype=torch.bfloat16)
    out, error = ops.sparse_reconstruct(values, indices, weight, None, target)
    exact = 100 * (3 * values[0, 0].double() - 1).square()
    torch.testing.assert_close(error[0].double(), exact, rtol=1e-4, atol=0)
    assert (out.double() - 1).square().sum() != exact


# ---- the order by latent ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "k", "features"), [(1, 1, 1), (7, 3, 50), (3000, 20, 300), (40, 5, 30000), (0, 4, 6)])
@pytest.mark.parametrize("with_values", (False, True))
def test_order_equals_a_stable_sort(rows, k, features, with_values, isa, device):
    values, indices = random_code(rows, k, features, device=device)
    values = values.round()  # with many zeros, of either sign
    for code in ((values, indices, None), without_empty_places(values, indices)):
        options = {"values": code[0] if with_values else None, "offsets": code[2]}
        found = ops.latent_order(code[1], features, **options)
        expected = reference.latent_order(code[1], features, **options)
        assert all(map(torch.equal, found, expected))
        used = (code[1] >= 0) & (code[0] != 0) if with_values else code[1] >= 0
        assert torch.equal(found.counts, torch.bincount(code[1][used].flatten(), minlength=features))


def test_order_keeps_what_is_not_a_number(device):
    values = torch.tensor([[torch.nan, 0.0, -0.0, torch.inf, 1e-45]], device=device)
    order = ops.latent_order(torch.zeros(1, 5, dtype=torch.int64, device=device), 1, values=values)
    assert order.entries.tolist() == [0, 3, 4, -1, -1]
    assert order.rows.tolist() == [0, 0, 0, -1, -1]
    assert order.counts.tolist() == [3]


def test_order_of_every_shape(device):
    indices = torch.randint(-1, 9, (2, 3, 4), device=device)
    found, expected = ops.latent_order(indices, 9), ops.latent_order(indices.view(6, 4), 9)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(ops.latent_order(indices[0, 0], 9).rows.clamp(min=0), torch.zeros(4, device=device).long())


# ---- gradients -------------------------------------------------------------------------------------------------------


def hot_latents(rows, k, features):
    """Every row uses latent 3; the rest is random."""
    indices = torch.randint(features, (rows, k))
    indices[:, 0] = 3
    return indices


@pytest.mark.parametrize(("rows", "dim", "features", "k"), [(700, 33, 50, 3), (2000, 8, 5, 1), (3, 300, 2000, 64)])
def test_decode_gradients_with_hot_latents(rows, dim, features, k, isa, device):
    indices = hot_latents(rows, k, features).to(device)
    sizes = (rows, k), (features, dim), (dim,), (rows, dim)
    values, weight, bias, grad = (torch.randn(size, device=device, dtype=torch.float64) for size in sizes)
    leaves = [t.requires_grad_() for t in (values, weight, bias)]
    found = gradients(ops.sparse_decode(values, indices, weight, bias), grad, leaves)
    expected = gradients(reference.sparse_decode(values, indices, weight, bias), grad, leaves)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-11, atol=1e-10)


def test_hot_latents_are_bitwise_repeatable():
    indices = hot_latents(3000, 2, 40)
    values, weight, grad, x = torch.randn(3000, 2), torch.randn(40, 70), torch.randn(3000, 70), torch.randn(3000, 70)
    order = ops.latent_order(indices, 40)
    ragged = values.flatten(), indices.flatten(), torch.arange(0, 6001, 2)
    everything = True, True, True

    def compute():
        yield from torch.ops.isthmus.sparse_decode_backward(grad, values, indices, weight, *[None] * 4, *everything)
        yield from torch.ops.isthmus.sparse_decode_backward(grad, values, indices, weight, None, *order, *everything)
        yield from torch.ops.isthmus.sparse_decode_backward(
            grad, *ragged[:2], weight, ragged[2], *[None] * 3, *everything
        )
        yield from encode_gradients(values, x, weight, indices, None, order, everything)
        yield from ops.latent_order(indices, 40)

    torch.set_num_threads(1)
    expected = list(compute())
    for given in (3, 6):  # an order that is given, a ragged code: the same bits as the padded code alone
        for f, e in zip(expected[given : given + 3], expected[:3], strict=True):
            assert torch.equal(f.flatten(), e.flatten())
    for threads in (2, 7):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, compute(), expected))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_only_wanted_gradients_are_computed(dtype, isa, device):
    """And those that are have the same bits, whatever else is wanted."""
    values, indices = random_code(60, 5, 40, dtype, device)
    weight, x, target = (torch.randn(size).to(device, dtype) for size in ((40, 70), (60, 70), (60, 70)))
    code = indices, weight, None, None, None, None
    error = torch.randn(60, device=device)
    ask = torch.ops.isthmus
    calls = {
        3: [
            lambda *needs: ask.sparse_decode_backward(x, values, *code, *needs),
            lambda *needs: ask.sparse_encode_backward(values, x, weight, indices, *code[2:], *needs),
        ],
        4: [lambda *needs: ask.sparse_reconstruct_backward(x, error, values, *code[:2], target, x, *code[2:], *needs)],
    }
    for count, functions in calls.items():
        for function in functions:
            complete = function(*[True] * count)
            for wanted in range(2**count):
                needs = [bool(wanted >> i & 1) for i in range(count)]
                for needed, found, expected in zip(needs, function(*needs), complete, strict=True):
                    assert torch.equal(found, expected) if needed else found.numel() == 0


def test_gradients_of_entries_outside_the_order(isa, device):
    """Weight gradients sum the entries of the order; gradients of values are those of all entries."""
    values, indices = random_code(50, 6, 30, torch.float64, device)
    weight, grad, x = (torch.randn(size, device=device).double() for size in ((30, 9), (50, 9), (50, 9)))
    values = values.where(torch.rand_like(values) < 0.5, 0)
    order = ops.latent_order(indices, 30, values=values)
    leaves = [t.requires_grad_() for t in (values, weight)]
    found = gradients(ops.sparse_decode(values, indices, weight, order=order), grad, leaves)
    expected = gradients(reference.sparse_decode(values, indices, weight), grad, leaves)
    for f, e in zip(found, expected, strict=True):  # zeros add nothing to the weight
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)

    scores_grad = torch.randn_like(values)  # not zero where the values are
    found = encode_gradients(scores_grad, x, weight, indices, None, order, (True, True, True))
    leaves = [t.requires_grad_() for t in (x, weight, torch.zeros(30, device=device).double())]
    scores = selected_scores(*leaves, indices, None, order)
    for f, e in zip(found, gradients(scores, scores_grad, leaves), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)
    in_order = values != 0
    assert not torch.equal(found[2], encode_gradients(scores_grad, x, weight, indices, None, None, (False, False, True))[2])
    masked = encode_gradients(scores_grad.where(in_order, 0), x, weight, indices, None, None, (True, True, True))
    torch.testing.assert_close(found[1:], masked[1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("used", ("reconstruction", "error", "both"))
def test_gradients_of_either_result_of_a_reconstruction(used, isa, device):
    values, indices = random_code(20, 6, 15, torch.float64, device)
    weight, bias, target = (torch.randn(size, device=device).double() for size in ((15, 33), (33,), (20, 33)))
    leaves = [t.requires_grad_() for t in (values, weight, bias, target)]

    def loss(result):
        out, error = result
        parts = {"reconstruction": out.sin().sum(), "error": error.sqrt().sum()}
        return sum(parts.values()) if used == "both" else parts[used]

    found = torch.autograd.grad(
        loss(ops.sparse_reconstruct(values, indices, weight, bias, target)), leaves, allow_unused=True
    )
    expected = torch.autograd.grad(
        loss(reference.sparse_reconstruct(values, indices, weight, bias, target)), leaves, allow_unused=True
    )
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-11, atol=1e-11)
    assert (found[3] is None) == (used == "reconstruction")


@pytest.mark.parametrize("activation", ("relu", "identity"))
def test_encode_gradients(activation, isa, device):
    x, weight, bias = problem(150, 33, 60, torch.float64, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias - 1.0)]
    values, indices = ops.topk_encode(*leaves, 40, activation=activation)
    assert ((values == 0).any() and (values > 0).any()) == (activation == "relu")
    grad = torch.randn_like(values)
    found = gradients(values, grad, leaves)
    expected = gradients(reference.topk_encode(*leaves, 40, activation=activation, indices=indices)[0], grad, leaves)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)
    assert not indices.requires_grad


def test_zeros_of_relu_get_no_gradient(device):
    x = torch.ones(3, 2, device=device, requires_grad=True)
    weight = -torch.ones(5, 2, device=device)
    bias = torch.zeros(5, device=device, requires_grad=True)
    values, _ = ops.topk_encode(x, weight.requires_grad_(), bias, 4)
    values.sum().backward()
    assert all((t.grad == 0).all() for t in (x, weight, bias))


def test_latents_nobody_used_have_zero_gradient(isa, device):
    values = torch.randn(6, 2, device=device)
    indices = torch.tensor([[1, 8]] * 6, device=device)
    weight = torch.randn(10, 4, device=device, requires_grad=True)
    ops.sparse_decode(values, indices, weight).sum().backward()
    used = weight.grad.abs().sum(1) > 0
    assert used.nonzero().flatten().tolist() == [1, 8]


def test_a_broken_row_reaches_only_the_first_latent(device):
    x, weight, bias = problem(9, 4, 20, device=device)
    x[5] = torch.nan
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    values, _ = ops.topk_encode(*leaves, 3)
    _, grad_weight, grad_bias = gradients(values, torch.ones_like(values), leaves)
    assert grad_weight[1:].isfinite().all()
    assert grad_bias.isfinite().all()


# ---- memory and errors -----------------------------------------------------------------------------------------------

MEMORY = """
import resource, torch
from isthmus import ops
torch.set_num_threads(2)
x, weight, bias = torch.randn(1024, 64), torch.randn(32768, 64), torch.randn(32768)
ops.topk_encode(x[:8], weight, bias, 32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
values, indices = ops.topk_encode(x, weight, bias, 32)
ops.sparse_decode(values, indices, weight)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_pre_activations_are_never_stored():
    """They would take 128 MB; the peak of a fresh process grows by results and work space only."""
    grown = int(subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout)
    assert grown < 16e6


def test_bad_arguments():
    x, weight, bias = problem(4, 6, 10)
    for k in (0, 11, -1):
        with pytest.raises(RuntimeError, match=f"k is {k}; expected 1 to 10"):
            ops.topk_encode(x, weight, bias, k)
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        ops.topk_encode(x, weight, bias, 2, activation="tanh")
    with pytest.raises(ValueError, match="x has shape"):
        ops.topk_encode(x[0, 0], weight, bias, 2)
    with pytest.raises(RuntimeError, match=r"weight has shape \[10, 5\]; expected \[\*, 6\]"):
        ops.topk_encode(x, weight[:, :5], bias, 2)
    with pytest.raises(RuntimeError, match=r"weight has shape \[60\]"):
        ops.topk_encode(x, weight.flatten(), bias, 2)
    with pytest.raises(RuntimeError, match=r"bias has shape \[9\]; expected \[10\]"):
        ops.topk_encode(x, weight, bias[:9], 2)
    with pytest.raises(RuntimeError, match="weight has dtype Double; expected Float, like x"):
        ops.topk_encode(x, weight.double(), bias, 2)
    with pytest.raises(RuntimeError, match="x has dtype Int"):
        ops.topk_encode(x.int(), weight.int(), None, 2)


DECODE_MEMORY = """
import resource, torch
from isthmus import ops
torch.set_num_threads(2)
values, weight = torch.randn(4096, 32, requires_grad=True), torch.randn(2048, 256, requires_grad=True)
indices, target = torch.randint(2048, (4096, 32)), torch.randn(4096, 256)
ops.sparse_reconstruct(values[:8], indices[:8], weight, None, target[:8])[1].sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.sparse_reconstruct(values, indices, weight, None, target)[1].sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_gathered_rows_are_never_stored():
    """They would take 134 MB; reconstruction, its gradient, that of the weight and the order take 14 MB."""
    run = subprocess.run([sys.executable, "-c", DECODE_MEMORY], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 24e6


def test_bad_codes():
    values, indices = torch.ones(4, 2), torch.ones(4, 2, dtype=torch.int64)
    weight, bias = torch.randn(10, 6), torch.randn(10)
    for wrong in (-2, 10, 2**40):
        indices[3, 1] = wrong
        with pytest.raises(RuntimeError, match=rf"indices holds {wrong}; expected values in \[-1, 10\)"):
            ops.sparse_decode(values, indices, weight)
        with pytest.raises(RuntimeError, match=rf"indices holds {wrong}; expected values in \[-1, 10\)"):
            ops.latent_order(indices, 10)
    with pytest.raises(ValueError, match=r"indices has shape \[2, 4\]; expected \[4, 2\]"):
        ops.sparse_decode(values, indices.T, weight)
    indices.zero_()
    with pytest.raises(RuntimeError, match="indices has dtype Int; expected int64"):
        ops.sparse_decode(values, indices.int(), weight)
    with pytest.raises(RuntimeError, match=r"bias has shape \[10\]; expected \[6\]"):
        ops.sparse_decode(values, indices, weight, bias)
    with pytest.raises(RuntimeError, match=r"weight has shape \[6\]"):
        ops.sparse_decode(values, indices, weight[0])
    with pytest.raises(RuntimeError, match="indices holds 0"):
        ops.sparse_decode(values, indices, weight[:0])
    with pytest.raises(RuntimeError, match="weight has dtype Double; expected Float, like values"):
        ops.sparse_decode(values, indices, weight.double())
    with pytest.raises(RuntimeError, match=r"target has shape \[4, 5\]; expected \[4, 6\]"):
        ops.sparse_reconstruct(values, indices, weight, None, torch.ones(4, 5))
    with pytest.raises(ValueError, match=r"target has shape \[4, 6\]; expected \[2, 2, 6\]"):
        ops.sparse_reconstruct(values.view(2, 2, 2), indices.view(2, 2, 2), weight, None, torch.ones(4, 6))
    with pytest.raises(RuntimeError, match="num_features is -1"):
        ops.latent_order(indices, -1)


def test_bad_offsets_and_orders():
    values, indices, weight = torch.ones(4), torch.tensor([0, 1, 2, 2]), torch.randn(3, 6)

    def decode(offsets, order=None, weight=weight):
        return ops.sparse_decode(values, indices, weight, offsets=torch.tensor(offsets), order=order)

    for offsets, told in (
        ([1, 4], "offsets begins with 1; expected 0"),
        ([0, 3], "offsets ends with 3; expected 4"),
        ([0, 5], "offsets ends with 5; expected at most 4"),
        ([0, 3, 2, 4], "offsets falls from 3 to 2"),
        ([], r"offsets has (dtype Float|shape \[0\])"),
        ([[0, 4]], r"offsets has shape \[1, 2\]"),
        ([0.0, 4.0], "offsets has dtype Float; expected int64"),
    ):
        with pytest.raises(RuntimeError, match=told):
            decode(offsets)
    with pytest.raises(RuntimeError, match=r"indices has shape \[2, 2\]; expected \[entries\]"):
        ops.sparse_decode(values.view(2, 2), indices.view(2, 2), weight, offsets=torch.tensor([0, 4]))

    good = ops.latent_order(indices, 3)
    for order, told in (
        (good._replace(starts=good.starts[:3]), r"starts of the order has shape \[3\]; expected \[4\]"),
        (good._replace(starts=good.starts + 1), "starts of the order begins with 1"),
        (good._replace(entries=good.entries[:3]), r"entries of the order has shape \[3\]; expected \[4\]"),
        (good._replace(entries=good.entries + 1), r"entries of the order holds 4; expected values in \[0, 4\)"),
        (good._replace(rows=good.rows - 1), r"rows of the order holds -1; expected values in \[0, 2\)"),
        (good._replace(rows=good.rows.int()), "rows of the order has dtype Int"),
    ):
        with pytest.raises(RuntimeError, match=told):
            decode([0, 2, 4], order, weight.clone().requires_grad_()).sum().backward()
