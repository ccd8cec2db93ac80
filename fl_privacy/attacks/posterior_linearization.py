"""An attack without derivatives: a population of inputs tells what the update is like over a distance.

The update of a network with kinks (ReLU) jumps wherever a unit switches. Its J, which is taken at one point, knows of
no jump, and no search that goes by it gets near the truth. Over a cloud of inputs the same update is nearly linear: its
slope is the average of J over the cloud, jumps included, and what is left is noise whose covariance the cloud tells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_privacy.attacks.labels import labelled
from fl_privacy.attacks.noise import Noise
from fl_privacy.attacks.problem import AttackProblem
from fl_privacy.attacks.result import Reconstruction, StopReason
from fl_privacy.errors import InvalidInputError

_MOST_CHANGED = 0.7
"""Factor by which the cloud's extent changes in any direction per step, at least; its inverse at most."""
_SETTLED = 0.05
"""Change of the logarithm of the cloud's extent, the mean of all directions, below which it may be called settled."""
_NEAR = 0.25
"""Squared distance to the next mean, relative to that of a draw of the cloud, below which it may."""


@dataclass(frozen=True, kw_only=True)
class PosteriorLinearization:
    """Iterated posterior linearization (García-Fernández et al., 2015, IEEE Trans. Signal Processing 63(20)).

    The posterior is approximated by a Gaussian N(m, Σ) in the coordinates y in which the prior is N(0, τ²I), beginning
    with the prior. A step draws a population from it, computes all their updates, and fits a line to them by least
    squares: u ≈ ū + B(y − m), with residuals of covariance Ω. What is left by the line is noise like the client's own,
    so that the next approximation is the posterior of the linear problem

        shared ~ N(ū + B(y − m), C + Ω),    y ~ N(0, τ²I).

    B is the average of J over the cloud, jumps included, and Ω what no line can tell. Its rank is that of the
    population: a unit that switches moves many entries at once, and whoever takes these for independent believes too
    much of them. Where the update that was shared is further from the cloud's than these are from one another, the line
    is trusted as much less. The cloud's extent in a direction changes by a factor of 0.7 per step at most.

    Once the extent has settled, what remains is the error of drawing a population: over `averaged` further steps the
    approximations are averaged (with gains 1/2, 1/3, ..., as in stochastic approximation). A unit has converged when
    it settled.

    No derivative by the input is taken: any update map will do. A step costs as many updates as the population has
    members, and keeps three matrices of that many updates.

    Attributes:
        population: Members, relative to D: a line through them has D slopes.
        max_steps: Most steps.
        averaged: Further steps, after the extent has settled.
        seed: Of all that is drawn, the same for every unit.

    Raises:
        InvalidInputError: An option is out of range.
    """

    population: float = 4.0
    max_steps: int = 40
    averaged: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.population) and self.population >= 1.5):
            raise InvalidInputError(
                f"expected a population of at least 1.5 per input element, got {self.population}: a line through fewer "
                "leaves no residuals"
            )
        if self.max_steps < 1:
            raise InvalidInputError(f"expected max_steps >= 1, got {self.max_steps}")
        if self.averaged < 0:
            raise InvalidInputError(f"expected averaged >= 0, got {self.averaged}")

    def run(self, problem: AttackProblem) -> Reconstruction:
        """Returns the mean of the approximate posterior, for every unit.

        The history is the misfit of the population's average update.

        Raises:
            InvalidInputError: The labels are not known and cannot be recovered.
        """
        problem = labelled(problem)
        device = problem.shared.device
        units = [torch.tensor([unit], device=device) for unit in range(problem.num_units)]
        found = [_Cloud(problem.select(unit)).settle(self) for unit in units]
        history = problem.shared.new_full((max(len(one.history) for one in found), len(found)), math.nan)
        for unit, one in enumerate(found):
            history[: len(one.history), unit] = problem.shared.new_tensor(one.history)
        return Reconstruction.at(
            problem,
            torch.cat([one.inputs for one in found]),
            history=history,
            stop=[one.stop for one in found],
            products=torch.tensor([one.updates for one in found], device=device),
        )


@dataclass(frozen=True, kw_only=True)
class _Settled:
    """What became of one unit."""

    inputs: Tensor
    history: list[float]
    stop: StopReason
    updates: int


