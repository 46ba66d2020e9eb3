"""What is particular to residual vector quantization; the rest is in tests/test_every_op.py."""

import itertools

import pytest
import torch
from checks import extra_memory, measures_memory

import isthmus
from isthmus import ops, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def draw(rows, stages, codes, dim, dtype=torch.float32, device="cpu"):
    """Codebooks that shrink from stage to stage, as trained ones do."""
    x = torch.randn(rows, dim, dtype=torch.float64)
    scales = 0.7 ** torch.arange(stages, dtype=torch.float64).view(-1, 1, 1)
    codebooks = scales * torch.randn(stages, codes, dim, dtype=torch.float64)
    return x.to(device, dtype), codebooks.to(device, dtype)


def wide(t):
    return t if t.dtype == torch.float64 else t.float()


def stage_by_stage(x, codebooks):
    """The definition, in the arithmetic of the op, each stage searched by vq_assign."""
    residual, total, indices, errors = wide(x), torch.zeros_like(wide(x)), [], []
    for codebook in codebooks:
        codebook = wide(codebook)
        indices.append(ops.vq_assign(residual, codebook))
        code = codebook[indices[-1]]
        residual, total = residual - code, total + code
        errors.append(residual.double().square().sum(-1))
    return total.to(x.dtype), torch.stack(indices, -1), torch.stack(errors, -1)


# ---- values ----------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize(
    ("rows", "stages", "codes", "dim"),
    [(0, 2, 3, 4), (1, 1, 1, 1), (7, 3, 2, 0), (100, 4, 33, 17), (500, 8, 64, 8), (97, 2, 300, 70), (2000, 3, 5, 3)],
)
def test_equals_its_stages(rows, stages, codes, dim, dtype, isa, device):
    """Indices and the sum of the codes bit for bit."""
    x, codebooks = draw(rows, stages, codes, dim, dtype, device)
    quantized, indices, error = ops.residual_vq_quantize(x, codebooks)
    expected = stage_by_stage(x, codebooks)
    assert torch.equal(indices, expected[1])
    assert quantized.dtype == dtype and torch.equal(quantized, expected[0])
    assert error.dtype == wide(x).dtype
    torch.testing.assert_close(error.double(), expected[2], rtol=1e-5 if dtype != torch.float64 else 1e-13, atol=0)


@every_dtype
def test_one_stage_is_vq_quantize(dtype, isa, device):
    x, codebooks = draw(100, 1, 37, 19, dtype, device)
    found = ops.residual_vq_quantize(x, codebooks)
    expected = ops.vq_quantize(x, codebooks[0])
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1][:, 0], expected[1])
    assert torch.equal(found[2][:, 0], expected[2])


def test_leading_dimensions_and_groups(device):
    x, codebooks = draw(24, 3, 7, 5, device=device)
    expected = ops.residual_vq_quantize(x, codebooks)
    for shape in ((2, 12), (2, 3, 4), (1, 24, 1)):
        found = ops.residual_vq_quantize(x.reshape(*shape, 5), codebooks)
        assert [f.shape for f in found] == [(*shape, 5), (*shape, 3), (*shape, 3)]
        assert all(torch.equal(f, e.view(f.shape)) for f, e in zip(found, expected, strict=True))
    other = torch.stack([codebooks, codebooks.flip(0)])
    found = ops.residual_vq_quantize(x.view(2, 3, 4, 5), other)
    for g in range(2):
        expected = ops.residual_vq_quantize(x.view(2, 3, 4, 5)[g], other[g])
        assert all(torch.equal(f[g], e) for f, e in zip(found, expected, strict=True))


def test_codebooks_of_different_sizes_and_shared(device):
    x = torch.randn(50, 6, device=device)
    books = [torch.randn(k, 6, device=device) for k in (3, 40, 1)]
    found = ops.residual_vq_quantize(x, [*books, books[0]])
    expected = stage_by_stage(x, [*books, books[0]])
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_every_isa_finds_the_same_codes(isa):
    """Residuals have the same bits everywhere, and so have the nearest codes: through eight stages, with a beam too."""
    x, codebooks = draw(1000, 8, 128, 24)
    for beam in (1, 3):
        indices = ops.residual_vq_quantize(x, codebooks, beam=beam)[1]
        isthmus.set_isa("baseline")
        assert torch.equal(indices, ops.residual_vq_quantize(x, codebooks, beam=beam)[1])
        isthmus.set_isa(isa)


