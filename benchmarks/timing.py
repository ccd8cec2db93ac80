"""Two ways of doing one thing, timed in turn, so that a busy machine slows both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Work = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """How many times longer the first way took than the second: the median over the repeats' ratios.

    Attributes:
        first: Median seconds of the first way.
        second: Median seconds of the second way.
        value: Median of first/second, repeat by repeat.
        repeats: How often each was timed.
    """

    first: float
    second: float
    value: float
    repeats: int


def interleaved(first: Work, second: Work, *, repeats: int, warm_up: bool = True) -> Ratio:
    """Returns the ratio of two ways' times, each timed `repeats` times, in turn."""
    if warm_up:
        first()
        second()
    pairs = [(seconds(first), seconds(second)) for _ in range(repeats)]
    return Ratio(
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
        repeats,
    )


def seconds(work: Work) -> float:
    """Returns how long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
