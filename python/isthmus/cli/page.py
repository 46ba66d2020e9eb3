"""What the HTML pages of all commands share: one file with everything inside, for light and dark screens."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

_STYLE = Path(__file__).with_name("page.css")

# Two shores and the strip between them: an isthmus, and the outline of an autoencoder.
BANNER = """<svg class="banner" viewBox="0 0 960 90" preserveAspectRatio="none" aria-hidden="true">
<path d="M0 0C250 0 330 40 480 40S710 0 960 0V90C710 90 630 50 480 50S250 90 0 90Z"/></svg>"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def write_page(path: str | Path, title: str, style: Path, body: Iterable[str]) -> None:
    """Write parts of HTML below each other; ``style`` is the stylesheet that this page adds to the common one."""
    styles = "".join(sheet.read_text(encoding="utf-8") for sheet in (_STYLE, style))
    text = _PAGE.format(title=escape(title), style=styles, body="\n".join(filter(None, body)))
    Path(path).write_text(text, encoding="utf-8")
