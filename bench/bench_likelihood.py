"""Negative log-likelihoods of a decoder's prediction."""

from __future__ import annotations

import math

import torch
from harness import DTYPES, MODES, shapes
from torch import Tensor
from torch.nn.functional import gaussian_nll_loss

from isthmus import ops


def gaussian(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * ((x - mean).square() * (-logvar).exp() + logvar + math.log(2 * math.pi)).sum(-1)


def torch_gaussian(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return gaussian_nll_loss(mean, x, logvar.exp(), full=True, eps=0, reduction="none").sum(-1)


@MODES
@DTYPES
@shapes({"N": 256, "D": 64}, large=({"N": 4096, "D": 1024},))
def bench_gaussian_nll(contest, shape, dtype, mode):
    contest(
        *(0.5 * torch.randn(3, *shape.values())).to(getattr(torch, dtype)).unbind(),
        plain=gaussian,
        peer=("F.gaussian_nll_loss", torch_gaussian),
        isthmus=ops.gaussian_nll,
        compare=lambda *results: results,
    )
