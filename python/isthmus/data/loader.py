"""An endless stream of shuffled batches from shards."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.data.shards import ActivationShards
from isthmus.random import fold_in, key


class ActivationLoader:
    """Batches of rows drawn from a buffer that shards refill, without end: epoch follows epoch.

    The stream reads the shards one after the other, in an order that is shuffled anew for each epoch. The buffer
    holds the next ``buffer_rows`` rows of it. A round visits all places of the buffer in random order; a batch takes
    the rows of the next ``batch_size`` places, and the next rows of the stream take their places. So every row is
    drawn once for each epoch, within two rounds of being read, and only the buffer is in memory.

    Which rows the buffer holds is a function of the seed and of the number of batches so far. That number is all of
    the state: :meth:`load_state_dict` reads these rows again and goes on bit for bit as the first loader would have.

    Distributed: each of ``world_size`` processes passes its ``rank`` and draws from its own part of every shard.

    Args:
        shards: a folder, or :class:`ActivationShards`.
        batch_size: rows of a batch.
        buffer_rows: rows in memory, in the dtype of the files; rounded up to a multiple of ``batch_size``. No more
            than an epoch has are used.
        seed: of the order of shards and of the draws.
        rank, world_size: which part of the rows, out of how many.
        dtype: of the batches; ``None`` keeps that of the files.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: as :class:`ActivationShards`.
        ValueError: ``batch_size`` or ``buffer_rows`` below 1, or a rank without rows.

    Example:
        >>> import tempfile, torch
        >>> from isthmus.data import ActivationLoader, ActivationWriter
        >>> folder = tempfile.mkdtemp()
        >>> with ActivationWriter(folder, format="npy") as writer:
        ...     writer.write(torch.randn(1000, 16))
        >>> loader = ActivationLoader(folder, batch_size=64, seed=1)
        >>> batch, state = next(loader), loader.state_dict()
        >>> again = ActivationLoader(folder, batch_size=64, seed=1)
        >>> again.load_state_dict(state)
        >>> torch.equal(next(loader), next(again))
        True
    """

    def __init__(
        self,
        shards: ActivationShards | str | Path,
        batch_size: int,
        *,
        buffer_rows: int = 65536,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("buffer_rows", buffer_rows)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        shards = shards if isinstance(shards, ActivationShards) else ActivationShards(shards)
        self.shards = shards.slice(rank, world_size)
        if len(self.shards) == 0:
            raise ValueError(f"rank {rank} of {world_size} gets no rows: the shards hold {len(shards)}")
        self.batch_size = batch_size
        self.buffer_rows = -(-min(buffer_rows, len(self.shards)) // batch_size) * batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.dtype = self.shards.dtype if dtype is None else dtype
        self.batches = 0
        self._buffer: Tensor | None = None
        self._order_of_epoch = _Orders(len(self.shards.segments), seed, purpose=0)
        self._order_of_round = _Orders(self.buffer_rows, seed, purpose=1)

    def __iter__(self) -> ActivationLoader:
        return self

    def __next__(self) -> Tensor:
        """The next batch, ``[batch_size, D]``."""
        if self._buffer is None:
            self._buffer = self._fill()
        drawn = self.batches * self.batch_size
        round_, done = divmod(drawn, self.buffer_rows)
        places = self._order_of_round(round_)[done : done + self.batch_size]
        batch = self._buffer[places].to(self.dtype)
        self._buffer[places] = self._stream(self.buffer_rows + drawn, self.batch_size)
        self.batches += 1
        return batch

    @property
    def epoch(self) -> float:
        """How often the rows of this rank have been drawn."""
        return self.batches * self.batch_size / len(self.shards)

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands, and what must be equal for another loader to go on from there."""
        return {"batches": self.batches, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader stood.

        Raises:
            ValueError: that loader had other rows, another seed, batch or buffer size, or another rank.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(f"{name} of the saved loader is {state.get(name)}, here it is {value}")
        self.batches = int(state["batches"])
        self._buffer = None

    def _identity(self) -> dict[str, int]:
        return {
            "rows": len(self.shards),
            "shards": len(self.shards.segments),
            "dim": self.shards.dim,
            "batch_size": self.batch_size,
            "buffer_rows": self.buffer_rows,
            "seed": self.seed,
            "rank": self.rank,
            "world_size": self.world_size,
        }

    def _fill(self) -> Tensor:
        """Read the rows that the buffer holds after ``batches`` batches."""
        held = self._held()
        first, end = int(held.min()), int(held.max()) + 1
        place = torch.full((end - first,), -1)
        place[held - first] = torch.arange(self.buffer_rows)
        buffer = torch.empty(self.buffer_rows, self.shards.dim, dtype=self.shards.dtype)
        for start in range(first, end, self.batch_size):
            places = place[start - first : start - first + self.batch_size]
            rows = self._stream(start, len(places))
            buffer[places[places >= 0]] = rows[places >= 0]
        return buffer

    def _held(self) -> Tensor:
        """The position in the stream of the row in each place of the buffer."""
        size = self.buffer_rows
        round_, done = divmod(self.batches * self.batch_size, size)
        held = torch.arange(size)
        if round_ > 0:
            held[self._order_of_round(round_ - 1)] = round_ * size + torch.arange(size)
        held[self._order_of_round(round_)[:done]] = (round_ + 1) * size + torch.arange(done)
        return held

    def _stream(self, position: int, count: int) -> Tensor:
        """``count`` rows of the stream from ``position`` on."""
        pieces = []
        while count > 0:
            epoch, offset = divmod(position, len(self.shards))
            order = [self.shards.segments[i] for i in self._order_of_epoch(epoch).tolist()]
            ends = list(accumulate(len(segment) for segment in order))
            i = bisect_right(ends, offset)
            start = offset - (ends[i] - len(order[i]))
            size = min(count, len(order[i]) - start)
            pieces.append(order[i].read("activations", start, start + size))
            position, count = position + size, count - size
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class _Orders:
    """Random orders of ``size`` things: one for each number, the last one kept."""

    def __init__(self, size: int, seed: int, purpose: int) -> None:
        self._size = size
        self._key = fold_in(key(seed), purpose)
        self._number = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __call__(self, number: int) -> Tensor:
        if number != self._number:
            generator = torch.Generator().manual_seed(int(fold_in(self._key, number)[0]))
            self._number, self._order = number, torch.randperm(self._size, generator=generator)
        return self._order
