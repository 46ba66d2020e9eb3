"""Adam over rows: what one step does to lengths, to untouched rows and to neighbours of a NaN."""

import pytest
import torch
from torch.nn.functional import normalize

from isthmus import ops, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = pytest.mark.parametrize("shape", [(), (1,), (3001,), (1, 1), (300, 17), (5, 2000), (40, 3, 5)], ids=str)


def learning(*shape, dtype=torch.float32, device="cpu"):
    """weight, exp_avg, exp_avg_sq, grad."""
    weight, exp_avg, grad = torch.randn(3, *shape, dtype=torch.float64)
    exp_avg_sq = torch.rand(shape, dtype=torch.float64) + 0.1
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        t.to(device, d) for t, d in zip((weight, exp_avg, exp_avg_sq, grad), (dtype, wide, wide, dtype), strict=True)
    ]


def after(tensors, adam=ops.adam_rows_, step=3, **options):
    """What weight, exp_avg and exp_avg_sq become."""
    *written, grad = (t.clone() for t in tensors)
    adam(*written, grad, step, **options)
    return written


def assert_rounded(found, expected, slack=4):
    for f, e in zip(found, expected, strict=True):
        tolerance = slack * torch.finfo(f.dtype).eps
        torch.testing.assert_close(f.double(), e, rtol=tolerance, atol=tolerance)


@every_dtype
@SHAPES
@pytest.mark.parametrize("unit_norm", (False, True))
@pytest.mark.parametrize("lazy", (False, True))
def test_step(lazy, unit_norm, shape, dtype, isa, device):
    tensors = learning(*shape, dtype=dtype, device=device)
    if shape:
        tensors[3][::3] = 0
    options = {"lr": 0.1, "weight_decay": 0.2, "unit_norm": unit_norm, "skip_zero_rows": lazy}
    found = after(tensors, **options)
    assert_rounded(found, after([t.double() for t in tensors], reference.adam_rows_, **options), slack=8)


def test_rows_keep_their_length_and_the_moments_learn_nothing_of_it(isa, device):
    weight, exp_avg, exp_avg_sq, _ = learning(50, 70, dtype=torch.float64, device=device)
    weight, exp_avg = normalize(weight), torch.zeros_like(exp_avg)
    along, across = torch.randn(50, 1, dtype=torch.float64, device=device), torch.randn_like(weight)
    across -= (across * weight).sum(1, keepdim=True) * weight
    found = after((weight, exp_avg, exp_avg_sq, 1000 * along * weight + across), lr=0.1, unit_norm=True)
    assert_rounded(found, after((weight, exp_avg, exp_avg_sq, across), lr=0.1, unit_norm=True), slack=4000)
    torch.testing.assert_close(found[0].norm(dim=1), weight.norm(dim=1))
    assert (found[1] * weight).sum(1).abs().max() < 1e-12


def test_a_long_row_does_not_scale_the_projection(isa):
    """The part along a row is that of its direction, whatever its length."""
    weight, exp_avg, exp_avg_sq, grad = learning(7, 20, dtype=torch.float64)
    for length in (1e-3, 1e3):
        found = after((length * normalize(weight), torch.zeros_like(exp_avg), exp_avg_sq, grad), unit_norm=True)[1]
        torch.testing.assert_close((found * normalize(weight)).sum(1), torch.zeros(7, dtype=torch.float64))


def test_a_row_of_zeros_has_no_direction(isa, device):
    weight, exp_avg, exp_avg_sq, grad = (torch.zeros(3, 20, device=device) for _ in range(4))
    grad[1] = torch.randn(20, device=device)
    found = after((weight, exp_avg, exp_avg_sq, grad), unit_norm=True)
    assert not any(t[::2].any() for t in found)
    torch.testing.assert_close(found[0][1].norm().cpu(), torch.tensor(1.0))
    assert torch.equal(found[0][1].sign(), -grad[1].sign())


@pytest.mark.parametrize("unit_norm", (False, True))
@pytest.mark.parametrize("shape", [(60,), (60, 1), (60, 37), (60, 600)], ids=str)
def test_untouched_rows_stay(shape, unit_norm, isa, device):
    """To the bit, moments included; and the others do not notice."""
    tensors = learning(*shape, device=device)
    rest = torch.rand(60, device=device) < 0.7
    tensors[3][rest] = -0.0
    if len(shape) > 1:
        tensors[3][:, 1:] *= torch.rand(60, shape[1] - 1, device=device).round()
    found = after(tensors, unit_norm=unit_norm, skip_zero_rows=True)
    moving = after(tensors, unit_norm=unit_norm)
    for f, m, t in zip(found, moving, tensors, strict=False):
        assert torch.equal(f[rest], t[rest]) and torch.equal(f[~rest], m[~rest])
    assert not torch.equal(moving[0][rest], tensors[0][rest])


