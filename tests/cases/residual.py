"""Cases of the residual family."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cases.case import Case, Tensors, plain, randn
from isthmus import ops, reference


def coded(*shape: int, stages: int, codes: int) -> Callable[[], Tensors]:
    return lambda: {"x": randn(*shape), "codebooks": randn(stages, codes, shape[-1])}


def masked() -> Tensors:
    return {
        "x": randn(5, 4, 6),
        "codebooks": randn(3, 7, 6),
        "stages": torch.tensor(2),
        "mask": torch.arange(20).view(5, 4) % 3 > 0,
    }


def assigned() -> Tensors:
    indices = torch.randint(7, (33, 3))
    indices[::4, 1:] = -1
    return {"x": randn(33, 5), "codebooks": randn(3, 7, 5), "indices": indices}


def grouped() -> Tensors:
    stages = torch.arange(22).view(2, 11) % 4
    return {"x": randn(2, 11, 5), "codebooks": randn(2, 3, 9, 5), "stages": stages}


def grouped_indices() -> Tensors:
    return {"x": randn(2, 11, 5), "codebooks": randn(2, 3, 9, 5), "indices": torch.randint(9, (2, 11, 3))}


def two_sizes() -> Tensors:
    return {"x": randn(21, 6), "first": randn(5, 6), "second": randn(12, 6)}


def listed(function: Callable[..., Any]) -> Callable[..., Any]:
    """With codebooks of two sizes, the first of which serves twice."""

    def call(x: Tensor, first: Tensor, second: Tensor, **options: Any) -> Any:
        return function(x, [first, second, first], **options)

    return call


def residual_cases() -> list[Case]:
    op, wanted = ops.residual_vq_quantize, ("x", "codebooks")
    quantize, totals = reference.residual_vq_quantize, reference.residual_code_totals
    small = coded(33, 10, stages=3, codes=7)
    return [
        Case("residual", op, small, plain(quantize), wanted, ()),
        Case("residual-smooth", op, small, plain(quantize), ("x",), (2,)),
        Case("residual-wide", op, coded(14, 70, stages=2, codes=130), plain(quantize), wanted, ()),
        Case("residual-scalar", op, coded(2, 9, 1, stages=4, codes=5), plain(quantize), wanted, ()),
        Case("residual-beam", op, small, plain(quantize), wanted, (), {"beam": 4, "commitment_weight": 0.25}),
        Case("residual-rotation", op, small, plain(quantize), wanted, (), {"gradient": "rotation"}),
        Case("residual-masked", op, masked, plain(quantize), wanted, (), {"beam": 2}),
        Case("residual-grouped", op, grouped, plain(quantize), wanted, (), {"beam": 2}, batched=False),
        Case("residual-sizes", listed(op), two_sizes, plain(listed(quantize)), ("x", "first", "second"), ()),
        Case("residual-totals", ops.residual_code_totals, assigned, plain(totals)),
        Case("residual-totals-grouped", ops.residual_code_totals, grouped_indices, plain(totals), batched=False),
    ]  # fmt: skip
