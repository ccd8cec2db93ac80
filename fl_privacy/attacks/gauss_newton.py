"""The strongest attack that we know: Gauss–Newton on the attacker's posterior, with our own products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fl_privacy.attacks.labels import labelled
from fl_privacy.attacks.problem import AttackProblem
from fl_privacy.attacks.result import Reconstruction, StopReason, best_of
from fl_privacy.attacks.smoothing import rounded
from fl_privacy.attacks.step import GaussNewtonSteps, WhitenedJacobian
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.rounding import has_relus
from fl_privacy.influence.update import UpdateMap

_RIDGE_DROP = 100.0
"""Factor between the ridges of two stages of the continuation: 10 in the standard deviation of the noise."""
_TRIALS = 12
"""Dampings tried from one point before the attack is called stalled."""
_ROUGH_STEPS, _ROUGH_RTOL = 8, 0.005
"""Most steps at one width of rounding, and the share of the objective that each must gain."""
_IDLE_STEPS = 5
"""Steps in a row that lower the objective by less than the tolerance before the attack is called stalled."""


@dataclass(frozen=True, kw_only=True)
class GaussNewton:
    """Levenberg–Marquardt on −2 log p(x | shared) = rᵀC⁻¹r + ‖y‖²/τ², r = u(x) − shared, x = μ + K·y.

    y are the coordinates in which the problem's prior N(μ, τ²KKᵀ) is white. A step p from y solves, by Lanczos
    iteration on products with M = KᵀJᵀC⁻¹JK,

        (M + (ρ + η)I) p = −KᵀJᵀC⁻¹r − ρy,

    with ρ = 1/τ² at last. It begins with a ρ near λ_max(M), where noise drowns all but a few directions and the
    problem is nearly linear, and lowers it by stages (continuation in σ). The damping η is zero until a step fails,
    and then a share of λ_max(M), for updates with strong curvature.

    The update of a network with kinks (ReLU) jumps where a unit switches, and the search stalls far from the mode. It
    first looks for the mode of the same network with its ReLUs rounded off, in stages of less and less width. Where it
    stalls all the same it hops: it starts again from the best point, moved at random.

    A unit has converged when its linearised objective can fall by no more than `tolerance`·D. In the metric of the
    posterior that is the squared distance to its mode, which for a draw of the posterior is D.

    Attributes:
        tolerance: Squared distance to the mode, relative to a draw of the posterior.
        max_steps: Most linearisations per start.
        max_products: Most products with G per linearisation.
        krylov_rtol: Share of a step's decrement that its Lanczos iteration may leave.
        damping: The first η, relative to λ_max(M).
        rounding: Widths to which `nn.ReLU` modules are rounded off in turn, relative to what their units see; empty to
            attack the network as it is. Networks without them are not concerned.
        num_starts: 1: the prior mean. Each more: a draw of the prior. The most probable result is kept.
        hops: Most restarts from the best point, for units that have not converged or are not explained.
        hop_std: Standard deviation of a hop per coordinate, relative to τ.
        seed: Of all that is drawn.

    Raises:
        InvalidInputError: An option is out of range.
    """

    tolerance: float = 1e-3
    max_steps: int = 60
    max_products: int = 512
    krylov_rtol: float = 0.02
    damping: float = 1e-5
    rounding: tuple[float, ...] = (0.5, 0.15, 0.05, 0.015)
    num_starts: int = 1
    hops: int = 4
    hop_std: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tolerance", "krylov_rtol", "damping", "hop_std"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InvalidInputError(f"expected a finite {name} > 0, got {value}")
        for name in ("max_steps", "max_products", "num_starts"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"expected {name} >= 1, got {getattr(self, name)}")
        if not all(math.isfinite(width) and width > 0 for width in self.rounding):
            raise InvalidInputError(f"expected rounding widths > 0, got {self.rounding}")
        if self.hops < 0:
            raise InvalidInputError(f"expected hops >= 0, got {self.hops}")

    def run(self, problem: AttackProblem) -> Reconstruction:
        """Returns the most probable reconstruction found from any start, for every unit.

        Keeps a Krylov basis of up to U·`max_products`·D numbers: give it no more units at once than memory allows.

        Raises:
            InvalidInputError: The labels are not known and cannot be recovered.
            NotTwiceDifferentiableError: From the update map.
        """
        problem = labelled(problem)
        generator = torch.Generator().manual_seed(self.seed)
        starts = [problem.start()]
        for _ in range(self.num_starts - 1):
            starts.append(problem.prior.sample(problem.num_units, problem.num_private, generator))
        widths = self.rounding if has_relus(problem.update) else ()
        best = best_of([self._descend(problem, x, [rounded(problem, width) for width in widths]) for x in starts])
        for _ in range(self.hops):
            open_units = (~(best.converged & best.explained)).nonzero().squeeze(1)
            if not len(open_units):
                break
            best = self._hop(problem, best, open_units, generator)
        return best

    def _descend(self, problem: AttackProblem, start: Tensor, stages: Sequence[UpdateMap]) -> Reconstruction:
        """Returns what is found from a start, by way of the modes of other, smoother updates."""
        x, spent, history = start, torch.zeros(problem.num_units, dtype=torch.long, device=start.device), []
        for smooth in stages:
            stage = _Descent(self, replace(problem, update=smooth), x, continuation=False, rough=True).run()
            x = torch.where(stage.inputs.flatten(1).isfinite().all(-1, keepdim=True), stage.inputs.flatten(1), x)
            spent += stage.products
            history.append(stage.history)
        found = _Descent(self, problem, x, continuation=not stages).run()
        return replace(found, products=found.products + spent, history=torch.cat([*history, found.history]))

    def _hop(
        self, problem: AttackProblem, best: Reconstruction, units: Tensor, generator: torch.Generator
    ) -> Reconstruction:
        """Returns the best of what there is and of a search that begins beside it, for `units`."""
        chosen = problem.select(units)
        noise = torch.randn(len(units), problem.input_dim, generator=generator, dtype=torch.float64)
        hop = problem.prior.root(noise.to(problem.shared))
        start = best.inputs[units].flatten(1) + self.hop_std * problem.prior.std * hop
        return best.improved(units, _Descent(self, chosen, start, continuation=False).run())


class _Descent:
    """Levenberg–Marquardt from one start per unit. State is per unit, `[U]`, in float64 where it is a number."""

    def __init__(
        self,
        config: GaussNewton,
        problem: AttackProblem,
        x: Tensor,
        *,
        continuation: bool = True,
        rough: bool = False,
    ) -> None:
        self.config, self.problem = config, problem
        self.rough = rough  # on the way to another problem, so that neither the last digit nor all steps are worth it
        self.x = x.clone()
        self.stop: list[StopReason | None] = [None] * problem.num_units
        jacobian = problem.jacobian(x)
        self.residual = jacobian.update() - problem.shared
        operator = WhitenedJacobian(jacobian, problem.noise, problem.prior)
        generator = torch.Generator().manual_seed(config.seed)
        random = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        self.largest = operator.largest(random)
        self.final_ridge = 1.0 / problem.prior.std**2
        first_ridge = torch.where(self.largest.isfinite(), self.largest / 10, 0.0)
        self.ridge = (first_ridge if continuation else torch.zeros_like(first_ridge)).clamp(min=self.final_ridge)
        self.damping = torch.zeros_like(self.ridge)
        self.products = torch.full((problem.num_units,), 13, device=x.device)
        self.idle = torch.zeros(problem.num_units, dtype=torch.long, device=x.device)
        self.history: list[Tensor] = []

    def run(self) -> Reconstruction:
        for _ in range(min(_ROUGH_STEPS, self.config.max_steps) if self.rough else self.config.max_steps):
            active = [unit for unit, reason in enumerate(self.stop) if reason is None]
            if not active:
                break
            self._advance(torch.tensor(active, device=self.x.device))
        stop = [reason or StopReason.MAX_STEPS for reason in self.stop]
        history = torch.stack(self.history) if self.history else self.ridge.new_zeros(0, len(stop))
        return Reconstruction.at(self.problem, self.x, history=history, stop=stop, products=self.products)

    def _advance(self, units: Tensor) -> None:
        """Linearises at the present points of `units`, and takes the first damped step that lowers the objective."""
        problem, config = self.problem.select(units), self.config
        x, residual, ridge = self.x[units], self.residual[units], self.ridge[units]
        operator = WhitenedJacobian(problem.jacobian(x), problem.noise, problem.prior)
        pull = problem.prior.root_transpose(operator.jacobian.vjp(problem.noise.precision(residual)))
        target = -pull - ridge[:, None].to(x) * problem.prior.coordinates(x)
        allowed = config.tolerance * problem.input_dim
        steps = GaussNewtonSteps(
            operator,
            target,
            ridge + self.damping[units],
            rtol=config.krylov_rtol,
            atol=0.5 * allowed,
            max_steps=config.max_products,
        )
        self.products[units] += steps.products + 2
        near = steps.decrement(ridge).upper <= allowed
        moved, decrease = self._try_dampings(units, problem, steps, target)
        slow = decrease < (_ROUGH_RTOL if self.rough else 0.0) * self._objective(units)
        self.idle[units] = torch.where(decrease < allowed, self.idle[units] + 1, 0)
        self._record(units)
        for index, unit in enumerate(units.tolist()):
            final = bool(ridge[index] <= self.final_ridge)
            if steps.failed[index]:
                self.stop[unit] = StopReason.NOT_FINITE
            elif final and near[index]:
                self.stop[unit] = StopReason.CONVERGED
            elif final and (not moved[index] or self.idle[unit] >= _IDLE_STEPS or bool(slow[index])):
                self.stop[unit] = StopReason.STALLED
            elif near[index] or not moved[index] or self.damping[unit] == 0:
                self.ridge[unit] = max(float(ridge[index]) / _RIDGE_DROP, self.final_ridge)

    def _try_dampings(
        self, units: Tensor, problem: AttackProblem, steps: GaussNewtonSteps, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns which of `units` moved, and by how much that lowered their objectives."""
        x, ridge = self.x[units], self.ridge[units]
        before = problem.noise.energy(self.residual[units]).double() + ridge * self._squared_coordinates(x)
        pending = ~steps.failed
        moved = torch.zeros_like(pending)
        decrease = torch.zeros_like(before)
        for _ in range(_TRIALS):
            if not pending.any():
                break
            damping = self.damping[units]
            step = steps.step(ridge + damping)
            moves = problem.prior.root(step)
            # The decrease that the linearisation promises: 2bᵀp − pᵀ(M + ρ)p = bᵀp + η‖p‖² for the solution p.
            promised = _dot(target, step) + damping * _dot(step, step)
            chosen = pending.nonzero().squeeze(1)
            trial = x[chosen] + moves[chosen]
            finite = torch.isfinite(trial).all(-1)
            trial = torch.where(finite[:, None], trial, x[chosen])
            residual = problem.select(chosen).residual(trial)
            self.products[units[chosen]] += 1
            energy = problem.noise.select(chosen).energy(residual).double()
            after = energy + ridge[chosen] * self._squared_coordinates(trial)
            gain = (before[chosen] - after) / promised[chosen]
            better = finite & (gain > 1e-3)
            self._accept(units[chosen[better]], trial[better], residual[better], gain[better])
            moved[chosen[better]] = True
            decrease[chosen[better]] = (before[chosen] - after)[better]
            worse = units[chosen[~better]]
            self.damping[worse] = torch.maximum(10 * self.damping[worse], self.config.damping * self.largest[worse])
            pending[chosen[better]] = False
        return moved, decrease

    def _accept(self, units: Tensor, x: Tensor, residual: Tensor, gain: Tensor) -> None:
        self.x[units], self.residual[units] = x, residual
        damping = self.damping[units]
        damping = torch.where(gain > 0.75, damping / 10, torch.where(gain < 0.25, 4 * damping, damping))
        self.damping[units] = torch.where(damping < self.ridge[units], 0.0, damping)

    def _squared_coordinates(self, x: Tensor) -> Tensor:
        return self.problem.prior.coordinates(x).double().square().sum(-1)

    def _objective(self, units: Tensor) -> Tensor:
        energy = self.problem.noise.select(units).energy(self.residual[units])
        return (energy + self.problem.prior.energy(self.x[units])).double()

    def _record(self, units: Tensor) -> None:
        row = torch.full_like(self.ridge, math.nan)
        row[units] = self._objective(units)
        self.history.append(row)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum(-1)
