"""Differential privacy of clipped updates with isotropic noise, and what an ε means against reconstruction.

A client that clips its update to norm C and adds N(0, σ²I) hides any of its data sets among all others: two of them
move the update by at most 2C, so it is a Gaussian mechanism with noise multiplier z = σ/(2C), in every round. ε and δ
of T rounds are accounted by Opacus. That is a worst case over data, models and attackers. *Leakage* is another number:
of one client's data, under a Gaussian prior. Neither can be read off the other; what connects them is the noise:

- for **any** attacker and model, T rounds tell at most I = T·C²/(2σ²) = T/(8z²) nats of an input of D elements, and by
  the rate–distortion function of a Gaussian source an attacker with I nats misses each element by
  rmse ≥ τ·exp(−I/D): leakage ≤ 1 − exp(−2I/D);
- for the client's own data, its spectrum tells leakage at that very σ, which is mostly far below this bound.

Shaped noise, u(x + a), is not differentially private, whatever its leakage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from fl_privacy.checks import check_count, check_positive, check_share
from fl_privacy.errors import InvalidInputError
from fl_privacy.extras import require

if TYPE_CHECKING:
    from fl_privacy.influence.spectrum import Spectrum

_ORDERS = (1.001, 1.01, 1.02, 1.05, *(1 + i / 10 for i in range(1, 100)), *range(11, 64), *(2**i for i in range(6, 20)))
_LARGEST = 1e9
"""Noise multiplier beyond which nothing is told."""


@dataclass(frozen=True, kw_only=True)
class GaussianFloor:
    """Isotropic noise on the clipped update of a client, over all rounds in which it shares one.

    Attributes:
        noise_multiplier: z = σ/(2C), the noise over the most that a client's data can move its update.
        rounds: T in which it shares an update.
        sample_rate: Probability of taking part in a round, where who took part stays secret. The server sees it:
            against the server, and in accounting per client, it is 1.

    Raises:
        InvalidInputError: A number is out of range.
    """

    noise_multiplier: float
    rounds: int = 1
    sample_rate: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self.noise_multiplier, "noise_multiplier")
        check_count(self.rounds, "rounds")
        if not 0 < self.sample_rate <= 1:
            raise InvalidInputError(f"expected sample_rate in (0, 1], got {self.sample_rate}")

    @classmethod
    def of(cls, *, noise_std: float, clip_norm: float, rounds: int = 1) -> GaussianFloor:
        """Returns the floor of noise on updates that were clipped: what is not clipped is not private.

        Args:
            noise_std: σ per parameter, in units of the update.
            clip_norm: C, in units of the update.
            rounds: T.

        Raises:
            InvalidInputError: A number is out of range.
        """
        check_positive(clip_norm, "clip_norm")
        return cls(noise_multiplier=noise_std / (2 * clip_norm), rounds=rounds)

    @classmethod
    def for_epsilon(cls, epsilon: float, *, delta: float, rounds: int = 1, sample_rate: float = 1.0) -> GaussianFloor:
        """Returns the least noise, to 1e-4 of it, whose rounds are (ε, δ)-differentially private together.

        Args:
            epsilon: ε of all rounds.
            delta: δ of all rounds.
            rounds: T.
            sample_rate: As for the class.

        Raises:
            InvalidInputError: A number is out of range, or no noise reaches this ε at this δ.
            ImportError: The extra `dp` is not installed.
        """
        check_positive(epsilon, "epsilon")
        low, high = 1e-3, 1.0
        while cls(noise_multiplier=high, rounds=rounds, sample_rate=sample_rate).epsilon(delta) > epsilon:
            low, high = high, 2 * high
            if high > _LARGEST:
                raise InvalidInputError(f"expected an epsilon that noise can reach with delta {delta}, got {epsilon}")
        while high > low * (1 + 1e-4):
            middle = math.sqrt(low * high)
            told = cls(noise_multiplier=middle, rounds=rounds, sample_rate=sample_rate).epsilon(delta)
            low, high = (middle, high) if told > epsilon else (low, middle)
        return cls(noise_multiplier=high, rounds=rounds, sample_rate=sample_rate)

    @classmethod
    def for_leakage_bound(cls, leakage: float, *, input_dim: int, rounds: int = 1) -> GaussianFloor:
        """Returns the noise at which no attacker on any model recovers more than a share of D elements' variance.

        Args:
            leakage: The share, over all rounds; the attacker's prior is Gaussian.
            input_dim: D.
            rounds: T.

        Raises:
            InvalidInputError: A number is out of range.
        """
        check_share(leakage, "leakage")
        check_count(input_dim, "input_dim")
        nats = -input_dim / 2 * math.log1p(-leakage)
        return cls(noise_multiplier=math.sqrt(rounds / (8 * nats)), rounds=rounds)

    def noise_std(self, clip_norm: float) -> float:
        """Returns σ per parameter of updates that are clipped to norm C."""
        return 2 * clip_norm * self.noise_multiplier

    def epsilon(self, delta: float) -> float:
        """Returns ε of all rounds together at a δ, never less than it is (Rényi accounting by Opacus).

        Raises:
            InvalidInputError: δ is not between 0 and 1.
            ImportError: The extra `dp` is not installed.
        """
        check_share(delta, "delta")
        analysis = require("opacus.accountants.analysis.rdp", extra="dp")
        spent = analysis.compute_rdp(
            q=self.sample_rate, noise_multiplier=self.noise_multiplier, steps=self.rounds, orders=_ORDERS
        )
        epsilon, _ = analysis.get_privacy_spent(orders=_ORDERS, rdp=spent, delta=delta)
        return max(0.0, float(epsilon))

    @property
    def information(self) -> float:
        """Most nats that all rounds together tell of a client's data, T/(8z²), taking part in every one."""
        return self.rounds / (8 * self.noise_multiplier**2)

    def leakage_bound(self, input_dim: int) -> float:
        """Returns 1 − exp(−2I/D), the share of variance that any attacker recovers at most, I being `information`.

        Args:
            input_dim: D, elements with a Gaussian prior.

        Raises:
            InvalidInputError: D is no count.
        """
        check_count(input_dim, "input_dim")
        return -math.expm1(-2 * self.information / input_dim)

    def rmse_bound(self, input_dim: int, prior_std: float) -> float:
        """Returns τ·exp(−I/D), the least rmse per element of any attacker, I being `information`.

        Args:
            input_dim: D, elements with a Gaussian prior.
            prior_std: τ, whose units the error has.

        Raises:
            InvalidInputError: D is no count, or τ not above 0.
        """
        check_count(input_dim, "input_dim")
        check_positive(prior_std, "prior_std")
        return prior_std * math.exp(-self.information / input_dim)

    def success_bound(self, baseline: float) -> float:
        """Returns the highest probability of a reconstruction that succeeds with probability κ without any update.

        Φ(Φ⁻¹(κ) + √T/z), whatever counts as success (Hayes, Mahloujifar, Balle: Bounding training data reconstruction
        in DP-SGD, 2023), taking part in every round.

        Args:
            baseline: κ.

        Raises:
            InvalidInputError: κ is no probability strictly between 0 and 1.
        """
        check_share(baseline, "baseline")
        normal = NormalDist()
        return normal.cdf(normal.inv_cdf(baseline) + math.sqrt(self.rounds) / self.noise_multiplier)

    def leakage(self, spectrum: Spectrum, *, clip_norm: float, prior_std: float) -> list[float]:
        """Returns each unit's leakage over all rounds at this noise, the upper end of what its spectrum tells.

        As if every round had the G of this one: T shares with noise σ tell what one with σ/√T does.

        Args:
            spectrum: Of U units.
            clip_norm: C, in units of the update.
            prior_std: τ.

        Raises:
            InvalidInputError: A number is out of range.
        """
        check_positive(clip_norm, "clip_norm")
        effective = self.noise_std(clip_norm) / math.sqrt(self.rounds)
        return [float(value) for value in spectrum.leakage(effective, prior_std).upper]