@every_dtype
def test_threads_and_batch_size_do_not_matter(dtype):
    x, codebooks = draw(700, 4, 50, 19, dtype)
    torch.set_num_threads(1)
    expected = ops.residual_vq_quantize(x, codebooks, beam=2)
    for threads in (2, 7):
        torch.set_num_threads(threads)
        for rows in (700, 1, 5, 100):
            found = ops.residual_vq_quantize(x[:rows], codebooks, beam=2)
            assert all(torch.equal(f, e[:rows]) for f, e in zip(found, expected, strict=True))


# ---- beam ------------------------------------------------------------------------------------------------------------


def test_a_beam_of_everything_finds_the_best_sum(isa, device):
    x, codebooks = draw(60, 3, 5, 4, torch.float64, device)
    sequences = torch.tensor(list(itertools.product(range(5), repeat=3)), device=device)
    sums = sum(codebooks[q][sequences[:, q]] for q in range(3))
    distances = (x.unsqueeze(1) - sums).square().sum(-1)
    quantized, indices, error = ops.residual_vq_quantize(x, codebooks, beam=125)
    assert torch.equal(indices, sequences[distances.argmin(1)])
    torch.testing.assert_close(error[:, -1], distances.min(1).values)
    torch.testing.assert_close(quantized, sums[distances.argmin(1)])


@every_dtype
@pytest.mark.parametrize("beam", (1, 2, 7, 100))
def test_beam(beam, dtype, isa, device):
    x, codebooks = draw(130, 4, 12, 6, dtype, device)
    _, indices, _ = ops.residual_vq_quantize(x, codebooks, beam=beam)
    assert torch.equal(indices, reference.residual_vq_quantize(x.double(), codebooks.double(), beam=beam)[1])


