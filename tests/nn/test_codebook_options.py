"""The options of VectorQuantizer against plain float64 formulas."""

import copy

import pytest
import torch
from torch.nn.functional import normalize

from isthmus import nn


def nearest(rows, codes):
    return (rows.unsqueeze(-2) - codes).square().sum(-1).argmin(-1)


def double(*args, **options):
    return nn.VectorQuantizer(*args, **options).double()


# ---- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 6, 3, 4), (2, 6, 2, 3, 2)])
def test_channel_first_is_the_same_vectors_elsewhere(shape):
    quantizer = double(10, 6, channel_first=True).eval()
    x = torch.randn(shape, dtype=torch.float64)
    out = quantizer(x)
    rows = x.movedim(1, -1)
    assert torch.equal(out.indices, nearest(rows, quantizer.codebook))
    torch.testing.assert_close(out.quantized, quantizer.codebook[out.indices].movedim(-1, 1))
    assert torch.equal(quantizer.encode(x), out.indices)
    torch.testing.assert_close(quantizer.decode(out.indices), out.quantized)


@pytest.mark.parametrize("separate", [False, True])
def test_heads_quantize_parts_of_a_vector(separate):
    quantizer = double(10, 6, heads=3, separate_codebook_per_head=separate).eval()
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    out = quantizer(x)
    books = quantizer.codebook.view(3, 10, 2) if separate else quantizer.codebook.expand(3, 10, 2)
    parts = x.unflatten(-1, (3, 2))
    indices = torch.stack([nearest(parts[:, :, h], books[h]) for h in range(3)], -1)
    codes = torch.stack([books[h][indices[..., h]] for h in range(3)], -2)
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.quantized, codes.flatten(-2))
    torch.testing.assert_close(out.loss, 0.25 * (parts - codes).square().sum(-1).mean())
    torch.testing.assert_close(quantizer.get_codes(indices), codes)
    torch.testing.assert_close(quantizer.decode(indices), codes.flatten(-2))
    assert torch.equal(quantizer.encode(x, topk=2)[..., 0], indices)


@pytest.mark.parametrize("separate", [False, True])
def test_each_head_learns_from_its_own_part(separate):
    torch.manual_seed(0)
    quantizer = double(4, 6, heads=2, separate_codebook_per_head=separate, decay=0.5, revive_below=0.0)
    before, x = quantizer.codebook.clone(), torch.randn(30, 6, dtype=torch.float64)
    indices = quantizer(x).indices
    parts = x.view(30, 2, 3)
    books = before.view(2, 4, 3) if separate else before.unsqueeze(0)
    for b, book in enumerate(books):
        rows = parts[:, b] if separate else parts.reshape(-1, 3)
        hits = indices[:, b] if separate else indices.reshape(-1)
        for k in range(4):
            mine = rows[hits == k]
            usage = 0.5 + 0.5 * len(mine) * 4 / len(rows)
            expected = (0.5 * book[k] + 0.5 * mine.sum(0) * 4 / len(rows)) / usage
            torch.testing.assert_close(quantizer.usage.view(-1, 4)[b, k].item(), usage)
            torch.testing.assert_close(quantizer.codebook.view(-1, 4, 3)[b, k], expected)


def test_codes_of_another_size_are_reached_by_projections():
    quantizer = double(10, 8, codebook_dim=3, heads=2, layernorm_after_project_in=True).eval()
    x = torch.randn(5, 8, dtype=torch.float64)
    layout = quantizer.layout
    parts = layout.norm(layout.project_in(x)).view(5, 2, 3)
    indices = nearest(parts, quantizer.codebook)
    out = quantizer(x)
    assert torch.equal(out.indices, indices)
    expected = layout.project_out(quantizer.codebook[indices].flatten(-2))
    torch.testing.assert_close(out.quantized, expected)
    torch.testing.assert_close(quantizer.decode(indices), expected)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("given", ["mask", "lengths"])
