"""What every family registers in the same way: batching, autocast, and derivatives of derivatives."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def none_if_absent(gradient: Tensor, present: Any) -> Tensor | None:
    """Backward ops return an empty tensor where a gradient does not exist; autograd wants None."""
    return gradient if present else None


def register_autocast(name: str, dtype: torch.dtype = torch.float32) -> None:
    """Under autocast, run the op in `dtype`: these ops hold the reductions that half precision spoils."""
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(f"isthmus::{name}", device, dtype)


def register_vmap_by_loop(name: str) -> None:
    """Batch an op by calling it once for each entry: the result is, by construction, that of a Python loop."""
    op = getattr(torch.ops.isthmus, name)

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        def entry(i: int) -> Any:
            chosen = (a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True))
            result = op(*chosen)
            return result if isinstance(result, tuple) else (result,)

        def stack(column: tuple[Tensor, ...]) -> Tensor:
            shapes = {tuple(t.shape) for t in column}
            if len(shapes) > 1:
                raise ValueError(f"{name} gave shapes {sorted(shapes)} under vmap; expected the same for all")
            return torch.stack(column)

        columns = zip(*(entry(i) for i in range(info.batch_size)), strict=True)
        stacked = tuple(map(stack, columns))
        return (stacked, (0,) * len(stacked)) if len(stacked) > 1 else (stacked[0], 0)

    torch.library.register_vmap(f"isthmus::{name}", rule)


def eager(name: str) -> Callable[..., Any]:
    """The op `name`, past torch.library's autograd layer where no gradient can be wanted.

    That layer serves every transform and tracer and costs tens of microseconds a call, more than many of the ops.
    """
    op = getattr(torch.ops.isthmus, name).default

    def call(*args: Any) -> Any:
        if _transformed() or _wants_gradient(args):
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def register_in_place(name: str, written: int) -> None:
    """Let autograd notice that the op `name` writes to its first arguments.

    Then a tensor that changes between forward and backward is an error and not a wrong gradient. Ops that are defined
    in C++ get this layer from nobody.
    """
    op = getattr(torch.ops.isthmus, name).default

    def kernel(keyset: Any, *args: Any) -> None:
        torch.autograd.graph.increment_version([t for t in args[:written] if t is not None])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    _library.impl(name, kernel, "ADInplaceOrView", with_keyset=True)


_library = torch.library.Library("isthmus", "FRAGMENT")  # what it registers lives as long as it does


def _wants_gradient(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def _transformed() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
    )


def register_gradient(
    name: str, backward: Callable[..., Any], setup_context: Callable[[Any, tuple[Any, ...], Any], None]
) -> Callable[..., Any]:
    """Make the op `name` differentiable, and return it as the public functions should call it.

    Plain eager code takes a torch.autograd.Function with the same two functions, for the reason given in eager().
    """
    torch.library.register_autograd(f"isthmus::{name}", backward, setup_context=setup_context)
    without_gradient = eager(name)

    def forward(ctx: Any, *args: Any) -> Any:
        output = without_gradient(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), members)

    def call(*args: Any) -> Any:
        # Under a transform, eager() hands over to torch.library.
        return function.apply(*args) if _wants_gradient(args) and not _transformed() else without_gradient(*args)

    return call


def gradient_of(function: Callable[..., Any], inputs: Sequence[Tensor | None], grads: Any) -> list[Tensor | None]:
    """∂⟨function(*inputs), grads⟩ / ∂inputs, itself differentiable. None entries are passed through."""
    present = [t for t in inputs if t is not None]
    outputs = function(*inputs)
    found = iter(torch.autograd.grad(outputs, present, grads, create_graph=True, allow_unused=True))
    return [None if t is None else next(found) for t in inputs]


def register_second_order(name: str, gradients: Callable[..., Sequence[Tensor | None]]) -> None:
    """Make the backward op `name` differentiable.

    `gradients` takes the op's arguments and computes what the op computes, in differentiable PyTorch: usually
    gradient_of(reference function). It runs only when somebody differentiates a gradient.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.is_tensor = [isinstance(a, Tensor) for a in inputs]
        ctx.others = [a for a in inputs if not isinstance(a, Tensor)]
        ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            saved = [t.detach().requires_grad_(t.is_floating_point()) for t in ctx.saved_tensors]
            tensors, others = iter(saved), iter(ctx.others)
            args = [next(tensors) if is_tensor else next(others) for is_tensor in ctx.is_tensor]
            pairs = [
                (first, grad)
                for first, grad in zip(gradients(*args), grads, strict=True)
                if first is not None and first.requires_grad
            ]
            wanted = [t for t in saved if t.requires_grad]
            second = iter(
                torch.autograd.grad(
                    [first for first, _ in pairs],
                    wanted,
                    [grad for _, grad in pairs],
                    allow_unused=True,
                )
                if pairs
                else [None] * len(wanted)
            )
        return tuple(next(second) if isinstance(a, Tensor) and a.requires_grad else None for a in args)

    torch.library.register_autograd(f"isthmus::{name}", backward, setup_context=setup_context)
