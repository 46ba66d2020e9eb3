"""What is particular to vector quantization; the rest is in tests/test_every_op.py."""

import itertools
import threading
from pathlib import Path

import pytest
import torch

import isthmus
from isthmus import ops, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Around the borders of tiles (4, 6, 8, 12 rows), panels (4 to 32 codes), vectors and blocks, and primes.
SHAPES = [
    (1, 1, 1), (0, 3, 2), (2, 5, 0), (1, 2, 3), (3, 1, 4), (7, 16, 1), (12, 32, 8), (13, 33, 17), (24, 31, 16),
    (97, 64, 5), (100, 65, 31), (211, 127, 7), (5, 257, 64), (1155, 3, 2), (389, 101, 13), (31, 9, 300),
]  # fmt: skip


def draw(rows, codes, dim, dtype=torch.float32, device="cpu"):
    x, codebook = torch.randn(rows, dim, dtype=torch.float64), torch.randn(codes, dim, dtype=torch.float64)
    return x.to(device, dtype), codebook.to(device, dtype)


def distances(x, codebook):
    return (x.double().unsqueeze(1) - codebook.double()).square().sum(-1)


def assert_nearest(indices, x, codebook):
    """Every chosen code is as near as the nearest, but for the rounding of the scores it was chosen by."""
    d = distances(x, codebook)
    chosen = d.gather(1, indices.unsqueeze(1)).squeeze(1)
    unit = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    sizes = x.double().norm(dim=1) + codebook.double().norm(dim=1).max()
    assert (chosen - d.min(1).values <= 2 * (x.shape[1] + 2) * unit * sizes.square()).all()
    return d


# ---- the nearest code ------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, dtype, isa, device):
    x, codebook = draw(*shape, dtype, device)
    indices = ops.vq_assign(x, codebook)
    assert indices.dtype == torch.int64 and indices.shape == x.shape[:1]
    d = assert_nearest(indices, x, codebook)
    if shape[1] > 1 and shape[2] > 0:
        # Where the two nearest are further apart than rounding, the answer is the answer.
        first, second = d.topk(2, largest=False).values.unbind(1)
        clear = second - first > 1e-4 * second
        assert clear.sum() >= len(x) // 2
        assert torch.equal(indices[clear], reference.vq_assign(x.double(), codebook.double())[clear])


def test_leading_dimensions(device):
    x, codebook = draw(24, 7, 5, device=device)
    expected = ops.vq_assign(x, codebook)
    for shape in ((24,), (2, 12), (2, 3, 4), (1, 24, 1)):
        assert torch.equal(ops.vq_assign(x.reshape(*shape, 5), codebook), expected.reshape(shape))
    assert ops.vq_assign(x[3], codebook) == expected[3]


@every_dtype
def test_ties_go_to_the_lowest_index(dtype, isa, device):
    """The same codes over and over: within a vector, across vectors, across panels."""
    x, codebook = draw(100, 11, 6, dtype, device)
    expected = ops.vq_assign(x, codebook)
    assert torch.equal(ops.vq_assign(x, codebook.repeat(13, 1)), expected)
    assert torch.equal(ops.vq_assign(x, codebook.repeat_interleave(13, 0)), 13 * expected)
    # Exactly half-way between two codes.
    grid = torch.arange(20, device=device, dtype=dtype).unsqueeze(1)
    assert torch.equal(ops.vq_assign(grid[:-1] + 0.5, grid), torch.arange(19, device=device))


def test_a_code_finds_itself(isa, device):
    codebook = draw(1, 300, 17, device=device)[1]
    assert torch.equal(ops.vq_assign(codebook, codebook), torch.arange(300, device=device))


@pytest.mark.parametrize("scale", (1e-18, 1e-6, 1e6, 1e18), ids=str)
def test_huge_and_tiny_norms(scale, isa, device):
    x, codebook = draw(200, 50, 9, device=device)
    found = ops.vq_assign(x * scale, codebook * scale)
    assert_nearest(found, x * scale, codebook * scale)


