"""Cases of the codebook family."""

from collections.abc import Callable

import torch
from torch import Tensor

from cases.case import Case, Tensors, plain, positive, randn
from isthmus import ops, reference


def codes(*shape: int, num_codes: int) -> Callable[[], Tensors]:
    return lambda: {"x": randn(*shape), "codebook": randn(num_codes, shape[-1])}


def heads(*shape: int, num_codes: int) -> Callable[[], Tensors]:
    return lambda: {"x": randn(*shape), "codebook": randn(shape[0], num_codes, shape[-1])}


def masked(make: Callable[[], Tensors]) -> Callable[[], Tensors]:
    def inputs() -> Tensors:
        tensors = make()
        return tensors | {"mask": torch.rand(tensors["x"].shape[:-1]) < 0.7}

    return inputs


def assigned(*shape: int, num_codes: int, lowest: int = 0) -> Callable[[], Tensors]:
    return lambda: {"x": randn(*shape), "indices": torch.randint(lowest, num_codes, shape[:-1])}


def chosen(*shape: int, num_codes: int) -> Callable[[], Tensors]:
    return lambda: assigned(*shape, num_codes=num_codes, lowest=-1)() | {"codebook": randn(num_codes, shape[-1])}


def averages(*shape: int) -> Callable[[], Tensors]:
    """A codebook in the middle of learning: usages around the one below which a code is dead, some codes not hit."""
    return lambda: {
        "codebook": randn(*shape),
        "usage": torch.rand(shape[:-1], dtype=torch.float64),
        "sums": randn(*shape),
        "counts": torch.randint(0, 5, shape[:-1]).double(),
        "batch_sums": randn(*shape),
    }


def revived(make: Callable[[], Tensors]) -> Callable[[], Tensors]:
    def inputs() -> Tensors:
        tensors = make()
        candidates = randn(*tensors["codebook"].shape)
        candidates[..., 1, 0] = torch.nan
        return tensors | {"code_weight": positive(*tensors["usage"].shape), "candidates": candidates}

    return inputs


def updated(update: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    """As a function: averages are kept in float32 also where the codebook is half."""

    def function(codebook: Tensor, candidates: Tensor | None = None, **kwargs: object) -> tuple[Tensor, ...]:
        wide = torch.float64 if codebook.dtype == torch.float64 else torch.float32
        others = {k: v.to(wide) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        written = [codebook.clone(memory_format=torch.contiguous_format)]
        written += [others.pop(k).clone(memory_format=torch.contiguous_format) for k in ("usage", "sums")]
        update(*written, others.pop("counts"), others.pop("batch_sums"), candidates=candidates, **others)
        return tuple(written)

    return function


UPDATE, UPDATE_REFERENCE = updated(ops.update_codebook_), plain(updated(reference.update_codebook_))


def codebook_cases() -> list[Case]:
    assign, match, quantize = plain(reference.vq_assign), plain(reference.vq_match), plain(reference.vq_quantize)
    statistics, totals = plain(reference.code_statistics), plain(reference.code_totals)
    wanted = ("x", "codebook")
    revive = {"decay": 0.7, "eps": 1e-3, "revive_below": 0.4}
    return [
        Case("assign", ops.vq_assign, codes(33, 10, num_codes=37), assign),
        Case("assign-scalar", ops.vq_assign, codes(2, 9, 1, num_codes=5), assign),
        Case("assign-wide", ops.vq_assign, codes(14, 70, num_codes=130), assign),
        Case("assign-cosine", ops.vq_assign, codes(33, 10, num_codes=37), assign, options={"metric": "cosine"}),
        Case("assign-inner", ops.vq_assign, codes(3, 11, 17, num_codes=37), assign,
             options={"metric": "inner_product"}),
        Case("assign-topk", ops.vq_assign, masked(codes(33, 10, num_codes=37)), assign, options={"topk": 5}),
        Case("assign-all", ops.vq_assign, codes(5, 3, num_codes=6), assign,
             options={"topk": 6, "metric": "inner_product"}),
        Case("assign-heads", ops.vq_assign, masked(heads(3, 2, 9, 6, num_codes=21)), assign,
             options={"topk": 2, "metric": "cosine"}, batched=False),
        Case("match", ops.vq_match, codes(33, 10, num_codes=7), match, batched=False),
        Case("match-heads", ops.vq_match, heads(2, 13, 5, num_codes=8), match, options={"metric": "cosine"},
             batched=False),
        Case("quantize", ops.vq_quantize, codes(33, 10, num_codes=7), quantize, wanted, (2,)),
        Case("quantize-weighted", ops.vq_quantize, codes(3, 4, 6, num_codes=5), quantize, wanted, (),
             {"commitment_weight": 0.25}),
        Case("quantize-rotation", ops.vq_quantize, masked(codes(33, 19, num_codes=7)), quantize, wanted, (2,),
             {"gradient": "rotation"}),
        Case("quantize-codebook", ops.vq_quantize, codes(3, 11, 6, num_codes=5), quantize, wanted, (),
             {"gradient": "codebook", "metric": "inner_product"}),
        Case("quantize-heads", ops.vq_quantize, masked(heads(3, 17, 6, num_codes=5)), quantize, wanted, (2,),
             {"metric": "cosine"}, batched=False),
        Case("quantize-given", ops.vq_quantize, chosen(33, 10, num_codes=7), quantize, wanted, (),
             {"gradient": "rotation", "commitment_weight": 0.5}),
        Case("statistics", ops.code_statistics, assigned(33, 10, num_codes=7), statistics, options={"num_codes": 7}),
        Case("totals-masked", ops.code_totals, assigned(3, 11, 10, num_codes=7, lowest=-1), totals,
             options={"num_codes": 7}),
        Case("update", UPDATE, averages(9, 5), UPDATE_REFERENCE, options={"decay": 0.9}),
        Case("update-revive", UPDATE, revived(averages(3, 9, 18)), UPDATE_REFERENCE, options=revive),
        Case("update-unit", UPDATE, revived(averages(9, 5)), UPDATE_REFERENCE, options=revive | {"normalize": True}),
    ]  # fmt: skip
