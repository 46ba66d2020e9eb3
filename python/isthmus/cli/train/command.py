"""The options of `isthmus train sae`."""

from pathlib import Path
from typing import Annotated

import typer

train = typer.Typer(help="Train a bottleneck on data in files.", no_args_is_help=True)


@train.command()
def sae(
    data: Annotated[Path, typer.Option(help="Folder of activation shards, or one shard.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    features: Annotated[int, typer.Option(help="Size of the dictionary.")] = 16384,
    kind: Annotated[str, typer.Option(help="topk, batch_topk, matryoshka, jumprelu, gated or relu.")] = "topk",
    k: Annotated[float | None, typer.Option(help="Active features per row (topk kinds); 32 if not given.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Weight of the sparsity penalty (other kinds).")] = None,
    target_l0: Annotated[
        float | None, typer.Option(help="Active features per row that the penalty asks for (jumprelu).")
    ] = None,
    levels: Annotated[int | None, typer.Option(help="Nested dictionaries (matryoshka); 5 if not given.")] = None,
    steps: Annotated[int, typer.Option(help="Batches to learn from.")] = 10_000,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch, of all processes.")] = 2048,
    lr: Annotated[float | None, typer.Option(help="Learning rate; 2e-4 · √(16384 / features) if not given.")] = None,
    warmup: Annotated[float, typer.Option(help="Fraction of the steps in which the learning rate rises.")] = 0.05,
    decay: Annotated[float, typer.Option(help="Fraction of the steps in which it falls to 0.")] = 0.2,
    aux_k: Annotated[int | None, typer.Option(help="Dead features per row in the auxiliary loss; 0: none.")] = None,
    dead_after: Annotated[
        int | None, typer.Option(help="Rows without firing; a tenth of the run, at most 10 million, if not given.")
    ] = None,
    held_out: Annotated[float, typer.Option(help="Fraction of every shard that is kept for judging.")] = 0.02,
    buffer_rows: Annotated[int, typer.Option(help="Rows in memory that batches are drawn from.")] = 65_536,
    log_every: Annotated[int, typer.Option(help="Steps between lines of the log.")] = 50,
    eval_every: Annotated[int, typer.Option(help="Steps between looks at the held-out rows.")] = 1000,
    eval_rows: Annotated[int, typer.Option(help="Held-out rows of each look.")] = 16_384,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu or cuda.")] = "cpu",
    page_features: Annotated[int, typer.Option(help="Features on the page.")] = 48,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last checkpoint, if there is one.")] = False,
) -> None:
    """Learn a sparse dictionary of activations, and write the page of its features.

    Started by torchrun, processes share the work: each learns from its part of every batch.
    """
    from isthmus.cli.train import processes
    from isthmus.cli.train.run import run
    from isthmus.cli.train.settings import Settings

    with processes.joined(device) as own_device:
        try:
            settings = Settings(
                data=str(data),
                features=features,
                kind=kind,
                k=k,
                sparsity=sparsity,
                target_l0=target_l0,
                levels=levels,
                steps=steps,
                batch_size=batch_size,
                lr=lr,
                warmup=warmup,
                decay=decay,
                aux_k=aux_k,
                dead_after=dead_after,
                held_out=held_out,
                buffer_rows=buffer_rows,
                log_every=log_every,
                eval_every=eval_every,
                eval_rows=eval_rows,
                checkpoint_every=checkpoint_every,
                seed=seed,
                processes=processes.count(),
            )
        except ValueError as error:
            raise SystemExit(str(error)) from None
        run(settings, out, resume=resume, device=own_device, page_features=page_features)
