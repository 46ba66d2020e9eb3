"""The decoder of a sparse autoencoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import DTYPES, MODES, shapes
from torch import Tensor

from isthmus import ops

SHAPES = shapes({"N": 256, "D": 128, "F": 2048, "k": 16}, large=({"N": 2048, "D": 768, "F": 24576, "k": 32},))


def random_supports(rows: int, features: int, k: int) -> Tensor:
    """k different features for each row: one from each of k equal ranges."""
    width = features // k
    return torch.arange(k) * width + torch.randint(width, (rows, k))


def dense_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    dense = values.new_zeros(len(values), len(weight)).scatter_add(1, indices, values)
    return torch.addmm(bias, dense, weight)


def bag_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.embedding_bag(indices, weight, per_sample_weights=values, mode="sum") + bias


@MODES
@DTYPES
@SHAPES
def bench_sparse_decode(contest, shape, dtype, mode):
    rows, dims, features, k = shape.values()
    element = getattr(torch, dtype)
    contest(
        torch.rand(rows, k).to(element),
        random_supports(rows, features, k),
        torch.randn(features, dims).to(element),
        torch.randn(dims).to(element),
        plain=dense_decode,
        peer=("embedding_bag", bag_decode),
        isthmus=ops.sparse_decode,
        compare=lambda *results: results,
    )


@MODES
@SHAPES
def bench_sparse_decode_hot(contest, shape, mode):
    """Four latents are on in every row, as the frequent ones of a dictionary are."""
    rows, dims, features, k = shape.values()
    indices = random_supports(rows, features, k)
    indices[:, :4] = torch.arange(4)
    contest(
        torch.rand(rows, k),
        indices,
        torch.randn(features, dims),
        torch.randn(dims),
        plain=dense_decode,
        peer=("embedding_bag", bag_decode),
        isthmus=ops.sparse_decode,
        compare=lambda *results: results,
    )


def with_error(decode):
    def reconstruct(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor, target: Tensor):
        out = decode(values, indices, weight, bias)
        return out, (target - out).square().sum(-1)

    return reconstruct


@MODES
@SHAPES
def bench_sparse_reconstruct(contest, shape, mode):
    rows, dims, features, k = shape.values()
    contest(
        torch.rand(rows, k),
        random_supports(rows, features, k),
        torch.randn(features, dims),
        torch.randn(dims),
        torch.randn(rows, dims),
        plain=with_error(dense_decode),
        peer=("embedding_bag", with_error(bag_decode)),
        isthmus=ops.sparse_reconstruct,
        compare=lambda *results: results,
    )


def contest_of_ragged_codes(contest, shape, peer, decode_with):
    """Rows of 0 to 2 k entries, ascending; `decode_with` makes the peer's function from the offsets."""
    rows, dims, features, k = shape.values()
    lengths = torch.randint(2 * k + 1, (rows,))
    indices = random_supports(rows, features, 2 * k)[torch.arange(2 * k) < lengths[:, None]]
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    row_of = torch.arange(rows).repeat_interleave(lengths)

    def gather(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
        return weight.new_zeros(rows, dims).index_add(0, row_of, values[:, None] * weight[indices])

    contest(
        torch.rand(len(indices)),
        indices,
        torch.randn(features, dims),
        plain=gather,
        peer=(peer, decode_with(offsets)),
        isthmus=lambda values, indices, weight: ops.sparse_decode(values, indices, weight, offsets=offsets),
        compare=lambda *results: results,
    )


@MODES
@SHAPES
def bench_sparse_decode_ragged(contest, shape, mode):
    def bag(offsets: Tensor):
        return lambda values, indices, weight: F.embedding_bag(
            indices, weight, offsets, per_sample_weights=values, mode="sum", include_last_offset=True
        )

    contest_of_ragged_codes(contest, shape, "embedding_bag", bag)


@MODES
@SHAPES
def bench_sparse_decode_csr(contest, shape, mode):
    def product(offsets: Tensor):
        def decode(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
            return torch.sparse_csr_tensor(offsets, indices, values, (len(offsets) - 1, len(weight))) @ weight

        return decode

    contest_of_ragged_codes(contest, shape, "torch.sparse", product)
