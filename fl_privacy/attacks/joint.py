"""The attack on noise that was mapped through the Jacobian: input and noise solved for together.

A client that shares u(x) + J(x)·a leaves the manifold of updates: P equations in 2D unknowns (x, a), which determine
both as soon as P exceeds 2D, however large a is. One that shares u(x + a) does not: x and a enter by their sum alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacfwd, jvp

from fl_privacy.attacks.labels import labelled
from fl_privacy.attacks.problem import AttackProblem
from fl_privacy.attacks.result import Reconstruction, StopReason, best_of
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.evaluation import audit_mode
from fl_privacy.influence.update import GradientUpdate

_STAGES = 3
"""Noise levels of the continuation, a factor of 10 apart."""
Mechanism = Literal["mapped", "shifted"]


@dataclass(frozen=True, kw_only=True)
class JointInversion:
    """Levenberg–Marquardt on (x, a), from several draws of the prior, by one who knows the mechanism.

    Minimises ‖m(x, a) − shared‖²/σ² + ‖x − μ‖²/τ² + ‖R⁻¹a‖², with m(x, a) = u(x) + J(x)·a for a `mapped` noise and
    u(x + a) for a `shifted` one, a = R·b and R a root of the noise's covariance. It forms the Jacobian of m, with 2D
    columns: it is for small inputs and gradients of whole private batches.

    Attributes:
        mechanism: What the client shared.
        root: R `[D, D]`, known to the attacker.
        num_starts: Draws of the prior to start from; the most probable result is kept.
        max_steps: Most linearisations per start.
        tolerance: Relative decrease of the objective below which a start has converged.
        seed: Of the starts.

    Raises:
        InvalidInputError: An option is out of range.
    """

    mechanism: Mechanism
    root: Tensor
    num_starts: int = 4
    max_steps: int = 100
    tolerance: float = 1e-9
    seed: int = 0

    def __post_init__(self) -> None:
        if self.root.ndim != 2 or self.root.shape[0] != self.root.shape[1]:
            raise InvalidInputError(f"expected a square root [D, D], got {list(self.root.shape)}")
        if self.num_starts < 1 or self.max_steps < 1 or not self.tolerance > 0:
            raise InvalidInputError(
                "expected num_starts >= 1, max_steps >= 1 and tolerance > 0, got "
                f"{self.num_starts}, {self.max_steps} and {self.tolerance}"
            )

    def run(self, problem: AttackProblem) -> Reconstruction:
        """Returns the most probable x of any start; the objective is that of x and a together.

        Raises:
            InvalidInputError: The update is not the gradient of a private batch, or labels are missing.
        """
        problem = labelled(problem)
        if not isinstance(problem.update, GradientUpdate) or problem.known is not None:
            raise InvalidInputError("expected gradients of batches that are private as a whole")
        if problem.prior.covariance is not None:
            raise InvalidInputError("expected a white prior: pass problem.prior.white")
        if problem.input_dim != len(self.root):
            raise InvalidInputError(f"expected a root [{problem.input_dim}, {problem.input_dim}], got {len(self.root)}")
        generator = torch.Generator().manual_seed(self.seed)
        starts = [
            problem.prior.sample(problem.num_units, problem.num_private, generator) for _ in range(self.num_starts)
        ]
        return best_of([self._from(problem, start) for start in starts])

    def _from(self, problem: AttackProblem, start: Tensor) -> Reconstruction:
        found = [self._solve(problem.select(torch.tensor([unit])), start[unit]) for unit in range(problem.num_units)]
        x, misfit, history, steps, stop = zip(*found, strict=True)
        stacked = torch.stack(list(x))
        return Reconstruction(
            inputs=problem.images(stacked),
            labels=problem.known_labels,
            objective=torch.stack([values[-1] for values in history]),
            misfit=torch.stack(list(misfit)) / problem.update_dim,
            history=torch.nn.utils.rnn.pad_sequence(list(history), padding_value=math.nan),
            stop=tuple(stop),
            products=torch.tensor([2 * problem.input_dim * count for count in steps]),
            update_dim=problem.update_dim,
        )

    def _solve(self, problem: AttackProblem, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int, StopReason]:
        """Returns x `[D]`, misfit energy, objectives `[steps]`, linearisations and why it stopped, of one unit."""
        d, tau = len(x), problem.prior.std
        mu = problem.start()[0]
        noise_std = (problem.noise.energy(torch.ones_like(problem.shared)) / problem.update_dim).rsqrt()[0]
        mechanism = self._mechanism(problem)
        y = torch.cat([(x - mu) / tau, torch.zeros_like(x)])
        steps, history = 0, []
        for stage in range(_STAGES - 1, -1, -1):  # continuation: from a loosely known update to one known exactly
            y, r, values, spent, reason = self._descend(
                mechanism, problem.shared[0], mu, tau, noise_std * 10.0**stage, y
            )
            steps += spent
            history += values
        p = problem.update_dim
        return mu + tau * y[:d], r[:p] @ r[:p], r.new_tensor(history), steps, reason

    def _descend(
        self,
        mechanism: Callable[[Tensor, Tensor], Tensor],
        shared: Tensor,
        mu: Tensor,
        tau: float,
        noise_std: Tensor,
        y: Tensor,
    ) -> tuple[Tensor, Tensor, list[float], int, StopReason]:
        """Returns y = ((x − μ)/τ, b), its residuals, objectives, linearisations spent and why it stopped, at one σ."""
        d = len(mu)

        def residual(y: Tensor) -> Tensor:
            """All residuals in units of their standard deviation, `[P + 2D]`."""
            return torch.cat([(mechanism(mu + tau * y[:d], self.root @ y[d:]) - shared) / noise_std, y])

        r, damping = residual(y), 1e-3
        history = [float(r @ r)]
        for step in range(1, self.max_steps + 1):
            j = jacfwd(residual)(y)
            if not torch.isfinite(j).all():
                return y, r, history, step, StopReason.NOT_FINITE
            gram, slope, before = j.T @ j, j.T @ r, history[-1]
            for _ in range(12):
                moved = y - torch.linalg.solve(gram + damping * torch.diag(gram.diagonal()), slope)
                tried = residual(moved)
                after = float(tried @ tried)
                if math.isfinite(after) and after < before:
                    break
                damping *= 8
            else:
                return y, r, history, step, StopReason.STALLED
            y, r, damping = moved, tried, max(damping / 10, 1e-12)
            history.append(after)
            if before - after <= self.tolerance * before:
                return y, r, history, step, StopReason.CONVERGED
        return y, r, history, self.max_steps, StopReason.MAX_STEPS

    def _mechanism(self, problem: AttackProblem) -> Callable[[Tensor, Tensor], Tensor]:
        update, labels = problem.update, problem.known_labels[0]
        trained = {name: problem.params[name].detach() for name in update.layout.names}
        constants = {name: b.detach().to(problem.shared) for name, b in update.model.named_buffers()}

        def u(x: Tensor) -> Tensor:
            def loss(params: dict[str, Tensor]) -> Tensor:
                with audit_mode(update.model, batch_norm=update.batch_norm):
                    outputs = functional_call(update.model, {**constants, **params}, (problem.images(x[None])[0],))
                return update.loss(outputs, labels)

            return torch.cat([g.reshape(-1) for g in grad(loss)(trained).values()])

        if self.mechanism == "shifted":
            return lambda x, a: u(x + a)

        def mapped(x: Tensor, a: Tensor) -> Tensor:
            value, tangent = jvp(u, (x,), (a,))[:2]
            result: Tensor = value + tangent
            return result

        return mapped
