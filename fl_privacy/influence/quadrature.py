"""Gauss and Gauss–Radau quadrature for the spectral distribution of a matrix, from a Lanczos decomposition.

For a unit start vector z, zᵀf(G)z is an integral of f over the eigenvalues of G. Lanczos gives the nodes and weights
of its Gauss rule: the eigenvalues of T and the squared first entries of its eigenvectors. With a node prescribed at 0,
left of the whole spectrum, it is a Gauss–Radau rule. For a completely monotone f (1/(λ+ε) and its powers are) Gauss is
a lower bound of the integral and Gauss–Radau an upper one (Golub and Meurant, Matrices, Moments and Quadrature, ch. 6).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fl_privacy.influence.lanczos import Lanczos


@dataclass(frozen=True)
class QuadratureRule:
    """Nodes and weights of the spectral distributions of U units, one rule for each of S probes.

    Attributes:
        nodes: Eigenvalue positions `[S, U, K]`, float64, not negative.
        weights: `[S, U, K]`, summing to one over K; NaN for a unit that could not be solved.
    """

    nodes: Tensor
    weights: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """Returns ∫ f, averaged over the probes, `[U]`, for the values of f at the nodes."""
        return self.mean_by_probe(values).mean(0)

    def mean_by_probe(self, values: Tensor) -> Tensor:
        """Returns ∫ f `[S, U]`, for the values of f at the nodes."""
        return (self.weights * values).sum(-1)

    def neighbours(self, low: Tensor, high: Tensor, *, bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """Returns, for an increasing f, its values at the next node below and above each node.

        Nodes without weight are passed over.

        Args:
            low: Values of f at the nodes `[S, U, K]`, or less.
            high: Values of f at the nodes, or more.
            bottom: Value below every eigenvalue, `[S, U, 1]`.
            top: Value above every eigenvalue, `[S, U, 1]`.
        """
        present = self.weights > 0
        below = torch.where(present, low, bottom).cummax(-1).values
        above = torch.where(present, high, top).flip(-1).cummin(-1).values.flip(-1)
        return torch.cat([bottom, below[..., :-1]], -1), torch.cat([above[..., 1:], top], -1)

    @property
    def largest(self) -> Tensor:
        """The largest node that has weight, `[U]`."""
        return torch.where(self.weights > 0, self.nodes, 0.0).amax(-1).amax(0)


def gauss_rule(lanczos: Lanczos, num_probes: int) -> QuadratureRule:
    """Returns the Gauss rules of S·U decompositions, probe by probe: for completely monotone f, lower bounds."""
    t, _ = lanczos.tridiagonal()
    return _rule(t, lanczos.failed, num_probes)


def gauss_radau_rule(lanczos: Lanczos, num_probes: int) -> QuadratureRule:
    """Returns the Gauss–Radau rules with a node at 0: for completely monotone f, upper bounds.

    T grows by one step whose diagonal entry is β²·(T⁻¹)_kk = β²/d_k, with d_k the last pivot of T = L·D·Lᵀ; that makes
    the grown matrix singular, which is the node at 0.
    """
    t, coupling = lanczos.tridiagonal()
    units, steps = t.shape[:2]
    alpha = torch.diagonal(t, dim1=-2, dim2=-1)
    beta = torch.diagonal(t, offset=1, dim1=-2, dim2=-1)
    tiny = torch.finfo(torch.float64).tiny
    pivot = last_pivot = alpha[:, 0]
    for k in range(1, steps):
        pivot = alpha[:, k] - beta[:, k - 1] ** 2 / pivot.clamp(min=tiny)
        last_pivot = torch.where(lanczos.size > k, pivot, last_pivot)
    # Where rounding has used up the last pivot, T has its node at 0 already, and Gauss and Gauss–Radau agree.
    grows = (coupling > 0) & (last_pivot > torch.finfo(torch.float64).eps * alpha.amax(-1))
    grown = torch.eye(steps + 1, dtype=t.dtype, device=t.device).repeat(units, 1, 1)
    grown[:, :steps, :steps] = t
    unit = grows.nonzero().squeeze(1)
    row = lanczos.size[unit]
    grown[unit, row, row] = coupling[unit] ** 2 / last_pivot[unit]
    grown[unit, row, row - 1] = grown[unit, row - 1, row] = coupling[unit]
    return _rule(grown, lanczos.failed, num_probes)


def eigenvalue_rule(gram: Tensor, shares: Tensor | None = None) -> QuadratureRule:
    """Returns the exact rule of dense matrices G `[U, D, D]`: every eigenvalue, with weight 1/D.

    Args:
        gram: Finite, or the unit has failed.
        shares: Weights `[D]` of the axes, summing to one, of which an eigenvector has its squared components' share.
            Default: 1/D each.
    """
    failed = ~torch.isfinite(gram).flatten(1).all(-1)
    finite = torch.where(failed[:, None, None], 0.0, gram.double())
    if shares is None:
        eigenvalues = torch.linalg.eigvalsh(finite)
        weights = torch.full_like(eigenvalues, 1.0 / gram.shape[-1])
    else:
        eigenvalues, vectors = torch.linalg.eigh(finite)
        weights = torch.einsum("d,udk->uk", shares, vectors.square())
    weights[failed] = torch.nan
    return QuadratureRule(eigenvalues.clamp(min=0.0)[None], weights[None])


def _rule(t: Tensor, failed: Tensor, num_probes: int) -> QuadratureRule:
    nodes, vectors = torch.linalg.eigh(t)
    weights = torch.where(failed[:, None], torch.nan, vectors[:, 0, :] ** 2)
    shape = (num_probes, len(t) // num_probes, t.shape[-1])
    return QuadratureRule(nodes.clamp(min=0.0).reshape(shape), weights.reshape(shape))
