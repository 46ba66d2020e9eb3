"""Quantizer dropout: how many of their stages residual quantizers keep in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class QuantizerDropout(nn.Module):
    """For each entry of a batch (dimension 0) a random number of stages, so that a prefix of its codes is a good code.

    Args:
        num_quantizers: number Q of stages.
        quantize_dropout: drop stages in training.
        quantize_dropout_cutoff_index: stages 0 to this one are always kept.
        quantize_dropout_multiple_of: keep a multiple of this many stages, or all.

    Raises:
        ValueError: an argument is outside its range.

    Source: Zeghidour et al., SoundStream: An End-to-End Neural Audio Codec, 2021.
    """

    def __init__(
        self,
        num_quantizers: int,
        *,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
    ) -> None:
        if num_quantizers < 1:
            raise ValueError(f"num_quantizers must be at least 1, got {num_quantizers}")
        if not 0 <= quantize_dropout_cutoff_index < num_quantizers:
            raise ValueError(
                f"quantize_dropout_cutoff_index must be a stage, 0 to {num_quantizers - 1}, "
                f"got {quantize_dropout_cutoff_index}"
            )
        if quantize_dropout_multiple_of < 1:
            raise ValueError(f"quantize_dropout_multiple_of must be at least 1, got {quantize_dropout_multiple_of}")
        super().__init__()
        self.num_quantizers = num_quantizers
        self.quantize_dropout = quantize_dropout
        self.cutoff_index = quantize_dropout_cutoff_index
        self.multiple_of = quantize_dropout_multiple_of

    def forward(self, leading: torch.Size, device: torch.device) -> Tensor | None:
        """How many stages each vector keeps, of the shape ``leading``; None in evaluation or without dropout."""
        if not (self.training and self.quantize_dropout):
            return None
        stages = torch.randint(self.cutoff_index + 1, self.num_quantizers + 1, leading[:1], device=device)
        stages = ((stages + self.multiple_of - 1) // self.multiple_of * self.multiple_of).clamp_max(self.num_quantizers)
        return stages.view(*leading[:1], *[1] * (len(leading) - 1)).expand(leading)

    def extra_repr(self) -> str:
        return f"num_quantizers={self.num_quantizers}, quantize_dropout={self.quantize_dropout}"
