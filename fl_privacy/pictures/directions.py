"""What shaped noise hides first, and what it leaves alone, as pictures of the directions it is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fl_privacy.extras import require
from fl_privacy.influence.directions import ProtectedDirections

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ACROSS = 6


def draw_directions(found: ProtectedDirections, shape: tuple[int, int], *, unit: int = 0) -> Figure:
    """Returns a figure of one unit's directions: above those that noise protects most, below those that it does least.

    Over each stands what is left of the private input along it, and by how much noise there changes the update.

    Args:
        found: Of images of one channel.
        shape: Height and width.
        unit: Which.
    """
    count = found.eigenvalues.shape[1]
    across = min(_ACROSS, count)
    figure: Figure = require("matplotlib.figure").Figure(figsize=(1.4 * across, 3.2), layout="constrained")
    axes = figure.subplots(2, across, squeeze=False)
    for row, first in ((0, 0), (1, count - across)):
        for column in range(across):
            axis, k = axes[row][column], first + column
            picture = found.vectors[unit, k].reshape(shape).cpu()
            bound = float(picture.abs().max())
            axis.imshow(picture, cmap="RdBu", vmin=-bound, vmax=bound)
            left, cost = float(found.leakage[unit, k]), float(found.cost[unit, k])
            axis.set_title(f"{left:.2f} left\ncosts {cost:.1g}", fontsize=8)
            axis.set_axis_off()
    return figure
