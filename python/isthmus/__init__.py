"""Kernels for the bottleneck of autoencoders and Bayesian networks, as PyTorch ops.

isthmus.ops        the ops: functions of tensors, differentiable, compiled for CPU and CUDA
isthmus.nn         bottleneck modules built on them
isthmus.objectives bounds, divergences and distances to train them with
isthmus.distributions torch.distributions with fused sampling, densities and divergences
isthmus.diagnostics what a trained latent code is used for
isthmus.clustering k-means for the start of a codebook
isthmus.data       activations of a network: harvested, kept in shards, streamed
isthmus.optim      optimizers for what the modules learn
isthmus.models     autoencoders and Bayesian networks built on those
isthmus.reference  the same ops in plain PyTorch: the specification
"""

from typing import Any

import torch

import isthmus._load  # noqa: F401  isort: split
from isthmus import _C, clustering, diagnostics, distributions, nn, objectives, ops, optim
from isthmus.random import fold_in, key, split

__version__: str = _C.build_info()["version"]
__all__ = [
    "build_info",
    "clustering",
    "diagnostics",
    "distributions",
    "fold_in",
    "get_isa",
    "key",
    "nn",
    "objectives",
    "ops",
    "optim",
    "set_isa",
    "split",
]


def build_info() -> dict[str, Any]:
    """Versions, instruction set levels (compiled, available, in use) and CUDA or the reason why not.

    >>> isthmus.build_info()["isa"] in ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
    True
    """
    return {**_C.build_info(), "torch": torch.__version__}


def get_isa() -> str:
    """The instruction set level in use: "baseline", "avx2", "avx512", "avx512_bf16" or "amx"."""
    return _C.get_isa()


def set_isa(level: str | None) -> None:
    """Use the kernels of this level from now on; None goes back to ISTHMUS_ISA, or to the best available.

    Raises ValueError if the name is unknown or this CPU lacks the level.
    """
    if level is None:
        _C.reset_isa()
    else:
        _C.set_isa(level)