def test_masked_vectors_are_zeros_and_change_nothing(separate, given):
    torch.manual_seed(0)
    options = dict(heads=2, separate_codebook_per_head=separate, codebook_dim=4, decay=0.5, revive_below=0.0)
    quantizer = double(7, 6, **options)
    twin = double(7, 6, **options)
    twin.load_state_dict(quantizer.state_dict())
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([5, 2, 0])
    mask = torch.arange(5) < lengths.unsqueeze(1)
    out = quantizer(x, **{given: mask if given == "mask" else lengths})
    expected = twin(x[mask])
    torch.testing.assert_close(out.quantized[mask], expected.quantized)
    assert (out.quantized[~mask] == 0).all()
    assert torch.equal(out.indices[mask], expected.indices)
    assert (out.indices[~mask] == -1).all()
    assert (quantizer.decode(out.indices)[~mask] == 0).all()
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(quantizer.state_dict(), twin.state_dict())
    (out.loss + out.quantized.sum()).backward()
    assert (x.grad[~mask] == 0).all()


def test_a_batch_without_a_live_vector_leaves_the_codebook_alone():
    quantizer = nn.VectorQuantizer(7, 6, decay=0.5, revive_below=0.9)
    before = quantizer.codebook.clone()
    out = quantizer(torch.randn(4, 6), mask=torch.zeros(4, dtype=torch.bool))
    assert out.loss == 0
    assert torch.equal(quantizer.codebook, before)
    assert torch.equal(quantizer.usage, torch.ones(7))
    assert torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize(
    "options", [{}, {"heads": 2}, {"heads": 2, "separate_codebook_per_head": True, "codebook_dim": 5}]
)
@pytest.mark.parametrize("make", [nn.VectorQuantizer, lambda *a, **options: nn.ResidualVQ(*a, 2, groups=2)])
def test_an_empty_batch(make, options):
    quantizer = make(7, 6, **options)
    before = quantizer.codebook.clone()
    for shape in ((0, 6), (3, 0, 6)):
        out = quantizer(torch.randn(shape))
        assert out.quantized.shape == quantizer.decode(out.indices).shape == shape
        assert torch.equal(quantizer.encode(torch.randn(shape)), out.indices)
    assert torch.equal(quantizer.codebook, before)


# ---- metric, gradient, assignment ------------------------------------------------------------------------------------


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_cosine_compares_and_returns_unit_vectors(learning):
    quantizer = double(10, 6, metric="cosine", learning=learning).eval()
    x = 5.0 * torch.randn(20, 6, dtype=torch.float64)
    rows, codes = normalize(x, dim=-1), normalize(quantizer.codebook, dim=-1)
    out = quantizer(x)
    indices = (rows @ codes.T).argmax(-1)
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.quantized, codes[indices])
    error = (2.0 - 2.0 * (rows * codes[indices]).sum(-1)).mean()
    torch.testing.assert_close(out.loss, (1.25 if learning == "gradient" else 0.25) * error)


def test_cosine_codebook_follows_the_mean_direction():
    torch.manual_seed(0)
    quantizer = double(4, 3, metric="cosine", decay=0.0, revive_below=0.0)
    x = torch.randn(50, 3, dtype=torch.float64)
    indices = quantizer(x).indices
    for k in indices.unique():
        mean = normalize(x[indices == k], dim=-1).mean(0)
        torch.testing.assert_close(quantizer.codes()[k], normalize(mean, dim=0))


def test_rotation_turns_and_scales_the_gradient_as_x_is_into_its_code():
    torch.manual_seed(0)
    quantizer = double(10, 6, gradient="rotation").eval()
    x = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    quantized, indices, _ = quantizer(x)
    direction = torch.randn(20, 6, dtype=torch.float64)
    (actual,) = torch.autograd.grad((quantized * direction).sum(), x)
    code = quantizer.codebook[indices]
    torch.testing.assert_close(quantized, code)
    for row, c, g, found in zip(x.detach(), code, direction, actual, strict=True):
        a, b = row / row.norm(), c / c.norm()
        r = (a + b) / (a + b).norm()
        rotation = torch.eye(6, dtype=torch.float64) - 2 * torch.outer(r, r) + 2 * torch.outer(b, a)
        matrix = c.norm() / row.norm() * rotation
        torch.testing.assert_close(matrix @ row, c)
        torch.testing.assert_close(found, matrix.T @ g)


