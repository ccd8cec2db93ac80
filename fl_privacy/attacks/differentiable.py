"""The update of many units as a function that autograd differentiates once, for attacks by gradient descent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fl_privacy.attacks.problem import AttackProblem
from fl_privacy.influence.update import Linearization


class DifferentiableUpdate:
    """x ↦ u(x), for any update map; its derivative is the engine's Jᵀw.

    Args:
        problem: U units, with labels.
    """

    def __init__(self, problem: AttackProblem) -> None:
        self.problem = problem
        self._theta = problem.update.layout.flatten(problem.params)
        self._labels = problem.known_labels
        # Validates the arguments once, and measures how many graphs fit into memory at a time.
        self._lanes = problem.jacobian(problem.start()).lanes_per_pass

    def __call__(self, x: Tensor) -> Tensor:
        """Returns u(x) `[U, P]` for private inputs `[U, D]`."""
        updated: Tensor = _Update.apply(self.problem.batches(x), self)
        return updated

    def linearizations(self, inputs: Tensor) -> list[tuple[slice, Linearization]]:
        """Returns u and J at whole batches `[U, N, *shape]`, in chunks that fit into memory one at a time."""
        chunks = [slice(i, i + self._lanes) for i in range(0, len(inputs), self._lanes)]
        return [(chunk, self._linearize(inputs[chunk], self._labels[chunk], len(chunks) == 1)) for chunk in chunks]

    def _linearize(self, inputs: Tensor, labels: Tensor, retain: bool) -> Linearization:
        theta = self._theta.expand(len(inputs), -1)
        return self.problem.update.linearize(self.problem.params, theta, inputs, labels, retain=retain)


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, source: DifferentiableUpdate) -> Tensor:
        ctx.parts = source.linearizations(inputs)
        return torch.cat([part.update() for _, part in ctx.parts])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, update_bar: Tensor) -> tuple[Tensor, None]:
        return torch.cat([part.vjp(update_bar[chunk]) for chunk, part in ctx.parts]), None
