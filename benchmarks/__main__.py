"""Command line of the benchmarks: runs them and prints one table."""

from __future__ import annotations

import sys
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.measures import MEASURES, Measurement
from fl_privacy.allocation import keep_freed_memory


def main(
    quick: Annotated[bool, typer.Option(help="Fewer repeats: a smoke test rather than a measurement.")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"Run this one alone: {', '.join(MEASURES)}.")] = None,
) -> None:
    """Measure the engine; exits with 1 where a target is missed."""
    chosen = only or list(MEASURES)
    unknown = [name for name in chosen if name not in MEASURES]
    if unknown:
        raise typer.BadParameter(f"expected one of {', '.join(MEASURES)}, got {', '.join(unknown)}")
    keep_freed_memory()
    console = Console(width=None if sys.stdout.isatty() else 120)
    results: dict[str, Measurement] = {}
    with console.status("") as status:
        for name in chosen:
            status.update(f"measuring {name}")
            results[name] = MEASURES[name](quick)
    console.print(table(results))
    if not all(result.met for result in results.values()):
        raise typer.Exit(1)


def table(results: dict[str, Measurement]) -> Table:
    """Returns the table of results; times are medians, the ratio is the median of the repeats' ratios."""
    title = (
        f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads, float32, memory kept as audit workers do"
    )
    grid = Table(title=title, show_lines=True)
    for heading in ("ratio of", "first", "second", "ratio", "target", "repeats", "note"):
        grid.add_column(heading, overflow="fold", justify="left" if heading in ("ratio of", "note") else "right")
    for name, result in results.items():
        ratio, sign = result.ratio, "≤" if result.at_most else "≥"
        grid.add_row(
            f"[bold]{name}[/bold]\n{MEASURES[name].__doc__}",
            _time(ratio.first),
            _time(ratio.second),
            f"[{'green' if result.met else 'red'}]{ratio.value:.3g}[/]",
            f"{sign} {result.target:g}",
            str(ratio.repeats),
            result.note,
        )
    return grid


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


if __name__ == "__main__":
    typer.run(main)
