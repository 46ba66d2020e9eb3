"""Two processes, half of the batch each, learn the codebook that one process learns from the whole batch."""

import os

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from isthmus import nn

RANKS, ROWS, STEPS = 2, 24, 5


def encoder(quantizer):
    return torch.nn.Sequential(torch.nn.Linear(6, 6), quantizer).double()


class HierarchicalOfRows(nn.HierarchicalVQ):
    """Six rows are a sequence; of the maps of codes the last is returned."""

    def forward(self, x):
        quantized, indices, loss = super().forward(x.view(-1, 6, 6).movedim(-1, 1))
        return quantized.movedim(1, -1).reshape(x.shape), indices[-1].flatten(), loss


MODELS = {
    "ema": lambda: encoder(nn.VectorQuantizer(16, 6, decay=0.5, revive_below=0.5)),
    "gradient": lambda: encoder(nn.VectorQuantizer(16, 6, learning="gradient", decay=0.5, revive_below=0.5)),
    "cosine-heads": lambda: encoder(
        nn.VectorQuantizer(
            8, 6, metric="cosine", heads=2, separate_codebook_per_head=True, decay=0.5, eps=0.1, revive_below=0.5
        )
    ),
    "residual": lambda: encoder(nn.ResidualVQ((16, 8), 6, decay=0.5, revive_below=0.5)),
    "residual-gradient": lambda: encoder(
        nn.ResidualVQ(12, 6, 2, groups=2, learning="gradient", decay=0.5, revive_below=0.5)
    ),
    "residual-cosine": lambda: encoder(nn.ResidualVQ(16, 6, 2, metric="cosine", decay=0.5, revive_below=0.5)),
    "qinco": lambda: encoder(nn.QINCo(12, 6, 2, hidden_dim=5, decay=0.5, revive_below=0.5)),
    "hierarchical": lambda: encoder(HierarchicalOfRows(16, 6, (2, 6), spatial_dims=1, decay=0.5, revive_below=0.5)),
    "affine": lambda: encoder(
        nn.VectorQuantizer(16, 6, learning="gradient", revive_below=0.0, transform=nn.AffineCodebook(6, decay=0.5))
    ),
}


def trained(name, rank=None, compiled=False):
    """State after a few steps, and the indices of the last; all rows, or those of one rank."""
    torch.manual_seed(0)
    model = MODELS[name]()
    batches = torch.randn(STEPS, RANKS * ROWS, 6, dtype=torch.float64)
    if rank is not None:
        batches = batches[:, rank * ROWS : (rank + 1) * ROWS]
    if model[1].sums is not None:
        model[1].init_from(model[0](batches[0]))
    call = model if rank is None else DistributedDataParallel(model)
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in batches:
        optimizer.zero_grad()
        quantized, indices, loss = call(batch)
        ((quantized - batch).square().sum(-1).mean() + loss).backward()
        if compiled:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(RANKS)
        optimizer.step()
    return {**model.state_dict(), "indices": indices}


def masked(rank=None):
    """One step with padding: ranks see different numbers of vectors."""
    torch.manual_seed(0)
    quantizer = nn.VectorQuantizer(16, 6, decay=0.5, revive_below=0.0).double()
    x, mask = torch.randn(RANKS * ROWS, 6, dtype=torch.float64), torch.arange(RANKS * ROWS) < 30
    mine = slice(None) if rank is None else slice(rank * ROWS, (rank + 1) * ROWS)
    quantizer(x[mine], mask=mask[mine])
    return quantizer.state_dict()


def uneven(rank=None):
    """Batches of different sizes; a candidate that is nobody's, or two ranks', revives nothing."""
    torch.manual_seed(0)
    quantizer = nn.VectorQuantizer(64, 6, decay=0.0, revive_below=0.5).double()
    x = torch.randn(30, 6, dtype=torch.float64)
    mine = slice(None) if rank is None else (slice(0, 20), slice(20, 30))[rank]
    for _ in range(3):
        quantizer(x[mine])
    return {**quantizer.state_dict(), "x": x}


def accumulated(rank=None):
    torch.manual_seed(0)
    quantizer = nn.VectorQuantizer(16, 6, decay=0.5, revive_below=0.5).double()
    x = torch.randn(2, RANKS * ROWS, 6, dtype=torch.float64)
    mine = slice(None) if rank is None else slice(rank * ROWS, (rank + 1) * ROWS)
    for _ in range(3):
        quantizer(x[0, mine], update="later")
        quantizer(x[1, mine])
    return quantizer.state_dict()


def unsynchronised(rank=None):
    torch.manual_seed(0)
    quantizer = nn.VectorQuantizer(16, 6, decay=0.5, sync_codebook=False).double()
    quantizer(torch.randn(2, ROWS, 6, dtype=torch.float64)[rank or 0])
    return quantizer.state_dict()


def starved(rank=None):
    """A rank without a single vector takes part all the same."""
    torch.manual_seed(0)
    models = [nn.VectorQuantizer(16, 6, decay=0.5, revive_below=0.5), nn.ResidualVQ(16, 6, 2, decay=0.5)]
    x = torch.randn(30, 6)[: 0 if rank == 1 else None]
    for model in models:
        model(x)
    return {str(i): model.usage for i, model in enumerate(models)}


OTHERS = {
    "masked": masked,
    "uneven": uneven,
    "accumulated": accumulated,
    "unsynchronised": unsynchronised,
    "starved": starved,
}


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results = {name: trained(name, rank) for name in MODELS}
    results |= {name: call(rank) for name, call in OTHERS.items()}
    results |= {f"{name}-compiled": trained(name, rank, compiled=True) for name in ("ema", "residual")}
    torch.save(results, f"{folder}/{rank}")
    # Not by tearing down: gloo's threads now and then abort a process whose work is done and saved.
    dist.barrier()
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / str(rank)) for rank in range(RANKS)]


def assert_alike(results, expected):
    states = [{name: value for name, value in result.items() if name != "indices"} for result in results]
    torch.testing.assert_close(states[0], states[1], rtol=0.0, atol=0.0)
    if "indices" in expected:
        torch.testing.assert_close(torch.cat([result["indices"] for result in results]), expected.pop("indices"))
    torch.testing.assert_close(states[0], expected)


@pytest.mark.parametrize("name", MODELS)
def test_training_equals_one_process_with_the_joint_batch(name, ranks):
    assert_alike([rank[name] for rank in ranks], trained(name))


@pytest.mark.parametrize("name", ["ema", "residual"])
def test_compiled_without_graph_break(name, ranks):
    assert_alike([rank[f"{name}-compiled"] for rank in ranks], trained(name))


@pytest.mark.parametrize("name", ["masked", "accumulated"])
def test_padding_and_micro_batches(name, ranks):
    assert_alike([rank[name] for rank in ranks], OTHERS[name]())


def test_uneven_batches_agree_and_revive_with_vectors_of_the_batch(ranks):
    first, second = (rank["uneven"] for rank in ranks)
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)
    fresh = (first["usage"] == 1.0).nonzero().flatten()
    assert len(fresh) > 5
    on_a_row = (first["codebook"].unsqueeze(1) == first["x"]).all(-1).any(-1)
    assert on_a_row[fresh].all()


def test_without_synchronisation_every_rank_learns_alone(ranks):
    for rank, results in enumerate(ranks):
        torch.testing.assert_close(results["unsynchronised"], unsynchronised(rank))


def test_a_rank_without_vectors_takes_part(ranks):
    first, second = (rank["starved"] for rank in ranks)
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)
    assert not torch.equal(first["0"], torch.ones(16))
    assert not torch.equal(first["1"], torch.ones(32))
