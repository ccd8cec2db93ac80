"""Lanczos iteration with full reorthogonalisation, on many symmetric operators at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class GramOperator(Protocol):
    """What Lanczos needs of an operator: products with one symmetric positive semi-definite matrix per unit."""

    @property
    def num_units(self) -> int:
        """U."""

    def gram(self, vectors: Tensor) -> Tensor:
        """Returns G·v `[U, D]` for v `[U, D]`."""

    def select(self, units: Tensor) -> GramOperator:
        """Returns the operator of the given units."""


class Lanczos:
    """Krylov decompositions G Q = Q T + β q eᵀ, one for each of U units.

    T is tridiagonal with diagonal α and off-diagonal β; Q is orthonormal, kept so by orthogonalising every new vector
    twice against all before it. Units are dropped from the products as they stop; a unit's decomposition is its first
    `size` steps.

    Args:
        operator: The units' operators.
        start: Start vectors `[U, D]`, need not be normalised.
        max_steps: Most steps to take; at most D are.

    Attributes:
        size: Steps taken, which are also the products spent, `[U]`.
        failed: Units whose products were not finite, `[U]`.
        start_norm: Norms of the start vectors, `[U]`.
        basis: Orthonormal vectors q, `[steps + 1, U, D]`.
    """

    def __init__(self, operator: GramOperator, start: Tensor, *, max_steps: int) -> None:
        units, dim = start.shape
        self._steps_allowed = min(max_steps, dim)
        self.start_norm = torch.linalg.vector_norm(start, dim=-1)
        self._alpha = torch.zeros(units, self._steps_allowed, dtype=torch.float64, device=start.device)
        self._beta = torch.zeros_like(self._alpha)
        self.size = torch.zeros(units, dtype=torch.long, device=start.device)
        self.basis = start.new_zeros(self._steps_allowed + 1, units, dim)
        self.basis[0] = start / self.start_norm[:, None].clamp(min=torch.finfo(start.dtype).tiny)
        self.failed = ~torch.isfinite(self.start_norm)
        # A decomposition ends where its Krylov space is exhausted: there T has all that G does to the start vector.
        self._ended = self.start_norm == 0
        self._operator = operator
        self._units = torch.arange(units, device=start.device)

    def run(self, stop: Callable[[Lanczos], Tensor], *, check_every: int = 4) -> None:
        """Takes steps until `stop`, a mask `[U]` of the units that need no more, holds for all, or none are allowed."""
        stopped = self._ended | self.failed
        for step in range(self._steps_allowed):
            if step % check_every == 0 and step > 0:
                stopped = stopped | stop(self)
            stopped = stopped | self._ended | self.failed
            going = ~stopped[self._units]
            if not going.any():
                return
            if going.sum() <= len(self._units) // 2:
                # Fewer lanes, one new linearisation: worth it once half of them are idle.
                keep = going.nonzero().squeeze(1)
                self._operator, self._units = self._operator.select(keep), self._units[keep]
                going = going[keep]
            self._step(step, going)

    def _step(self, k: int, going: Tensor) -> None:
        units = self._units
        everything = len(units) == self.basis.shape[1]  # an index would copy the whole basis
        past = self.basis[: k + 1] if everything else self.basis[: k + 1, units]
        r = self._operator.gram(past[k])
        alpha = (past[k].double() * r.double()).sum(-1)
        for _ in range(2):
            r = r - torch.einsum("kud,ku->ud", past, torch.einsum("kud,ud->ku", past, r))
        beta = torch.linalg.vector_norm(r.double(), dim=-1)
        finite = torch.isfinite(alpha) & torch.isfinite(beta)
        self.failed[units] |= ~finite
        going = going & finite
        self._alpha[units, k] = torch.where(going, alpha, 0.0)
        self.size[units] += going
        scale = self._alpha[units, : k + 1].amax(-1) + self._beta[units, : k + 1].amax(-1)
        exhausted = beta <= 8 * torch.finfo(r.dtype).eps * scale
        if k + 1 == r.shape[-1]:
            exhausted = torch.ones_like(exhausted)
        self._ended[units] |= exhausted
        beta = torch.where(going & ~exhausted, beta, 0.0)
        self._beta[units, k] = beta
        next_vector = r / torch.where(beta > 0, beta, 1.0)[:, None].to(r.dtype)
        self.basis[k + 1, units] = torch.where((beta > 0)[:, None], next_vector, 0.0)

    def tridiagonal(self) -> tuple[Tensor, Tensor]:
        """Returns T `[U, K, K]` in float64 and the coupling β of each decomposition's last step, `[U]`.

        K is the longest decomposition's; a shorter one is continued by decoupled ones on the diagonal, which no
        function of T that starts from e₁ can see.
        """
        steps = max(1, int(self.size.max()))
        taken = torch.arange(steps, device=self.size.device) < self.size[:, None]
        alpha = torch.where(taken, self._alpha[:, :steps], 1.0)
        beta = torch.where(taken[:, 1:], self._beta[:, : steps - 1], 0.0)  # β_k couples steps k and k + 1
        t = torch.diag_embed(alpha) + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)
        last = (self.size - 1).clamp(min=0)
        return t, self._beta.gather(1, last[:, None]).squeeze(1)

    def solve(self, ridge: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the solution of (T + ε)y = e₁ `[U, K]` for ε `[U]`, and the residual it leaves, β_K·|y_K| `[U]`."""
        t, coupling = self.tridiagonal()
        eye = torch.eye(t.shape[-1], dtype=t.dtype, device=t.device)
        solvable = torch.where(self.failed[:, None, None], eye, t + ridge[:, None, None] * eye)
        y, _ = torch.linalg.solve_ex(solvable, eye[:, 0].expand(len(t), -1))
        last = y.gather(-1, (self.size - 1).clamp(min=0)[:, None]).squeeze(-1)
        return y, coupling * last.abs()

    def combined(self, coefficients: Tensor) -> Tensor:
        """Returns ‖start‖·Σ_k c_k q_k `[U, D]` for c `[U, K]`; NaN where products were not finite."""
        taken = torch.arange(coefficients.shape[-1], device=self.size.device) < self.size[:, None]
        weights = torch.where(taken, coefficients * self.start_norm.double()[:, None], 0.0).to(self.basis)
        combination = torch.einsum("kud,uk->ud", self.basis[: coefficients.shape[-1]], weights)
        return torch.where(self.failed[:, None], torch.nan, combination)


def basis_bytes(input_dim: int, dtype: torch.dtype, max_steps: int) -> int:
    """Returns the size of one unit's basis after so many steps."""
    return (min(max_steps, input_dim) + 1) * input_dim * dtype.itemsize


def function_of_gram(
    operator: GramOperator, f: Callable[[Tensor], Tensor], vectors: Tensor, max_steps: int = 256
) -> Tensor:
    """Returns f(G)·v `[U, D]` by Lanczos iteration from v: exact where D steps are allowed.

    Args:
        operator: U units.
        f: Of eigenvalues `[U, K]`.
        vectors: v `[U, D]`, not zero.
        max_steps: Most products per unit. NaN for one whose products are not finite.
    """
    lanczos = Lanczos(operator, vectors, max_steps=max_steps)
    lanczos.run(lambda state: torch.zeros_like(state.failed))
    t, _ = lanczos.tridiagonal()
    nodes, ritz = torch.linalg.eigh(torch.where(lanczos.failed[:, None, None], 0.0, t))
    return lanczos.combined(torch.einsum("ukj,uj->uk", ritz, f(nodes.clamp(min=0)) * ritz[:, 0, :]))
