"""What a study consists of, and how one is conducted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fl_privacy.extras import require
from fl_privacy.studies.results import Portion, Progress, R, fill
from fl_privacy.studies.settings import Settings, claim_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

S = TypeVar("S", bound=Settings)

BEATEN = 0.8
"""An attack beats a prediction when its error is below this share of the predicted error's lower end."""
FEWEST_RANKED = 3
"""Runs, below which a rank correlation says nothing."""


@dataclass(frozen=True)
class Summary:
    """What a study found, for people.

    Attributes:
        sentence: The finding.
        headings: Of a table.
        lines: Of the table, one cell per heading.
    """

    sentence: str
    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Returns the table and the sentence as Markdown."""
        rows = [self.headings, ("---",) * len(self.headings), *self.lines]
        table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
        return f"{table}\n\n{self.sentence}\n"


@dataclass(frozen=True, kw_only=True)
class Study(Generic[S, R]):
    """An experiment that anybody can repeat.

    Attributes:
        name: As in `fl-privacy study NAME`.
        settings: Their class.
        row: The class of its results, a flat dataclass of int, float, str and bool.
        key: Names of the fields by which a row is known among all rows.
        portions: What there is to compute. Settings that its data cannot serve are refused here.
        summarize: What the rows say.
        draw: Draws the rows into an empty figure.
        figure_size: Width and height in inches.
    """

    name: str
    settings: type[S]
    row: type[R]
    key: tuple[str, ...]
    portions: Callable[[S], Iterable[Portion[R]]]
    summarize: Callable[[S, Sequence[R]], Summary]
    draw: Callable[[S, Sequence[R], Figure], None]
    figure_size: tuple[float, float] = (6.4, 4.8)


def grouped(rows: Iterable[R], name: Callable[[R], str]) -> dict[str, list[R]]:
    """Returns rows by a name of theirs, in the order in which names first occur."""
    groups: dict[str, list[R]] = {}
    for row in rows:
        groups.setdefault(name(row), []).append(row)
    return groups


def spread_text(values: Sequence[float], form: str = ".3g") -> str:
    """Returns `median [least, most]`, each in a format."""
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns Spearman's rank correlation; NaN where one of them does not vary."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return math.nan
    return float(require("scipy.stats").spearmanr(first, second).statistic)


def conduct(study: Study[S, Any], settings: S, folder: Path, *, progress: Progress | None = None) -> list[Any]:
    """Returns a study's rows, and writes settings.json, results.csv, summary.md and figure.png into a folder.

    A study that was stopped goes on where it was; one that is complete is summarised and drawn anew.

    Raises:
        InvalidInputError: The folder holds results of other settings, or the data cannot serve these.
    """
    claim_folder(folder, study.name, settings)
    rows = fill(folder / "results.csv", study.row, study.portions(settings), key=study.key, progress=progress)
    (folder / "summary.md").write_text(study.summarize(settings, rows).markdown())
    save_figure(folder / "figure.png", lambda figure: study.draw(settings, rows, figure), size=study.figure_size)
    return rows


def save_figure(path: Path, draw: Callable[[Figure], None], *, size: tuple[float, float]) -> None:
    """Writes what `draw` draws; the file's ending says in which format."""
    figure: Figure = require("matplotlib.figure").Figure(figsize=size, layout="constrained")
    draw(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