def test_sampled_codes_follow_the_softmax_of_the_distances():
    torch.manual_seed(0)
    quantizer = double(4, 2, sample_temperature=2.0, freeze_codebook=True)
    row = torch.randn(2, dtype=torch.float64)
    indices = quantizer(row.expand(20000, 2)).indices
    expected = (-(row - quantizer.codebook).square().sum(-1) / 2.0).softmax(-1)
    frequency = indices.bincount(minlength=4) / 20000
    torch.testing.assert_close(frequency.double(), expected, rtol=0.0, atol=0.02)
    assert quantizer.eval()(row.expand(100, 2)).indices.unique().numel() == 1


def test_sampled_codes_are_quantized_and_learned_from():
    torch.manual_seed(0)
    quantizer = double(4, 2, sample_temperature=10.0, decay=0.0, revive_below=0.0)
    before, x = quantizer.codebook.clone(), torch.randn(40, 2, dtype=torch.float64)
    mask = torch.arange(40) < 30
    out = quantizer(x, mask=mask)
    assert (out.indices[30:] == -1).all()
    torch.testing.assert_close(out.quantized[:30], before[out.indices[:30]])
    error = (x[:30] - before[out.indices[:30]]).square().sum(-1).mean()
    torch.testing.assert_close(out.loss, 0.25 * error)
    hits = torch.stack([x[:30][out.indices[:30] == k].mean(0) for k in range(4)])
    torch.testing.assert_close(quantizer.codebook, hits)


# ---- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_a_frozen_codebook_neither_moves_nor_gets_gradients(learning):
    quantizer = double(8, 4, learning=learning, freeze_codebook=True, revive_below=0.9)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    x = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    out = quantizer(x)
    out.loss.backward()
    torch.testing.assert_close(quantizer.state_dict(), before, rtol=0, atol=0)
    if learning == "gradient":
        assert quantizer.codebook.grad is None
    error = (x - quantizer.codebook[out.indices]).square().sum(-1).mean()
    torch.testing.assert_close(out.loss, 0.25 * error)
    quantizer.freeze_codebook = False
    quantizer(x)
    assert not torch.equal(quantizer.usage, before["usage"])


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_micro_batches_update_like_the_whole_batch(learning):
    torch.manual_seed(0)
    options = dict(learning=learning, decay=0.5, revive_below=0.0)
    whole, parts = double(8, 4, **options), double(8, 4, **options)
    parts.load_state_dict(whole.state_dict())
    for _ in range(3):
        x = torch.randn(30, 4, dtype=torch.float64)
        whole(x)
        before = parts.codebook.detach().clone()
        for rows in (x[:10], x[10:18]):
            parts(rows, update="later")
        assert torch.equal(parts.codebook, before)
        parts(x[18:])
    torch.testing.assert_close(parts.state_dict(), whole.state_dict())


def test_code_weights_scale_the_step_of_each_code():
    torch.manual_seed(0)
    weight = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    quantizer = double(3, 2, decay=0.9, revive_below=0.0)
    before, x = quantizer.codebook.clone(), torch.randn(30, 2, dtype=torch.float64)
    indices = quantizer(x, code_weight=weight).indices
    for k in range(3):
        step, mine = 0.1 * weight[k], x[indices == k]
        usage = 1.0 + step * (len(mine) / 10 - 1.0)
        torch.testing.assert_close(quantizer.usage[k], usage)
        code = ((1.0 - step) * before[k] + step * mine.sum(0) / 10) / usage
        torch.testing.assert_close(quantizer.codebook[k], code)


