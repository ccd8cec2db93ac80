"""Networks with their ReLUs rounded off: smooth where the originals have kinks.

The gradient of a ReLU network jumps where a unit switches, and its Jacobian says nothing of the jumps. A ReLU rounded
off by a width w,

    z·Φ(z/w) → max(z, 0) for w → 0,

has none: what the original's update gains by jumps over a distance, the smooth one's gains by its slope.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from fl_privacy.influence.update import UpdateMap

M = TypeVar("M", bound=UpdateMap)


class RoundedReLU(nn.Module):
    """z·Φ(z/w), with Φ the distribution function of a standard normal variable: GELU, w times as wide.

    Args:
        width: w, in units of z, or relative to the root mean square of the z that it is given.
        relative: Which of the two.
    """

    def __init__(self, width: float, *, relative: bool = False) -> None:
        super().__init__()
        self.width = width
        self.relative = relative

    def forward(self, z: Tensor) -> Tensor:
        """Returns the rounded ReLU of z."""
        width: float | Tensor = self.width
        if self.relative:
            scale = z.detach().square().mean().sqrt()
            width = self.width * torch.where(scale > 0, scale, 1.0)  # of zeros alone no scale is known
        return 0.5 * z * (1 + torch.erf(z / (math.sqrt(2) * width)))


def has_kinks(update: UpdateMap) -> bool:
    """Whether the model has `nn.ReLU` modules; ReLUs that are called as functions are not seen."""
    return any(isinstance(module, nn.ReLU) for module in update.model.modules())


def with_relus_replaced(update: M, replacement: Callable[[str], nn.Module]) -> M:
    """Returns the update map of a copy of the model.

    Args:
        update: Of the model.
        replacement: Makes what stands in for the `nn.ReLU` of a name.
    """
    changed = copy.copy(update)
    changed.model = copy.deepcopy(update.model)
    for name, module in update.model.named_modules(remove_duplicate=False):  # one module may stand in several places
        if isinstance(module, nn.ReLU):
            parent, _, last = name.rpartition(".")
            setattr(changed.model.get_submodule(parent), last, replacement(name))
    return changed


def rounded_off(update: M, width: float) -> M:
    """Returns the update map of the same model with every `nn.ReLU` rounded off; of one without them, the map itself.

    Args:
        update: Of the model.
        width: Relative to the root mean square of what a unit sees, input by input; 0 rounds nothing off.
    """
    if width == 0 or not has_kinks(update):
        return update
    return with_relus_replaced(update, lambda _: RoundedReLU(width, relative=True))
