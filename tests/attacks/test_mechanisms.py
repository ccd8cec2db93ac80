"""What defences do to an update, what is believed of the rest, and attacks that use the shape of their noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fl_privacy import GradientUpdate
from fl_privacy.attacks import AttackProblem, GaussianPrior, GaussNewton, IsotropicNoise, LeastPowers, rmse
from fl_privacy.attacks.mechanisms import AddedNoise, HalfPrecision, Mechanism, NoDefence, Pruning, UniformQuantization
from fl_privacy.errors import InvalidInputError

from .cases import F64, LinearUpdate, parameters_of, picked

UNITS, P, D = 60, 1000, 3


def update(seed: int = 0, units: int = 3) -> Tensor:
    return torch.randn(units, 5000, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("laplace", [False, True])
def test_added_noise_has_its_power_and_shape(laplace: bool) -> None:
    mechanism = AddedNoise(std=0.3, laplace=laplace)
    u = update()
    noise = (mechanism.apply(u, torch.Generator().manual_seed(1)) - u).flatten()
    assert float(noise.square().mean().sqrt()) == pytest.approx(0.3, rel=0.05)
    kurtosis = float((noise**4).mean() / (noise**2).mean() ** 2)
    assert kurtosis == pytest.approx(6 if laplace else 3, rel=0.2)


def test_pruning_keeps_the_largest_entries_and_bounds_the_others() -> None:
    u = update()
    shared = Pruning(share=0.75).apply(u, torch.Generator())
    kept = shared != 0
    assert kept.sum(-1).tolist() == [1250] * 3
    assert torch.equal(shared[kept], u[kept])
    noise = Pruning(share=0.75).noise(shared)
    weights = noise.precision(torch.ones_like(u)).rsqrt()  # standard deviations
    least_kept = torch.where(kept, u.abs(), math.inf).amin(-1)
    assert (torch.where(kept, 0.0, u.abs()).amax(-1) <= least_kept).all()
    for unit in range(3):
        torch.testing.assert_close(
            weights[unit][~kept[unit]], (least_kept[unit] / math.sqrt(3)).expand(3750), rtol=1e-9, atol=0
        )
        assert (weights[unit][kept[unit]] < 1e-5).all()


@pytest.mark.parametrize("bits", [3, 8])
def test_quantisation_errs_by_half_a_step_at_most(bits: int) -> None:
    mechanism = UniformQuantization(bits=bits)
    u = update()
    shared = mechanism.apply(u, torch.Generator())
    step = u.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert len(shared[0].unique()) <= 2**bits - 1
    assert ((shared - u).abs() <= step / 2 * (1 + 1e-9)).all()
    believed = mechanism.noise(shared).precision(torch.ones_like(u)).rsqrt()
    torch.testing.assert_close(believed, (step / math.sqrt(12)).expand_as(u))
    sharper = mechanism.equivalent(shared).precision(torch.ones_like(u)).rsqrt()
    torch.testing.assert_close(sharper / believed, torch.full_like(u, math.sqrt(3 / 15)))


def test_half_precision_errs_by_what_it_says() -> None:
    u = update()
    error = (HalfPrecision().apply(u, torch.Generator()) - u).square().mean().sqrt()
    believed = HalfPrecision().noise(u).precision(torch.ones_like(u)).reciprocal().mean().sqrt()
    assert 0.5 < float(error / believed) < 1.1  # rounding to the next of evenly spaced numbers between powers of two


def test_no_defence_is_known_to_float32() -> None:
    u = update()
    assert NoDefence().apply(u, torch.Generator()) is u
    torch.testing.assert_close(NoDefence().noise(u).energy(1e-6 * u), torch.full((3,), 5000.0, dtype=F64))


@pytest.mark.parametrize(
    ("shape", "gain"), [("laplace", math.sqrt(0.5)), ("uniform", math.sqrt(0.2))], ids=["laplace", "uniform"]
)
def test_the_attack_by_shape_comes_as_much_closer_as_equivalent_noise_says(shape: str, gain: float) -> None:
    """A linear update of few inputs and many numbers: what is reached by a fit of Σ|r|^p, over least squares."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(1, P, D, generator=generator, dtype=F64)
    x = torch.randn(UNITS, D, generator=generator, dtype=F64)
    if shape == "laplace":
        mechanism: Mechanism = AddedNoise(std=1.0, laplace=True)
        shared = mechanism.apply(x @ matrix[0].T, generator)
        scale, power = 1 / math.sqrt(2), 1
    else:  # rounding errors of a step of 2
        mechanism = UniformQuantization()
        shared = x @ matrix[0].T + 2 * torch.rand(UNITS, P, generator=generator, dtype=F64) - 1
        scale, power = 1 / 15, 8
    model = LinearUpdate(matrix)
    problem = AttackProblem(
        update=GradientUpdate(model, picked),
        params=parameters_of(model),
        shared=shared,
        prior=GaussianPrior(torch.zeros(D, dtype=F64), 10.0),
        noise=IsotropicNoise(torch.full((UNITS,), 1.0 if power == 1 else 1 / math.sqrt(3), dtype=F64)),
        labels=torch.zeros(UNITS, 1, dtype=torch.long),
    )
    least_squares = GaussNewton(tolerance=1e-4)
    attack = LeastPowers(attack=least_squares, power=power, scale=scale)
    errors = [rmse(a.run(problem).inputs.reshape(UNITS, D), x).square().mean().sqrt() for a in (least_squares, attack)]
    assert float(errors[1] / errors[0]) == pytest.approx(gain, rel=0.2)
    made = mechanism.attack(shared[:1], least_squares)
    assert isinstance(made, LeastPowers)
    ratio = mechanism.noise(shared[:1]).energy(shared[:1]) / mechanism.equivalent(shared[:1]).energy(shared[:1])
    assert float(ratio.sqrt()) == pytest.approx(gain)
    assert made.power == power


def test_gaussian_noise_has_no_better_attack() -> None:
    attack = GaussNewton()
    assert AddedNoise(std=1.0).attack(update(), attack) is attack
    assert float(AddedNoise(std=1.0).equivalent(update()).energy(torch.ones(3, 5000))[0]) == 5000


@pytest.mark.parametrize(
    "make",
    [
        lambda: AddedNoise(std=0.0),
        lambda: Pruning(share=1.0),
        lambda: UniformQuantization(bits=1),
        lambda: LeastPowers(attack=GaussNewton(), power=0.5, scale=1.0),
    ],
)
def test_what_is_refused(make: object) -> None:
    with pytest.raises(InvalidInputError):
        make()  # type: ignore[operator]
