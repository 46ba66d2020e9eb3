"""Between the tensors people have (images, sequences, heads, padding) and the rows that the ops of codebooks take."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VectorLayout(nn.Module):
    """Turn tensors of any layout into rows of the size of a code, and back.

    Rows are ``[N, d]``; with ``separate`` heads ``[H, N, d]``, one batch for each codebook. The mask of the rows
    has their shape without d.

    Args:
        dim: size D of a vector of the input.
        codebook_dim: size d of a code. Default: D / heads.
        heads: codes that describe one vector together.
        separate: rows of different heads meet different codebooks.
        channel_first: vectors lie along dimension 1 of the input: ``[B, D, ...]``.
        layernorm: normalise after the projection to heads · d.

    Raises:
        ValueError: ``heads`` does not divide ``dim``, or there is no projection to normalise after.
    """

    def __init__(
        self,
        dim: int,
        codebook_dim: int | None = None,
        *,
        heads: int = 1,
        separate: bool = False,
        channel_first: bool = False,
        layernorm: bool = False,
    ) -> None:
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        if codebook_dim is None and dim % heads:
            raise ValueError(f"heads={heads} does not divide dim={dim}; give codebook_dim")
        super().__init__()
        self.dim = dim
        self.heads = heads
        self.code_dim = dim // heads if codebook_dim is None else codebook_dim
        self.separate = separate and heads > 1
        self.channel_first = channel_first
        inner = heads * self.code_dim
        if layernorm and inner == dim:
            raise ValueError(f"layernorm_after_project_in: vectors of size {dim} need no projection to {inner}")
        self.project_in = nn.Linear(dim, inner) if inner != dim else nn.Identity()
        self.norm = nn.LayerNorm(inner) if layernorm else nn.Identity()
        self.project_out = nn.Linear(inner, dim) if inner != dim else nn.Identity()

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``[..., D]`` or ``[B, D, ...]`` to rows of ``dtype``."""
        axis = 1 if self.channel_first else -1
        if x.dim() < 1 + self.channel_first or x.shape[axis] != self.dim:
            expected = f"[B, {self.dim}, ...]" if self.channel_first else f"[..., {self.dim}]"
            raise ValueError(f"x has shape {list(x.shape)}; expected {expected}")
        x = self.norm(self.project_in(x.movedim(axis, -1).to(dtype))).to(dtype)
        if self.separate:
            return x.reshape(-1, self.heads, self.code_dim).transpose(0, 1)
        return x.reshape(-1, self.code_dim)

    def mask(self, x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
        """Which rows of ``x`` count, from a mask of its vectors or the lengths of its sequences."""
        shape = self.leading(x)
        if lengths is not None:
            if mask is not None:
                raise ValueError("give mask or lengths, not both")
            if len(shape) != 2 or lengths.shape != shape[:1]:
                raise ValueError(
                    f"lengths has shape {list(lengths.shape)} for vectors in {list(shape)}; expected one for each of "
                    "the sequences of x, [B] for vectors in [B, T]"
                )
            mask = torch.arange(shape[1], device=x.device) < lengths.unsqueeze(-1)
        if mask is None:
            return None
        if mask.dtype != torch.bool or mask.shape != shape:
            raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}; expected torch.bool {list(shape)}")
        return self.spread(mask)

    def spread(self, per_vector: Tensor) -> Tensor:
        """One value for each vector, repeated for all its rows."""
        if self.separate:
            return per_vector.reshape(-1).expand(self.heads, -1)
        return per_vector.reshape(-1, 1).expand(-1, self.heads).reshape(-1)

    def vectors(self, rows: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Rows back in the layout and dtype of ``x``; zeros where ``mask`` is False."""
        if self.separate:
            rows = rows.transpose(0, 1)
        out = self.project_out(rows.reshape(*self.leading(x), self.heads * self.code_dim))
        if mask is not None:
            live = mask[0] if self.separate else mask.view(-1, self.heads)[:, 0]
            out = torch.where(live.view(*self.leading(x), 1), out, 0)
        return out.movedim(-1, 1 if self.channel_first else -1).to(x.dtype)

    def indices(self, rows: Tensor, x: Tensor, *trailing: int) -> Tensor:
        """Values of rows, and their ``trailing`` shape, as those of vectors: ``[...]`` or ``[..., H]``, then that."""
        if self.separate:
            rows = rows.transpose(0, 1)
        heads = (self.heads,) if self.heads > 1 else ()
        return rows.reshape(*self.leading(x), *heads, *trailing)

    def of_rows(self, indices: Tensor) -> Tensor:
        """Values of vectors, ``[...]`` or ``[..., H]``, as those of rows."""
        return indices.reshape(-1, self.heads).T if self.separate else indices.reshape(-1)

    def decode(self, codes: Tensor, indices: Tensor | None = None) -> Tensor:
        """Codes ``[..., d]``, or ``[..., H, d]``, to vectors in the layout of the input.

        Zeros where all of the ``indices`` of a vector, where they are given, are −1.
        """
        leading = codes.shape[: -2 if self.heads > 1 else -1]
        out = self.project_out(codes.reshape(*leading, self.heads * self.code_dim))
        if indices is not None:
            absent = (indices == -1).unsqueeze(-1).flatten(len(leading)).all(dim=-1, keepdim=True)
            out = out.masked_fill(absent, 0.0)
        return out.movedim(-1, 1 if self.channel_first else -1)

    def leading(self, x: Tensor) -> torch.Size:
        """The shape of ``x`` without its vectors."""
        return x.shape[:1] + x.shape[2:] if self.channel_first else x.shape[:-1]
