"""How an estimate is put into words: the same in a terminal and on a page."""

from __future__ import annotations

import math
import re
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal

from fl_privacy.audit.estimate import APPROXIMATE_SOURCES, LeakageEstimate
from fl_privacy.interval import Interval

ABSENT = "-"
"""Stands for a number that a row does not have."""
_NONLINEAR = 2.0
"""`change_ratio` above which a row says so (docs/validation.md)."""


def leakage_text(interval: Interval[float] | None) -> str:
    """Returns `0.93 [0.91, 0.95]`; three decimals where two would hide how small a leakage is."""
    if interval is None:
        return ABSENT
    digits = 3 if interval.upper < 0.1 else 2
    lower = _rounded(interval.lower, digits, ROUND_FLOOR)
    upper = _rounded(interval.upper, digits, ROUND_CEILING)
    return f"{_rounded(interval.value, digits, ROUND_HALF_EVEN)} [{lower}, {upper}]"


def at_most_text(interval: Interval[float] | None) -> str:
    """Returns `≤ 0.93`, where it is the upper end that matters."""
    return ABSENT if interval is None else f"≤ {rounded_up(interval.upper)}"


def rounded_up(leakage: float) -> str:
    """Returns the upper end of a leakage in two decimals, rounded up."""
    return _rounded(min(1.0, leakage), 2, ROUND_CEILING)


def about_text(row: LeakageEstimate | None) -> str:
    """Returns what stands before a row's numbers where they were not measured at the client's own inputs."""
    return "≈ " if row is not None and row.leakage is not None and row.source in APPROXIMATE_SOURCES else ""


def _rounded(value: float, digits: int, rounding: str) -> str:
    if not math.isfinite(value):
        return str(value)
    return str(Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), rounding=rounding))


def nonlinear_text(change_ratio: float | None) -> str:
    """Returns what there is to say of an update that is not linear over its predicted error; nothing of others."""
    if change_ratio is None or change_ratio <= _NONLINEAR:
        return ""
    return (
        f"over the predicted error the update changes {change_ratio:.2g} times as much as its Jacobian says: to first "
        "order is not enough here, and more may leak"
    )


def number_text(value: float | None) -> str:
    """Returns a number in three digits."""
    return ABSENT if value is None else f"{value:.3g}"


def natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Returns a sort key that puts client 9 before client 10; of numbers of any length, which `int` refuses."""
    parts = [part.lstrip("0") if index % 2 else part for index, part in enumerate(re.split(r"([0-9]+)", name))]
    return [(index % 2 == 0, len(part) if index % 2 else 0, part) for index, part in enumerate(parts)]


def plain(text: str) -> str:
    """Returns `text` on one line, without the control characters that would act on a terminal."""
    return "".join(character if character.isprintable() else " " for character in text).strip()


def shortened(text: str, length: int) -> str:
    """Returns `text` cut to a length, with dots where something was cut."""
    return text if len(text) <= length else f"{text[: length - 3].rstrip()}..."


def joined(*parts: str) -> str:
    """Returns the parts that are not empty, with semicolons between."""
    return "; ".join(part for part in parts if part)
