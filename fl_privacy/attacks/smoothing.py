"""Networks with their ReLUs rounded off, for searches that a kink would stop.

The gradient of a ReLU network jumps where a unit switches, and its Jacobian says nothing of the jumps: beside one every
step that the linearisation promises fails. A ReLU rounded off by a width w,

    z·Φ(z/w) → max(z, 0) for w → 0,

has no jumps, and a search that narrows w by stages passes where units switch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fl_privacy.attacks.problem import AttackProblem
from fl_privacy.influence.update import UpdateMap


class RoundedReLU(nn.Module):
    """z·Φ(z/w), with Φ the distribution function of a standard normal variable: GELU, w times as wide.

    Args:
        width: w, in units of z.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width

    def forward(self, z: Tensor) -> Tensor:
        """Returns the rounded ReLU of z."""
        return 0.5 * z * (1 + torch.erf(z / (self.width * math.sqrt(2))))


def has_kinks(update: UpdateMap) -> bool:
    """Whether the model has `nn.ReLU` modules, the kinks that `rounded` knows of."""
    return any(isinstance(module, nn.ReLU) for module in update.model.modules())


def rounded(problem: AttackProblem, width: float) -> UpdateMap:
    """Returns the update map of the same model with every `nn.ReLU` rounded off.

    Args:
        problem: Whose update map it is, with labels.
        width: Relative to the root mean square of what a unit sees at the prior mean.
    """
    model = copy.deepcopy(problem.update.model)
    changed = copy.copy(problem.update)
    changed.model = model
    seen: dict[str, list[float]] = {}
    kinks = {name: module for name, module in model.named_modules() if isinstance(module, nn.ReLU)}
    handles = [module.register_forward_pre_hook(_recorder(seen, name)) for name, module in kinks.items()]
    changed.outputs(problem.params, problem.batches(problem.start()[:1])[0])
    for handle in handles:
        handle.remove()
    for name in kinks:
        mean_square = sum(seen.get(name, [1.0])) / len(seen.get(name, [1.0]))
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, RoundedReLU(max(width * math.sqrt(mean_square), 1e-12)))
    return changed


def _recorder(seen: dict[str, list[float]], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def record(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.setdefault(name, []).append(float(inputs[0].double().square().mean()))

    return record
