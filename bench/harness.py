"""The timing of one row: every implementation does the same work, and they take turns.

A shared machine has slow minutes. Timed one after another, the implementations would each meet a
different minute and the ratio between them would be luck. Here each round times all of them once,
in an order that changes, so that a slow minute slows them all.
"""

from __future__ import annotations

import copy
import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

TURN_SECONDS = 2e-3
"""A turn repeats a short call for about this long, so that the clock's own cost disappears."""

PAUSE_SECONDS = 20e-3
"""Idle before a turn. OpenMP workers spin for milliseconds before they sleep, and faiss brings an
OpenMP runtime of its own: its workers would keep the cores from the next implementation."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest relative error (Frobenius norm) between two implementations of one row."""

Function = Callable[..., Any]

MODES = pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def shapes(*small: dict[str, int], large: tuple[dict[str, int], ...] = ()) -> pytest.MarkDecorator:
    """Parametrizes `shape`; `--quick` leaves the large ones out."""

    def label(shape: dict[str, int]) -> str:
        return "-".join(f"{axis}{size}" for axis, size in shape.items())

    rows = [pytest.param(shape, id=label(shape), marks=pytest.mark.large) for shape in large]
    rows += [pytest.param(shape, id=label(shape)) for shape in small]
    return pytest.mark.parametrize("shape", rows)


@dataclass
class Call:
    """What is timed: `function(*inputs)`, and the gradients in those inputs that require them.

    The incoming gradients are ones, made once and contiguous.
    """

    function: Function
    inputs: tuple[Tensor, ...]
    cotangents: list[Tensor] = field(default_factory=list)

    def __call__(self) -> tuple[Tensor, ...]:
        result = self.function(*self.inputs)
        outputs = result if isinstance(result, tuple) else (result,)
        variables = [tensor for tensor in self.inputs if tensor.requires_grad]
        if not variables:
            return outputs
        roots = [tensor for tensor in outputs if tensor.requires_grad]
        self.cotangents = self.cotangents or [torch.ones_like(root) for root in roots]
        return outputs + torch.autograd.grad(roots, variables, self.cotangents)


def check_agreement(calls: Mapping[str, Call], compare: Callable[..., tuple[Tensor, ...]], tolerance: float) -> None:
    """Raises AssertionError where an implementation does not compute what the plain one does."""
    results = {name: compare(*call()) for name, call in calls.items()}
    for name, values in results.items():
        for position, (value, expected) in enumerate(zip(values, results["plain"], strict=True)):
            error = (value.double() - expected.double()).norm() / expected.double().norm()
            assert error <= tolerance, f"{name} differs from plain in value {position} by {error:.1e}"


def assert_standard_normal(values: Tensor) -> None:
    """Noise cannot be compared by element; its first two moments can, to six standard errors."""
    values = values.double().flatten()
    count = values.numel()
    assert values.mean().abs() < 6 / math.sqrt(count)
    assert (values.var() - 1).abs() < 6 * math.sqrt(2 / count)


@dataclass(frozen=True)
class Effort:
    """How long a group is measured: for `seconds`, but no fewer and no more rounds than these.

    Where rounds last seconds, as those of a plain implementation with gigabytes of temporaries do, `patience` seconds
    and three rounds are enough.
    """

    min_rounds: int = 9
    max_rounds: int = 50
    seconds: float = 3.0
    patience: float = 20.0


def time_calls(call: Function, count: int) -> float:
    """Mean seconds per call of `count` calls, after one that wakes threads and fills caches."""
    time.sleep(PAUSE_SECONDS)
    call()
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def take_turns(calls: Mapping[str, Function], effort: Effort) -> dict[str, list[float]]:
    """Seconds per call of each implementation, one number per round."""
    counts = {name: math.ceil(TURN_SECONDS / time_calls(call, count=3)) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    shuffle = random.Random(0).shuffle
    order = list(calls)
    start = time.perf_counter()
    gc.disable()
    try:
        for done in range(effort.max_rounds):
            spent = time.perf_counter() - start
            if (done >= effort.min_rounds and spent > effort.seconds) or (done >= 3 and spent > effort.patience):
                break
            shuffle(order)
            for name in order:
                samples[name].append(time_calls(calls[name], counts[name]))
    finally:
        gc.enable()
    return samples


def floor_bytes(inputs: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> int:
    """The least memory traffic: forward reads inputs and writes outputs; backward reads inputs
    and incoming gradients and writes gradients."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in inputs]
    gradients = [size for tensor, size in zip(inputs, sizes, strict=True) if tensor.requires_grad]
    written = sum(tensor.numel() * tensor.element_size() for tensor in results)
    if not gradients:
        return sum(sizes) + written
    outputs = written - sum(gradients)
    return 2 * (sum(sizes) + outputs) + sum(gradients)


@dataclass(frozen=True)
class Result:
    """Seconds per call of each implementation, one number per round; and the traffic floor."""

    samples: dict[str, list[float]]
    bytes: int


def measure(
    functions: Mapping[str, Function],
    inputs: tuple[Tensor, ...],
    *,
    backward: bool,
    compare: Callable[..., tuple[Tensor, ...]],
    tolerance: float,
    effort: Effort,
) -> Result:
    """Compiles the plain implementation unless one comes with it, checks that all agree, and times them in turns."""
    if backward:
        inputs = tuple(x.requires_grad_() if x.is_floating_point() else x for x in inputs)
    torch._dynamo.reset()  # else the eighth recompilation of one function would quietly run eagerly
    if "compiled" not in functions:
        compiled = torch.compile(copy.deepcopy(functions["plain"]), fullgraph=True, dynamic=False)
        functions = {**functions, "compiled": compiled}
    calls = {name: Call(function, inputs) for name, function in functions.items()}
    check_agreement(calls, compare, tolerance)
    return Result(take_turns(calls, effort), floor_bytes(inputs, calls["isthmus"]()))
