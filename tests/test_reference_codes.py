"""The specification of codes and sparse codes, held against definitions, loops and brute force.

Nothing here may use another part of Isthmus as its oracle, as in test_reference.py.
"""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from isthmus import reference


def integers(*shape):
    """Float64 integers from -2 to 2, the same in every run."""
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randint(-2, 3, shape, generator=generator).double()


# codebook


def test_assign_equals_brute_force(rand):
    x, codebook = rand(5, 40, 3).detach(), rand(17, 3).detach()
    nearest = torch.cdist(x, codebook, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
    assert torch.equal(reference.vq_assign(x, codebook), nearest)


def test_assign_ties_go_to_the_lowest_index():
    # Small integers: every score is exact, and many codes are equally near.
    x, codebook = integers(300, 3), integers(40, 3)
    distance = (x[:, None] - codebook).square().sum(-1).tolist()
    assert reference.vq_assign(x, codebook).tolist() == [row.index(min(row)) for row in distance]


def test_nan_row_gets_index_0_and_error_nan(rand):
    x, codebook = rand(4, 3).detach(), rand(5, 3).detach()
    expected = reference.vq_quantize(x, codebook)
    x[2, 1] = torch.nan
    quantized, indices, error = reference.vq_quantize(x, codebook)
    assert indices[2] == 0 and error[2].isnan() and torch.equal(quantized[2], codebook[0])
    others = [0, 1, 3]
    for ours, theirs in zip((quantized, indices, error), expected, strict=True):
        assert torch.equal(ours[others], theirs[others])


def test_nan_code_never_wins(rand):
    x, codebook = rand(6, 3).detach(), rand(5, 3).detach()
    codebook[0, 0] = torch.nan
    assert torch.equal(reference.vq_assign(x, codebook), 1 + reference.vq_assign(x, codebook[1:]))


def test_quantize_values(rand):
    x, codebook = rand(2, 6, 3), rand(5, 3)
    quantized, indices, error = reference.vq_quantize(x, codebook)
    assert torch.equal(quantized, codebook[indices])
    assert torch.equal(indices, reference.vq_assign(x, codebook))
    torch.testing.assert_close(error, (x - codebook[indices]).square().sum(-1))


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_quantize_gradients_follow_the_stop_gradient_rule(rand, weight):
    x, codebook, pull = rand(6, 3), rand(5, 3), rand(6, 3).detach()
    quantized, indices, error = reference.vq_quantize(x, codebook, commitment_weight=weight)
    to_x, to_codebook = torch.autograd.grad(
        (quantized * pull).sum(), (x, codebook), retain_graph=True, allow_unused=True
    )
    assert torch.equal(to_x, pull) and to_codebook is None

    code = codebook[indices]
    loss = (x.detach() - code).square() + weight * (x - code.detach()).square()
    expected = torch.autograd.grad(loss.sum(-1).mean(), (x, codebook))
    gradients = torch.autograd.grad(error.mean(), (x, codebook), create_graph=True)
    torch.testing.assert_close(gradients, expected)
    # Second derivatives: 2 weight / N on x; the cross term is stopped.
    second = torch.autograd.grad(gradients[0].sum(), (x, codebook), allow_unused=True)
    torch.testing.assert_close(second[0], torch.full_like(x, 2 * weight / len(x)))
    assert second[1] is None


def test_squared_error_with_full_commitment_is_an_ordinary_function(rand):
    indices = torch.tensor([0, 2, 2, 4])
    assert gradcheck(lambda x, c: reference.vq_quantize(x, c, indices=indices)[2], (rand(4, 3), rand(5, 3)))


def test_metrics_and_best_codes_equal_a_loop(rand):
    x, codebook = rand(4, 3, 5).detach(), rand(4, 6, 5).detach()
    codebook[2, 3] = 0.0
    score = {
        "euclidean": lambda x, c: -((x - c) ** 2).sum().item(),
        "cosine": lambda x, c: (x @ c / c.norm()).item() if c.any() else 0.0,
        "inner_product": lambda x, c: (x @ c).item(),
    }
    for metric, of in score.items():
        found = reference.vq_assign(x, codebook, metric=metric, topk=4)
        for head in range(4):
            for row in range(3):
                scores = [of(x[head, row], c) for c in codebook[head]]
                assert found[head, row].tolist() == sorted(range(6), key=lambda k: -scores[k])[:4]
        assert torch.equal(reference.vq_assign(x, codebook, metric=metric), found[..., 0])


def test_rotation_is_the_rotation_that_takes_x_to_its_code(rand):
    x, code, pull = rand(7, 5), rand(7, 5).detach(), rand(7, 5).detach()
    rotated = reference.codebook.rotate(x, code)
    torch.testing.assert_close(rotated, code)
    to_x = torch.autograd.grad(rotated, x, pull)[0]
    for row in range(7):
        a, b = (t / t.norm() for t in (x[row].detach(), code[row]))
        # From a to b in their plane: exp of the angle times the generator b' a^T - a b'^T, with b' orthogonal to a.
        angle = torch.acos(a @ b)
        across = b - (a @ b) * a
        across = across / across.norm()
        turn = torch.linalg.matrix_exp(angle * (torch.outer(across, a) - torch.outer(a, across)))
        expected = code[row].norm() / x[row].norm() * turn.T @ pull[row]
        torch.testing.assert_close(to_x[row], expected.detach())


def test_update_equals_a_loop(rand):
    codebook, sums, batch_sums = (rand(6, 3).detach() for _ in range(3))
    usage, counts = rand(6).detach().abs() + 0.5, torch.tensor([3.0, 0, 5, 1, 0, 1]).double()
    usage[1] = 0.1
    candidates = rand(6, 3).detach()
    found = [codebook.clone(), usage.clone(), sums.clone()]
    reference.update_codebook_(*found, counts, batch_sums, decay=0.9, eps=0.01, candidates=candidates, revive_below=0.3)
    mean_hits = 10 / 6
    new_usage = [0.9 * usage[k].item() + 0.1 * counts[k].item() / mean_hits for k in range(6)]
    for k in range(6):
        if new_usage[k] < 0.3:
            expected = candidates[k], 1.0, candidates[k]
        else:
            total = 0.9 * sums[k] + 0.1 * batch_sums[k] / mean_hits
            smoothed = (new_usage[k] + 0.01) / (sum(new_usage) + 6 * 0.01) * sum(new_usage)
            expected = total / smoothed, new_usage[k], total
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f[k], torch.as_tensor(e).double())
    assert [k for k in range(6) if new_usage[k] < 0.3] == [1]