def test_a_beam_helps():
    x, codebooks = draw(2000, 4, 32, 8)
    errors = [ops.residual_vq_quantize(x, codebooks, beam=beam)[2][:, -1].mean() for beam in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("beam", (1, 3, 8))
def test_ties(beam, isa, device):
    """Small integers and codes that occur twice: the reference says which of equals is kept."""
    x = torch.randint(-4, 5, (200, 3), device=device).float()
    codebooks = torch.randint(-2, 3, (3, 5, 3), device=device).float().repeat(1, 3, 1)
    found = ops.residual_vq_quantize(x, codebooks, beam=beam)
    expected = reference.residual_vq_quantize(x, codebooks, beam=beam)
    assert all(map(torch.equal, found, expected))


# ---- rows that are special -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beam", (1, 3))
def test_stages_of_each_row(beam, device):
    x, codebooks = draw(90, 4, 9, 5, device=device)
    stages = torch.arange(90, device=device) % 5
    quantized, indices, error = ops.residual_vq_quantize(x, codebooks, beam=beam, stages=stages)
    for count in range(5):
        rows = stages == count
        assert (indices[rows, count:] == -1).all() and (error[rows, count:] == 0).all()
        if count == 0:
            assert (quantized[rows] == 0).all()
            continue
        expected = ops.residual_vq_quantize(x[rows], codebooks[:count], beam=beam)
        assert torch.equal(quantized[rows], expected[0])
        assert torch.equal(indices[rows, :count], expected[1])
        assert torch.equal(error[rows, :count], expected[2])
    for two in (2, torch.tensor(2, device=device)):
        found = ops.residual_vq_quantize(x, codebooks, beam=beam, stages=two)
        assert torch.equal(found[0], ops.residual_vq_quantize(x, codebooks[:2], beam=beam)[0])


def test_mask(device):
    """Rows that are masked do not count, not even with NaN in them, and neither do they in gradients."""
    x, codebooks = draw(40, 3, 9, 5, device=device)
    mask = torch.arange(40, device=device) % 3 > 0
    x[~mask] = torch.nan
    x.requires_grad_()
    codebooks.requires_grad_()
    quantized, indices, error = ops.residual_vq_quantize(x, codebooks, mask=mask)
    assert (indices[~mask] == -1).all() and (error[~mask] == 0).all() and (quantized[~mask] == 0).all()
    grads = torch.autograd.grad(quantized.sum() + error.sum(), (x, codebooks))
    assert (grads[0][~mask] == 0).all()

    kept = x[mask].detach().requires_grad_()
    quantized, _, error = ops.residual_vq_quantize(kept, codebooks)
    expected = torch.autograd.grad(quantized.sum() + error.sum(), (kept, codebooks))
    assert torch.equal(grads[0][mask], expected[0])
    torch.testing.assert_close(grads[1], expected[1])


@every_dtype
@pytest.mark.parametrize("beam", (1, 3))
def test_nan(beam, dtype, isa, device):
    """A NaN in a row: indices 0, errors NaN, neighbours untouched."""
    x, codebooks = draw(30, 3, 70, 5, dtype, device)
    expected = ops.residual_vq_quantize(x, codebooks, beam=beam)
    x[[0, 7, 29], [0, 4, 2]] = torch.nan
    found = ops.residual_vq_quantize(x, codebooks, beam=beam)
    bad = x.isnan().any(1)
    assert (found[1][bad] == 0).all() and found[2][bad].isnan().all()
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f[~bad], e[~bad])


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ("straight_through", "rotation"))
@every_dtype
def test_gradients(dtype, gradient, isa, device):
    x, codebooks = (t.requires_grad_() for t in draw(100, 4, 37, 19, dtype, device))
    stages = torch.arange(100, device=device) % 6 % 5
    options = {"gradient": gradient, "commitment_weight": 0.25}
    quantized, indices, error = ops.residual_vq_quantize(x, codebooks, stages=stages, **options)
    pulls = torch.randn_like(quantized), torch.randn_like(error)
    found = torch.autograd.grad((quantized, error), (x, codebooks), pulls)

    leaves = [t.detach().double().requires_grad_() for t in (x, codebooks)]
    quantized, _, error = reference.residual_vq_quantize(*leaves, indices=indices, **options)
    expected = torch.autograd.grad((quantized, error), leaves, [p.double() for p in pulls])
    tolerance = 8 * torch.finfo(dtype).eps
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == dtype
        torch.testing.assert_close(f.double(), e, rtol=tolerance, atol=tolerance * e.abs().max())


def test_straight_through_reaches_x_once():
    x, codebooks = (t.requires_grad_() for t in draw(9, 5, 7, 3))
    quantized, _, _ = ops.residual_vq_quantize(x, codebooks)
    pull = torch.randn_like(quantized)
    grads = torch.autograd.grad(quantized, (x, codebooks), pull, allow_unused=True)
    assert torch.equal(grads[0], pull)
    assert grads[1] is None or not grads[1].any()


@pytest.mark.parametrize("gradient", ("straight_through", "rotation"))
def test_one_stage_has_the_gradients_of_vq_quantize(gradient):
    def gradients(op, codebooks):
        leaves = x.clone().requires_grad_(), codebooks.clone().requires_grad_()
        quantized, _, error = op(*leaves, gradient=gradient, commitment_weight=0.25)
        return torch.autograd.grad((quantized, error), leaves, (torch.ones_like(quantized), torch.ones_like(error)))

    x, codebooks = draw(80, 1, 20, 9)
    found = gradients(ops.residual_vq_quantize, codebooks)
    expected = gradients(ops.vq_quantize, codebooks[0])
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1][0], expected[1])


