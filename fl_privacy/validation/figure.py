"""The figure of a validation study: reached against predicted error."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fl_privacy.extras import require
from fl_privacy.studies.study import save_figure
from fl_privacy.ticks import plain_ticks
from fl_privacy.validation.study import RAN, ValidationRow
from fl_privacy.validation.summary import best_attacks, explained_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vP*X"


def draw_agreement(rows: Sequence[ValidationRow], path: Path, *, title: str) -> None:
    """Writes a log-log scatter of the best attack's error against the prediction, one marker per noise level.

    Attacks that failed to explain the update are drawn hollow: they show nothing about what leaks. Beside it, where
    there are several attacks, the corridor: what is predicted and what each attack reaches at each noise level.

    Args:
        rows: Of a study.
        path: Where to write; the ending says which format.
        title: Above the figure.
    """
    ran = [row for row in rows if row.status == RAN]
    several = len({row.attack for row in ran}) > 1
    save_figure(path, lambda figure: _draw(ran, figure, title, several), size=(12.4 if several else 6.4, 5.6))


def _draw(rows: Sequence[ValidationRow], figure: Figure, title: str, several: bool) -> None:
    if several:
        scatter, corridor = figure.subplots(1, 2)
        _draw_agreement(rows, scatter, title)
        _draw_corridor(rows, corridor)
    else:
        _draw_agreement(rows, figure.subplots(), title)


def _draw_agreement(rows: Sequence[ValidationRow], axes: Axes, title: str) -> None:
    best, known = best_attacks(rows), explained_runs(rows)
    levels = sorted({row.noise_std for row in best})
    colours = require("matplotlib").colormaps["viridis"]
    for index, level in enumerate(levels):
        colour = colours(index / max(1, len(levels) - 1) * 0.9)
        for explained in (True, False):
            at_level = [row for row in best if row.noise_std == level]
            chosen = [row for row in at_level if ((row.image, level) in known) is explained]
            if not chosen:
                continue
            axes.scatter(
                [row.predicted for row in chosen],
                [row.error for row in chosen],
                s=26,
                marker=_MARKERS[index % len(_MARKERS)],
                facecolors=colour if explained else "none",
                edgecolors=colour,
                label=f"σ = {level:g}" + ("" if explained else ", attack failed"),
            )
    values = [value for row in best for value in (row.predicted, row.error)]
    ends = [min(values) / 1.3, max(values) * 1.3]
    axes.plot(ends, ends, color="black", linewidth=1, label="reached = predicted")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, title=title)
    axes.set_xlabel("predicted error, rmse per input element")
    axes.set_ylabel("error of the best attack, rmse per input element")
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        plain_ticks(axis)
    axes.legend(frameon=False, fontsize=9)


def _draw_corridor(rows: Sequence[ValidationRow], axes: Axes) -> None:
    """Medians over images at each noise level, and each run: hollow where the attack did not explain the update."""
    levels = sorted({row.noise_std for row in rows})

    def medians(chosen: Sequence[ValidationRow], field: str) -> tuple[list[float], list[float]]:
        at = {level: [getattr(row, field) for row in chosen if row.noise_std == level] for level in levels}
        return [level for level in levels if at[level]], [statistics.median(found) for found in at.values() if found]

    low, high = medians(rows, "predicted_lower")[1], medians(rows, "predicted_upper")[1]
    axes.fill_between(levels, low, high, color="black", alpha=0.15, linewidth=0)
    axes.plot(*medians(rows, "predicted"), color="black", label="predicted, for this prior")
    axes.plot(*medians(rows, "predicted_own"), color="black", linestyle=":", label="predicted for the very images")
    colours = require("matplotlib").colormaps["tab10"]
    for index, name in enumerate(dict.fromkeys(row.attack for row in rows)):
        mine = [row for row in rows if row.attack == name]
        axes.plot(*medians(mine, "error"), color=colours(index), linewidth=1, label=name)
        for row in mine:
            face = colours(index) if row.explained else "none"
            place = row.noise_std * 1.06 ** (index + 1)  # side by side
            axes.scatter([place], [row.error], s=18, facecolors=face, edgecolors=colours(index), linewidths=0.8)
    axes.set(xscale="log", yscale="log", title="the corridor: medians, and each run (hollow: failed)")
    axes.set_xlabel("noise, standard deviation per parameter")
    axes.set_ylabel("error, rmse per input element")
    plain_ticks(axes.yaxis)
    axes.legend(frameon=False, fontsize=9)
