"""What commands that take a while print on the way, and at their end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fl_privacy.errors import FLPrivacyError

UNUSABLE = 2
"""Exit code of a command that cannot be used as it was."""
_PIPED_WIDTH = 120


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what is to be told (rows done, rows to do); the bar is on stderr."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns what a user can put right into one line and exit code 2."""
    try:
        yield
    except (FLPrivacyError, ValueError, OSError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(UNUSABLE) from error


def result_console() -> Console:
    """Returns the console for results; piped, its width is fixed."""
    return Console(width=None if Console().is_terminal else _PIPED_WIDTH)


def print_json(value: Mapping[str, Any] | list[Any]) -> None:
    """Prints a result as strict JSON, in which a number that is not finite is null."""
    typer.echo(json.dumps(_strict(value), allow_nan=False))


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _strict(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
