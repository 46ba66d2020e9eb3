"""What quantizers without a codebook table share: layouts, projections, a rotation, and the way back from indices."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor, nn

from ._codebook_layout import VectorLayout


class ScalarLayout(TypedDict, total=False):
    """Arguments that every scalar quantizer hands on to :class:`ScalarQuantizer`."""

    channel_first: bool
    keep_num_codebooks_dim: bool | None
    projection_has_bias: bool
    orthogonal_rotation: bool


class ScalarQuantizer(nn.Module):
    """Base of the quantizers whose codes are numbers, signs or bits.

    Vectors of size ``dim`` are projected to ``num_codebooks`` codes of ``codebook_dim`` numbers, and back, unless that
    is their size already. Quantization runs in float32 (float64 for float64) whatever comes in, autocast or not.

    Args:
        codebook_size, codebook_dim: number of codes, and of numbers in a code; the subclasses know them.
        dim: size of a vector. Default: ``num_codebooks · codebook_dim``, and no projections.
        num_codebooks: codes that describe one vector together.
        channel_first: vectors lie along dimension 1: images, video, audio.
        keep_num_codebooks_dim: indices have their dimension of codebooks. Default: if there are several.
        projection_has_bias: the projections, where there are any, add a bias.
        orthogonal_rotation: turn codes by a fixed random orthogonal matrix before quantization, and back after it, so
            that none of their numbers matters more than another (Chee et al. 2023, arXiv 2307.13304).

    Raises:
        ValueError: ``num_codebooks`` does not divide ``dim``, or leaves no way to do without its dimension.

    Shapes:
        x ``[..., dim]``, or with ``channel_first`` ``[B, dim, ...]``. indices int64 ``[...]``, or with the dimension of
        codebooks ``[..., num_codebooks]``; loss ``[]``. mask bool, the shape of x without its vectors: where it is
        False, quantized is zero, the index -1, and nothing is learned.
    """

    rotation: Tensor | None

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        dim: int | None,
        num_codebooks: int,
        *,
        channel_first: bool = False,
        keep_num_codebooks_dim: bool | None = None,
        projection_has_bias: bool = True,
        orthogonal_rotation: bool = False,
    ) -> None:
        if num_codebooks > 1 and keep_num_codebooks_dim is False:
            raise ValueError(f"keep_num_codebooks_dim is False; expected True or None for {num_codebooks} codebooks")
        super().__init__()
        inner = codebook_dim * num_codebooks
        dim = inner if dim is None else dim
        self.codebook_size = codebook_size
        self.num_codebooks = num_codebooks
        self.codebook_dim = codebook_dim
        self.keep_num_codebooks_dim = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        self.layout = VectorLayout(dim, codebook_dim, heads=num_codebooks, channel_first=channel_first)
        if dim != inner and not projection_has_bias:
            self.layout.project_in = nn.Linear(dim, inner, bias=False)
            self.layout.project_out = nn.Linear(inner, dim, bias=False)
        rotation = nn.init.orthogonal_(torch.empty(codebook_dim, codebook_dim)) if orthogonal_rotation else None
        self.register_buffer("rotation", rotation)

    def get_codes(self, indices: Tensor) -> Tensor:
        """The codes themselves, before rotation and projection: int64 ``[...]`` to ``[..., codebook_dim]``."""
        raise NotImplementedError

    def decode(self, indices: Tensor) -> Tensor:
        """What ``forward`` returns for these indices, in the layout of x; -1 becomes zeros."""
        return self._decode(self.get_codes(indices), indices)

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The indices of ``x`` alone."""
        return self(x, mask).indices

    def extra_repr(self) -> str:
        return f"codebook_size={self.codebook_size}, dim={self.layout.dim}, num_codebooks={self.num_codebooks}"

    def _weight_dtype(self, like: Tensor) -> torch.dtype:
        return next((p.dtype for p in self.layout.parameters()), like.dtype)

    def _codes_of(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows [N, num_codebooks, codebook_dim] in the type they are quantized in, and the mask [N, num_codebooks]."""
        rows = self.layout.rows(x, self._weight_dtype(x)).view(-1, self.num_codebooks, self.codebook_dim)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        kept = self.layout.mask(x, mask, None)
        return self._rotate(rows), None if kept is None else kept.view(-1, self.num_codebooks)

    def _vectors(self, codes: Tensor, indices: Tensor, x: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes and indices, which may have a last dimension of stages, in the layout of x."""
        rows = self._rotate_back(codes)
        rows = rows.to(self._weight_dtype(rows))
        vectors = self.layout.vectors(rows, x, None if kept is None else kept.reshape(-1))
        codebooks = (self.num_codebooks,) if self.keep_num_codebooks_dim else ()
        return vectors, indices.reshape(*self.layout.leading(x), *codebooks, *indices.shape[2:])

    def _decode(self, codes: Tensor, indices: Tensor) -> Tensor:
        """Codes ``[..., codebook_dim]``, or with the dimension of codebooks before that, to vectors."""
        codes = self._rotate_back(codes)
        if self.keep_num_codebooks_dim and self.num_codebooks == 1:
            codes = codes.squeeze(-2)
        return self.layout.decode(codes.to(self._weight_dtype(codes)), indices)

    def _rotate(self, rows: Tensor) -> Tensor:
        return rows if self.rotation is None else _product(rows, self.rotation)

    def _rotate_back(self, rows: Tensor) -> Tensor:
        return rows if self.rotation is None else _product(rows, self.rotation.T)


def _product(rows: Tensor, rotation: Tensor) -> Tensor:
    """In the type of the rows: half precision would turn them to another level."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ rotation.to(rows.dtype)