class _Cloud:
    """N(m, Σ), the approximate posterior of one unit, in coordinates in which the prior is N(0, I)."""

    def __init__(self, problem: AttackProblem) -> None:
        self._problem = problem
        self._mean = torch.zeros_like(problem.start()[0])
        self._root = torch.eye(problem.input_dim, dtype=self._mean.dtype, device=self._mean.device)

    def settle(self, attack: PosteriorLinearization) -> _Settled:
        """Returns where it ends."""
        pairs = math.ceil(attack.population * self._problem.input_dim / 2)
        generator = torch.Generator().manual_seed(attack.seed)
        history: list[float] = []
        averaged, stop = 0, StopReason.MAX_STEPS
        for _ in range(attack.max_steps + attack.averaged):
            line = self._line(pairs, generator)
            if not line.is_finite:
                stop = StopReason.NOT_FINITE
                break
            history.append(line.misfit)
            settled = self._move(line, gain=1 / (1 + averaged))
            if averaged or settled:
                stop, averaged = StopReason.CONVERGED, averaged + 1
            if averaged > attack.averaged or (not averaged and len(history) == attack.max_steps):
                break
        updates = 2 * pairs * (len(history) + (stop is StopReason.NOT_FINITE))
        return _Settled(inputs=self._inputs(self._mean[None]), history=history, stop=stop, updates=updates)

    def _inputs(self, w: Tensor) -> Tensor:
        prior = self._problem.prior
        return prior.start(len(w), self._problem.num_private) + prior.std * prior.root(w)

    def _line(self, pairs: int, generator: torch.Generator) -> _Line:
        """Fits a line to the updates of a population in pairs m ± root·z."""
        draws = torch.randn(pairs, len(self._mean), generator=generator, dtype=torch.float64).to(self._mean)
        z = torch.cat([draws, -draws])
        everyone = torch.zeros(len(z), dtype=torch.long, device=z.device)
        residuals = self._problem.select(everyone).residual(self._inputs(self._mean + z @ self._root.mT))
        return _Line.through(z, residuals, self._problem.noise)

    def _move(self, line: _Line, *, gain: float) -> bool:
        """Goes on to the next approximation, or a share of the way; returns whether it is much like the last one."""
        information = line.information / line.doubt + self._root.mT @ self._root
        precisions, basis = torch.linalg.eigh((information + information.mT) / 2)
        variances = 1 / precisions.clamp(min=torch.finfo(precisions.dtype).tiny)
        step = variances * (basis.mT @ (line.score / line.doubt - self._root.mT @ self._mean))
        limited = variances.clamp(_MOST_CHANGED**2, _MOST_CHANGED**-2)
        # As far as a posterior goes whose information is weighed so that its variances are those.
        away = (1 - variances).abs() > 1e-6
        step = step * torch.where(away, (1 - limited) / torch.where(away, 1 - variances, 1.0), 1.0)
        self._mean = self._mean + gain * (self._root @ (basis @ step))
        self._root = self._root @ (basis * (1 + gain * (limited - 1)).sqrt())
        return bool(variances.log().mean().abs() / 2 < _SETTLED and step.square().mean() < _NEAR)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Line:
    """What a line through a population's updates tells of z, the coordinates in which its cloud is N(0, I).

    Attributes:
        information: B′ᵀ(C + Ω)⁻¹B′ `[D, D]`, B′ being the slopes.
        score: B′ᵀ(C + Ω)⁻¹(shared − ū) `[D]`.
        misfit: (ū − shared)ᵀC⁻¹(ū − shared)/P.
        scatter: (u − ū)ᵀC⁻¹(u − ū)/P of a member, on average.
        update_dim: P.
    """

    information: Tensor
    score: Tensor
    misfit: float
    scatter: float
    update_dim: int

    @classmethod
    def through(cls, z: Tensor, residuals: Tensor, noise: Noise) -> _Line:
        """Returns the line through u(x) − shared `[E, P]` at z `[E, D]`, whose mean is 0, under one unit's noise.

        All of it is made of S, the products of updates weighed by C⁻¹: slopes and residuals are linear in the updates,
        and Ω, of rank E, is taken into account by Woodbury's identity.
        """
        middle = residuals.mean(0, keepdim=True)
        deviations = residuals - middle
        weighed = noise.precision(deviations)
        products, towards = weighed @ deviations.mT, -(weighed @ middle[0])
        slopes = torch.linalg.solve(z.mT @ z, z.mT)
        left = torch.eye(len(z), dtype=z.dtype, device=z.device) - z @ slopes
        scale = 1 / math.sqrt(len(z) - z.shape[1] - 1)
        of_residuals = products @ left
        across = scale * (slopes @ of_residuals)
        inner = torch.eye(len(z), dtype=z.dtype, device=z.device) + scale**2 * (left @ of_residuals)
        solved = torch.linalg.solve(inner, torch.cat([across.mT, scale * (left @ towards)[:, None]], 1))
        return cls(
            information=slopes @ products @ slopes.mT - across @ solved[:, :-1],
            score=slopes @ towards - across @ solved[:, -1],
            misfit=float(noise.energy(middle)) / residuals.shape[1],
            scatter=float(products.trace()) / (len(z) - 1) / residuals.shape[1],
            update_dim=residuals.shape[1],
        )

    @property
    def doubt(self) -> float:
        """By how much what was shared is further from the population than its members are, noise aside: 1 within it."""
        return max(1.0, (self.misfit - 1 - 5 * math.sqrt(2 / self.update_dim)) / self.scatter)

    @property
    def is_finite(self) -> bool:
        """Whether all of it is."""
        return bool(torch.isfinite(self.information).all() and torch.isfinite(self.score).all())
