"""Gauss–Newton finds the mode of the posterior, and misses the truth by what the spectrum predicts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fl_privacy import GradientUpdate, LocalTrainingUpdate, estimate_spectrum
from fl_privacy.attacks import (
    AttackProblem,
    GaussianPrior,
    GaussNewton,
    IndependentNoise,
    IsotropicNoise,
    KnownBatch,
    StopReason,
    rmse,
)
from fl_privacy.attacks.noise import Noise
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.rounding import has_kinks, rounded_off

from .cases import (
    F64,
    SHAPE,
    LinearUpdate,
    Truth,
    digits,
    digits_prior,
    digits_problem,
    leaky_lenet,
    linear_case,
    residual_net,
    shared_by,
)


def predicted(truth: Truth, noise_std: float) -> Tensor:
    problem = truth.problem
    spectrum = estimate_spectrum(problem.jacobian(truth.inputs.flatten(1)))
    return spectrum.rmse(noise_std, problem.prior.std).value


@pytest.mark.parametrize(("noise_std", "lowest"), [(1e-4, 0.9), (1e-3, 0.9), (1e-2, 0.8), (3e-2, 0.8)])
def test_its_error_on_digits_is_the_predicted_one(noise_std: float, lowest: float) -> None:
    """Leakage from 0.999 to 0.15. A ratio scatters: 64 pixels, of which noise spoils the last few first.

    The more the prior has to supply, the more it shows that digits vary less than N(μ, τ²I) where updates say little:
    then the attack does a little better than predicted.
    """
    truth = digits_problem(12, noise_std=noise_std)
    result = GaussNewton().run(truth.problem)
    assert result.converged.all()
    assert result.explained.all()
    ratio = rmse(result.inputs, truth.inputs) / predicted(truth, noise_std)
    assert lowest < ratio.median().item() < 1.1
    assert ratio.min() > 0.6
    assert ratio.max() < 1.5


@pytest.mark.parametrize("noise_std", [1e-3, 1e-1])
def test_its_error_on_draws_of_the_prior_is_the_predicted_one(noise_std: float) -> None:
    """Nothing but linearisation separates the two here: 24 × 64 errors."""
    prior = digits_prior()
    inputs = prior.sample(24, 1, torch.Generator().manual_seed(3)).reshape(24, 1, *SHAPE)
    labels = torch.arange(24)[:, None] % 10
    update = GradientUpdate(leaky_lenet(), nn.CrossEntropyLoss())
    truth = shared_by(update, inputs, labels, noise_std=noise_std, prior=prior)
    result = GaussNewton().run(truth.problem)
    assert result.converged.all()
    reached = rmse(result.inputs, truth.inputs).square().mean().sqrt()
    expected = predicted(truth, noise_std).square().mean().sqrt()
    assert reached.item() == pytest.approx(expected.item(), rel=0.1)


def linear_problem(noise: Noise, *, known_std: Tensor) -> tuple[AttackProblem, Tensor]:
    """Three units with u(x) = A_k x and eigenvalues over six decades, and the posterior mean in closed form."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(3, 30, 12, generator=generator, dtype=F64))[0]
    right = torch.linalg.qr(torch.randn(3, 12, 12, generator=generator, dtype=F64))[0]
    a = left @ torch.diag(torch.logspace(-3, 0, 12, dtype=F64)) @ right
    mean = torch.randn(12, generator=generator, dtype=F64)
    shared = torch.randn(3, 30, generator=generator, dtype=F64)
    return linear_case(a, shared, prior=GaussianPrior(mean, 0.5), noise=noise, known_std=known_std)


def test_it_solves_linear_problems_in_closed_form() -> None:
    std = torch.tensor([1e-3, 1e-1, 10.0], dtype=F64)
    layered = torch.logspace(-2, 1, 30, dtype=F64).repeat(3, 1)
    layered[:, 5:9] = torch.inf
    for noise, known_std in (
        (IsotropicNoise(std), std[:, None].expand(3, 30)),
        (IndependentNoise(layered), layered),
    ):
        problem, expected = linear_problem(noise, known_std=known_std)
        result = GaussNewton(tolerance=1e-16, krylov_rtol=1e-12).run(problem)
        assert result.converged.all()
        torch.testing.assert_close(result.inputs[:, 0], expected, rtol=1e-6, atol=1e-6)
        # −2 log p is quadratic here: at the mode no other point is more probable.
        assert (problem.objective(expected + 1e-3) > result.objective).all()


