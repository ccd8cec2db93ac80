"""Inversion influence: how far an observed perturbation moves what an attacker rebuilds.

Zhang, Hong, Deng, Mahdavi, Zhou: Understanding Deep Gradient Leakage via Inversion Influence Functions, NeurIPS 2023
(arXiv 2309.13016), Eq. 4 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.lanczos import Lanczos, basis_bytes
from fl_privacy.influence.options import check_effort, per_unit


@dataclass(frozen=True, eq=False)
class Influence:
    """The shift of the rebuilt input, and how well it was solved for.

    Attributes:
        shift: (G + εI)⁻¹ Jᵀδ `[U, D]`.
        residual: ‖Jᵀδ − (G + εI)·shift‖ / ‖Jᵀδ‖ `[U]`, recomputed from the shift.
        converged: Whether the residual is within the tolerance, `[U]`.
        products: Products with G spent on each unit, `[U]`.
    """

    shift: Tensor
    residual: Tensor
    converged: Tensor
    products: Tensor

    @property
    def norm(self) -> Tensor:
        """I²F = ‖shift‖ `[U]`, in units of the input."""
        norm: Tensor = torch.linalg.vector_norm(self.shift, dim=-1)
        return norm


def influence(
    jacobian: UpdateJacobian,
    perturbation: Tensor,
    *,
    ridge: float | Tensor,
    rtol: float = 1e-3,
    max_steps: int = 256,
) -> Influence:
    """Returns (G + εI)⁻¹ Jᵀδ and its norm, I²F (paper, Eq. 4), by Lanczos iteration from Jᵀδ.

    Args:
        jacobian: U units.
        perturbation: δ `[U, P]`, shared update minus u(x), in the order of `model.named_parameters()`.
        ridge: ε ≥ 0, number or `[U]`. The best linear-Gaussian attacker uses σ²/τ²; the paper uses 1.
        rtol: Tolerance on the relative residual.
        max_steps: Most products with G per unit, the recomputed residual's apart.

    Raises:
        InvalidInputError: Wrong shapes or dtypes, NaN or infinity in the perturbation, an option out of range.
        NotTwiceDifferentiableError: From the Jacobian.
    """
    check_effort(rtol=rtol, max_steps=max_steps)
    epsilon = per_unit(ridge, "ridge", num_units=jacobian.num_units, device=jacobian.device)
    _check_perturbation(jacobian, perturbation)
    parts = [
        _solve(chunk, perturbation[units], epsilon[units], rtol, max_steps)
        for chunk, units in jacobian.chunks(basis_bytes(jacobian.input_dim, jacobian.dtype, max_steps))
    ]
    return Influence(
        torch.cat([part.shift for part in parts]),
        torch.cat([part.residual for part in parts]),
        torch.cat([part.converged for part in parts]),
        torch.cat([part.products for part in parts]),
    )


def _solve(jacobian: UpdateJacobian, perturbation: Tensor, epsilon: Tensor, rtol: float, max_steps: int) -> Influence:
    target = jacobian.vjp(perturbation)
    lanczos = Lanczos(jacobian, target, max_steps=max_steps)
    # Half the tolerance leaves room for the rounding that the recurrence does not see.
    lanczos.run(lambda state: state.solve(epsilon)[1] <= 0.5 * rtol)
    y, _ = lanczos.solve(epsilon)
    shift = lanczos.combined(y)
    left = target - jacobian.gram(shift) - epsilon[:, None].to(shift.dtype) * shift
    norm = torch.linalg.vector_norm(target, dim=-1)
    residual = torch.where(norm > 0, torch.linalg.vector_norm(left, dim=-1) / norm, torch.zeros_like(norm))
    return Influence(shift, residual, residual <= rtol, lanczos.size + 1)


def influence_lower_bound(
    jacobian: UpdateJacobian, perturbation: Tensor, *, rtol: float = 3e-4, max_steps: int = 64
) -> Tensor:
    """Returns ‖Jᵀδ‖ / λ_max(G) `[U]` (paper, Eq. 5), which no ridge-free I²F falls below.

    λ_max is replaced by its Lanczos estimate raised by the estimate's error, and by no less than `rtol` of it, so that
    what is returned stays a lower bound: within 2·`rtol` of the exact one once Lanczos has converged.

    Args:
        jacobian: U units.
        perturbation: δ `[U, P]`.
        rtol: Relative accuracy of λ_max.
        max_steps: Most products with G per unit.

    Raises:
        InvalidInputError: Wrong shapes or dtypes, NaN or infinity in the perturbation, an option out of range.
        NotTwiceDifferentiableError: From the Jacobian.
    """
    check_effort(rtol=rtol, max_steps=max_steps)
    _check_perturbation(jacobian, perturbation)
    return torch.cat(
        [
            _bound(chunk, perturbation[units], rtol, max_steps)
            for chunk, units in jacobian.chunks(basis_bytes(jacobian.input_dim, jacobian.dtype, max_steps))
        ]
    )


def _bound(jacobian: UpdateJacobian, perturbation: Tensor, rtol: float, max_steps: int) -> Tensor:
    target = jacobian.vjp(perturbation)
    # Jᵀu leans to the largest eigenvalue already; a random part makes sure that it is not missed.
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(jacobian.input_dim, generator=generator, dtype=torch.float64).to(target)
    leaning = _normalised(jacobian.pulled_back_update())
    lanczos = Lanczos(jacobian, leaning + 0.01 * random / torch.linalg.vector_norm(random), max_steps=max_steps)

    def converged(state: Lanczos) -> Tensor:
        value, error = _largest_ritz(state)
        return error <= rtol * value

    lanczos.run(converged, check_every=1)
    value, error = _largest_ritz(lanczos)
    bound = torch.linalg.vector_norm(target, dim=-1).double() / (value + torch.maximum(error, rtol * value))
    return torch.where(lanczos.failed, torch.nan, bound.nan_to_num(nan=0.0)).to(jacobian.dtype)


def _normalised(vectors: Tensor) -> Tensor:
    """Vectors `[U, D]` of norm 1, and zeros where they are zero or not finite."""
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    usable = (norm > 0) & norm.isfinite()
    return torch.where(usable, vectors / torch.where(usable, norm, 1.0), 0.0)


def _largest_ritz(lanczos: Lanczos) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue of T `[U]`, and by how much λ_max of G may exceed it.

    With residual r = β_K·|s_K| the error is at most r, and at most r²/g with g the gap to the next eigenvalue of G,
    which may exceed that of T by as much as its own residual.
    """
    t, coupling = lanczos.tridiagonal()
    taken = torch.arange(t.shape[-1], device=t.device) < lanczos.size[:, None]
    padding = torch.diag_embed(torch.where(taken, 0.0, torch.diagonal(t, dim1=-2, dim2=-1)))
    values, vectors = torch.linalg.eigh(torch.where(lanczos.failed[:, None, None], 0.0, t - padding))
    last = (lanczos.size - 1).clamp(min=0)
    residuals = coupling[:, None] * vectors.gather(1, last[:, None, None].expand(-1, 1, t.shape[-1])).squeeze(1).abs()
    residual = residuals[:, -1]
    if values.shape[-1] == 1:
        return values[:, -1], residual
    gap = (values[:, -1] - values[:, -2] - residuals[:, -2]).clamp(min=torch.finfo(torch.float64).tiny)
    return values[:, -1], torch.minimum(residual, residual**2 / gap)


def _check_perturbation(jacobian: UpdateJacobian, perturbation: Tensor) -> None:
    expected = (jacobian.num_units, jacobian.update_dim)
    if perturbation.shape != expected:
        raise InvalidInputError(
            f"expected a perturbation of shape {list(expected)}, units by trained parameters, "
            f"got {list(perturbation.shape)}"
        )
    finite = torch.isfinite(perturbation).all(-1)
    if not finite.all():
        raise InvalidInputError(
            "expected a finite perturbation, got NaN or infinity in "
            f"units {(~finite).nonzero().squeeze(-1).tolist()[:5]}: check what was shared"
        )
