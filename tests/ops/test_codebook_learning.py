"""Codebooks that learn: statistics of the codes, and updates in place."""

import itertools

import pytest
import torch

from isthmus import ops, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# ---- statistics ------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("usage", ("uniform", "collapsed", "one", "gaps"))
@pytest.mark.parametrize(("rows", "codes", "dim"), [(0, 4, 3), (5, 1, 1), (3000, 40, 19), (2048, 700, 8), (40, 33, 0)])
def test_statistics(rows, codes, dim, usage, dtype, isa, device):
    """Also where one code owns more rows than a thread takes at a time, and where most own none."""
    x = torch.randn(rows, dim, dtype=torch.float64).to(device, dtype)
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
    x, codebook = torch.randn(30_000, 5), torch.randn(codes, 5)
    indices = torch.randint(codes, (30_000,)) ** 2 // codes
    grads = torch.randn(30_000, 5), torch.randn(30_000)

    def everything():
        return (
            *ops.code_statistics(x, indices, codes),
            *torch.ops.isthmus.vq_quantize_backward(*grads, x, codebook, indices, "rotation", 0.25, True, True),
        )

    torch.set_num_threads(1)
    expected = everything()
    for threads in (2, 7):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, everything(), expected))


def test_statistics_leave_out_what_has_no_code(isa, device):
    x = torch.randn(3000, 7, device=device)
    indices = torch.randint(-1, 40, (3000,), device=device)
    x[indices < 0] = torch.nan
    kept = indices >= 0
    expected = ops.code_statistics(x[kept], indices[kept], 40)
    assert all(map(torch.equal, ops.code_statistics(x, indices, 40), expected))
    totals = ops.code_totals(x, indices, 40)
    assert torch.equal(totals, torch.cat([expected[0], expected[1].flatten()]))
    nothing = torch.full_like(indices, -1)
    assert not ops.code_totals(x, nothing, 40).any()


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


# ---- codebooks that learn --------------------------------------------------------------------------------------------


def learning(*shape, dtype=torch.float32, device="cpu"):
    """codebook, usage, sums, counts, batch_sums."""
    codebook, sums, batch_sums = torch.randn(3, *shape, dtype=torch.float64)
    usage, counts = torch.rand(shape[:-1]).double() + 0.5, torch.randint(1, 9, shape[:-1]).double()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    averages = [t.to(device, wide) for t in (usage, sums, counts, batch_sums)]
    return [codebook.to(device, dtype), *averages]


def after(arguments, update=ops.update_codebook_, **options):
    """What codebook, usage and sums become."""
    copies = [t.clone() if t is not None else None for t in arguments]
    update(*copies, **options)
    return copies[:3]


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (300, 17), (4, 33, 64)], ids=str)
@pytest.mark.parametrize("normalize", (False, True))
def test_update(normalize, shape, dtype, isa, device):
    arguments = learning(*shape, dtype=dtype, device=device)
    options = {
        "code_weight": torch.rand(shape[:-1], device=device).to(arguments[1].dtype),
        "candidates": torch.randn(shape, device=device).to(dtype),
    }
    plain = {"decay": 0.8, "eps": 1e-3, "revive_below": 0.9, "normalize": normalize}
    found = after(arguments, **plain, **options)
    wide = [t.double() for t in arguments]
    expected = after(wide, reference.update_codebook_, **plain, **{k: v.double() for k, v in options.items()})
    tolerance = 4 * torch.finfo(dtype).eps
    assert [t.dtype for t in found] == [t.dtype for t in arguments[:3]]
    torch.testing.assert_close(found[0].double(), expected[0], rtol=tolerance, atol=tolerance)
    tolerance = 4 * torch.finfo(arguments[1].dtype).eps
    for f, e in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(f.double(), e, rtol=tolerance, atol=tolerance)


