"""Cases of the sparse family."""

from collections.abc import Callable

import torch

from cases.case import Case, Tensors, plain, randn
from isthmus import ops, reference


def dictionary(*shape: int, features: int, bias: bool) -> Callable[[], Tensors]:
    def make() -> Tensors:
        tensors = {"x": randn(*shape), "weight": randn(features, shape[-1]) / shape[-1] ** 0.5}
        return tensors | {"bias": randn(features) if bias else None}

    return make


def chosen(*shape: int, features: int, dim: int, bias: bool) -> Callable[[], Tensors]:
    def make() -> Tensors:
        tensors = {"values": randn(*shape), "indices": torch.randint(features, shape)}
        tensors["weight"] = randn(features, dim) / dim**0.5
        return tensors | ({"bias": randn(dim)} if bias else {})

    return make


def sparse_cases() -> list[Case]:
    encode, decode = plain(reference.topk_encode), plain(reference.sparse_decode)
    encoder, decoder = ("x", "weight", "bias"), ("values", "weight", "bias")
    return [
        Case("encode", ops.topk_encode, dictionary(17, 10, features=43, bias=True), encode, encoder, options={"k": 5}),
        Case("encode-identity", ops.topk_encode, dictionary(3, 4, 9, features=50, bias=False), encode, encoder[:2],
             options={"k": 7, "activation": "identity"}),
        Case("encode-all", ops.topk_encode, dictionary(5, 6, features=12, bias=True), encode, encoder,
             options={"k": 12}),
        Case("decode", ops.sparse_decode, chosen(17, 4, features=43, dim=10, bias=True), decode, decoder),
        Case("decode-wide", ops.sparse_decode, chosen(2, 3, 5, features=9, dim=70, bias=False), decode, decoder[:2]),
    ]  # fmt: skip
