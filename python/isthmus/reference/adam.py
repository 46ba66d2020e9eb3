"""Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019), for matrices of unit rows."""

import torch
from torch import Tensor

from isthmus.reference._numeric import widen

__all__ = ["adam_rows_"]


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
    """One step of Adam, in place. With g the gradient and t the number of the step, from 1 on,

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        w <- (1 - lr weight_decay) w - lr m' / (sqrt(v') + eps),   m' = m / (1 - beta1^t),  v' = v / (1 - beta2^t)

    Args:
        weight, grad: [F, ...]; one row for each entry of the first dimension, and of a vector or a number each
            element is a row.
        exp_avg, exp_avg_sq: m and v, of the same shape; float32 for half weights.
        unit_norm: take from the gradient of each row its part along the row, (g.w / w.w) w, and scale the new row to
            length 1. A row of zeros has no direction: its gradient is taken whole, and if it does not move it stays.
        skip_zero_rows: leave rows whose gradient is zero throughout as they are, moments included.

    Example:
        >>> weight, exp_avg, exp_avg_sq = torch.ones(3), torch.zeros(3), torch.zeros(3)
        >>> adam_rows_(weight, exp_avg, exp_avg_sq, torch.tensor([-8.0, 0.0, 0.1]), 1, lr=0.5)
        >>> weight
        tensor([1.5000, 1.0000, 0.5000])
    """
    rows = (len(weight), -1) if weight.dim() > 1 and weight.numel() else (weight.numel(), 1)
    w, g = (widen(t.reshape(rows)) for t in (weight, grad))
    m, v = exp_avg.reshape(rows), exp_avg_sq.reshape(rows)
    touched = (g != 0).any(1, keepdim=True) if skip_zero_rows else torch.ones_like(g[:, :1], dtype=torch.bool)
    if unit_norm:
        square = w.square().sum(1, keepdim=True)
        g = g - torch.where(square == 0, 0.0, (g * w).sum(1, keepdim=True) / square) * w
    m = torch.where(touched, betas[0] * m + (1 - betas[0]) * g, m)
    v = torch.where(touched, betas[1] * v + (1 - betas[1]) * g.square(), v)
    spread = (v / (1 - betas[1] ** step)).sqrt() + eps
    moved = (1 - lr * weight_decay) * w - lr / (1 - betas[0] ** step) * m / spread
    if unit_norm:
        length = moved.norm(dim=1, keepdim=True)
        moved = moved / torch.where(length == 0, 1.0, length)
    for t, new in ((weight, torch.where(touched, moved, w)), (exp_avg, m), (exp_avg_sq, v)):
        t.copy_(new.view_as(t))
