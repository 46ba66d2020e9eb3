"""Features of a language model that one can read: top-k against ReLU and L1, with and without revival of the dead.

A small transformer learns the documentation that comes with Python: the language reference of `help()` and the
docstrings of the standard library. What leaves its second block is harvested and explained by three dictionaries:

    TopKSAE             k features per token, dead ones learn what the live ones leave over (AuxK)
    TopKSAE, aux_k=0    the same without AuxK
    ReLUSAE             ReLU and a penalty on the sum of activations, so strong that k features are active per token

Then a page shows the features of the first in the text they stand for.

    python examples/sae_features.py --output sae_features

About three minutes on two cores. Needs safetensors: pip install isthmus[data].
"""

import argparse
import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.cli.train.evaluate import Evaluation, evaluate
from isthmus.cli.train.features import write_page
from isthmus.data import ActivationLoader, ActivationShards, ActivationWriter, harvest
from isthmus.nn import ReLUSAE, TopKSAE
from isthmus.optim import RowAdam

CONTEXT = 64
LAYER = "blocks.1"
HELD_OUT = 0.1
BATCH = 1024
SAMPLE = 8192  # rows that scale and start are fitted to


# ---- text ------------------------------------------------------------------------------------------------------------


def documentation() -> str:
    """The language reference and the longer docstrings of the standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    pieces = [topics[name] for name in sorted(topics)]
    for file in sorted((*folder.glob("[a-z]*.py"), *folder.glob("[a-z]*/*.py"))):
        if file.parent.name in ("site-packages", "test", "idlelib"):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node) or ""
                pieces += [docstring] if len(docstring) > 200 else []
    return "\n\n".join(pieces)


class Words:
    """Words with the space before them, numbers and signs. Rare ones are spelled out."""

    def __init__(self, text: str, size: int) -> None:
        letters = sorted(set(text))
        counts = Counter(word for word in self.split(text) if len(word) > 1)
        self.vocabulary = letters + [word for word, _ in counts.most_common(size - len(letters))]
        self.numbers = {word: number for number, word in enumerate(self.vocabulary)}

    @staticmethod
    def split(text: str) -> list[str]:
        return re.findall(r" ?[^\W\d_]+| ?\d+|\n+| +|.", text, re.DOTALL)

    def encode(self, text: str) -> Tensor:
        pieces = ((word,) if word in self.numbers else word for word in self.split(text))
        return torch.tensor([self.numbers[piece] for word in pieces for piece in word])


# ---- language model --------------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Tokens [B, T] to the logits of the next ones."""

    def __init__(self, vocabulary: int, dim: int = 128, blocks: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(torch.zeros(CONTEXT, dim))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, 4, 4 * dim, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.norm(x) @ self.embedding.weight.T


def next_token_loss(model: Transformer, tokens: Tensor) -> Tensor:
    """Nats per token."""
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def train_language_model(windows: Tensor, vocabulary: int, steps: int) -> Transformer:
    model = Transformer(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        loss = next_token_loss(model, windows[torch.randint(len(windows), (32,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def harvest_layer(model: Transformer, windows: Tensor, words: Words, folder: Path) -> None:
    writer = ActivationWriter(folder, vocabulary=words.vocabulary)
    with writer, torch.no_grad(), harvest(model, LAYER, writer, tokens=lambda tokens: tokens):
        for batch in windows.split(64):
            model(batch)


# ---- dictionaries ----------------------------------------------------------------------------------------------------


class Dictionary(NamedTuple):
    """A trained dictionary, and what it makes of rows that it has not learned from."""

    name: str
    sae: nn.Module
    history: list[dict[str, Any]]
    found: Evaluation

    @property
    def dead(self) -> float:
        """Share of the features that fire at no held-out token."""
        return self.found.silent / len(self.found.density)

    def __str__(self) -> str:
        return (
            f"{self.name:12} {self.found.l0:5.1f} features per token, "
            f"{self.found.explained_variance:.3f} of the variance explained, {self.dead:5.1%} of the features dead"
        )


class Activations(NamedTuple):
    """Rows to learn from and to judge by, and the number that makes their mean squared norm D."""

    train: ActivationShards
    held_out: ActivationShards
    scale: float

    @classmethod
    def open(cls, folder: Path) -> "Activations":
        train, held_out = ActivationShards(folder).split(HELD_OUT)
        squared_norm = train.read(0, SAMPLE).square().sum(1).mean().item()
        return cls(train, held_out, (train.dim / squared_norm) ** 0.5)


def learn(
    name: str, sae: nn.Module, data: Activations, *, steps: int, lr: float, l0: float | None = None
) -> Dictionary:
    """Train a dictionary. With ``l0`` its penalty grows or shrinks in every step until so many features are active."""
    sae.init_from(data.scale * data.train.read(0, SAMPLE))
    others = [parameter for parameter in sae.parameters() if parameter is not sae.decoder_weight]
    optimizer = RowAdam([{"params": [sae.decoder_weight], "unit_norm": True}, {"params": others}])
    loader = ActivationLoader(data.train, BATCH)
    history = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (steps - step) / (0.3 * steps))
        output = sae(data.scale * next(loader))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        active = (output.values > 0).sum().item() / BATCH
        if l0 is not None:
            sae.sparsity_weight *= min(2.0, active / l0) ** 0.01
        if step % 20 == 0:
            numbers = {"loss": output.loss.item(), "l0": active, "dead": int(sae.dead.sum())}
            history.append({"step": step, "split": "train", **numbers})
    return Dictionary(name, sae.eval(), history, evaluate(sae, data.held_out, scale=data.scale))


def compare(data: Activations, *, num_features: int, k: int, steps: int) -> list[Dictionary]:
    """The three dictionaries from the same start, each with the best of a few learning rates."""
    dim, options = data.train.dim, {"dead_after": BATCH * steps // 20}
    made: dict[str, tuple[Callable[[], nn.Module], dict[str, float]]] = {
        "top-k, AuxK": (lambda: TopKSAE(dim, num_features, k, **options), {"lr": 1e-3}),
        "top-k": (lambda: TopKSAE(dim, num_features, k, aux_k=0, **options), {"lr": 1e-3}),
        "ReLU, L1": (lambda: ReLUSAE(dim, num_features, **options), {"lr": 1e-2, "l0": k}),
    }
    dictionaries = []
    for name, (make, training) in made.items():
        torch.manual_seed(0)
        dictionaries.append(learn(name, make(), data, steps=steps, **training))
        print(dictionaries[-1], flush=True)
    return dictionaries


# ---- all of it -------------------------------------------------------------------------------------------------------


def run(folder: Path, text: str, *, model_steps: int, **options: Any) -> list[Dictionary]:
    """Language model, activations, dictionaries, page."""
    words = Words(text, 3072)
    numbers = words.encode(text)
    windows = numbers[: len(numbers) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    windows = windows[torch.randperm(len(windows))]
    learned = int((1 - HELD_OUT) * len(windows))
    model = train_language_model(windows[:learned], len(words.vocabulary), model_steps)
    with torch.no_grad():
        loss = next_token_loss(model, windows[learned:][:256]).item()
    print(f"language model: {numbers.numel():,} tokens, {loss:.2f} nats per held-out token", flush=True)
    harvest_layer(model, windows, words, folder / "activations")
    data = Activations.open(folder / "activations")
    dictionaries = compare(data, **options)
    page, best = folder / "features.html", dictionaries[0]
    write_page(page, best.sae, data.held_out, scale=data.scale, history=best.history, title="Features of Python's help")
    print(f"feature page: {page.resolve()}")
    return dictionaries


def main() -> None:
    """Run the comparison and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("sae_features"), help="folder for activations and page")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.quick:
        run(options.output, documentation()[:100_000], model_steps=20, num_features=256, k=8, steps=20)
    else:
        run(options.output, documentation(), model_steps=500, num_features=2048, k=16, steps=1500)


if __name__ == "__main__":
    main()
