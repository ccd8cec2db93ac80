"""What all rounds of a client tell together: the same example shared again leaks again.

For one example with Fisher information M_t from round t, the leakage of all rounds is f(Σ_t M_t), with
f(M) = (1/D) tr M(M + 1/τ²)⁻¹. Two bounds need nothing but each round's own leakage f(M_t):

    max_t f(M_t) ≤ f(Σ_t M_t) ≤ Σ_t f(M_t),

the upper one as f(A + B) ≤ f(A) + f(B) for a concave function of positive matrices with f(0) = 0 (Rotfel'd). Noise that
an example keeps counts once: all rounds that use x + a tell no more than x + a. Between the bounds lies an estimate, as
if every round had the eigenvectors of the latest: noise that is k_t times what round t needs for the target adds 1/k_t²
of the information that meets it.

The same is said of what the server passed on, where it put noise on what arrived, or left it out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fl_privacy.audit.estimate import LeakageEstimate, Status
from fl_privacy.audit.task import AuditTask, example_key
from fl_privacy.interval import Interval

_NOTHING_SHARED = frozenset({Status.NO_REPLY, Status.CLIENT_ERROR})
_ANY = (b"",)
"""The one example that a client is taken to have where its examples are not known: every round shares it."""


@dataclass
class _Shared:
    """What is known of one example that a client shared in some rounds."""

    least: float = 0.0
    fresh: float = 0.0
    information: float = 0.0
    kept: float = 0.0
    law: float = 0.0

    @property
    def by_noise_kept(self) -> float:
        """Upper bound for the rounds in which the example had its own noise."""
        return min(self.kept, self.law)

    @property
    def upper(self) -> float:
        return min(1.0, self.fresh + self.by_noise_kept)


class RoundsTogether:
    """Follows a run's clients, and says what their rounds so far tell together: as they arrived, and as passed on."""

    def __init__(self) -> None:
        self._arrived, self._passed = _Stream(), _Stream()

    def add(
        self, row: LeakageEstimate, task: AuditTask | None, *, arrived: LeakageEstimate | None = None
    ) -> LeakageEstimate:
        """Returns a client's row of a new round with the leakage of all rounds so far.

        Args:
            row: The round's, with what was done to the update.
            task: What was audited on the server, whose batch tells which examples were shared again; `None`: as if the
                same one were shared in every round.
            arrived: The row before anything was done to it; `None`: nothing was.
        """
        arrived = row if arrived is None else arrived
        keys = _ANY if task is None else _keys(task)
        return replace(
            row,
            rounds_leakage=self._arrived.add(_as_arrived(arrived), keys),
            rounds_passed_leakage=self._passed.add(_as_passed(arrived, row), keys),
        )


@dataclass(frozen=True)
class _Share:
    """A round's update, as somebody sees it.

    Attributes:
        row: The round's.
        leakage: Of the update; `None`: something was shared, and nothing is known of it.
        noise_std: σ of isotropic noise that leaves as much; 0 where that is not known.
        law: What x + a tells, where the noise on the inputs is kept; `None` where none is.
        nothing: Whether there was none.
    """

    row: LeakageEstimate
    leakage: Interval[float] | None
    noise_std: float = 0.0
    law: float | None = None
    nothing: bool = False


def _as_arrived(row: LeakageEstimate) -> _Share:
    if row.leakage is None or not all(map(math.isfinite, row.leakage)):
        return _Share(row, None, nothing=row.status in _NOTHING_SHARED)
    noise_std = 0.0 if row.curve is None else row.curve.noise_std_at(row.leakage.upper)
    return _Share(row, row.leakage, noise_std, row.input_noise_leakage if row.input_noise_kept else None)


def _as_passed(arrived: LeakageEstimate, row: LeakageEstimate) -> _Share:
    """Returns what was left of an update when the server had done what the row says."""
    share = _as_arrived(arrived)
    if row.action == "excluded":
        return replace(share, leakage=None, nothing=True)
    limit, reached = row.passed_leakage, share.leakage
    if row.action != "perturbed" or reached is None or limit is None:
        return share
    if (row.input_noise, row.input_noise_rms) != (arrived.input_noise, arrived.input_noise_rms):
        left = Interval(*(min(bound, limit) for bound in reached))
        noise_std = 0.0 if row.curve is None else row.curve.noise_std_at(left.upper)
        return _Share(row, left, noise_std, row.input_noise_leakage if row.input_noise_kept else None)
    if not row.verified or row.curve is None or row.applied_noise_std is None or row.epsilon is not None:
        return replace(share, leakage=Interval(min(reached.lower, limit), min(reached.value, limit), limit))
    noise_std = math.hypot(share.noise_std, row.applied_noise_std)
    there = row.curve.bounds_at(noise_std)
    upper = min(reached.upper, limit, there.upper)
    # For the lower bound the client's own noise is taken for the most that it can be.
    most = math.hypot(row.curve.most_noise_std_at(reached.lower), row.applied_noise_std)
    lower = min(reached.lower, row.curve.bounds_at(most).lower, upper)
    value = min(max(there.value, lower), upper)
    return replace(share, leakage=Interval(lower, value, upper), noise_std=noise_std)


class _Stream:
    """What is seen of the clients, round by round, at one place."""

    def __init__(self) -> None:
        self._shared: dict[str, dict[bytes, _Shared]] = {}
        self._unknown: set[str] = set()

    def add(self, share: _Share, keys: Iterable[bytes]) -> Interval[float] | None:
        """Returns what all rounds so far tell together; `None` while there is none of which anything is known."""
        client = share.row.client
        if share.leakage is None and not share.nothing:
            self._unknown.add(client)
        if share.leakage is None and not (share.row.leakage is not None and client in self._shared):
            return None
        examples = self._shared.setdefault(client, {})
        for key in keys if share.leakage is not None else ():
            _count(examples.setdefault(key, _Shared()), share)
        found = [_together(example, share.row) for example in examples.values()]
        lower, value, upper = (max(parts) for parts in zip(*found, strict=True))
        if client in self._unknown:
            value = upper = 1.0
        return Interval(lower, value, upper)


def _count(example: _Shared, share: _Share) -> None:
    """Adds a round, by the numbers of the client's worst audited example."""
    leakage, needed = share.leakage, share.row.required_noise_std
    assert leakage is not None
    example.least = max(example.least, leakage.lower)
    if share.law is not None:
        example.kept += leakage.upper
        example.law = max(example.law, share.law)
        return
    example.fresh += leakage.upper
    known = needed is not None and 0 < needed < math.inf and share.noise_std > 0
    example.information += (needed / share.noise_std) ** 2 if known and needed is not None else math.inf


def _together(example: _Shared, row: LeakageEstimate) -> Interval[float]:
    """Returns the leakage of all rounds that shared an example."""
    upper, value = example.upper, example.by_noise_kept
    if example.fresh > 0:
        needed = row.required_noise_std
        if row.curve is None or not needed or not 0 < example.information < math.inf:
            return Interval(min(example.least, upper), upper, upper)
        value += row.curve.leakage_at(needed / math.sqrt(example.information))
    lower = min(example.least, upper)
    return Interval(lower, min(max(value, lower), upper), upper)


def _keys(task: AuditTask) -> Iterable[bytes]:
    return {example_key(example) for example in task.inputs}
