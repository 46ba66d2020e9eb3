"""Record what enters or leaves a layer of any module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.data.writer import ActivationWriter


@contextmanager
def harvest(
    module: nn.Module,
    layer: str,
    sink: ActivationWriter | Callable[..., None],
    *,
    side: str = "output",
    dtype: torch.dtype | None = None,
    mask: Callable[..., Tensor] | None = None,
    tokens: Callable[..., Tensor] | None = None,
) -> Iterator[None]:
    """While it is open, every call of ``module`` sends the activations of one of its layers to ``sink``.

    The last dimension holds the features; all others become rows, in order. Rows are detached, so it makes no
    difference whether gradients are on. The hooks are gone when the context is left, also by an error.

    Args:
        module: the network that is called.
        layer: path of the layer in it, such as ``"blocks.3.mlp"``; ``""`` is the network itself.
        sink: an :class:`ActivationWriter`, or a function called with the rows ``[n, D]``; when ``tokens`` is given
            also with ``tokens=`` and ``sequences=``, int64 ``[n]``.
        side: ``"output"`` or ``"input"`` of the layer. Of a tuple, list or mapping the first element is taken.
        dtype: of the rows, such as ``torch.float16`` for half the space; ``None`` keeps that of the layer.
        mask: a function of the arguments of ``module`` that gives a tensor of the shape of the activations without
            their last dimension: nonzero where a row is wanted, 0 at padding (as ``attention_mask``).
        tokens: a function of the arguments of ``module`` that gives the token at each row, of the same shape; it
            makes the last of these dimensions a sequence.

    Raises:
        ValueError: unknown ``layer`` or ``side``; a layer that gives no floating-point tensor; a mask or tokens of
            another shape; a value too large for float16.

    Example:
        >>> import torch
        >>> from isthmus.data import harvest
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 4))
        >>> rows = []
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
        >>> with torch.no_grad(), harvest(model, "0", rows.append, mask=lambda ids: ids != 0):
        ...     output = model(ids)
        >>> rows[0].shape
        torch.Size([5, 8])
    """
    if side not in ("input", "output"):
        raise ValueError(f"side must be 'input' or 'output', got {side!r}")
    tap = _Tap(sink.write if isinstance(sink, ActivationWriter) else sink, dtype, mask, tokens)
    target = _submodule(module, layer)
    if isinstance(sink, ActivationWriter):
        sink.metadata.update(layer=layer, side=side, module=type(module).__name__)
    # The hook on the arguments comes first: with layer "" both sit on the same module.
    handles = [module.register_forward_pre_hook(tap.see_arguments, with_kwargs=True)]
    try:
        if side == "output":
            handles.append(target.register_forward_hook(tap.take_output))
        else:
            handles.append(target.register_forward_pre_hook(tap.take_input, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Tap:
    """The hooks, and what they know of the call in progress."""

    def __init__(
        self,
        sink: Callable[..., None],
        dtype: torch.dtype | None,
        mask: Callable[..., Tensor] | None,
        tokens: Callable[..., Tensor] | None,
    ) -> None:
        self._sink = sink
        self._dtype = dtype
        self._mask = mask
        self._tokens = tokens
        self._labels: dict[str, Tensor] = {}
        self._sequences = 0

    def see_arguments(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        functions = {"mask": self._mask, "tokens": self._tokens}
        self._labels = {name: f(*args, **kwargs).detach() for name, f in functions.items() if f is not None}

    def take_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._take(output)

    def take_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._take(args or kwargs)

    def _take(self, found: Any) -> None:
        activations = _first_tensor(found).detach()
        places = activations.shape[:-1]
        for name, label in self._labels.items():
            if label.shape != places:
                raise ValueError(
                    f"{name} has shape {list(label.shape)}; expected {list(places)}, "
                    f"as the activations have shape {list(activations.shape)}"
                )
        columns = {}
        if "tokens" in self._labels:
            columns["tokens"] = self._labels["tokens"].long().flatten()
            columns["sequences"] = self._number(places).to(activations.device)
        rows = _converted(activations, self._dtype).flatten(0, -2)
        if "mask" in self._labels:
            keep = self._labels["mask"].flatten() != 0
            rows, columns = rows[keep], {name: column[keep] for name, column in columns.items()}
        self._sink(rows, **columns)

    def _number(self, places: torch.Size) -> Tensor:
        """The number of the sequence of each row, counted over all calls."""
        count = places[:-1].numel()
        first, self._sequences = self._sequences, self._sequences + count
        return torch.arange(first, first + count).repeat_interleave(places[-1])


def _first_tensor(found: Any) -> Tensor:
    while isinstance(found, (tuple, list, Mapping)) and len(found) > 0:
        found = next(iter(found.values())) if isinstance(found, Mapping) else found[0]
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim == 0:
        what = f"{found.dtype} of shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"layer gives {what}; expected a floating-point tensor [..., D]")
    return found.unsqueeze(0) if found.ndim == 1 else found


def _converted(activations: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return activations
    converted = activations.to(dtype)
    if dtype == torch.float16 and (converted.isinf() & activations.isfinite()).any():
        raise ValueError(f"an activation of {activations.abs().max().item():.3g} overflows float16; use bfloat16")
    return converted


def _submodule(module: nn.Module, layer: str) -> nn.Module:
    names = dict(module.named_modules())
    if layer not in names:
        near = get_close_matches(layer, names, n=3) or [name for name in names if name][:3]
        raise ValueError(f"layer {layer!r} is not in the module; did you mean {', '.join(map(repr, near))}?")
    return names[layer]
