"""A coloured prior: what it predicts equals dense linear algebra, and the attack that knows it attains that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fl_privacy import GaussianPrior, UpdateJacobian, estimate_spectrum, recommend_noise
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence import InputCovariance, own_bias
from fl_privacy.influence.spectrum import student_quantile
from fl_privacy.reference import load_dataset

from .cases import BY_NAME, Case, audited, gradient_update, prescribed, reference

F64 = torch.float64
SIGMAS = (1e-3, 0.03, 1.0, 30.0)


def covariance(dim: int, *, decades: float = 3, seed: int = 0) -> Tensor:
    """A covariance `[d, d]` whose variances span so many decades, of mean variance one."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=F64))[0]
    variances = torch.logspace(-decades, 0, dim, dtype=F64)
    return vectors @ torch.diag(variances / variances.mean()) @ vectors.mT


def prior_of(case: Case, std: float = 0.5) -> tuple[GaussianPrior, Tensor]:
    """A coloured prior of one example of a case, and the covariance of its whole batch of 3, over τ²."""
    shape = case.batch(1, 1)[0].shape[2:]
    one = covariance(shape.numel())
    prior = GaussianPrior(torch.zeros(shape, dtype=F64), std, InputCovariance.of(one))
    return prior, torch.block_diag(one, one, one)


def jacobian_of(case: Case) -> UpdateJacobian:
    return audited(gradient_update(case), *case.batch(2, 3), None)


def posterior(gram: Tensor, prior_covariance: Tensor, noise_std: float) -> Tensor:
    """Covariance of x given u(x) + noise, Σ^½(I + Σ^½GΣ^½/σ²)⁻¹Σ^½, with the symmetric root."""
    values, vectors = torch.linalg.eigh(prior_covariance)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.mT
    eye = torch.eye(len(root), dtype=F64)
    return root @ torch.linalg.inv(eye + root @ gram @ root / noise_std**2) @ root


@pytest.mark.parametrize("name", ["linear", "lenet", "resnet", "vit-sdpa", "text-gru"])
def test_prediction_equals_the_dense_trace(name: str) -> None:
    case = BY_NAME[name]
    prior, full = prior_of(case)
    j = reference(name, None, 2, 3)[1]
    spectrum = estimate_spectrum(jacobian_of(case), num_probes=8, prior=prior)
    assert spectrum.exact
    for sigma in SIGMAS:
        left = torch.stack([posterior(g, prior.std**2 * full, sigma).trace() for g in j.mT @ j])
        lost = left / (prior.std**2 * full.trace())
        torch.testing.assert_close(spectrum.leakage(sigma, prior.std).value, 1 - lost, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(spectrum.rmse(sigma, prior.std).value ** 2, left / len(full), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["lenet", "resnet", "vit-sdpa"])
def test_sampled_interval_contains_the_dense_trace(name: str, seed: int) -> None:
    case = BY_NAME[name]
    prior, full = prior_of(case)
    j = reference(name, None, 2, 3)[1]
    spectrum = estimate_spectrum(jacobian_of(case), num_probes=4, max_steps=8, seed=seed, prior=prior)
    assert not spectrum.exact
    for sigma in SIGMAS:
        left = torch.stack([posterior(g, full, sigma / prior.std).trace() for g in j.mT @ j]) / len(full)
        leakage = spectrum.leakage(sigma, prior.std)
        assert (leakage.lower <= leakage.value).all()
        assert (leakage.value <= leakage.upper).all()
        assert (leakage.lower <= 1 - left + 1e-9).all()
        assert (1 - left <= leakage.upper + 1e-9).all()


def test_what_is_sampled_is_right_on_average() -> None:
    case = BY_NAME["lenet"]
    prior, full = prior_of(case)
    j = reference("lenet", None, 2, 3)[1]
    exact = torch.stack([1 - posterior(g, full, 0.1).trace() / len(full) for g in j.mT @ j])
    found = [
        estimate_spectrum(jacobian_of(case), num_probes=4, max_steps=16, rtol=1e-9, seed=seed, prior=prior)
        for seed in range(30)
    ]
    values = torch.stack([spectrum.leakage(0.1 * prior.std, prior.std).value for spectrum in found])
    error = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - exact).abs() < 4 * error + 1e-3).all()


def test_without_noise_all_is_recovered_and_with_much_of_it_nothing() -> None:
    case = BY_NAME["linear"]
    prior, _ = prior_of(case)
    spectrum = estimate_spectrum(jacobian_of(case), num_probes=4, max_steps=2, prior=prior)
    assert not spectrum.exact
    nothing = spectrum.leakage(1e9, prior.std)
    assert (nothing.upper < 1e-9).all()


def test_a_white_prior_changes_no_digit() -> None:
    jacobian = jacobian_of(BY_NAME["lenet"])
    white = GaussianPrior(torch.zeros(1, 6, 6, dtype=F64), 0.5)
    for options in ({"num_probes": 8}, {"max_steps": 8}):
        plain, with_prior = (estimate_spectrum(jacobian, prior=prior, **options) for prior in (None, white))
        assert torch.equal(plain.leakage(0.1, 0.5).value, with_prior.leakage(0.1, 0.5).value)
        assert torch.equal(plain.gauss.nodes, with_prior.gauss.nodes)