def test_one_far_code_does_not_disturb_the_others(isa, device):
    """Not even one whose norm overflows: its distance is infinite, and the rest is as it was."""
    x, codebook = draw(50, 40, 8, device=device)
    expected = ops.vq_assign(x, codebook)
    codebook[17] = 3e38
    found = ops.vq_assign(x, codebook)
    others = expected != 17
    assert torch.equal(found[others], expected[others])
    assert not (found == 17).any()


@every_dtype
def test_nan(dtype, isa, device):
    """A NaN in a row: index 0, error NaN, neighbours untouched. A NaN in a code: it is never chosen."""
    x, codebook = draw(30, 70, 5, dtype, device)
    expected = ops.vq_quantize(x, codebook)
    x[[0, 7, 29], [0, 4, 2]] = torch.nan
    found = ops.vq_quantize(x, codebook)
    bad = x.isnan().any(1)
    assert (found[1][bad] == 0).all() and found[2][bad].isnan().all()
    assert torch.equal(found[0][bad], codebook[:1].expand(3, -1))
    for a, e in zip(found, expected, strict=True):
        assert torch.equal(a[~bad], e[~bad])

    x, codebook = draw(30, 70, 5, dtype, device)
    codebook[::2, 3] = torch.nan
    assert torch.equal(ops.vq_assign(x, codebook), 2 * ops.vq_assign(x, codebook[1::2]) + 1)
    assert (ops.vq_assign(x, codebook * torch.nan) == 0).all()


def test_infinite_entries(isa, device):
    """Scores that are infinite or no numbers at all are compared as the reference does."""
    x, codebook = draw(20, 50, 4, device=device)
    x[3, 1], x[4, 2] = torch.inf, -torch.inf
    codebook[::3, 1], codebook[7, 2] = 0.0, torch.inf
    assert torch.equal(ops.vq_assign(x, codebook), reference.vq_assign(x, codebook))


def test_agrees_with_faiss():
    faiss = pytest.importorskip("faiss")
    x, codebook = draw(3000, 500, 24)
    index = faiss.IndexFlatL2(24)
    index.add(codebook.numpy())
    theirs = torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])
    ours = ops.vq_assign(x, codebook)
    d = distances(x, codebook)
    differ = (ours != theirs).nonzero().flatten()
    assert len(differ) <= 3
    for row in differ:
        assert abs(d[row, ours[row]] - d[row, theirs[row]]) <= 1e-5 * d[row, ours[row]]


@every_dtype
def test_threads_and_batch_size_do_not_matter(dtype):
    x, codebook = draw(2000, 300, 19, dtype)
    torch.set_num_threads(1)
    expected = ops.vq_quantize(x, codebook)
    for threads in (2, 7):
        torch.set_num_threads(threads)
        found = ops.vq_quantize(x, codebook)
        assert all(map(torch.equal, found, expected))
        for rows in (1, 5, 11, 13, 100):
            assert all(
                torch.equal(f, e[:rows]) for f, e in zip(ops.vq_quantize(x[:rows], codebook), expected, strict=True)
            )


# ---- quantizing ------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize(shape, dtype, isa, device):
    x, codebook = draw(*shape, dtype, device)
    quantized, indices, error = ops.vq_quantize(x, codebook)
    assert torch.equal(indices, ops.vq_assign(x, codebook))
    assert quantized.dtype == dtype and torch.equal(quantized, codebook[indices])
    assert error.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = (x.double() - codebook.double()[indices]).square().sum(-1)
    rtol = 1e-14 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(error.double(), expected, rtol=rtol, atol=0)


def test_error_keeps_its_digits_far_from_the_origin(isa):
    """|x|² − 2x·c + |c|² would be off by a whole unit here."""
    codebook = torch.tensor([[4096.0] * 16, [-4096.0] * 16])
    x = codebook[:1] + 2.0**-9
    assert ops.vq_quantize(x, codebook)[2].item() == 16 * 2.0**-18


