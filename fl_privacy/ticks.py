"""Ticks of logarithmic axes, for the figures of reports and of studies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fl_privacy.extras import require

if TYPE_CHECKING:
    from matplotlib.axis import Axis


def plain_ticks(axis: Axis, *, extra: str = "simulation") -> None:
    """Labels a logarithmic axis by plain numbers: 1, 2 and 5 of each decade, of many decades 1 alone.

    On an axis so short that fewer than two of them would fall on it, they are at even distances.

    Args:
        axis: Whose limits are set, or its data drawn.
        extra: The extra that installs Matplotlib for what is drawn.
    """
    ticker = require("matplotlib.ticker", extra=extra)
    low, high = sorted(axis.get_view_interval())
    locator = ticker.LogLocator(subs=(1.0, 2.0, 5.0) if high < 500 * low else (1.0,))
    if sum(low <= tick <= high for tick in locator.tick_values(low, high)) < 2:
        locator = ticker.MaxNLocator(5, steps=[1, 2, 5, 10])
    axis.set_major_locator(locator)
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
