"""The figure of a validation study: reached against predicted error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fl_privacy.extras import require
from fl_privacy.studies.study import save_figure
from fl_privacy.validation.study import ValidationRow
from fl_privacy.validation.summary import best_attacks, explained_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vP*X"


def draw_agreement(rows: Sequence[ValidationRow], path: Path, *, title: str) -> None:
    """Writes a log-log scatter of the best attack's error against the prediction, one marker per noise level.

    Attacks that failed to explain the update are drawn hollow: they show nothing about what leaks.

    Args:
        rows: Of a study.
        path: Where to write; the ending says which format.
        title: Above the figure.
    """
    save_figure(path, lambda figure: _draw(rows, figure, title), size=(6.4, 5.6))


def _draw(rows: Sequence[ValidationRow], figure: Figure, title: str) -> None:
    axes = figure.subplots()
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
    axes.legend(frameon=False, fontsize=9)
