"""What is particular to ragged encoders; the rest is in tests/test_every_op.py."""

import subprocess
import sys

import pytest
import torch
from encoders import DTYPES, assert_same, problem, whole_numbers

from isthmus import ops, reference, set_isa

ACTIVATIONS = ("relu", "identity")


def broken_rows(x, *rows):
    x = x.clone()
    x[list(rows), -1] = torch.nan
    return x


# ---- which entries are found -----------------------------------------------------------------------------------------

SHAPES = [
    (1, 1, 1),
    (3, 5, 7),
    (13, 3, 33),
    (5, 17, 31),
    (97, 8, 65),
    (2, 40, 3000),
    (1100, 3, 90),
    (50, 70, 300),
    (4, 0, 9),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_threshold_finds_what_is_greater(shape, isa, device):
    x, weight, bias = whole_numbers(*shape, device=device)
    each = torch.randint(-3, 4, (shape[2],), device=device).float()
    for b in (bias, None):
        for threshold in (-1.0, 0.0, 1.5, each, each.double() - 0.25, torch.tensor(2.0, device=device)):
            found = ops.threshold_encode(x, weight, b, threshold)
            assert_same(found, reference.threshold_encode(x, weight, b, threshold))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_finds_what_a_stable_sort_finds(shape, activation, isa, device):
    """Ties, and zeros that fill up, go to the lowest row and feature."""
    x, weight, bias = whole_numbers(*shape, device=device)
    for b in (bias, None):
        for k in {0, 1, 1 / shape[0], shape[2] / 3, shape[2] - 0.5, shape[2]}:
            found = ops.batch_topk_encode(x, weight, b, k, activation=activation)
            assert_same(found, reference.batch_topk_encode(x, weight, b, k, activation=activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_correctly_rounded(dtype, isa, device):
    x, weight, bias = problem(70, 48, 900, dtype, device)
    scores = torch.nn.functional.linear(*(t.double() for t in (x, weight, bias)))
    for values, indices, offsets, *_ in (
        ops.threshold_encode(x, weight, bias, 9.0),
        ops.batch_topk_encode(x, weight, bias, 60),
    ):
        rows = torch.arange(70, device=device).repeat_interleave(offsets.diff())
        exact = scores[rows, indices]
        assert ((values.double() - exact).abs() <= (torch.finfo(dtype).eps / 2 + 1e-13) * exact.abs()).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_halves_are_rounded_once(dtype, isa, device):
    """Just above and below the middle of two neighbours of 1, by less than a float32 can tell."""
    half = torch.finfo(dtype).eps / 2
    x = torch.tensor([[1, half, 2.0**-14], [1, half, -(2.0**-14)]], dtype=dtype, device=device)
    weight = torch.tensor([[1, 1, 2.0**-14], [-1, -1, -(2.0**-14)]], dtype=dtype, device=device)
    values, *_ = ops.batch_topk_encode(x, weight, None, 2, activation="identity")
    assert values.tolist() == [1 + 2 * half, -1 - 2 * half, 1, -1]


def test_near_ties_are_told_apart_in_float64(isa, device):
    """Scores a 2^-40th apart are the same float32."""
    x = torch.tensor([[1.0, 1.0], [1.0, 2.0]], device=device)
    steps = torch.randperm(500, device=device).float()
    weight = torch.stack([torch.ones(500, device=device), steps * 2.0**-40], dim=1)
    _, indices, offsets = ops.threshold_encode(x, weight, None, 1 + 100 * 2.0**-40)
    assert_same(indices.tensor_split(offsets[1:2].cpu()), [(steps > n).nonzero()[:, 0] for n in (100, 50)])
    _, indices, offsets, _ = ops.batch_topk_encode(x, weight, None, 150)  # 466 is reached twice
    assert_same(indices.tensor_split(offsets[1:2].cpu()), [(steps >= n).nonzero()[:, 0] for n in (466, 234)])


@pytest.mark.parametrize("copies", (7, 300))
def test_duplicates_go_to_the_lowest_position(copies, isa, device):
    """More ties than a list of candidates holds, over rows, panels and ranges."""
    x, weight, bias = problem(3, 9, 5, device=device)
    x, weight, bias = x.repeat(11, 1), weight.repeat(copies, 1), bias.repeat(copies)
    for k in (0.5, copies * 2 - 0.2):
        found = ops.batch_topk_encode(x, weight, bias, k)
        assert_same(found[1:3], reference.batch_topk_encode(x, weight, bias, k)[1:3])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nothing_is_positive(activation, isa, device):
    x, weight, bias = whole_numbers(20, 6, 50, device=device)
    found = ops.batch_topk_encode(x, weight, bias - 100, 3, activation=activation)
    assert_same(found, reference.batch_topk_encode(x, weight, bias - 100, 3, activation=activation))
    if activation == "relu":
        assert found[2].tolist() == [0, 50] + [60] * 19
        assert (found[0] == 0).all() and found[3] == 0
    assert ops.threshold_encode(x, weight, bias - 100, 0)[2].tolist() == [0] * 21


@pytest.mark.parametrize("scale", (1e-44, 1e-30, 1e25, 1e38))
def test_tiny_and_huge(scale, isa, device):
    """Where float32 products vanish, or overflow, float64 has the answer."""
    x, weight, _ = whole_numbers(30, 5, 200, device=device)
    x, weight, bias = x * scale, weight * scale, torch.tensor([0.0, 1.0, -1.0, 0.0], device=device).repeat(50)
    threshold = 2.0 * float(x.abs().max()) * float(weight.abs().max())
    assert_same(ops.threshold_encode(x, weight, bias, threshold)[1:],
                reference.threshold_encode(x, weight, bias, threshold)[1:])  # fmt: skip
    for activation in ACTIVATIONS:
        found = ops.batch_topk_encode(x, weight, bias, 20, activation=activation)
        assert_same(found[1:3], reference.batch_topk_encode(x, weight, bias, 20, activation=activation)[1:3])


def test_infinities(isa, device):
    """A bias of -inf or a threshold of inf takes a feature out; a bias of inf is always in."""
    x, weight, bias = whole_numbers(40, 6, 900, device=device)
    bias[torch.arange(900, device=device) % 3 > 0] = -torch.inf
    bias[600] = torch.inf
    threshold = torch.zeros(900, device=device)
    threshold[::2] = torch.inf
    threshold[300] = -torch.inf
    found = ops.threshold_encode(x, weight, bias, threshold)
    assert_same(found, reference.threshold_encode(x, weight, bias, threshold))
    for activation in ACTIVATIONS:  # 310 is more than what is finite
        for k in (20, 310):
            found = ops.batch_topk_encode(x, weight, bias, k, activation=activation)
            assert_same(found, reference.batch_topk_encode(x, weight, bias, k, activation=activation))


def test_a_nan_stays_in_its_row(isa, device):
    x, weight, bias = whole_numbers(30, 5, 100, device=device)
    x = broken_rows(x, 0, 7, 29)
    x[8, 0] = torch.inf  # times zero
    for threshold in (0.0, torch.inf):
        found = ops.threshold_encode(x, weight, bias, threshold)
        assert_same(found, reference.threshold_encode(x, weight, bias, threshold))
    assert found[0].isnan().all() and found[1].tolist() == [0] * 4
    for activation in ACTIVATIONS:
        for k in (0.1, 3, 99, 100):
            found = ops.batch_topk_encode(x, weight, bias, k, activation=activation)
            assert_same(found, reference.batch_topk_encode(x, weight, bias, k, activation=activation))


@pytest.mark.parametrize("rows", (1, 3))
def test_a_nan_among_few_rows(rows, isa, device):
    x, weight, bias = whole_numbers(rows, 5, 3000, device=device)
    x = broken_rows(x, rows // 2)
    found = ops.threshold_encode(x, weight, bias, 1.0)
    assert_same(found, reference.threshold_encode(x, weight, bias, 1.0))
    for k in (0.5, 20, 3000):
        found = ops.batch_topk_encode(x, weight, bias, k)
        assert_same(found, reference.batch_topk_encode(x, weight, bias, k))


def test_a_sample_that_misleads(isa, device):
    """Every 4th row and 2nd feature, which a sample of 128 by 512 meets, is far above the others, or below."""
    x, weight, _ = problem(512, 4, 1024, device=device)
    for scale in (1e3, 1e-3):
        spread, wide = x.clone(), weight.clone()
        spread[::4] *= scale
        wide[::2] *= scale
        found = ops.batch_topk_encode(spread, wide, None, 300)
        expected = reference.batch_topk_encode(spread, wide, None, 300)
        assert_same(found[1:3], expected[1:3])


def test_a_broken_row_leaves_no_gap(isa, device):
    """Its NaN appears last, after its largest scores have raised the bar for all others."""
    x, weight, bias = problem(40, 8, 5000, device=device)
    x[3] *= 100
    weight[:, 0], x[:, 0] = 0, 1
    weight[-1, 0], x[3, 0] = torch.inf, 0
    found = ops.batch_topk_encode(x, weight, bias, 200)
    assert_same(found[1:3], reference.batch_topk_encode(x, weight, bias, 200)[1:3])
    assert found[2].diff()[3] == 1


def test_half_of_all_features(device):
    x, weight, bias = whole_numbers(300, 6, 1000, device=device)
    found = ops.threshold_encode(x, weight, bias, -0.5)
    assert found[0].numel() > 150_000
    assert_same(found, reference.threshold_encode(x, weight, bias, -0.5))
    found = ops.batch_topk_encode(x, weight, bias, 500)
    assert_same(found, reference.batch_topk_encode(x, weight, bias, 500))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_at_every_level_and_for_any_threads(dtype, isa):
    x, weight, bias = problem(300, 37, 3000, dtype)

    def encode():
        return *ops.threshold_encode(x, weight, bias, 9.0), *ops.batch_topk_encode(x, weight, bias, 20)

    found = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        found.append(encode())
    set_isa("baseline")
    for other in found:
        assert_same(other, encode())


def test_rows_do_not_depend_on_the_batch(device):
    x, weight, bias = problem(300, 24, 3000, device=device)
    values, indices, offsets = ops.threshold_encode(x, weight, bias, 9.0)
    for rows in (0, 1, 11, 200):
        end = int(offsets[rows])
        part = ops.threshold_encode(x[:rows], weight, bias, 9.0)
        assert_same(part, (values[:end], indices[:end], offsets[: rows + 1]))


def test_leading_dimensions_and_vectors(device):
    x, weight, bias = problem(24, 7, 50, device=device)
    for encode in (
        lambda x: ops.threshold_encode(x, weight, bias, 0),
        lambda x: ops.batch_topk_encode(x, weight, bias, 2),
    ):
        assert_same(encode(x.reshape(2, 3, 4, 7)), encode(x))
        assert_same(encode(x[3]), encode(x[3:4]))


def test_the_threshold_of_a_batch_finds_it_again(device):
    x, weight, bias = problem(64, 16, 400, torch.float64, device)
    values, indices, offsets, threshold = ops.batch_topk_encode(x, weight, bias, 8)
    assert threshold == values.min() and not threshold.requires_grad
    found = ops.threshold_encode(x, weight, bias, torch.nextafter(threshold, threshold.new_zeros(())))
    assert_same(found, (values, indices, offsets))


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted", [(True, True, True), (True, False, False), (False, True, True), (False, False, True)]
)
def test_gradients_equal_those_of_the_dense_code(wanted, isa, device):
    x, weight, bias = problem(50, 12, 300, torch.float64, device)
    leaves = [t.requires_grad_(w) for t, w in zip((x, weight, bias), wanted, strict=True)]
    inputs = [t for t in leaves if t.requires_grad]
    dense = torch.nn.functional.linear(*leaves)
    decoder = torch.randn_like(weight)

    def gradients(dense_code, code):
        target = torch.randn(50, 12, dtype=torch.float64, device=device)
        out = ops.sparse_decode(code[0], code[1], decoder, offsets=code[2])
        found = torch.autograd.grad((out - target).square().sum(), inputs)
        expected = torch.autograd.grad((dense_code @ decoder - target).square().sum(), inputs, retain_graph=True)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-8)

    gradients(torch.where(dense > 2, dense, 0), ops.threshold_encode(*leaves, 2.0))
    *code, threshold = ops.batch_topk_encode(*leaves, 9)
    gradients(torch.where(dense >= threshold, dense, 0), code)


@pytest.mark.parametrize("encode", ["threshold", "batch"])
def test_the_order_is_that_of_the_code_and_changes_no_gradient(encode, isa, device):
    leaves = [t.requires_grad_() for t in problem(60, 12, 300, device=device)]

    def run(**options):
        if encode == "threshold":
            return ops.threshold_encode(*leaves, 1.5, **options)
        return ops.batch_topk_encode(*leaves, 200, **options)  # more than are positive

    *code, order = run(return_order=True)
    assert_same(code, run())
    values, indices, offsets = code[:3]
    active = values.detach() if encode == "batch" else None
    assert_same(order, ops.latent_order(indices, 300, values=active, offsets=offsets))
    grad = torch.randn_like(values)
    # Sums over many rows are cut elsewhere where zeros are left out.
    expected = torch.autograd.grad(run()[0], leaves, grad)
    torch.testing.assert_close(torch.autograd.grad(values, leaves, grad), expected, rtol=1e-5, atol=1e-4)


def test_zeros_of_relu_get_no_gradient(device):
    x = torch.ones(3, 2, device=device, requires_grad=True)
    weight = torch.full((5, 2), -1.0, device=device, requires_grad=True)
    ops.batch_topk_encode(x, weight, None, 4)[0].sum().backward()
    assert (x.grad == 0).all() and (weight.grad == 0).all()


def test_a_broken_row_reaches_only_the_first_feature(device):
    x, weight, bias = problem(9, 4, 20, device=device)
    leaves = [t.requires_grad_() for t in (broken_rows(x, 5), weight, bias)]
    values, *_ = ops.threshold_encode(*leaves, 0.5)
    values.sum().backward()
    assert leaves[1].grad[1:].isfinite().all() and leaves[2].grad.isfinite().all()


def test_the_threshold_gets_no_gradient(device):
    x, weight, bias = problem(9, 4, 20, device=device)
    threshold = torch.zeros(20, device=device, requires_grad=True)
    values, *_ = ops.threshold_encode(x.requires_grad_(), weight, bias, threshold)
    values.sum().backward()
    assert threshold.grad is None


# ---- memory, tracing and errors --------------------------------------------------------------------------------------

MEMORY = """
import resource, sys, torch
from isthmus import ops
torch.set_num_threads(2)
x, weight, bias = torch.randn(1024, 64), torch.randn(32768, 64), torch.randn(32768)
encode = {"threshold": lambda x: ops.threshold_encode(x, weight, bias, 25.0),
          "batch": lambda x: ops.batch_topk_encode(x, weight, bias, 32)}[sys.argv[1]]
encode(x[:8])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
encode(x)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("op", ("threshold", "batch"))
def test_pre_activations_are_never_stored(op):
    """They would take 128 MB; the peak of a fresh process grows by results and work space only."""
    command = [sys.executable, "-c", MEMORY, op]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) < 16e6


MISLED = """
import resource, torch
from isthmus import ops
torch.set_num_threads(2)
x, weight = torch.randn(2048, 8), torch.randn(8192, 8)
weight[::16] *= 1e-3
ops.batch_topk_encode(x[:64], weight, None, 32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
values, _, offsets, least = ops.batch_topk_encode(x, weight, None, 32)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
scores = (x.double() @ weight.double().T).flatten().topk(2048 * 32).values
assert least == scores[-1].float() and torch.equal(values.sort(descending=True).values, scores.float())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_a_sample_that_misleads_costs_no_memory():
    """It sees every 16th feature, which are tiny, so half of all scores are above its guess: 126 MB of entries.
    Twice as many as are wanted take 2 MB."""
    command = [sys.executable, "-c", MISLED]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) < 16e6


def test_compiles_with_any_number_of_entries():
    x, weight, bias = problem(30, 6, 40)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def energy(x, weight, threshold):
        values, indices, offsets = ops.threshold_encode(x, weight, bias, threshold)
        return ops.sparse_decode(values, indices, weight, offsets=offsets).square().sum()

    for rows in (30, 7, 12):
        for threshold in (torch.zeros(()), torch.full((), 100.0)):
            weight.requires_grad_()
            found = torch.autograd.grad(energy(x[:rows], weight, threshold), weight)
            values, indices, offsets = ops.threshold_encode(x[:rows], weight, bias, threshold)
            out = ops.sparse_decode(values, indices, weight, offsets=offsets)
            assert_same(found, torch.autograd.grad(out.square().sum(), weight))


def test_vmap_wants_equally_many_entries():
    x, weight, bias = whole_numbers(4, 6, 30)
    with pytest.raises(ValueError, match=r"threshold_encode gave shapes .* under vmap; expected the same for all"):
        torch.vmap(lambda b: ops.threshold_encode(x, weight, b, 0.5))(torch.stack([bias, bias - 100]))


def test_bad_arguments():
    x, weight, bias = problem(4, 6, 10)
    for k in (10.2, 11, -1):
        with pytest.raises(RuntimeError, match=r"k asks for -?[0-9]+ entries of 4 rows; expected 0 to 10 for each"):
            ops.batch_topk_encode(x, weight, bias, k)
    with pytest.raises(ValueError, match="activation is 'abs'"):
        ops.batch_topk_encode(x, weight, bias, 2, activation="abs")
    with pytest.raises(ValueError, match=r"x has shape \[\]"):
        ops.threshold_encode(x[0, 0], weight, bias, 2)
    with pytest.raises(RuntimeError, match=r"threshold has shape \[9\]; expected \[10\] or \[\]"):
        ops.threshold_encode(x, weight, bias, bias[:9])
    for encode in (ops.threshold_encode, ops.batch_topk_encode):
        with pytest.raises(RuntimeError, match=r"weight has shape \[10, 5\]; expected \[\*, 6\]"):
            encode(x, weight[:, :5], bias, 2)
        with pytest.raises(RuntimeError, match=r"weight has shape \[60\]"):
            encode(x, weight.flatten(), bias, 2)
        with pytest.raises(RuntimeError, match=r"bias has shape \[9\]; expected \[10\]"):
            encode(x, weight, bias[:9], 2)
        with pytest.raises(RuntimeError, match="weight has dtype Double; expected Float, like x"):
            encode(x, weight.double(), bias, 2)
        with pytest.raises(RuntimeError, match="x has dtype Int"):
            encode(x.int(), weight.int(), None, 2)
