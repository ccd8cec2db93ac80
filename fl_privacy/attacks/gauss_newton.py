"""The strongest attack that we know: Gauss–Newton on the attacker's posterior, with our own products."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fl_privacy.attacks.labels import labelled
from fl_privacy.attacks.problem import AttackProblem
from fl_privacy.attacks.result import Reconstruction, StopReason, best_of
from fl_privacy.attacks.step import GaussNewtonSteps, WhitenedJacobian
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.rounding import has_kinks, rounded_off
from fl_privacy.influence.update import UpdateMap

_RIDGE_DROP = 100.0
"""Factor between the ridges of two stages of the continuation: 10 in the standard deviation of the noise."""
_TRIALS = 12
"""Dampings tried from one point before the attack is called stalled."""
_STAGE_STEPS = 8
"""Most steps at one width of rounding: none of its last digits is worth having."""
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

    The update of a network with kinks (ReLU) jumps where a unit switches, and J, which knows of no jump, says little of
    how it changes over a distance. There the search goes three ways in turn: by the J of the network with its kinks
    rounded off and the residual of the network itself, what that J cannot explain of it being noise for the step,
    ρ = max(1, rᵀC⁻¹r/P)/τ²; then to the mode of the rounded network, in stages of less and less width; at last by the
    network's own J. The first comes nearer from afar, where the mode of a rounded network explains what rounding
    changed; the second is sharper close by. Where a search stalls it hops: it starts again, moved at random, from the
    best point, or in a network with kinks, where searches stall all around the truth, from the mean of theirs.

    A unit has converged when its linearised objective can fall by no more than `tolerance`·D. In the metric of the
    posterior that is the squared distance to its mode, which for a draw of the posterior is D.

    Attributes:
        tolerance: Squared distance to the mode, relative to a draw of the posterior.
        max_steps: Most linearisations per start.
        max_products: Most products with G per linearisation.
        krylov_rtol: Share of a step's decrement that its Lanczos iteration may leave.
        damping: The first η, relative to λ_max(M).
        rounded_steps: Widths to which kinks are rounded off (`rounded_off`) for the J of the first steps, in turn.
        rounding: Widths of the rounded networks whose modes are then looked for, in turn. With neither, the network's
            own J is all there is; networks without kinks are not concerned.
        num_starts: 1: the prior mean. Each more: a draw of the prior. The most probable result is kept.
        hops: Most restarts, for units that have not converged or are not explained.
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
    rounded_steps: tuple[float, ...] = (0.5, 0.3, 0.15)
    rounding: tuple[float, ...] = (0.15, 0.05, 0.015)
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
        for name in ("rounded_steps", "rounding"):
            if not all(math.isfinite(width) and width > 0 for width in getattr(self, name)):
                raise InvalidInputError(f"expected {name} to be widths > 0, got {getattr(self, name)}")
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
        kinked = has_kinks(problem.update, problem.params, problem.batches(starts[0])[0])
        found = [self._descend(problem, x, kinked=kinked) for x in starts]
        best = best_of(found)
        total, count = torch.stack([one.inputs.flatten(1) for one in found]).sum(0), len(found)
        for _ in range(self.hops):
            units = (~(best.converged & best.explained)).nonzero().squeeze(1)
            if not len(units):
                break
            centre = total / count if kinked else best.inputs.flatten(1)
            random = torch.randn(len(units), problem.input_dim, generator=generator, dtype=torch.float64)
            hop = self.hop_std * problem.prior.std * problem.prior.root(random.to(problem.shared))
            other = self._descend(problem.select(units), centre[units] + hop, kinked=kinked, continuation=False)
            best = best.improved(units, other)
            total[units] += other.inputs.flatten(1)
            count += 1
        return best

    def _descend(
        self, problem: AttackProblem, start: Tensor, *, kinked: bool, continuation: bool = True
    ) -> Reconstruction:
        """Returns what is found from a start, by way of smoother searches where the network has kinks."""
        products, history = torch.zeros(problem.num_units, dtype=torch.long, device=start.device), []
        widths = (self.rounded_steps, self.rounding) if kinked else ((), ())
        search = partial(_Descent, self, most_steps=min(_STAGE_STEPS, self.max_steps), continuation=False)
        stages = [partial(search, problem, smooth=rounded_off(problem.update, width)) for width in widths[0]]
        stages += [partial(search, replace(problem, update=rounded_off(problem.update, width))) for width in widths[1]]
        continued = continuation and not stages
        stages.append(partial(_Descent, self, problem, most_steps=self.max_steps, continuation=continued))
        x = start
        for stage in stages:
            found = stage(x=x).run()
            x = found.inputs.flatten(1)
            products += found.products
            history.append(found.history)
        return replace(found, products=products, history=torch.cat(history))


class _Descent:
    """Levenberg–Marquardt from one start per unit. State is per unit, `[U]`, in float64 where it is a number."""

    def __init__(
        self,
        config: GaussNewton,
        problem: AttackProblem,
        x: Tensor,
        *,
        most_steps: int,
        continuation: bool,
        smooth: UpdateMap | None = None,
    ) -> None:
        self.config, self.problem, self.most_steps = config, problem, most_steps
        self.smooth = smooth  # whose J to go by, in place of the update's own
        self.x = x.clone()
        self.stop: list[StopReason | None] = [None] * problem.num_units
        self.residual = problem.residual(x)
        operator = self._operator(problem, x)
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
        for _ in range(self.most_steps):
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
        x, residual = self.x[units], self.residual[units]
        if self.smooth is not None:
            misfit = problem.noise.energy(residual).double() / problem.update_dim
            self.ridge[units] = self.final_ridge * misfit.clamp(min=1)
        ridge = self.ridge[units]
        operator = self._operator(problem, x)
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
        self.idle[units] = torch.where(decrease < allowed, self.idle[units] + 1, 0)
        self._record(units)
        for index, unit in enumerate(units.tolist()):
            final = self.smooth is not None or bool(ridge[index] <= self.final_ridge)
            if steps.failed[index]:
                self.stop[unit] = StopReason.NOT_FINITE
            elif final and near[index]:
                self.stop[unit] = StopReason.CONVERGED
            elif final and (not moved[index] or self.idle[unit] >= _IDLE_STEPS):
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

    def _operator(self, problem: AttackProblem, x: Tensor) -> WhitenedJacobian:
        searched = problem if self.smooth is None else replace(problem, update=self.smooth)
        return WhitenedJacobian(searched.jacobian(x), problem.noise, problem.prior)

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
