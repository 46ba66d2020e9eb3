"""Cases of the sparse family."""

from collections.abc import Callable

import torch

from cases.case import Case, Tensors, plain, randn
from isthmus import ops, reference


def chosen(*shape: int, features: int, dim: int, bias: bool) -> Callable[[], Tensors]:
    def make() -> Tensors:
        tensors = {"values": randn(*shape), "indices": torch.randint(features, shape)}
        tensors["weight"] = randn(features, dim) / dim**0.5
        return tensors | ({"bias": randn(dim)} if bias else {})

    return make


def sparse_cases() -> list[Case]:
    decode, decoder = plain(reference.sparse_decode), ("values", "weight", "bias")
    return [
        Case("decode", ops.sparse_decode, chosen(17, 4, features=43, dim=10, bias=True), decode, decoder),
        Case("decode-wide", ops.sparse_decode, chosen(2, 3, 5, features=9, dim=70, bias=False), decode, decoder[:2]),
    ]
