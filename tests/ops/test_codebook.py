"""What is particular to vector quantization; the rest is in tests/test_every_op.py."""

import threading

import pytest
import torch
from checks import extra_memory, measures_memory

from isthmus import ops, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
METRICS = ("euclidean", "cosine", "inner_product")
GRADIENTS = ("straight_through", "rotation", "codebook")
every_gradient = pytest.mark.parametrize("gradient", GRADIENTS)

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


# ---- the best codes --------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, dtype, isa, device):
    x, codebook = draw(*shape, dtype, device)
    indices = ops.vq_assign(x, codebook)
    assert indices.dtype == torch.int64 and indices.shape == x.shape[:1]
    assert torch.equal(indices, reference.vq_assign(x, codebook))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 33, 5), (97, 64, 21), (13, 300, 70)], ids=str)
def test_every_metric_and_several_codes(shape, metric, isa, device):
    rows, codes, dim = shape
    x, codebook = torch.randn(3, rows, dim, device=device), torch.randn(3, codes, dim, device=device)
    mask = torch.rand(3, rows, device=device) < 0.6
    for topk in {1, min(2, codes), min(9, codes), codes}:
        found = ops.vq_assign(x, codebook, metric=metric, topk=topk, mask=mask)
        assert torch.equal(found, reference.vq_assign(x, codebook, metric=metric, topk=topk, mask=mask))
        for head in range(3):
            alone = ops.vq_assign(x[head], codebook[head], metric=metric, topk=topk)
            assert torch.equal(found[head][mask[head]], alone[mask[head]])


def test_cosine_does_not_see_the_length_of_x(isa):
    x, codebook = draw(100, 30, 7)
    expected = ops.vq_assign(x, codebook, metric="cosine")
    assert torch.equal(ops.vq_assign(x * 2.0 ** torch.randint(-30, 30, (100, 1)), codebook, metric="cosine"), expected)
    lengths = 2.0 ** torch.randint(-9, 9, (30, 1))
    assert torch.equal(ops.vq_assign(x, codebook * lengths, metric="cosine"), expected)
    codebook[3] = 0.0  # scores 0: above all codes that point away
    assert ops.vq_assign(-codebook[:1], codebook[[0, 3]], metric="cosine") == 1


@pytest.mark.parametrize("metric", METRICS)
def test_match(metric, isa, device):
    x, codebook = draw(60, 23, 6, device=device)
    nearest_code, nearest_row = ops.vq_match(x, codebook, metric=metric)
    score = {
        "euclidean": lambda a, c: -(a - c).square().sum(-1),
        "cosine": lambda a, c: (a * c).sum(-1) / c.norm(dim=-1),
        "inner_product": lambda a, c: (a * c).sum(-1),
    }[metric]
    x, codebook = x.double(), codebook.double()
    assert torch.equal(nearest_code, score(x.unsqueeze(1), codebook).argmax(1))
    assert torch.equal(nearest_row, score(codebook.unsqueeze(1), x).argmax(1))


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
    assert torch.equal(found, reference.vq_assign(x * scale, codebook * scale))


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


def quantize_backward(pulls, x, codebook, **options):
    quantized, indices, error = ops.vq_quantize(x, codebook, **options)
    return indices, torch.autograd.grad((quantized, error), (x, codebook), pulls)


def expected_backward(pulls, x, codebook, **options):
    wide = [t.detach().double().requires_grad_() for t in (x, codebook)]
    quantized, _, error = reference.vq_quantize(*wide, **options)
    return torch.autograd.grad((quantized, error), wide, [p.double() for p in pulls])


@every_gradient
@pytest.mark.parametrize("weight", (0.0, 0.25, 1.0))
@every_dtype
def test_gradients(dtype, weight, gradient, isa, device):
    options = {"gradient": gradient, "commitment_weight": weight}
    x, codebook = (t.requires_grad_() for t in draw(100, 37, 19, dtype, device))
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    pulls = torch.randn_like(x), torch.randn(100, dtype=accumulate, device=device)
    indices, found = quantize_backward(pulls, x, codebook, **options)
    expected = expected_backward(pulls, x, codebook, indices=indices, **options)
    tolerance = 1e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == dtype
        torch.testing.assert_close(f.double(), e, rtol=tolerance, atol=tolerance * e.abs().max())


