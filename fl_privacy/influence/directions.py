"""The directions of the input that shaped noise protects first, for a person to see what is hidden and what is not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.lanczos import Lanczos
from fl_privacy.influence.operators import InputOperator
from fl_privacy.influence.recommendation import NoiseRecommendation


@dataclass(frozen=True, eq=False)
class ProtectedDirections:
    """Directions of the private input, those that protect most at least cost first.

    Noise of variance h along a unit vector v hides all but τ²/(τ² + h) of what is there and changes the update by
    √(vᵀGv·h). They are Ritz vectors: exact eigenvectors of G where the iteration has exhausted the space, and otherwise
    orthonormal vectors with eigenvalue vᵀGv on average, mixtures of eigenvectors that the iteration could not tell
    apart. Small eigenvalues are close together: the space that the first few span says more than each of them.

    Attributes:
        vectors: v `[U, k, D]`, orthonormal.
        eigenvalues: vᵀGv `[U, k]`, ascending.
        std: √h, the recommended noise along each, `[U, k]`.
        leakage: τ²/(τ² + h), what is left of the private input along each, `[U, k]`.
        residual: ‖Gv − (vᵀGv)v‖ over the largest Ritz value, `[U, k]`; 0 for an eigenvector.
    """

    vectors: Tensor
    eigenvalues: Tensor
    std: Tensor
    leakage: Tensor
    residual: Tensor

    @property
    def cost(self) -> Tensor:
        """Expected change of the update by the noise along each direction, to first order, `[U, k]`."""
        return (self.eigenvalues * self.std**2).sqrt()


def protected_directions(
    operator: InputOperator, recommendation: NoiseRecommendation, k: int, *, max_steps: int = 128, seed: int = 0
) -> ProtectedDirections:
    """Returns the k directions that the recommended noise protects most at least cost, by Lanczos iteration.

    Args:
        operator: Whose G shapes the noise: the units, or the public operator of a recommendation with one.
        recommendation: For as many units.
        k: How many directions.
        max_steps: Most products per unit; D give eigenvectors.
        seed: Of the start vector.

    Raises:
        InvalidInputError: k exceeds the steps, or the recommendation is for other units or has failed ones.
    """
    if not 1 <= k <= min(max_steps, operator.input_dim):
        raise InvalidInputError(f"expected 1 <= k <= {min(max_steps, operator.input_dim)}, the steps taken, got {k}")
    if recommendation.num_units != operator.num_units or recommendation.failed.any():
        raise InvalidInputError(
            f"expected a recommendation for each of {operator.num_units} units, got one for "
            f"{recommendation.num_units}, of which {int(recommendation.failed.sum())} failed"
        )
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(operator.num_units, operator.input_dim, generator=generator, dtype=torch.float64)
    lanczos = Lanczos(operator, start.to(operator.device, operator.dtype), max_steps=max_steps)
    lanczos.run(lambda state: torch.zeros_like(state.failed))
    parts = [_of_unit(lanczos, recommendation, unit, k) for unit in range(operator.num_units)]
    return ProtectedDirections(*(torch.stack(columns) for columns in zip(*parts, strict=True)))


def _of_unit(lanczos: Lanczos, recommendation: NoiseRecommendation, unit: int, k: int) -> tuple[Tensor, ...]:
    size = int(lanczos.size[unit])
    if size < k or lanczos.failed[unit]:
        raise InvalidInputError(
            f"expected at least {k} Lanczos steps in unit {unit}, got {size}: ask for fewer directions"
        )
    t, coupling = lanczos.tridiagonal()
    nodes, columns = torch.linalg.eigh(t[unit, :size, :size])
    nodes = nodes.clamp(min=0.0)
    law = recommendation.select(torch.tensor([unit], device=recommendation.level.device))
    variance = law.variance(nodes[None, :k])[0]
    vectors = columns[:, :k].T @ lanczos.basis[:size, unit].double()
    residual = coupling[unit] * columns[-1, :k].abs() / nodes[-1].clamp(min=torch.finfo(nodes.dtype).tiny)
    tau = law.prior_std[0]
    return vectors, nodes[:k], variance.sqrt(), tau**2 / (tau**2 + variance), residual