@pytest.mark.parametrize("weight", (0.0, 0.25, 1.0))
@every_dtype
def test_gradients(dtype, weight, isa, device):
    x, codebook = (t.requires_grad_() for t in draw(100, 37, 19, dtype, device))
    quantized, indices, error = ops.vq_quantize(x, codebook, commitment_weight=weight)
    pulls = torch.randn_like(quantized), torch.randn_like(error)
    found = torch.autograd.grad((quantized, error), (x, codebook), pulls)

    wide = [t.detach().double().requires_grad_() for t in (x, codebook)]
    quantized, _, error = reference.vq_quantize(*wide, commitment_weight=weight, indices=indices)
    expected = torch.autograd.grad((quantized, error), wide, [p.double() for p in pulls])
    tolerance = 4 * torch.finfo(dtype).eps
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == dtype
        torch.testing.assert_close(f.double(), e, rtol=tolerance, atol=tolerance * e.abs().max())


def test_straight_through():
    x, codebook = (t.requires_grad_() for t in draw(9, 5, 3))
    quantized, _, _ = ops.vq_quantize(x, codebook)
    pull = torch.randn_like(quantized)
    to_x, to_codebook = torch.autograd.grad(quantized, (x, codebook), pull)
    assert torch.equal(to_x, pull) and not to_codebook.any()


def test_second_derivatives_are_those_of_the_reference():
    x, codebook = (t.requires_grad_() for t in draw(9, 5, 3, torch.float64))
    indices = ops.vq_assign(x, codebook)

    def second(quantize, **held):
        quantized, _, error = quantize(x, codebook, commitment_weight=0.3, **held)
        loss = (quantized.sin().sum(-1) * error.cos()).sum()
        to_x, to_codebook = torch.autograd.grad(loss, (x, codebook), create_graph=True)
        return torch.autograd.grad(to_x.square().sum() + to_codebook.pow(3).sum(), (x, codebook))

    for f, e in zip(second(ops.vq_quantize), second(reference.vq_quantize, indices=indices), strict=True):
        assert e.abs().max() > 0.1
        torch.testing.assert_close(f, e, rtol=1e-11, atol=1e-11)


# ---- statistics ------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("usage", ("uniform", "collapsed", "one", "gaps"))
@pytest.mark.parametrize(("rows", "codes", "dim"), [(0, 4, 3), (5, 1, 1), (3000, 40, 19), (2048, 700, 8), (40, 33, 0)])
def test_statistics(rows, codes, dim, usage, dtype, isa, device):
    """Also where one code owns more rows than a thread takes at a time, and where most own none."""
    x = draw(rows, 1, dim, dtype, device)[0]
    indices = {
        "uniform": torch.randint(codes, (rows,)),
        "collapsed": torch.where(torch.rand(rows) < 0.9, codes // 2, torch.randint(codes, (rows,))),
        "one": torch.full((rows,), codes - 1),
        "gaps": torch.randint(codes, (rows,)) // 7 * 7,
    }[usage].to(device)
    counts, sums = ops.code_statistics(x, indices, codes)
    expected = reference.code_statistics(x.double(), indices, codes)
    assert counts.dtype == sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(counts.double(), expected[0])
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    scale = x.double().abs().sum(0).max() if x.numel() else 0.0
    torch.testing.assert_close(sums.double(), expected[1], rtol=tolerance, atol=tolerance * scale * 0.1)


@pytest.mark.parametrize("codes", (1, 7, 1000, 40_000))
def test_sums_do_not_depend_on_threads(codes):
    x, codebook = draw(30_000, codes, 5)
    indices = torch.randint(codes, (30_000,)) ** 2 // codes
    grads = torch.randn(30_000, 5), torch.randn(30_000)

    def everything():
        return (
            *ops.code_statistics(x, indices, codes),
            *torch.ops.isthmus.vq_quantize_backward(*grads, x, codebook, indices, 0.25),
        )

    torch.set_num_threads(1)
    expected = everything()
    for threads in (2, 7):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, everything(), expected))


def test_statistics_are_not_differentiable():
    x = torch.randn(4, 2, requires_grad=True)
    assert not any(s.requires_grad for s in ops.code_statistics(x, torch.zeros(4, dtype=torch.int64), 3))


