"""k-means: against scikit-learn, and what must hold exactly."""

import itertools
import math

import pytest
import torch

import isthmus
from isthmus import ops
from isthmus.clustering import kmeans

inits = pytest.mark.parametrize("init", ("random", "kmeans++"))


def blobs(clusters=8, per_cluster=60, dim=5, spread=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = 4 * torch.randn(clusters, 1, dim, generator=generator)
    return (centers + spread * torch.randn(clusters, per_cluster, dim, generator=generator)).flatten(0, 1)


def inertia(x, codebook, weights=None, metric="euclidean"):
    error = ops.vq_quantize(x.double(), codebook.double(), metric=metric)[2]
    return (error if weights is None else error * weights).sum().item()


@inits
def test_as_good_as_scikit_learn(init):
    cluster = pytest.importorskip("sklearn.cluster")
    x = torch.randn(900, 6, generator=torch.Generator().manual_seed(1))
    name = {"random": "random", "kmeans++": "k-means++"}[init]

    def theirs(seed):
        return cluster.KMeans(20, init=name, n_init=1, max_iter=20, tol=0, random_state=seed).fit(x.numpy()).inertia_

    ours = [inertia(x, kmeans(x, 20, iterations=20, init=init, key=isthmus.key(s))[0]) for s in range(10)]
    reference = [theirs(s) for s in range(10)]
    assert sum(ours) == pytest.approx(sum(reference), rel=0.03)
    assert min(ours) == pytest.approx(min(reference), rel=0.03)


def test_one_lloyd_step_is_that_of_scikit_learn():
    """From the same start, so many iterations give the same codes."""
    cluster = pytest.importorskip("sklearn.cluster")
    x = blobs().double()
    for iterations in (1, 4):
        start = kmeans(x, 12, iterations=1, key=isthmus.key(5))[0]
        theirs = cluster.KMeans(12, init=start.numpy(), n_init=1, max_iter=iterations, tol=0).fit(x.numpy())
        ours = kmeans(x, 12, iterations=1 + iterations, key=isthmus.key(5))[0]
        torch.testing.assert_close(ours, torch.from_numpy(theirs.cluster_centers_), rtol=1e-10, atol=1e-10)


@inits
@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
def test_inertia_never_rises(init, metric):
    x = blobs().double()
    rows = x / x.norm(dim=-1, keepdim=True) if metric == "cosine" else x
    key = isthmus.key(2)
    errors = [inertia(rows, kmeans(x, 15, iterations=n, init=init, metric=metric, key=key)[0]) for n in range(1, 9)]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


@inits
def test_a_key_is_a_result(init):
    x = blobs()
    first, again, other = (kmeans(x, 9, init=init, key=isthmus.key(seed)) for seed in (7, 7, 8))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
    torch.set_num_threads(1)
    assert all(map(torch.equal, first, kmeans(x, 9, init=init, key=isthmus.key(7))))


def test_codes_are_means_and_counts_are_theirs():
    x = blobs().double()
    before = kmeans(x, 8, iterations=30, init="kmeans++", key=isthmus.key(0))[0]
    after, counts = kmeans(x, 8, iterations=31, init="kmeans++", key=isthmus.key(0))
    indices = ops.vq_assign(x, before)
    assert torch.equal(counts, indices.bincount(minlength=8).double())
    means = torch.stack([x[indices == k].mean(0) for k in range(8)])
    torch.testing.assert_close(after, means, rtol=1e-12, atol=1e-12)


def test_scattered_start_finds_separated_blobs():
    """Far blobs: after kmeans++ each has a code, however the draws fall; a random start hardly ever manages."""
    x = blobs(clusters=12, spread=0.001)
    for seed in range(5):
        codebook, counts = kmeans(x, 12, init="kmeans++", iterations=1, key=isthmus.key(seed))
        assert inertia(x, codebook) < 0.1
        assert torch.equal(counts, torch.full((12,), 60.0))


def test_draws_are_proportional_to_squared_distance():
    """Three points: from 0 the next is 3 nine times as often as 1."""
    x = torch.tensor([[0.0], [1.0], [3.0]])
    seconds = torch.zeros(3)
    weights = torch.tensor([1e9, 1.0, 1.0])  # the first draw is the point at 0
    for seed in range(400):
        codebook, _ = kmeans(x, 2, init="kmeans++", iterations=1, weights=weights, key=isthmus.key(seed))
        # Codes 0 and 1, or 0 and 3, become means; only with 3 chosen does a code stay at 3.
        seconds[2 if (codebook == 3.0).any() else 1] += 1
    share = seconds[2] / 400
    assert abs(share - 0.9) < 4 * math.sqrt(0.09 / 400)


def test_weights_count_repetitions():
    """Codes are weighted means, as if each vector stood there so many times."""
    x = blobs().double()
    times = torch.randint(1, 5, (len(x),), generator=torch.Generator().manual_seed(3)).double()
    before = kmeans(x, 8, iterations=5, init="kmeans++", weights=times, key=isthmus.key(0))[0]
    after, counts = kmeans(x, 8, iterations=6, init="kmeans++", weights=times, key=isthmus.key(0))
    repeated = x.repeat_interleave(times.long(), 0)
    sizes, sums = ops.code_statistics(repeated, ops.vq_assign(repeated, before), 8)
    assert torch.equal(counts, sizes)
    torch.testing.assert_close(after, sums / sizes.unsqueeze(1), rtol=1e-12, atol=1e-12)


def test_random_starts_are_distinct_vectors():
    x = torch.randperm(50, generator=torch.Generator().manual_seed(0)).float().unsqueeze(1)
    for seed in range(5):
        codebook, counts = kmeans(x, 50, iterations=1, key=isthmus.key(seed))
        assert torch.equal(codebook.sort(0).values, torch.arange(50.0).unsqueeze(1))
        assert torch.equal(counts, torch.ones(50))


def test_weight_zero_and_nan_are_left_out():
    x = blobs().double()
    dirty = torch.cat([x, torch.full((5, 5), 1e6).double(), torch.full((3, 5), torch.nan).double()])
    weights = torch.ones(len(dirty)).double()
    weights[len(x) : len(x) + 5] = 0
    for init in ("random", "kmeans++"):
        codebook, counts = kmeans(dirty, 8, init=init, weights=weights, key=isthmus.key(4))
        assert codebook.isfinite().all() and codebook.abs().max() < 100
        assert counts.sum() == len(x)


def test_empty_codes_move_to_the_farthest_vectors():
    """All codes start on one spot: one of them keeps its vectors, the others are sent where the error is."""
    x = torch.cat([torch.zeros(50, 2), torch.tensor([[10.0, 0.0], [0.0, 20.0]])])
    weights = torch.cat([torch.full((50,), 1e9), torch.full((2,), 1e-9)])
    codebook, counts = kmeans(x, 3, iterations=2, weights=weights, key=isthmus.key(0))
    assert sorted(codebook.round().tolist()) == [[0.0, 0.0], [0.0, 20.0], [10.0, 0.0]]
    assert (counts > 0).all()


def test_fewer_distinct_vectors_than_codes():
    x = torch.tensor([[1.0], [2.0]]).repeat(10, 1)
    for init in ("random", "kmeans++"):
        codebook, _ = kmeans(x, 5, init=init, key=isthmus.key(0))
        assert inertia(x, codebook) == 0
        assert codebook.isfinite().all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64), ids=str)
