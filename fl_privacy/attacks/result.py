"""What an attack brings back, and how far it may be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from fl_privacy.attacks.problem import AttackProblem
from fl_privacy.errors import InvalidInputError


class StopReason(StrEnum):
    """Why an attack stopped on a unit. None of these says that the unit is safe."""

    CONVERGED = "converged"
    """At a stationary point of its objective, to its tolerance."""
    STALLED = "stalled"
    """No step lowers the objective any further, though the tolerance is not met."""
    MAX_STEPS = "max-steps"
    """The budget of steps is spent: more of them might rebuild more."""
    NOT_FINITE = "not-finite"
    """The update or its derivatives were NaN or infinite."""


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """The inputs that an attack rebuilt for U units.

    A poor reconstruction says something of the attack, not of the update: where `converged` or `explained` is false,
    the attack failed and shows nothing; it is never evidence that the input is safe.

    Attributes:
        inputs: `[U, M, *shape]`, the M private examples of each unit.
        labels: `[U, N, ...]` that were used, known or recovered.
        objective: −2 log p(x | shared) `[U]`, in which the results of different attacks compare; lower is better.
        misfit: (u(x) − shared)ᵀC⁻¹(u(x) − shared)/P `[U]`: about 1 at the true input, more where the update is not
            explained (a local minimum, wrong labels, noise larger than stated).
        history: The attack's own loss `[steps, U]`; NaN after a unit has stopped.
        stop: Why it stopped, per unit.
        products: Update gradients and products with G spent on each unit, `[U]`.
        update_dim: P.
    """

    inputs: Tensor
    labels: Tensor
    objective: Tensor
    misfit: Tensor
    history: Tensor
    stop: tuple[StopReason, ...]
    products: Tensor
    update_dim: int

    @classmethod
    def at(
        cls, problem: AttackProblem, x: Tensor, *, history: Tensor, stop: Sequence[StopReason], products: Tensor
    ) -> Reconstruction:
        """Returns the reconstruction of flat private inputs `[U, D]`, judged by the problem's own posterior."""
        energy = problem.noise.energy(problem.residual(x))
        return cls(
            inputs=problem.images(x),
            labels=problem.known_labels,
            objective=energy + problem.prior.energy(x),
            misfit=energy / problem.update_dim,
            history=history,
            stop=tuple(stop),
            products=products,
            update_dim=problem.update_dim,
        )

    @property
    def converged(self) -> Tensor:
        """Whether the attack reached a stationary point of its objective, `[U]`."""
        return torch.tensor([reason is StopReason.CONVERGED for reason in self.stop], device=self.objective.device)

    @property
    def explained(self) -> Tensor:
        """Whether the rebuilt inputs explain the update up to its noise, `[U]`: the misfit is within 5 standard errors.

        The squared norm of P standard normal numbers, over P, has mean 1 and standard deviation √(2/P).
        """
        # The energy of a well-known update is a sum of rounding errors, too: 1 % for them.
        return self.misfit <= 1.01 + 5 * math.sqrt(2 / self.update_dim)

    def improved(self, units: Tensor, other: Reconstruction) -> Reconstruction:
        """Returns these reconstructions, with those of `units` replaced where `other`, made of them alone, is better.

        Products add up, whichever is kept. Histories are padded with NaN to the longer one.
        """
        present = self.objective[units]
        better = (other.objective < present) | (present.isnan() & ~other.objective.isnan())
        replaced = units[better]
        choice = {int(unit): row for row, unit in enumerate(units.tolist()) if better[row]}
        steps = max(len(self.history), len(other.history))
        products = self.products.clone()
        products[units] += other.products
        return replace(
            self,
            inputs=self.inputs.index_copy(0, replaced, other.inputs[better]),
            objective=self.objective.index_copy(0, replaced, other.objective[better]),
            misfit=self.misfit.index_copy(0, replaced, other.misfit[better]),
            history=_padded(self.history, steps).index_copy(1, replaced, _padded(other.history, steps)[:, better]),
            stop=tuple(other.stop[choice[unit]] if unit in choice else old for unit, old in enumerate(self.stop)),
            products=products,
        )


def best_of(reconstructions: Sequence[Reconstruction]) -> Reconstruction:
    """Returns, unit by unit, the most probable of several reconstructions of the same problem.

    This is what an attacker can do, who compares what he rebuilt with what he saw and not with the truth. Histories are
    padded with NaN to the longest.

    Raises:
        InvalidInputError: None was given.
    """
    if not reconstructions:
        raise InvalidInputError("expected at least one reconstruction, got none")
    best = reconstructions[0]
    everything = torch.arange(len(best.stop), device=best.objective.device)
    for other in reconstructions[1:]:
        best = best.improved(everything, other)
    return best


def _padded(history: Tensor, steps: int) -> Tensor:
    missing = history.new_full((steps - len(history), history.shape[1]), math.nan)
    return torch.cat([history, missing])