def test_only_gradients_that_are_wanted():
    """A frozen codebook costs no sums, a detached input no pass over the rows."""
    x, codebooks = draw(20, 2, 5, 3)
    indices = ops.residual_vq_quantize(x, codebooks)[1]
    pulls = torch.ones(20, 3), torch.ones(20, 2)
    args = (*pulls, x, codebooks.flatten(0, 1), indices, [5, 5], "straight_through", 1.0)
    both = torch.ops.isthmus.residual_vq_quantize_backward(*args, True, True)
    of_x = torch.ops.isthmus.residual_vq_quantize_backward(*args, True, False)
    of_codes = torch.ops.isthmus.residual_vq_quantize_backward(*args, False, True)
    assert torch.equal(of_x[0], both[0]) and of_x[1].numel() == 0
    assert torch.equal(of_codes[1], both[1]) and of_codes[0].numel() == 0


def test_a_shared_codebook_gets_the_gradients_of_all_its_stages():
    x, codebooks = draw(60, 3, 8, 4)
    shared = codebooks[0].clone().requires_grad_()
    ops.residual_vq_quantize(x, [shared] * 3)[2].sum().backward()
    apart = codebooks[:1].expand(3, -1, -1).clone().requires_grad_()
    ops.residual_vq_quantize(x, apart)[2].sum().backward()
    torch.testing.assert_close(shared.grad, apart.grad.sum(0))


@pytest.mark.parametrize("gradient", ("straight_through", "rotation"))
def test_second_derivatives(gradient):
    """Those of the reference, which holds in each gradient constant what the other moves."""

    def second(op, **options):
        leaves = [t.clone().requires_grad_() for t in (x, codebooks)]
        quantized, _, error = op(*leaves, gradient=gradient, commitment_weight=0.25, **options)
        pulls = [torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view(o.shape).requires_grad_() for o in (x, error)]
        first = torch.autograd.grad((quantized, error), leaves, pulls, create_graph=True)
        return torch.autograd.grad([(f * f).sum() for f in first], (*leaves, *pulls))

    x, codebooks = draw(30, 3, 6, 4, torch.float64)
    indices = ops.residual_vq_quantize(x, codebooks)[1]
    for found, expected in zip(
        second(ops.residual_vq_quantize), second(reference.residual_vq_quantize, indices=indices), strict=True
    ):
        torch.testing.assert_close(found, expected)


# ---- totals ----------------------------------------------------------------------------------------------------------


@every_dtype
def test_totals(dtype, isa, device):
    """Those of each stage's own residuals, counts of all stages first."""
    x, codebooks = draw(3000, 3, 40, 7, dtype, device)
    stages = torch.arange(3000, device=device) % 4
    _, indices, _ = ops.residual_vq_quantize(x, codebooks, stages=stages)
    totals = ops.residual_code_totals(x, codebooks, indices)
    assert totals.dtype == wide(x).dtype and totals.shape == (3 * 40 * 8,)
    residual = wide(x)
    for q in range(3):
        rows = indices[:, q] >= 0
        counts, sums = reference.code_statistics(residual[rows].double(), indices[rows, q], 40)
        assert torch.equal(totals[: 3 * 40].view(3, 40)[q].double(), counts)
        tolerance = 1e-13 if dtype == torch.float64 else 1e-5
        found = totals[3 * 40 :].view(3, 40, 7)[q].double()
        torch.testing.assert_close(found, sums, rtol=tolerance, atol=100 * tolerance)
        residual = residual - torch.where(rows.unsqueeze(1), wide(codebooks)[q][indices[:, q]], 0)


def test_totals_are_not_differentiable():
    x, codebooks = (t.requires_grad_() for t in draw(4, 2, 3, 2))
    assert not ops.residual_code_totals(x, codebooks, torch.zeros(4, 2, dtype=torch.int64)).requires_grad


def test_moving_averages_lower_the_error():
    """Each code the mean of the residuals it was given: the last error never rises while assignments are held."""
    x, codebooks = draw(1000, 3, 16, 6)
    before = ops.residual_vq_quantize(x, codebooks)
    totals = ops.residual_code_totals(x, codebooks, before[1])
    counts, sums = totals[:48].view(3, 16, 1), totals[48:].view(3, 16, 6)
    moved = torch.where(counts > 0, sums / counts, codebooks)
    first = reference.residual_vq_quantize(x, moved, indices=before[1])[2][:, 0]
    assert first.sum() <= before[2][:, 0].sum()


