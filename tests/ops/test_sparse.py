"""What is particular to top-k codes; the rest is in tests/test_every_op.py."""

import subprocess
import sys

import pytest
import torch

from isthmus import ops, reference

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


@pytest.mark.parametrize("dim", (0, 1, 15, 64, 65, 127, 256, 300, 775))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_every_width(dim, dtype, isa, device):
    weight, values = (torch.randn(size).to(device, dtype) for size in ((37, dim), (5, 11)))
    bias, indices = torch.randn(dim).to(device, dtype), torch.randint(37, (5, 11), device=device)
    found = ops.sparse_decode(values, indices, weight, bias)
    expected = reference.sparse_decode(values.double(), indices, weight.double(), bias.double())
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_decode_counts_repeated_features_and_no_features(isa, device):
    weight, bias = torch.randn(4, 9, device=device), torch.randn(9, device=device)
    values = torch.tensor([[1.0, 2.0, 4.0]], device=device)
    indices = torch.tensor([[2, 2, 2]], device=device)
    torch.testing.assert_close(ops.sparse_decode(values, indices, weight, bias), 7 * weight[2:3] + bias)
    assert torch.equal(ops.sparse_decode(values[:, :0], indices[:, :0], weight, bias), bias[None])


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
    values, weight, grad = torch.randn(3000, 2), torch.randn(40, 70), torch.randn(3000, 70)
    args = grad, values, indices, weight, *[None] * 4, True, True, True
    torch.set_num_threads(1)
    expected = torch.ops.isthmus.sparse_decode_backward(*args)
    encoder = values, grad, weight, indices, *[None] * 4, True, True, True
    expected_encoder = torch.ops.isthmus.sparse_encode_backward(*encoder)
    for threads in (2, 7):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, torch.ops.isthmus.sparse_decode_backward(*args), expected))
        assert all(map(torch.equal, torch.ops.isthmus.sparse_encode_backward(*encoder), expected_encoder))


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

    values, indices = torch.ones(4, 2), torch.ones(4, 2, dtype=torch.int64)
    for wrong in (-2, 10, 2**40):
        indices[3, 1] = wrong
        with pytest.raises(RuntimeError, match=rf"indices holds {wrong}; expected values in \[-1, 10\)"):
            ops.sparse_decode(values, indices, weight)
    with pytest.raises(ValueError, match=r"indices has shape \[2, 4\]; expected \[4, 2\]"):
        ops.sparse_decode(values, indices.T, weight)
    with pytest.raises(RuntimeError, match="indices has dtype Int; expected int64"):
        ops.sparse_decode(values, indices.int(), weight)
    with pytest.raises(RuntimeError, match=r"bias has shape \[10\]; expected \[6\]"):
        ops.sparse_decode(values, torch.zeros_like(indices), weight, bias)
    with pytest.raises(RuntimeError, match=r"weight has shape \[6\]"):
        ops.sparse_decode(values, torch.zeros_like(indices), weight[0])
    with pytest.raises(RuntimeError, match="indices holds 0"):
        ops.sparse_decode(values, torch.zeros_like(indices), weight[:0])
