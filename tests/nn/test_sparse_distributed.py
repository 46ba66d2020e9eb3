"""Two processes, with some of the rows each, judge the same features dead as one process with all rows."""

import os

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from isthmus import nn

RANKS, STEPS = 2, 4
MODELS = {
    "topk": lambda: nn.TopKSAE(6, 40, 3, aux_k=4, dead_after=60),
    "multi": lambda: nn.TopKSAE(6, 40, 3, multi_k=9, aux_k=4, dead_after=60),
    "jumprelu": lambda: nn.JumpReLUSAE(6, 40, threshold=1.5, bandwidth=0.1, aux_k=4, dead_after=60),
}


def batches(name, rank):
    """Rows of one rank; of both for None. The ranks see different rows, and not equally many."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    x = torch.randn(STEPS, 36, 6, dtype=torch.float64)
    x[:, :24, 0] += 3.0
    return model, x[:, {None: slice(36), 0: slice(24), 1: slice(24, 36)}[rank]]


def idle(name, rank=None, compiled=False):
    """What each step leaves in ``idle``, and whether parameters learn from dead features."""
    model, x = batches(name, rank)
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    seen = []
    for batch in x:
        out = call(batch)
        seen.append(model.idle.clone())
    return torch.stack(seen), out.aux_loss.detach()


def trained(rank):
    """State after steps under DistributedDataParallel, each rank with half of the batch."""
    torch.manual_seed(0)
    model = MODELS["topk"]().double()
    x = torch.randn(STEPS, RANKS, 4, 6, dtype=torch.float64)[:, rank]
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in x:
        optimizer.zero_grad()
        wrapped(batch).loss.backward()
        optimizer.step()
    return model.state_dict()


def alone(rank):
    """Ranks that train different autoencoders."""
    torch.manual_seed(rank)
    model = nn.TopKSAE(6, 40, 3, sync_firing=False)
    model(torch.randn(10 + rank, 6))
    return model.idle


def averaged(rank):
    """The threshold of a batch-top-k autoencoder; a rank without rows adds nothing to it."""
    torch.manual_seed(0)
    model = nn.BatchTopKSAE(6, 40, 3, decay=0.5)
    x = torch.randn(2, 24, 6)
    smallest = [model(x[rank]).values.detach().min(), model.threshold.clone()]
    model(x[0] if rank == 0 else x[0, :0])
    return *smallest, model.threshold.clone()


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results = {name: idle(name, rank) for name in MODELS}
    results["compiled"] = idle("topk", rank, compiled=True)
    results |= {"trained": trained(rank), "alone": alone(rank), "averaged": averaged(rank)}
    torch.save(results, f"{folder}/{rank}")
    # Not by tearing down: gloo's threads now and then abort a process whose work is done and saved.
    dist.barrier()
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / str(rank)) for rank in range(RANKS)]


@pytest.mark.parametrize("name", MODELS)
def test_ranks_judge_by_all_rows(name, ranks):
    expected, _ = idle(name)
    assert expected[-1].max() > 60  # some died, some did not
    assert expected[-1].min() == 0
    for rank in ranks:
        assert torch.equal(rank[name][0], expected)
        assert rank[name][1] > 0.0  # every rank has a loss for the same dead features


def test_a_rank_that_judged_alone_would_differ():
    model, x = batches("topk", 0)
    for batch in x:
        model(batch)
    assert not torch.equal(model.idle, idle("topk")[0][-1])


def test_compiled_without_graph_break(ranks):
    for rank in ranks:
        torch.testing.assert_close(rank["compiled"], rank["topk"])


def test_data_parallel_ranks_stay_alike(ranks):
    first, second = (rank["trained"] for rank in ranks)
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)
    assert first["idle"].max() > 0


def test_ranks_may_train_different_autoencoders(ranks):
    for rank, results in enumerate(ranks):
        assert torch.equal(results["alone"], alone(rank))
    assert not torch.equal(ranks[0]["alone"], ranks[1]["alone"])


def test_thresholds_are_averaged_over_ranks_that_have_rows(ranks):
    (a, first, second), (b, *same) = (rank["averaged"] for rank in ranks)
    assert a != b
    torch.testing.assert_close(first, (a + b) / 2)
    torch.testing.assert_close(second, (first + a) / 2)
    assert [first, second] == same
