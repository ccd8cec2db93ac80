"""What an attacker knows of the noise between a client's update and what it shared, δ ~ N(0, C).

An attack weighs residuals by the precision C⁻¹: what is known well counts, what is drowned in noise does not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.jacobian import UpdateJacobian


class Noise(ABC):
    """Gaussian noise on the shared update of U units, known to the attacker by its covariance C."""

    @property
    @abstractmethod
    def num_units(self) -> int:
        """U."""

    @abstractmethod
    def precision(self, residual: Tensor) -> Tensor:
        """Returns C⁻¹r `[U, P]` for r `[U, P]`."""

    @abstractmethod
    def select(self, units: Tensor) -> Noise:
        """Returns the noise of the given units (indices, repeats allowed)."""

    def energy(self, residual: Tensor) -> Tensor:
        """Returns rᵀC⁻¹r `[U]`, whose expectation is P where r is this noise."""
        return (residual * self.precision(residual)).sum(-1)

    def gram(self, jacobian: UpdateJacobian, vectors: Tensor) -> Tensor:
        """Returns JᵀC⁻¹J·v `[U, D]` for v `[U, D]`."""
        return jacobian.vjp(self.precision(jacobian.jvp(vectors)))


@dataclass(frozen=True, eq=False)
class IsotropicNoise(Noise):
    """C = σ²I.

    Attributes:
        std: σ `[U]`, standard deviation per parameter. For an undefended update, the precision to which it is known.

    Raises:
        InvalidInputError: Another shape, or an entry that is not finite and positive.
    """

    std: Tensor

    def __post_init__(self) -> None:
        if self.std.ndim != 1 or not (torch.isfinite(self.std) & (self.std > 0)).all():
            raise InvalidInputError(
                f"expected finite noise stds > 0, one per unit, got shape {list(self.std.shape)}: for an update "
                "without noise, pass the precision to which it is known, for example 1e-6 of its root mean square"
            )

    @property
    def num_units(self) -> int:
        """U."""
        return len(self.std)

    def precision(self, residual: Tensor) -> Tensor:
        """Returns r/σ²."""
        return residual / self._variance(residual)

    def select(self, units: Tensor) -> IsotropicNoise:
        """Returns the noise of the given units."""
        return IsotropicNoise(self.std[units])

    def gram(self, jacobian: UpdateJacobian, vectors: Tensor) -> Tensor:
        """Returns G·v/σ²."""
        return jacobian.gram(vectors) / self._variance(vectors)

    def _variance(self, like: Tensor) -> Tensor:
        return self.std.to(like)[:, None] ** 2


@dataclass(frozen=True, eq=False)
class IndependentNoise(Noise):
    """C diagonal: a standard deviation of its own for every parameter, such as noise calibrated layer by layer.

    Attributes:
        std: `[U, P]`, positive; infinity for a parameter that says nothing, such as one that was pruned away.

    Raises:
        InvalidInputError: Another shape, or an entry that is not positive.
    """

    std: Tensor

    def __post_init__(self) -> None:
        if self.std.ndim != 2 or not (self.std > 0).all():
            raise InvalidInputError(
                f"expected noise stds > 0 of shape [units, parameters], got shape {list(self.std.shape)}"
            )

    @property
    def num_units(self) -> int:
        """U."""
        return len(self.std)

    def precision(self, residual: Tensor) -> Tensor:
        """Returns r/σ², entry by entry."""
        return residual / self.std.to(residual) ** 2

    def select(self, units: Tensor) -> IndependentNoise:
        """Returns the noise of the given units."""
        return IndependentNoise(self.std[units])
