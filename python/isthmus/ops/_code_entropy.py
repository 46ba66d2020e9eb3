"""The distribution of codes over a batch, and its entropy: what the scalar family computes by a matrix product."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from isthmus.reference.scalar import bit_logits

_ROWS_AT_ONCE = 4096


def lfq_code_counts(
    x: Tensor,
    *,
    scale: float = 1.0,
    spherical: bool = False,
    inverse_temperature: Tensor | float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """The soft histogram over all 2^n codes, Σ over rows of p(c | u): exact, and never rows × 2^n in memory.

    A code is a high and a low half of its bits, and p(c | u) = p(high | u) · p(low | u) (``lfq_quantize_entropy``). The
    sum over rows of such products is one matrix product of two tables of 2^(n/2) columns, torch's own, in whose order
    of summation this function differs from the ops of this library. Rows go through it in blocks that backward computes
    again, so memory is that of one block and of the result.

    Args:
        As in ``lfq_quantize_entropy``. n up to 18 or so: time is rows · 2^n multiplications.

    Returns:
        [2^n], by index; float64 for float64, else float32. ``code_entropy`` of it is the entropy of the batch's mean
        distribution.

    Gradients:
        To ``x``; twice differentiable.

    Example:
        >>> lfq_code_counts(torch.zeros(6, 1))
        tensor([3., 3.])
    """
    bits = x.shape[-1]
    inverse_temperature = temperature_of(x, inverse_temperature)
    rows = x.reshape(-1, bits)
    kept = None if mask is None else mask.reshape(-1, 1)
    rows = rows if kept is None else torch.where(kept, rows, 0.0)

    def block(rows: Tensor, kept: Tensor | None) -> Tensor:
        logits = bit_logits(rows, scale, spherical, inverse_temperature)
        with torch.autocast(x.device.type, enabled=False):
            high, low = _code_table(logits[:, : bits // 2]), _code_table(logits[:, bits // 2 :])
            return (high if kept is None else torch.where(kept, high, 0.0)).T @ low

    if len(rows) <= _ROWS_AT_ONCE:
        return block(rows, kept).flatten()
    masks = [None] * -(-len(rows) // _ROWS_AT_ONCE) if kept is None else kept.split(_ROWS_AT_ONCE)
    blocks = zip(rows.split(_ROWS_AT_ONCE), masks, strict=True)
    total = torch.stack([checkpoint(block, *pair, use_reentrant=False) for pair in blocks])
    return total.sum(0).flatten()


def temperature_of(x: Tensor, value: Tensor | float) -> Tensor:
    """As the op takes it: one float64 number on the device of ``x``."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.float64, device=x.device)
    if value.requires_grad:
        raise ValueError("inverse_temperature requires a gradient; expected a constant, as none is computed for it")
    return value.to(x.device, torch.float64).reshape(())


def _code_table(logits: Tensor) -> Tensor:
    """[rows, bits] to the probabilities [rows, 2^bits] of all combinations, the first bit the most significant."""
    bits = logits.shape[-1]
    shifts = torch.arange(bits - 1, -1, -1, device=logits.device).unsqueeze(-1)
    ones = (torch.arange(2**bits, device=logits.device) >> shifts & 1).to(logits.dtype)
    # Logarithms are negative, so their sums lose nothing. What e^-800 would multiply is zero in float64 too, but an
    # infinity, times a zero of the product, would not be.
    log_p = torch.cat((F.logsigmoid(-logits), F.logsigmoid(logits)), dim=-1).clamp(min=-800.0)
    return (log_p @ torch.cat((1 - ones, ones))).exp()


def _plogp(p: Tensor) -> Tensor:
    # Where p underflows its gradient is zero; the floor keeps log p from making that 0 · inf.
    return p * p.clamp(min=torch.finfo(p.dtype).tiny).log()


def bit_entropy(bit_counts: Tensor, rows: Tensor | float) -> Tensor:
    """The entropy, in nats, of independent bits that were 1 in ``bit_counts`` of ``rows`` rows: [..., n] to [...].

    Example:
        >>> bit_entropy(torch.tensor([2.0, 4.0]), 4)
        tensor(0.6931)
    """
    p = bit_counts / rows
    return -(_plogp(p) + _plogp(1 - p)).sum(-1)


def code_entropy(code_counts: Tensor) -> Tensor:
    """The entropy, in nats, of codes in proportion to their counts: [..., K] to [...]; 0 where nothing was counted.

    Example:
        >>> code_entropy(torch.tensor([2.0, 2.0, 0.0]))
        tensor(0.6931)
    """
    total = code_counts.sum(-1, keepdim=True)
    return -_plogp(code_counts / torch.where(total == 0, 1.0, total)).sum(-1)
