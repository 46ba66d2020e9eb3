"""What a case is, and what the cases of all families share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from isthmus import reference

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    op: Callable[..., Any]
    inputs: Callable[[], Tensors]  # float64 and integer tensors; cast for each dtype
    # (wide tensors, options, dtype of the noise stream) -> the same outputs in plain PyTorch
    expected: Callable[[Tensors, dict[str, Any], torch.dtype], Any]
    differentiable: tuple[str, ...] = ()
    smooth: tuple[int, ...] = (0,)  # outputs whose gradient is the true derivative of their value
    options: dict[str, Any] = field(default_factory=dict)
    batched: bool = True  # the first dimension of the inputs is a batch, which may be empty

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> Tensors:
        """Inputs rounded to `dtype`: the same draw for every dtype."""
        torch.manual_seed(0)
        return {k: cast(v, dtype, device) for k, v in self.inputs().items()}

    def call(self, tensors: Tensors) -> tuple[Tensor, ...]:
        return as_tuple(self.op(**tensors, **self.options))

    def reference(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """The reference in float64 on these tensors (differentiable with respect to them)."""
        first = next(iter(tensors.values()))
        stream = torch.float64 if first.dtype == torch.float64 else torch.float32
        wide = {k: cast(v, torch.float64) for k, v in tensors.items()}
        return as_tuple(self.expected(wide, self.options, stream))

    def __str__(self) -> str:
        return self.name


def cast(t: Tensor | None, dtype: torch.dtype, device: str | None = None) -> Tensor | None:
    if t is None:
        return None
    return t.to(device=device, dtype=dtype if t.is_floating_point() else t.dtype)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) + 0.5


def key() -> Tensor:
    return torch.tensor([1234567, 89])


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reference that takes exactly the arguments of the op."""
    return lambda tensors, options, stream: function(**tensors, **options)


def with_key(make: Callable[[], Tensors]) -> Callable[[], Tensors]:
    return lambda: make() | {"key": key()}


def draw(key: Tensor, shape: Any, stream: torch.dtype) -> Tensor:
    return reference.gaussian_noise(key.cpu(), shape, stream).to(key.device, torch.float64)
