"""docs/from-vector-quantize-pytorch.md names what exists."""

import inspect
import pathlib
import re

import isthmus
from isthmus import nn

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "from-vector-quantize-pytorch.md").read_text()
QUANTIZERS = [nn.VectorQuantizer, nn.ResidualVQ, nn.QINCo, nn.SimVQ, nn.HierarchicalVQ, nn.RandomProjectionQuantizer]
TERMS = [nn.CodeOrthogonality, nn.CodeDiversity, nn.CommitmentCrossEntropy, nn.AffineCodebook]
# What the page calls a thing of the reader's own.
STAND_INS = {"torch", "Sequential", "ops", "quantizer", "residual", "book", "index"}


def known_names():
    """Parameters and members of what the page is about, and public names of the packages."""
    names = {*nn.__all__, *isthmus.ops.__all__, "True", *nn.VectorQuantizerOutput._fields, *STAND_INS}
    for kind in QUANTIZERS + TERMS:
        instance_names = set(kind.__annotations__) | {name for base in kind.__mro__ for name in vars(base)}
        names |= instance_names | {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
        for function in (kind, *(member for _, member in inspect.getmembers(kind, inspect.isfunction))):
            names |= set(inspect.signature(function).parameters)
    return names


def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "page", "exec"), {})


def test_right_columns_name_what_exists():
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    known = known_names()
    for row in rows:
        for quoted in re.findall(r"`([^`]+)`", row[1]):
            code = re.sub(r'"[^"]*"', "", quoted)
            for name in re.findall(r"(?<![.\w])[A-Za-z_]\w+", code):
                assert name in known, f"{name} in {row[1]}"