@every_gradient
def test_gradients_of_heads_masks_and_strides(gradient, isa, device):
    """Heads between the rows, as attention lays them out; masked rows neither give nor receive."""
    x = torch.randn(4, 25, 3, 10, device=device).movedim(-2, 0).requires_grad_()
    codebook = torch.randn(3, 8, 10, device=device).requires_grad_()
    mask = torch.rand(3, 4, 25, device=device) < 0.7
    options = {"gradient": gradient, "commitment_weight": 0.3, "metric": "cosine"}
    pulls = torch.randn(3, 4, 25, 10, device=device), torch.randn(3, 4, 25, device=device)
    indices, found = quantize_backward(pulls, x, codebook, mask=mask, **options)
    assert torch.equal(indices < 0, ~mask)
    expected = expected_backward(pulls, x, codebook, indices=indices, **options)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-6, atol=1e-6 * e.abs().max())
    assert not found[0][~mask].any()

    # What is masked may hold anything.
    dirty = torch.where(mask.unsqueeze(-1), x.detach(), torch.nan).requires_grad_()
    quantized, _, error = ops.vq_quantize(dirty, codebook, mask=mask, **options)
    assert quantized.isfinite().all() and error.isfinite().all()
    assert not quantized[~mask].any() and not error[~mask].any()
    again = torch.autograd.grad((quantized, error), (dirty, codebook), pulls)
    assert all(map(torch.equal, again, found))


@every_gradient
def test_gradients_asked_for_one_by_one(gradient):
    pulls = torch.randn(50, 6), torch.randn(50)
    x, codebook = draw(50, 9, 6)
    _, both = quantize_backward(pulls, x.requires_grad_(), codebook.requires_grad_(), gradient=gradient)
    quantized, _, error = ops.vq_quantize(x, codebook.detach(), gradient=gradient)
    assert torch.equal(torch.autograd.grad((quantized, error), x, pulls)[0], both[0])
    quantized, _, error = ops.vq_quantize(x.detach(), codebook, gradient=gradient)
    assert torch.equal(torch.autograd.grad((quantized, error), codebook, pulls)[0], both[1])


def test_given_codes(device):
    """With the codes it would have found, an assignment changes nothing; -1 is a mask."""
    x, codebook = draw(40, 9, 6, device=device)
    mask = torch.rand(40, device=device) < 0.5
    expected = ops.vq_quantize(x, codebook, mask=mask)
    found = ops.vq_quantize(x, codebook, indices=expected[1])
    assert all(map(torch.equal, found, expected))
    others = torch.randint(9, (40,), device=device)
    quantized, _, error = ops.vq_quantize(x, codebook, indices=others)
    assert torch.equal(quantized, codebook[others])
    torch.testing.assert_close(error, (x - codebook[others]).square().sum(-1))


def test_straight_through():
    x, codebook = (t.requires_grad_() for t in draw(9, 5, 3))
    quantized, _, _ = ops.vq_quantize(x, codebook)
    pull = torch.randn_like(quantized)
    to_x, to_codebook = torch.autograd.grad(quantized, (x, codebook), pull)
    assert torch.equal(to_x, pull) and not to_codebook.any()


def passed_by_rotation(x, code, pull):
    """What reaches x of a gradient at its code, in float64."""
    x, code, pull = (t.detach().double() for t in (x, code, pull))
    x = x.clone().requires_grad_()
    quantized = ops.vq_quantize(x, code, gradient="rotation", indices=torch.arange(len(x)))[0]
    return torch.autograd.grad(quantized, x, pull)[0]


def test_rotation_keeps_angles():
    """λRᵀ takes the code to |c|² / |x|² of x, scales every length by λ, and keeps the angle with the code."""
    x, code = draw(200, 200, 7, torch.float64)
    pull, other = torch.randn(2, 200, 7, dtype=torch.float64)
    scale = code.norm(dim=-1) / x.norm(dim=-1)
    passed = passed_by_rotation(x, code, pull)
    torch.testing.assert_close(passed.norm(dim=-1), scale * pull.norm(dim=-1))
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(passed, x), cosine(pull, code))
    torch.testing.assert_close(passed_by_rotation(x, code, code), scale.square().unsqueeze(-1) * x)
    products = (passed * passed_by_rotation(x, code, other)).sum(-1)
    torch.testing.assert_close(products, scale.square() * (pull * other).sum(-1))


