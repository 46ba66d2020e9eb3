"""Cases of the categorical family."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cases.case import Case, Tensors, key, plain, randn, with_key
from isthmus import ops, reference

LOGITS = ("logits",)
BOTH = ("logits", "prior_logits")


def draw_gumbel(key: Tensor, shape: Any, stream: torch.dtype) -> Tensor:
    return reference.gumbel_noise(key.cpu(), shape, stream).to(key.device, torch.float64)


def categories(*shape: int, prior: tuple[int, ...] | None = None) -> Callable[[], Tensors]:
    return lambda: {"logits": randn(*shape)} | ({} if prior is None else {"prior_logits": randn(*prior)})


def with_noise(function: Callable[..., Any]) -> Callable[..., Any]:
    def expected(tensors: Tensors, options: dict[str, Any], stream: torch.dtype) -> Any:
        tensors = dict(tensors)
        return function(noise=draw_gumbel(tensors.pop("key"), tensors["logits"].shape, stream), **tensors, **options)

    return expected


def categorical_cases() -> list[Case]:
    sample, sample_kl, kl = ops.gumbel_softmax, ops.gumbel_softmax_kl, ops.categorical_kl
    expect, expect_kl = map(with_noise, (reference.gumbel_softmax, reference.gumbel_softmax_kl))
    expect_divergence = plain(reference.categorical_kl)
    cases = [
        Case(f"gumbel-noise-{dtype}".replace("torch.", ""), ops.gumbel_noise, lambda: {"key": key()},
             lambda tensors, options, stream: draw_gumbel(tensors["key"], options["shape"], options["dtype"]),
             options={"shape": (3, 5, 7), "dtype": dtype})
        for dtype in (torch.float32, torch.float64)
    ]  # fmt: skip
    cases += [
        Case("gumbel", sample, with_key(categories(5, 10)), expect, LOGITS),
        Case("gumbel-tempered", sample, with_key(categories(2, 3, 19)), expect, LOGITS, options={"temperature": 0.7}),
        Case("gumbel-vector", sample, with_key(categories(9)), expect, LOGITS),
        Case("gumbel-hard", sample, with_key(categories(5, 19)), expect, LOGITS, (),
             {"hard": True, "temperature": 0.5}),
    ]  # fmt: skip
    for name, prior in (("uniform", None), ("prior", (5, 19)), ("shared-prior", (19,))):
        make, wanted = categories(5, 19, prior=prior), LOGITS if prior is None else BOTH
        cases.append(Case(f"categorical_kl-{name}", kl, make, expect_divergence, wanted))
        cases.append(Case(f"gumbel_kl-{name}", sample_kl, with_key(make), expect_kl, wanted, (0, 1)))
    cases += [
        Case(f"categorical_kl-{r}", kl, categories(5, 19, prior=(5, 19)), expect_divergence, BOTH,
             options={"reduction": r})
        for r in ("sum", "mean")
    ]  # fmt: skip
    cases += [
        Case("gumbel_kl-hard", sample_kl, with_key(categories(4, 7, prior=(7,))), expect_kl, BOTH, (1,),
             {"hard": True, "temperature": 0.7}),
        Case("gumbel_kl-mean", sample_kl, with_key(categories(5, 10)), expect_kl, LOGITS, (0, 1),
             {"reduction": "mean"}),
    ]  # fmt: skip
    return cases
