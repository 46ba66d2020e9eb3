"""Loads the compiled extension, or says in one sentence why it cannot be loaded.

torch comes first: the extension takes its symbols from the libtorch that is already in the process.
"""

import importlib
import importlib.util
import re

import torch

OLDEST_TORCH = (2, 10)


def _torch_version() -> tuple[int, int]:
    major, minor = re.match(r"(\d+)\.(\d+)", torch.__version__).groups()  # type: ignore[union-attr]
    return int(major), int(minor)


def load() -> None:
    """Import isthmus._C, which registers every op. Raises ImportError with the original error chained."""
    if _torch_version() < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(f"isthmus needs torch {wanted} or later; this is torch {torch.__version__}.")
    if importlib.util.find_spec("isthmus._C") is None:
        raise ImportError(
            "isthmus is not compiled: its extension isthmus._C does not exist. Build it with "
            "`pip install --no-build-isolation -e .` in the source tree."
        )
    try:
        importlib.import_module("isthmus._C")
    except Exception as error:
        raise ImportError(
            f"isthmus is installed, but its extension does not load under torch {torch.__version__}: {error}. "
            "Rebuild it with `pip install --no-build-isolation --force-reinstall .` in the source tree."
        ) from error


load()
