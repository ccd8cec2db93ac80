"""What a report is made from: a run's rows, reduced as they are read to what a page has room for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from fl_privacy.audit.chain import Verification
from fl_privacy.audit.estimate import LeakageEstimate, Source, Status
from fl_privacy.audit.ledger import Ledger, LedgerRecord, Run
from fl_privacy.audit.metrics import RoundMetrics
from fl_privacy.audit.wording import natural_key
from fl_privacy.errors import InvalidInputError, LedgerError
from fl_privacy.interval import Interval

DEFAULT_TARGET = 0.5
"""Leakage that counts as too much where no row names a target."""
MAX_ROWS = 1000
"""Most rows of a run that are kept one by one."""


class Cell(NamedTuple):
    """One client in one round, as the heat map and the lines over rounds need it."""

    status: Status
    leakage: Interval[float] | None
    """`None` where nothing is known: no estimate, or one that is not a number."""
    noise_std: float | None
    target: float
    """Of the round, so that a change of the target rewrites no history."""

    @property
    def above(self) -> bool | None:
        """Whether the leakage may be above the target: its upper end is; `None` if nothing is known."""
        return None if self.leakage is None else not self.leakage.upper <= self.target


class Outcome(NamedTuple):
    """What became of a client in a round, as far as every round's is kept."""

    status: Status
    source: Source
    action: str
    claim_fails: bool
    """Whether the update lacks the defence that was claimed or expected."""

    @classmethod
    def of(cls, row: LeakageEstimate) -> Outcome:
        """Returns the outcome of a row."""
        return cls(row.status, row.source, row.action, row.claim_holds is False)


@dataclass
class ClientHistory:
    """One client over the rounds of a run.

    Attributes:
        name: As the rows have it: text from a client, not to be trusted.
        cells: By round.
        last: The row of its last round, without what is read for `measured` only.
        measured: The row of its last round with an estimate, with its curve, examples, settings and versions.
        outcomes: The rounds of each outcome, one entry for each row.
    """

    name: str
    cells: dict[int, Cell] = field(default_factory=dict)
    last: LeakageEstimate | None = None
    measured: LeakageEstimate | None = None
    outcomes: dict[Outcome, list[int]] = field(default_factory=dict)

    @property
    def statuses(self) -> Counter[Status]:
        """How often which."""
        counts: Counter[Status] = Counter()
        for outcome, rounds in self.outcomes.items():
            counts[outcome.status] += len(rounds)
        return counts

    @property
    def known(self) -> Cell | None:
        """Its last round with an estimate, `None` if there is none."""
        return None if self.measured is None else self.cells[self.measured.server_round]

    def add(self, row: LeakageEstimate) -> None:
        """Takes in the row of another round."""
        known = row.leakage if row.leakage is not None and all(map(math.isfinite, row.leakage)) else None
        target = DEFAULT_TARGET if row.target_leakage is None else row.target_leakage
        self.cells[row.server_round] = Cell(row.status, known, row.required_noise_std, target)
        self.outcomes.setdefault(Outcome.of(row), []).append(row.server_round)
        if self.last is None or row.server_round >= self.last.server_round:
            self.last = row
        if known and (self.measured is None or row.server_round >= self.measured.server_round):
            self.measured = row

    def above_since(self, server_round: int) -> int | None:
        """Returns the first round of the unbroken stretch above target up to a round; `None` if it is not above.

        A round in which nothing is known does not break it, as it shows nothing that was better.
        """
        since = None
        for number in sorted((r for r in self.cells if r <= server_round), reverse=True):
            above = self.cells[number].above
            if above is False:
                return since
            since = number if above else since
        return since


class Change(NamedTuple):
    """What became of clients from the round before to this one, names in natural order."""

    rose: tuple[str, ...]
    """Above target now, and known to be below before."""
    fell: tuple[str, ...]
    lost: tuple[str, ...]
    """Known before, and not now."""
    joined: tuple[str, ...]
    """Not asked in the round before."""


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """A run of a ledger.

    Attributes:
        run_id: Its name.
        rounds: Round numbers, ascending.
        clients: Every client; the most exposed first, by its last round with an estimate, and last those that never
            had one.
        metrics: The global model's.
        sources: Rows by source.
        statuses: Rows by status.
        rows: Number of rows.
        every_row: Every row of the run, in order and without curve and examples; empty if there are more than
            `MAX_ROWS`.
        written: When the first and when the last row was written.
    """

    run_id: str
    rounds: tuple[int, ...]
    clients: tuple[ClientHistory, ...]
    metrics: tuple[RoundMetrics, ...]
    sources: Counter[Source]
    statuses: Counter[Status]
    rows: int
    written: tuple[str, str]
    every_row: tuple[LeakageEstimate, ...] = ()

    @property
    def last_round(self) -> int:
        """The round that the headline is about."""
        return self.rounds[-1]

    @property
    def target(self) -> float:
        """The target of the last round."""
        return next((c.target for c in self.cells_of(self.last_round).values() if c.leakage), DEFAULT_TARGET)

    def cells_of(self, server_round: int) -> dict[str, Cell]:
        """Returns the clients of a round."""
        return {c.name: c.cells[server_round] for c in self.clients if server_round in c.cells}

    def worst(self) -> ClientHistory | None:
        """Returns who may leak most in the last round, of equals who needs more noise; `None` if nothing is known."""
        known = [c for c in self.clients if self.last_round in c.cells and c.cells[self.last_round].leakage]
        return max(known, key=lambda c: _exposure(c.cells[self.last_round]), default=None)

    def neediest(self) -> ClientHistory | None:
        """Returns who of those above their own targets in the last round may leak most; if none, the worst."""
        above = [c for c in self.clients if self.last_round in c.cells and c.cells[self.last_round].above]
        return max(above, key=lambda c: _exposure(c.cells[self.last_round]), default=self.worst())

    def change(self) -> Change | None:
        """Returns what changed since the round before; `None` in the first round."""
        if len(self.rounds) < 2:
            return None
        before, now = self.cells_of(self.rounds[-2]), self.cells_of(self.last_round)
        both = sorted(now.keys() & before.keys(), key=natural_key)
        return Change(
            rose=tuple(name for name in both if now[name].above and before[name].above is False),
            fell=tuple(name for name in both if now[name].above is False and before[name].above),
            lost=tuple(name for name in both if now[name].leakage is None and before[name].leakage is not None),
            joined=tuple(sorted(now.keys() - before.keys(), key=natural_key)),
        )

    def accuracy(self) -> dict[str, dict[int, float]]:
        """Returns accuracy by round of who measured it; empty where no round has a metric of that name."""
        found: dict[str, dict[int, float]] = {}
        for entry in self.metrics:
            name = next((name for name in sorted(entry.metrics) if "acc" in name.lower()), None)
            if name is not None and 0 <= entry.metrics[name] <= 1:
                found.setdefault(entry.origin, {})[entry.server_round] = entry.metrics[name]
        return found


