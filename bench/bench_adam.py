"""A step of Adam for a dictionary whose rows have length 1, with gradients for all rows or for a quarter of them.

The plain step returns new tensors instead of writing to the old ones: torch.compile (2.13) fails on reductions over
what is written in place. The peers write in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import Function, shapes
from torch import Tensor

from isthmus import optim

OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
SHAPES = shapes({"F": 2048, "D": 128}, large=({"F": 24576, "D": 768},))


def project(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient without its part along the rows of the weight, which have length 1."""
    return grad - (grad * weight).sum(1, keepdim=True) * weight


def plain(weight: Tensor, lazy: bool) -> Function:
    """The formula, written out, with the corrections of the first step."""
    exp_avg, exp_avg_sq = torch.zeros_like(weight), torch.zeros_like(weight)
    lr, (beta1, beta2), eps = OPTIONS.values()

    def step(grad: Tensor) -> tuple[Tensor, ...]:
        along = project(grad, weight)
        m, v = beta1 * exp_avg + (1 - beta1) * along, beta2 * exp_avg_sq + (1 - beta2) * along.square()
        new = F.normalize(weight - lr / (1 - beta1) * m / ((v / (1 - beta2)).sqrt() + eps)), m, v
        if not lazy:
            return new
        touched = (grad != 0).any(1, keepdim=True)
        return tuple(torch.where(touched, n, old) for n, old in zip(new, (weight, exp_avg, exp_avg_sq), strict=True))

    return step


def state(optimizer: torch.optim.Optimizer, weight: Tensor) -> tuple[Tensor, ...]:
    return weight, optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]


def fused(weight: Tensor) -> Function:
    """torch's fused Adam between projection and normalisation."""
    optimizer = torch.optim.Adam([weight], **OPTIONS, fused=True)

    def step(grad: Tensor) -> tuple[Tensor, ...]:
        weight.grad = project(grad, weight)
        optimizer.step()
        weight.copy_(F.normalize(weight))
        return state(optimizer, weight)

    return step


def gathered(weight: Tensor) -> Function:
    """torch's SparseAdam on the rows that have a gradient."""
    optimizer = torch.optim.SparseAdam([weight], **OPTIONS)

    def step(grad: Tensor) -> tuple[Tensor, ...]:
        rows = grad.any(1).nonzero().squeeze(1)
        values = project(grad[rows], weight[rows])
        weight.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), values, grad.shape, is_coalesced=True)
        optimizer.step()
        weight.index_copy_(0, rows, F.normalize(weight[rows]))
        return state(optimizer, weight)

    return step


def ours(weight: Tensor, lazy: bool) -> Function:
    optimizer = optim.RowAdam([weight], **OPTIONS, unit_norm=True, lazy=lazy)

    def step(grad: Tensor) -> tuple[Tensor, ...]:
        weight.grad = grad
        optimizer.step()
        return state(optimizer, weight)

    return step


@SHAPES
def bench_adam_rows(contest, shape):
    weight = F.normalize(torch.randn(*shape.values()))
    contest(
        torch.randn_like(weight),
        plain=plain(weight, lazy=False),
        peer=("Adam(fused=True)", fused(weight.clone())),
        isthmus=ours(weight.clone(), lazy=False),
        compare=lambda *state: state,
    )


@SHAPES
def bench_adam_touched_rows(contest, shape):
    """A quarter of the rows has a gradient; the others stay."""
    weight = F.normalize(torch.randn(*shape.values()))
    contest(
        torch.randn_like(weight) * (torch.rand(len(weight), 1) < 0.25),
        plain=plain(weight, lazy=True),
        peer=("SparseAdam", gathered(weight.clone())),
        isthmus=ours(weight.clone(), lazy=True),
        compare=lambda *state: state,
    )
