"""Gumbel-softmax latents: a relaxed or one-hot sample, alone and with its divergence from the uniform distribution."""

from __future__ import annotations

import math

import pytest
import torch
from harness import DTYPES, MODES, shapes
from torch import Tensor
from torch.distributions import Categorical, RelaxedOneHotCategorical, kl_divergence
from torch.nn import functional

from isthmus import ops

SMALL = {"N": 256, "L": 30, "K": 10}
WIDE = {"N": 512, "K": 8192}
TEMPERATURE = 0.67


def logits_of(shape: dict[str, int], dtype: str) -> Tensor:
    return torch.randn(tuple(shape.values())).to(getattr(torch, dtype))


def kl_uniform(logits: Tensor) -> Tensor:
    log_q = logits.log_softmax(-1)
    return (log_q.exp() * (log_q + math.log(logits.shape[-1]))).sum(-1)


def distributions_kl(logits: Tensor) -> Tensor:
    uniform = Categorical(logits=torch.zeros_like(logits), validate_args=False)
    return kl_divergence(Categorical(logits=logits, validate_args=False), uniform)


def sample(logits: Tensor) -> Tensor:
    return functional.gumbel_softmax(logits, tau=TEMPERATURE)


def distributions_sample(logits: Tensor) -> Tensor:
    return RelaxedOneHotCategorical(torch.tensor(TEMPERATURE), logits=logits, validate_args=False).rsample()


def sample_hard(logits: Tensor) -> Tensor:
    return functional.gumbel_softmax(logits, tau=TEMPERATURE, hard=True)


def mean_sample(y: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
    """Samples cannot be compared by element; every row sums to one, and so the gradient of that sum is but rounding."""
    for gradient in gradients:
        assert gradient.abs().max() < 0.1
    return (y.float().sum(-1),)


@MODES
@DTYPES
@shapes(SMALL, large=(WIDE,))
def bench_gumbel_softmax(contest, shape, dtype, mode):
    contest(
        logits_of(shape, dtype),
        plain=sample,
        peer=("torch.distributions", distributions_sample),
        isthmus=lambda logits: ops.gumbel_softmax(logits, temperature=TEMPERATURE),
        compare=mean_sample,
    )


@MODES
@shapes(SMALL, large=(WIDE,))
def bench_gumbel_softmax_hard(contest, shape, mode):
    contest(
        logits_of(shape, "float32"),
        plain=sample_hard,
        isthmus=lambda logits: ops.gumbel_softmax(logits, temperature=TEMPERATURE, hard=True),
        compare=mean_sample,
    )


@MODES
@shapes(SMALL, large=(WIDE,))
def bench_gumbel_softmax_kl(contest, shape, mode):
    def compare(y: Tensor, kl: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return *mean_sample(y), kl, *gradients

    contest(
        logits_of(shape, "float32"),
        plain=lambda logits: (sample(logits), kl_uniform(logits)),
        peer=("torch.distributions", lambda logits: (distributions_sample(logits), distributions_kl(logits))),
        isthmus=lambda logits: ops.gumbel_softmax_kl(logits, temperature=TEMPERATURE),
        compare=compare,
    )


@MODES
@DTYPES
@shapes(SMALL, large=(WIDE,))
def bench_categorical_kl(contest, shape, dtype, mode):
    if dtype == "bfloat16" and shape == WIDE:
        pytest.skip("PyTorch sums 8192 categories in bfloat16 and is 4 % off: there is nothing to compare with")
    contest(
        logits_of(shape, dtype),
        plain=kl_uniform,
        peer=("torch.distributions", distributions_kl),
        isthmus=ops.categorical_kl,
        compare=lambda *results: results,
    )
