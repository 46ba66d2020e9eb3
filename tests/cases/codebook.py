"""Cases of the codebook family."""

from collections.abc import Callable

import torch

from cases.case import Case, Tensors, plain, randn
from isthmus import ops, reference


def codes(*shape: int, num_codes: int) -> Callable[[], Tensors]:
    return lambda: {"x": randn(*shape), "codebook": randn(num_codes, shape[-1])}


def assigned(*shape: int, num_codes: int) -> Callable[[], Tensors]:
    return lambda: {"x": randn(*shape), "indices": torch.randint(num_codes, shape[:-1])}


def codebook_cases() -> list[Case]:
    assign, quantize = plain(reference.vq_assign), plain(reference.vq_quantize)
    statistics = plain(reference.code_statistics)
    wanted = ("x", "codebook")
    return [
        Case("assign", ops.vq_assign, codes(33, 10, num_codes=37), assign),
        Case("assign-scalar", ops.vq_assign, codes(2, 9, 1, num_codes=5), assign),
        Case("assign-wide", ops.vq_assign, codes(14, 70, num_codes=130), assign),
        Case("quantize", ops.vq_quantize, codes(33, 10, num_codes=7), quantize, wanted, (2,)),
        Case("quantize-weighted", ops.vq_quantize, codes(3, 4, 6, num_codes=5), quantize, wanted, (),
             {"commitment_weight": 0.25}),
        Case("statistics", ops.code_statistics, assigned(33, 10, num_codes=7), statistics, options={"num_codes": 7}),
    ]  # fmt: skip
