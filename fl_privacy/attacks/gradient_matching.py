"""Attacks that descend on the distance between the update of a guess and the update that was shared.

`deep_leakage` is DGL (Zhu, Liu, Han: Deep Leakage from Gradients, NeurIPS 2019); `inverting_gradients` is that of
Geiping, Bauermeister, Dröge, Moeller (NeurIPS 2020). They are what practitioners run, and far weaker than
`GaussNewton`: they show what an attacker gets cheaply, not what could be had.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fl_privacy.attacks.differentiable import DifferentiableUpdate
from fl_privacy.attacks.distances import Distance, cosine_distance, relative_squared_distance, total_variation
from fl_privacy.attacks.labels import labelled
from fl_privacy.attacks.optimizers import LBFGS, Adam, Objective, Optimizer
from fl_privacy.attacks.problem import AttackProblem
from fl_privacy.attacks.result import Reconstruction
from fl_privacy.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class GradientMatching:
    """Minimises distance(u(x), shared) + w·TV(x) from draws of the prior.

    Of several restarts the one of least loss is kept, unit by unit. All restarts of all units run as one batch where
    the optimiser allows it.

    Attributes:
        distance: Between updates.
        optimizer: How to descend.
        total_variation_weight: w, for images.
        bounds: Range that inputs are known to lie in; results are clipped to it.
        restarts: Number of starts.
        seed: Of the starts.

    Raises:
        InvalidInputError: An option is out of range.
    """

    distance: Distance = relative_squared_distance
    optimizer: Optimizer = field(default_factory=LBFGS)
    total_variation_weight: float = 0.0
    bounds: tuple[float, float] | None = None
    restarts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.total_variation_weight) and self.total_variation_weight >= 0):
            raise InvalidInputError(f"expected total_variation_weight >= 0, got {self.total_variation_weight}")
        if self.restarts < 1:
            raise InvalidInputError(f"expected restarts >= 1, got {self.restarts}")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise InvalidInputError(f"expected bounds (low, high) with low < high, got {self.bounds}")

    def run(self, problem: AttackProblem) -> Reconstruction:
        """Returns the reconstruction of least loss, for every unit.

        Raises:
            InvalidInputError: The labels are not known and cannot be recovered, or the total variation is asked of
                inputs that are no images.
            NotTwiceDifferentiableError: From the update map.
        """
        problem = labelled(problem)
        units = torch.arange(problem.num_units, device=problem.shared.device)
        lanes = problem.select(units.repeat(self.restarts))
        generator = torch.Generator().manual_seed(self.seed)
        start = problem.prior.sample(lanes.num_units, lanes.num_private, generator)
        found = self.optimizer.minimise(
            lambda chosen: self._objective(lanes.select(chosen)), start, unit=problem.prior.std
        )
        value = found.value.nan_to_num(nan=math.inf).reshape(self.restarts, -1)
        best = value.argmin(0) * problem.num_units + units
        x = found.x[best] if self.bounds is None else found.x[best].clamp(*self.bounds)
        return Reconstruction.at(
            problem,
            x,
            history=found.history[:, best],
            stop=[found.stop[lane] for lane in best.tolist()],
            products=found.evaluations.reshape(self.restarts, -1).sum(0),
        )

    def _objective(self, lanes: AttackProblem) -> Objective:
        update = DifferentiableUpdate(lanes)

        def objective(x: Tensor) -> Tensor:
            loss = self.distance(update(x), lanes.shared)
            if self.total_variation_weight:
                loss = loss + self.total_variation_weight * total_variation(lanes.images(x))
            return loss

        return objective


def deep_leakage(*, optimizer: Optimizer | None = None, restarts: int = 1, seed: int = 0) -> GradientMatching:
    """Returns DGL: the squared distance, by L-BFGS unless another optimiser is given."""
    return GradientMatching(optimizer=optimizer or LBFGS(), restarts=restarts, seed=seed)


def inverting_gradients(
    *,
    steps: int = 2000,
    total_variation_weight: float = 1e-4,
    bounds: tuple[float, float] | None = None,
    restarts: int = 2,
    seed: int = 0,
) -> GradientMatching:
    """Returns Inverting Gradients: the cosine distance and total variation, by signed Adam from several starts."""
    return GradientMatching(
        distance=cosine_distance,
        optimizer=Adam(steps=steps, signed=True),
        total_variation_weight=total_variation_weight,
        bounds=bounds,
        restarts=restarts,
        seed=seed,
    )
