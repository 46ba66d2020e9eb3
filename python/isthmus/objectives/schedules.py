"""Annealing schedules: pure functions from a step to a number.

Steps count from 0. Every schedule is at ``start`` for step 0 and at ``end`` from step ``steps`` on, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def linear(step: float, steps: float, *, start: float = 0.0, end: float = 1.0) -> float:
    """A straight line: start + (end − start) · step / steps.

    Args:
        step: at least 0, the number of training steps done.
        steps: length of the ramp.
        start, end: values at its two ends.

    Returns:
        The value at ``step``.

    Raises:
        ValueError: a negative ``step``, or ``steps`` that is not positive.

    Example:
        >>> [linear(step, 4) for step in (0, 1, 4, 100)]
        [0.0, 0.25, 1.0, 1.0]
    """
    return _between(start, end, _progress(step, steps))


def cosine(step: float, steps: float, *, start: float = 0.0, end: float = 1.0) -> float:
    """Half a cosine wave, flat at both ends: start + (end − start) · (1 − cos(π step / steps)) / 2.

    Args:
        step, steps, start, end: as in ``linear``.

    Returns:
        The value at ``step``.

    Raises:
        ValueError: as in ``linear``.

    Example:
        >>> [round(cosine(step, 4), 3) for step in (0, 1, 2, 4)]
        [0.0, 0.146, 0.5, 1.0]
    """
    return _between(start, end, (1.0 - math.cos(math.pi * _progress(step, steps))) / 2.0)


def sigmoid(step: float, steps: float, *, start: float = 0.0, end: float = 1.0, slope: float = 12.0) -> float:
    """A logistic curve through the middle of the ramp (Bowman et al. 2016, arXiv 1511.06349).

    1 / (1 + exp(−slope · (step / steps − ½))), stretched so that its two ends are exact.

    Args:
        step, steps, start, end: as in ``linear``.
        slope: positive; the steepness in units of 1 / ``steps``. A small one approaches the straight line.

    Returns:
        The value at ``step``.

    Raises:
        ValueError: as in ``linear``, or a ``slope`` that is not positive.

    Example:
        >>> [round(sigmoid(step, 4), 3) for step in (0, 1, 2, 3, 4)]
        [0.0, 0.045, 0.5, 0.955, 1.0]
    """
    if slope <= 0.0:
        raise ValueError(f"slope is {slope}; expected a positive number")
    from_middle = _progress(step, steps) - 0.5
    # The logistic function is (1 + tanh(x / 2)) / 2; in this form the stretching is one division.
    return _between(start, end, (1.0 + math.tanh(slope * from_middle / 2.0) / math.tanh(slope / 4.0)) / 2.0)


def cyclical(
    step: float,
    steps: float,
    *,
    cycles: int = 4,
    ramp: float = 0.5,
    start: float = 0.0,
    end: float = 1.0,
    shape: Callable[..., float] = linear,
) -> float:
    """Several ramps, one after the other (Fu et al. 2019, arXiv 1903.10145).

    Each of the ``cycles`` equal parts of the training rises from ``start`` to ``end`` during its fraction ``ramp``
    and stays there for the rest. Latents that collapsed get a new chance with each cycle.

    Args:
        step, start, end: as in ``linear``.
        steps: length of all cycles together; ``end`` after that.
        cycles: their number.
        ramp: in (0, 1], the fraction of a cycle that rises.
        shape: ``linear``, ``cosine`` or ``sigmoid``, the form of the rise.

    Returns:
        The value at ``step``.

    Raises:
        ValueError: as in ``linear``, fewer than one cycle, or ``ramp`` outside (0, 1].

    Example:
        >>> [cyclical(step, 16, cycles=2) for step in (0, 2, 4, 7, 8, 10, 16)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0]
    """
    if cycles < 1:
        raise ValueError(f"cycles is {cycles}; expected at least 1")
    if not 0.0 < ramp <= 1.0:
        raise ValueError(f"ramp is {ramp}; expected a number in (0, 1]")
    progress = _progress(step, steps)
    # Multiplied before it is divided: the first step of a cycle is then exactly its start.
    within = 1.0 if progress == 1.0 else step * cycles % steps / steps
    return shape(within, ramp, start=start, end=end)


def _progress(step: float, steps: float) -> float:
    """step / steps, at most 1."""
    if step < 0:
        raise ValueError(f"step is {step}; expected at least 0")
    if steps <= 0:
        raise ValueError(f"steps is {steps}; expected a positive number")
    return min(step / steps, 1.0)


def _between(start: float, end: float, fraction: float) -> float:
    """From start to end; this form is exact at both."""
    return (1.0 - fraction) * start + fraction * end