def test_rotation_moves_only_the_plane_of_x_and_its_code():
    x, code = draw(50, 50, 6, torch.float64)
    plane = torch.linalg.qr(torch.stack([x, code], -1)).Q
    pull = torch.randn(50, 6, dtype=torch.float64)
    outside = pull - (plane @ (plane.mT @ pull.unsqueeze(-1))).squeeze(-1)
    scale = (code.norm(dim=-1) / x.norm(dim=-1)).unsqueeze(-1)
    torch.testing.assert_close(passed_by_rotation(x, code, outside), scale * outside)
    torch.testing.assert_close(passed_by_rotation(x, 2.5 * x, pull), 2.5 * pull)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_rotation_where_it_has_no_direction(dtype, isa, device):
    """x = 0: as if straight through. c = 0: nothing. Opposed: a reflection along x, finite and of the right length."""
    x, code = draw(60, 60, 9, dtype, device)
    x[:20], code[20:40] = 0.0, 0.0
    code[40:] = -torch.linspace(0.1, 7, 20, dtype=dtype, device=device).unsqueeze(1) * x[40:]
    pull = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    quantized = ops.vq_quantize(leaf, code, gradient="rotation", indices=torch.arange(60, device=device))[0]
    passed = torch.autograd.grad(quantized, leaf, pull)[0]
    assert torch.equal(passed[:20], pull[:20])
    assert not passed[20:40].any()
    scale = (code.norm(dim=1) / x.norm(dim=1)).unsqueeze(1)[40:]
    direction = x[40:] / x[40:].norm(dim=1, keepdim=True)
    reflected = pull[40:] - 2 * direction * (direction * pull[40:]).sum(1, keepdim=True)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(passed[40:], scale * reflected, rtol=tolerance, atol=tolerance)


def test_rotation_near_the_opposite():
    """Down to where float32 no longer sees an angle, gradients keep the length that a rotation gives them."""
    x, away = torch.randn(2, 25, 12)
    code = -x + away * torch.logspace(-6, -1, 25).unsqueeze(1)
    leaf, pull = x.clone().requires_grad_(), torch.randn(25, 12)
    quantized = ops.vq_quantize(leaf, code, gradient="rotation", indices=torch.arange(25))[0]
    passed = torch.autograd.grad(quantized, leaf, pull)[0]
    scale = code.norm(dim=1) / x.norm(dim=1)
    torch.testing.assert_close(passed.norm(dim=1), scale * pull.norm(dim=1), rtol=0.3, atol=0)
    torch.testing.assert_close(passed.norm(dim=1)[9:], (scale * pull.norm(dim=1))[9:], rtol=1e-2, atol=0)


@every_gradient
def test_second_derivatives_are_those_of_the_reference(gradient):
    x, codebook = (t.requires_grad_() for t in draw(9, 5, 3, torch.float64))
    indices = ops.vq_assign(x, codebook)

    def second(quantize, **held):
        quantized, _, error = quantize(x, codebook, commitment_weight=0.3, gradient=gradient, **held)
        loss = (quantized.sin().sum(-1) * error.cos()).sum()
        to_x, to_codebook = torch.autograd.grad(loss, (x, codebook), create_graph=True)
        return torch.autograd.grad(to_x.square().sum() + to_codebook.pow(3).sum(), (x, codebook))

    for f, e in zip(second(ops.vq_quantize), second(reference.vq_quantize, indices=indices), strict=True):
        assert e.abs().max() > 0.1
        torch.testing.assert_close(f, e, rtol=1e-11, atol=1e-11)


def test_rotation_is_constant_in_second_derivatives():
    """The gradient at x is linear in that of the quantized vector, and depends on nothing else."""
    x, codebook = (t.requires_grad_() for t in draw(9, 5, 4, torch.float64))
    pull = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    quantized, indices, _ = ops.vq_quantize(x, codebook, gradient="rotation")
    passed = torch.autograd.grad(quantized, x, pull, create_graph=True)[0]
    back = torch.randn_like(passed)
    to_pull, to_x, to_codebook = torch.autograd.grad(
        passed, (pull, x, codebook), back, materialize_grads=True, allow_unused=True
    )
    other = torch.randn_like(pull)  # ⟨λR back, other⟩ = ⟨back, λRᵀ other⟩
    adjoint = (back * passed_by_rotation(x, codebook[indices], other)).sum(-1)
    torch.testing.assert_close((to_pull * other).sum(-1), adjoint)
    assert not to_x.any() and not to_codebook.any()


# ---- memory, errors --------------------------------------------------------------------------------------------------


@measures_memory
def test_memory_stays_linear():
    """The scores of this call would take 800 MB."""
    x, codebook = torch.randn(50_000, 8), torch.randn(4000, 8)
    assert extra_memory(lambda: ops.vq_quantize(x, codebook), lambda: ops.vq_quantize(x[:1000], codebook)) < 20e6


