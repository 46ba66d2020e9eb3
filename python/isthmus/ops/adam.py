"""Adam for matrices whose rows are directions: one pass over each row, and none over rows without a gradient."""

import torch
from torch import Tensor

from isthmus.ops._register import eager, register_in_place


@torch.no_grad()
def adam_rows_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    step: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    unit_norm: bool = False,
    skip_zero_rows: bool = False,
) -> None:
    """One step of Adam, in place and in one pass, that can keep rows at length 1 and leave untouched rows alone.

    With g the gradient and t the number of the step,

        m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²
        w ← (1 − lr · weight_decay) w − lr · m' / (√v' + eps),   m' = m / (1 − β₁ᵗ),   v' = v / (1 − β₂ᵗ)

    Without options this is ``torch.optim.AdamW``. Memory traffic is the floor, weight, gradient and moments once:
    what needs a row as a whole is computed while the row is in cache.

    Args:
        weight: [F, ...], contiguous; float32, float64, bfloat16 or float16. A row is an entry of the first dimension;
            in a vector or a number each element is a row of its own.
        exp_avg, exp_avg_sq: the moments m and v, shape of ``weight``, contiguous; float32, or float64 if the weight
            is.
        grad: shape and dtype of ``weight``.
        step: t, 1 for the first step.
        lr: learning rate.
        betas: β₁ and β₂, 0 to less than 1.
        eps: added to √v'.
        weight_decay: decoupled weight decay.
        unit_norm: rows are directions. The part of the gradient along the row, (g·w / w·w) w, is left out, for it
            would only teach the moments of a length that is not kept; the new row is scaled to length 1. A row of
            zeros has no direction: its gradient is taken whole, and if it does not move it stays.
        skip_zero_rows: lazy Adam. A row whose gradient is zero throughout is left as it is, moments included, and
            costs no more than reading that gradient. So the moments of a row fade only in the steps that touch it; t
            counts all steps.

    A NaN in a gradient spoils its own row under ``unit_norm``, else its own element.

    Raises:
        RuntimeError: dtypes, devices or shapes do not fit, what is written is not contiguous, or a number is out of
            range.

    Source: Kingma & Ba 2015; Loshchilov & Hutter 2019; the projection: Bricken et al., Towards monosemanticity, 2023.

    Example:
        >>> weight, grad = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[9.0, 1.0], [0.0, 0.0]])
        >>> exp_avg, exp_avg_sq = torch.zeros_like(weight), torch.zeros_like(weight)
        >>> adam_rows_(weight, exp_avg, exp_avg_sq, grad, 1, lr=0.75, unit_norm=True, skip_zero_rows=True)
        >>> weight
        tensor([[ 0.8000, -0.6000],
                [ 0.6000,  0.8000]])
    """
    _adam_rows_(weight, exp_avg, exp_avg_sq, grad, step, lr, *betas, eps, weight_decay, unit_norm, skip_zero_rows)


@torch.library.register_fake("isthmus::adam_rows_")
def _(weight, exp_avg, exp_avg_sq, grad, step, lr, beta1, beta2, eps, weight_decay, unit_norm, skip_zero_rows):
    return None


_adam_rows_ = eager("adam_rows_")
register_in_place("adam_rows_", written=3)
