"""Cases of the topk family."""

from collections.abc import Callable

from cases.case import Case, Tensors, plain, randn
from isthmus import ops, reference


def dictionary(*shape: int, features: int, bias: bool) -> Callable[[], Tensors]:
    def make() -> Tensors:
        tensors = {"x": randn(*shape), "weight": randn(features, shape[-1]) / shape[-1] ** 0.5}
        return tensors | {"bias": randn(features) if bias else None}

    return make


def topk_cases() -> list[Case]:
    encode, encoder = plain(reference.topk_encode), ("x", "weight", "bias")
    return [
        Case("encode", ops.topk_encode, dictionary(17, 10, features=43, bias=True), encode, encoder, options={"k": 5}),
        Case("encode-identity", ops.topk_encode, dictionary(3, 4, 9, features=50, bias=False), encode, encoder[:2],
             options={"k": 7, "activation": "identity"}),
        Case("encode-all", ops.topk_encode, dictionary(5, 6, features=12, bias=True), encode, encoder,
             options={"k": 12}),
    ]  # fmt: skip
