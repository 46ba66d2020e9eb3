"""The pictures of the report, each drawn for light and for dark pages on a clear background."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator
from torch import Tensor

from isthmus.cli.demo.digits import CLASSES, Digits, rotate
from isthmus.cli.demo.train import Outcome

WIDTH = 9.6
DOTS_PER_INCH = 200


@dataclass(frozen=True)
class Theme:
    """Colours of one page style; the style sheet of the report repeats them."""

    ink: str
    muted: str
    isthmus: str
    plain: str

    def sides(self, outcome: Outcome) -> list[tuple[str, Any, str]]:
        """Name, runs and colour of both sides."""
        colours = (self.isthmus, self.plain)
        return [(name, side, colour) for (name, side), colour in zip(outcome.sides.items(), colours, strict=True)]


LIGHT = Theme(ink="#16303a", muted="#66777d", isthmus="#0b7a85", plain="#c2661c")
DARK = Theme(ink="#e4eeee", muted="#8ea1a6", isthmus="#45c8cc", plain="#f2a65e")

Draw = Callable[[Theme], Figure]


def encode(figure: Figure) -> str:
    """A figure as the base64 text of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, transparent=True)
    return base64.b64encode(buffer.getvalue()).decode()


def training(outcomes: Sequence[Outcome]) -> Draw:
    """Loss of every run against the step, one panel for each system."""

    def draw(theme: Theme) -> Figure:
        figure = _figure(2.5)
        for axes, outcome in zip(figure.subplots(1, len(outcomes)), outcomes, strict=True):
            _style(axes, theme)
            for (_, side, colour), width in zip(theme.sides(outcome), (3.0, 0.8), strict=True):
                for losses in side.losses:
                    axes.plot(_smooth(losses), color=colour, linewidth=width, alpha=0.75)
            axes.set_title(outcome.system.name, color=theme.ink, fontsize=10)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
            axes.set_xlabel("step", color=theme.muted, fontsize=8)
        return figure

    return draw


def reconstructions(outcome: Outcome, images: Tensor, rebuilt: dict[str, Tensor]) -> Draw:
    """Digits above what each side makes of them."""

    def draw(theme: Theme) -> Figure:
        figure = _figure(2.1)
        rows = [("held-out digit", images, theme.ink)]
        rows += [(name, rebuilt[name], colour) for name, _, colour in theme.sides(outcome)]
        for axes, (name, pictures, colour) in zip(figure.subplots(3, 1), rows, strict=True):
            _mosaic(axes, pictures, colour, columns=len(pictures))
            axes.set_title(name, color=colour, fontsize=9, loc="left", pad=3)
        return figure

    return draw


def samples(outcome: Outcome, drawn: dict[str, Tensor]) -> Draw:
    """Decoded draws from the prior, both sides next to each other."""

    def draw(theme: Theme) -> Figure:
        figure = _figure(3.2)
        for axes, (name, _, colour) in zip(figure.subplots(1, 2), theme.sides(outcome), strict=True):
            _mosaic(axes, drawn[name], colour, columns=10)
            axes.set_title(name, color=colour, fontsize=9, loc="left")
        return figure

    return draw


def code_usage(outcome: Outcome, images: Tensor, shown: int = 160) -> Draw:
    """The most used codes as the mean patch that each stands for, and how even the usage is."""
    usage, patches = {}, {}
    for name, side in outcome.sides.items():
        model: Any = side.models[0]
        indices = model.encode(images).flatten()
        cut = model.patches(images).reshape(len(indices), -1)
        counts = torch.bincount(indices, minlength=model.bottleneck.num_codes)
        sums = torch.zeros(len(counts), cut.shape[1]).index_add_(0, indices, cut)
        order = counts.argsort(descending=True)
        usage[name] = counts[order] / len(indices)
        patches[name] = (sums / counts.clamp_min(1).unsqueeze(-1))[order[:shown]]

    def draw(theme: Theme) -> Figure:
        figure = _figure(3.4)
        left, right = figure.subplots(1, 2, width_ratios=(5, 4))
        (name, _, colour), _ = theme.sides(outcome)
        _mosaic(left, patches[name], colour, columns=16)
        left.set_title(f"the {shown} codes used most", color=colour, fontsize=9, loc="left")
        _style(right, theme)
        for (name, _, colour), width in zip(theme.sides(outcome), (3.5, 1.2), strict=True):
            share = 100.0 * usage[name]
            perplexity = torch.special.entr(usage[name]).sum().exp().item()
            label = f"{name}: perplexity {perplexity:.0f}"
            right.plot(share, color=colour, linewidth=width, alpha=0.85, label=label)
        right.set_xlabel("code, most used first", color=theme.muted, fontsize=8)
        right.set_ylabel("share of all patches, %", color=theme.muted, fontsize=8)
        right.set_yscale("log")
        right.yaxis.set_major_formatter("{x:g}")
        right.legend(frameon=False, labelcolor=theme.ink, fontsize=8)
        return figure

    return draw


