"""Cases of the assignment family."""

from collections.abc import Callable
from typing import Any

import torch

from cases.case import Case, Tensors, key, plain, randn
from cases.categorical import draw_gumbel
from isthmus import ops, reference

WANTED = ("x", "codebook")


def vectors(*shape: int, codes: int, mask: bool = False, indices: bool = False, keyed: bool = False) -> Any:
    def make() -> Tensors:
        tensors = {"x": randn(*shape), "codebook": randn(codes, shape[-1])}
        if mask:
            tensors["mask"] = torch.rand(shape[:-1]) < 0.7
        if indices:
            tensors["indices"] = torch.randint(-1, codes, shape[:-1])
        return tensors | ({"key": key()} if keyed else {})

    return make


def with_heads(*shape: int, codes: int) -> Callable[[], Tensors]:
    """Not called x: without rows the heads would have to stay."""
    return lambda: {"grouped": randn(*shape), "codebooks": randn(shape[0], codes, shape[-1])}


def positional(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda grouped, codebooks, **options: function(grouped, codebooks, **options)


def drawn(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reference that takes the noise of the key."""

    def expected(tensors: Tensors, options: dict[str, Any], stream: torch.dtype) -> Any:
        tensors = dict(tensors)
        shape = *tensors["x"].shape[:-1], len(tensors["codebook"])
        return function(noise=draw_gumbel(tensors.pop("key"), shape, stream), **tensors, **options)

    return expected


def assignment_cases() -> list[Case]:
    soft, statistics, loss = ops.vq_soft_quantize, ops.vq_soft_statistics, ops.vq_cross_entropy
    expect_soft, expect_statistics = plain(reference.vq_soft_quantize), plain(reference.vq_soft_statistics)
    expect_loss, expect_drawn = plain(reference.vq_cross_entropy), drawn(reference.vq_soft_quantize)
    heads = ("grouped", "codebooks")
    cases = [
        Case(f"vq_sample-{metric}", ops.vq_sample, vectors(7, 5, codes=19, mask=True, keyed=True),
             drawn(reference.vq_sample), options={"metric": metric, "temperature": 0.5})
        for metric in ("euclidean", "cosine", "inner_product")
    ]  # fmt: skip
    for metric in ("euclidean", "cosine", "inner_product"):
        options = {"metric": metric, "temperature": 0.7}
        cases += [
            Case(f"vq_soft-{metric}", soft, vectors(7, 5, codes=19), expect_soft, WANTED, options=options),
            Case(f"vq_soft-hard-{metric}", soft, vectors(5, 6, codes=13), expect_soft, WANTED, (),
                 options | {"hard": True}),
            Case(f"vq_soft_statistics-{metric}", statistics, vectors(3, 4, 6, codes=11), expect_statistics, WANTED,
                 (0, 1), options),
            Case(f"vq_cross_entropy-{metric}", loss, vectors(9, 4, codes=7, indices=True), expect_loss, WANTED,
                 options=options),
            Case(f"vq_soft-heads-{metric}", positional(soft), with_heads(2, 3, 4, codes=5),
                 plain(positional(reference.vq_soft_quantize)), heads, options=options),
            Case(f"vq_soft_statistics-heads-{metric}", positional(statistics), with_heads(2, 3, 4, codes=5),
                 plain(positional(reference.vq_soft_statistics)), heads, (0, 1), options),
        ]  # fmt: skip
    cases += [
        Case("vq_soft-gumbel", soft, vectors(6, 5, codes=19, keyed=True), expect_drawn, WANTED,
             options={"gumbel": True, "relaxation": 0.8}),
        Case("vq_soft-gumbel-hard", soft, vectors(5, 3, codes=40, mask=True, keyed=True), expect_drawn, WANTED, (),
             {"gumbel": True, "hard": True, "relaxation": 0.6, "temperature": 2.0}),
        Case("vq_soft-masked", soft, vectors(2, 9, 3, codes=4, mask=True), expect_soft, WANTED),
        Case("vq_soft-wide", soft, vectors(35, 18, codes=201), expect_soft, WANTED, options={"temperature": 4.0}),
        Case("vq_soft_statistics-masked", statistics, vectors(20, 3, codes=9, mask=True), expect_statistics, WANTED,
             (0, 1)),
        Case("vq_cross_entropy-vector", loss, lambda: {"x": randn(1, 4), "codebook": randn(5, 4),
             "indices": torch.tensor([3])}, expect_loss, WANTED),
    ]  # fmt: skip
    return cases