def test_code_statistics_equal_a_loop(rand):
    x, indices = rand(4, 5, 3).detach(), torch.randint(0, 6, (4, 5))
    counts, sums = reference.code_statistics(x, indices, 7)
    for code in range(7):
        rows = x[indices == code]
        assert counts[code] == len(rows)
        torch.testing.assert_close(sums[code], rows.sum(0))
    assert reference.code_statistics(x.bfloat16(), indices, 7)[1].dtype == torch.float32


# assignment


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "inner_product"])
def test_soft_assignment_by_definition(rand, metric):
    x, codebook, noise = rand(6, 3).detach(), rand(5, 3).detach(), rand(6, 5).detach()
    indices = torch.tensor([0, 4, 2, -1, 1, 1])
    score = {
        "euclidean": lambda a, b: -sum((s - t) ** 2 for s, t in zip(a, b, strict=True)),
        "cosine": lambda a, b: sum(s * t for s, t in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b)),
        "inner_product": lambda a, b: sum(s * t for s, t in zip(a, b, strict=True)),
    }[metric]
    options = {"metric": metric, "temperature": 0.6}
    logits = [[score(a, b) / 0.6 for b in codebook.tolist()] for a in x.tolist()]
    relaxed = [[(v + g) / 0.8 for v, g in zip(*pair, strict=True)] for pair in zip(logits, noise.tolist(), strict=True)]

    def probabilities(rows):
        return [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in rows]

    def means(rows):
        return torch.tensor(probabilities(rows), dtype=torch.float64) @ codebook

    p = probabilities(logits)
    entropy, usage = reference.vq_soft_statistics(x, codebook, **options)
    expected = [-sum(q * math.log(q) for q in row) for row in p]
    assert entropy.tolist() == pytest.approx(expected)
    assert usage.tolist() == pytest.approx([sum(column) / 6 for column in zip(*p, strict=True)])
    loss = reference.vq_cross_entropy(x, codebook, indices, **options).tolist()
    chosen_p = [1 if k < 0 else row[k] for row, k in zip(p, indices.tolist(), strict=True)]
    assert loss == pytest.approx([-math.log(q) for q in chosen_p])
    soft, chosen = reference.vq_soft_quantize(x, codebook, **options)
    torch.testing.assert_close(soft, means(logits))
    assert chosen.tolist() == [row.index(max(row)) for row in logits]
    soft, _ = reference.vq_soft_quantize(x, codebook, gumbel=True, relaxation=0.8, noise=noise, **options)
    torch.testing.assert_close(soft, means(relaxed))
    drawn = reference.vq_sample(x, codebook, noise=noise, **options)
    assert drawn.tolist() == [row.index(max(row)) for row in relaxed]


