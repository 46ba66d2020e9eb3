"""The best code of each vector and the best vector of each code, from one screen: as exact as two searches."""

import pytest
import torch
from checks import extra_memory, measures_memory
from torch import Tensor

import isthmus
from isthmus import ops, reference

METRICS = ("euclidean", "cosine", "inner_product")
every_metric = pytest.mark.parametrize("metric", METRICS)

Problem = tuple[Tensor, Tensor]


def normal(rows: int, codes: int, dim: int) -> Problem:
    return torch.randn(rows, dim), torch.randn(codes, dim)


def clustered(rows: int, codes: int, dim: int) -> Problem:
    """All vectors much nearer to each other than to the origin."""
    x, codebook = normal(rows, codes, dim)
    return 3 + 1e-2 * x, 3 + 1e-2 * codebook


def duplicated(rows: int, codes: int, dim: int) -> Problem:
    """Every vector and every code several times: the first must win."""
    x, codebook = normal(rows, codes, dim)
    return x[: rows // 5].repeat(6, 1)[:rows], codebook[: codes // 4].repeat(5, 1)[:codes]


def near_ties(rows: int, codes: int, dim: int) -> Problem:
    """Vectors halfway between two codes, and codes halfway between two vectors, but for the last bit."""
    x, codebook = normal(rows, codes, dim)

    def halfway(ends: Tensor, count: int) -> Tensor:
        a, b = torch.randint(len(ends), (2, count))
        middle = 0.5 * (ends[a] + ends[b])
        place = torch.randint(dim, (count, 1))
        return middle.scatter(1, place, torch.nextafter(middle.gather(1, place), torch.randn(count, 1)))

    x[rows // 2 :] = halfway(codebook[: codes // 2], rows - rows // 2)
    codebook[codes // 2 :] = halfway(x[: rows // 2], codes - codes // 2)
    return x, codebook


def wild_norms(rows: int, codes: int, dim: int) -> Problem:
    """A few vectors and codes shorter or longer than others by up to 30 orders of magnitude, and zeros."""
    x, codebook = normal(rows, codes, dim)
    for t in (x, codebook):
        t[::7] *= 10 ** (60 * torch.rand(len(t[::7]), 1) - 30)
        t[5::50] = 0
    return x, codebook


def ever_nearer(rows: int, codes: int, dim: int) -> Problem:
    """Every vector is nearer to every code than those before it."""
    x, codebook = normal(rows, codes, dim)
    return x * torch.linspace(20, 0.1, rows).unsqueeze(1), codebook


KINDS = (normal, clustered, duplicated, near_ties, wild_norms, ever_nearer)


def score(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    x, codebook = x.double(), codebook.double()
    if metric == "euclidean":
        return -torch.stack([(x - code).square_().sum(1) for code in codebook], 1)
    lengths = codebook.norm(dim=1)
    return x @ codebook.t() / torch.where((lengths == 0) | (metric == "inner_product"), 1.0, lengths)


def check_best(x: Tensor, codebook: Tensor, metric: str, found: Tensor) -> None:
    """No code beats the one found by more than float64 may be wrong."""
    exact = score(x, codebook, metric)
    gap = exact.max(1).values - exact.gather(1, found[:, None])[:, 0]
    size = x.double().norm(dim=1) * (codebook.double().norm(dim=1).max() if metric == "inner_product" else 1.0)
    size = exact.max(1).values.abs() if metric == "euclidean" else size
    assert (gap <= size * (x.shape[1] + 4) * 2.0**-50).all()


@every_metric
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("shape", [(1500, 64, 6), (2100, 2050, 40), (600, 150, 130)], ids=str)
def test_both_are_those_of_float64(shape, kind, metric):
    """At every level the same, and bit for bit the answer of two searches."""
    x, codebook = kind(*shape)
    expected = None
    for level in isthmus.build_info()["isa_available"]:
        isthmus.set_isa(level)
        nearest_code, nearest_row = ops.vq_match(x, codebook, metric=metric)
        assert torch.equal(nearest_code, ops.vq_assign(x, codebook, metric=metric)), level
        assert torch.equal(nearest_row, ops.vq_assign(codebook, x, metric=metric)), level
        assert expected is None or all(map(torch.equal, (nearest_code, nearest_row), expected)), level
        expected = nearest_code, nearest_row
    check_best(x, codebook, metric, nearest_code)
    check_best(codebook, x, metric, nearest_row)
    if kind is duplicated:
        assert nearest_code.max() < shape[1] // 4 and nearest_row.max() < shape[0] // 5


@every_metric
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 40, 3), (40, 1, 3), (7, 5, 0), (100, 301, 17), (310, 100, 70)], ids=str
)
def test_every_shape_and_type(shape, dtype, metric, isa, device):
    rows, codes, dim = shape
    x, codebook = torch.randn(2, rows, dim, device=device), torch.randn(2, codes, dim, device=device)
    x, codebook = x.to(dtype), codebook.to(dtype)
    found = ops.vq_match(x, codebook, metric=metric)
    assert all(map(torch.equal, found, reference.vq_match(x, codebook, metric=metric)))
    for head in range(2):
        alone = ops.vq_match(x[head], codebook[head], metric=metric)
        assert torch.equal(found[0][head], alone[0]) and torch.equal(found[1][head], alone[1])
    strided = ops.vq_match(x.transpose(-1, -2).contiguous().transpose(-1, -2), codebook, metric=metric)
    assert all(map(torch.equal, strided, found))


@every_metric
def test_what_is_not_a_number(metric, isa, device):
    """A vector with NaN matches code 0 and comes last for every code; a code likewise."""
    x, codebook = torch.randn(500, 9, device=device), torch.randn(200, 9, device=device)
    expected = ops.vq_match(x[1:], codebook[1:], metric=metric)
    x[0, 3] = codebook[0, 4] = torch.nan
    nearest_code, nearest_row = ops.vq_match(x, codebook, metric=metric)
    assert nearest_code[0] == 0 and nearest_row[0] == 0
    assert torch.equal(nearest_code[1:], expected[0] + 1) and torch.equal(nearest_row[1:], expected[1] + 1)
    for result in ops.vq_match(torch.full_like(x, torch.nan), codebook, metric=metric):
        assert not result.any()


def test_infinities(isa, device):
    x, codebook = torch.randn(300, 6, device=device), torch.randn(100, 6, device=device)
    expected = ops.vq_match(x, codebook)
    far = torch.full((1, 6), torch.inf, device=device)
    found = ops.vq_match(torch.cat([x, far, -far]), torch.cat([codebook, far]))
    assert torch.equal(found[0][:300], expected[0]) and torch.equal(found[1][:100], expected[1])


@every_metric
@pytest.mark.parametrize("kind", [normal, ever_nearer], ids=lambda kind: kind.__name__)
def test_threads_and_roles_do_not_matter(kind, metric):
    x, codebook = kind(1500, 600, 40)
    torch.set_num_threads(1)
    expected = ops.vq_match(x, codebook, metric=metric)
    for threads in (2, 7):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, ops.vq_match(x, codebook, metric=metric), expected))
        assert all(map(torch.equal, ops.vq_match(codebook, x, metric=metric), expected[::-1]))


