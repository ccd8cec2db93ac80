"""Networks with their ReLUs rounded off: smooth where the originals have kinks.

The gradient of a ReLU network jumps where a unit switches, and its Jacobian says nothing of the jumps. A ReLU rounded
off by a width w,

    z·Φ(z/w) → max(z, 0) for w → 0,

has none: what the original's update gains by jumps over a distance, the smooth one's gains by its slope.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from fl_privacy.influence.update import UpdateMap

M = TypeVar("M", bound=UpdateMap)


def rounded_off(update: M, width: float) -> M:
    """Returns the update map of the same model whose ReLUs, leaky ones, ReLU6 and hard tanh are rounded off.

    They are as its forward pass runs, be they modules or functions, so that the model is neither copied nor changed.
    Max pooling is left as it is, and so is what TorchScript has compiled.

    Args:
        update: Of the model.
        width: Relative to the root mean square of what a layer sees of an example; held fixed in derivatives. 0 rounds
            nothing off.
    """
    changed = copy.copy(update)
    changed.relu_width = width
    return changed


def has_kinks(update: UpdateMap, params: Mapping[str, Tensor], inputs: Tensor) -> bool:
    """Whether a forward pass at inputs `[N, *shape]` goes through kinks that `rounded_off` rounds."""
    smooth = rounded_off(update, 1.0).outputs(params, inputs)
    return not torch.equal(smooth, update.outputs(params, inputs))


def has_relus(update: UpdateMap) -> bool:
    """Whether the model has `nn.ReLU` modules; ReLUs that are called as functions are not seen."""
    return any(isinstance(module, nn.ReLU) for module in update.model.modules())


def with_relus_replaced(update: M, replacement: Callable[[], nn.Module]) -> M:
    """Returns the update map of a copy of the model.

    Args:
        update: Of the model.
        replacement: Makes what stands in for an `nn.ReLU`.
    """
    changed = copy.copy(update)
    changed.model = copy.deepcopy(update.model)
    for name, module in update.model.named_modules(remove_duplicate=False):  # one module may stand in several places
        if isinstance(module, nn.ReLU):
            parent, _, last = name.rpartition(".")
            setattr(changed.model.get_submodule(parent), last, replacement())
    return changed
