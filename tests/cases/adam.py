"""Cases of the adam family."""

from collections.abc import Callable

import torch
from torch import Tensor

from cases.case import Case, Tensors, plain, positive, randn
from isthmus import ops, reference


def learning(*shape: int) -> Callable[[], Tensors]:
    """A weight in the middle of training, every other row of whose gradient is zero."""

    def inputs() -> Tensors:
        grad = randn(*shape)
        grad[::2] = 0
        return {"weight": randn(*shape), "exp_avg": randn(*shape), "exp_avg_sq": positive(*shape), "grad": grad}

    return inputs


def stepped(adam: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    """As a function: moments are kept in float32 also where the weight is half."""

    def function(
        weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, **options: object
    ) -> tuple[Tensor, ...]:
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        written = [weight, exp_avg.to(wide), exp_avg_sq.to(wide)]
        written = [t.clone(memory_format=torch.contiguous_format) for t in written]
        adam(*written, grad, **options)
        return tuple(written)

    return function


STEP, STEP_REFERENCE = stepped(ops.adam_rows_), plain(stepped(reference.adam_rows_))


def adam_cases() -> list[Case]:
    both = {"unit_norm": True, "skip_zero_rows": True}
    return [
        Case(f"adam{name}", STEP, learning(*shape), STEP_REFERENCE, options={"lr": 0.1, "step": step} | options)
        for name, shape, step, options in (
            ("", (9, 5), 1, {}),
            ("-decay", (3, 5, 7), 20, {"weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-3}),
            ("-unit", (9, 37), 3, {"unit_norm": True}),
            ("-lazy", (33, 10), 2, {"skip_zero_rows": True}),
            ("-lazy-vector", (41,), 2, {"skip_zero_rows": True}),
            ("-lazy-unit", (6, 5, 4), 7, both),
        )
    ]
