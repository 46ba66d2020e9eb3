"""Quantizers without a codebook table: finite scalars, signs with entropies, scalar codebooks, bits, packing."""

from __future__ import annotations

import torch
from harness import MODES, shapes
from torch import Tensor
from vector_quantize_pytorch import FSQ, LFQ, LatentQuantize, ResidualFSQ

from isthmus import ops

SMALL = {"N": 4096, "D": 4}
WIDE = {"N": 262144, "D": 8}
LEVELS = {4: (8, 5, 5, 5), 8: (8, 8, 8, 6, 5, 5, 5, 5)}


def floats(*results: Tensor) -> tuple[Tensor, ...]:
    """Indices differ in type between libraries, and where tanh differs in the last bit."""
    return tuple(r for r in results if r.is_floating_point())


def fsq(x: Tensor, levels: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """As the paper's appendix writes it."""
    half = (levels - 1) * 1.001 / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0)
    bounded = (x + (offset / half).atanh()).tanh() * half - offset
    rounded = bounded + (bounded.round() - bounded).detach()
    digits = rounded.detach() + levels // 2
    return rounded / (levels // 2), (digits * basis).sum(-1).long()


@MODES
@shapes(SMALL, large=(WIDE,))
def bench_fsq_quantize(contest, shape, mode):
    levels = LEVELS[shape["D"]]
    sizes = torch.tensor(levels)
    basis = torch.cumprod(torch.tensor((1, *levels[:-1])), 0)
    peer = FSQ(list(levels), return_indices=len(levels) < 5)
    contest(
        torch.randn(1, shape["N"], shape["D"]),
        plain=lambda x: fsq(x, sizes, basis),
        peer=("vector-quantize-pytorch", lambda x: tuple(t for t in peer(x) if t is not None)),
        isthmus=lambda x: ops.fsq_quantize(x, levels),
        compare=floats,
    )


@MODES
@shapes({"N": 1024, "Q": 4}, large=({"N": 8192, "Q": 8},))
def bench_residual_fsq_quantize(contest, shape, mode):
    """Gradients are not compared: the peer passes that of the quantized vector back once for each stage."""
    levels, stages = (5, 3) * 4, shape["Q"]
    sizes = torch.tensor(levels)
    basis = torch.cumprod(torch.tensor((1, *levels[:-1])), 0)
    bound, half = sizes / (sizes - 1), (sizes - 1) / 2
    peer = ResidualFSQ(levels=list(levels), num_quantizers=stages)

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        bounded = bound * (x / bound).tanh()
        left, total, indices = bounded.detach(), 0.0, []
        for q in range(stages):
            digits = (half * (left + 1)).round().clamp(torch.zeros_like(half), sizes - 1)
            total = total + (digits / half - 1) / sizes**q
            indices.append((digits * basis).sum(-1).long())
            left = sizes * (left - (digits / half - 1))
        return bounded + (total - bounded).detach(), torch.stack(indices, -1)

    contest(
        torch.randn(1, shape["N"], 8),
        plain=plain,
        peer=("vector-quantize-pytorch", peer),
        isthmus=lambda x: ops.residual_fsq_quantize(x, levels, stages),
        compare=lambda quantized, *_: (quantized,),
    )


@shapes(SMALL, large=(WIDE,))
def bench_fsq_decode(contest, shape):
    levels = LEVELS[shape["D"]]
    sizes = torch.tensor(levels)
    basis = torch.cumprod(torch.tensor((1, *levels[:-1])), 0)
    indices = torch.randint(0, int(sizes.prod()), (shape["N"],))
    contest(
        indices,
        plain=lambda indices: (indices.unsqueeze(-1) // basis % sizes - sizes // 2) / (sizes // 2),
        isthmus=lambda indices: ops.fsq_decode(indices, levels),
        compare=floats,
    )


def soft_bits(x: Tensor) -> tuple[Tensor, ...]:
    """Binary spherical quantization with factorised entropies, as it is usually written."""
    u = torch.nn.functional.normalize(x, dim=-1)
    value = x.shape[-1] ** -0.5
    corner = torch.where(u > 0, value, -value)
    powers = 2 ** torch.arange(x.shape[-1] - 1, -1, -1, device=x.device)
    p = torch.sigmoid(4 * value * u)
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).sum(-1)
    return u + (corner - u).detach(), ((u > 0) * powers).sum(-1), (u - corner).square().sum(-1), entropy, p.sum(0)


@MODES
@shapes({"N": 4096, "n": 10}, large=({"N": 262144, "n": 18},))
def bench_lfq_quantize_entropy(contest, shape, mode):
    contest(
        torch.randn(*shape.values()),
        plain=soft_bits,
        isthmus=lambda x: ops.lfq_quantize_entropy(x, spherical=True),
        compare=floats,
    )


@MODES
@shapes({"N": 1024, "n": 8}, large=({"N": 4096, "n": 12},))
def bench_lfq_exact_entropy(contest, shape, mode):
    """The entropies over all 2^n codes, of a vector and of the batch."""
    bits = shape["n"]
    codes = ops.lfq_decode(torch.arange(2**bits), bits)
    peer = LFQ(codebook_size=2**bits, dim=bits)

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        p = (2 * x[0] @ codes.t()).softmax(-1)
        mean = p.mean(0)
        return -(p * p.clamp(min=1e-20).log()).sum(-1).mean(), -(mean * mean.log()).sum()

    def of_peer(x: Tensor) -> tuple[Tensor, Tensor]:
        losses = peer(x, inv_temperature=1.0, return_loss_breakdown=True)[1]
        return losses.per_sample_entropy, losses.batch_entropy

    def isthmus(x: Tensor) -> tuple[Tensor, Tensor]:
        entropy = ops.lfq_quantize_entropy(x[0])[3]
        return entropy.mean(), ops.code_entropy(ops.lfq_code_counts(x[0]))

    contest(
        torch.randn(1, shape["N"], bits),
        plain=plain,
        # The peer takes the logarithm of no probability below 1e-5, which shows where codes are many.
        peer=("vector-quantize-pytorch", of_peer) if bits <= 8 else None,
        isthmus=isthmus,
        compare=lambda sample, batch, *_: (sample, batch),
        flops=2 * shape["N"] * bits * 2**bits,
    )


@MODES
@shapes({"N": 4096, "D": 6, "L": 5}, large=({"N": 65536, "D": 6, "L": 5},))
def bench_latent_quantize(contest, shape, mode):
    rows, dims, size = shape.values()
    codebooks = torch.linspace(-0.5, 0.5, size).repeat(dims, 1)
    peer = LatentQuantize([size] * dims, dims)

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        digits = (x[0].unsqueeze(-1) - codebooks).abs().argmin(-1)
        value = codebooks[torch.arange(dims), digits]
        return (x[0] + (value - x[0]).detach()).unsqueeze(0), 0.1 * 2 * (x[0] - value).square().mean()

    def isthmus(x: Tensor) -> tuple[Tensor, Tensor]:
        quantized, _, error = ops.latent_quantize(x, codebooks)
        return quantized, 0.2 * error.mean() / dims

    def of_peer(x: Tensor) -> tuple[Tensor, Tensor]:
        quantized, _, loss = peer(x.mT)  # it takes vectors along dimension 1
        return quantized.mT, loss

    contest(
        torch.randn(1, rows, dims),
        plain=plain,
        peer=("vector-quantize-pytorch", of_peer),
        isthmus=isthmus,
        compare=lambda quantized, loss, *_: (quantized,),
    )


@MODES
@shapes({"N": 4096, "n": 16}, large=({"N": 65536, "n": 16},))
def bench_binary_map(contest, shape, mode):
    def plain(logits: Tensor) -> tuple[Tensor, ...]:
        p = logits.sigmoid()
        bits = (torch.rand_like(p) < p).to(p)
        powers = 2 ** torch.arange(logits.shape[-1] - 1, -1, -1, device=logits.device)
        log_sigmoid = torch.nn.functional.logsigmoid
        entropy = -(p * log_sigmoid(logits) + (1 - p) * log_sigmoid(-logits)).sum(-1)
        return bits + (p - p.detach()), (bits.detach() * powers).sum(-1).long(), entropy

    contest(
        torch.randn(*shape.values()),
        plain=plain,
        isthmus=ops.binary_map,
        compare=lambda bits, indices, entropy, *gradients: (entropy, *gradients),
    )


@shapes({"N": 65536, "bits": 10})
def bench_pack_indices(contest, shape):
    bits = shape["bits"]
    weights = 1 << torch.arange(8)

    def plain(indices: Tensor) -> Tensor:
        stream = (indices.unsqueeze(-1) >> torch.arange(bits) & 1).view(-1, 8)
        return (stream * weights).sum(-1).to(torch.uint8)

    contest(
        torch.randint(0, 2**bits, (shape["N"],)),
        plain=plain,
        isthmus=lambda indices: ops.pack_indices(indices, bits=bits),
        compare=lambda packed: (packed,),
    )
