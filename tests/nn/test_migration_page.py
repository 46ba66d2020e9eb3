"""docs/from-vector-quantize-pytorch.md names what exists."""

import inspect
import pathlib
import re

import isthmus
from isthmus import nn

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "from-vector-quantize-pytorch.md").read_text()
# What the page calls a thing of the reader's own.
STAND_INS = {"torch", "Sequential", "softplus", "ops", "quantizer", "out", "offset", "residual", "book", "index"}


def known_names():
    """Parameters, members and public names of the modules."""
    names = {*nn.__all__, *isthmus.ops.__all__, "True", *STAND_INS}
    for kind in (getattr(nn, name) for name in nn.__all__):
        if not inspect.isclass(kind):
            continue
        names |= set(getattr(kind, "_fields", ()))
        for base in kind.__mro__:
            names |= {*vars(base), *getattr(base, "__annotations__", {})}
        for function in (kind, *(member for _, member in inspect.getmembers(kind, inspect.isfunction))):
            names |= set(inspect.signature(function).parameters)
        # Options that are handed on are typed by dictionaries next to their module.
        for neighbour in vars(inspect.getmodule(kind)).values():
            if inspect.isclass(neighbour) and issubclass(neighbour, dict):
                names |= set(neighbour.__annotations__)
    return names


def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "page", "exec"), {})


def test_right_columns_name_what_exists():
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    quoted = [part for row in rows for part in re.findall(r"`([^`]+)`", row[1])]
    named = {name for part in quoted for name in re.findall(r"(?<![.\w\"])[A-Za-z_]\w+", part)}
    assert sorted(named - known_names()) == []
