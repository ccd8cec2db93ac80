"""What is left to an attacker when the client shared the update of a noisy input, u(x + a) with a ~ N(0, S).

The update tells of x only through x + a. So the attacker rebuilds x + a as well as he can, and then takes off what he
knows of a: under the prior N(μ, τ²I) the mean of x given x + a is μ + τ²(S + τ²I)⁻¹(x + a − μ).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fl_privacy.attacks.attack import Attack
from fl_privacy.attacks.problem import AttackProblem
from fl_privacy.attacks.result import Reconstruction
from fl_privacy.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class InputDenoising:
    """An attack on shaped noise by one who knows its covariance.

    Attributes:
        attack: Rebuilds x + a. The problem's prior should be as wide as x + a is, and its noise as small as what else
            is on the update.
        covariance: S·v `[U, D]` for v `[U, D]`, symmetric positive semi-definite.
        prior_std: τ, of x itself.
        rtol: Tolerance on the relative residual of the solve.
        max_steps: Most products with S.
    """

    attack: Attack
    covariance: Callable[[Tensor], Tensor]
    prior_std: float
    rtol: float = 1e-6
    max_steps: int = 500

    def __post_init__(self) -> None:
        if not self.prior_std > 0 or not self.rtol > 0 or self.max_steps < 1:
            raise InvalidInputError(
                "expected prior_std > 0, rtol > 0 and max_steps >= 1, got "
                f"{self.prior_std}, {self.rtol} and {self.max_steps}"
            )

    def run(self, problem: AttackProblem) -> Reconstruction:
        """Returns the posterior mean of x; objective, misfit and stop reasons are those of the search for x + a.

        Raises:
            InvalidInputError: The problem's prior is not white, or from the attack.
        """
        if problem.prior.covariance is not None:
            raise InvalidInputError("expected a white prior: pass problem.prior.white")
        noisy = self.attack.run(problem)
        deviation = problem.prior.deviation(noisy.inputs.flatten(1))
        x = problem.start() + self.prior_std**2 * self._solve(deviation)
        return replace(noisy, inputs=problem.images(x))

    def _solve(self, target: Tensor) -> Tensor:
        """(S + τ²I)⁻¹·target by conjugate gradients, whose condition is that of S + τ²I: no worse than ‖S‖/τ²."""
        x, r = torch.zeros_like(target), target.clone()
        p, square = r.clone(), r.square().sum(-1, keepdim=True)
        goal = self.rtol**2 * square
        for _ in range(self.max_steps):
            if not (square > goal).any():
                return x
            applied = self.covariance(p) + self.prior_std**2 * p
            alpha = torch.where(square > goal, square / (p * applied).sum(-1, keepdim=True), 0.0)
            x, r = x + alpha * p, r - alpha * applied
            following = r.square().sum(-1, keepdim=True)
            p = r + following / square.clamp(min=torch.finfo(square.dtype).tiny) * p
            square = following
        return x