def test_lloyd_iterations_descend(device):
    """k-means on the two ops: the error never rises, and blobs are found."""
    centers = 20 * torch.randn(5, 8, device=device)
    x = (centers.unsqueeze(1) + torch.randn(5, 200, 8, device=device)).flatten(0, 1)
    codebook = x[::200].clone()
    errors = []
    for _ in range(5):
        _, indices, error = ops.vq_quantize(x, codebook)
        errors.append(error.mean().item())
        counts, sums = ops.code_statistics(x, indices, 5)
        codebook = sums / counts.unsqueeze(1)
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
    assert errors[-1] == pytest.approx(8, rel=0.1)


# ---- memory, errors --------------------------------------------------------------------------------------------------


def peak_memory():
    """Bytes at the highest point since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux only")
def test_memory_stays_linear():
    """The scores of this call would take 800 MB."""
    x, codebook = torch.randn(50_000, 8), torch.randn(4000, 8)
    ops.vq_quantize(x[:1000], codebook)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    ops.vq_quantize(x, codebook)
    assert peak_memory() - before < 20e6


def test_concurrent_callers():
    """Python threads share nothing but the inputs."""
    x, codebook = draw(500, 100, 12)
    expected = ops.vq_assign(x, codebook)
    found = [None] * 8

    def work(i):
        found[i] = ops.vq_assign(x, codebook)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(f, expected) for f in found)


X, CODES = torch.zeros(4, 3), torch.zeros(5, 3)
INDICES = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.vq_assign(X, CODES, metric="cosine"), ValueError, "metric is 'cosine'; expected"),
        (lambda: ops.vq_assign(X, CODES, topk=2), ValueError, "topk is 2; expected 1"),
        (lambda: ops.vq_quantize(X, CODES, metric="l1"), ValueError, "metric is 'l1'"),
        (lambda: ops.vq_quantize(X, CODES, gradient="rotation"), ValueError, "gradient is 'rotation'"),
        (lambda: ops.vq_assign(X, CODES[:, :2]), RuntimeError, r"codebook has shape \[5, 2\]; expected \[\*, 3\]"),
        (lambda: ops.vq_assign(X, CODES[0]), RuntimeError, r"codebook has shape \[3\]; expected \[\*, 3\]"),
        (lambda: ops.vq_assign(X, CODES[:0]), RuntimeError, r"codebook has shape \[0, 3\]; expected \[K, 3\]"),
        (lambda: ops.vq_assign(X[0, 0], CODES), RuntimeError, r"x has shape \[\]; expected \[..., D\]"),
        (lambda: ops.vq_assign(X, CODES.double()), RuntimeError, "codebook has dtype Double; expected Float, like x"),
        (lambda: ops.vq_assign(X.int(), CODES.int()), RuntimeError, "x has dtype Int; expected float32"),
        (lambda: ops.code_statistics(X, INDICES[:3], 5), RuntimeError, r"indices has shape \[3\]; expected"),
        (lambda: ops.code_statistics(X, INDICES.int(), 5), RuntimeError, "indices has dtype Int; expected int64"),
        (lambda: ops.code_statistics(X, INDICES + 5, 5), RuntimeError, "indices holds 5; expected 0 <= index < 5"),
        (lambda: ops.code_statistics(X, INDICES - 1, 5), RuntimeError, "indices holds -1; expected 0 <= index < 5"),
        (lambda: ops.code_statistics(X, INDICES, -1), RuntimeError, "num_codes is -1"),
        (
            lambda: torch.ops.isthmus.vq_quantize_backward(X, X[:, 0], X, CODES, INDICES + 9, 1.0),
            RuntimeError,
            "indices holds 9",
        ),
        (
            lambda: torch.ops.isthmus.vq_quantize_backward(X, X, X, CODES, INDICES, 1.0),
            RuntimeError,
            r"grad_error is Float\[4, 3\]; expected Float\[4\]",
        ),
    ],
)  # fmt: skip
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_isa_levels_agree_where_the_answer_is_clear():
    x, codebook = draw(500, 200, 33)
    first, second = distances(x, codebook).topk(2, largest=False).values.unbind(1)
    clear = second - first > 1e-4 * second
    answers = []
    for level in isthmus.build_info()["isa_available"]:
        isthmus.set_isa(level)
        answers.append(ops.vq_assign(x, codebook)[clear])
    assert all(torch.equal(a, answers[0]) for a in answers)
