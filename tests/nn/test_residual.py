"""ResidualVQ and GroupedResidualVQ against loops over stages in float64."""

import pytest
import torch

from isthmus import nn


def stages_by_hand(rows, books):
    """Sum of codes, indices and squared errors, stage after stage."""
    residual, indices, errors = rows, [], []
    for book in books:
        index = (residual.unsqueeze(-2) - book).square().sum(-1).argmin(-1)
        residual = residual - book[index]
        indices.append(index)
        errors.append(residual.square().sum(-1))
    return rows - residual, torch.stack(indices, -1), torch.stack(errors, -1)


def residual_vq(*args, **options):
    torch.manual_seed(0)
    return nn.ResidualVQ(*args, **options).double()


@pytest.mark.parametrize("sizes", [9, (9, 5, 7)])
@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_every_stage_codes_what_is_left(sizes, learning):
    quantizer = residual_vq(sizes, 6, 3, learning=learning).eval()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    quantized, indices, errors = stages_by_hand(x, quantizer.stage_list())
    out = quantizer(x)
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.quantized, quantized)
    weight = 1.25 if learning == "gradient" else 0.25
    torch.testing.assert_close(out.loss, weight * errors.sum(-1).mean())
    assert torch.equal(quantizer.encode(x), indices)
    codes = torch.stack([book[indices[..., q]] for q, book in enumerate(quantizer.stage_list())], -2)
    torch.testing.assert_close(quantizer.get_codes(indices), codes)
    torch.testing.assert_close(quantizer.decode(indices), quantized)
    torch.testing.assert_close(quantizer.decode(indices[..., :2]), codes[..., :2, :].sum(-2))


def test_gradients_are_those_of_the_stages():
    quantizer = residual_vq(9, 6, 3, learning="gradient", commitment_weight=0.4, revive_below=0.0)
    x = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(20, 6, dtype=torch.float64)
    out = quantizer(x)
    actual = torch.autograd.grad(out.loss + (out.quantized * direction).sum(), (x, quantizer.codebook))

    residual, expected = x, (x * direction).sum()
    for q, book in enumerate(quantizer.stage_list()):
        code = book[out.indices[:, q]]
        expected = expected + (residual.detach() - code).square().sum(-1).mean()
        expected = expected + 0.4 * (residual - code.detach()).square().sum(-1).mean()
        residual = residual - code.detach()
    torch.testing.assert_close(actual, torch.autograd.grad(expected, (x, quantizer.codebook)))


@pytest.mark.parametrize("shared", [False, True])
def test_moving_averages_of_every_stage(shared):
    quantizer = residual_vq(5, 3, 2, decay=0.5, revive_below=0.0, shared_codebook=shared)
    books, x = [book.clone() for book in quantizer.stage_list()], torch.randn(40, 3, dtype=torch.float64)
    indices = quantizer(x).indices
    residuals = [x, x - books[0][indices[:, 0]]]
    if shared:
        residuals, chosen, books = [torch.cat(residuals)], [indices.T.flatten()], books[:1]
    else:
        chosen = list(indices.T)
    for b, (rows, index) in enumerate(zip(residuals, chosen, strict=True)):
        for k in range(5):
            mine = rows[index == k]
            usage = 0.5 + 0.5 * len(mine) * 5 / len(rows)
            code = (0.5 * books[b][k] + 0.5 * mine.sum(0) * 5 / len(rows)) / usage
            torch.testing.assert_close(quantizer.usage.view(-1, 5)[b, k].item(), usage)
            torch.testing.assert_close(quantizer.codebook.view(-1, 5, 3)[b, k], code)


def test_groups_are_residual_quantizers_side_by_side():
    torch.manual_seed(0)
    grouped = nn.GroupedResidualVQ(7, 8, 3, groups=2, decay=0.5, revive_below=0.0).double()
    alone = [residual_vq(7, 4, 3, decay=0.5, revive_below=0.0) for _ in range(2)]
    for half, quantizer in zip(grouped.codebook.chunk(2), alone, strict=True):
        quantizer.codebook.copy_(half)
        quantizer.sums.copy_(half)
    for _ in range(3):
        x = torch.randn(4, 5, 8, dtype=torch.float64)
        outs = [quantizer(part) for quantizer, part in zip(alone, x.chunk(2, -1), strict=True)]
        out = grouped(x)
        torch.testing.assert_close(out.quantized, torch.cat([o.quantized for o in outs], -1))
        assert torch.equal(out.indices, torch.stack([o.indices for o in outs], -2))
        torch.testing.assert_close(out.loss, (outs[0].loss + outs[1].loss) / 2)
    torch.testing.assert_close(grouped.codebook, torch.cat([quantizer.codebook for quantizer in alone]))
    torch.testing.assert_close(grouped.usage, torch.cat([quantizer.usage for quantizer in alone]))
    out = grouped.eval()(x)
    torch.testing.assert_close(grouped.decode(out.indices), out.quantized)


