"""`isthmus train sae` by two processes: alike in every step, one writer, resumed bit for bit."""

import json
import os

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

from safetensors.torch import load_file

from isthmus.cli.train.run import run
from isthmus.cli.train.settings import Settings
from isthmus.cli.train.trainer import Trainer
from isthmus.data import ActivationLoader, ActivationWriter

DIM, RANKS, STEPS, CUT = 8, 2, 30, 17


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """2000 sums of two of twelve directions, and a few rows that are not finite."""
    folder = tmp_path_factory.mktemp("ranks")
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(12, DIM, generator=generator)
    rows = directions[torch.randint(12, (2000, 2), generator=generator)].sum(dim=1)
    rows[::150] = torch.nan
    with ActivationWriter(folder / "shards", rows_per_shard=700, format="npy") as writer:
        writer.write(rows)
    return folder


def settings(folder, **options):
    options = {"k": 2, "aux_k": 0, "batch_size": 64, "buffer_rows": 256, "dead_after": 400, "lr": 0.01} | options
    options |= {"log_every": 5, "eval_every": 10, "checkpoint_every": 10, "held_out": 0.1, "steps": STEPS}
    return Settings(data=str(folder / "shards"), features=24, **options)


def steps(trainer):
    """State after some steps."""
    for _ in range(6):
        trainer.advance()
    return {name: tensor.clone() for name, tensor in trainer.sae.state_dict().items()}


def cut_run(out, told):
    """A run that all processes leave at the same step, and that is resumed."""
    advance = Trainer.advance

    def stopped(trainer):
        if trainer.step == CUT:
            raise InterruptedError("power cut")
        return advance(trainer)

    Trainer.advance = stopped
    with pytest.raises(InterruptedError):
        run(told, out, resume=False, device="cpu", page_features=2)
    Trainer.advance = advance
    run(told, out, resume=True, device="cpu", page_features=2)


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results = {"plain": steps(Trainer(settings(folder, processes=RANKS), "cpu"))}
    told = settings(folder, processes=RANKS, aux_k=8)
    results["aux"] = steps(Trainer(told, "cpu"))
    run(told, folder / "whole", resume=False, device="cpu", page_features=2)
    cut_run(folder / "cut", told)
    torch.save(results, folder / str(rank))
    # Not by tearing down: gloo's threads now and then abort a process whose work is done and saved.
    dist.barrier()
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(folder):
    multiprocessing.spawn(work, (folder,), nprocs=RANKS)
    return [torch.load(folder / str(rank)) for rank in range(RANKS)]


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["plain", "aux"])
def test_ranks_stay_alike(ranks, name):
    first, second = (rank[name] for rank in ranks)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_step_is_that_of_one_process_with_the_mean_of_both_losses(ranks, folder):
    trainer = Trainer(settings(folder), "cpu")
    train, _ = trainer.shards.split(0.1)
    parts = [ActivationLoader(train, 32, buffer_rows=256, rank=rank, world_size=RANKS) for rank in range(RANKS)]
    for step in range(6):
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.settings.learning_rate(step)
        trainer.optimizer.zero_grad()
        for part in parts:
            rows = next(part)
            (trainer.sae(rows[rows.isfinite().all(1)] * trainer.scale).loss / RANKS).backward()
        trainer.optimizer.step()
    for name, parameter in trainer.sae.named_parameters():
        torch.testing.assert_close(ranks[0]["plain"][name], parameter.detach(), rtol=1e-4, atol=1e-5)
    alone = steps(Trainer(settings(folder), "cpu"))
    assert not torch.allclose(alone["encoder_weight"], ranks[0]["plain"]["encoder_weight"], atol=1e-3)


def test_one_process_writes(ranks, folder):
    history = lines(folder / "whole")
    assert [line["step"] for line in history if line["split"] == "train"] == list(range(5, STEPS + 1, 5))
    assert [line["step"] for line in history if line["split"] == "held_out"] == [10, 20, 30]
    assert history[-1]["explained_variance"] > 0.5
    assert (folder / "whole" / "features.html").exists()


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(ranks, folder):
    assert lines(folder / "cut") == lines(folder / "whole")
    for name in ("checkpoint.safetensors", "sae.safetensors"):
        cut, whole = (load_file(folder / run / name) for run in ("cut", "whole"))
        torch.testing.assert_close(cut, whole, rtol=0, atol=0)


def test_a_run_of_two_is_not_resumed_by_one(ranks, folder):
    with pytest.raises(SystemExit, match="processes was 2 when this run was started, now it is 1"):
        run(settings(folder, aux_k=8), folder / "whole", resume=True, device="cpu", page_features=2)


def test_batches_are_divided_evenly(folder):
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes, got 64"):
        settings(folder, processes=3)
