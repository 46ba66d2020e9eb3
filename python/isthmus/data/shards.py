"""A folder of activation shards as one long table."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from isthmus.data import _npy, _safetensors

METADATA = "metadata.json"
VOCABULARY = "vocabulary.json"
FORMATS: dict[str, ModuleType] = {"npy": _npy, "safetensors": _safetensors}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Segment:
    """Rows ``start`` to ``stop`` of one shard."""

    path: Path
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor of the shard, counted from the start of the segment."""
        return _format(self.path).read(self.path, name, self.start + start, self.start + stop)


class ActivationShards:
    """The rows of a folder of shards, in the order of the names of the files.

    Only the headers of the files are read at first, and later the rows that are asked for: the table may be much
    larger than memory. :meth:`slice` and :meth:`split` give tables that share the files.

    A shard is a ``.safetensors`` file with a tensor ``activations`` (or a single tensor of any name) or an ``.npy``
    file. It may also hold ``tokens`` and ``sequences``, int64 ``[rows]`` (``NAME.tokens.npy`` and
    ``NAME.sequences.npy`` beside ``NAME.npy``): the token at each row and the sequence that it is from.

    Args:
        folder: where the shards are; or a single shard.

    Raises:
        FileNotFoundError: no such folder, or no shard in it.
        ValueError: shards that are no tables of float32, float16 or bfloat16, that differ in width or dtype, that
            hold no row, or a ``tokens`` or ``sequences`` that does not fit its rows.
        ModuleNotFoundError: a ``.safetensors`` file, and safetensors is not installed.

    Attributes:
        dim: D, the width of a row. dtype: of the rows in the files.
        has_tokens: whether every shard has ``tokens``. metadata: what ``metadata.json`` says.
        vocabulary: list of strings, the text of each token, or None; from ``vocabulary.json``.

    Example:
        >>> import tempfile, torch
        >>> from isthmus.data import ActivationShards, ActivationWriter
        >>> folder = tempfile.mkdtemp()
        >>> with ActivationWriter(folder, rows_per_shard=100, format="npy") as writer:
        ...     writer.write(torch.randn(250, 16))
        >>> shards = ActivationShards(folder)
        >>> len(shards), shards.dim, shards.read(90, 110).shape
        (250, 16, torch.Size([20, 16]))
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if not folder.exists():
            raise FileNotFoundError(f"folder of shards {folder} does not exist")
        paths = sorted(path for path in folder.iterdir() if _is_shard(path)) if folder.is_dir() else [folder]
        if not paths or not _is_shard(paths[0]):
            raise FileNotFoundError(f"{folder} holds no shards: expected .safetensors or .npy files")
        headers = [_inspect(path) for path in paths]
        self.dim, self.dtype = _common(paths, headers)
        self.has_tokens = all("tokens" in header.sidecars for header in headers)
        self.has_sequences = all("sequences" in header.sidecars for header in headers)
        beside = folder if folder.is_dir() else folder.parent
        self.metadata: dict[str, Any] = _json(beside / METADATA) or {}
        self.vocabulary: list[str] | None = _json(beside / VOCABULARY)
        self._set_segments([Segment(path, 0, header.rows) for path, header in zip(paths, headers, strict=True)])
        if len(self) == 0:
            raise ValueError(f"the shards of {folder} hold no rows")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __repr__(self) -> str:
        return f"ActivationShards({len(self.segments)} shards, {len(self)} rows, dim={self.dim}, dtype={self.dtype})"

    def slice(self, rank: int, world_size: int) -> ActivationShards:
        """The rows of one of ``world_size`` processes: the ``rank``-th equal part of every shard."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size={world_size}), got {rank}")
        return self._part(lambda rows: (rows * rank // world_size, rows * (rank + 1) // world_size))

    def split(self, held_out: float) -> tuple[ActivationShards, ActivationShards]:
        """Two tables: all but the last rows of every shard, and this fraction of them, in (0, 1)."""
        if not 0.0 < held_out < 1.0:
            raise ValueError(f"held_out must be in (0, 1), got {held_out}")
        first = self._part(lambda rows: (0, rows - round(rows * held_out)))
        return first, self._part(lambda rows: (rows - round(rows * held_out), rows))

    def read(self, start: int, stop: int, name: str = "activations") -> Tensor:
        """Rows ``start`` to ``stop`` in the dtype of the files; or their ``"tokens"`` or ``"sequences"``."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows {start} to {stop} of {len(self)}")
        pieces = []
        while start < stop:
            segment, offset = self._find(start)
            count = min(stop - start, len(segment) - offset)
            pieces.append(segment.read(name, offset, offset + count))
            start += count
        if pieces:
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return torch.empty((0, self.dim), dtype=self.dtype) if name == "activations" else torch.empty(0).long()

    def blocks(self, rows: int, limit: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """All rows in order, or evenly spread blocks of at most ``limit`` of them: (first row, rows)."""
        count = -(-len(self) // rows)
        wanted = count if limit is None else min(count, max(1, limit // rows))
        for i in range(wanted):
            start = i * count // wanted * rows
            size = rows if limit is None else min(rows, limit)
            yield start, self.read(start, min(start + size, len(self)))

    def place(self, row: int) -> tuple[str, int]:
        """The file of a row and its number there."""
        segment, offset = self._find(row)
        return segment.path.name, segment.start + offset

    def context(self, row: int, radius: int) -> tuple[int, int]:
        """First row and end of the neighbourhood of a row: same shard, same sequence, at most ``radius`` away."""
        segment, offset = self._find(row)
        start, stop = max(offset - radius, 0), min(offset + radius + 1, len(segment))
        if self.has_sequences:
            same = segment.read("sequences", start, stop).eq(segment.read("sequences", offset, offset + 1))
            # A sequence is one run of rows, so the equal ones around the row are its neighbours.
            start, stop = start + int(same.int().argmax()), stop - int(same.flip(0).int().argmax())
        first = row - offset
        return first + start, first + stop

    def _find(self, row: int) -> tuple[Segment, int]:
        i = bisect_right(self._ends, row)
        return self.segments[i], row - (self._ends[i] - len(self.segments[i]))

    def _part(self, bounds: Callable[[int], tuple[int, int]]) -> ActivationShards:
        """Of each segment the rows between two bounds that depend on its length."""
        part = ActivationShards.__new__(ActivationShards)
        part.__dict__.update(self.__dict__)
        cuts = [(segment, *bounds(len(segment))) for segment in self.segments]
        part._set_segments([replace(s, start=s.start + start, stop=s.start + stop) for s, start, stop in cuts])
        return part

    def _set_segments(self, segments: list[Segment]) -> None:
        self.segments = [segment for segment in segments if len(segment) > 0]
        self._ends = list(accumulate(len(segment) for segment in self.segments))


@dataclass(frozen=True)
class _Header:
    rows: int
    dim: int
    dtype: torch.dtype
    sidecars: frozenset[str]


def _inspect(path: Path) -> _Header:
    found = _format(path).header(path, "activations")
    if found is None:
        raise ValueError(f"{path} holds several tensors, none of them named 'activations'")
    shape, dtype = found
    if len(shape) != 2:
        raise ValueError(f"{path} holds a tensor of shape {list(shape)}; expected [rows, D]")
    if dtype not in DTYPES:
        raise ValueError(f"{path} holds {dtype}; expected float32, float16 or bfloat16 in little-endian order")
    sidecars = set()
    for name in ("tokens", "sequences"):
        found = _format(path).header(path, name)
        if found is None:
            continue
        if found != ((shape[0],), torch.int64):
            raise ValueError(f"{name} of {path} are {found[1]} of shape {list(found[0])}; expected int64 [{shape[0]}]")
        sidecars.add(name)
    return _Header(shape[0], shape[1], dtype, frozenset(sidecars))


def _common(paths: Sequence[Path], headers: Sequence[_Header]) -> tuple[int, torch.dtype]:
    first = headers[0]
    for path, header in zip(paths, headers, strict=True):
        if header.dim != first.dim:
            raise ValueError(f"shards differ in width: {paths[0]} has {first.dim} columns, {path} has {header.dim}")
        if header.dtype != first.dtype:
            raise ValueError(f"shards differ in dtype: {paths[0]} is {first.dtype}, {path} is {header.dtype}")
    return first.dim, first.dtype


def _format(path: Path) -> ModuleType:
    return FORMATS[path.suffix[1:]]


def _is_shard(path: Path) -> bool:
    return any(kind.is_shard(path) for kind in FORMATS.values())


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