@pytest.mark.parametrize("coloured", [True, False])
def test_own_bias_equals_the_dense_solve_and_its_mean_over_the_prior_is_the_spectrums(coloured: bool) -> None:
    case = BY_NAME["lenet"]
    prior, full = prior_of(case)
    if not coloured:
        prior, full = prior.white, torch.eye(len(full), dtype=F64)
    jacobian = jacobian_of(case)
    j = reference("lenet", None, 2, 3)[1]
    found = own_bias(jacobian, prior, SIGMAS, rtol=1e-12)
    spectrum = estimate_spectrum(jacobian, num_probes=8, prior=prior)
    for sigma, biases in zip(SIGMAS, found, strict=True):
        epsilon = (sigma / prior.std) ** 2
        mean = []
        for g, x, bias in zip(j.mT @ j, jacobian.private_inputs, biases, strict=True):
            # K ε(KᵀGK + ε)⁻¹K⁻¹ = ε(SG + ε)⁻¹ with S = KKᵀ, whatever the root.
            pull = epsilon * torch.linalg.inv(full @ g + epsilon * torch.eye(len(full), dtype=F64))
            torch.testing.assert_close(bias, (pull @ x).square().mean(), rtol=1e-6, atol=1e-12)
            mean.append((pull @ full @ pull.mT).trace() * prior.std**2 / len(full))
        torch.testing.assert_close(spectrum.bias(sigma, prior.std).value, torch.stack(mean), rtol=1e-6, atol=1e-10)


def test_root_transpose_and_inverse_belong_together() -> None:
    matrix = covariance(6)
    found = InputCovariance.of(3 * matrix)
    v, w = torch.randn(2, 4, 18, generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close((found.root(v) * w).sum(), (v * found.root_transpose(w)).sum())
    torch.testing.assert_close(found.unroot(found.root(v)), v)
    torch.testing.assert_close(found.root(found.root_transpose(torch.eye(6, dtype=F64))), matrix)


def test_draws_have_the_covariance() -> None:
    matrix = covariance(4, decades=1)
    prior = GaussianPrior(torch.ones(4, dtype=F64), 2.0, InputCovariance.of(matrix))
    draws = prior.sample(20_000, 2, torch.Generator().manual_seed(0)).reshape(-1, 4)
    torch.testing.assert_close(draws.mean(0), torch.ones(4, dtype=F64), atol=0.1, rtol=0)
    torch.testing.assert_close(draws.T.cov(), 4 * matrix, atol=0.2, rtol=0)
    assert prior.energy(draws).mean() == pytest.approx(4, rel=0.05)  # of 4 elements, in units of their deviations


def test_images_give_a_prior_that_explains_other_images_better_than_a_white_one() -> None:
    data = load_dataset("digits")
    public, held_out = (part.select(slice(0, 400))[0].double() for part in (data.train, data.test))
    prior = GaussianPrior.from_images(public)
    white = GaussianPrior.from_examples(public)
    assert (prior.std, prior.white.std) == (white.std, white.std)
    assert prior.covariance is not None
    surprise = 0.5 * prior.energy(held_out.flatten(1)).mean() + 0.5 * prior.covariance.variances.log().sum()
    assert surprise < 0.5 * white.energy(held_out.flatten(1)).mean() - 10  # nats an image


def test_students_quantile() -> None:
    for freedom, exact in ((3, 5.841), (7, 3.499), (15, 2.947), (1000, 2.581)):
        assert student_quantile(freedom) == pytest.approx(exact, rel=0.01)


def test_what_is_refused() -> None:
    case = BY_NAME["lenet"]
    prior, _ = prior_of(case)
    jacobian = jacobian_of(case)
    with pytest.raises(InvalidInputError, match="num_probes >= 4"):
        estimate_spectrum(jacobian, num_probes=2, max_steps=8, prior=prior)
    with pytest.raises(InvalidInputError, match="float32"):
        estimate_spectrum(jacobian, max_steps=8, prior=prior.to(torch.float32))
    with pytest.raises(InvalidInputError, match="36 elements"):
        GaussianPrior(prior.mean, 1.0, InputCovariance.of(covariance(5)))
    with pytest.raises(InvalidInputError, match="variances > 0"):
        InputCovariance.of(torch.diag(torch.tensor([1.0, 0.0])))
    with pytest.raises(InvalidInputError, match="white prior"):
        recommend_noise(estimate_spectrum(jacobian, prior=prior), target_leakage=0.5, prior_std=0.5)
    other = replace(prior, mean=torch.zeros(5, dtype=F64), covariance=InputCovariance.of(covariance(5)))
    with pytest.raises(InvalidInputError, match="5 elements"):
        estimate_spectrum(prescribed(torch.eye(7, dtype=F64)[None]), num_probes=4, max_steps=1, prior=other)