@pytest.mark.parametrize(("unit_norm", "lazy"), [(False, False), (False, True), (True, False), (True, True)])
def test_nan_spoils_its_own_row(unit_norm, lazy, isa, device):
    tensors = learning(9, 37, device=device)
    spoilt = [t.clone() for t in tensors]
    spoilt[3][4, 11] = torch.nan
    options = {"unit_norm": unit_norm, "skip_zero_rows": lazy}
    others = torch.arange(9) != 4
    for found, expected in zip(after(spoilt, **options), after(tensors, **options), strict=True):
        assert torch.equal(found[others], expected[others])
        assert found[4, 11].isnan() and found[4].isnan().sum().item() == (37 if unit_norm else 1)


@pytest.mark.parametrize("options", [{}, {"skip_zero_rows": True}, {"unit_norm": True}], ids=str)
@pytest.mark.parametrize("shape", [(100_001,), (1001, 101), (3, 40_000)], ids=str)
def test_threads_do_not_matter(shape, options):
    tensors = learning(*shape)
    tensors[3][::4] = 0
    torch.set_num_threads(1)
    expected = after(tensors, **options)
    for threads in (2, 7):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, after(tensors, **options), expected))


def test_nothing_is_allocated_but_a_row():
    tensors = learning(2000, 100)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.adam_rows_(*tensors, 1, unit_norm=True)
    assert sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages()) < 4096


def test_autograd_notices():
    """A weight that changes between forward and backward is an error, not a wrong gradient."""
    tensors = learning(6, 4)
    weight, versions = tensors[0].requires_grad_(), [t._version for t in tensors]
    loss = (weight * weight).sum()
    with torch.no_grad():
        ops.adam_rows_(*tensors, 1)
    assert [t._version for t in tensors] == [v + (i < 3) for i, v in enumerate(versions)]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_to_do():
    for shape in ((0,), (0, 5), (5, 0)):
        for unit_norm in (False, True):
            assert [t.shape for t in after(learning(*shape), unit_norm=unit_norm)] == [shape] * 3


# ---- errors ----------------------------------------------------------------------------------------------------------

ROWS = torch.zeros(5, 3)


def step(weight=ROWS, exp_avg=ROWS, exp_avg_sq=ROWS, grad=ROWS, step=1, **options):
    ops.adam_rows_(weight.clone(memory_format=torch.preserve_format), exp_avg, exp_avg_sq, grad, step, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": ROWS.long(), "grad": ROWS.long()}, "weight has dtype Long; expected float32, float64"),
        ({"weight": torch.zeros(3, 5).T}, "weight is not contiguous; .* written in place"),
        ({"exp_avg": torch.zeros(3, 5).T}, "exp_avg is not contiguous"),
        ({"exp_avg_sq": torch.zeros(3, 5).T}, "exp_avg_sq is not contiguous"),
        ({"exp_avg": ROWS[:4]}, r"exp_avg is Float\[4, 3\]; expected Float\[5, 3\]"),
        ({"exp_avg_sq": ROWS.double()}, r"exp_avg_sq is Double\[5, 3\]; expected Float"),
        ({"weight": ROWS.half(), "grad": ROWS.half(), "exp_avg": ROWS.half()}, "exp_avg is Half.*; expected Float"),
        ({"grad": ROWS[:4]}, r"grad has shape \[4, 3\]; expected \[5, 3\], like weight"),
        ({"grad": ROWS.double()}, "grad has dtype Double; expected Float, like weight"),
        ({"step": 0}, "step is 0; expected 1 for the first step"),
        ({"lr": -1.0}, "lr is -1; expected 0 or more"),
        ({"lr": torch.nan}, "lr is nan; expected 0 or more"),
        ({"eps": -1.0}, "eps is -1; expected 0 or more"),
        ({"weight_decay": -1.0}, "weight_decay is -1; expected 0 or more"),
        ({"betas": (1.0, 0.9)}, "beta1 is 1; expected 0 or more, and less than 1"),
        ({"betas": (0.9, -0.1)}, "beta2 is -0.1; expected 0 or more"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(RuntimeError, match=message):
        step(**options)