def test_laplace_smoothing_moves_the_divisor_towards_the_mean():
    torch.manual_seed(0)
    plain, smooth = double(5, 2, decay=0.5, revive_below=0.0), double(5, 2, decay=0.5, revive_below=0.0, eps=0.2)
    smooth.load_state_dict(plain.state_dict())
    x = torch.randn(40, 2, dtype=torch.float64)
    plain(x)
    smooth(x)
    torch.testing.assert_close(smooth.usage, plain.usage)
    divisor = (smooth.usage + 0.2) * 5 / (5 + 5 * 0.2)
    torch.testing.assert_close(smooth.codebook, plain.sums / divisor.unsqueeze(-1))


def test_averages_keep_their_digits_in_a_half_precision_module():
    quantizer = nn.VectorQuantizer(8, 4, decay=0.999, revive_below=0.0).bfloat16()
    assert (quantizer.codebook.dtype, quantizer.usage.dtype, quantizer.sums.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    x = torch.randn(64, 4).bfloat16()
    hits = quantizer(x).indices.bincount(minlength=8)
    torch.testing.assert_close(quantizer.usage, 0.999 + 0.001 * hits / 8)


def test_masked_vectors_revive_no_code():
    torch.manual_seed(0)
    quantizer = nn.VectorQuantizer(32, 4, decay=0.0, revive_below=0.5)
    x = torch.randn(64, 4)
    mask = torch.arange(64) % 2 == 0
    x[~mask] = 1000.0
    for _ in range(20):
        quantizer(x, mask=mask)
    assert (quantizer.codebook.abs() < 100.0).all()
    torch.testing.assert_close(quantizer.perplexity, quantizer.perplexity.clamp(20.0, 32.0))


@pytest.mark.parametrize("make", [nn.VectorQuantizer, lambda *a, **options: nn.ResidualVQ(*a, 2, **options)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_vectors_that_are_not_finite_teach_nothing(make, value):
    torch.manual_seed(0)
    quantizer = make(64, 4, decay=0.0, revive_below=0.5)
    twin = copy.deepcopy(quantizer)
    x = torch.randn(200, 4)
    x[::2, 1] = value
    for _ in range(3):
        out = quantizer(x)
        twin(x, mask=x.isfinite().all(-1))
    assert not out.loss.isfinite()
    torch.testing.assert_close(quantizer.state_dict(), twin.state_dict())
    assert all(buffer.isfinite().all() for buffer in quantizer.buffers())


def test_perplexity_counts_the_codes_in_use():
    quantizer = double(8, 4, heads=2, separate_codebook_per_head=True)
    quantizer.usage.copy_(torch.tensor([1.0] * 4 + [0.0] * 4 + [2.0] * 8))
    torch.testing.assert_close(quantizer.perplexity, torch.tensor([4.0, 8.0], dtype=torch.float64))


# ---- losses ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows_and_codes():
    torch.manual_seed(0)
    x = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    codes = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    indices = nearest(x, codes)
    indices[15:] = -1
    return x, codes, indices


def check(term, formula, x, codes, indices):
    actual, expected = term(x, codes, indices), formula
    torch.testing.assert_close(actual, expected)
    found = torch.autograd.grad(actual, (x, codes), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(
        found, torch.autograd.grad(expected, (x, codes), allow_unused=True, materialize_grads=True)
    )


def test_commitment_cross_entropy_equals_the_formula(rows_and_codes):
    x, codes, indices = rows_and_codes
    logits = -(x[:15].unsqueeze(1) - codes).square().sum(-1) / 0.7
    expected = 0.3 * torch.nn.functional.cross_entropy(logits, indices[:15])
    check(nn.CommitmentCrossEntropy(0.3, temperature=0.7), expected, *rows_and_codes)


def test_diversity_equals_the_formula(rows_and_codes):
    x, codes, _ = rows_and_codes
    mean = (-(x[:15].unsqueeze(1) - codes).square().sum(-1) / 0.7).softmax(-1).mean(0)
    check(nn.CodeDiversity(0.3, temperature=0.7), 0.3 * (mean * mean.log()).sum(), *rows_and_codes)


@pytest.mark.parametrize("active", [False, True])
def test_orthogonality_equals_the_formula(active, rows_and_codes):
    _, codes, indices = rows_and_codes
    compared = codes[indices[indices >= 0].unique()] if active else codes
    n = len(compared)
    assert n < 8 or not active
    unit = compared / compared.norm(dim=-1, keepdim=True)
    squares = (unit @ unit.T).square()
    expected = 0.3 * (squares.sum() - squares.diagonal().sum()) / n**2
    check(nn.CodeOrthogonality(0.3, active_codes_only=active), expected, *rows_and_codes)


def test_orthogonality_of_a_few_random_codes(rows_and_codes):
    x, _, indices = rows_and_codes
    codes = torch.cat([torch.eye(3), torch.eye(3)[:1].expand(5, 3)]).double()
    term = nn.CodeOrthogonality(max_codes=2)
    values = [term(x, codes, indices).item() for _ in range(40)]
    assert {round(value, 6) for value in values} == {0.0, 0.5}
    active = nn.CodeOrthogonality(max_codes=3, active_codes_only=True)
    assert active(x, codes, torch.tensor([0, 1, 2])) == 0.0


def test_terms_add_up_to_the_loss():
    terms = [nn.CodeDiversity(0.5), nn.CodeOrthogonality(2.0)]
    quantizer = double(8, 4, learning="gradient", losses=terms, heads=2, separate_codebook_per_head=True)
    out, breakdown = quantizer(torch.randn(20, 4, dtype=torch.float64), return_loss_breakdown=True)
    assert list(breakdown) == ["codes", "CodeDiversity", "CodeOrthogonality"]
    torch.testing.assert_close(out.loss, sum(breakdown.values()))
    out.loss.backward()
    assert quantizer.codebook.grad.isfinite().all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_cross_entropy_to_given_codes(metric):
    torch.manual_seed(0)
    quantizer = double(8, 4, heads=2, metric=metric, learning="gradient")
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randint(8, (5, 3, 2))
    target[0] = -1
    rows, codes = x.view(5, 3, 2, 2), quantizer.codebook
    if metric == "cosine":
        logits = normalize(rows, dim=-1) @ normalize(codes, dim=-1).T / 0.5
    else:
        logits = -(rows.unsqueeze(-2) - codes).square().sum(-1) / 0.5
    expected = torch.nn.functional.cross_entropy(logits[1:].flatten(0, -2), target[1:].flatten())
    actual = quantizer.cross_entropy(x, target, temperature=0.5)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, (x, codes)), torch.autograd.grad(expected, (x, codes)))


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"metric": "l1"}, "metric"),
        ({"gradient": "reinforce"}, "gradient"),
        ({"heads": 3}, "heads=3 does not divide dim=4"),
        ({"heads": 0}, "heads"),
        ({"eps": -1.0}, "eps"),
        ({"layernorm_after_project_in": True}, "layernorm_after_project_in"),
        ({"sample_temperature": -1.0}, "sample_temperature"),
        ({"sample_temperature": 1.0, "gradient": "rotation"}, "rotation"),
        ({"transform": torch.nn.Identity()}, "transform needs"),
        ({"losses": [nn.CodeDiversity(), nn.CodeDiversity()]}, "twice"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        nn.VectorQuantizer(8, 4, **options)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"expected torch.bool \[3, 5\]"),
        ({"mask": torch.ones(3, 5)}, "mask is torch.float32"),
        ({"lengths": torch.ones(5, dtype=torch.int64)}, r"lengths has shape \[5\]"),
        ({"lengths": torch.ones(3, dtype=torch.int64), "mask": torch.ones(3, 5, dtype=torch.bool)}, "not both"),
        ({"update": "soon"}, "update"),
    ],
)
def test_calls_that_do_not_fit_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        nn.VectorQuantizer(8, 4)(torch.randn(3, 5, 4), **call)


def test_vectors_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 4\]"):
        nn.VectorQuantizer(8, 4)(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"expected \[B, 4, \.\.\.\]"):
        nn.VectorQuantizer(8, 4, channel_first=True)(torch.randn(3, 5, 4))
