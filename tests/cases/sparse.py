"""Cases of the sparse family."""

from collections.abc import Callable

import torch

from cases.case import Case, Tensors, plain, randn
from isthmus import ops, reference


def chosen(*shape: int, features: int, dim: int, bias: bool, empty: bool = False) -> Callable[[], Tensors]:
    """A padded code; with empty places, if wanted."""

    def make() -> Tensors:
        tensors = {"values": randn(*shape), "indices": torch.randint(-3 if empty else 0, features, shape).clamp(-1)}
        tensors["weight"] = randn(features, dim) / dim**0.5
        return tensors | ({"bias": randn(dim)} if bias else {})

    return make


def ragged(*lengths: int, features: int, dim: int) -> Callable[[], Tensors]:
    """A code of rows of the given lengths, with empty places; the first latent occurs in half of them."""

    def make() -> Tensors:
        entries = sum(lengths)
        indices = torch.randint(-2, features, (entries,)).clamp(-1)
        tensors = {"values": randn(entries), "indices": indices * (torch.rand(entries) < 0.5)}
        tensors |= {"weight": randn(features, dim) / dim**0.5, "bias": randn(dim)}
        return tensors | {"offsets": torch.tensor([0, *lengths]).cumsum(0)}

    return make


def with_target(make: Callable[[], Tensors]) -> Callable[[], Tensors]:
    def extended() -> Tensors:
        tensors = make()
        offsets, dim = tensors.get("offsets"), tensors["weight"].shape[1]
        rows = tensors["values"].shape[:-1] if offsets is None else (len(offsets) - 1,)
        return tensors | {"bias": randn(dim), "target": randn(*rows, dim)}

    return extended


def sparse_cases() -> list[Case]:
    decode, decoder = plain(reference.sparse_decode), ("values", "weight", "bias")
    reconstruct, order = plain(reference.sparse_reconstruct), plain(reference.latent_order)
    autoencoder = (*decoder, "target")
    rows = ragged(3, 0, 5, 1, 0, 9, 2, features=11, dim=19)
    code = chosen(9, 4, features=13, dim=10, bias=True, empty=True)

    return [
        Case("decode", ops.sparse_decode, chosen(17, 4, features=43, dim=10, bias=True), decode, decoder),
        Case("decode-wide", ops.sparse_decode, chosen(2, 3, 5, features=9, dim=70, bias=False), decode, decoder[:2]),
        Case("decode-empty-places", ops.sparse_decode, code, decode, decoder),
        Case("decode-ragged", ops.sparse_decode, rows, decode, decoder, batched=False),
        Case("reconstruct", ops.sparse_reconstruct, with_target(code), reconstruct, autoencoder, smooth=(0, 1),
             batched=False),
        Case("reconstruct-ragged", ops.sparse_reconstruct, with_target(rows), reconstruct, autoencoder, smooth=(0, 1),
             batched=False),
        Case("order", ops.latent_order, lambda: {"indices": code()["indices"]}, order, options={"num_features": 13}),
    ]  # fmt: skip
