"""The options of ResidualVQ, and ResidualSimVQ, against loops over stages in float64."""

import pytest
import torch
from torch.nn.functional import normalize

from isthmus import nn, ops, random


def residual_vq(*args, make=nn.ResidualVQ, **options):
    torch.manual_seed(0)
    return make(*args, **options).double()


def by_direction(rows, books):
    """Indices, sum of codes and squared errors where every stage takes the code of the largest cosine."""
    residual, indices, errors = rows, [], []
    for book in books:
        index = (normalize(residual, dim=-1) @ normalize(book, dim=-1).T).argmax(-1)
        residual = residual - book[index]
        indices.append(index)
        errors.append(residual.square().sum(-1))
    return torch.stack(indices, -1), rows - residual, torch.stack(errors, -1)


# ---- cosine ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"shared_codebook": True}])
def test_cosine_looks_for_directions_and_subtracts_codes(options):
    quantizer = residual_vq(9, 6, 3, metric="cosine", **options).eval()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    indices, quantized, errors = by_direction(x, quantizer.stage_list())
    out = quantizer(x)
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.quantized, quantized)
    torch.testing.assert_close(out.loss, 0.25 * errors.sum(-1).mean())
    assert torch.equal(quantizer.encode(x), indices)
    assert torch.equal(quantizer.encode(x, stages=2), torch.where(torch.arange(3) < 2, indices, -1))
    torch.testing.assert_close(quantizer.decode(indices), quantized)
    assert not torch.equal(indices, nn.ResidualVQ.encode(residual_vq(9, 6, 3, **options), x))


def test_cosine_of_groups_masks_and_fewer_stages():
    quantizer = residual_vq((9, 5), 8, make=nn.GroupedResidualVQ, groups=2, metric="cosine").eval()
    x, mask = torch.randn(4, 5, 8, dtype=torch.float64), torch.rand(4, 5) < 0.7
    books = quantizer.stage_list()
    by_group = [by_direction(part, [book[g] for book in books]) for g, part in enumerate(x.chunk(2, -1))]
    indices, quantized, errors = (torch.stack(parts, -2) for parts in zip(*by_group, strict=True))
    x[~mask] = torch.nan
    out = quantizer(x, mask=mask)
    assert torch.equal(out.indices, indices.masked_fill(~mask.view(4, 5, 1, 1), -1))
    torch.testing.assert_close(out.quantized, quantized.flatten(-2).masked_fill(~mask.unsqueeze(-1), 0.0))
    torch.testing.assert_close(out.loss, 0.25 * errors.sum(-1)[mask].mean())
    stages = torch.randint(0, 3, (4, 5))
    kept = torch.arange(2) < stages.view(4, 5, 1, 1)
    assert torch.equal(quantizer(x.nan_to_num(), stages=stages).indices >= 0, kept.expand(4, 5, 2, 2))
    with pytest.raises(ValueError, match="stages must be 0 to 2"):
        quantizer(x, stages=3)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_cosine_passes_gradients_as_the_fused_search_does(gradient):
    quantizer = residual_vq(9, 6, 3, metric="cosine", learning="gradient", gradient=gradient, revive_below=0.0)
    x = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(20, 6, dtype=torch.float64)
    out = quantizer(x)
    actual = torch.autograd.grad(out.loss + (out.quantized * direction).sum(), (x, quantizer.codebook))

    residual = x
    total = quantizer.get_codes(out.indices).sum(-2).detach()
    single = ops.vq_quantize(x, total, indices=torch.arange(20), gradient=gradient)[0]
    expected = (single * direction).sum()
    for q, book in enumerate(quantizer.stage_list()):
        code = book[out.indices[:, q]]
        expected = expected + (residual.detach() - code).square().sum(-1).mean()
        expected = expected + 0.25 * (residual - code.detach()).square().sum(-1).mean()
        residual = residual - code.detach()
    torch.testing.assert_close(actual, torch.autograd.grad(expected, (x, quantizer.codebook)))


