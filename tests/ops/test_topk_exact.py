"""Top-k encoding is exact: against float64, on data made to defeat the screen, at every level."""

import pytest
import torch

import isthmus
from isthmus import ops

ROWS, DIM, FEATURES, K = 3200, 48, 768, 16


def random():
    return torch.randn(ROWS, DIM), torch.randn(FEATURES, DIM), 0.1 * torch.randn(FEATURES)


def clustered():
    """Rows and features close to a few directions: many scores are almost equal."""
    centers = 3 * torch.randn(8, DIM)
    x = centers[torch.randint(8, (ROWS,))] + 0.01 * torch.randn(ROWS, DIM)
    return x, centers[torch.randint(8, (FEATURES,))] + 1e-4 * torch.randn(FEATURES, DIM), None


def duplicated():
    weight = torch.randn(FEATURES // 6, DIM)[torch.randint(FEATURES // 6, (FEATURES,))]
    return torch.randn(ROWS, DIM), weight, None


def nearly_tied():
    """Features that differ from each other by one unit of the last place, here and there."""
    weight = torch.randn(FEATURES // 16, DIM).repeat(16, 1)
    steps = torch.randint(-1, 2, weight.shape) * (torch.rand(weight.shape) < 0.1)
    return torch.randn(ROWS, DIM), (weight.view(torch.int32) + steps.int()).view(torch.float32), None


def of_all_sizes():
    """Lengths from 1e-30 to 1e30."""
    lengths = [10.0 ** torch.randint(-30, 31, (n, 1)) for n in (ROWS, FEATURES)]
    return (torch.randn(ROWS, DIM) * lengths[0], torch.randn(FEATURES, DIM) * lengths[1], None)


def subnormal():
    return torch.randn(ROWS, DIM) * 1e-25, torch.randn(FEATURES, DIM) * 1e-18, None


def negative():
    return torch.randn(ROWS, DIM), torch.randn(FEATURES, DIM), torch.full((FEATURES,), -40.0)


def hot():
    """Some features are always on."""
    bias = torch.zeros(FEATURES)
    bias[torch.randperm(FEATURES)[:30]] = 1000
    return torch.randn(ROWS, DIM), torch.randn(FEATURES, DIM), bias


def one_long_component():
    """As in the residual stream of language models: too uneven for bytes."""
    x = torch.randn(ROWS, DIM)
    x[:, 5] *= 3000
    return x, torch.randn(FEATURES, DIM), None


def worst_for_bytes():
    """Components halfway between two integers of the unit, and errors of one sign."""
    steps = torch.randint(0, 127, (ROWS + FEATURES, DIM)).float() + 0.4999
    steps[:, 0] = 127
    return steps[:ROWS], steps[ROWS:] / 127, None


def broken():
    """Rows that are not finite, and features with infinite bias, among others."""
    x, weight, bias = random()
    x[::50, 3], x[1::50, 3] = torch.nan, torch.inf
    weight[::40] = 0
    bias[::7], bias[100] = -torch.inf, torch.inf
    return x, weight, bias


KINDS = (
    random, clustered, duplicated, nearly_tied, of_all_sizes, subnormal, negative, hot, one_long_component,
    worst_for_bytes, broken,
)  # fmt: skip


def float64_scores(x, weight, bias):
    scores = x.double() @ weight.double().T
    return scores if bias is None else scores + bias.double()


def check_exact(x, weight, bias, activation, values, indices):
    """Row by row the selection is that of float64, up to the rounding of float64 itself."""
    scores = float64_scores(x, weight, bias)
    whole = ~scores.isnan().any(1)
    assert values[~whole].isnan().all()
    assert (indices[~whole] == 0).all()
    scores, values, indices = scores[whole], values[whole], indices[whole]
    ranks = scores.relu() if activation == "relu" else scores.abs() if activation == "abs" else scores
    slack = 1e-14 * (x.double()[whole].norm(dim=1) * weight.double().norm(dim=1).max()).unsqueeze(1)
    found = ranks.gather(1, indices)
    best = ranks.topk(values.shape[1]).values
    assert ((found == best) | ((found - best).abs() <= slack)).all()
    assert all(torch.equal(i.unique(), i.sort().values) for i in indices[::97])
    chosen = found if activation == "relu" else scores.gather(1, indices)
    assert ((values == chosen.float()) | ((values.double() - chosen).abs() <= slack + 6e-8 * chosen.abs())).all()


def check_every_level(x, weight, bias, k, activation):
    """Exact at the best level, and equal bits at the others, wherever they cut and whatever they screen with."""
    levels = isthmus.build_info()["isa_available"]
    results = []
    for level in levels:
        isthmus.set_isa(level)
        results.append(ops.topk_encode(x, weight, bias, k, activation=activation))
    check_exact(x, weight, bias, activation, *results[-1])
    for level, (values, indices) in zip(levels, results, strict=True):
        assert torch.equal(indices, results[-1][1]), level
        assert torch.equal(values.nan_to_num(), results[-1][0].nan_to_num()), level


@pytest.mark.parametrize("activation", ("relu", "identity", "abs"))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_exact_at_every_level(kind, activation):
    """105600 rows in all."""
    check_every_level(*kind(), K, activation)


@pytest.mark.parametrize("rows, k", ((1, K), (11, 100), (500, 200)), ids=("one row", "few rows", "many features"))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_few_rows_and_many_features(kind, rows, k):
    """Few rows meet the weights as they lie; where a quarter of the features is wanted, each meets a block of rows."""
    x, weight, bias = kind()
    for activation in ("relu", "identity", "abs"):
        check_every_level(x[2 : 2 + rows], weight, bias, k, activation)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("kind", (random, clustered, duplicated, hot, broken), ids=lambda kind: kind.__name__)
def test_other_types_agree_at_every_level(kind, dtype):
    x, weight, bias = (None if t is None else t[:800].to(dtype) for t in kind())
    results = []
    for level in isthmus.build_info()["isa_available"]:
        isthmus.set_isa(level)
        results.append(ops.topk_encode(x, weight, bias, K, activation="identity"))
    for values, indices in results:
        assert torch.equal(indices, results[0][1])
        assert torch.equal(values.nan_to_num(), results[0][0].nan_to_num())
    if dtype != torch.float64:  # products and short sums of halves are exact in float64
        expected = float64_scores(x, weight, bias).sort(dim=1, descending=True, stable=True)
        whole = ~expected.values.isnan().any(1)
        assert (expected.values[whole, :K].to(dtype) == results[0][0][whole]).float().mean() > 0.9999


@pytest.mark.parametrize("kind", (random, nearly_tied, broken), ids=lambda kind: kind.__name__)
def test_threads_do_not_matter(kind):
    x, weight, bias = kind()
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(ops.topk_encode(x, weight, bias, K))
    for values, indices in results:
        assert torch.equal(indices, results[0][1])
        assert torch.equal(values.nan_to_num(), results[0][0].nan_to_num())


def test_several_batches_of_rows_and_chunks_of_features(isa):
    """More rows and features than are worked on at once."""
    x, weight = torch.randn(9000, 272), torch.randn(13000, 272)
    values, indices = ops.topk_encode(x, weight, None, 8)
    sample = torch.arange(0, 9000, 41)
    best = (x[sample].double() @ weight.double().T).topk(8)
    assert torch.equal(indices[sample], best.indices)
    assert torch.equal(values[sample], best.values.float())
