"""The attack that knows how inputs vary together attains what is predicted for it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from fl_privacy import GaussianPrior, GradientUpdate, estimate_spectrum
from fl_privacy.attacks import GaussNewton, WithWhitePrior, rmse
from fl_privacy.influence import InputCovariance
from fl_privacy.reference import load_dataset

from .cases import F64, LinearUpdate, digits, leaky_lenet, picked, shared_by

UNITS, DIM = 400, 12


def test_on_a_linear_update_it_finds_the_posterior_mean_and_errs_as_predicted() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(1, 9, DIM, generator=generator, dtype=F64)
    vectors = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=F64))[0]
    covariance = vectors @ torch.diag(torch.logspace(-2, 0, DIM, dtype=F64)) @ vectors.mT
    prior = GaussianPrior(
        torch.ones(DIM, dtype=F64), float(covariance.trace() / DIM) ** 0.5, InputCovariance.of(covariance)
    )
    x = prior.sample(UNITS, 1, generator)
    noise_std = 0.3
    update = GradientUpdate(LinearUpdate(matrix), picked)
    labels = torch.zeros(UNITS, 1, dtype=torch.long)
    truth = shared_by(update, x[:, None], labels, noise_std=noise_std, prior=prior)

    attack = GaussNewton(tolerance=1e-10, krylov_rtol=1e-10)
    found = attack.run(truth.problem)
    assert found.converged.all()
    a = matrix[0]
    gain = covariance @ a.T @ torch.linalg.inv(a @ covariance @ a.T + noise_std**2 * torch.eye(9, dtype=F64))
    expected = prior.mean + (truth.problem.shared - prior.mean @ a.T) @ gain.T
    torch.testing.assert_close(found.inputs[:, 0], expected, atol=1e-6, rtol=0)

    jacobian = truth.problem.select(torch.tensor([0])).jacobian(x[:1])
    predicted = estimate_spectrum(jacobian, prior=prior).rmse(noise_std, prior.std).value
    reached = rmse(found.inputs, truth.inputs).square().mean().sqrt()
    assert abs(reached / predicted - 1) < 0.05  # 400 draws of 12 elements
    ignorant = rmse(WithWhitePrior(attack).run(truth.problem).inputs, truth.inputs).square().mean().sqrt()
    assert ignorant > 1.2 * reached


def test_on_a_lenet_it_comes_closer_than_the_attack_with_a_white_prior() -> None:
    public = load_dataset("digits").train.select(slice(0, 1000))[0].double()
    prior = GaussianPrior.from_images(public)
    inputs, labels = digits(6)
    update = GradientUpdate(leaky_lenet(), nn.CrossEntropyLoss())
    truth = shared_by(update, inputs, labels, noise_std=0.02, prior=prior)
    coloured = GaussNewton().run(truth.problem)
    white = WithWhitePrior(GaussNewton()).run(truth.problem)
    assert coloured.converged.all()
    errors, others = rmse(coloured.inputs, truth.inputs), rmse(white.inputs, truth.inputs)
    assert (errors < others).double().mean() > 0.8
    predicted = estimate_spectrum(truth.problem.jacobian(inputs.flatten(1)), prior=prior).rmse(0.02, prior.std).value
    assert 0.75 < (errors / predicted).median() < 1.25
    assert replace(truth.problem, prior=prior.white).prior.covariance is None
