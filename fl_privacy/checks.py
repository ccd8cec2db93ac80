"""Checks of single numbers that people give: text, NaN and the like are named as what they are."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from fl_privacy.errors import InvalidInputError


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite number."""
    return isinstance(value, Real) and math.isfinite(value)


def check_share(value: Any, name: str) -> None:
    """Raises InvalidInputError unless a value is a number strictly between 0 and 1."""
    if not (is_number(value) and 0 < value < 1):
        raise InvalidInputError(f"expected {name} strictly between 0 and 1, got {value!r}")


def check_positive(value: Any, name: str) -> None:
    """Raises InvalidInputError unless a value is a finite number above 0."""
    if not (is_number(value) and value > 0):
        raise InvalidInputError(f"expected a finite {name} > 0, got {value!r}")


def check_count(value: Any, name: str) -> None:
    """Raises InvalidInputError unless a value is a whole number of at least 1."""
    if not (isinstance(value, Integral) and int(value) >= 1):
        raise InvalidInputError(f"expected a whole number {name} >= 1, got {value!r}")
