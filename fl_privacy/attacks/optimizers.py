"""First-order optimisers that run many independent problems side by side and say why they stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fl_privacy.attacks.result import StopReason
from fl_privacy.errors import InvalidInputError

Objective = Callable[[Tensor], Tensor]
"""x `[L, D]` -> `[L]`, one independent objective per lane."""


@dataclass(frozen=True, eq=False)
class Minimum:
    """The best point of every lane.

    Attributes:
        x: `[L, D]`.
        value: `[L]`.
        history: `[steps, L]`, NaN after a lane has stopped.
        stop: Why, per lane.
        evaluations: Of the objective and its gradient, `[L]`.
    """

    x: Tensor
    value: Tensor
    history: Tensor
    stop: tuple[StopReason, ...]
    evaluations: Tensor


class Optimizer(Protocol):
    """What minimises an objective."""

    def minimise(self, objective_of: Callable[[Tensor], Objective], start: Tensor, *, unit: float) -> Minimum:
        """Returns the minimum of every lane.

        Args:
            objective_of: The objective of given lanes (indices).
            start: `[L, D]`.
            unit: Natural length of a step per element, in units of x.
        """


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam, with the sign of the gradient if `signed`, and a step length that falls by 10 after 3/8, 5/8 and 7/8.

    Elementwise, so that lanes run together without touching each other. The best point seen is returned.

    Attributes:
        steps: Number of steps.
        lr: Step length, relative to the natural length.
        signed: Whether only the gradient's sign is used (Geiping et al. 2020).
        gradient_rtol: A lane has converged once its gradient has fallen by this factor.
    """

    steps: int = 1000
    lr: float = 0.1
    signed: bool = False
    gradient_rtol: float = 1e-6

    def __post_init__(self) -> None:
        _check(self.steps, {"lr": self.lr, "gradient_rtol": self.gradient_rtol})

    def minimise(self, objective_of: Callable[[Tensor], Objective], start: Tensor, *, unit: float) -> Minimum:
        """Returns the best point of every lane."""
        objective = objective_of(torch.arange(len(start), device=start.device))
        x = start.clone().requires_grad_()
        adam = torch.optim.Adam([x], lr=self.lr * unit)
        milestones = sorted({max(1, self.steps * part // 8) for part in (3, 5, 7)})
        schedule = torch.optim.lr_scheduler.MultiStepLR(adam, milestones, gamma=0.1)
        best, best_value = start.clone(), start.new_full((len(start),), math.inf)
        first = norm = None
        history = []
        for _ in range(self.steps):
            value, gradient = _value_and_gradient(objective, x)
            better = value < best_value
            best[better], best_value[better] = x.detach()[better], value[better]
            history.append(value)
            norm = torch.linalg.vector_norm(gradient, dim=-1)
            first = norm if first is None else first
            if not (norm > self.gradient_rtol * first).any():
                break
            x.grad = gradient.sign() if self.signed else gradient
            adam.step()
            schedule.step()
        assert first is not None
        assert norm is not None
        stop = tuple(
            _reason(value, ratio <= self.gradient_rtol, StopReason.MAX_STEPS)
            for value, ratio in zip(best_value.tolist(), _ratio(norm, first).tolist(), strict=True)
        )
        spent = torch.full((len(start),), len(history), device=start.device)
        return Minimum(best, best_value, torch.stack(history), stop, spent)


@dataclass(frozen=True, kw_only=True)
class LBFGS:
    """L-BFGS with a strong Wolfe line search, lane by lane: its steps depend on all that they minimise.

    Attributes:
        steps: Most iterations.
        memory: Number of past steps that make up its curvature.
        gradient_rtol: A lane has converged once its gradient has fallen by this factor.
    """

    steps: int = 300
    memory: int = 50
    gradient_rtol: float = 1e-6

    def __post_init__(self) -> None:
        _check(self.steps, {"memory": self.memory, "gradient_rtol": self.gradient_rtol})

    def minimise(self, objective_of: Callable[[Tensor], Objective], start: Tensor, *, unit: float) -> Minimum:
        """Returns the last point of every lane, which is its best."""
        lanes = [
            self._minimise_lane(objective_of(torch.tensor([lane], device=start.device)), start[lane, None], unit)
            for lane in range(len(start))
        ]
        steps = max(len(lane.history) for lane in lanes)
        pad = [lane.history.new_full((steps - len(lane.history), 1), math.nan) for lane in lanes]
        return Minimum(
            torch.cat([lane.x for lane in lanes]),
            torch.cat([lane.value for lane in lanes]),
            torch.cat([torch.cat([lane.history, rest]) for lane, rest in zip(lanes, pad, strict=True)], dim=1),
            tuple(reason for lane in lanes for reason in lane.stop),
            torch.cat([lane.evaluations for lane in lanes]),
        )

    def _minimise_lane(self, objective: Objective, start: Tensor, unit: float) -> Minimum:
        # In units of the natural length, with a gradient of norm 1 at first, torch's absolute tolerances are relative.
        z = torch.zeros_like(start).requires_grad_()
        _, gradient = _value_and_gradient(objective, start)
        first = torch.linalg.vector_norm(gradient).item() * unit
        scale = 1.0 / first if math.isfinite(first) and first > 0 else 1.0
        history: list[Tensor] = []
        norms: list[float] = []

        def closure() -> Tensor:
            value, slope = _value_and_gradient(objective, start + unit * z.detach())
            z.grad = slope * (unit * scale)
            history.append(value)
            norms.append(torch.linalg.vector_norm(z.grad).item())
            return scale * value.sum()

        lbfgs = torch.optim.LBFGS(
            [z],
            lr=1.0,
            max_iter=self.steps,
            max_eval=4 * self.steps,
            history_size=self.memory,
            tolerance_grad=0.0,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )
        lbfgs.step(closure)  # type: ignore[no-untyped-call]
        x = start + unit * z.detach()
        value, slope = _value_and_gradient(objective, x)
        converged = torch.linalg.vector_norm(slope).item() * unit * scale <= self.gradient_rtol
        spent = lbfgs.state[z].get("n_iter", 0)
        unconverged = StopReason.MAX_STEPS if spent >= self.steps else StopReason.STALLED
        stop = _reason(value.item(), converged, unconverged)
        return Minimum(x, value, torch.stack(history), (stop,), torch.tensor([len(history) + 2], device=start.device))


def _value_and_gradient(objective: Objective, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        value = objective(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def _reason(value: float, converged: bool, otherwise: StopReason) -> StopReason:
    if not math.isfinite(value):
        return StopReason.NOT_FINITE
    return StopReason.CONVERGED if converged else otherwise


def _ratio(norm: Tensor, first: Tensor) -> Tensor:
    return norm / first.clamp(min=torch.finfo(first.dtype).tiny)


def _check(steps: int, numbers: Mapping[str, float]) -> None:
    if steps < 1:
        raise InvalidInputError(f"expected steps >= 1, got {steps}")
    for name, number in numbers.items():
        if not (math.isfinite(number) and number > 0):
            raise InvalidInputError(f"expected a finite {name} > 0, got {number}")