def test_update_converges_to_the_means(isa):
    """Steps with one batch: codes go to the means of their vectors and usages to their share."""
    codebook, usage, sums, counts, batch_sums = learning(20, 4, dtype=torch.float64)
    for _ in range(200):
        ops.update_codebook_(codebook, usage, sums, counts, batch_sums, decay=0.8)
    torch.testing.assert_close(codebook, batch_sums / counts.unsqueeze(1))
    torch.testing.assert_close(usage, counts * 20 / counts.sum())


def test_update_does_not_see_the_batch_size():
    arguments = learning(20, 4, dtype=torch.float64)
    expected = after(arguments, decay=0.9, eps=1e-2)
    larger = [*arguments[:3], 64 * arguments[3], 64 * arguments[4]]
    assert all(map(torch.equal, after(larger, decay=0.9, eps=1e-2), expected))


def test_code_weights_scale_the_rate():
    arguments = learning(20, 4, dtype=torch.float64)
    weight = torch.linspace(0, 3, 20, dtype=torch.float64)
    found = after(arguments, decay=0.9, code_weight=weight)
    assert torch.equal(found[1][0], arguments[1][0]) and torch.equal(found[2][0], arguments[2][0])
    for code in range(1, 20):
        alone = after(arguments, decay=1 - 0.1 * weight[code].item())
        for f, a in zip(found, alone, strict=True):
            torch.testing.assert_close(f[code], a[code])


def test_heads_without_hits_are_left_as_they_are():
    arguments = learning(3, 8, 5)
    arguments[3][1], arguments[4][1] = 0.0, 0.0
    options = {"decay": 0.5, "candidates": torch.randn(3, 8, 5), "revive_below": 1e9}
    for found, before in zip(after(arguments, **options), arguments[:3], strict=True):
        assert torch.equal(found[1], before[1])
        assert not torch.equal(found[0], before[0]) and not torch.equal(found[2], before[2])


def test_forgotten_codes_stay_and_dead_codes_move():
    arguments = learning(6, 4)
    arguments[1][:4] = 1e-13
    arguments[3][:4] = 0.0
    candidates = torch.randn(6, 4)
    candidates[1, 2] = torch.nan
    stay = after(arguments, decay=0.5)
    assert torch.equal(stay[0][:4], arguments[0][:4]) and not torch.equal(stay[0][4:], arguments[0][4:])
    codebook, usage, sums = after(arguments, decay=0.5, candidates=candidates, revive_below=0.1)
    revived = [0, 2, 3]
    assert torch.equal(codebook[revived], candidates[revived]) and torch.equal(sums[revived], candidates[revived])
    assert (usage[revived] == 1).all() and usage[1] < 1e-12
    assert torch.equal(codebook[1], arguments[0][1])
    for t, s in zip((codebook, usage, sums), stay, strict=True):
        assert torch.equal(t[4:], s[4:])


def test_unit_codes():
    arguments = learning(9, 5, dtype=torch.float64)
    arguments[1][0], arguments[3][0] = 0.0, 0.0
    arguments[2][1], arguments[4][1] = 0.0, 0.0
    candidates = 7 * torch.randn(9, 5, dtype=torch.float64)
    codebook, _, sums = after(arguments, decay=0.9, candidates=candidates, revive_below=0.01, normalize=True)
    torch.testing.assert_close(codebook[2:].norm(dim=1), torch.ones(7, dtype=torch.float64))
    assert not codebook[1].any()
    torch.testing.assert_close(codebook[0], candidates[0] / candidates[0].norm())
    torch.testing.assert_close(sums[0], codebook[0])


def test_usage_of_a_codebook_that_learns_by_gradient():
    codebook, usage, _, counts, _ = learning(7, 4)
    expected = after([codebook, usage, codebook, counts, codebook], decay=0.9)[1]
    found = after([codebook, usage, None, counts, None], decay=0.9)
    assert torch.equal(found[0], codebook) and torch.equal(found[1], expected)


