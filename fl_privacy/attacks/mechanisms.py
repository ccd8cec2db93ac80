"""What clients do to an update before they share it, and what an attacker who knows that believes of the difference."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_privacy.attacks.attack import Attack
from fl_privacy.attacks.noise import IndependentNoise, IsotropicNoise, Noise
from fl_privacy.attacks.reweighting import LeastPowers
from fl_privacy.errors import InvalidInputError

_ROUNDING_POWER = 8
"""p of the attack on rounding errors: its error is √(3/(2p − 1)) of that of least squares, 0.45."""
PRECISION = 1e-6
"""Share of its root mean square to which an update is known that was shared as it is, in float32."""


class Mechanism(ABC):
    """A defence of updates `[U, P]`. Nothing in `noise` is known only to the client."""

    @abstractmethod
    def apply(self, update: Tensor, generator: torch.Generator) -> Tensor:
        """Returns what is shared of undefended updates `[U, P]`, any common factor taken out."""

    @abstractmethod
    def noise(self, shared: Tensor) -> Noise:
        """Returns what an attacker believes of shared − u(x), who sees `shared` `[U, P]` and knows the mechanism.

        By its power: the weights of least squares.
        """

    def equivalent(self, shared: Tensor) -> Noise:
        """Returns the Gaussian noise that would leave as much to whoever uses the shape of this mechanism's, too."""
        return self.noise(shared)

    def attack(self, shared: Tensor, least_squares: Attack) -> Attack:
        """Returns the attack that uses that shape, made of one for Gaussian noise; `shared` is of one unit."""
        return least_squares


@dataclass(frozen=True, kw_only=True)
class NoDefence(Mechanism):
    """The update as it is, known to the precision of float32."""

    def apply(self, update: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the update."""
        return update

    def noise(self, shared: Tensor) -> Noise:
        """Returns noise of 1e-6 of the update's root mean square."""
        return IsotropicNoise(_rounding(shared))


@dataclass(frozen=True, kw_only=True)
class AddedNoise(Mechanism):
    """Independent noise on every entry; with clipping before it, the factor of the clipping is divided out again.

    Attributes:
        std: Standard deviation per parameter, in units of the undefended update.
        laplace: Whether it is Laplace's instead of Gaussian.

    Raises:
        InvalidInputError: The standard deviation is not finite and positive.
    """

    std: float
    laplace: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.std) and self.std > 0):
            raise InvalidInputError(f"expected a finite noise std > 0, got {self.std}")

    def apply(self, update: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the update with noise."""
        if not self.laplace:
            noise = torch.randn(update.shape, generator=generator, dtype=torch.float64)
        else:
            # The difference of two exponential variables is Laplace's with b = 1, of variance 2.
            halves = [torch.empty(update.shape, dtype=torch.float64).exponential_(generator=generator) for _ in "ab"]
            noise = (halves[0] - halves[1]) / math.sqrt(2)
        return update + self.std * noise.to(update)

    def noise(self, shared: Tensor) -> Noise:
        """Returns Gaussian noise of the same power."""
        return _isotropic(shared, self.std)

    def equivalent(self, shared: Tensor) -> Noise:
        """Returns noise of the same Fisher information, 1/σ² for Gaussian noise and 2/σ² for Laplace's."""
        return _isotropic(shared, self.std / math.sqrt(2) if self.laplace else self.std)

    def attack(self, shared: Tensor, least_squares: Attack) -> Attack:
        """Returns least absolute deviations against Laplace's noise."""
        if not self.laplace:
            return least_squares
        return LeastPowers(attack=least_squares, power=1, scale=self.std / math.sqrt(2))


@dataclass(frozen=True, kw_only=True)
class Pruning(Mechanism):
    """Shares the entries of largest magnitude; the others are zero.

    An attacker sees which entries are zero. What is not zero is exact, and what is zero was smaller than the smallest
    entry that is not.

    Attributes:
        share: Of the entries that are pruned away, in [0, 1).

    Raises:
        InvalidInputError: The share is out of range.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise InvalidInputError(f"expected a share in [0, 1), got {self.share}")

    def apply(self, update: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the update pruned, unit by unit."""
        kept = math.ceil((1 - self.share) * update.shape[-1])
        threshold = update.abs().topk(kept, dim=-1).values[:, -1:]
        return torch.where(update.abs() >= threshold, update, 0.0)

    def noise(self, shared: Tensor) -> Noise:
        """Returns rounding errors for entries that were kept, and threshold/√3 for those that were not.

        The latter is the standard deviation of a uniform distribution up to the threshold.
        """
        magnitude = shared.abs()
        kept = magnitude > 0
        threshold = torch.where(kept, magnitude, math.inf).amin(-1, keepdim=True)
        std = torch.where(kept, _rounding(shared)[:, None].to(shared), threshold / math.sqrt(3))
        return IndependentNoise(std.nan_to_num(posinf=math.inf))


@dataclass(frozen=True, kw_only=True)
class UniformQuantization(Mechanism):
    """Rounds every entry to a multiple of max|u|/(2^(bits − 1) − 1): int8 with one scale for all is 8 bits.

    Attributes:
        bits: Of one entry with its sign, at least 2; a fraction of a bit is a step in between.

    Raises:
        InvalidInputError: Fewer bits than 2.
    """

    bits: float = 8

    def __post_init__(self) -> None:
        if not self.bits >= 2:
            raise InvalidInputError(f"expected bits >= 2, got {self.bits}")

    def apply(self, update: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the update rounded."""
        step = self._step(update)
        return (update / step).round() * step

    def noise(self, shared: Tensor) -> Noise:
        """Returns the errors of rounding to a known step, of standard deviation step/√12."""
        return IsotropicNoise((self._step(shared) / math.sqrt(12)).squeeze(-1).double())

    def equivalent(self, shared: Tensor) -> Noise:
        """Returns the noise that the attack by least eighth powers leaves, of standard deviation step/(2√15).

        No bound: errors that end at half a step have no finite Fisher information, and a better attack leaves less.
        """
        std = self._step(shared) / 2 / math.sqrt(2 * _ROUNDING_POWER - 1)
        return IsotropicNoise(std.squeeze(-1).double())

    def attack(self, shared: Tensor, least_squares: Attack) -> Attack:
        """Returns least eighth powers, with a scale by which they weigh against a prior as `equivalent` says."""
        half, p = float(self._step(shared)) / 2, _ROUNDING_POWER
        return LeastPowers(attack=least_squares, power=p, scale=half**p / (2 * p - 1))

    def _step(self, like: Tensor) -> Tensor:
        return like.abs().amax(-1, keepdim=True) / (2 ** (self.bits - 1) - 1)


@dataclass(frozen=True, kw_only=True)
class HalfPrecision(Mechanism):
    """Rounds every entry to float16."""

    def apply(self, update: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the update rounded."""
        return update.half().to(update.dtype)

    def noise(self, shared: Tensor) -> Noise:
        """Returns for each entry the error of rounding in float16: 2⁻¹¹|u|/√3, or 2⁻²⁵/√3 at least."""
        return IndependentNoise((shared.abs() * 2.0**-11).clamp(min=2.0**-25) / math.sqrt(3))


def _isotropic(shared: Tensor, std: float) -> IsotropicNoise:
    return IsotropicNoise(torch.full((len(shared),), std, dtype=torch.float64, device=shared.device))


def _rounding(shared: Tensor) -> Tensor:
    rms = shared.double().square().mean(-1).sqrt()
    return (PRECISION * rms).clamp(min=torch.finfo(torch.float32).tiny)
