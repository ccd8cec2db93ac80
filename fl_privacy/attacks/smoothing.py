"""Networks with their ReLUs rounded off, for searches that a kink would stop.

Beside a jump of the gradient every step that the linearisation promises fails. A search that narrows the rounding by
stages passes where units switch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from fl_privacy.attacks.problem import AttackProblem
from fl_privacy.influence.rounding import RoundedReLU, with_relus_replaced
from fl_privacy.influence.update import UpdateMap


def rounded(problem: AttackProblem, width: float) -> UpdateMap:
    """Returns the update map of the same model with every `nn.ReLU` rounded off, the same for all inputs.

    Args:
        problem: Whose update map it is, with labels.
        width: Relative to the root mean square of what a unit sees at the prior mean.
    """
    seen: dict[str, list[float]] = {}
    watched = with_relus_replaced(problem.update, lambda _: nn.ReLU())
    for name, module in watched.model.named_modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(_recorder(seen, name))
    watched.outputs(problem.params, problem.batches(problem.start()[:1])[0])

    def replacement(name: str) -> nn.Module:
        mean_square = sum(seen.get(name, [1.0])) / len(seen.get(name, [1.0]))
        return RoundedReLU(max(width * math.sqrt(mean_square), 1e-12))

    return with_relus_replaced(problem.update, replacement)


def _recorder(seen: dict[str, list[float]], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def record(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.setdefault(name, []).append(float(inputs[0].double().square().mean()))

    return record
