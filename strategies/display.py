"""What a run prints of its audit: progress, a table per round, a summary."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fl_privacy.audit.estimate import LeakageEstimate
from fl_privacy.audit.table import round_table, summary_table

_WIDTH = 120
"""Columns where the output is not a terminal."""


class RoundDisplay:
    """Prints to standard output as it is when something is printed: Flower redirects it for a run's log."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled

    @contextlib.contextmanager
    def progress(self, total: int) -> Iterator[Callable[[int, int], None]]:
        """Shows how many of a round's clients are audited; yields what is to be called as that goes on."""
        if not self._enabled or not total:
            yield lambda _done, _total: None
            return
        console = self._console()
        if not console.is_terminal:
            yield _Milestones(console)
            return
        columns = (
            TextColumn("auditing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("clients"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("audit", total=total)
            yield lambda done, _total: bar.update(task, completed=done)

    def round(self, server_round: int, rows: Sequence[LeakageEstimate]) -> None:
        """Prints the table of one round."""
        if self._enabled:
            self._print(round_table(rows, title=f"Leakage in round {server_round}"))

    def summary(self, rows: Sequence[LeakageEstimate], *, ledger: str, run_id: str, head: str) -> None:
        """Prints the summary of a run, and where its rows are."""
        if not self._enabled:
            return
        self._print(summary_table(rows, title="Leakage over all rounds"))
        if ledger:
            self._print(f"Ledger: {ledger} (run {run_id})\nIts head, to keep elsewhere: {head}")
            self._print(f"Check it with: fl-privacy verify {ledger} --head {head}")

    def _console(self) -> Console:
        return Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDTH)

    def _print(self, renderable: object) -> None:
        console = self._console()
        console.print(renderable, soft_wrap=isinstance(renderable, str))
        sys.stdout.flush()


class _Milestones:
    """Progress for a log: a line with a bar at each quarter."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown = 0

    def __call__(self, done: int, total: int) -> None:
        """Prints a line if another quarter is done."""
        quarter = 4 * done // total
        if quarter > self._shown:
            self._shown = quarter
            bar = "━" * (8 * quarter) + "╌" * (32 - 8 * quarter)
            self._console.print(f"auditing {bar} {done}/{total} clients", highlight=False)
