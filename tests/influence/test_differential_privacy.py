"""ε against the exact Gaussian mechanism, and its bounds on reconstruction against attackers that reach them."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from fl_privacy import estimate_spectrum
from fl_privacy.differential_privacy import GaussianFloor, epsilon_table, floor_for_leakage
from fl_privacy.errors import InvalidInputError

from .cases import prescribed, with_eigenvalues

NORMAL = NormalDist()


def exact_delta(floor: GaussianFloor, epsilon: float) -> float:
    """δ(ε) of T Gaussian mechanisms of sensitivity 1 and noise z together (Balle and Wang 2018, Theorem 8)."""
    mu = math.sqrt(floor.rounds) / floor.noise_multiplier
    return NORMAL.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * NORMAL.cdf(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize("rounds", [1, 10, 100])
@pytest.mark.parametrize("noise_multiplier", [0.5, 2.0, 20.0])
def test_epsilon_is_never_less_than_the_exact_one_and_close(noise_multiplier: float, rounds: int) -> None:
    pytest.importorskip("opacus")
    floor = GaussianFloor(noise_multiplier=noise_multiplier, rounds=rounds)
    epsilon = floor.epsilon(1e-5)
    assert exact_delta(floor, epsilon) <= 1e-5
    assert exact_delta(floor, 0.75 * epsilon) > 1e-5


def test_secret_sampling_amplifies() -> None:
    pytest.importorskip("opacus")
    every = GaussianFloor(noise_multiplier=2.0, rounds=50).epsilon(1e-5)
    tenth = GaussianFloor(noise_multiplier=2.0, rounds=50, sample_rate=0.1).epsilon(1e-5)
    assert tenth < 0.5 * every


@pytest.mark.parametrize("epsilon", [0.5, 3.0, 30.0])
def test_noise_for_an_epsilon_gives_that_epsilon(epsilon: float) -> None:
    pytest.importorskip("opacus")
    floor = GaussianFloor.for_epsilon(epsilon, delta=1e-5, rounds=20)
    assert 0.99 * epsilon < floor.epsilon(1e-5) <= epsilon


def test_noise_std_and_multiplier_are_one_thing() -> None:
    floor = GaussianFloor.of(noise_std=0.6, clip_norm=1.5, rounds=4)
    assert floor.noise_multiplier == pytest.approx(0.2)  # two data sets differ by up to 2C
    assert floor.noise_std(1.5) == pytest.approx(0.6)
    assert floor.information == pytest.approx(4 * 1.5**2 / (2 * 0.6**2))


@pytest.mark.parametrize("dim", [1, 8, 64])
def test_no_linear_update_of_bounded_energy_leaks_more_than_the_bound(dim: int) -> None:
    """x ~ N(0, τ²I), u = Jx with mean square norm C²: the energy that clipping leaves, spread in the worst way."""
    tau, clip, sigma = 0.3, 2.0, 1.5
    floor = GaussianFloor.of(noise_std=sigma, clip_norm=clip)
    bound = floor.leakage_bound(dim)
    generator = torch.Generator().manual_seed(0)
    for spread in [torch.ones(dim), *torch.rand(20, dim, generator=generator).pow(4)]:
        eigenvalues = spread.double() / spread.sum() * clip**2 / tau**2  # E‖Jx‖² = τ² tr G = C²
        leakage = (eigenvalues / (eigenvalues + (sigma / tau) ** 2)).mean()
        assert leakage <= bound
    assert floor.rmse_bound(dim, tau) == pytest.approx(tau * math.sqrt(1 - bound))
    # With little to tell the bound is tight: the even spread comes within its square.
    faint = GaussianFloor.of(noise_std=30.0, clip_norm=clip)
    even = (clip**2 / dim) / (clip**2 / dim + 30.0**2)
    assert even == pytest.approx(faint.leakage_bound(dim), rel=0.01)


def test_leakage_bounds_and_noise_go_both_ways() -> None:
    floor = GaussianFloor.for_leakage_bound(0.3, input_dim=64, rounds=7)
    assert floor.leakage_bound(64) == pytest.approx(0.3)


def test_success_is_bounded_by_the_best_test_between_two_inputs() -> None:
    """Guessing which of two updates at distance 2C was shared: the Neyman–Pearson test attains the bound."""
    floor = GaussianFloor(noise_multiplier=1.0)
    generator = torch.Generator().manual_seed(0)
    shared = 1.0 + torch.randn(200_000, generator=generator, dtype=torch.float64)  # distance 1, noise z = 1
    false_alarm = 0.1
    detected = float((shared > NORMAL.inv_cdf(1 - false_alarm)).double().mean())
    assert detected == pytest.approx(floor.success_bound(false_alarm), abs=0.005)


def test_table_sets_leakage_beside_epsilon_without_mixing_them() -> None:
    pytest.importorskip("opacus")
    eigenvalues = torch.logspace(-2, 2, 16, dtype=torch.float64)[None]
    spectrum = estimate_spectrum(prescribed(with_eigenvalues(eigenvalues)))
    rows = epsilon_table(spectrum, [1.0, 10.0, 100.0], delta=1e-5, clip_norm=1.0, prior_std=0.3, rounds=10)
    for row in rows:
        sigma = 2.0 * row.noise_multiplier / math.sqrt(10)
        exact = float((eigenvalues / (eigenvalues + (sigma / 0.3) ** 2)).mean())
        assert row.leakage == pytest.approx(exact, rel=1e-6)
        assert row.rmse == pytest.approx(0.3 * math.sqrt(1 - exact), rel=1e-6)
    assert [row.leakage for row in rows] == sorted(row.leakage for row in rows)
    assert [row.rmse_bound for row in rows] == sorted((row.rmse_bound for row in rows), reverse=True)


def test_a_leakage_target_has_an_epsilon() -> None:
    pytest.importorskip("opacus")
    spectrum = estimate_spectrum(prescribed(with_eigenvalues(torch.ones(2, 6) * torch.tensor([[1.0], [4.0]]))))
    floor = floor_for_leakage(spectrum, target_leakage=0.2, clip_norm=1.0, prior_std=0.3, rounds=5)
    assert max(floor.leakage(spectrum, clip_norm=1.0, prior_std=0.3)) == pytest.approx(0.2, rel=1e-3)
    assert floor.epsilon(1e-5) > 0
    poor = prescribed(torch.ones(1, 1, 20, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match="an ε needs noise"):
        floor_for_leakage(estimate_spectrum(poor), target_leakage=0.5, clip_norm=1.0, prior_std=0.3)


def test_bad_input_is_named() -> None:
    floor = GaussianFloor(noise_multiplier=1.0)
    for match, call in {
        "noise_multiplier > 0": lambda: GaussianFloor(noise_multiplier=0.0),
        "rounds >= 1": lambda: GaussianFloor(noise_multiplier=1.0, rounds=2.5),
        "sample_rate in": lambda: GaussianFloor(noise_multiplier=1.0, sample_rate=0.0),
        "finite clip_norm > 0": lambda: GaussianFloor.of(noise_std=1.0, clip_norm=math.inf),
        "epsilon > 0": lambda: GaussianFloor.for_epsilon(-1.0, delta=1e-5),
        "delta strictly": lambda: floor.epsilon(0.0),
        "input_dim >= 1": lambda: floor.leakage_bound(0),
        "baseline strictly": lambda: floor.success_bound(1.0),
        "leakage strictly": lambda: GaussianFloor.for_leakage_bound(1.0, input_dim=3),
    }.items():
        with pytest.raises(InvalidInputError, match=match):
            call()