def test_sums_do_not_depend_on_threads():
    x, codebooks = draw(20_000, 3, 300, 5)
    indices = torch.randint(300, (20_000, 3)) ** 2 // 300
    args = torch.randn(20_000, 5), torch.randn(20_000, 3), x, codebooks.flatten(0, 1), indices, [300] * 3

    def everything():
        totals = ops.residual_code_totals(x, codebooks, indices)
        return totals, *torch.ops.isthmus.residual_vq_quantize_backward(*args, "rotation", 0.25, True, True)

    torch.set_num_threads(1)
    expected = everything()
    for threads in (2, 7):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, everything(), expected))


# ---- memory, errors --------------------------------------------------------------------------------------------------


@measures_memory
def test_memory_does_not_grow_with_the_stages_times_the_dimension():
    """The residuals of all stages would take 160 MB, the scores of one stage 20 MB a thousand vectors."""
    x, codebooks = (t.requires_grad_() for t in draw(40_000, 16, 500, 64))

    def step():
        quantized, _, error = ops.residual_vq_quantize(x, codebooks)
        torch.autograd.grad((quantized, error), (x, codebooks), (torch.ones_like(x), torch.ones_like(error)))

    # In numbers: N·D for quantized, its gradient, grad_x and the residuals, N·Q for indices and errors.
    assert extra_memory(step) < 4 * (4 * x.numel() + 8 * 40_000 * 16 + 4 * codebooks.numel())


X, BOOKS = torch.zeros(4, 3), torch.zeros(2, 5, 3)
CODES = torch.zeros(4, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.residual_vq_quantize(X, BOOKS, gradient="codebook"), ValueError, "gradient is 'codebook'"),
        (lambda: ops.residual_vq_quantize(X, BOOKS, beam=0), RuntimeError, "beam is 0; expected at least 1"),
        (lambda: ops.residual_vq_quantize(X, BOOKS[0]), ValueError, r"codebooks has shape \[5, 3\]; expected"),
        (lambda: ops.residual_vq_quantize(X, []), ValueError, "codebooks is empty"),
        (lambda: ops.residual_vq_quantize(X, [BOOKS[0], BOOKS[1, :, :2]]), ValueError, r"codebooks\[1\] has shape"),
        (lambda: ops.residual_vq_quantize(X, [BOOKS[0], BOOKS[1].half()]), ValueError, r"codebooks\[1\] has dtype"),
        (lambda: ops.residual_vq_quantize(X, BOOKS[:, :0]), RuntimeError, "stage of 0 codes"),
        (lambda: ops.residual_vq_quantize(X, BOOKS[..., :2]), RuntimeError, r"codebooks are tables of shape \[10, 2\]"),
        (lambda: ops.residual_vq_quantize(X, BOOKS.double()), RuntimeError, "codebooks has dtype Double"),
        (lambda: ops.residual_vq_quantize(X, BOOKS.expand(3, 2, 5, 3)), RuntimeError, r"expected \[3, ..., D\]"),
        (lambda: ops.residual_vq_quantize(X, BOOKS, stages=3), RuntimeError, "stages holds 3; expected 0 to 2"),
        (lambda: ops.residual_vq_quantize(X, BOOKS, stages=CODES[:, 0].int()), RuntimeError, "stages has dtype Int"),
        (lambda: ops.residual_vq_quantize(X, BOOKS, stages=CODES), RuntimeError, r"stages has shape \[4, 2\]"),
        (lambda: ops.residual_vq_quantize(X, BOOKS, mask=torch.ones(4)), ValueError, "mask is torch.float32"),
        (lambda: ops.residual_vq_quantize(X, BOOKS, mask=torch.ones(3, dtype=torch.bool)), ValueError, "mask is"),
        (lambda: ops.residual_code_totals(X, BOOKS, CODES + 5), RuntimeError, "indices holds 5 for stage 0"),
        (lambda: ops.residual_code_totals(X, BOOKS, CODES[:, :1]), RuntimeError, r"indices has shape \[4, 1\]"),
        (lambda: ops.residual_code_totals(X, BOOKS, CODES.int()), RuntimeError, "indices has dtype Int"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
