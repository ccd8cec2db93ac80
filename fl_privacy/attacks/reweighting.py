"""Attacks on noise that is not Gaussian, by one who knows its shape.

Least squares is blind to it: it reaches what Gaussian noise of the same power would leave. One who minimises Σ|r|^p
does better where another power fits: p = 1 for Laplace's noise, whose best estimate is a median and not a mean, and a
large p for rounding errors, of which the largest say most because none exceeds half a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fl_privacy.attacks.attack import Attack
from fl_privacy.attacks.noise import IndependentNoise
from fl_privacy.attacks.problem import AttackProblem
from fl_privacy.attacks.result import Reconstruction
from fl_privacy.errors import InvalidInputError

_LEAST = 0.02
"""Residuals below this share of their root mean square are weighed as if they were at it."""


@dataclass(frozen=True, kw_only=True)
class LeastPowers:
    """Minimises Σ|r|^p/(p·c) + ‖y‖²/(2τ²), r = u(x) − shared, by iteratively reweighted least squares.

    Each round runs an attack on Gaussian noise of variance c·|r|^(2 − p) at the residuals of the round before. For
    p > 2 the weights move by a share 1/(p − 1) of the way only, in logarithms, without which they would swing.

    Attributes:
        attack: On Gaussian noise.
        power: p ≥ 1.
        scale: c > 0, in units of the update to the power p. Laplace's noise of standard deviation σ: p = 1, c = σ/√2.
        rounds: Of reweighting, after one with the problem's own noise.

    Raises:
        InvalidInputError: An option is out of range.
    """

    attack: Attack
    power: float
    scale: float
    rounds: int = 6

    def __post_init__(self) -> None:
        if not (self.power >= 1 and math.isfinite(self.power) and self.scale > 0 and self.rounds >= 1):
            raise InvalidInputError(
                f"expected power >= 1, scale > 0 and rounds >= 1, got {self.power}, {self.scale} and {self.rounds}"
            )

    def run(self, problem: AttackProblem) -> Reconstruction:
        """Returns what the last round rebuilt, judged by the problem's own noise; products add up, histories follow.

        Raises:
            InvalidInputError: From the attack.
        """
        found = self.attack.run(problem)
        history = [found.history]
        products, share = found.products, 1 / max(1.0, self.power - 1)
        logs = self._log_variance(problem, found)
        for _ in range(self.rounds):
            found = self.attack.run(replace(problem, noise=IndependentNoise((0.5 * logs).exp())))
            products = products + found.products
            history.append(found.history)
            logs = torch.lerp(logs, self._log_variance(problem, found), share)
        x = found.inputs.flatten(1)
        return Reconstruction.at(problem, x, history=torch.cat(history), stop=found.stop, products=products)

    def _log_variance(self, problem: AttackProblem, found: Reconstruction) -> Tensor:
        """Returns log c|r|^(2 − p) `[U, P]`."""
        residual = problem.residual(found.inputs.flatten(1)).abs()
        least = _LEAST * residual.square().mean(-1, keepdim=True).sqrt()
        tiny = torch.finfo(residual.dtype).tiny
        return math.log(self.scale) + (2 - self.power) * torch.maximum(residual, least).clamp(min=tiny).log()
