"""Options, the `contest` fixture that every benchmark uses, and what goes into the JSON."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import faiss
import harness
import machine
import pytest
import torch
from rows import IMPLEMENTATIONS
from torch import Tensor

STATISTICS = ("median", "iqr", "q1", "q3", "min", "max", "rounds")
QUICK = harness.Effort(min_rounds=2, max_rounds=2, seconds=0)


class Replay:
    """A clock moved by hand: pytest-benchmark reads off it the durations that were measured."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


REPLAY = Replay()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=machine.DEFAULT_THREADS)
    parser.addoption("--quick", action="store_true", help="a smoke test: small shapes, two rounds")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large: a shape that --quick leaves out")
    threads = config.getoption("--threads")
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY))
    if config.getoption("--quick"):
        items[:] = [item for item in items if not item.get_closest_marker("large")]


@cache
def facts() -> dict[str, object]:
    return machine.facts()


def pytest_benchmark_generate_machine_info() -> dict[str, object]:
    """Replaces pytest-benchmark's own, which names the host."""
    return facts() | machine.roofs()


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Keeps what the report needs: the file lives in the repository."""
    for benchmark in output_json["benchmarks"]:
        for key in ("fullname", "options", "param", "params"):
            del benchmark[key]
        benchmark["stats"] = {key: benchmark["stats"][key] for key in STATISTICS}


@pytest.fixture(scope="session")
def results() -> dict[str, harness.Result]:
    """By group: the first implementation asked for times all, the others find theirs here."""
    return {}


@pytest.fixture(params=IMPLEMENTATIONS)
def contest(request: pytest.FixtureRequest, benchmark: Any, results: dict[str, harness.Result]) -> Callable[..., None]:
    """Measures one group of rows and records that of one implementation.

    contest(*inputs, plain=, isthmus=, peer=None, compiled=None, compare=, flops=0)

    plain, isthmus: functions of the inputs, tensors in, tensors out.
    peer: (name, function) of the strongest other library.
    compiled: the plain function compiled, where torch.compile takes only a part of it.
    compare: maps the results (outputs, then gradients) to tensors in which all must agree.
    flops: floating-point operations of the definition; 0 where only memory can be the bound.
    """
    torch.manual_seed(0)
    params = {"dtype": "float32", "mode": "fwd"} | request.node.callspec.params
    implementation = params.pop("contest")
    operation = request.function.__name__.removeprefix("bench_")
    benchmark.group = f"{operation} {request.node.callspec.id.removeprefix(implementation + '-')}"

    def run(
        *inputs: Tensor,
        plain: harness.Function,
        isthmus: harness.Function,
        compare: Callable[..., tuple[Tensor, ...]],
        peer: tuple[str, harness.Function] | None = None,
        compiled: harness.Function | None = None,
        flops: int = 0,
    ) -> None:
        if implementation == "peer" and not peer:
            pytest.skip("no other library does this")
        name, function = peer or (None, None)
        functions = {"plain": plain, "peer": function, "compiled": compiled, "isthmus": isthmus}
        if benchmark.group not in results:
            results[benchmark.group] = harness.measure(
                {name: function for name, function in functions.items() if function},
                inputs,
                backward=params["mode"] == "fwd+bwd",
                compare=compare,
                tolerance=harness.TOLERANCE[params["dtype"]],
                effort=QUICK if request.config.getoption("--quick") else harness.Effort(),
            )
        result = results[benchmark.group]
        benchmark.extra_info.update(
            facts(),
            **params,
            operation=operation,
            implementation=implementation,
            peer=name,
            bytes=result.bytes,
            flops=flops,
        )
        durations = iter(result.samples[implementation])
        benchmark.pedantic(
            REPLAY.advance,
            setup=lambda: ((next(durations),), {}),
            rounds=len(result.samples[implementation]),
        )

    return run
