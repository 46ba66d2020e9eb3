"""What is particular to top-k encoding; the rest is in tests/test_every_op.py."""

import subprocess
import sys

import pytest
import torch
from encoders import DTYPES, assert_same, problem, whole_numbers

from isthmus import ops, reference

ACTIVATIONS = ("relu", "identity", "abs")


# ---- which features are found ----------------------------------------------------------------------------------------

SHAPES = [
    (1, 1, 1, 1), (3, 5, 7, 7), (13, 3, 33, 1), (12, 16, 32, 32), (5, 17, 31, 2), (97, 8, 65, 9), (2, 40, 3000, 17),
    (200, 4, 1025, 64), (1, 100, 5003, 600), (26, 1, 500, 499), (4, 0, 9, 3),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
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
def test_values_are_rounded_once(dtype, isa, device):
    """From float64: a half must not be rounded by way of float32."""
    x, weight, bias = problem(70, 48, 2000, dtype, device)
    values, indices = ops.topk_encode(x, weight, bias, 40)
    scores = torch.nn.functional.linear(*(t.double() for t in (x, weight, bias))).relu().gather(1, indices)
    step = torch.finfo(dtype).eps / 2
    assert ((values.double() - scores).abs() <= step * scores + 1e-12).all()
    assert (scores.diff() <= 1e-12).all()
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


# ---- parts of the features -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("groups", (1, 2, 12, 48))
@pytest.mark.parametrize("share", (0.0, 0.02, 0.5, 1.0))
@pytest.mark.parametrize("rows", (2, 37))
def test_groups_and_subsets(rows, share, groups, activation, isa, device):
    """Together; with features of which too few take part, or none."""
    x, weight, bias = whole_numbers(rows, 19, 480, device=device)
    among = torch.rand(480, device=device) < share
    options = {"activation": activation, "groups": groups}
    for mask in (among, None):
        found = ops.topk_encode(x, weight, bias, 48, among=mask, **options)
        assert_same(found, reference.topk_encode(x, weight, bias, 48, among=mask, **options))


def test_a_group_is_a_search_of_its_own(device):
    x, weight, bias = problem(40, 32, 600, device=device)
    values, indices = ops.topk_encode(x, weight, bias, 15, groups=3)
    for g in range(3):
        part = slice(200 * g, 200 * (g + 1))
        alone = ops.topk_encode(x, weight[part], bias[part], 5)
        assert_same((values[:, 5 * g : 5 * g + 5], indices[:, 5 * g : 5 * g + 5] - 200 * g), alone)


def test_features_that_take_no_part_are_not_read(isa, device):
    x, weight, bias = problem(30, 24, 500, device=device)
    among = torch.arange(500, device=device) % 7 == 3
    expected = ops.topk_encode(x, weight[among], bias[among], 9)
    weight[~among] = torch.nan
    values, indices = ops.topk_encode(x, weight, bias, 9, among=among)
    assert_same((values, indices), (expected[0], among.nonzero().squeeze(1)[expected[1]]))


def test_a_smaller_k_is_a_prefix(isa, device):
    x, weight, bias = problem(50, 40, 3000, device=device)
    values, indices = ops.topk_encode(x, weight, bias, 300)
    for k in (1, 32, 128):
        assert_same(ops.topk_encode(x, weight, bias, k), (values[:, :k], indices[:, :k]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_order_of_the_code(activation, isa, device):
    x, weight, bias = whole_numbers(3 * 40, 5, 90, device=device)
    found = ops.topk_encode(x.reshape(3, 40, 5), weight, bias - 3, 40, activation=activation, return_order=True)
    values, indices, order = found
    left_out = values if activation == "relu" else None
    assert_same(order, reference.latent_order(indices, 90, values=left_out))
    assert ((values == 0).any() and order.starts[-1] < indices.numel()) == (activation == "relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_with_an_order_are_the_same(activation, isa, device):
    x, weight, bias = problem(60, 17, 80, torch.float64, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias - 2.0)]
    among = torch.rand(80, device=device) < 0.6
    grad = torch.randn(60, 60, dtype=torch.float64, device=device)
    found, expected = (
        torch.autograd.grad(
            ops.topk_encode(*leaves, 60, activation=activation, among=among, return_order=ordered)[0], leaves, grad
        )
        for ordered in (True, False)
    )
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", (1, 4, 5, 24))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_equal_many(rows, dtype, isa, device):
    """They are searched in another way."""
    x, weight, bias = problem(64, 33, 5000, dtype, device)
    values, indices = ops.topk_encode(x, weight, bias, 20)
    assert_same(ops.topk_encode(x[:rows], weight, bias, 20), (values[:rows], indices[:rows]))


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_encode_gradients(activation, isa, device):
    x, weight, bias = problem(150, 33, 60, torch.float64, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias - 1.0)]
    values, indices = ops.topk_encode(*leaves, 40, activation=activation)
    assert ((values == 0).any() and (values > 0).any()) == (activation == "relu")
    grad = torch.randn_like(values)
    found = torch.autograd.grad(values, leaves, grad)
    held = reference.topk_encode(*leaves, 40, activation=activation, indices=indices)[0]
    expected = torch.autograd.grad(held, leaves, grad)
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


def test_a_broken_row_reaches_only_the_first_latent(device):
    x, weight, bias = problem(9, 4, 20, device=device)
    x[5] = torch.nan
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    values, _ = ops.topk_encode(*leaves, 3)
    _, grad_weight, grad_bias = torch.autograd.grad(values, leaves, torch.ones_like(values))
    assert grad_weight[1:].isfinite().all()
    assert grad_bias.isfinite().all()


# ---- memory and errors -----------------------------------------------------------------------------------------------

MEMORY = """
import resource, torch
from isthmus import ops
torch.set_num_threads(2)
x, weight, bias = torch.randn({rows}, {dim}), torch.randn({features}, {dim}), torch.randn({features})
ops.topk_encode(x[:8], weight, bias, 32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.topk_encode(x, weight, bias, 32)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("shape", [(1024, 64, 32768), (128, 768, 24576), (60000, 16, 4096)], ids=str)
def test_pre_activations_are_never_stored(shape):
    """They would take 128 MB and more, a copy of the weights up to 75; the peak of a fresh process grows by less."""
    script = MEMORY.format(rows=shape[0], dim=shape[1], features=shape[2])
    grown = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    results = shape[0] * 32 * 12
    assert grown < results + 32e6


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
    for groups in (0, 3, 5):
        with pytest.raises(
            RuntimeError, match=f"groups is {groups}; expected a divisor of 10, .* and of k, which is 4"
        ):
            ops.topk_encode(x, weight, bias, 4, groups=groups)
    with pytest.raises(RuntimeError, match=r"among is Float\[10\]; expected Bool\[10\]"):
        ops.topk_encode(x, weight, bias, 4, among=bias)
    with pytest.raises(RuntimeError, match=r"among is Bool\[4\]; expected Bool\[10\]"):
        ops.topk_encode(x, weight, bias, 4, among=bias[:4] > 0)
