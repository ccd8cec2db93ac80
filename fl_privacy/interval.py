"""A value with the bounds it is known to lie between."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Interval(NamedTuple, Generic[T]):
    """A value and the bounds it is known to lie between, `lower <= value <= upper`.

    Holds floats in a ledger row and tensors `[U]`, one entry per audit unit, in the engine.
    """

    lower: T
    value: T
    upper: T
