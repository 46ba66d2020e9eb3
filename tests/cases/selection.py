"""Cases of the selection family."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cases.case import Case, Tensors, plain, randn
from cases.topk import dictionary
from isthmus import ops, reference


def with_thresholds(make: Callable[[], Tensors]) -> Callable[[], Tensors]:
    """One for each feature."""

    def made() -> Tensors:
        tensors = make()
        return tensors | {"threshold": randn(len(tensors["weight"]))}

    return made


def flat(encode: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """With the order as three tensors."""

    def encode_with_order(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        *code, order = encode(*args, return_order=True, **options)
        return *code, *order

    return encode_with_order


def selection_cases() -> list[Case]:
    encode, encoder = plain(reference.threshold_encode), ("x", "weight", "bias")
    batch = plain(reference.batch_topk_encode)
    return [
        Case("threshold", ops.threshold_encode, dictionary(17, 10, features=43, bias=True), encode, encoder,
             options={"threshold": 0.7}),
        Case("threshold-each", ops.threshold_encode, with_thresholds(dictionary(3, 4, 9, features=50, bias=False)),
             encode, encoder[:2]),
        Case("threshold-relu", ops.threshold_encode, dictionary(5, 6, features=70, bias=True), encode, encoder,
             options={"threshold": 0}),
        Case("batch", ops.batch_topk_encode, dictionary(17, 10, features=43, bias=True), batch, encoder,
             options={"k": 5}),
        Case("batch-identity", ops.batch_topk_encode, dictionary(3, 4, 9, features=50, bias=False), batch, encoder[:2],
             options={"k": 0.75, "activation": "identity"}),
        Case("batch-fillers", ops.batch_topk_encode, dictionary(5, 6, features=12, bias=True), batch, encoder,
             options={"k": 11}),
        Case("threshold-order", flat(ops.threshold_encode), dictionary(17, 10, features=43, bias=True),
             plain(flat(reference.threshold_encode)), encoder, options={"threshold": -0.2}),
        Case("batch-order", flat(ops.batch_topk_encode), dictionary(5, 6, features=12, bias=True),
             plain(flat(reference.batch_topk_encode)), encoder, options={"k": 11}),
    ]  # fmt: skip