def relu_net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        ).double()


def kinked_problem() -> Truth:
    inputs, labels = digits(3)
    update = GradientUpdate(relu_net(), nn.CrossEntropyLoss())
    return shared_by(update, inputs, labels, noise_std=1e-3, prior=digits_prior())


def test_on_a_network_with_kinks_hops_come_nearer_to_the_mode() -> None:
    """Where a ReLU switches, the update jumps: the search stalls near the truth, says so, and gains by hopping."""
    truth = kinked_problem()
    stalled = GaussNewton(hops=0, max_steps=20, rounded_steps=(), rounding=()).run(truth.problem)
    assert not (stalled.converged & stalled.explained).any()
    result = GaussNewton(hops=1, max_steps=20, rounded_steps=(), rounding=()).run(truth.problem)
    assert (result.objective < stalled.objective).any()
    assert (result.objective <= stalled.objective).all()
    assert (result.products > stalled.products).all()
    assert (rmse(result.inputs, truth.inputs) < 0.1 * truth.problem.prior.std).all()


def test_rounding_the_kinks_off_on_the_way_explains_what_the_search_alone_stalls_at() -> None:
    truth = kinked_problem()
    alone = GaussNewton(hops=0, max_steps=20, rounded_steps=(), rounding=()).run(truth.problem)
    result = GaussNewton(hops=0, max_steps=20).run(truth.problem)
    assert (result.objective < alone.objective).all()
    assert result.explained.all()
    assert result.history.shape[0] > alone.history.shape[0]
    assert (rmse(result.inputs, truth.inputs) < rmse(alone.inputs, truth.inputs)).all()


def test_steps_by_the_rounded_jacobian_find_what_the_modes_of_rounded_networks_miss() -> None:
    """On a residual network, which jumps far more than the net above."""
    inputs, labels = digits(1)
    update = GradientUpdate(residual_net().double(), nn.CrossEntropyLoss())
    truth = shared_by(update, inputs, labels, noise_std=1e-3, prior=digits_prior())
    modes = GaussNewton(hops=0, max_steps=5, rounded_steps=()).run(truth.problem)
    assert not modes.explained.any()
    result = GaussNewton(hops=0, max_steps=5).run(truth.problem)
    assert result.explained.all()
    assert (rmse(result.inputs, truth.inputs) < 0.3 * rmse(modes.inputs, truth.inputs)).all()


def test_kinks_are_found_where_a_forward_pass_meets_them() -> None:
    kinked, smooth = kinked_problem().problem, digits_problem(1, noise_std=1e-3).problem
    assert has_kinks(kinked.update, kinked.params, kinked.batches(kinked.start())[0])
    assert not has_kinks(smooth.update, smooth.params, smooth.batches(smooth.start())[0])
    rounded = rounded_off(kinked.update, 1e-9)
    x = kinked.start()
    torch.testing.assert_close(replace(kinked, update=rounded).residual(x), kinked.residual(x), rtol=1e-6, atol=1e-9)


def test_only_the_private_example_of_a_known_batch_is_rebuilt() -> None:
    inputs, labels = (t.reshape(2, 4, *t.shape[2:]) for t in digits(8))
    update = GradientUpdate(leaky_lenet(), nn.CrossEntropyLoss())
    truth = shared_by(update, inputs, labels, noise_std=1e-4, prior=digits_prior())
    private = torch.tensor([3, 1])
    rows = torch.arange(2)
    secret = inputs.clone()
    secret[rows, private] = 99.0
    problem = replace(truth.problem, known=KnownBatch(secret, private))
    result = GaussNewton().run(problem)
    assert result.converged.all()
    assert result.inputs.shape == (2, 1, *SHAPE)
    spectrum = estimate_spectrum(problem.jacobian(inputs[rows, private].flatten(1)))
    ratio = rmse(result.inputs[:, 0], inputs[rows, private]) / spectrum.rmse(1e-4, problem.prior.std).value
    assert (ratio > 0.6).all()
    assert (ratio < 1.5).all()


