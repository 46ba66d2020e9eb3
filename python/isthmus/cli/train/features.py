"""The feature page, one HTML file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.cli import page
from isthmus.cli.train.charts import Series, histogram, line_chart, number
from isthmus.cli.train.evaluate import Evaluation, activations_around, evaluate
from isthmus.data import ActivationShards

STYLE = Path(__file__).with_name("features.css")
EXAMPLES = 6
# A context: so many rows to either side, of which so many letters are shown.
RADIUS = 24
LETTERS = 24


def write_page(
    path: str | Path,
    sae: Any,
    shards: ActivationShards,
    *,
    scale: float = 1.0,
    history: Iterable[Mapping[str, Any]] = (),
    title: str = "Features",
    features: Sequence[int] | int = 48,
    limit: int | None = 262144,
    facts: Mapping[str, str] | None = None,
) -> Evaluation:
    """Judge a sparse autoencoder on the rows of some shards, and write the page of its features.

    Args:
        path: of the HTML file.
        sae: a trained sparse autoencoder of ``isthmus.nn``.
        shards: rows it is judged on; with tokens and a vocabulary the page shows text, otherwise the numbers of rows.
        scale: what rows were multiplied by in training.
        history: the lines of ``metrics.jsonl``: mappings with ``step``, ``split`` (``"train"`` or ``"held_out"``) and
            any of ``loss``, ``explained_variance``, ``l0``, ``dead``.
        title: heading of the page.
        features: which ones to show; or how many, evenly spread from those that fire most to those that fire least.
        limit: judge so many rows at most, in blocks spread over all.
        facts: names and values for the foot of the page.

    Returns:
        What was found, as shown on the page.
    """
    # Neighbouring rows say the same thing twice, so more are remembered than shown.
    found = evaluate(sae, shards, scale=scale, limit=limit, strongest=4 * EXAMPLES)
    shown = _spread(found.density, features) if isinstance(features, int) else list(features)
    history = list(history)
    body = [
        _header(title, sae, shards),
        _numbers(found),
        _training(history) if history else "",
        _density(found),
        _features(shown, found, sae, shards, scale),
        _footer(facts or {}),
    ]
    page.write_page(path, title, STYLE, body)
    return found


def _spread(density: Tensor, count: int) -> list[int]:
    """Features that fire, evenly spread from frequent to rare."""
    order = density.argsort(descending=True, stable=True)[: int((density > 0).sum())]
    count = min(count, len(order))
    return [int(order[i * (len(order) - 1) // max(count - 1, 1)]) for i in range(count)]


def _header(title: str, sae: Any, shards: ActivationShards) -> str:
    layer = shards.metadata.get("layer")
    source = f" of the {escape(str(shards.metadata.get('side', 'output')))} of <b>{escape(layer)}</b>" if layer else ""
    return f"""<header>{page.BANNER}<h1>{escape(title)}</h1>
<p>A dictionary of {number(sae.num_features)} features ({escape(type(sae).__name__)}) that explains
activations{source} with {number(shards.dim)} dimensions.</p></header>"""


def _numbers(found: Evaluation) -> str:
    total = len(found.density)
    share = f"{100.0 * found.silent / total:.1f} %"
    cells = [
        ("explained variance", number(found.explained_variance), "", ""),
        ("active features per row", number(found.l0), "", ""),
        ("features that never fire", number(found.silent), f" of {number(total)}: {share}", ""),
        ("rows judged", number(found.rows), "", ""),
    ]
    if found.skipped:
        cells.append(("rows with NaN or infinity", number(found.skipped), " left out", "alarm"))
    items = "".join(
        f'<div class="{state}"><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>'
        for name, value, more, state in cells
    )
    return f'<dl class="numbers">{items}</dl>'


def _training(history: Sequence[Mapping[str, Any]]) -> str:
    charts = [
        line_chart(title, [_series(history, split, name) for split in ("train", "held_out")], "step")
        for title, name in (
            ("Loss", "loss"),
            ("Explained variance", "explained_variance"),
            ("Active features per row", "l0"),
            ("Dead features", "dead"),
        )
        if any(name in line for line in history)
    ]
    return f'<section><h2>Training</h2><div class="charts">{"".join(charts)}</div></section>'


def _series(history: Sequence[Mapping[str, Any]], split: str, name: str) -> Series:
    points = [(line["step"], line[name]) for line in history if line["split"] == split and name in line]
    label, colour = {"train": ("training", "isthmus"), "held_out": ("held out", "second")}[split]
    return Series(label, colour, [(float(step), float("nan") if y is None else float(y)) for step, y in points])


def _density(found: Evaluation) -> str:
    logs = found.density[found.density > 0].double().log10().tolist()
    chart = histogram(
        "Features by firing frequency", logs, silent=found.silent, x_label="log₁₀ of the fraction of rows"
    )
    return f"""<section><h2>Density</h2><div class="charts">
