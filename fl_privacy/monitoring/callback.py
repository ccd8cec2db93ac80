"""The protocol of callbacks, and how they are called: one that fails costs a line in the log and never a round."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from fl_privacy.audit.estimate import LeakageEstimate
from fl_privacy.audit.wording import plain, shortened

_log = logging.getLogger(__name__)

_NAME_LENGTH = 60


@runtime_checkable
class RoundCallback(Protocol):
    """Is told of every audited round, in the server's process, after its rows were written to the ledger.

    A callback may also have `on_pictures(server_round, pictures)`, which is given the image files that the run drew of
    clients in a round, by client, after `on_round`; and `close()`, which is called once, when the run ends.
    """

    def on_round(self, server_round: int, rows: Sequence[LeakageEstimate]) -> None:
        """Takes the rows of a round, one for each client that was asked, those without an estimate, too."""


@dataclass(frozen=True, kw_only=True)
class RoundSummary:
    """A round in a few numbers; leakage is `None` where no client has an estimate.

    Attributes:
        leakage_max: Largest estimate (middle of the interval) of any client.
        leakage_mean: Mean estimate over the clients that have one.
        clients: Number of rows.
        above_target: Clients whose leakage may be above their target: the upper end of the interval is.
        not_known: Clients of which nothing is known.
    """

    leakage_max: float | None
    leakage_mean: float | None
    clients: int
    above_target: int
    not_known: int


def summarize(rows: Sequence[LeakageEstimate]) -> RoundSummary:
    """Returns a round in a few numbers."""
    known = [(row.leakage, row.target_leakage) for row in rows if row.leakage is not None]
    known = [(leakage, target) for leakage, target in known if all(map(math.isfinite, leakage))]
    values = [leakage.value for leakage, _ in known]
    return RoundSummary(
        leakage_max=max(values, default=None),
        leakage_mean=sum(values) / len(values) if values else None,
        clients=len(rows),
        above_target=sum(target is not None and leakage.upper > target for leakage, target in known),
        not_known=len(rows) - len(known),
    )


def client_numbers(row: LeakageEstimate) -> dict[str, float]:
    """Returns the finite numbers of a row that are worth a curve each."""
    numbers = {
        "leakage": None if row.leakage is None else row.leakage.value,
        "leakage_lower": None if row.leakage is None else row.leakage.lower,
        "leakage_upper": None if row.leakage is None else row.leakage.upper,
        "rmse": row.rmse,
        "noise_std": row.noise_std,
        "required_noise_std": row.required_noise_std,
    }
    return {name: value for name, value in numbers.items() if value is not None and math.isfinite(value)}


def most_exposed(rows: Sequence[LeakageEstimate], count: int) -> list[LeakageEstimate]:
    """Returns the rows of at most so many clients: those of which nothing is known, then the most exposed."""
    return sorted(rows, key=lambda row: -client_numbers(row).get("leakage_upper", math.inf))[:count]


def client_name(client: str) -> str:
    """Returns a client's name as a label: it is text from the client, of any length and content."""
    return shortened(plain(client), _NAME_LENGTH)


def notify(callbacks: Iterable[RoundCallback], server_round: int, rows: Sequence[LeakageEstimate]) -> None:
    """Tells every callback of a round; what one raises is logged."""
    for callback in callbacks:
        try:
            callback.on_round(server_round, tuple(rows))
        except Exception:  # monitoring must not end the training
            _log.exception("the callback %s failed in round %d", type(callback).__name__, server_round)


def notify_pictures(callbacks: Iterable[RoundCallback], server_round: int, pictures: Mapping[str, Path]) -> None:
    """Gives the pictures of a round to every callback that takes some; what one raises is logged."""
    for callback in callbacks:
        try:
            getattr(callback, "on_pictures", lambda *_: None)(server_round, dict(pictures))
        except Exception:
            _log.exception("the callback %s failed on pictures of round %d", type(callback).__name__, server_round)


def close_all(callbacks: Iterable[RoundCallback]) -> None:
    """Closes the callbacks that can be closed; what one raises is logged."""
    for callback in callbacks:
        try:
            getattr(callback, "close", lambda: None)()
        except Exception:
            _log.exception("the callback %s could not be closed", type(callback).__name__)
