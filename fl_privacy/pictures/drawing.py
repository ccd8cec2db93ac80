"""A picture drawn: original and reconstructions side by side, with what was predicted and what was reached."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fl_privacy.errors import InvalidInputError
from fl_privacy.extras import require
from fl_privacy.interval import Interval
from fl_privacy.pictures.rebuilding import Panel, Picture
from fl_privacy.studies.study import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL = 1.75
"""Width of a panel in inches."""
_ONE_ROW, _PER_ROW = 7, 6
"""Panels that stand in one row, at most; where there are more, in each of several."""


def check_format(path: Path) -> None:
    """Checks that a picture can be written to a path, before the work of making one.

    Raises:
        InvalidInputError: The path's ending is no format of pictures.
    """
    known = sorted(require("matplotlib.backend_bases").FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in known:
        raise InvalidInputError(f"expected a picture's file to end in one of {', '.join(known)}, got {path.name!r}")


def draw_picture(picture: Picture, path: Path, *, title: str = "", bounds: tuple[float, float] | None = None) -> None:
    """Writes a picture of an image; the path's ending says in which format.

    Args:
        picture: Of an image `[H, W]`, `[1, H, W]` or `[3, H, W]`.
        path: Where to write.
        title: Above it.
        bounds: Values that are black and white. Default: those of the original.

    Raises:
        InvalidInputError: The example is no image.
    """
    shape = picture.original.shape
    if not (len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))):
        raise InvalidInputError(f"expected an image [H, W], [1, H, W] or [3, H, W] to draw, got {list(shape)}")
    low, high = bounds or (float(picture.original.min()), float(picture.original.max()))
    count = 2 + len(picture.panels)
    rows = 1 if count <= _ONE_ROW else math.ceil(count / _PER_ROW)
    across = math.ceil(count / rows)

    def draw(figure: Figure) -> None:
        if title:
            figure.suptitle(title, fontsize=10)
        places = figure.subplots(rows, across, squeeze=False).flatten()
        _show(places[0], picture.original, low, high, "original", "")
        _show(places[1], picture.prior_mean, low, high, "before any update", f"error {picture.prior_std:.3g}")
        for axes, panel in zip(places[2:count], picture.panels, strict=True):
            _show(axes, panel.rebuilt, low, high, panel.name, panel_text(picture, panel))
        for axes in places[count:]:
            axes.set_axis_off()

    save_figure(path, draw, size=(_PANEL * across, rows * (_PANEL + 1.0) + (0.2 if title else 0.0)))


def panel_text(picture: Picture, panel: Panel) -> str:
    """Returns what is said below a panel: leakage and error as predicted, and what the attack reached."""
    leakage, error = span_text(panel.leakage, "{:.0%}"), span_text(panel.predicted, "{:.3g}")
    return f"leaks {leakage}\npredicted {error}\n{reached_text(picture, panel)}"


def span_text(interval: Interval[float], form: str) -> str:
    """Returns a value as it is printed, with its bounds where these are other numbers."""
    lower, value, upper = (form.format(number) for number in interval)
    return value if lower == value == upper else f"{value} [{lower}, {upper}]"


def reached_text(picture: Picture, panel: Panel) -> str:
    """Returns what an attack reached, and whether that is anything: more than what is known without an update."""
    if not panel.explained:
        return f"attack failed at {panel.reached:.3g}"
    nothing = "\nmore than before any update" if panel.reached > picture.prior_std else ""
    return f"reached {panel.reached:.3g}{nothing}"


def _show(axes: Axes, image: Tensor, low: float, high: float, title: str, text: str) -> None:
    scaled = ((image.detach().double().cpu() - low) / max(high - low, 1e-12)).clamp(0, 1)
    if scaled.ndim == 3:
        scaled = scaled[0] if len(scaled) == 1 else torch.movedim(scaled, 0, -1)
    axes.imshow(scaled.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(text, fontsize=8)
