"""The time at which a round's work has to stop, looked at between products."""

from __future__ import annotations

import time


class DeadlineError(Exception):
    """The time is up."""


def check_time(deadline: float) -> None:
    """Returns nothing before a deadline.

    Args:
        deadline: As `time.monotonic()` tells it.

    Raises:
        DeadlineError: It has passed.
    """
    if time.monotonic() >= deadline:
        raise DeadlineError
