"""Tables of leakage estimates for a terminal: one per round, and a summary over the rounds of a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.table import Table
from rich.text import Text

from fl_privacy.audit.estimate import LeakageEstimate, Status
from fl_privacy.audit.wording import (
    ABSENT,
    about_text,
    at_most_text,
    leakage_text,
    natural_key,
    number_text,
    plain,
    rounded_up,
    shortened,
)
from fl_privacy.interval import Interval

_HIGH, _SOME = 0.5, 0.1
"""Leakage above which a row is red, and above which it is yellow."""
_NOTE_LENGTH, _MAX_NOTES, _MAX_NAMES = 160, 12, 6


def round_table(estimates: Iterable[LeakageEstimate], *, title: str | None = None) -> Table:
    """Returns the table of one round: a row per client, and under it what the rows without an estimate have to say.

    Fits into 120 columns. The bounds of a leakage are rounded outwards, so the printed interval still holds. Text that
    came from a client is printed without control characters, which could rewrite the terminal it is shown on.

    Args:
        estimates: The rows of the round; printed in natural order of the clients' names.
        title: What to print above the table.
    """
    rows = sorted(estimates, key=lambda row: natural_key(row.client))
    table = _table(title)
    table.add_column("client", overflow="fold", max_width=22)
    table.add_column("examples", justify="right", no_wrap=True)
    table.add_column("defence", overflow="fold", max_width=24)
    table.add_column("leakage", justify="right", no_wrap=True)
    table.add_column("rmse", justify="right", no_wrap=True)
    table.add_column("PSNR dB", justify="right", no_wrap=True)
    table.add_column("worst\n(class)", justify="right", no_wrap=True)
    table.add_column(_noise_heading(rows), justify="right", no_wrap=True)
    acted = _Acted(rows)
    acted.add_columns(table)
    table.add_column("status")
    for row in rows:
        excluded = "" if row.action == "passed" else f", {row.action}"
        table.add_row(
            Text(plain(row.client)),
            ABSENT if row.num_examples is None else str(row.num_examples),
            Text(plain(row.defence) or ABSENT),
            Text(about_text(row) + leakage_text(row.leakage), style=_leakage_style(row.leakage)),
            number_text(row.rmse),
            ABSENT if row.psnr is None else f"{row.psnr:.1f}",
            _worst_example(row),
            about_text(row) + number_text(row.required_noise_std),
            *acted.cells(row),
            Text(plain(f"{row.status}{excluded}"), style=_status_style(row.status)),
        )
    table.caption = _notes(rows)
    return table


def summary_table(estimates: Iterable[LeakageEstimate], *, title: str | None = None) -> Table:
    """Returns the table of a run: per client its worst and its last leakage, the noise it needs, and its statuses.

    A client of which some rounds have no estimate shows so in its statuses: `audited 2, no-reply 1`. The noise is the
    largest that any of its rounds needed.

    Args:
        estimates: The rows of every round, in any order; read once.
        title: What to print above the table.
    """
    clients: dict[str, _History] = {}
    for row in estimates:
        clients.setdefault(row.client, _History()).add(row)
    histories = sorted(clients.items(), key=lambda item: natural_key(item[0]))
    table = _table(title)
    table.add_column("client", overflow="fold", max_width=22)
    table.add_column("rounds", justify="right", no_wrap=True)
    table.add_column("worst leakage", justify="right", no_wrap=True)
    table.add_column("in\nround", justify="right", no_wrap=True)
    table.add_column("last leakage", justify="right", no_wrap=True)
    together = any(history.last and history.last.rounds_leakage for _, history in histories)
    if together:
        table.add_column("in all\nrounds", justify="right", no_wrap=True)
    table.add_column(
        _noise_heading([history.neediest for _, history in histories if history.neediest]),
        justify="right",
        no_wrap=True,
    )
    acted = _Acted([history.last for _, history in histories if history.last], together=together)
    acted.add_columns(table)
    private = [history.last.delta for _, history in histories if history.last and history.last.delta is not None]
    if private:
        table.add_column(f"ε (δ {private[0]:g})", justify="right", no_wrap=True)
    table.add_column("statuses")
    for client, history in histories:
        worst, last = history.worst, history.last
        statuses = ", ".join(f"{status} {count}" for status, count in history.statuses.items())
        table.add_row(
            Text(plain(client)),
            str(len(history.rounds)),
            _leakage_cell(worst),
            str(worst.server_round) if worst else ABSENT,
            _leakage_cell(last),
            *([_together_cell(last)] if together else []),
            about_text(history.neediest)
            + number_text(history.neediest.required_noise_std if history.neediest else None),
            *acted.cells(last),
            *([number_text(last.epsilon if last else None)] if private else []),
            Text(statuses, style="" if all(status.has_estimate for status in history.statuses) else "yellow"),
        )
    return table


@dataclass
class _History:
    """What a summary keeps of one client's rows."""

    rounds: set[int] = field(default_factory=set)
    statuses: Counter[Status] = field(default_factory=Counter)
    worst: LeakageEstimate | None = None
    last: LeakageEstimate | None = None
    neediest: LeakageEstimate | None = None

    def add(self, row: LeakageEstimate) -> None:
        self.rounds.add(row.server_round)
        self.statuses[row.status] += 1
        if row.leakage is not None:
            if self.worst is None or _size(row.leakage.value) > _size(_value(self.worst)):
                self.worst = row
            if self.last is None or row.server_round >= self.last.server_round:
                self.last = row
        noise = row.required_noise_std
        if noise is not None and (
            self.neediest is None or _size(noise) > _size(self.neediest.required_noise_std or 0.0)
        ):
            self.neediest = row


