"""A training step of a top-k sparse autoencoder: forward, AuxK on dead features, backward, Adam, unit norm.

All start from the same parameters, a tenth of their features dead, and train on one batch. Dead features listen too
faintly to be among the best k, so that they stay dead while the step is timed.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import Function, shapes
from torch import Tensor, nn

from isthmus.nn import TopKSAE
from isthmus.optim import RowAdam

LR = 1e-5
SHAPES = shapes(
    {"N": 512, "D": 128, "F": 4096, "k": 16, "aux": 64},
    large=({"N": 2048, "D": 768, "F": 24576, "k": 32, "aux": 256},),
)


def autoencoder(dim: int, features: int, k: int, aux_k: int) -> TopKSAE:
    torch.manual_seed(0)
    sae = TopKSAE(dim, features, k, aux_k=aux_k)
    with torch.no_grad():
        sae.encoder_weight[: features // 10] *= 0.5
    sae.idle[: features // 10] = 2 * sae.dead_after
    return sae


class Dense(nn.Module):
    """As people write it: all pre-activations, a dense code, a product with the whole decoder."""

    idle: Tensor

    def __init__(self, sae: TopKSAE) -> None:
        super().__init__()
        for name, parameter in sae.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().clone()))
        self.register_buffer("idle", sae.idle.clone())
        self.k, self.aux_k, self.aux_weight, self.dead_after = sae.k, sae.aux_k, sae.aux_weight, sae.dead_after

    def forward(self, x: Tensor) -> Tensor:
        features = F.linear(x - self.pre_bias, self.encoder_weight, self.encoder_bias).relu()
        values, indices = features.topk(self.k, sorted=False)
        residual = x - self.decode(values, indices) - self.pre_bias
        hits = torch.zeros_like(self.idle).index_add(0, indices.flatten(), (values > 0).flatten().long())
        self.idle.copy_(torch.where(hits > 0, 0, self.idle + len(x)))
        left_over = residual.detach()
        dead = features.masked_fill(self.idle < self.dead_after, 0.0)
        rest = left_over - self.decode(*dead.topk(self.aux_k, sorted=False))
        return unexplained(residual, x) + self.aux_weight * unexplained(rest, left_over)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        code = values.new_zeros(len(values), len(self.decoder_weight)).scatter(1, indices, values)
        return code @ self.decoder_weight


class Bags(Dense):
    """The strongest eager way: the decoder reads k rows instead of all."""

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        return F.embedding_bag(indices, self.decoder_weight, per_sample_weights=values, mode="sum")


def unexplained(residual: Tensor, target: Tensor) -> Tensor:
    return residual.square().sum() / (target - target.mean(0)).square().sum()


def by_adam(model: Dense, loss: Function, *, fused: bool) -> Function:
    """A step with Adam, between a projection and a normalisation of the decoder."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=fused)
    weight = model.decoder_weight

    def step(x: Tensor) -> tuple[Tensor, ...]:
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        with torch.no_grad():
            weight.grad -= (weight.grad * weight).sum(1, keepdim=True) * weight
            optimizer.step()
            weight.copy_(F.normalize(weight))
        return value.detach(), model.encoder_weight.grad

    return step


def by_rows(sae: TopKSAE) -> Function:
    """A step with RowAdam, which keeps the decoder's rows at length 1."""
    others = [parameter for parameter in sae.parameters() if parameter is not sae.decoder_weight]
    optimizer = RowAdam([{"params": [sae.decoder_weight], "unit_norm": True}, {"params": others}], lr=LR)

    def step(x: Tensor) -> tuple[Tensor, ...]:
        optimizer.zero_grad()
        loss = sae(x).loss
        loss.backward()
        optimizer.step()
        return loss.detach(), sae.encoder_weight.grad

    return step


@pytest.mark.parametrize("mode", ["step"])
@SHAPES
def bench_sae_training_step(contest, shape, mode):
    rows, dims, features, k, aux_k = shape.values()
    sae = autoencoder(dims, features, k, aux_k)
    dense, graph, bags = Dense(sae), Dense(sae), Bags(sae)
    contest(
        torch.randn(rows, dims),
        plain=by_adam(dense, dense, fused=False),
        compiled=by_adam(graph, torch.compile(graph, fullgraph=True, dynamic=False), fused=True),
        peer=("linear, topk, embedding_bag, fused Adam", by_adam(bags, bags, fused=True)),
        isthmus=by_rows(sae),
        compare=lambda loss, gradient: (loss, gradient),
        flops=2 * rows * features * dims,
    )
