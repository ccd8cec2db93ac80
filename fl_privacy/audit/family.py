"""Which family of noise costs the model less: on the update, or on the inputs it is computed from.

Isotropic noise is a variance. For T shares of an example it is σ√T, and on the average of C clients √(TP/C)·σ long,
beside an average update of length ‖ū‖:

    relative noise = σ√(TP/C)/‖ū‖,    σ: what one share needs for the target.

Noise on the inputs that is kept is a bias, of power τ²(1/L − 1) where it is white: relative to the inputs' own, it
depends on the target L alone. A little of it costs a model nothing, or helps it as augmentation does; much of it hides
what there is to learn. So isotropic noise is chosen where its relative noise is at most a multiple of that power. σ is
taken without the margin on advice, as it was where the multiple was found.
"""

from __future__ import annotations

import math

from fl_privacy.audit.settings import Family
from fl_privacy.checks import check_count, check_share

_MOST_PER_POWER = 0.9
"""Relative noise of the isotropic family, per relative power of noise on inputs, up to which it is the cheaper one: the
cells of `fl-privacy study noise-accuracy` where it was more than a point ahead and those where it was more than a point
behind lie on either side, but for three where steps are small: on one set of images it was 2.1 to 5.6 ahead there, at
1.3 to 3.6, and in the mean of it and two others 0.5 ahead at most (docs/noise.md)."""

_SURE_PER_POWER = 4.0
"""Above it noise on inputs was ahead in every cell, or behind by less than a point."""


def relative_noise(noise_std: float, *, update_dim: int, average_norm: float, num_clients: int, shares: int) -> float:
    """Returns σ√(TP/C)/‖ū‖; infinite where the average update is 0.

    Args:
        noise_std: σ that one share of a client needs for its target, per parameter of its update.
        update_dim: P.
        average_norm: ‖ū‖, of the average of all clients' updates.
        num_clients: C.
        shares: T, how many shares of one example must meet the target together.

    Raises:
        InvalidInputError: C or T is no count.
    """
    check_count(num_clients, "num_clients")
    check_count(shares, "shares")
    if not average_norm > 0:
        return math.inf
    return noise_std * math.sqrt(shares * update_dim / num_clients) / average_norm


def cheaper_family(relative: float, *, target_leakage: float) -> Family:
    """Returns the family that costs the model less, by an estimate.

    Args:
        relative: Noise of the isotropic family, as `relative_noise` returns it.
        target_leakage: L.

    Raises:
        InvalidInputError: L is not strictly between 0 and 1.
    """
    return "isotropic" if relative <= _MOST_PER_POWER * _power(target_leakage) else "shaped"


def is_sure(relative: float, *, target_leakage: float) -> bool:
    """Returns whether `cheaper_family` may be relied on; otherwise rehearse (`fl_privacy.rehearsal`).

    Args:
        relative: As for `cheaper_family`.
        target_leakage: L.

    Raises:
        InvalidInputError: L is not strictly between 0 and 1.
    """
    quotient = relative / _power(target_leakage)
    return not _MOST_PER_POWER < quotient < _SURE_PER_POWER


def _power(target_leakage: float) -> float:
    """Returns the power of white noise on inputs, relative to the inputs' own."""
    check_share(target_leakage, "target_leakage")
    return 1 / target_leakage - 1
