"""Optimizers for what the bottleneck modules learn."""

from isthmus.optim.row_adam import RowAdam

__all__ = ["RowAdam"]
