"""Attackers who know how shaped noise is made: what breaks u(x) + J·a does not break u(x + a), denoised or not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from fl_privacy import GradientUpdate, UpdateJacobian, draw_input_noise, estimate_spectrum, recommend_noise
from fl_privacy.attacks import (
    AttackProblem,
    Denoiser,
    GaussianPrior,
    GaussNewton,
    ImageDenoising,
    InputDenoising,
    IsotropicNoise,
    JointInversion,
    KnownBatch,
    denoised,
    rmse,
)
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.spectrum import dense_gram

from .cases import F64, digits, digits_prior, leaky_lenet, parameters_of

TARGET = 0.5


@dataclass(frozen=True, eq=False)
class Protected:
    """Digits behind shaped noise, and the covariance's root `[U, D, D]`, which the attacker knows."""

    jacobian: UpdateJacobian
    noise: Tensor
    root: Tensor
    problem: AttackProblem
    predicted: float

    def sharing(self, shared: Tensor) -> AttackProblem:
        return replace(self.problem, shared=shared)


@pytest.fixture(scope="module")
def protected() -> Protected:
    inputs, labels = digits(2)
    prior = digits_prior()
    update = GradientUpdate(leaky_lenet(), nn.CrossEntropyLoss())
    params = parameters_of(update.model)
    jacobian = UpdateJacobian(update, params, inputs, labels)
    law = recommend_noise(estimate_spectrum(jacobian), target_leakage=TARGET, prior_std=prior.std)
    drawn = draw_input_noise(jacobian, law, 0, rtol=1e-9)
    assert not drawn.residual.any()
    values, vectors = torch.linalg.eigh(torch.stack([dense_gram(jacobian, unit) for unit in range(2)]))
    root = vectors @ torch.diag_embed(law.variance(values.clamp(min=0)).sqrt()) @ vectors.mT
    undefended = jacobian.update()
    problem = AttackProblem(
        update=update,
        params=params,
        shared=undefended,
        labels=labels,
        prior=prior,
        noise=IsotropicNoise(1e-6 * undefended.square().mean(-1).sqrt()),
    )
    return Protected(jacobian, drawn.noise, root, problem, prior.std * math.sqrt(1 - TARGET))


def errors(rebuilt: Tensor, protected: Protected) -> Tensor:
    return rmse(rebuilt.flatten(1), protected.jacobian.private_inputs[: len(rebuilt)])


@pytest.mark.parametrize("unit", [0, 1])
def test_noise_that_was_mapped_through_the_jacobian_is_taken_off_exactly(protected: Protected, unit: int) -> None:
    mapped = protected.jacobian.update() + protected.jacobian.jvp(protected.noise)
    problem = protected.sharing(mapped).select(torch.tensor([unit]))
    found = JointInversion(mechanism="mapped", root=protected.root[unit], num_starts=1).run(problem)
    assert found.explained.all()
    truth = protected.jacobian.private_inputs[[unit]]
    assert rmse(found.inputs.flatten(1), truth).item() < 1e-6 * protected.predicted
    assert len(found.history) > 3
    assert found.history[-1] == found.objective < found.history[0]


def test_the_update_of_the_shifted_input_holds_against_the_same_attack(protected: Protected) -> None:
    problem = protected.sharing(protected.jacobian.shifted(protected.noise).update()).select(torch.tensor([0]))
    found = JointInversion(mechanism="shifted", root=protected.root[0], num_starts=2).run(problem)
    assert found.explained.all()  # x + a is found exactly, and x is not
    assert errors(found.inputs, protected).item() > 0.8 * protected.predicted


def known_covariance(protected: Protected) -> InputDenoising:
    covariance = protected.root @ protected.root
    return InputDenoising(
        attack=GaussNewton(),
        covariance=lambda v: torch.einsum("ude,ue->ud", covariance, v),
        prior_std=protected.problem.prior.std,
    )


def behind_noise(protected: Protected) -> AttackProblem:
    prior = protected.problem.prior
    wide = GaussianPrior(prior.mean, math.hypot(prior.std, float(protected.noise.square().mean().sqrt())))
    return replace(protected.sharing(protected.jacobian.shifted(protected.noise).update()), prior=wide)


def test_the_joint_attack_on_shifted_inputs_is_the_search_for_x_plus_a_and_its_denoising(protected: Protected) -> None:
    """Their sum alone is seen, so the most probable pair is the posterior mean given x + a."""
    sequential = known_covariance(protected).run(behind_noise(protected))
    problem = protected.sharing(protected.jacobian.shifted(protected.noise).update()).select(torch.tensor([0]))
    joint = JointInversion(mechanism="shifted", root=protected.root[0], num_starts=1).run(problem)
    torch.testing.assert_close(joint.inputs, sequential.inputs[:1], rtol=0, atol=1e-3)


def test_denoisers_win_little_back_from_shaped_noise(protected: Protected) -> None:
    attack, problem = known_covariance(protected), behind_noise(protected)
    found = attack.run(problem)
    plain = errors(found.inputs, protected)
    assert (plain > 0.7 * protected.predicted).all()
    strengths: dict[Denoiser, tuple[float, ...]] = {
        "total-variation": (0.003, 0.01, 0.03, 0.1),
        "non-local-means": (0.02, 0.05, 0.1, 0.2),
    }
    for denoiser, of_denoiser in strengths.items():
        runs = [errors(denoised(found.inputs, denoiser, strength), protected) for strength in of_denoiser]
        assert (torch.stack(runs).amin(0) > 0.8 * plain).all(), denoiser


def test_denoising_follows_the_attack_that_it_is_given(protected: Protected) -> None:
    attack, problem = GaussNewton(), protected.problem.select(torch.tensor([0]))
    run = ImageDenoising(attack=attack, denoiser="total-variation", strength=0.05).run(problem)
    found = attack.run(problem)
    assert run.explained.all()
    torch.testing.assert_close(run.inputs, denoised(found.inputs, "total-variation", 0.05))


def test_denoisers_clean_what_they_are_made_for() -> None:
    ramp = torch.linspace(0, 1, 24, dtype=F64).expand(24, 24) * (torch.arange(24)[:, None] > 11)
    image = ramp[None, None, None]
    noisy = image + 0.1 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    before = float(rmse(noisy, image))
    assert float(rmse(denoised(noisy, "total-variation", 0.1), image)) < 0.6 * before
    assert float(rmse(denoised(noisy, "non-local-means", 0.08), image)) < 0.8 * before
    colours = noisy.expand(2, 1, 3, 24, 24)
    assert denoised(colours, "total-variation", 0.1).shape == colours.shape


def test_bad_input_of_joint_attacks_and_denoisers_is_named(protected: Protected) -> None:
    root = protected.root[0]
    problem = protected.problem.select(torch.tensor([0]))
    known = replace(
        problem, known=KnownBatch(protected.jacobian.private_inputs[:1].reshape(1, 1, 1, 8, 8), torch.tensor([0]))
    )
    for match, call in {
        "square root": lambda: JointInversion(mechanism="mapped", root=root[:3]),
        "num_starts >= 1": lambda: JointInversion(mechanism="mapped", root=root, num_starts=0),
        r"root \[64, 64\]": lambda: JointInversion(mechanism="mapped", root=root[:9, :9]).run(problem),
        "private as a whole": lambda: JointInversion(mechanism="mapped", root=root).run(known),
        "strength > 0": lambda: ImageDenoising(attack=GaussNewton(), denoiser="total-variation", strength=0.0),
        "expected images": lambda: denoised(root, "total-variation", 0.1),
    }.items():
        with pytest.raises(InvalidInputError, match=match):
            call()
