"""Adam for dictionaries: rows of length 1, and no work for rows without a gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from isthmus import ops
from isthmus.ops._arguments import accumulate_dtype

_MOMENTS = ("exp_avg", "exp_avg_sq")
_ROW_OPTIONS = ("unit_norm", "lazy")
# Those of torch.optim.Adam that change how a step is computed, and those that change what it computes.
_WAYS = ("foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")
_FOREIGN = ("amsgrad", "maximize")


class RowAdam(Optimizer):
    """``torch.optim.AdamW``, with two options for parameters whose rows stand for themselves.

    ``unit_norm`` is for dictionaries of directions, as the decoder of a sparse autoencoder: the part of the gradient
    along each row is left out, and the row is scaled to length 1 after the step. ``lazy`` is for parameters of which a
    step touches few rows: rows whose gradient is zero throughout keep their value and their moments. Both cost nothing:
    :func:`isthmus.ops.adam_rows_` makes the whole step in one pass, and over a skipped row reads the gradient alone.

    Without them the numbers are those of ``torch.optim.AdamW``, and with ``weight_decay=0`` of ``torch.optim.Adam``, up
    to rounding. Half parameters have float32 moments.

    A row is an entry of a parameter's first dimension; in a vector each element is a row.

    A run of ``torch.optim.Adam`` or ``AdamW`` can be taken over: :meth:`load_state_dict` reads their state.

    Args:
        params: parameters or groups of them, each with options of its own.
        lr: learning rate.
        betas: how much of the moments a step keeps.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        unit_norm: keep rows at length 1.
        lazy: leave rows without a gradient alone.

    Raises:
        ValueError: a number is out of range.
        RuntimeError: in ``step``: a gradient is sparse, or a parameter is not contiguous.

    Example:
        >>> sae = isthmus.nn.TopKSAE(dim=16, num_features=64, k=4)
        >>> dictionary = {"params": [sae.decoder_weight], "unit_norm": True}
        >>> optimizer = RowAdam([dictionary, {"params": [sae.encoder_weight, sae.encoder_bias, sae.pre_bias]}], lr=1e-3)
        >>> sae(torch.randn(32, 16)).loss.backward()
        >>> optimizer.step()
        >>> torch.allclose(sae.decoder_weight.norm(dim=1), torch.ones(64))
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        unit_norm: bool = False,
        lazy: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} is {value}; expected 0 or more")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas is {betas}; expected two numbers from 0 to less than 1")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"unit_norm": unit_norm, "lazy": lazy})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every parameter that has a gradient; returns what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if grad.is_sparse:
            raise RuntimeError("RowAdam got a sparse gradient; expected a dense one: lazy=True finds the zero rows")
        if not state:
            state["step"] = 0
            for name in _MOMENTS:
                state[name] = torch.zeros_like(parameter, dtype=accumulate_dtype(parameter))
        state["step"] += 1
        ops.adam_rows_(
            parameter,
            state["exp_avg"],
            state["exp_avg_sq"],
            grad,
            state["step"],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            unit_norm=group["unit_norm"],
            skip_zero_rows=group["lazy"],
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a ``RowAdam``, or of a ``torch.optim.Adam`` or ``AdamW`` of the same parameters.

        Moments, steps and the options of groups become those of the state; torch knows no ``unit_norm`` and no
        ``lazy``, so these stay as they are here. Training then goes on as torch's optimizer would, up to rounding;
        moments of half parameters are float32 from there on. Torch cannot read the state of a ``RowAdam``.

        Raises:
            ValueError: the groups do not fit, or it is the state of what ``RowAdam`` does not compute: of ``amsgrad``,
                ``maximize``, or a weight decay that is part of the gradient.
        """
        for saved in state_dict["param_groups"]:
            _check_computes_the_same(saved)
        ours = [{name: group[name] for name in _ROW_OPTIONS} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for saved, group, options in zip(state_dict["param_groups"], self.param_groups, ours, strict=True):
            for name in (*_WAYS, *_FOREIGN):
                group.pop(name, None)
            for name, value in options.items():
                group.setdefault(name, value)
            group["lr"] = float(group["lr"])
            for index, parameter in zip(saved["params"], group["params"], strict=True):
                if index not in state_dict["state"]:
                    continue
                state = self.state[parameter]
                state["step"] = int(state["step"])
                for name in _MOMENTS:
                    # The base class has rounded the moments of half parameters to half.
                    moment = state_dict["state"][index][name]
                    state[name] = moment.to(parameter.device, accumulate_dtype(parameter), copy=True)


def _check_computes_the_same(group: dict[str, Any]) -> None:
    for name in _FOREIGN:
        if group.get(name):
            raise ValueError(f"state_dict has {name}={group[name]}; RowAdam has no {name}")
    if group["weight_decay"] and not group.get("decoupled_weight_decay", True):
        raise ValueError(
            f"state_dict has weight_decay={group['weight_decay']} as a part of the gradient, as torch.optim.Adam does; "
            "RowAdam's is decoupled, as that of AdamW"
        )