@measures_memory
def test_a_training_step_takes_four_times_its_input():
    """Forward, backward, totals and update, with the gradients and all outputs: at most 4 (N D + K D) floats."""
    rows, codes, dim = 32_768, 8192, 64
    x, codebook = torch.randn(rows, dim, requires_grad=True), torch.randn(codes, dim)
    usage, sums = torch.ones(codes), codebook.clone()

    def step(x):
        quantized, indices, error = ops.vq_quantize(x, codebook, gradient="rotation")
        (quantized.sum() + error.sum()).backward()
        counts, batch_sums = ops.code_statistics(x, indices, codes)
        ops.update_codebook_(codebook, usage, sums, counts, batch_sums, decay=0.99)

    def warm_up():
        step(x[:500])
        x.grad = None

    assert extra_memory(lambda: step(x), warm_up) < 4 * 4 * (rows + codes) * dim


@measures_memory
def test_heads_between_rows_are_not_copied():
    """Heads of 64 MB; only 64-bit indices and a little scratch may be new."""
    x = torch.randn(65_536, 8, 32).movedim(-2, 0)
    codebook = torch.randn(8, 4, 32)
    assert extra_memory(lambda: ops.vq_assign(x, codebook), lambda: ops.vq_assign(x[:, :1000], codebook)) < 16e6
    assert torch.equal(ops.vq_assign(x, codebook)[3], ops.vq_assign(x[3].contiguous(), codebook[3]))


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
INDICES, MASK = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool)
HEADS = torch.zeros(2, 5, 3)
backward = torch.ops.isthmus.vq_quantize_backward


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.vq_assign(X, CODES, metric="l1"), ValueError, "metric is 'l1'; expected one of 'euclidean'"),
        (lambda: ops.vq_assign(X, CODES, topk=0), RuntimeError, "topk is 0; expected 1 to 5"),
        (lambda: ops.vq_assign(X, CODES, topk=6), RuntimeError, "topk is 6; expected 1 to 5"),
        (lambda: ops.vq_assign(X, CODES, mask=MASK[:3]), RuntimeError, r"mask has shape \[3\]; expected the leading"),
        (lambda: ops.vq_assign(X, CODES, mask=INDICES), RuntimeError, "mask has dtype Long; expected bool"),
        (lambda: ops.vq_assign(X, HEADS), RuntimeError, r"x has shape \[4, 3\]; expected \[2, ..., 3\]"),
        (lambda: ops.vq_quantize(X, CODES, metric="l1"), ValueError, "metric is 'l1'"),
        (lambda: ops.vq_quantize(X, CODES, gradient="soft"), ValueError, "gradient is 'soft'; expected one of"),
        (lambda: ops.vq_quantize(X, CODES, mask=MASK, indices=INDICES), ValueError, "mask and indices were both given"),
        (lambda: ops.vq_quantize(X, CODES, indices=INDICES + 5), RuntimeError, "indices holds 5; expected 0 <="),
        (lambda: ops.vq_quantize(X, CODES, indices=INDICES - 2), RuntimeError, "indices holds -2; .* or -1 for"),
        (lambda: ops.vq_assign(X, CODES[:, :2]), RuntimeError, r"codebook has shape \[5, 2\]; expected \[K, 3\] or"),
        (lambda: ops.vq_assign(X, CODES[0]), RuntimeError, r"codebook has shape \[3\]; expected \[K, 3\] or"),
        (lambda: ops.vq_assign(X, CODES[:0]), RuntimeError, r"codebook has shape \[0, 3\], K = 0; expected 1 <= K"),
        (lambda: ops.vq_assign(X[0, 0], CODES), RuntimeError, r"x has shape \[\]; expected \[..., D\]"),
        (lambda: ops.vq_assign(X, CODES.double()), RuntimeError, "codebook has dtype Double; expected Float, like x"),
        (lambda: ops.vq_assign(X.int(), CODES.int()), RuntimeError, "x has dtype Int; expected float32"),
        (lambda: backward(X, X[:, 0], X, CODES, INDICES + 9, "rotation", 1.0, True, True), RuntimeError,
         "indices holds 9"),
        (lambda: backward(X, X, X, CODES, INDICES, "rotation", 1.0, True, True), RuntimeError,
         r"grad_error is Float\[4, 3\]; expected Float\[4\]"),
    ],
)  # fmt: skip
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