@pytest.mark.parametrize("learning", ["ema", "gradient"])
@pytest.mark.parametrize("options", [{}, {"shared_codebook": True}, {"groups": 2}])
def test_dead_codes_move_onto_residuals_of_their_stage(learning, options):
    quantizer = residual_vq(6, 4, 3, learning=learning, decay=0.0, revive_below=0.5, **options)
    with torch.no_grad():
        quantizer.codebook.add_(1000.0)
    if learning == "ema":
        quantizer.sums.copy_(quantizer.codebook)
    x = torch.randn(50, 4, dtype=torch.float64)
    books, groups = [book.detach().clone() for book in quantizer.stage_list()], options.get("groups", 1)
    indices = quantizer(x).indices.view(50, groups, 3)
    rows = x.view(50, groups, -1)
    after = [book.detach().view(groups, 6, -1) for book in quantizer.stage_list()]
    left, residuals = rows, []
    for q, book in enumerate(books):
        residuals.append(left)
        chosen = torch.stack([book.view(groups, 6, -1)[g][indices[:, g, q]] for g in range(groups)], 1)
        left = left - chosen
    for q in range(1 if "shared_codebook" in options else 3):
        pool = torch.cat(residuals) if "shared_codebook" in options else residuals[q]
        for g in range(groups):
            dead = ~torch.isin(torch.arange(6), indices[:, g] if "shared_codebook" in options else indices[:, g, q])
            assert dead.any()
            moved = after[q][g][dead]
            distance = (moved.unsqueeze(1) - pool[:, g]).abs().amax(-1).amin(-1)
            assert (distance < 1e-9).all()


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_stages_that_are_not_used_are_not_learned(learning):
    quantizer = residual_vq(6, 4, 3, learning=learning, decay=0.5, revive_below=0.9)
    before = [book.detach().clone() for book in quantizer.stage_list()]
    x = torch.randn(5, 10, 4, dtype=torch.float64)
    out = quantizer(x, stages=2)
    assert (out.indices[..., 2] == -1).all()
    torch.testing.assert_close(out.quantized, stages_by_hand(x, before[:2])[0])
    assert torch.equal(quantizer.stage_list()[2], before[2])
    assert torch.equal(quantizer.usage[12:], torch.ones(6, dtype=torch.float64))
    each = torch.randint(0, 4, (5, 10))
    indices = quantizer.eval()(x, stages=each).indices
    assert torch.equal((indices >= 0).sum(-1), each)
    torch.testing.assert_close(quantizer.decode(indices), quantizer(x, stages=each).quantized)
    assert torch.equal(quantizer.encode(x, stages=1), quantizer(x, stages=1).indices)


def test_quantizer_dropout_keeps_a_random_prefix_of_each_entry():
    quantizer = residual_vq(
        6,
        4,
        8,
        quantize_dropout=True,
        quantize_dropout_cutoff_index=2,
        quantize_dropout_multiple_of=2,
        channel_first=True,
    )
    indices = quantizer(torch.randn(200, 4, 3, dtype=torch.float64)).indices
    kept = (indices >= 0).sum(-1)
    assert (kept == kept[:, :1]).all()
    # At least 3 stages, 4 after rounding up, and 3..8 become 4, 4, 6, 6, 8, 8.
    assert set(kept[:, 0].tolist()) == {4, 6, 8}
    assert (indices.sort(-1, descending=True).values.eq(-1) == indices.eq(-1)).all()
    assert (quantizer.eval()(torch.randn(2, 4, 3, dtype=torch.float64)).indices >= 0).all()


def test_a_wider_beam_leaves_no_more():
    quantizer = residual_vq(16, 4, 4, beam_size=8).eval()
    x = torch.randn(300, 4, dtype=torch.float64)
    wide = (quantizer(x).quantized - x).square().sum(-1)
    quantizer.beam_size = 1
    narrow = (quantizer(x).quantized - x).square().sum(-1)
    assert wide.mean() < 0.8 * narrow.mean()


def test_masks_projections_and_channels():
    quantizer = residual_vq(6, 8, 3, codebook_dim=4, channel_first=True, learning="gradient").eval()
    x = torch.randn(2, 8, 5, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    out = quantizer(x, lengths=torch.tensor([5, 2]))
    rows = x.movedim(1, -1)
    quantized, indices, errors = stages_by_hand(quantizer.layout.project_in(rows), quantizer.stage_list())
    assert torch.equal(out.indices, indices.masked_fill(~mask.unsqueeze(-1), -1))
    expected = quantizer.layout.project_out(quantized).masked_fill(~mask.unsqueeze(-1), 0.0)
    torch.testing.assert_close(out.quantized, expected.movedim(-1, 1))
    torch.testing.assert_close(quantizer.decode(out.indices), out.quantized)
    assert (quantizer(x, stages=0).quantized == 0).all()
    torch.testing.assert_close(out.loss, 1.25 * errors.sum(-1)[mask].mean())


@pytest.mark.parametrize("sizes", [8, (8, 4)])
def test_kmeans_fits_every_stage_to_its_residuals(sizes):
    quantizer = residual_vq(sizes, 4, 2).eval()
    x = torch.randn(200, 4, dtype=torch.float64)
    quantizer.init_from(x, iterations=80)
    _, indices, errors = stages_by_hand(x, quantizer.stage_list())
    first, second = quantizer.stage_list()
    residual = x - first[indices[:, 0]]
    for code in range(len(second)):
        torch.testing.assert_close(second[code], residual[indices[:, 1] == code].mean(0))
    assert errors[:, 1].mean() < errors[:, 0].mean() < x.square().sum(-1).mean()


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((8, 4), {}, "num_quantizers"),
        (((8, 8), 4, 3), {}, "num_codes names 2 stages, num_quantizers is 3"),
        (((8, 4), 4), {"shared_codebook": True}, "shared_codebook"),
        ((8, 4, 2), {"quantize_dropout_cutoff_index": 2}, "quantize_dropout_cutoff_index"),
        ((8, 4, 2), {"quantize_dropout_multiple_of": 0}, "quantize_dropout_multiple_of"),
        ((8, 4, 2), {"beam_size": 0}, "beam_size"),
        ((8, 4, 2), {"gradient": "codebook"}, "gradient"),
        ((8, 4, 2), {"groups": 3}, "does not divide"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, options, match):
    with pytest.raises(ValueError, match=match):
        nn.ResidualVQ(*arguments, **options)