def test_update_tells_autograd():
    """A codebook that changes between forward and backward is an error, not a wrong gradient."""
    x, (codebook, *others) = torch.randn(6, 4, requires_grad=True), learning(7, 4)
    versions = [t._version for t in (codebook, *others)]
    error = ops.vq_quantize(x, codebook)[2]
    ops.update_codebook_(codebook, *others, decay=0.9)
    assert [t._version for t in (codebook, *others)] == [v + (i < 3) for i, v in enumerate(versions)]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        error.sum().backward()


def test_a_training_step_compiles():
    """Forward, backward, totals and update in one graph, which writes to the same buffers."""

    def step(x, codebook, usage, sums):
        quantized, indices, error = ops.vq_quantize(x, codebook.clone(), gradient="rotation")
        counts, batch_sums = ops.code_statistics(x, indices, len(codebook))
        candidates = x.detach()[: len(codebook)]
        ops.update_codebook_(
            codebook, usage, sums, counts, batch_sums, decay=0.9, candidates=candidates, revive_below=0.95
        )
        return quantized.square().sum() + error.sum()

    torch._dynamo.reset()
    x, (codebook, usage, sums, *_) = torch.randn(50, 4), learning(7, 4)
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf, state = x.clone().requires_grad_(), [t.clone() for t in (codebook, usage, sums)]
        loss = run(leaf, *state)
        loss.backward()
        results.append((loss.detach(), leaf.grad, *state))
    assert all(map(torch.equal, *results))
    assert not torch.equal(results[0][2], codebook)


# ---- errors ----------------------------------------------------------------------------------------------------------

X, INDICES = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
CODES, USAGE = torch.zeros(5, 3), torch.ones(5)


def update(codebook=CODES, sums=CODES, counts=USAGE, batch_sums=CODES, decay=0.9, **options):
    written = [t if t is None else t.clone() for t in (codebook, USAGE, sums)]
    ops.update_codebook_(*written, counts, batch_sums, decay=decay, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.code_statistics(X, INDICES[:3], 5), r"indices has shape \[3\]; expected"),
        (lambda: ops.code_statistics(X, INDICES.int(), 5), "indices has dtype Int; expected int64"),
        (lambda: ops.code_statistics(X, INDICES + 5, 5), "indices holds 5; expected 0 <= index < 5"),
        (lambda: ops.code_statistics(X, INDICES - 2, 5), "indices holds -2; .* or -1 for no code"),
        (lambda: ops.code_statistics(X, INDICES, -1), "num_codes is -1"),
        (lambda: update(CODES[0]), r"codebook has shape \[3\]; expected \[K, D\] or \[H, K, D\]"),
        (lambda: update(decay=1.5), "decay is 1.5; expected 0 to 1"),
        (lambda: update(eps=-1.0), "eps is -1; expected 0 or more"),
        (lambda: update(sums=None), "sums and batch_sums belong together; .* got only batch_sums"),
        (lambda: update(batch_sums=None), "got only sums"),
        (lambda: update(counts=USAGE[:4]), r"counts is Float\[4\]; expected Float\[5\]"),
        (lambda: update(batch_sums=CODES[:4]), r"batch_sums is Float\[4, 3\]; expected Float\[5, 3\]"),
        (lambda: update(counts=INDICES.repeat(2)[:5]), r"counts is Long\[5\]; expected Float\[5\]"),
        (lambda: update(code_weight=CODES), r"code_weight is Float\[5, 3\]; expected Float\[5\]"),
        (lambda: update(candidates=CODES[:4]), r"candidates has shape \[4, 3\]; expected \[5, 3\]"),
        (lambda: update(torch.zeros(3, 5).T), "codebook is not contiguous; .* written in place"),
        (lambda: update(sums=torch.zeros(3, 5).T), "sums is not contiguous"),
    ],
)  # fmt: skip
def test_bad_arguments(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
