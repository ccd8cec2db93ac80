"""What all rounds of a client tell together: the same example shared again leaks again.

For one example with Fisher information M_t from round t, the leakage of all rounds is f(Σ_t M_t), with
f(M) = (1/D) tr M(M + 1/τ²)⁻¹. Two bounds need nothing but each round's own leakage f(M_t):

    max_t f(M_t) ≤ f(Σ_t M_t) ≤ Σ_t f(M_t),

the upper one as f(A + B) ≤ f(A) + f(B) for a concave function of positive matrices with f(0) = 0 (Rotfel'd). Noise that
an example keeps counts once: all rounds that use x + a tell no more than x + a. Between the bounds lies an estimate, as
if every round had the eigenvectors of the latest: noise that is k_t times what round t needs for the target adds 1/k_t²
of the information that meets it.
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
    """Follows a run's clients, and says what their rounds so far tell together."""

    def __init__(self) -> None:
        self._shared: dict[str, dict[bytes, _Shared]] = {}
        self._unknown: set[str] = set()

    def add(self, row: LeakageEstimate, task: AuditTask | None) -> LeakageEstimate:
        """Returns a client's row of a new round with the leakage of all rounds so far.

        Args:
            row: The round's.
            task: What was audited on the server, whose batch tells which examples were shared again; `None`: as if the
                same one were shared in every round.
        """
        if row.leakage is None or not all(map(math.isfinite, row.leakage)):
            if row.status not in _NOTHING_SHARED:
                self._unknown.add(row.client)  # something was shared, and nothing is known of it
            return row
        examples = self._shared.setdefault(row.client, {})
        for key in _ANY if task is None else _keys(task):
            _count(examples.setdefault(key, _Shared()), row)
        found = [_together(example, row) for example in examples.values()]
        lower, value, upper = (max(parts) for parts in zip(*found, strict=True))
        if row.client in self._unknown:
            value = upper = 1.0
        return replace(row, rounds_leakage=Interval(lower, value, upper))


def _count(example: _Shared, row: LeakageEstimate) -> None:
    """Adds a round, by the numbers of the client's worst audited example."""
    assert row.leakage is not None
    example.least = max(example.least, row.leakage.lower)
    if row.input_noise_kept and row.input_noise_leakage is not None and row.action != "perturbed":
        example.kept += row.leakage.upper
        example.law = max(example.law, row.input_noise_leakage)
        return
    example.fresh += row.leakage.upper
    needed, curve = row.required_noise_std, row.curve
    there = 0.0 if curve is None else curve.noise_std_at(row.leakage.upper)
    known = needed is not None and 0 < needed < math.inf and there > 0
    example.information += (needed / there) ** 2 if known and needed is not None else math.inf


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