class _Acted:
    """Columns that say what was done about a leakage; only where something was.

    Args:
        rows: All rows of the table.
        together: Whether to say beside what was passed on in a round what all rounds so far tell together.
    """

    def __init__(self, rows: Sequence[LeakageEstimate], *, together: bool = False) -> None:
        self._noise = any(row.applied_noise_std is not None for row in rows)
        self._passed = any(row.action == "perturbed" for row in rows)
        self._together = together

    def add_columns(self, table: Table) -> None:
        if self._noise:
            table.add_column("noise\nput on", justify="right", no_wrap=True)
        if self._passed:
            heading = "passed on:\nlast, all" if self._together else "leakage\npassed on"
            table.add_column(heading, justify="right", no_wrap=True)

    def cells(self, row: LeakageEstimate | None) -> list[str]:
        cells = [number_text(row.applied_noise_std if row else None)] if self._noise else []
        if not self._passed:
            return cells
        limit = ABSENT if row is None or row.passed_leakage is None else f"≤ {rounded_up(row.passed_leakage)}"
        if self._together and row is not None and row.rounds_passed_leakage is not None:
            limit += f", {rounded_up(row.rounds_passed_leakage.upper)}"
        return [*cells, limit]


def _table(title: str | None) -> Table:
    return Table(
        title=None if title is None else Text(plain(title), style="bold"),
        title_justify="left",
        caption_justify="left",
        caption_style="",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )


def _noise_heading(rows: Sequence[LeakageEstimate]) -> str:
    targets = {row.target_leakage for row in rows if row.target_leakage is not None}
    return f"noise needed\nfor {targets.pop():g}" if len(targets) == 1 else "noise needed"


def _value(row: LeakageEstimate) -> float:
    return math.nan if row.leakage is None else row.leakage.value


def _size(value: float) -> float:
    """Returns `value` as it is to be compared: what is not known (NaN) counts as the worst."""
    return math.inf if math.isnan(value) else value


def _leakage_cell(row: LeakageEstimate | None) -> Text:
    interval = None if row is None else row.leakage
    return Text(about_text(row) + leakage_text(interval), style=_leakage_style(interval))


def _together_cell(row: LeakageEstimate | None) -> Text:
    interval = None if row is None else row.rounds_leakage
    return Text(at_most_text(interval), style=_leakage_style(interval))


def _leakage_style(interval: Interval[float] | None) -> str:
    if interval is None:
        return ""
    size = _size(interval.value)
    return "bold red" if size > _HIGH else "yellow" if size > _SOME else "green"


def _status_style(status: Status) -> str:
    return "" if status is Status.AUDITED else "yellow" if status.has_estimate else "bold red"


def _worst_example(row: LeakageEstimate) -> str:
    """Returns `17 (2)`: the example that leaks most, among those of the round, and its class."""
    if row.worst_example is None:
        return ABSENT
    return f"{row.worst_example}" if row.worst_label is None else f"{row.worst_example} ({row.worst_label})"


def _notes(rows: Sequence[LeakageEstimate]) -> Text | None:
    """Returns the details, each once with the clients it holds for."""
    clients: dict[str, list[str]] = {}
    for row in rows:
        if row.detail:
            note = f"{row.status}: {shortened(plain(row.detail), _NOTE_LENGTH)}"
            clients.setdefault(note, []).append(shortened(plain(row.client), 22))
    lines = []
    for note, names in list(clients.items())[:_MAX_NOTES]:
        more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
        lines.append(f"{', '.join(names[:_MAX_NAMES])}{more}: {note}")
    if len(clients) > _MAX_NOTES:
        lines.append(f"and {len(clients) - _MAX_NOTES} further notes, which the ledger holds in full")
    return Text("\n".join(lines)) if lines else None
