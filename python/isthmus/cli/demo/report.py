"""The report, one HTML file."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from isthmus.cli.demo import pictures
from isthmus.cli.demo.digits import Digits
from isthmus.cli.demo.sections import Picture, Section, sections
from isthmus.cli.demo.table import HEADINGS, lines, notes
from isthmus.cli.demo.train import ISTHMUS, PLAIN, Outcome
from isthmus.cli.page import BANNER, write_page

STYLE = Path(__file__).with_name("report.css")


def write(path: Path, outcomes: Sequence[Outcome], digits: Digits, machine: dict[str, str]) -> None:
    """Draw all pictures and write the page to ``path``."""
    training = Picture(
        "Training loss",
        pictures.training(outcomes),
        "Every run of both sides: the thin line of plain PyTorch runs inside the broad one of "
        "Isthmus, so both learn the same thing at the same pace.",
    )
    runs = len(outcomes[0].isthmus.scores)
    body = [
        _header(len(digits.train) + len(digits.test)),
        f"<section><h2>Results</h2>{_table(outcomes)}{_notes(runs)}{_figure(training)}</section>",
        *(_section(section) for section in sections(outcomes, digits)),
        _footer(machine),
    ]
    write_page(path, "Isthmus demo", STYLE, body)


def _header(count: int) -> str:
    return f"""<header>{BANNER}<h1>Isthmus demo</h1>
<p>Four models with a narrow place in the middle, trained on {count} handwritten digits: once with
the bottleneck on <b class="isthmus">{ISTHMUS}</b> ops, once in plain <b class="plain">{PLAIN}</b>.
Same data, same first weights, same meaning; what differs is time and memory.</p></header>"""


def _table(outcomes: Sequence[Outcome]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    return (
        f'<div class="wide"><table><thead><tr><th></th><th></th>{head}</tr></thead>'
        f"{''.join(_block(outcome) for outcome in outcomes)}</table></div>"
    )


def _block(outcome: Outcome) -> str:
    ours, theirs, verdict = ("".join(f"<td>{cell}</td>" for cell in row) for row in lines(outcome))
    state = "agree" if outcome.agreement.holds else "disagree"
    system = outcome.system
    return f"""<tbody>
<tr><th rowspan="3">{system.name}<small>{system.score_name}</small></th>
<td class="isthmus">{ISTHMUS}</td>{ours}</tr>
<tr><td class="plain">{PLAIN}</td>{theirs}</tr>
<tr class="verdict {state}"><td></td>{verdict}</tr>
</tbody>"""


def _notes(runs: int) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes(runs))
    return f'<ul class="notes">{items}</ul>'


def _section(section: Section) -> str:
    figures = "\n".join(_figure(picture) for picture in section.pictures)
    return f"<section><h2>{section.title}</h2>\n<p>{section.lead}</p>\n{figures}\n</section>"


def _figure(picture: Picture) -> str:
    light, dark = (
        f"data:image/png;base64,{pictures.encode(picture.draw(theme))}" for theme in (pictures.LIGHT, pictures.DARK)
    )
    return f"""<figure><h3>{picture.title}</h3>
<picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">
<img src="{light}" alt="{picture.title}"></picture>
<figcaption>{picture.see}</figcaption></figure>"""


def _footer(machine: dict[str, str]) -> str:
    facts = " · ".join(f"<b>{escape(name)}</b> {escape(value)}" for name, value in machine.items())
    return f"<footer><p>{facts}</p></footer>"
