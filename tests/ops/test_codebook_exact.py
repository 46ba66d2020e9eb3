"""The nearest code is exact: a million rows, most of them made to mislead a screen, against float64."""

import pytest
import torch
from torch import Tensor

import isthmus
from isthmus import ops

Problem = tuple[Tensor, Tensor]


def normal(rows: int, codes: int, dim: int) -> Problem:
    return torch.randn(rows, dim), torch.randn(codes, dim)


def clustered(rows: int, codes: int, dim: int) -> Problem:
    """Codes much nearer to each other than to the origin."""
    x, codebook = normal(rows, codes, dim)
    center = torch.randn(dim)
    return center + 1e-2 * x, center + 1e-2 * codebook


def duplicated(rows: int, codes: int, dim: int) -> Problem:
    """Every code four times: the first must win."""
    x, codebook = normal(rows, codes, dim)
    return x, codebook[: codes // 4].repeat(4, 1)


def huge_norms(rows: int, codes: int, dim: int) -> Problem:
    """A few codes, and a few rows, are longer than others by up to 30 orders of magnitude."""
    x, codebook = normal(rows, codes, dim)
    codebook[::7] *= 10 ** (30 * torch.rand(len(codebook[::7]), 1))
    x[::11] *= 10 ** (8 * torch.rand(len(x[::11]), 1))
    return x, codebook


def tiny_norms(rows: int, codes: int, dim: int) -> Problem:
    """Rows and codes down to where float32 has no normal numbers left."""
    x, codebook = normal(rows, codes, dim)
    return x * 10 ** (-42 * torch.rand(rows, 1)), codebook * 10 ** (-42 * torch.rand(codes, 1))


def near_ties(rows: int, codes: int, dim: int) -> Problem:
    """Rows halfway between two codes, give or take the last bit of one component."""
    codebook = torch.randn(codes, dim)
    a, b = torch.randint(codes, (2, rows))
    x = 0.5 * (codebook[a] + codebook[b])
    place = torch.randint(dim, (rows, 1))
    x.scatter_(1, place, torch.nextafter(x.gather(1, place), torch.randn(rows, 1)))
    return x, codebook


def neighbouring_floats(rows: int, codes: int, dim: int) -> Problem:
    """Codes that differ by the last bit of a few components."""
    codebook = torch.randn(1, dim).repeat(codes, 1)
    moved = torch.rand(codes, dim) < 0.3
    codebook[moved] = torch.nextafter(codebook, torch.randn(codes, dim))[moved]
    return codebook[torch.randint(codes, (rows,))] + 1e-4 * torch.randn(rows, dim), codebook


def collapsed(rows: int, codes: int, dim: int) -> Problem:
    """Three codes, in any order, are all there is."""
    return torch.randn(rows, dim), torch.randn(3, dim)[torch.randint(3, (codes,))]


def tight_clusters(rows: int, codes: int, dim: int) -> Problem:
    """The codes of a cluster are nearer to each other than a coarse screen can see."""
    x, codebook = normal(rows, codes, dim)
    centers = torch.randn(8, dim)
    return centers[torch.randint(8, (rows,))] + 1e-3 * x, centers[torch.randint(8, (codes,))] + 1e-3 * codebook


KINDS = (
    normal,
    clustered,
    duplicated,
    huge_norms,
    tiny_norms,
    near_ties,
    neighbouring_floats,
    collapsed,
    tight_clusters,
)


def scores(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """In float64, code by code, and a few rows at a time, which stay in cache."""
    columns = []
    for code in codebook:
        product = -(x - code).square_().sum(1) if metric == "euclidean" else x @ code
        length = code.square().sum().sqrt()
        columns.append(product if metric == "euclidean" or length == 0 else product / length)
    return torch.stack(columns, 1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "rows, codes, dim, metric",
    [
        (48_000, 64, 6, "euclidean"),
        (48_000, 64, 20, "euclidean"),
        (46_000, 64, 17, "cosine"),
        (1_000, 2100, 40, "euclidean"),  # large enough for the coarsest screen
        (1_000, 1100, 130, "cosine"),
        (1_000, 1100, 130, "euclidean"),  # long enough to rescore the best survivor first
    ],
)
def test_the_index_is_that_of_float64(kind, rows, codes, dim, metric):
    """A million rows in all. Where float64 itself cannot tell two codes apart, both are right."""
    x, codebook = kind(rows, codes, dim)
    exact = torch.cat([scores(part, codebook.double(), metric) for part in x.double().split(2000)])
    best = exact.max(1)
    found = {}
    for level in isthmus.build_info()["isa_available"]:
        isthmus.set_isa(level)
        found[level] = ops.vq_assign(x, codebook, metric=metric)
    index = found["baseline"]
    for level, other in found.items():
        assert torch.equal(index, other), f"{level} finds other codes than baseline"
    gap = best.values - exact.gather(1, index[:, None])[:, 0]
    size = best.values.abs() if metric == "euclidean" else x.double().norm(dim=1)
    assert (gap <= size * (dim + 4) * 2.0**-50).all()
    if kind is duplicated:
        assert index.max() < codes // 4
    if kind is collapsed:
        same = codebook.unique(dim=0, return_inverse=True)[1]
        first = torch.stack([(same == i).int().argmax() for i in range(3)])
        assert torch.equal(index, first[same[index]]), "a repetition of an earlier code"
    if kind in (normal, duplicated):
        assert torch.equal(index, exact.argmax(1))


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "inner_product"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_few_rows_find_what_many_find(kind, metric, isa):
    """They are compared with the codebook as it lies."""
    x, codebook = kind(60, 700, 33)
    for topk in (1, 3):
        few = [ops.vq_assign(part, codebook, metric=metric, topk=topk) for part in x.split(5)]
        assert torch.equal(torch.cat(few), ops.vq_assign(x, codebook, metric=metric, topk=topk))
