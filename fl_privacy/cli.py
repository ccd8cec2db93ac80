"""The command line: `verify` checks a ledger, `show` prints it, `validate` and `study` check predictions."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from fl_privacy.allocation import keep_freed_memory
from fl_privacy.audit.chain import Verification
from fl_privacy.audit.ledger import Ledger, LedgerEntry
from fl_privacy.audit.table import round_table
from fl_privacy.commands.audit import audit
from fl_privacy.commands.compare_inits import compare_inits
from fl_privacy.commands.init import init
from fl_privacy.commands.options import LedgerArgument
from fl_privacy.commands.picture import picture
from fl_privacy.commands.rehearse import rehearse
from fl_privacy.commands.report import report
from fl_privacy.commands.study import study
from fl_privacy.commands.validate import validate
from fl_privacy.errors import LedgerError

OK, TAMPERED, UNUSABLE = 0, 1, 2
"""Exit codes: all is well; verify found a problem; the command or the ledger cannot be used."""

_MAX_PROBLEMS = 20
_PIPED_WIDTH = 120
"""Columns of a table whose width no terminal dictates."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Audit what updates give away, read the ledger of an audit, and check the numbers against real attacks.",
    epilog="Exit codes: 0 all is well, 1 a finding (tampering, too much leakage), 2 wrong usage or nothing usable.",
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fl-privacy {version('fl-privacy')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Documents the options that stand before a command; each acts in its own callback."""
    keep_freed_memory()


@app.command(epilog="Exit codes: 0 untouched, 1 tampered with, 2 wrong usage or no usable ledger.")
def verify(
    ledger: LedgerArgument,
    head: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="A head noted earlier and kept elsewhere, which the ledger must still hold."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find any row of LEDGER (a SQLite file or a database URL) that was changed, removed, inserted or moved.

    Without --head, someone who rewrote the whole ledger, its head included, is not found.
    """
    with _opened(ledger) as opened:
        try:
            outcome = opened.verify(expected_head=head)
        except ValueError as error:
            _fail(f"--head: {error}")
    if as_json:
        typer.echo(json.dumps({"ok": outcome.ok, **asdict(outcome)}, allow_nan=False))
    else:
        _print_outcome(outcome)
    raise typer.Exit(OK if outcome.ok else TAMPERED)


@app.command(epilog="Exit codes: 0 printed, 2 wrong usage or no usable ledger. Hashes are not checked: see verify.")
def show(
    ledger: LedgerArgument,
    run: Annotated[str | None, typer.Option(metavar="ID", help="Only this run.")] = None,
    server_round: Annotated[int | None, typer.Option("--round", metavar="N", help="Only this round.")] = None,
    client: Annotated[str | None, typer.Option(metavar="NAME", help="Only this client.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the estimates in LEDGER (a SQLite file or a database URL), a table per round.

    With --json, one object per line with every field.
    """
    with _opened(ledger) as opened:
        if run is not None and run not in (known := [entry.run_id for entry in opened.runs()]):
            _fail(f"--run: the ledger holds no run {run!r}, but {', '.join(known) or 'none at all'}")
        entries = opened.rows(run_id=run, server_round=server_round, client=client)
        shown = _print_json(entries) if as_json else _print_rounds(entries)
    if not shown:
        typer.echo("no rows match", err=True)


app.command(epilog="Exit codes: 0 written, 2 the folder cannot be used; nothing is ever overwritten.")(init)
app.command(epilog="Exit codes: 0 audited, 1 leakage may be above --fail-above, 2 wrong usage or nothing to audit.")(
    audit
)
app.command(epilog="Exit codes: 0 written, 1 written, but the ledger was tampered with, 2 nothing written.")(report)
app.command(epilog="Exit codes: 0 done, 2 wrong usage or missing data.")(validate)
app.command(epilog="Exit codes: 0 drawn, 2 wrong usage or missing data.")(picture)
app.command(name="compare-inits", epilog="Exit codes: 0 done, 2 wrong usage or missing data.")(compare_inits)
app.command(epilog="Exit codes: 0 done, 2 wrong usage or missing data.")(rehearse)
app.add_typer(study, name="study")


def main() -> None:
    """Runs the command line and exits with its code."""
    app()


@contextmanager
def _opened(url: str) -> Iterator[Ledger]:
    """Yields the ledger to read; what cannot be read of it ends the command with one line and exit code 2."""
    try:
        with Ledger.open(url) as ledger:
            yield ledger
    except LedgerError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(UNUSABLE)


def _print_outcome(outcome: Verification) -> None:
    if outcome.ok:
        anchor = (
            "" if outcome.anchored is None else f", up to row {outcome.anchored} as they were when the head was noted"
        )
        typer.echo(f"ok: {outcome.rows} rows, none changed, removed, inserted or moved{anchor}")
        typer.echo(f"head: {outcome.head}")
        return
    count = len(outcome.problems)
    typer.echo(f"TAMPERED: {count} problem{'' if count == 1 else 's'} in {outcome.rows} rows")
    for problem in outcome.problems[:_MAX_PROBLEMS]:
        typer.echo(f"  {problem}")
    if len(outcome.problems) > _MAX_PROBLEMS:
        typer.echo(f"  and {len(outcome.problems) - _MAX_PROBLEMS} more: --json lists them all")


def _print_json(entries: Iterable[LedgerEntry]) -> int:
    shown = 0
    for entry in entries:
        row = {
            "sequence": entry.sequence,
            "run_id": entry.run_id,
            "written_at": entry.written_at,
            "previous_hash": entry.previous_hash,
            "hash": entry.hash,
            "estimate": entry.estimate.to_dict(),
        }
        typer.echo(json.dumps(row, allow_nan=False))
        shown += 1
    return shown


def _print_rounds(entries: Iterable[LedgerEntry]) -> int:
    """Prints a table for each stretch of rows of one round: a round is written at once, so its rows are neighbours."""
    console = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    shown = 0
    for (run_id, server_round), rows in itertools.groupby(
        entries, key=lambda entry: (entry.run_id, entry.estimate.server_round)
    ):
        estimates = [entry.estimate for entry in rows]
        if shown:
            console.print()  # a table ignores what `end` says
        console.print(round_table(estimates, title=f"run {run_id}, round {server_round}"))
        shown += len(estimates)
    return shown
