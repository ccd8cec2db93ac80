"""The leakage of all rounds together, against the dense sum of their Fisher information."""

from __future__ import annotations

import math
from dataclasses import replace

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


def perturbed(arrived, std, **changes):
    """What the server's row says when it has put noise of a standard deviation on what arrived."""
    target = arrived.target_leakage or arrived.leakage.upper
    passed = min(arrived.leakage.upper, target)
    return replace(arrived, action="perturbed", applied_noise_std=std, passed_leakage=passed, **changes)


@pytest.mark.parametrize("turning", [False, True], ids=["same eigenvectors", "others in every round"])
@pytest.mark.parametrize("target", [0.1, 0.5])
@pytest.mark.parametrize("own", [0.0, 0.7], ids=["bare", "noise of its own"])
def test_what_was_passed_on_is_told_by_the_dense_sum_with_the_server_s_noise_in_it(turning, target, own):
    generator = np.random.default_rng(3)
    first = spectrum(generator)
    arriving, passing, followed = np.zeros((DIM, DIM)), np.zeros((DIM, DIM)), RoundsTogether()
    for t in range(1, 6):
        gram = spectrum(generator) if turning else first * generator.uniform(0.3, 3)
        needed = noise_for(gram, target)
        own_std = max(own, 1e-4) * needed
        std = math.sqrt(1 - own**2) * needed
        arriving += gram / own_std**2
        passing += gram / (own_std**2 + std**2)
        arrived = row(gram, own_std, t, target_leakage=target, required_noise_std=needed, verified=True)
        told = followed.add(perturbed(arrived, std), None, arrived=arrived)
        for interval, dense in ((told.rounds_leakage, arriving), (told.rounds_passed_leakage, passing)):
            assert interval.lower - 1e-9 <= leakage(dense) <= interval.upper + 1e-9
        if not turning:
            assert told.rounds_passed_leakage.value == pytest.approx(leakage(passing), abs=0.02)
        assert told.rounds_passed_leakage.upper <= min(1.0, t * target) + 1e-6
        assert told.rounds_passed_leakage.upper <= told.rounds_leakage.upper
        assert told.rounds_passed_leakage.value < told.rounds_leakage.value


def test_what_the_server_left_out_tells_those_who_come_after_nothing():
    gram, followed = spectrum(np.random.default_rng(4)), RoundsTogether()
    arrived = [row(gram, noise_for(gram, 0.2), t) for t in (1, 2, 3)]
    out = [replace(each, action="excluded") for each in arrived]
    told = followed.add(out[0], None, arrived=arrived[0])
    assert told.rounds_passed_leakage is None
    assert told.rounds_leakage.upper == pytest.approx(0.2, abs=1e-6)
    told = followed.add(arrived[1], None)
    assert told.rounds_passed_leakage.upper == pytest.approx(0.2, abs=1e-6)
    assert told.rounds_leakage.upper == pytest.approx(0.4, abs=1e-6)
    unknown = LeakageEstimate(server_round=3, client="7", status=Status.LATE, action="excluded")
    assert followed.add(unknown, None).rounds_leakage is None
    told = followed.add(out[2], None, arrived=arrived[2])
    assert told.rounds_passed_leakage.upper == pytest.approx(0.2, abs=1e-6)
    assert told.rounds_leakage.upper == 1.0  # of the second round nothing is known but that something arrived


def test_noise_that_the_server_keeps_counts_once_and_isotropic_noise_in_its_place_is_added():
    gram, followed = spectrum(np.random.default_rng(5)), RoundsTogether()
    bare = [row(gram, noise_for(gram, 0.99), t, target_leakage=0.3, verified=True) for t in range(1, 6)]
    law = {"input_noise": "client", "input_noise_kept": True, "input_noise_leakage": 0.3, "input_noise_rms": 0.8}
    for arrived in bare[:4]:
        shaped = replace(arrived, action="perturbed", passed_leakage=0.3, **law)
        assert followed.add(shaped, None, arrived=arrived).rounds_passed_leakage == Interval(0.3, 0.3, 0.3)
    told = followed.add(perturbed(bare[4], noise_for(gram, 0.3)), None, arrived=bare[4])
    assert told.rounds_passed_leakage.upper == pytest.approx(0.6, abs=1e-6)
    assert told.rounds_passed_leakage.lower == 0.3


@pytest.mark.parametrize("changes", [{"verified": False}, {"verified": True, "epsilon": 3.0}])
def test_noise_that_leakage_is_not_credited_for_is_not_credited_over_the_rounds(changes):
    gram, followed = spectrum(np.random.default_rng(6)), RoundsTogether()
    arrived = row(gram, noise_for(gram, 0.4), 1)
    acted = replace(arrived, action="perturbed", applied_noise_std=noise_for(gram, 0.1), passed_leakage=0.4, **changes)
    assert followed.add(acted, None, arrived=arrived).rounds_passed_leakage.upper == 0.4


def test_bounds_between_a_curve_s_levels_hold():
    gram = spectrum(np.random.default_rng(7))
    curve = row(gram, 1.0, 1).curve
    coarse = LeakageCurve(**{name: getattr(curve, name)[::7] for name in ("noise_std", "lower", "value", "upper")})
    for std in np.geomspace(coarse.noise_std[0] / 10, coarse.noise_std[-1] * 10, 200):
        bounds = coarse.bounds_at(float(std))
        assert bounds.lower <= leakage(gram / std**2) <= bounds.upper
        assert bounds.lower <= bounds.value <= bounds.upper
    assert coarse.bounds_at(coarse.noise_std[-1] * 10).lower == 0
    assert coarse.bounds_at(coarse.noise_std[0] / 10).upper == 1
