"""An attack by values of the update alone: exact where it is linear, near the truth where it jumps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fl_privacy import GradientUpdate, estimate_spectrum
from fl_privacy.attacks import (
    AttackProblem,
    GaussianPrior,
    GaussNewton,
    IndependentNoise,
    IsotropicNoise,
    KnownBatch,
    PosteriorLinearization,
    StopReason,
    rmse,
)
from fl_privacy.attacks.noise import Noise
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.covariance import InputCovariance
from fl_privacy.influence.rounding import rounded_off

from .cases import (
    F64,
    SHAPE,
    LinearUpdate,
    digits,
    digits_prior,
    digits_problem,
    leaky_lenet,
    linear_case,
    residual_net,
    shared_by,
)


def linear_problem(noise: Noise, known_std: Tensor, covariance: Tensor) -> tuple[AttackProblem, Tensor]:
    """Two units with u(x) = A_k x, and the posterior mean in closed form."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 40, 12, generator=generator, dtype=F64)
    mean = torch.randn(12, generator=generator, dtype=F64)
    x = mean + 0.5 * torch.randn(2, 12, generator=generator, dtype=F64) @ torch.linalg.cholesky(covariance).mT
    noise_of = known_std.nan_to_num(posinf=1e3) * torch.randn(2, 40, generator=generator, dtype=F64)
    shared = torch.einsum("kpd,kd->kp", a, x) + noise_of
    prior = GaussianPrior(mean, 0.5, InputCovariance.of(covariance))
    return linear_case(a, shared, prior=prior, noise=noise, known_std=known_std)


@pytest.mark.parametrize("layered", [False, True])
def test_it_solves_linear_problems_in_closed_form(layered: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(12, 12, generator=generator, dtype=F64)
    covariance = root @ root.mT + torch.eye(12, dtype=F64)
    covariance *= 12 / covariance.trace()  # a mean variance of one
    std = torch.tensor([0.1, 3.0], dtype=F64)
    stds = torch.logspace(-1, 1, 40, dtype=F64).repeat(2, 1)
    stds[:, 5:9] = torch.inf
    noise, known = (IndependentNoise(stds), stds) if layered else (IsotropicNoise(std), std[:, None].expand(2, 40))
    problem, expected = linear_problem(noise, known, covariance)
    result = PosteriorLinearization(averaged=40).run(problem)
    assert result.converged.all()
    torch.testing.assert_close(result.inputs[:, 0], expected, rtol=1e-3, atol=1e-3)
    assert (problem.objective(expected + 1e-2) > result.objective).all()


def test_it_comes_as_near_as_gauss_newton_where_the_update_is_smooth() -> None:
    truth = digits_problem(2, noise_std=1e-2)
    result = PosteriorLinearization().run(truth.problem)
    assert result.converged.all()
    assert result.explained.all()
    mode = GaussNewton().run(truth.problem)
    assert (rmse(result.inputs, truth.inputs) < 1.15 * rmse(mode.inputs, truth.inputs)).all()
    assert (result.products % (4 * 64) == 0).all()


def test_on_a_residual_network_it_converges_where_gauss_newton_does_not() -> None:
    inputs, labels = digits(1)
    update = GradientUpdate(residual_net(), nn.CrossEntropyLoss())
    truth = shared_by(update, inputs.float(), labels, noise_std=1e-3, prior=digits_prior().to(torch.float32))
    problem = truth.problem
    jacobian = replace(problem, update=rounded_off(update, 0.15)).jacobian(truth.inputs.flatten(1))
    predicted = estimate_spectrum(jacobian).rmse(1e-3, problem.prior.std).value
    result = PosteriorLinearization().run(problem)
    assert result.converged.all()
    assert result.explained.all()
    assert 0.8 * predicted < rmse(result.inputs, truth.inputs) < 2.5 * predicted
    searched = GaussNewton(hops=0, max_steps=5).run(problem)
    assert not searched.converged.any()
    assert rmse(searched.inputs, truth.inputs) > 1.5 * rmse(result.inputs, truth.inputs)


def test_only_the_private_example_of_a_known_batch_is_rebuilt() -> None:
    inputs, labels = (t.reshape(1, 4, *t.shape[2:]) for t in digits(4))
    update = GradientUpdate(leaky_lenet(), nn.CrossEntropyLoss())
    truth = shared_by(update, inputs, labels, noise_std=1e-3, prior=digits_prior())
    secret = inputs.clone()
    secret[0, 3] = 99.0
    problem = replace(truth.problem, known=KnownBatch(secret, torch.tensor([3])))
    result = PosteriorLinearization().run(problem)
    assert result.converged.all()
    assert result.inputs.shape == (1, 1, *SHAPE)
    spectrum = estimate_spectrum(problem.jacobian(inputs[:, 3].flatten(1)))
    ratio = rmse(result.inputs[:, 0], inputs[:, 3]) / spectrum.rmse(1e-3, problem.prior.std).value
    assert 0.6 < ratio.item() < 1.5


def test_a_unit_that_overflows_fails_alone() -> None:
    noise = IsotropicNoise(torch.ones(2, dtype=F64))
    problem, _ = linear_problem(noise, torch.ones(2, 40, dtype=F64), torch.eye(12, dtype=F64))
    expected = PosteriorLinearization().run(problem)
    model = problem.update.model
    assert isinstance(model, LinearUpdate)
    model.matrices[0] *= 1e200
    result = PosteriorLinearization().run(problem)
    assert result.stop == (StopReason.NOT_FINITE, StopReason.CONVERGED)
    torch.testing.assert_close(result.inputs[1], expected.inputs[1])


def test_it_says_where_it_did_not_settle() -> None:
    result = PosteriorLinearization(max_steps=2).run(digits_problem(1, noise_std=1e-4).problem)
    assert result.stop == (StopReason.MAX_STEPS,)
    assert len(result.history) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population": 1.0}, "expected a population of at least 1.5 per input element, got 1.0"),
        ({"population": float("nan")}, "got nan"),
        ({"max_steps": 0}, "expected max_steps >= 1, got 0"),
        ({"averaged": -1}, "expected averaged >= 0, got -1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        PosteriorLinearization(**options)  # type: ignore[arg-type]
