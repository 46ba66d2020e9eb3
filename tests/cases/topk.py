"""Cases of the topk family."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cases.case import Case, Tensors, plain, randn
from isthmus import ops, reference


def dictionary(*shape: int, features: int, bias: bool) -> Callable[[], Tensors]:
    def make() -> Tensors:
        tensors = {"x": randn(*shape), "weight": randn(features, shape[-1]) / shape[-1] ** 0.5}
        return tensors | {"bias": randn(features) if bias else None}

    return make


def among_some(make: Callable[[], Tensors]) -> Callable[[], Tensors]:
    """Every third feature takes part."""

    def made() -> Tensors:
        tensors = make()
        return tensors | {"among": torch.arange(len(tensors["weight"])) % 3 == 1}

    return made


def lowered(make: Callable[[], Tensors]) -> Callable[[], Tensors]:
    """The largest scores are negative: no two of opposite sign come so close that autocast swaps them."""

    def made() -> Tensors:
        tensors = make()
        return tensors | {"bias": tensors["bias"] - 4}

    return made


def with_order(tensors: Tensors, options: dict[str, Any], _: torch.dtype) -> tuple[Tensor, ...]:
    values, indices, order = reference.topk_encode(**tensors, **options)
    return values, indices, *order


def encode_with_order(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    values, indices, order = ops.topk_encode(*args, **options)
    return values, indices, *order


def topk_cases() -> list[Case]:
    encode, encoder = plain(reference.topk_encode), ("x", "weight", "bias")
    biased = dictionary(17, 10, features=43, bias=True)
    grouped = dictionary(9, 8, features=60, bias=True)
    return [
        Case("encode", ops.topk_encode, biased, encode, encoder, options={"k": 5}),
        Case("encode-identity", ops.topk_encode, dictionary(3, 4, 9, features=50, bias=False), encode, encoder[:2],
             options={"k": 7, "activation": "identity"}),
        Case("encode-abs", ops.topk_encode, lowered(biased), encode, encoder, options={"k": 5, "activation": "abs"}),
        Case("encode-all", ops.topk_encode, dictionary(5, 6, features=12, bias=True), encode, encoder,
             options={"k": 12}),
        Case("encode-groups", ops.topk_encode, grouped, encode, encoder, options={"k": 12, "groups": 4}),
        Case("encode-among", ops.topk_encode, among_some(grouped), encode, encoder,
             options={"k": 24, "activation": "identity"}),
        Case("encode-order", encode_with_order, grouped, with_order, encoder, options={"k": 8, "return_order": True}),
    ]  # fmt: skip
