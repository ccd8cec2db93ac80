"""The figures of a report, drawn by Matplotlib as SVG that takes its colours from the page it stands in."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from fl_privacy.audit.estimate import LeakageEstimate
from fl_privacy.extras import require
from fl_privacy.report.history import RunHistory
from fl_privacy.ticks import plain_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_INK, _RULE, _FIRST, _SECOND, _THIRD = "#010101", "#020202", "#030303", "#040404", "#050505"
_THEMED = {
    _INK: "currentColor",
    _RULE: "var(--rule)",
    _FIRST: "var(--first)",
    _SECOND: "var(--second)",
    _THIRD: "var(--third)",
}
"""Colours that stand for the page's: a figure is drawn once and follows its light and its dark scheme."""

_STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be found, read aloud, and takes the page's font
    "svg.hashsalt": "fl-privacy",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _RULE,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.parse_math": False,
    "image.interpolation": "nearest",
    "savefig.facecolor": "none",
}
HEAT_COLOURS = "cividis"
"""Made for every kind of colour vision, and still a scale of grey in print."""
_OVERVIEW_INCHES = 9.0


def rounds_figure(history: RunHistory) -> str:
    """Returns leakage over rounds, and below it the global model's accuracy where the ledger holds it."""
    rounds = np.array(history.rounds)
    highest, middle, share, unknown = [], [], [], []
    for server_round in history.rounds:
        cells = history.cells_of(server_round).values()
        known = [cell.leakage for cell in cells if cell.leakage is not None]
        # Of the maximum: the largest lower, middle and upper values bound it.
        highest.append([max((getattr(leakage, part) for leakage in known), default=np.nan) for part in _PARTS])
        middle.append(float(np.median([leakage.value for leakage in known])) if known else np.nan)
        share.append(sum(bool(cell.above) for cell in cells) / max(1, len(cells)))
        unknown.append(sum(cell.leakage is None for cell in cells) / max(1, len(cells)))
    accuracy = history.accuracy()
    with _drawing(width=8.5, height=4.6 if accuracy else 2.9, rows=2 if accuracy else 1) as (figure, axes):
        lower, value, upper = np.array(highest).T
        above = axes[0]
        above.fill_between(rounds, lower, upper, color=_FIRST, alpha=0.25, linewidth=0)
        above.plot(rounds, value, color=_FIRST, marker=_marker(rounds, "o"), label="most exposed client, with interval")
        above.plot(rounds, middle, color=_SECOND, marker=_marker(rounds, "s"), linestyle="--", label="median client")
        above.plot(rounds, share, color=_THIRD, marker=_marker(rounds, "^"), linestyle=":", label="share above target")
        if any(unknown):
            above.plot(
                rounds, unknown, color=_INK, marker=_marker(rounds, "x"), linestyle="-.", label="share not known"
            )
        above.axhline(history.target, color=_INK, linewidth=0.8)
        above.set(ylabel="leakage", ylim=(-0.03, 1.05))
        above.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        if accuracy:
            for (origin, values), (colour, marker, line) in zip(
                sorted(accuracy.items(), reverse=True), ((_FIRST, "o", "-"), (_SECOND, "s", "--")), strict=False
            ):
                at = sorted(values)
                axes[1].plot(
                    at,
                    [values[r] for r in at],
                    color=colour,
                    marker=_marker(at, marker),
                    linestyle=line,
                    label=f"measured by the {origin}",
                )
            axes[1].set(ylabel="accuracy", ylim=(-0.03, 1.05))
            axes[1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes[-1].set_xlabel("round")
        _whole_ticks(axes[-1].xaxis)
        return _svg(figure)


def overview_figure(history: RunHistory) -> str:
    """Returns the heat map of every client, the most exposed on top, in every round; gaps: nothing known."""
    columns = {server_round: column for column, server_round in enumerate(history.rounds)}
    image = np.full((len(history.clients), len(columns)), np.nan)
    for row, client in enumerate(history.clients):
        for server_round, cell in client.cells.items():
            if cell.leakage is not None:
                image[row, columns[server_round]] = cell.leakage.value
    with _drawing(width=8.5, height=4.2) as (figure, (axes,)):
        axes.grid(visible=False)
        extent = (0.5, len(columns) + 0.5, len(history.clients) + 0.5, 0.5)
        shown = axes.imshow(image, aspect="auto", cmap=HEAT_COLOURS, vmin=0, vmax=1, extent=extent)
        axes.set(xlabel="round, in order", ylabel="client, by exposure")
        for axis in (axes.xaxis, axes.yaxis):
            _whole_ticks(axis)
        figure.colorbar(shown, ax=axes, label="leakage", pad=0.02)
        return _svg(figure)


def noise_figure(row: LeakageEstimate) -> str | None:
    """Returns leakage and predicted error of one client against noise; `None` for a row without a curve."""
    curve = row.curve
    if curve is None or len(curve.noise_std) < 2:
        return None
    with _drawing(width=8.5, height=2.8, columns=2) as (figure, (left, right)):
        left.fill_between(curve.noise_std, curve.lower, curve.upper, color=_FIRST, alpha=0.25, linewidth=0)
        left.plot(curve.noise_std, curve.value, color=_FIRST, label="predicted")
        left.set(ylabel="leakage", ylim=(-0.03, 1.05))
        prior = row.prior_std
        if prior is not None:
            right.plot(curve.noise_std, curve.rmse(prior), color=_FIRST)
            right.set(ylabel="predicted error per element", ylim=(0, 1.08 * prior))
            right.axhline(prior, color=_INK, linewidth=0.8, linestyle=":")
            right.annotate("nothing recovered", (curve.noise_std[0], prior), (2, -11), textcoords="offset points")
        for axes, of_leakage in ((left, True), (right, False)):
            axes.set(xscale="log", xlabel="noise, standard deviation per parameter")
            needed, target = row.required_noise_std, row.target_leakage
            if needed and target is not None and np.isfinite(needed):
                height = target if of_leakage else interpolated(curve.noise_std, curve.rmse(prior or 0.0), needed)
                axes.axvline(needed, color=_SECOND, linewidth=0.8, linestyle="--")
                axes.plot([needed], [height], color=_SECOND, marker="D", linestyle="", label="needed in all")
                if of_leakage:
                    axes.axhline(target, color=_SECOND, linewidth=0.8, linestyle="--")
            seen = row.noise_std
            if seen and curve.noise_std[0] <= seen <= curve.noise_std[-1]:
                height = interpolated(curve.noise_std, curve.value if of_leakage else curve.rmse(prior or 0.0), seen)
                axes.plot([seen], [height], color=_THIRD, marker="o", linestyle="", label="observed")
            plain_ticks(axes.xaxis, extra="report")
        left.legend(loc="lower left")
        return _svg(figure)


def classes_figure(rows: Sequence[LeakageEstimate]) -> str | None:
    """Returns the noise that audited examples need, by class; `None` where no example has a class."""
    needs: dict[int, list[float]] = {}
    for row in rows:
        for example in row.examples:
            if example.label is not None and example.required_noise_std > 0:
                needs.setdefault(example.label, []).append(example.required_noise_std)
    if not needs:
        return None
    labels = sorted(needs, key=lambda label: -float(np.median(needs[label])))[:_MAX_CLASSES]
    with _drawing(width=8.5, height=2.9) as (figure, (axes,)):
        rng = np.random.default_rng(0)
        for place, label in enumerate(labels):
            values = np.array(needs[label])
            shown = values if len(values) <= _MAX_DOTS else rng.choice(values, _MAX_DOTS, replace=False)
            spread = rng.uniform(-0.25, 0.25, len(shown))
            axes.plot(place + spread, shown, color=_FIRST, marker="o", markersize=3, alpha=0.6, linestyle="")
            axes.plot([place - 0.35, place + 0.35], [np.median(values)] * 2, color=_SECOND, linewidth=2.5)
        axes.set(yscale="log", ylabel="noise needed", xlabel="class, the most exposed first; bar: median")
        plain_ticks(axes.yaxis, extra="report")
        axes.set_xticks(range(len(labels)), [str(label) for label in labels])
        axes.xaxis.grid(visible=False)
        return _svg(figure)


_PARTS = ("lower", "value", "upper")
_MAX_CLASSES, _MAX_DOTS, _MAX_MARKED = 30, 200, 40


@contextmanager
def _drawing(
    *, width: float, height: float, rows: int = 1, columns: int = 1
) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """Yields a figure that no window knows of, so that nothing is kept of it, and its axes."""
    matplotlib: Any = require("matplotlib", extra="report")
    figures: Any = require("matplotlib.figure", extra="report")
    with matplotlib.rc_context(_STYLE):
        figure = figures.Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharex=columns == 1)
        yield figure, list(axes.flat)


def _svg(figure: Figure) -> str:
    """Returns the figure as an element to stand in a page: colours from it, no metadata, no ids but those in use."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, themed in _THEMED.items():
        text = text.replace(colour, themed)
    used = set(re.findall(r"(?:#|href=\"#)([\w.-]+)", text))
    text = re.sub(r' id="([\w.-]+)"', lambda found: found.group(0) if found.group(1) in used else "", text)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r'\1\2 aria-hidden="true"', text, count=1)


def _marker(points: Sequence[int] | np.ndarray[Any, Any], marker: str) -> str:
    """Returns a marker where there are few enough points to tell markers apart."""
    return marker if len(points) <= _MAX_MARKED else ""


def _whole_ticks(axis: Axis) -> None:
    ticker: Any = require("matplotlib.ticker", extra="report")
    axis.set_major_locator(ticker.MaxNLocator(integer=True))


def interpolated(noise: Sequence[float], values: Sequence[float], where: float) -> float:
    """Returns a curve's value at a noise level, interpolated over log σ."""
    return float(np.interp(np.log(where), np.log(noise), values))
