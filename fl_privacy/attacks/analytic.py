"""Inputs that a first linear layer writes into its own gradient.

For z = Wx + b and one example, ∂L/∂W = (∂L/∂z)xᵀ and ∂L/∂b = ∂L/∂z: every row of the one divided by its entry of the
other is x. In a batch that holds of the rows that a single example activates (Boenisch et al.: When the Curious Abandon
Honesty, arXiv 2112.02918).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_privacy.attacks.labels import labelled
from fl_privacy.attacks.layers import input_layer, mean_gradient
from fl_privacy.attacks.problem import AttackProblem
from fl_privacy.attacks.result import Reconstruction, StopReason
from fl_privacy.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class LinearLayerLeak:
    """Reads one example per unit off the first layer, in closed form.

    x̂ = Σ b'_i W'_i / Σ b'_i² over the rows, the least-squares solution of W' = b'xᵀ: exact without noise.
    """

    def run(self, problem: AttackProblem) -> Reconstruction:
        """Returns the example of every unit.

        Raises:
            InvalidInputError: The input does not enter a linear layer with bias, or batches hold more than one example
                (`leaked_examples` serves those).
        """
        if problem.num_examples != 1:
            raise InvalidInputError(
                f"expected one example per unit, got batches of {problem.num_examples}: use leaked_examples"
            )
        problem = labelled(problem)
        weight, bias = _gradients(problem)
        power = bias.square().sum(-1)
        leaks = power > 0
        x = torch.einsum("uo,uoi->ui", bias, weight) / torch.where(leaks, power, 1.0)[:, None]
        x = torch.where(leaks[:, None], x, problem.start())  # nothing was read
        stop = [StopReason.CONVERGED if read else StopReason.STALLED for read in leaks.tolist()]
        return Reconstruction.at(
            problem,
            x,
            history=x.new_zeros(0, problem.num_units),
            stop=stop,
            products=torch.zeros(problem.num_units, dtype=torch.long, device=x.device),
        )


@dataclass(frozen=True, eq=False)
class LeakedExamples:
    """Examples read off a batch's first layer.

    Attributes:
        inputs: `[K, *shape]`, most supported first.
        rows: Number of rows that agree on each, `[K]`.
    """

    inputs: Tensor
    rows: Tensor


def leaked_examples(problem: AttackProblem, *, rtol: float = 1e-3, min_rows: int = 2) -> tuple[LeakedExamples, ...]:
    """Returns the examples of each unit's batch that alone activate some rows of the first layer.

    A row W'_i/b'_i is an example where one example alone activates it, else a mixture. An example repeats in every row
    that is its own; a mixture does not, its weights differing from row to row. So an example is believed once
    `min_rows` rows agree on it.

    Args:
        problem: U units; labels are not needed.
        rtol: Largest distance between rows that agree, relative to √d·τ.
        min_rows: Rows that must agree. 1 takes every row, mixtures included.

    Raises:
        InvalidInputError: The input does not enter a linear layer with bias, or an option is out of range.
    """
    if not rtol > 0 or min_rows < 1:
        raise InvalidInputError(f"expected rtol > 0 and min_rows >= 1, got {rtol} and {min_rows}")
    weight, bias = _gradients(problem)
    distance = rtol * problem.prior.std * math.sqrt(problem.prior.mean.numel())
    return tuple(_agreeing(problem, w, b, distance, min_rows) for w, b in zip(weight, bias, strict=True))


def _agreeing(problem: AttackProblem, weight: Tensor, bias: Tensor, distance: float, min_rows: int) -> LeakedExamples:
    active = bias.abs() > 1e3 * torch.finfo(bias.dtype).eps * bias.abs().amax()
    weight, bias = weight[active], bias[active]
    candidates = weight / bias[:, None]
    agree = torch.cdist(candidates, candidates) <= distance
    found: list[Tensor] = []
    support: list[int] = []
    left = torch.ones(len(candidates), dtype=torch.bool, device=bias.device)
    while left.any():
        votes = torch.where(left, (agree & left).sum(-1), 0)
        chosen = agree[votes.argmax()] & left
        if chosen.sum() < min_rows:
            break
        found.append((bias[chosen] @ weight[chosen]) / bias[chosen].square().sum())
        support.append(int(chosen.sum()))
        left &= ~chosen
    shape = problem.prior.mean.shape
    inputs = torch.stack(found).reshape(-1, *shape) if found else problem.prior.mean.new_zeros(0, *shape)
    return LeakedExamples(inputs, torch.tensor(support, dtype=torch.long, device=bias.device))


def _gradients(problem: AttackProblem) -> tuple[Tensor, Tensor]:
    """Returns ∂L/∂W `[U, out, in]` and ∂L/∂b `[U, out]` of the layer that the input enters."""
    layer = input_layer(problem)
    gradient = mean_gradient(problem)
    return gradient[f"{layer.name}.weight"], gradient[f"{layer.name}.bias"]
