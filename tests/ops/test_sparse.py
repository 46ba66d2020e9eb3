"""What is particular to top-k codes; the rest is in tests/test_every_op.py."""

import subprocess
import sys

import pytest
import torch

from isthmus import ops, reference
from isthmus.ops.sparse import encode_gradients
from isthmus.reference.sparse import selected_scores

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def gradients(outputs, grad, inputs):
    return torch.autograd.grad(outputs, inputs, grad)


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


def test_leading_dimensions_and_vectors(device):
    weight, values = torch.randn(50, 7, device=device), torch.randn(24, 4, device=device)
    indices = torch.randint(50, (24, 4), device=device)
    out = ops.sparse_decode(values, indices, weight)
    shaped = ops.sparse_decode(values.reshape(2, 3, 4, 4), indices.reshape(2, 3, 4, 4), weight)
    assert torch.equal(shaped, out.reshape(2, 3, 4, 7))
    assert torch.equal(ops.sparse_decode(values[3], indices[3], weight), out[3])


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
    assert not torch.equal(
        found[2], encode_gradients(scores_grad, x, weight, indices, None, None, (False, False, True))[2]
    )
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


def test_latents_nobody_used_have_zero_gradient(isa, device):
    values = torch.randn(6, 2, device=device)
    indices = torch.tensor([[1, 8]] * 6, device=device)
    weight = torch.randn(10, 4, device=device, requires_grad=True)
    ops.sparse_decode(values, indices, weight).sum().backward()
    used = weight.grad.abs().sum(1) > 0
    assert used.nonzero().flatten().tolist() == [1, 8]


# ---- memory and errors -----------------------------------------------------------------------------------------------

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
