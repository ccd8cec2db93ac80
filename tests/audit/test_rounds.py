"""The leakage of all rounds together, against the dense sum of their Fisher information."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fl_privacy.audit.curve import LeakageCurve
from fl_privacy.audit.estimate import LeakageEstimate, Status
from fl_privacy.audit.rounds import RoundsTogether
from fl_privacy.interval import Interval

DIM, TAU = 24, 0.5


def leakage(information):
    """(1/D) Σ m/(m + 1/τ²)."""
    values = np.linalg.eigvalsh(information).clip(min=0)
    return float(np.mean(values / (values + 1 / TAU**2)))


def spectrum(generator, decades=3.0):
    """A G of random eigenvectors, its eigenvalues over some decades."""
    basis, _ = np.linalg.qr(generator.standard_normal((DIM, DIM)))
    return basis @ np.diag(np.logspace(-decades, 0, DIM) * generator.uniform(0.5, 2)) @ basis.T


def noise_for(gram, target):
    low, high = -30.0, 30.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if leakage(gram / math.exp(2 * middle)) > target else (low, middle)
    return math.exp(high)


def row(gram, noise_std, server_round, **changes):
    at = noise_for(gram, 0.5) * np.logspace(-3, 3, 61)
    values = tuple(leakage(gram / s**2) for s in at)
    curve = LeakageCurve(noise_std=tuple(at), lower=values, value=values, upper=values)
    told = leakage(gram / noise_std**2)
    return LeakageEstimate(
        **{
            "server_round": server_round,
            "client": "7",
            "status": Status.AUDITED,
            "leakage": Interval(told, told, told),
            "curve": curve,
            "required_noise_std": noise_for(gram, 0.5),
            **changes,
        }
    )


@pytest.mark.parametrize("turning", [False, True], ids=["same eigenvectors", "others in every round"])
@pytest.mark.parametrize("target", [0.1, 0.5])
@pytest.mark.parametrize("rounds", [2, 10])
def test_bounds_hold_the_dense_leakage_and_the_estimate_is_exact_where_eigenvectors_stay(turning, target, rounds):
    generator = np.random.default_rng(0)
    first = spectrum(generator)
    total, followed = np.zeros((DIM, DIM)), RoundsTogether()
    for t in range(1, rounds + 1):
        gram = spectrum(generator) if turning else first * generator.uniform(0.1, 3)
        noise_std = noise_for(gram, target) * generator.uniform(0.8, 1.5)
        total += gram / noise_std**2
        told = followed.add(row(gram, noise_std, t), None).rounds_leakage
        dense = leakage(total)
        assert told.lower - 1e-9 <= dense <= told.upper + 1e-9
        if not turning:
            assert told.value == pytest.approx(dense, abs=0.02)
    assert told.upper > told.lower


def test_noise_that_is_kept_counts_once_and_what_comes_without_it_is_added():
    generator = np.random.default_rng(1)
    gram, followed = spectrum(generator), RoundsTogether()

    def shaped(t):
        known = Interval(0.3, 0.3, 0.3)
        return row(gram, 1.0, t, leakage=known, input_noise="client", input_noise_kept=True, input_noise_leakage=0.3)

    for t in range(1, 6):
        assert followed.add(shaped(t), None).rounds_leakage == Interval(0.3, 0.3, 0.3)
    bare = row(gram, noise_for(gram, 0.2), 6)
    together = followed.add(bare, None).rounds_leakage
    assert together.upper == pytest.approx(0.5, abs=1e-6)
    assert together.lower == 0.3


def test_a_round_of_which_nothing_is_known_leaves_nothing_known_and_a_silent_one_does_not():
    gram = spectrum(np.random.default_rng(2))
    for status, upper in (
        (Status.NO_REPLY, 0.2),
        (Status.CLIENT_ERROR, 0.2),
        (Status.LATE, 1.0),
        (Status.REFUSED, 1.0),
    ):
        followed = RoundsTogether()
        empty = LeakageEstimate(server_round=1, client="7", status=status)
        assert followed.add(empty, None).rounds_leakage is None
        told = followed.add(row(gram, noise_for(gram, 0.2), 2), None).rounds_leakage
        assert told.upper == pytest.approx(upper, abs=1e-6)