@measures_memory
def test_memory_stays_linear():
    """The scores of this call would take 800 MB; what every thread keeps is counted by the smaller side."""
    x, codebook = torch.randn(50_000, 8), torch.randn(4000, 8)
    torch.set_num_threads(2)
    for a, b in ((x, codebook), (codebook, x)):
        assert extra_memory(lambda a=a, b=b: ops.vq_match(a, b), lambda a=a, b=b: ops.vq_match(a[:500], b[:500])) < 8e6


@pytest.mark.parametrize(
    ("x", "codebook", "message"),
    [
        ((4, 3), (2, 5, 3), r"x has shape \[4, 3\]; expected \[2, ..., 3\]"),
        ((2, 4, 1, 3), (2, 5, 3), r"x has shape \[2, 4, 1, 3\]; expected 3 dimensions, as codebook has shape"),
        ((2, 4, 3), (5, 3), r"x has shape \[2, 4, 3\]; expected 2 dimensions, as codebook has shape \[5, 3\]"),
        ((0, 3), (5, 3), r"x has shape \[0, 3\], N = 0; expected 1 <= N <="),
        ((4, 3), (0, 3), r"codebook has shape \[0, 3\], K = 0; expected 1 <= K <="),
    ],
    ids=str,
)
def test_bad_shapes(x, codebook, message):
    with pytest.raises(RuntimeError, match=message):
        ops.vq_match(torch.zeros(x), torch.zeros(codebook))