def floor_for_leakage(
    spectrum: Spectrum, *, target_leakage: float, clip_norm: float, prior_std: float, rounds: int = 1
) -> GaussianFloor:
    """Returns the noise that brings every unit of a spectrum to its target over all rounds, as a floor with an ε.

    Args:
        spectrum: Of U units.
        target_leakage: L of each.
        clip_norm: C, in units of the update.
        prior_std: τ.
        rounds: T, as if every round had the G of this one.

    Raises:
        InvalidInputError: A unit has no spectrum, or none needs noise: then there is no floor, and no ε.
    """
    sigma = float(spectrum.required_noise_std(target_leakage, prior_std).max()) * math.sqrt(rounds)
    if not sigma > 0:
        raise InvalidInputError(
            "expected units that need noise for their target, got "
            + ("a unit without a spectrum" if math.isnan(sigma) else "none: an ε needs noise, name it with for_epsilon")
        )
    return GaussianFloor.of(noise_std=sigma, clip_norm=clip_norm, rounds=rounds)


@dataclass(frozen=True, kw_only=True)
class EpsilonRow:
    """What one ε means: the first three columns for any model and data, the last for the client's own."""

    epsilon: float
    noise_multiplier: float
    leakage_bound: float
    """Most that any attacker recovers."""
    rmse_bound: float
    """Least error per element of any attacker."""
    leakage: float
    """Of the unit that leaks most at this noise."""
    rmse: float
    """The same as an error per element."""


def epsilon_table(
    spectrum: Spectrum,
    epsilons: Sequence[float],
    *,
    delta: float,
    clip_norm: float,
    prior_std: float,
    rounds: int = 1,
) -> list[EpsilonRow]:
    """Returns, for each ε, what it bounds and what it means for the units of a spectrum.

    Args:
        spectrum: Of U units.
        epsilons: Of all rounds together, each.
        delta: δ of all rounds.
        clip_norm: C, in units of the update.
        prior_std: τ.
        rounds: T.

    Raises:
        InvalidInputError: A number is out of range.
        ImportError: The extra `dp` is not installed.
    """
    rows = []
    for epsilon in epsilons:
        floor = GaussianFloor.for_epsilon(epsilon, delta=delta, rounds=rounds)
        leakage = max(floor.leakage(spectrum, clip_norm=clip_norm, prior_std=prior_std))
        rows.append(
            EpsilonRow(
                epsilon=epsilon,
                noise_multiplier=floor.noise_multiplier,
                leakage_bound=floor.leakage_bound(spectrum.input_dim),
                rmse_bound=floor.rmse_bound(spectrum.input_dim, prior_std),
                leakage=leakage,
                rmse=prior_std * math.sqrt(1 - leakage),
            )
        )
    return rows
