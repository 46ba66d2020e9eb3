"""A vector-quantized autoencoder of patches, whose 512 codes are all at work.

Handwritten digits and two photographs, all of which come with scikit-learn, are cut into patches. Every patch becomes
one of 512 codes and is painted again from that alone. Left to themselves many codes would die: here the codebook starts
from k-means on the outputs of an encoder that was trained for a moment without quantization, and a code that nobody
uses moves onto a patch of the batch.

    python examples/vq_vae_patches.py --output vq_vae_patches.png

About a minute on two cores. Needs scikit-learn and matplotlib: pip install isthmus[cli].
"""

import argparse
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.diagnostics import code_histogram, code_usage, perplexity
from isthmus.nn import VectorQuantizer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NUM_CODES = 512


class PatchVQVAE(nn.Module):
    """Patches [N, D] with values in [0, 1], one code each."""

    def __init__(self, patch_size: int, hidden: int = 128, code_dim: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(patch_size, hidden), nn.SiLU(), nn.Linear(hidden, code_dim))
        self.quantizer = VectorQuantizer(NUM_CODES, code_dim, decay=0.95, revive_below=0.1)
        self.decoder = nn.Sequential(nn.Linear(code_dim, hidden), nn.SiLU(), nn.Linear(hidden, patch_size))

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Patches painted from their codes, and the loss."""
        quantized, _, commitment = self.quantizer(self.encoder(patches))
        painted = self.decoder(quantized)
        return painted, (painted - patches).square().sum(-1).mean() + commitment

    def encode(self, patches: Tensor) -> Tensor:
        """The code of each patch, [N]."""
        return self.quantizer.encode(self.encoder(patches))

    def decode(self, codes: Tensor) -> Tensor:
        """The patch that each code stands for."""
        return self.decoder(self.quantizer.decode(codes))


class Pictures(NamedTuple):
    """Pictures [B, C, H, W] and the side of the patches they are cut into."""

    name: str
    images: Tensor
    side: int


def digits() -> Pictures:
    """1797 handwritten digits, 8 × 8."""
    return Pictures("digits", torch.tensor(datasets.load_digits().images / 16, dtype=torch.float32).unsqueeze(1), 4)


def photographs() -> Pictures:
    """A temple and a flower, 424 × 640 in color."""
    images = torch.from_numpy(np.stack(datasets.load_sample_images().images)) / 255
    return Pictures("photographs", images.movedim(-1, 1)[:, :, :424].contiguous(), 8)


def cut(images: Tensor, side: int, stride: int) -> Tensor:
    """Patches [N, C · side²] at every ``stride`` pixels."""
    return F.unfold(images, side, stride=stride).transpose(1, 2).flatten(0, 1)


def paste(patches: Tensor, like: Tensor, side: int) -> Tensor:
    """Pictures from patches that do not overlap."""
    columns = patches.view(len(like), -1, patches.shape[-1]).transpose(1, 2)
    return F.fold(columns, like.shape[-2:], side, stride=side).clamp(0, 1)


def train(model: PatchVQVAE, patches: Tensor, *, steps: int, batch: int = 2048) -> None:
    """A fifth of the steps without quantization, k-means, then the rest with it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    warm_up = steps // 5
    for step in range(steps):
        x = patches[torch.randint(len(patches), (batch,))]
        if step == warm_up:
            sample = patches[torch.randperm(len(patches))[:16384]]
            model.quantizer.init_from(model.encoder(sample).detach())
        if step < warm_up:
            loss = (model.decoder(model.encoder(x)) - x).square().sum(-1).mean()
        else:
            _, loss = model(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


class Outcome(NamedTuple):
    """What a trained model makes of pictures."""

    pictures: Pictures
    painted: Tensor
    hits: Tensor  # patches of each code
    code_patches: Tensor

    @property
    def usage(self) -> float:
        """Share of the codes that stand for at least one patch."""
        return code_usage(self.hits).item()

    @property
    def perplexity(self) -> float:
        """How many codes would be in use if all that are were used alike."""
        return perplexity(self.hits).item()

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB."""
        return -10 * (self.painted - self.pictures.images).square().mean().log10().item()


@torch.no_grad()
def evaluate(model: PatchVQVAE, pictures: Pictures) -> Outcome:
    """Write and read all patches of the pictures, at the stride they were learned from and side by side."""
    side, images = pictures.side, pictures.images
    hits = code_histogram(model.encode(cut(images, side, side // 2)), NUM_CODES)
    painted = paste(model.decode(model.encode(cut(images, side, side))), images, side)
    code_patches = model.decode(torch.arange(NUM_CODES)).view(NUM_CODES, -1, side, side).clamp(0, 1)
    return Outcome(pictures, painted, hits, code_patches)


def run(pictures: Pictures, *, steps: int) -> Outcome:
    """Train on all patches of the pictures, half a patch apart."""
    patches = cut(pictures.images, pictures.side, pictures.side // 2)
    model = PatchVQVAE(patches.shape[-1])
    train(model, patches, steps=steps)
    return evaluate(model, pictures)


def picture(outcomes: list[Outcome]) -> plt.Figure:
    """A row for each: originals, what the codes paint, the patch of each code, how often each is used."""
    figure, axes = plt.subplots(
        len(outcomes), 4, figsize=(22, 5 * len(outcomes)), width_ratios=[3, 3, 3, 2.4], squeeze=False, layout="tight"
    )
    for row, outcome in zip(axes, outcomes, strict=True):
        order = outcome.hits.argsort(descending=True)
        images = outcome.pictures.images
        row[0].set_title(f"{outcome.pictures.name}: originals")
        row[1].set_title(f"from one of {NUM_CODES} codes per patch: {outcome.psnr:.1f} dB")
        row[2].set_title("what each code paints, the most used first")
        # A few large pictures one above the other, or many small ones in rows.
        columns = 1 if len(images) < 8 else 16
        _show(row[0], images[: 10 * columns], columns, gap=2)
        _show(row[1], outcome.painted[: 10 * columns], columns, gap=2)
        _show(row[2], outcome.code_patches[order], 32, gap=1)
        row[3].set_title(f"usage {outcome.usage:.1%}, perplexity {outcome.perplexity:.0f} of {NUM_CODES}")
        row[3].bar(range(NUM_CODES), outcome.hits[order].numpy(), width=1.0)
        row[3].set(xlabel="code, the most used first", ylabel="patches", yscale="log", xlim=(0, NUM_CODES))
    return figure


def _show(axis: plt.Axes, images: Tensor, columns: int, gap: int) -> None:
    """Pictures as a mosaic with ``columns`` columns."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    mosaic = torch.ones(rows * columns, channels, height + gap, width + gap)
    mosaic[:count, :, :height, :width] = images
    mosaic = mosaic.view(rows, columns, channels, height + gap, width + gap)
    mosaic = mosaic.permute(0, 3, 1, 4, 2).reshape(rows * (height + gap), columns * (width + gap), channels)
    axis.imshow(mosaic.expand(-1, -1, 3)[:-gap, :-gap].numpy())
    axis.axis("off")


def main() -> None:
    """Train on both, print the numbers, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="vq_vae_patches.png", help="where the picture goes")
    parser.add_argument("--steps", type=int, default=1000, help="training steps for each kind of pictures")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    outcomes = [run(pictures, steps=options.steps) for pictures in (digits(), photographs())]
    for outcome in outcomes:
        print(
            f"{outcome.pictures.name}: {outcome.usage:.1%} of {NUM_CODES} codes used, "
            f"perplexity {outcome.perplexity:.0f}, {outcome.psnr:.1f} dB"
        )
    picture(outcomes).savefig(options.output, dpi=80)


if __name__ == "__main__":
    main()
