"""Rows of activations to shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from isthmus.data.shards import DTYPES, FORMATS, METADATA, VOCABULARY


class ActivationWriter:
    """Write rows ``[n, D]`` to a folder, ``rows_per_shard`` to a file, in the order in which they come.

    Files appear under their final name only when they are whole. At most one shard is kept in memory. Beside them
    lie ``metadata.json`` and, if given, ``vocabulary.json``. Use it as a context manager, or call :meth:`close`: the
    last shard is written then.

    Args:
        folder: made if it does not exist; must not hold shards yet.
        rows_per_shard: rows of every file but the last.
        format: ``"safetensors"`` (``pip install "isthmus[data]"``) or ``"npy"``.
        vocabulary: the text of each token, for the contexts on a feature page.
        metadata: anything JSON can hold, such as the names of model and text; :func:`harvest` adds the layer.

    Raises:
        ValueError: unknown ``format``, ``rows_per_shard`` below 1, or rows or sidecars that do not fit.
        FileExistsError: ``folder`` holds shards.

    Example:
        >>> import tempfile, torch
        >>> from isthmus.data import ActivationWriter
        >>> folder = tempfile.mkdtemp()
        >>> with ActivationWriter(folder, format="npy", metadata={"model": "tiny"}) as writer:
        ...     writer.write(torch.randn(300, 16).half())
        >>> writer.rows
        300
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        rows_per_shard: int = 131072,
        format: str = "safetensors",
        vocabulary: Sequence[str] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        if format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}")
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard must be at least 1, got {rows_per_shard}")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if any(kind.is_shard(path) for kind in FORMATS.values()):
                raise FileExistsError(f"{self.folder} already holds shards, such as {path.name}")
        self.rows_per_shard = rows_per_shard
        self.format = format
        self.metadata = dict(metadata or {})
        self.rows = 0
        self._shards = 0
        self._shard: dict[str, Tensor] = {}
        self._filled = 0
        self._layout: tuple[Any, ...] = ()
        if vocabulary is not None:
            self._write_json(VOCABULARY, list(vocabulary))

    def write(self, rows: Tensor, *, tokens: Tensor | None = None, sequences: Tensor | None = None) -> None:
        """Append rows.

        Args:
            rows: ``[n, D]`` in float32, float16 or bfloat16, the same D and dtype every time.
            tokens: int64 ``[n]``, the token at each row; every time or never.
            sequences: int64 ``[n]``, the number of the sequence that each row is from; every time or never.
        """
        given = {"activations": rows, "tokens": tokens, "sequences": sequences}
        tensors = {name: tensor.detach().cpu() for name, tensor in given.items() if tensor is not None}
        self._check(tensors)
        if not self._shard:
            self._shard = {
                name: tensor.new_empty(self.rows_per_shard, *tensor.shape[1:]) for name, tensor in tensors.items()
            }
        done = 0
        while done < len(rows):
            count = min(len(rows) - done, self.rows_per_shard - self._filled)
            for name, tensor in tensors.items():
                self._shard[name][self._filled : self._filled + count] = tensor[done : done + count]
            done += count
            self.rows += count
            self._filled += count
            if self._filled == self.rows_per_shard:
                self._flush()

    def close(self) -> None:
        """Write what is left as the last shard."""
        if self._filled > 0:
            self._flush()

    def __enter__(self) -> ActivationWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Rows that came before an error are good rows.
        self.close()

    def _check(self, tensors: dict[str, Tensor]) -> None:
        rows = tensors["activations"]
        if rows.ndim != 2 or rows.dtype not in DTYPES:
            raise ValueError(
                f"rows are {rows.dtype} of shape {list(rows.shape)}; expected float32, float16 or bfloat16 [n, D]"
            )
        for name in tensors.keys() - {"activations"}:
            tensor = tensors[name]
            if tensor.shape != rows.shape[:1] or tensor.dtype != torch.int64:
                raise ValueError(
                    f"{name} are {tensor.dtype} of shape {list(tensor.shape)}; expected int64 [{len(rows)}]"
                )
        layout = rows.shape[1], rows.dtype, *sorted(tensors)
        if self._layout and layout != self._layout:
            raise ValueError(f"(D, dtype, tensors) were {self._layout} so far, got {layout}")
        self._layout = layout

    def _flush(self) -> None:
        if self._shards == 0:
            self._write_json(METADATA, self.metadata)
        tensors = {name: tensor[: self._filled] for name, tensor in self._shard.items()}
        path = self.folder / f"activations-{self._shards:05d}.{self.format}"
        FORMATS[self.format].write(path, tensors)
        self._shards += 1
        self._filled = 0

    def _write_json(self, name: str, content: Any) -> None:
        (self.folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
