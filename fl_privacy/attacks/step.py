"""Damped Gauss–Newton steps of many units, every damping from one Krylov space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fl_privacy.attacks.noise import Noise
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.lanczos import Lanczos
from fl_privacy.influence.prior import GaussianPrior


@dataclass(frozen=True, eq=False)
class WhitenedJacobian:
    """C^(−½)JK: updates in units of their noise by inputs in the coordinates of their prior, for Lanczos iteration."""

    jacobian: UpdateJacobian
    noise: Noise
    prior: GaussianPrior

    @property
    def num_units(self) -> int:
        """U."""
        return self.jacobian.num_units

    def gram(self, vectors: Tensor) -> Tensor:
        """Returns M·v = KᵀJᵀC⁻¹JK·v `[U, D]`."""
        return self.prior.root_transpose(self.noise.gram(self.jacobian, self.prior.root(vectors)))

    def select(self, units: Tensor) -> WhitenedJacobian:
        """Returns the operator of the given units."""
        return WhitenedJacobian(self.jacobian.select(units), self.noise.select(units), self.prior)

    def largest(self, start: Tensor, *, steps: int = 12) -> Tensor:
        """Returns a close lower estimate of λ_max(M) `[U]`, from start vectors `[U, D]`."""
        lanczos = Lanczos(self, start, max_steps=steps)
        lanczos.run(lambda state: torch.zeros_like(state.failed))
        t, _ = lanczos.tridiagonal()
        taken = torch.arange(t.shape[-1], device=t.device) < lanczos.size[:, None]
        padding = torch.diag_embed(torch.where(taken, 0.0, torch.diagonal(t, dim1=-2, dim2=-1)))
        largest: Tensor = torch.linalg.eigvalsh(t - padding)[:, -1]
        return largest


@dataclass(frozen=True, eq=False)
class Decrement:
    """bᵀ(M + ρ)⁻¹b `[U]`, the squared distance to the minimum of the linearised objective in its own metric.

    Attributes:
        lower: What the Krylov space has found (Gauss quadrature).
        upper: What there is at most (Gauss–Radau quadrature with a node at 0).
    """

    lower: Tensor
    upper: Tensor


class GaussNewtonSteps:
    """Solutions of (M + ρI)p = b, M = KᵀJᵀC⁻¹JK, for every ρ at least as large as the one that was iterated for.

    Lanczos iteration from b; one Krylov space serves all ρ, so trying another damping takes no product.

    Args:
        operator: M of U units.
        target: b `[U, D]`, minus half the gradient of the objective.
        ridge: ρ `[U]`, the smallest that will be asked for.
        rtol: Stop a unit once its decrement is known to this share.
        atol: Or once what may be missing from it is below this.
        max_steps: Most products per unit.
    """

    def __init__(
        self, operator: WhitenedJacobian, target: Tensor, ridge: Tensor, *, rtol: float, atol: float, max_steps: int
    ) -> None:
        self._lanczos = Lanczos(operator, target, max_steps=max_steps)

        def solved(_: Lanczos) -> Tensor:
            found = self.decrement(ridge)
            return found.upper - found.lower <= torch.clamp(rtol * found.lower, min=atol)

        self._lanczos.run(solved, check_every=8)

    @property
    def products(self) -> Tensor:
        """Products spent on each unit, `[U]`."""
        return self._lanczos.size

    @property
    def failed(self) -> Tensor:
        """Units whose products were not finite, `[U]`."""
        return self._lanczos.failed

    def decrement(self, ridge: Tensor) -> Decrement:
        """Returns the bounds of bᵀ(M + ρ)⁻¹b for ρ `[U]`.

        With y = (T + ρ)⁻¹e₁ the lower bound is ‖b‖²y₁. Growing T by a step that gives it an eigenvalue 0 adds
        β²y_K²/(ρ + β²[(T⁻¹)_KK − ((T + ρ)⁻¹)_KK]), K being the last step and β its coupling.
        """
        t, coupling = self._lanczos.tridiagonal()
        eye = torch.eye(t.shape[-1], dtype=t.dtype, device=t.device)
        last = eye[(self._lanczos.size - 1).clamp(min=0)]
        first = eye[:, 0].expand(len(t), -1)
        y, z = _solve(t, ridge, torch.stack([first, last], -1)).unbind(-1)
        # A little more than T, so that rounding in its smallest eigenvalue can only raise the upper bound.
        jitter = 8 * torch.finfo(t.dtype).eps * torch.diagonal(t, dim1=-2, dim2=-1).amax(-1)
        z_at_zero = _solve(t, jitter, last[..., None]).squeeze(-1)
        growth = (coupling * (last * y).sum(-1)) ** 2
        pivot = ridge + coupling**2 * (last * (z_at_zero - z)).sum(-1).clamp(min=0)
        scale = self._lanczos.start_norm.double() ** 2
        return Decrement(scale * y[:, 0], scale * (y[:, 0] + growth / pivot))

    def step(self, ridge: Tensor) -> Tensor:
        """Returns p `[U, D]` for ρ `[U]`."""
        t, _ = self._lanczos.tridiagonal()
        first = torch.zeros(t.shape[:2], dtype=t.dtype, device=t.device)
        first[:, 0] = 1.0
        y = _solve(t, ridge, first[..., None]).squeeze(-1)
        taken = torch.arange(t.shape[-1], device=t.device) < self._lanczos.size[:, None]
        weights = torch.where(taken, y * self._lanczos.start_norm.double()[:, None], 0.0)
        basis = self._lanczos.basis[: t.shape[-1]]
        return torch.einsum("kud,uk->ud", basis, weights.to(basis.dtype))


def _solve(t: Tensor, ridge: Tensor, rhs: Tensor) -> Tensor:
    eye = torch.eye(t.shape[-1], dtype=t.dtype, device=t.device)
    solution: Tensor = torch.linalg.solve_ex(t + ridge.to(t)[:, None, None] * eye, rhs)[0]
    return solution