def test_every_dtype(dtype):
    x = blobs().to(dtype)
    codebook, counts = kmeans(x, 8, init="kmeans++", key=isthmus.key(0))
    assert codebook.dtype == counts.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert codebook.shape == (8, 5) and counts.sum() == len(x)


def test_compiles_without_a_break():
    torch._dynamo.reset()
    x, key = blobs(), isthmus.key(3)
    compiled = torch.compile(kmeans, fullgraph=True, backend="aot_eager")
    for init in ("random", "kmeans++"):
        found = compiled(x, 4, iterations=3, init=init, key=key)
        assert all(map(torch.equal, found, kmeans(x, 4, iterations=3, init=init, key=key)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: kmeans(x, 500), r"x has shape \[480, 5\]; expected \[N, D\] with N >= num_codes = 500"),
        (lambda x: kmeans(x[0], 1), r"x has shape \[5\]"),
        (lambda x: kmeans(x, 0), "num_codes = 0"),
        (lambda x: kmeans(x, 3, iterations=0), "iterations is 0"),
        (lambda x: kmeans(x, 3, init="first"), "init is 'first'; expected one of 'random', 'kmeans\\+\\+'"),
        (lambda x: kmeans(x, 3, metric="l1"), "metric is 'l1'"),
        (lambda x: kmeans(x, 3, weights=torch.ones(3)), r"weights has shape \[3\]; expected \[480\]"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(blobs())