# sparse


def brute_topk(features, k):
    order = sorted(range(len(features)), key=lambda f: (-features[f], f))[:k]
    return [features[f] for f in order], order


@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("k", [1, 3, 12])
def test_topk_equals_brute_force_with_ties(activation, k):
    # Small integers: exact products, many ties, and rows with fewer than k positive features.
    x, weight, bias = integers(40, 3), integers(12, 3), integers(12)
    values, indices = reference.topk_encode(x, weight, bias, k, activation=activation)
    features = x @ weight.T + bias
    if activation == "relu":
        features = features.clamp(min=0)
    for row, found, chosen in zip(features.tolist(), values.tolist(), indices.tolist(), strict=True):
        assert (found, chosen) == brute_topk(row, k)


def test_topk_row_with_one_nan_feature_is_nan_throughout(rand):
    x, weight = rand(3, 4).detach(), rand(6, 4).detach()
    weight[4, 0] = 0
    expected = reference.topk_encode(x, weight, None, 2)
    x[1, 0] = torch.inf  # feature 4 becomes inf * 0
    values, indices = reference.topk_encode(x, weight, None, 2)
    assert values[1].isnan().all() and (indices[1] == 0).all()
    for ours, theirs in zip((values, indices), expected, strict=True):
        assert torch.equal(ours[::2], theirs[::2])


def test_topk_gradients(rand):
    inputs = rand(2, 5, 4), rand(9, 4), rand(9)
    indices = reference.topk_encode(*inputs, 3)[1]

    def values(*inputs):
        return reference.topk_encode(*inputs, 3, indices=indices)[0]

    assert torch.equal(values(*inputs), reference.topk_encode(*inputs, 3)[0])
    assert gradcheck(values, inputs) and gradgradcheck(values, inputs)


def test_relu_gradient_is_0_at_0():
    x = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor([[0.0], [1.0]], requires_grad=True)
    values, _ = reference.topk_encode(x, weight, None, 2)
    values.sum().backward()
    assert values.tolist() == [[1.0, 0.0]]
    assert weight.grad.tolist() == [[0.0], [1.0]] and x.grad.tolist() == [[1.0]]


def test_sparse_decode_equals_the_dense_product(rand):
    values, weight, bias = rand(2, 5, 3), rand(7, 4), rand(4)
    indices = torch.tensor([[0, 3, 6], [2, 2, 5], [1, 1, 1], [6, 5, 4], [0, 0, 3]]).expand(2, 5, 3)
    dense = torch.zeros(2, 5, 7, dtype=torch.float64).scatter_add(-1, indices, values)
    out = reference.sparse_decode(values, indices, weight, bias)
    torch.testing.assert_close(out, dense @ weight + bias)

    def decode(values, weight, bias):
        return reference.sparse_decode(values, indices, weight, bias)

    assert gradcheck(decode, (values, weight, bias))
    assert gradgradcheck(decode, (values, weight, bias))
