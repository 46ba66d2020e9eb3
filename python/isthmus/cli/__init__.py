"""The `isthmus` command. Its packages are an extra, so a plain installation must say what to add."""

from importlib.util import find_spec
from typing import NoReturn

_missing = [name for name in ("matplotlib", "rich", "safetensors", "sklearn", "typer") if find_spec(name) is None]

if _missing:

    def app() -> NoReturn:
        """Stand in for the command line that cannot be loaded."""
        needs = ", ".join(_missing)
        raise SystemExit(f'The isthmus command needs {needs}: run pip install "isthmus[cli]".')

else:
    from isthmus.cli.main import app  # type: ignore[assignment]

__all__ = ["app"]