<p>In how many rows each feature fires. Features far to the right say little of a single row; those far to the left, and
those that never fire, explain little of all of them.</p>
{chart}</div></section>"""


def _features(shown: Sequence[int], found: Evaluation, sae: Any, shards: ActivationShards, scale: float) -> str:
    if not shown:
        return '<section><h2>Features</h2><p class="nothing">No feature fires in any row.</p></section>'
    rows = {feature: _apart(found.strongest.rows[feature].tolist()) for feature in shown}
    pairs = [(feature, row) for feature in shown for row in rows[feature]]
    lines: dict[int, list[str]] = {feature: [] for feature in shown}
    if shards.has_tokens and pairs:
        windows = [shards.context(row, RADIUS) for _, row in pairs]
        wanted = torch.tensor([feature for feature, _ in pairs])
        strengths = activations_around(sae, shards, windows, wanted, scale=scale)
        for (feature, row), window, strength in zip(pairs, windows, strengths, strict=True):
            lines[feature].append(_context(shards, row, window, strength, found.strongest.values[feature, 0].item()))
    else:
        for feature, row in pairs:
            values = found.strongest.values[feature]
            value = values[found.strongest.rows[feature] == row].item()
            lines[feature].append(_row(shards, row, value, values[0].item()))
    cards = "".join(_card(feature, found, lines[feature]) for feature in shown)
    what = "their contexts; the deeper the colour, the more active it is" if shards.has_tokens else "their places"
    return f"""<section><h2>Features</h2>
<p>For each feature the rows in which it is most active, with {what}.</p>
<div class="features">{cards}</div></section>"""


def _apart(rows: Sequence[int]) -> list[int]:
    """The first rows that do not lie in the context of one before them."""
    chosen: list[int] = []
    for row in rows:
        if row >= 0 and len(chosen) < EXAMPLES and all(abs(row - other) > RADIUS for other in chosen):
            chosen.append(row)
    return chosen


def _card(feature: int, found: Evaluation, lines: Sequence[str]) -> str:
    density = found.density[feature].item()
    often = f"1 row in {number(round(1.0 / density))}" if density else "never"
    return (
        f'<article id="f{feature}"><h3><a href="#f{feature}">{feature}</a><small>fires in {often}</small></h3>'
        f"<ol>{''.join(lines)}</ol></article>"
    )


def _row(shards: ActivationShards, row: int, value: float, most: float) -> str:
    name, place = shards.place(row)
    bar = f'<i class="bar" style="--a:{_share(value, most):.2f}"></i>'
    return f"<li><b>{value:#.3g}</b>{bar}<span>{escape(name)}, row {number(place)}</span></li>"


def _context(shards: ActivationShards, row: int, window: tuple[int, int], strength: Tensor, most: float) -> str:
    texts = [_text(shards.vocabulary, token) for token in shards.read(*window, "tokens").tolist()]
    peak = row - window[0]
    first = peak - _fitting(reversed(texts[:peak]))
    end = peak + 1 + _fitting(texts[peak + 1 :])
    spans = []
    for i in range(first, end):
        share, text = _share(strength[i].item(), most), escape(texts[i])
        state = ' class="peak"' if i == peak else ""
        spans.append(f'<span{state} style="--a:{share:.2f}">{text}</span>' if share > 0 or i == peak else text)
    before, after = "".join(spans[: peak - first]), "".join(spans[peak - first :])
    return f"<li><b>{strength[peak].item():#.3g}</b><code><i>{before}</i>{after}</code></li>"


def _fitting(texts: Iterable[str]) -> int:
    """How many of the texts fit into the letters that a context has on one side."""
    ends = accumulate(len(text) for text in texts)
    return sum(end <= LETTERS for end in ends)


def _text(vocabulary: Sequence[str] | None, token: int) -> str:
    if vocabulary is None or not 0 <= token < len(vocabulary):
        return f"{token} "
    # Line breaks would tear the line apart, and other control characters are not allowed in HTML.
    text = vocabulary[token].replace("\n", "↵").replace("\t", "⇥")
    return "".join(sign if sign.isprintable() else "·" for sign in text)


def _share(value: float, most: float) -> float:
    return min(max(value / most, 0.0), 1.0) if most > 0 else 0.0


def _footer(facts: Mapping[str, str]) -> str:
    items = " · ".join(f"<b>{escape(name)}</b> {escape(value)}" for name, value in facts.items())
    return f"<footer><p>{items}</p></footer>" if items else ""