def test_cosine_codes_become_the_means_of_their_residuals():
    quantizer = residual_vq(5, 3, 2, metric="cosine", decay=0.0, revive_below=0.0)
    books, x = [book.clone() for book in quantizer.stage_list()], torch.randn(60, 3, dtype=torch.float64)
    indices, _, _ = by_direction(x, books)
    quantizer(x)
    for q, rows in enumerate([x, x - books[0][indices[:, 0]]]):
        for k in indices[:, q].unique():
            torch.testing.assert_close(quantizer.stage_list()[q][k], rows[indices[:, q] == k].mean(0))


def test_cosine_of_an_empty_batch():
    out = residual_vq(7, 6, 2, metric="cosine")(torch.randn(3, 0, 6, dtype=torch.float64))
    assert out.quantized.shape == (3, 0, 6)
    assert out.indices.shape == (3, 0, 2)


# ---- directional, beams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [9, (9, 5, 7)])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_directional_step_goes_to_the_sum_of_codes(metric, sizes):
    options = {"learning": "gradient", "gradient": "directional", "directional_variance": 0.3, "revive_below": 0.0}
    quantizer = residual_vq(sizes, 4, 3, metric=metric, commitment_weight=0.5, **options)
    x = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    out = quantizer(x)
    assert torch.equal(out.indices, quantizer.encode(x))
    torch.manual_seed(5)
    noise = 0.3**0.5 * ops.gaussian_noise(random.key(), (20, 4), torch.float64)
    books = [book.detach().requires_grad_() for book in quantizer.stage_list()]
    total = torch.stack([book[index] for book, index in zip(books, out.indices.T, strict=True)]).sum(0)
    aim = (total - x + noise).detach()
    expected = x + (total - x).norm(dim=-1, keepdim=True) * aim / aim.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(out.quantized, expected)
    direction = torch.randn_like(expected)
    to_x, to_codebook = torch.autograd.grad((out.quantized * direction).sum(), (x, quantizer.codebook))
    to_x_too, *to_books = torch.autograd.grad((expected * direction).sum(), (x, *books))
    torch.testing.assert_close(to_x, to_x_too)
    torch.testing.assert_close(to_codebook, torch.cat(to_books))
    residual, errors = x.detach(), 0.0
    for book, index in zip(books, out.indices.T, strict=True):
        residual = residual - book[index]
        errors = errors + residual.square().sum(-1).mean()
    torch.testing.assert_close(out.loss, 0.5 * errors)
    assert torch.autograd.grad(out.loss, quantizer.codebook, allow_unused=True) == (None,)
    torch.testing.assert_close(quantizer.eval()(x).quantized, total)


def test_evaluation_may_search_with_a_wider_beam():
    quantizer = residual_vq(16, 4, 4, eval_beam_size=8, freeze_codebook=True)
    twin = residual_vq(16, 4, 4, beam_size=8, freeze_codebook=True)
    x = torch.randn(300, 4, dtype=torch.float64)
    narrow, encoded, wide = quantizer(x).indices, quantizer.encode(x), quantizer.eval()(x).indices
    assert not torch.equal(narrow, wide)
    assert torch.equal(wide, twin(x).indices)
    assert torch.equal(wide, encoded)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_stages_draw_codes_by_what_is_left(metric):
    quantizer = residual_vq(4, 2, 2, metric=metric, sample_temperature=0.7, freeze_codebook=True, eval_beam_size=1)
    row, books = torch.randn(2, dtype=torch.float64), quantizer.stage_list()
    out = quantizer(row.expand(20000, 2))
    torch.testing.assert_close(out.quantized, quantizer.decode(out.indices))

    def probabilities(residual, book):
        cosine = normalize(residual, dim=-1) @ normalize(book, dim=-1).T
        score = cosine if metric == "cosine" else -(residual - book).square().sum(-1)
        return (score / 0.7).softmax(-1)

    first = probabilities(row, books[0])
    expected = torch.stack([p * probabilities(row - c, books[1]) for p, c in zip(first, books[0], strict=True)])
    frequency = (4 * out.indices[:, 0] + out.indices[:, 1]).bincount(minlength=16).view(4, 4) / 20000
    torch.testing.assert_close(frequency.double(), expected, rtol=0.0, atol=0.02)
    nearest = quantizer.encode(row.expand(100, 2))
    assert nearest.unique(dim=0).shape == (1, 2)
    assert torch.equal(quantizer.eval()(row.expand(100, 2)).indices, nearest)