def features(outcome: Outcome, digits: Digits, top: int = 10) -> Draw:
    """For each class the two features that favour it most, as the digits that excite them most."""
    images = torch.cat([digits.train, digits.test])
    labels = torch.cat([digits.train_labels, digits.test_labels])
    model: Any = outcome.isthmus.models[0]
    model.eval()
    with torch.no_grad():
        values, indices = model(model.activations(images))[1:3]
    model.train()
    strength = torch.zeros(len(images), model.bottleneck.num_features)
    strength.scatter_(1, indices, values)
    mass = torch.stack([strength[labels == digit].sum(dim=0) for digit in range(CLASSES)])
    # Activation inside the class less activation outside it.
    favourites = (2.0 * mass - mass.sum(dim=0)).topk(2, dim=-1).indices

    def draw(theme: Theme) -> Figure:
        figure = _figure(5.4)
        for digit, pair in enumerate(figure.subplots(CLASSES, 2)):
            for axes, feature in zip(pair, favourites[digit].tolist(), strict=True):
                best = strength[:, feature].topk(top).indices
                _mosaic(axes, images[best], theme.isthmus, columns=top)
                axes.set_ylabel(f"{feature}", color=theme.muted, fontsize=8, rotation=0, ha="right", va="center")
        return figure

    return draw


def uncertainty(outcome: Outcome, digits: Digits) -> Draw:
    """Predictive entropy and accuracy as the held-out digits turn."""
    angles = np.arange(-90, 91, 15)
    turned = torch.cat([rotate(digits.test, float(angle)) for angle in angles])
    truth = digits.test_labels.repeat(len(angles))
    curves = {
        name: np.stack([_judge(model, turned, truth, len(angles)) for model in side.models])
        for name, side in outcome.sides.items()
    }
    example = digits.test[digits.test_labels == 2][:1]
    turning = [rotate(example, float(angle)) for angle in angles]

    def draw(theme: Theme) -> Figure:
        figure = _figure(4.8)
        strip, upper, lower = figure.subplots(3, 1, sharex=True, height_ratios=(1.0, 3.0, 1.8))
        for angle, picture in zip(angles, turning, strict=True):
            inset = strip.inset_axes((angle - 6, 0, 12, 1), transform=strip.transData)
            _mosaic(inset, picture, theme.ink, columns=1)
        strip.axis("off")
        for name, _, colour in theme.sides(outcome):
            entropy, single, accuracy = np.moveaxis(curves[name], 1, 0)
            _band(upper, angles, entropy, colour, "-", f"{name}: all networks together")
            _band(upper, angles, single, colour, ":", f"{name}: each network alone")
            _band(lower, angles, 100.0 * accuracy, colour, "-", name)
        for axes, title in ((upper, "predictive entropy, nats"), (lower, "accuracy, %")):
            _style(axes, theme)
            axes.set_ylabel(title, color=theme.muted, fontsize=8)
            axes.set_ylim(bottom=0.0)
            axes.set_xticks(angles)
        upper.legend(frameon=False, labelcolor=theme.ink, fontsize=8, ncols=2, loc="lower center")
        lower.set_xlabel("rotation, degrees", color=theme.muted, fontsize=8)
        return figure

    return draw


def _judge(model: Any, images: Tensor, labels: Tensor, groups: int) -> np.ndarray:
    """Entropy of the average of networks, average entropy, and accuracy, for each group."""
    networks = model.predict(images, 16)
    mean = networks.mean(dim=0)
    entropy = torch.special.entr(mean).sum(dim=-1)
    single = torch.special.entr(networks).sum(dim=-1).mean(dim=0)
    right = (mean.argmax(dim=-1) == labels).float()
    return torch.stack([entropy, single, right]).view(3, groups, -1).mean(dim=-1).numpy()


def _band(axes: Axes, x: np.ndarray, runs: np.ndarray, colour: str, line: str, label: str) -> None:
    """Mean over the runs, and their range as a shade."""
    axes.plot(x, runs.mean(axis=0), line, color=colour, linewidth=1.8, label=label)
    axes.fill_between(x, runs.min(axis=0), runs.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def _mosaic(axes: Axes, images: Tensor, colour: str, columns: int) -> None:
    """Square pictures [N, side²] with values 0..1 as a grid; 0 is clear, 1 the full colour."""
    side = round(images.shape[1] ** 0.5)
    gap = side // 4
    rows = len(images) // columns
    grid = images.reshape(rows, columns, side, side).numpy()
    padded = np.pad(grid, ((0, 0), (0, 0), (0, gap), (0, gap)))
    sheet = padded.transpose(0, 2, 1, 3).reshape(rows * (side + gap), columns * (side + gap))
    axes.imshow(
        sheet[:-gap, :-gap],
        cmap=LinearSegmentedColormap.from_list("ink", [to_rgba(colour, 0.0), to_rgba(colour)]),
        vmin=0.0,
        vmax=1.0,
        interpolation="nearest",
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(wspace=0.06))


def _style(axes: Axes, theme: Theme) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.muted)
    axes.tick_params(which="both", colors=theme.muted, labelsize=8)


def _smooth(losses: Sequence[float], window: int = 9) -> np.ndarray:
    """Running median: batches are small, and the curve matters more than its fuzz."""
    window = min(window, len(losses))
    return np.median(np.lib.stride_tricks.sliding_window_view(losses, window), axis=-1)
