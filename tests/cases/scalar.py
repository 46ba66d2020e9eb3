"""Cases of the scalar family."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cases.case import Case, Tensors, plain, randn, with_key
from isthmus import ops, reference
from isthmus.reference import scalar

X = ("x",)
LEVELS = (8, 5, 3, 4, 2)


def rows(*shape: int, mask: tuple[int, ...] | None = None) -> Callable[[], Tensors]:
    """Vectors, and a mask that excludes some of them."""
    return lambda: {"x": randn(*shape)} | ({} if mask is None else {"mask": torch.rand(mask) < 0.7})


def integers(high: int, *shape: int, name: str = "indices") -> Callable[[], Tensors]:
    return lambda: {name: torch.randint(0, high, shape)}


def with_noise(function: Callable[..., Any], draw: Callable[..., Tensor], name: str) -> Callable[..., Any]:
    """A reference that takes the noise of the key that the op takes."""

    def expected(tensors: Tensors, options: dict[str, Any], stream: torch.dtype) -> Any:
        tensors = dict(tensors)
        noise = draw(tensors.pop("key").cpu(), tensors[name].shape, stream).to(tensors[name].device, torch.float64)
        return function(**tensors, **options, noise=noise)

    return expected


def fsq_cases() -> list[Case]:
    op, expect = ops.fsq_quantize, plain(reference.fsq_quantize)
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "symmetric": {"symmetric": True},
        "clamp": {"hard_clamp": True},
        "clamp-symmetric": {"hard_clamp": True, "symmetric": True},
    }
    cases = [Case(f"fsq-{k}", op, rows(31, 5), expect, X, (), {"levels": LEVELS} | v) for k, v in options.items()]
    dropout = with_noise(reference.fsq_quantize, scalar.uniform_noise, "x")
    return [
        *cases,
        Case("fsq-mask", op, rows(3, 7, 5, mask=(3, 7)), expect, X, (), {"levels": LEVELS}),
        Case("fsq-row", op, rows(1, 3), expect, X, (), {"levels": (7, 7, 16)}),
        Case("fsq-many-levels", op, rows(9, 2), expect, X, (), {"levels": (1000, 301)}),
        Case("fsq-dropout", op, with_key(rows(31, 5)), dropout, X, (), {"levels": LEVELS, "noise_dropout": 0.4}),
        Case("fsq_decode", ops.fsq_decode, integers(960, 4, 9), plain(reference.fsq_decode),
             options={"levels": LEVELS, "dtype": torch.float32}),
    ]  # fmt: skip


def residual_fsq_cases() -> list[Case]:
    op, expect = ops.residual_fsq_quantize, plain(reference.residual_fsq_quantize)
    some = lambda: rows(3, 7, 5, mask=(3, 7))() | {"stages": torch.randint(0, 4, (3, 7))}  # noqa: E731
    stages = {"levels": LEVELS, "num_quantizers": 3}
    return [
        Case("residual-fsq", op, rows(31, 5), expect, X, (), stages),
        # Odd numbers of levels: half types lie on no edges of bins but those of the first stage, which are exact.
        Case("residual-fsq-clamp", op, rows(2, 9, 5), expect, X, (),
             {"levels": (7, 5, 3, 9, 2), "num_quantizers": 3, "hard_clamp": True}),
        Case("residual-fsq-stages", op, some, expect, X, (), stages, batched=False),
        Case("residual-fsq-one", op, rows(40, 2), expect, X, (), {"levels": (300, 65), "num_quantizers": 1}),
    ]  # fmt: skip


def lfq_cases() -> list[Case]:
    op, expect = ops.lfq_quantize, plain(reference.lfq_quantize)
    soft, expect_soft = ops.lfq_quantize_entropy, plain(reference.lfq_quantize_entropy)
    counts, expect_counts = ops.lfq_code_counts, plain(reference.lfq_code_counts)
    spherical = {"spherical": True, "scale": 0.5}
    cold = {"inverse_temperature": 0.7, "scale": 0.8}
    return [
        Case("lfq", op, rows(5, 11, 9), expect, X, (2,)),
        Case("lfq-spherical", op, rows(37, 9, mask=(37,)), expect, X, (2,), spherical),
        Case("lfq-long", op, rows(7, 62), expect, X, (2,), {"scale": 0.25}),
        Case("lfq-entropy", soft, rows(5, 11, 9), expect_soft, X, (2, 3, 4), cold),
        Case("lfq-entropy-mask", soft, rows(37, 9, mask=(37,)), expect_soft, X, (2, 3, 4), spherical | cold),
        Case("lfq-entropy-codebooks", soft, rows(2, 13, 3, 10, mask=(2, 13)), expect_soft, X, (2, 3, 4),
             {"num_codebooks": 3}),
        Case("lfq-counts", counts, rows(5, 4, 7), expect_counts, X, options=cold),
        Case("lfq-counts-mask", counts, rows(23, 6, mask=(23,)), expect_counts, X, options=spherical),
        Case("lfq_decode", ops.lfq_decode, integers(512, 4, 9), plain(reference.lfq_decode),
             options={"bits": 9, "scale": 0.5}),
    ]  # fmt: skip


def latent_cases() -> list[Case]:
    op, expect = ops.latent_quantize, plain(reference.latent_quantize)

    def scalars(*shape: int, codebooks: tuple[int, ...], mask: tuple[int, ...] | None = None) -> Any:
        return lambda: rows(*shape, mask=mask)() | {"codebooks": randn(*codebooks)}

    decode = lambda: integers(5**4, 3, 7)() | {"codebooks": randn(4, 5)}  # noqa: E731
    both = ("x", "codebooks")
    return [
        Case("latent", op, scalars(3, 17, 6, codebooks=(6, 5)), expect, both, ()),
        Case("latent-levels", op, scalars(40, 3, codebooks=(13,), mask=(40,)), expect, both, (),
             {"levels": (2, 8, 3), "commitment_weight": 0.25}),
        Case("latent_decode", ops.latent_decode, decode, plain(reference.latent_decode), ("codebooks",)),
    ]  # fmt: skip


def binary_cases() -> list[Case]:
    op, logits = ops.binary_map, ("logits",)

    def make(*shape: int) -> Callable[[], Tensors]:
        return lambda: {"logits": randn(*shape)}

    def likelier(tensors: Tensors, options: dict[str, Any], stream: torch.dtype) -> Any:
        return reference.binary_map(**tensors)

    sampled = with_noise(reference.binary_map, scalar.logistic_noise, "logits")
    return [
        Case("binary", op, with_key(make(5, 11, 9)), sampled, logits, (2,)),
        Case("binary-gumbel", op, with_key(make(40, 16)), sampled, logits, (2,),
             {"gradient": "gumbel", "temperature": 0.6}),
        Case("binary-deterministic", op, make(9, 5), likelier, logits, (2,), {"deterministic": True}),
    ]  # fmt: skip


def storage_cases() -> list[Case]:
    pack, unpack = plain(reference.pack_indices), plain(reference.unpack_indices)
    octets = lambda: {"packed": torch.randint(0, 256, (3, 14), dtype=torch.uint8)}  # noqa: E731
    cases = [
        Case(f"pack-{codes}", ops.pack_indices, integers(codes, 3, 10), pack, options={"num_codes": codes})
        for codes in (200, 1024, 40000, 2**40)
    ]
    return [
        *cases,
        Case("pack-bits", ops.pack_indices, integers(2**11, 3, 10), pack, options={"bits": 11}),
        Case("unpack-bits", ops.unpack_indices, octets, unpack, options={"bits": 11, "length": 10}),
    ]


def scalar_cases() -> list[Case]:
    return fsq_cases() + residual_fsq_cases() + lfq_cases() + latent_cases() + binary_cases() + storage_cases()