def test_codes_that_were_drawn_are_learned_from_but_not_beyond_their_mask():
    quantizer = residual_vq(4, 3, 2, sample_temperature=5.0, decay=0.0, revive_below=0.0, groups=1)
    books, x = [book.clone() for book in quantizer.stage_list()], torch.randn(40, 3, dtype=torch.float64)
    mask = torch.arange(40) < 30
    indices = quantizer(x, mask=mask).indices
    assert (indices[30:] == -1).all()
    assert (indices[:30] >= 0).all()
    for q, rows in enumerate([x, x - books[0][indices[:, 0]]]):
        for k in indices[:30, q].unique():
            torch.testing.assert_close(quantizer.stage_list()[q][k], rows[:30][indices[:30, q] == k].mean(0))


# ---- codebooks behind layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "options"), [(9, {}), (9, {"shared_codebook": True}), ((9, 5, 7), {}), (9, {"groups": 2})]
)
def test_residual_simvq_quantizes_with_codes_behind_layers(sizes, options):
    quantizer = residual_vq(sizes, 6, 3, make=nn.ResidualSimVQ, commitment_weight=0.4, **options)
    stored = {name: value.clone() for name, value in quantizer.named_buffers()}
    groups = options.get("groups", 1)
    size = 6 // groups
    x = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    out = quantizer(x)
    books = nn.ResidualVQ.stage_list(quantizer)
    books = [book.view(groups, -1, size) for book in books]
    weight, expected, total = quantizer.weight.view(3, groups, size, size), 0.0, []
    for g, rows in enumerate(x.view(20, groups, size).unbind(1)):
        residual = rows
        for q in range(3):
            codes = torch.einsum("kd,ed->ke", books[q][g], weight[q, g])
            index = (residual.unsqueeze(1) - codes).square().sum(-1).argmin(-1)
            assert torch.equal(out.indices.view(20, groups, 3)[:, g, q], index)
            error = (residual.detach() - codes[index]).square().sum(-1).mean()
            error = error + 0.4 * (residual - codes[index].detach()).square().sum(-1).mean()
            expected, residual = expected + error / groups, residual - codes[index].detach()
        total.append(rows - residual)
    torch.testing.assert_close(out.quantized, torch.cat(total, -1))
    torch.testing.assert_close(quantizer.decode(out.indices), out.quantized)
    torch.testing.assert_close(out.loss, expected)
    variables = x, quantizer.weight
    torch.testing.assert_close(torch.autograd.grad(out.loss, variables), torch.autograd.grad(expected, variables))
    assert [name for name, _ in quantizer.named_parameters()] == ["weight"]
    assert torch.equal(quantizer.codebook, stored["codebook"])


def test_residual_simvq_that_is_frozen_or_asked_for_kmeans():
    quantizer = residual_vq(9, 6, 3, make=nn.ResidualSimVQ, freeze_codebook=True)
    out = quantizer(torch.randn(20, 6, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.grad(out.loss, quantizer.weight, allow_unused=True) == (None,)
    with pytest.raises(ValueError, match="init_from"):
        quantizer.init_from(torch.randn(40, 6))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"metric": "l1"}, "metric"),
        ({"metric": "cosine", "beam_size": 2}, "without a beam"),
        ({"metric": "cosine", "eval_beam_size": 2}, "without a beam"),
        ({"eval_beam_size": 0}, "eval_beam_size"),
        ({"gradient": "gumbel"}, "gradient must be one of"),
        ({"directional_variance": -1.0}, "directional_variance"),
        ({"sample_temperature": -1.0}, "sample_temperature"),
        ({"sample_temperature": 1.0, "gradient": "rotation"}, "rotation"),
        ({"sample_temperature": 1.0, "beam_size": 3}, "eval_beam_size=3"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        nn.ResidualVQ(8, 4, 2, **options)