def read_history(ledger: Ledger, *, run_id: str | None = None) -> RunHistory:
    """Returns what a ledger holds of a run, by default of the last one that began.

    Args:
        ledger: Opened to read.
        run_id: Name of the run.

    Raises:
        InvalidInputError: The ledger holds no such run, or none at all.
        LedgerError: The ledger cannot be read.
    """
    return read_checked_history(ledger, run_id=run_id)[0]


def read_checked_history(
    ledger: Ledger,
    *,
    run_id: str | None = None,
    expected_head: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[RunHistory, Verification]:
    """Returns what a ledger holds of a run, and the check of the whole ledger, for which every row is read once.

    Args:
        ledger: Opened to read.
        run_id: Name of the run. `None`: the last one that began.
        expected_head: See `Ledger.verify`.
        progress: Is told (rows read, rows there are).

    Raises:
        InvalidInputError: The ledger holds no such run, or none at all.
        ValueError: If `expected_head` is not a hash.
        LedgerError: The ledger cannot be read.
    """
    runs = {run.run_id: run for run in ledger.runs()}
    if not runs or (run_id is not None and run_id not in runs):
        raise InvalidInputError(f"the ledger holds no run {run_id or ''!r}, but {', '.join(runs) or 'none at all'}")
    reading = _Reading(runs[run_id] if run_id is not None else list(runs.values())[-1])
    verification = ledger.verify(expected_head=expected_head, visit=reading.add, progress=progress)
    if not reading.rows:
        raise LedgerError("; ".join(map(str, verification.problems)) or f"run {reading.run.run_id} has lost its rows")
    return reading.finish(tuple(ledger.metrics(run_id=reading.run.run_id))), verification


class _Reading:
    """A run as it is read: of most rows only what a cell needs is looked at."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rows = 0
        self._clients: dict[str, ClientHistory] = {}
        self._measured: dict[str, LedgerRecord] = {}
        self._every_row: list[LeakageEstimate] = []
        self._rounds: set[int] = set()
        self._sources: Counter[Source] = Counter()

    def add(self, record: LedgerRecord) -> None:
        """Takes in the next row of the ledger."""
        if record.run_id != self.run.run_id:
            return
        row = record.estimate(light=True)
        client = self._clients.setdefault(row.client, ClientHistory(row.client))
        client.add(row)
        if client.measured is row:
            self._measured[row.client] = record
        self.rows += 1
        self._rounds.add(row.server_round)
        self._sources[row.source] += 1
        if self.rows <= MAX_ROWS:
            self._every_row.append(row)

    def finish(self, metrics: tuple[RoundMetrics, ...]) -> RunHistory:
        """Returns the run, the rows that the page looks into read in full."""
        statuses: Counter[Status] = Counter()
        for name, client in self._clients.items():
            statuses.update(client.statuses)
            if name in self._measured:
                client.measured = self._measured[name].estimate()
        return RunHistory(
            run_id=self.run.run_id,
            rounds=tuple(sorted(self._rounds)),
            clients=_ranked(self._clients.values()),
            metrics=metrics,
            sources=self._sources,
            statuses=statuses,
            rows=self.rows,
            written=(self.run.started, self.run.ended),
            every_row=tuple(self._every_row) if self.rows <= MAX_ROWS else (),
        )


def _ranked(clients: Iterable[ClientHistory]) -> tuple[ClientHistory, ...]:
    named = sorted(clients, key=lambda client: natural_key(client.name))
    return tuple(sorted(named, key=lambda client: _exposure(client.known), reverse=True))


def _exposure(cell: Cell | None) -> tuple[float, float, float]:
    """Returns what to rank by: the upper end of the leakage, its middle, then the noise that is needed."""
    if cell is None or cell.leakage is None:
        return (-1.0, -1.0, 0.0)
    noise = cell.noise_std if cell.noise_std is not None and math.isfinite(cell.noise_std) else 0.0
    return (cell.leakage.upper, cell.leakage.value, noise)
