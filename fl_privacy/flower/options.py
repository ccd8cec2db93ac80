"""What a client allows the audit, and what it lets it cost: gathered from everyone who has a say, at each call.

Mods are built when the app is imported, before a run's configuration is known, so their arguments alone cannot say.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Context

from fl_privacy.errors import InvalidInputError

CONSENTS = ("hand_over_batches", "send_estimates", "reveal_worst")
"""What may leave a client. Whoever says no has the last word, and silence is no yes."""
VETOES = ("follow_advice",)
"""What a client does unless someone says no."""
LIMITS: Mapping[str, tuple[type, float | str]] = {
    "time_limit": (float, 60.0),
    "memory_budget": (int, 1024**3),
    "max_examples": (int, 8),
    "max_bytes": (int, 256 * 1024**2),
    "device": (str, "cpu"),
}
"""What an audit may cost a client: type and default."""


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """A client's say in one call of its mod. Each option is also an environment variable and a configuration key.

    Attributes:
        votes: By consent or veto, who votes how: a place to set it, and what it says there (`None`: nothing).
        time_limit: Seconds that an audit on the client may take, and those that shaping noise on inputs may.
        memory_budget: Bytes of graph that it may keep.
        max_examples: Most examples that it audits.
        max_bytes: Most bytes of examples to keep for the audit, or to hand over.
        device: Where it computes.
    """

    votes: Mapping[str, Mapping[str, bool | None]]
    time_limit: float
    memory_budget: int
    max_examples: int
    max_bytes: int
    device: str

    @classmethod
    def gather(cls, arguments: Mapping[str, Any], context: Context) -> ClientOptions:
        """Returns what holds for a call.

        Of a limit, the first of these that is set counts: the mod's argument, the environment, the node's
        configuration, the default. Of a consent all are asked. A run's configuration is written by who starts the run:
        its yes to a consent counts for nothing, and a limit can be lowered there, not raised.

        Args:
            arguments: The mod's own, `None` for those that were not given.
            context: Of the call.

        Raises:
            InvalidInputError: A value cannot be read, or is out of range.
        """
        votes = {name: _votes(_places(name, arguments, context)) for name in (*CONSENTS, *VETOES)}
        return cls(votes=votes, **{name: _limit(name, _places(name, arguments, context)) for name in LIMITS})

    def refusal(self, consent: str, what: str) -> str:
        """Returns why a consent is not given, as it is told to the server; empty if it is given."""
        votes = self.votes[consent]
        against = [place for place, vote in votes.items() if vote is False]
        if against:
            return f"{what}: {against[0]} forbids it"
        return "" if True in votes.values() else f"{what}: nothing on this client allows it"

    def vetoed_by(self, veto: str) -> str:
        """Returns the place that says no to something that is done otherwise; empty if none does."""
        return next((place for place, vote in self.votes[veto].items() if vote is False), "")


@dataclass(frozen=True)
class _Place:
    """One place where an option can be set, and what it says there."""

    name: str
    value: Any
    may_allow: bool = True


def variable_of(name: str) -> str:
    """Returns the environment variable of an option."""
    return f"FL_PRIVACY_{name.upper()}"


def key_of(name: str) -> str:
    """Returns the key of an option in a node's or a run's configuration."""
    return f"fl-privacy-{name.replace('_', '-')}"


def _places(name: str, arguments: Mapping[str, Any], context: Context) -> tuple[_Place, ...]:
    """Returns everyone who has a say in an option, those who come first first."""
    variable, key = variable_of(name), key_of(name)
    return (
        _Place("the app", arguments.get(name)),
        _Place(f"the environment ({variable})", os.environ.get(variable)),
        _Place(f"the node's configuration ({key})", context.node_config.get(key)),
        _Place(f"the run's configuration ({key})", context.run_config.get(key), may_allow=False),
    )


def _votes(places: tuple[_Place, ...]) -> dict[str, bool | None]:
    votes: dict[str, bool | None] = {}
    for place in places:
        vote = None if place.value is None else str(place.value).strip().lower() in ("1", "true", "yes", "on")
        votes[place.name] = vote if place.may_allow or vote is False else None
    return votes


def _limit(name: str, places: tuple[_Place, ...]) -> Any:
    _, default = LIMITS[name]
    own = next((place for place in places if place.may_allow and place.value is not None), None)
    value = _read_limit(name, own or _Place("the default", default))
    for place in places:
        if place.may_allow or place.value is None:
            continue
        other = _read_limit(name, place)
        if not isinstance(other, str):
            value = min(value, other)
        elif other == default:  # no device but the one that everyone has costs a client less
            value = other
    return value


def _read_limit(name: str, place: _Place) -> Any:
    kind, _ = LIMITS[name]
    try:
        value = kind(place.value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInputError(f"expected {name} as {kind.__name__} from {place.name}, got {place.value!r}") from error
    if kind is not str and not (math.isfinite(value) and value > 0):
        raise InvalidInputError(f"expected {name} > 0 from {place.name}, got {place.value!r}")
    return value
