"""Every example in a docstring and in the README runs."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import pytest
import torch

import isthmus

README = pathlib.Path(__file__).parents[1] / "README.md"
# The names an example may take for granted.
GIVEN = {"torch": torch, "isthmus": isthmus, "nn": isthmus.nn, "ops": isthmus.ops, "Tensor": torch.Tensor}


def modules():
    found = pkgutil.walk_packages(isthmus.__path__, "isthmus.")
    return sorted(m.name for m in found if not m.name.endswith("._C"))


@pytest.mark.parametrize("name", modules())
def test_docstrings(name):
    module = importlib.import_module(name)
    torch.manual_seed(0)
    result = doctest.testmod(module, extraglobs=GIVEN, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0


def test_every_public_op_has_an_example():
    for name in isthmus.ops.__all__:
        assert ">>>" in getattr(isthmus.ops, name).__doc__, name


def test_readme():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