def test_a_whole_batch_is_rebuilt_from_local_training() -> None:
    inputs, labels = (t.reshape(1, 2, *t.shape[2:]) for t in digits(2))
    update = LocalTrainingUpdate(leaky_lenet(), nn.CrossEntropyLoss(), lr=0.1, steps=((0,), (1,), (0, 1)))
    truth = shared_by(update, inputs, labels, noise_std=1e-6, prior=digits_prior())
    result = GaussNewton().run(truth.problem)
    assert result.converged.all()
    assert rmse(result.inputs, truth.inputs).item() < 0.01


def test_units_do_not_touch_each_other() -> None:
    truth = digits_problem(3, noise_std=1e-2)
    together = GaussNewton().run(truth.problem)
    for unit in range(3):
        alone = GaussNewton().run(truth.problem.select(torch.tensor([unit])))
        torch.testing.assert_close(alone.inputs[0], together.inputs[unit], rtol=0, atol=0.02)
        assert alone.stop[0] is together.stop[unit]


def test_float32_reaches_the_same_mode() -> None:
    truth = digits_problem(4, noise_std=1e-2)
    exact = GaussNewton().run(truth.problem)
    single = replace(
        truth.problem,
        shared=truth.problem.shared.float(),
        params={name: p.float() for name, p in truth.problem.params.items()},
        prior=truth.problem.prior.to(torch.float32),
    )
    result = GaussNewton().run(single)
    assert result.converged.all()
    assert result.inputs.dtype == torch.float32
    assert (rmse(result.inputs.double(), exact.inputs) < 0.02).all()


def test_a_budget_that_is_too_small_is_reported() -> None:
    truth = digits_problem(2, noise_std=1e-4)
    result = GaussNewton(max_steps=2, hops=0).run(truth.problem)
    assert result.stop == (StopReason.MAX_STEPS,) * 2
    assert not result.converged.any()
    assert not result.explained.any()
    assert len(result.history) == 2


def test_wrong_labels_leave_the_update_unexplained() -> None:
    truth = digits_problem(2, noise_std=1e-3)
    labels = truth.problem.labels
    assert labels is not None
    result = GaussNewton(max_steps=8, hops=0).run(replace(truth.problem, labels=(labels + 1) % 10))
    assert not result.explained.any()


def test_a_start_without_gradient_is_not_taken_for_safety() -> None:
    """At the prior mean of 0 this model's update does not depend on x: stationary, and explaining nothing."""

    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.ones(4, dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            return x.square() * self.theta

    model = Squares()
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=F64)
    update = GradientUpdate(model, lambda outputs, labels: (outputs * labels).sum(-1).mean())
    prior = GaussianPrior(torch.zeros(4, dtype=F64), 3.0)
    truth = shared_by(update, x, torch.ones(1, 1, 4, dtype=F64), noise_std=0.01, prior=prior)
    dead = GaussNewton(hops=0).run(truth.problem)
    assert not dead.explained.any()
    for attack in (GaussNewton(num_starts=3, hops=0), GaussNewton(hops=3)):
        alive = attack.run(truth.problem)
        assert alive.explained.all()
        torch.testing.assert_close(alive.inputs.abs(), x, rtol=0, atol=0.05)


def test_a_unit_that_overflows_fails_alone() -> None:
    problem, _ = linear_problem(IsotropicNoise(torch.ones(3)), known_std=torch.ones(3, 30, dtype=F64))
    expected = GaussNewton().run(problem)
    model = problem.update.model
    assert isinstance(model, LinearUpdate)
    model.matrices[1] *= 1e200
    result = GaussNewton().run(problem)
    assert result.stop[1] is StopReason.NOT_FINITE
    assert result.converged.tolist() == [True, False, True]
    torch.testing.assert_close(result.inputs[[0, 2]], expected.inputs[[0, 2]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "build",
    [
        lambda: GaussNewton(tolerance=0.0),
        lambda: GaussNewton(damping=float("nan")),
        lambda: GaussNewton(max_steps=0),
        lambda: GaussNewton(num_starts=0),
    ],
)
def test_options_out_of_range_are_refused(build: type[GaussNewton]) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        build()
