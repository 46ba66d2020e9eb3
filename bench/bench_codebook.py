"""Vector quantization: the nearest code, the training step, and the statistics of the codes."""

from __future__ import annotations

from collections.abc import Callable

import faiss
import pytest
import torch
import torch.nn.functional as F
from harness import MODES, shapes
from torch import Tensor
from torch.nn import Buffer
from vector_quantize_pytorch import VectorQuantize

from isthmus import nn, ops

SMALL = {"N": 1024, "K": 128, "D": 64}
CHUNK = 1 << 21
"""Distances at a time in the plain search: what stays in cache."""


def data(shape: dict[str, int]) -> tuple[Tensor, Tensor]:
    rows, codes, dims = shape.values()
    return torch.randn(rows, dims), torch.randn(codes, dims)


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    norms = codebook.square().sum(1)
    parts = x.split(max(1, CHUNK // len(codebook)))
    return torch.cat([torch.addmm(norms, part, codebook.t(), alpha=-2).argmin(1) for part in parts])


def nearest_few(x: Tensor, codebook: Tensor, count: int) -> Tensor:
    norms = codebook.square().sum(1)
    parts = x.split(max(1, CHUNK // len(codebook)))
    return torch.cat([torch.addmm(norms, part, codebook.t(), alpha=-2).topk(count, largest=False)[1] for part in parts])


@shapes(
    SMALL,
    large=(
        {"N": 16384, "K": 1024, "D": 64},
        {"N": 16384, "K": 8192, "D": 64},
        {"N": 16384, "K": 1024, "D": 256},
        {"N": 16384, "K": 8192, "D": 256},
        {"N": 65536, "K": 512, "D": 8},
        {"N": 1, "K": 8192, "D": 64},
        {"N": 1, "K": 8192, "D": 256},
    ),
)
def bench_vq_assign(contest, shape):
    x, codebook = data(shape)
    index = faiss.IndexFlatL2(shape["D"])
    index.add(codebook.numpy())

    def compare(indices: Tensor) -> tuple[Tensor, ...]:
        """Two codes may be equally near in float32, so the distances count and not the indices."""
        return ((x - codebook[indices]).square().sum(1),)

    contest(
        x,
        codebook,
        plain=nearest,
        peer=(
            "faiss IndexFlatL2",
            lambda x, _: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0]),
        ),
        isthmus=ops.vq_assign,
        compare=compare,
        flops=2 * shape["N"] * shape["K"] * shape["D"],
    )


@shapes(SMALL, large=({"N": 16384, "K": 8192, "D": 64},))
def bench_vq_assign_topk(contest, shape):
    """The eight nearest codes, nearest first."""
    count = 8
    x, codebook = data(shape)
    index = faiss.IndexFlatL2(shape["D"])
    index.add(codebook.numpy())

    def compare(indices: Tensor) -> tuple[Tensor, ...]:
        return ((x.unsqueeze(1) - codebook[indices]).square().sum(-1),)

    contest(
        x,
        codebook,
        plain=lambda x, codebook: nearest_few(x, codebook, count),
        peer=("faiss IndexFlatL2", lambda x, _: torch.from_numpy(index.search(x.numpy(), count)[1])),
        isthmus=lambda x, codebook: ops.vq_assign(x, codebook, topk=count),
        compare=compare,
        flops=2 * shape["N"] * shape["K"] * shape["D"],
    )


@shapes(SMALL, large=({"N": 16384, "K": 8192, "D": 64},))
def bench_vq_assign_cosine(contest, shape):
    x, codebook = data(shape)
    index = faiss.IndexFlatIP(shape["D"])
    index.add(F.normalize(codebook).numpy())

    def most_similar(x: Tensor, codebook: Tensor) -> Tensor:
        unit = F.normalize(codebook)
        return torch.cat([(part @ unit.t()).argmax(1) for part in x.split(max(1, CHUNK // len(codebook)))])

    def compare(indices: Tensor) -> tuple[Tensor, ...]:
        return (F.cosine_similarity(x, codebook[indices]),)

    contest(
        x,
        codebook,
        plain=most_similar,
        peer=("faiss IndexFlatIP", lambda x, _: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])),
        isthmus=lambda x, codebook: ops.vq_assign(x, codebook, metric="cosine"),
        compare=compare,
        flops=2 * shape["N"] * shape["K"] * shape["D"],
    )


def match(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """As prototype losses are written: the least of each row, and of each column, of all distances."""
    distances = torch.cdist(x, codebook)
    return distances.argmin(1), distances.argmin(0)


@shapes(
    SMALL,
    large=({"N": 16384, "K": 8192, "D": 64}, {"N": 4096, "K": 1024, "D": 64}, {"N": 2048, "K": 2048, "D": 256}),
)
def bench_vq_match(contest, shape):
    """The best code of each row and the best row of each code; the peer is a search for each."""
    x, codebook = data(shape)

    def compare(nearest_code: Tensor, nearest_row: Tensor) -> tuple[Tensor, ...]:
        return (x - codebook[nearest_code]).square().sum(1), (x[nearest_row] - codebook).square().sum(1)

    contest(
        x,
        codebook,
        plain=match,
        peer=("two vq_assign", lambda x, codebook: (ops.vq_assign(x, codebook), ops.vq_assign(codebook, x))),
        isthmus=ops.vq_match,
        compare=compare,
        flops=2 * shape["N"] * shape["K"] * shape["D"],
    )


def faiss_nearest(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.from_numpy(faiss.knn(x.numpy(), codebook.numpy(), 1)[1][:, 0])


def quantizer(search: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The straight-through quantizer over any search for the nearest code."""

    def quantize(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        indices = search(x.detach(), codebook.detach())
        code = F.embedding(indices, codebook)
        return x + (code - x).detach(), indices, (code - x).square().sum(-1)

    return quantize


@MODES
@shapes(SMALL, large=({"N": 16384, "K": 1024, "D": 64},))
def bench_vq_quantize(contest, shape, mode):
    x, codebook = data(shape)

    def compare(code: Tensor, _: Tensor, error: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return code, error, *gradients

    contest(
        x,
        codebook,
        plain=quantizer(nearest),
        peer=("faiss knn", quantizer(faiss_nearest)),
        isthmus=ops.vq_quantize,
        compare=compare,
        flops=2 * shape["N"] * shape["K"] * shape["D"],
    )


@shapes(SMALL, large=({"N": 16384, "K": 1024, "D": 64},))
def bench_code_statistics(contest, shape):
    rows, codes, dims = shape.values()

    def one_hot(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        members = F.one_hot(indices, codes).to(x.dtype)
        return members.sum(0), members.t() @ x

    def index_add(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        return torch.bincount(indices, minlength=codes), x.new_zeros(codes, dims).index_add_(0, indices, x)

    contest(
        torch.randn(rows, dims),
        torch.randint(codes, (rows,)),
        plain=one_hot,
        peer=("index_add_", index_add),
        isthmus=lambda x, indices: ops.code_statistics(x, indices, codes),
        compare=lambda *results: results,
    )


def rotate(x: Tensor, code: Tensor) -> Tensor:
    """The rotation trick of Fifty et al. (2024) as it is usually written."""
    with torch.no_grad():
        source, target = F.normalize(x, dim=-1), F.normalize(code, dim=-1)
        middle = F.normalize(source + target, dim=-1)
        scale = code.norm(dim=-1, keepdim=True) / x.norm(dim=-1, keepdim=True)
    reflected = x - 2 * (x * middle).sum(-1, keepdim=True) * middle
    return scale * (reflected + 2 * (x * source).sum(-1, keepdim=True) * target)


@pytest.mark.parametrize("mode", ["fwd+bwd"])
@shapes(SMALL, large=({"N": 16384, "K": 8192, "D": 64},))
def bench_vq_rotation(contest, shape, mode):
    """Everything but the search: quantize with given codes, and pass both gradients back."""
    x, codebook = data(shape)

    def plain(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        code = F.embedding(indices, codebook)
        return rotate(x, code.detach()), (x - code).square().sum(-1)

    def ours(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        quantized, _, error = ops.vq_quantize(x, codebook, gradient="rotation", indices=indices)
        return quantized, error

    indices = torch.randint(len(codebook), (len(x),))
    contest(x, codebook, indices, plain=plain, isthmus=ours, compare=lambda *results: results)


class MovingAverages(torch.nn.Module):
    """The update of a codebook from the totals of a batch, and the revival of dead codes."""

    def __init__(self, codebook: Tensor) -> None:
        super().__init__()
        self.codebook, self.sums = Buffer(codebook.clone()), Buffer(codebook.clone())
        self.usage = Buffer(torch.ones(len(codebook)))

    def forward(self, counts: Tensor, batch_sums: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        per_hit = len(counts) / counts.sum()
        self.usage.lerp_(counts * per_hit, 0.01)
        self.sums.lerp_(batch_sums * per_hit, 0.01)
        dead = self.usage < 0.05
        self.usage.masked_fill_(dead, 1.0)
        self.sums.copy_(torch.where(dead.unsqueeze(1), candidates, self.sums))
        self.codebook.copy_(self.sums / self.usage.unsqueeze(1))
        return self.codebook.clone(), self.usage.clone()


class FusedMovingAverages(MovingAverages):
    def forward(self, counts: Tensor, batch_sums: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        ops.update_codebook_(
            self.codebook, self.usage, self.sums, counts, batch_sums, decay=0.99, candidates=candidates,
            revive_below=0.05,
        )  # fmt: skip
        return self.codebook.clone(), self.usage.clone()


@shapes(SMALL, large=({"N": 16384, "K": 8192, "D": 64},))
def bench_update_codebook(contest, shape):
    x, codebook = data(shape)
    totals = ops.code_statistics(x, torch.randint(len(codebook), (len(x),)), len(codebook))
    contest(
        *totals,
        torch.randn_like(codebook),
        plain=MovingAverages(codebook),
        isthmus=FusedMovingAverages(codebook),
        compare=lambda *results: results,
    )


class MovingAverageQuantizer(torch.nn.Module):
    """The training step of van den Oord et al. (2017), appendix A.1, as it is usually written."""

    def __init__(self, codebook: Tensor, decay: float, commitment_weight: float) -> None:
        super().__init__()
        self.decay = decay
        self.commitment_weight = commitment_weight
        self.codebook = Buffer(codebook.clone())
        self.counts = Buffer(torch.ones(len(codebook)))
        self.sums = Buffer(codebook.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            indices = nearest(x, self.codebook)
            code = F.embedding(indices, self.codebook)
            members = F.one_hot(indices, len(self.codebook)).to(x.dtype)
            self.counts.lerp_(members.sum(0), 1 - self.decay)
            self.sums.lerp_(members.t() @ x, 1 - self.decay)
            self.codebook.copy_(self.sums / self.counts.unsqueeze(1))
        loss = self.commitment_weight * (code - x).square().sum(-1).mean()
        return x + (code - x).detach(), indices, loss


@pytest.mark.parametrize("mode", ["fwd+bwd"])
@shapes(SMALL, large=({"N": 16384, "K": 1024, "D": 64}, {"N": 16384, "K": 8192, "D": 64}))
def bench_vq_training_step(contest, shape, mode):
    """Quantize, pass the gradient back, and move the codebook by moving averages."""
    _, codes, dims = shape.values()
    x, codebook = data(shape)
    weight, decay = 0.25, 0.99
    ours = nn.VectorQuantizer(codes, dims, commitment_weight=weight, decay=decay, revive_below=0)
    ours.codebook.copy_(codebook)
    ours.sums.copy_(codebook)
    # The peer averages the squared error over elements where the others sum over a vector's.
    peer = VectorQuantize(dims, codes, decay=decay, commitment_weight=weight * dims, rotation_trick=False)
    peer.codebook = codebook

    def compare(code: Tensor, _: Tensor, loss: Tensor, dx: Tensor) -> tuple[Tensor, ...]:
        return code, loss, dx

    contest(
        x,
        plain=MovingAverageQuantizer(codebook, decay, weight),
        peer=("vector-quantize-pytorch", peer),
        isthmus=ours,
        compare=compare,
        flops=2 * shape["N"] * codes * dims,
    )
