"""Leakage from a spectrum: it equals the dense eigenvalues', or says by how much it may miss them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fl_privacy import Spectrum, UpdateJacobian, estimate_spectrum
from fl_privacy.influence.options import per_unit
from fl_privacy.interval import Interval

from .cases import (
    BY_NAME,
    CASES,
    LOCAL_TRAINING,
    Case,
    audited,
    gradient_update,
    prescribed,
    reference,
    with_eigenvalues,
)

PRIORS = (0.3, 1.0)
SIGMAS = (1e-4, 1e-2, 0.1, 1.0, 100.0)


def dense_eigenvalues(case: Case, examples: int = 3, *, training: bool = False) -> Tensor:
    j = reference(case.name, LOCAL_TRAINING if training else None, 2, examples)[1]
    eigenvalues: Tensor = torch.linalg.eigvalsh(j.mT @ j)
    return eigenvalues.clamp(min=0)


def jacobian_of(case: Case, examples: int = 3, *, training: bool = False) -> UpdateJacobian:
    update = LOCAL_TRAINING.update(case, case.model()) if training else gradient_update(case)
    return audited(update, *case.batch(2, examples), None)


def lost(eigenvalues: Tensor, epsilon: Tensor | float, power: int = 1) -> Tensor:
    """(1/D) Σ (ε/(λ + ε))^power `[U]`, directions of eigenvalue zero being lost at any ε."""
    eps = torch.as_tensor(epsilon, dtype=torch.float64).reshape(-1, 1)
    share: Tensor = torch.where(eigenvalues + eps > 0, eps / (eigenvalues + eps), 1.0)
    return share.pow(power).mean(-1)


def encloses(interval: Interval[Tensor], exact: Tensor, *, rounding: float = 1e-9) -> bool:
    ordered = (interval.lower <= interval.value).all() and (interval.value <= interval.upper).all()
    low, high = interval.lower - rounding, interval.upper + rounding
    return bool(ordered and (low <= exact).all() and (exact <= high).all())


def decades(*spans: float, dim: int = 120) -> Tensor:
    """Eigenvalues `[U, D]` spread evenly over so many decades below 1, 10, 100, ..."""
    return torch.stack([torch.logspace(-span, 0, dim, dtype=torch.float64) * 10**i for i, span in enumerate(spans)])


@pytest.mark.parametrize("training", [False, True], ids=["gradient", "training"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_spectrum_equals_the_dense_eigenvalues(case: Case, training: bool) -> None:
    eigenvalues = dense_eigenvalues(case, training=training)
    spectrum = estimate_spectrum(jacobian_of(case, training=training))
    assert spectrum.exact
    assert spectrum.products.tolist() == [spectrum.input_dim] * 2
    torch.testing.assert_close(spectrum.largest, eigenvalues.amax(-1), rtol=1e-8, atol=0.0)
    for prior in PRIORS:
        for sigma in SIGMAS:
            recovered = 1 - lost(eigenvalues, (sigma / prior) ** 2)
            leakage = spectrum.leakage(sigma, prior)
            assert encloses(leakage, recovered)
            torch.testing.assert_close(leakage.value, recovered, rtol=1e-6, atol=1e-9)


def test_rmse_bias_and_effective_dimension_follow_from_the_eigenvalues() -> None:
    case = BY_NAME["mlp"]
    eigenvalues = dense_eigenvalues(case)
    spectrum = estimate_spectrum(jacobian_of(case))
    sigma, prior = torch.tensor([0.1, 0.5]).double(), torch.tensor([0.7, 2.0]).double()
    epsilon = (sigma / prior) ** 2
    rmse = prior * lost(eigenvalues, epsilon).sqrt()
    bias = prior**2 * lost(eigenvalues, epsilon, power=2)
    dimension = eigenvalues.shape[-1] * (1 - lost(eigenvalues, epsilon))
    for interval, exact in (
        (spectrum.rmse(sigma, prior), rmse),
        (spectrum.bias(sigma, prior), bias),
        (spectrum.effective_dimension(sigma, prior), dimension),
    ):
        assert encloses(interval, exact)
        torch.testing.assert_close(interval.value, exact, rtol=1e-6, atol=1e-9)


def test_bias_and_variance_of_the_ridge_estimator_add_up_to_the_rmse() -> None:
    """Σ ε²τ²/(λ+ε)² + σ² λ/(λ+ε)² = τ² Σ ε/(λ+ε): measured on the attacker's estimator itself."""
    case, sigma, prior = BY_NAME["lenet"], 0.05, 0.5
    j = reference(case.name, None, 2, 3)[1]
    epsilon = (sigma / prior) ** 2
    eye = torch.eye(j.shape[-1], dtype=torch.float64)
    estimator = torch.linalg.solve(torch.einsum("upd,upe->ude", j, j) + epsilon * eye, j.mT)  # [U, D, P]
    pull = estimator @ j - eye
    bias = prior**2 * pull.square().sum((1, 2)) / len(eye)
    variance = sigma**2 * estimator.square().sum((1, 2)) / len(eye)
    spectrum = estimate_spectrum(jacobian_of(case), num_probes=8)
    assert encloses(spectrum.bias(sigma, prior), bias)
    assert encloses(spectrum.rmse(sigma, prior), (bias + variance).sqrt())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["lenet", "resnet", "vit-sdpa", "text-gru"])
def test_sampled_interval_contains_the_dense_leakage(name: str, seed: int) -> None:
    case = BY_NAME[name]
    eigenvalues = dense_eigenvalues(case)
    dim = eigenvalues.shape[-1]
    spectrum = estimate_spectrum(jacobian_of(case), num_probes=2, max_steps=max(2, dim // 4), seed=seed)
    assert not spectrum.exact
    for sigma in SIGMAS:
        assert encloses(spectrum.leakage(sigma, 0.5), 1 - lost(eigenvalues, (sigma / 0.5) ** 2))


@pytest.mark.parametrize("num_probes", [1, 4])
@pytest.mark.parametrize("max_steps", [3, 10, 25])
def test_sampled_interval_contains_the_leakage_over_decades(max_steps: int, num_probes: int) -> None:
    eigenvalues = decades(1, 3, 7)
    jacobian = prescribed(with_eigenvalues(eigenvalues))
    misses = 0
    for seed in range(12):
        spectrum = estimate_spectrum(jacobian, num_probes=num_probes, max_steps=max_steps, seed=seed)
        for sigma in SIGMAS:
            exact = 1 - lost(eigenvalues, sigma**2)
            interval = spectrum.leakage(sigma, 1.0)
            misses += int(((interval.lower - 1e-9 > exact) | (exact > interval.upper + 1e-9)).sum())
    assert misses <= 12 * len(SIGMAS) * 3 * 0.02  # intervals of 99 %


def test_plain_gauss_is_far_off_where_the_pair_says_so() -> None:
    eigenvalues = decades(7, dim=200)
    spectrum = estimate_spectrum(prescribed(with_eigenvalues(eigenvalues)), num_probes=4, max_steps=16)
    ridge = 1e-6
    exact = (1 - lost(eigenvalues, ridge)).item()
    gauss = 1 - spectrum.gauss.mean(ridge / (spectrum.gauss.nodes + ridge)).item()
    interval = spectrum.leakage_at(ridge)
    assert gauss > exact + 0.05
    assert spectrum.gap(ridge).item() > 0.1
    assert encloses(interval, torch.tensor([exact], dtype=torch.float64))


def test_sampling_error_is_calibrated() -> None:
    """Over many draws the interval's half-width is 2.576 standard deviations of its middle.

    The probes of all units are the same: units that differ in their eigenvectors alone are the independent draws.
    """
    draws, ridge = 120, 1e-2
    eigenvalues = decades(4, dim=60)
    jacobian = prescribed(with_eigenvalues(eigenvalues.repeat(draws, 1)))
    spectrum = estimate_spectrum(jacobian, num_probes=2, max_steps=28, rtol=1e-9, ridge=ridge)
    assert not spectrum.exact
    assert (spectrum.gap(ridge) < 1e-4).all()  # nothing but sampling is left
    interval = spectrum.leakage_at(ridge)
    exact = (1 - lost(eigenvalues, ridge)).item()
    deviation = (interval.value - exact).square().mean().sqrt().item()
    assert abs(interval.value.mean().item() - exact) < 4 * deviation / math.sqrt(draws)
    half_width = ((interval.upper - interval.lower) / 2).mean().item()
    assert 0.8 < half_width / (2.576 * deviation) < 1.25


def dense_leakage(eigenvalues: Tensor, sigma: Tensor, prior: float) -> Tensor:
    return 1 - lost(eigenvalues, (sigma / prior) ** 2)


@pytest.mark.parametrize("target", [0.05, 0.3, 0.6, 0.9])
def test_required_noise_brings_the_leakage_to_the_target(target: float) -> None:
    eigenvalues = decades(1, 3, 7)
    jacobian = prescribed(with_eigenvalues(eigenvalues))
    exact = estimate_spectrum(jacobian)
    assert exact.exact
    sigma = exact.required_noise_std(target, 0.5)
    leaks = dense_leakage(eigenvalues, sigma, 0.5)
    assert (leaks <= target + 1e-9).all()
    assert (dense_leakage(eigenvalues, 0.97 * sigma, 0.5) > target).all()  # and no more than that
    for seed in range(3):
        sampled = estimate_spectrum(jacobian, num_probes=2, max_steps=25, seed=seed)
        sigma = sampled.required_noise_std(target, 0.5)
        assert not sampled.exact
        assert (dense_leakage(eigenvalues, sigma, 0.5) <= target + 1e-9).all()
        assert (sampled.leakage(sigma, 0.5).upper <= target + 1e-9).all()


@pytest.mark.parametrize("name", ["mlp", "resnet", "text-transformer"])
def test_required_noise_on_models(name: str) -> None:
    case = BY_NAME[name]
    eigenvalues = dense_eigenvalues(case)
    sigma = estimate_spectrum(jacobian_of(case)).required_noise_std(0.4, 0.5)
    assert (dense_leakage(eigenvalues, sigma, 0.5) <= 0.4 + 1e-9).all()
    assert (dense_leakage(eigenvalues, 0.97 * sigma, 0.5) > 0.4).all()


def wide(rank: int, dim: int) -> Tensor:
    """One J with fewer rows than columns."""
    return torch.randn(1, rank, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("max_steps", [100, 12], ids=["exact", "sampled"])
def test_an_update_that_does_not_determine_the_input(max_steps: int) -> None:
    """With P < D the leakage without noise is P/D, and a target above that needs none."""
    j = wide(8, 80)
    jacobian = prescribed(j)
    eigenvalues = torch.linalg.eigvalsh(j.mT @ j).clamp(min=0)
    eigenvalues[:, :-8] = 0  # but for rounding
    spectrum = estimate_spectrum(jacobian, num_probes=4, max_steps=max_steps)
    assert spectrum.exact == (max_steps == 100)
    assert encloses(spectrum.leakage(0.0, 1.0), torch.tensor([0.1], dtype=torch.float64))
    assert encloses(spectrum.leakage(1.0, 1.0), 1 - lost(eigenvalues, 1.0))
    assert spectrum.leakage(0.0, 1.0).upper.item() == pytest.approx(0.1)
    assert spectrum.required_noise_std(0.5, 1.0).item() == 0
    sigma = spectrum.required_noise_std(0.05, 1.0)
    assert sigma.item() > 0
    assert dense_leakage(eigenvalues, sigma, 1.0).item() <= 0.05 + 1e-9


def test_no_noise_on_a_determined_input_leaks_all_of_it() -> None:
    leakage = estimate_spectrum(prescribed(with_eigenvalues(decades(2)))).leakage(0.0, 1.0)
    assert [part.item() for part in leakage] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("steps", [200, 10], ids=["exact", "sampled"])
def test_same_seed_same_numbers(steps: int) -> None:
    def draw(seed: int) -> Spectrum:
        return estimate_spectrum(prescribed(with_eigenvalues(decades(2, 4))), num_probes=2, max_steps=steps, seed=seed)

    one, again, other = draw(7), draw(7), draw(8)
    assert torch.equal(one.gauss.nodes, again.gauss.nodes)
    assert torch.equal(one.radau.weights, again.radau.weights)
    assert torch.equal(one.gauss.nodes, other.gauss.nodes) == one.exact


def test_probes_leave_the_global_generator_alone() -> None:
    jacobian = prescribed(with_eigenvalues(decades(2)))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    estimate_spectrum(jacobian, num_probes=2, max_steps=10)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("budget", [1, 200_000])
def test_memory_budget_changes_no_leakage(budget: int) -> None:
    case = BY_NAME["lenet"]
    update, (inputs, labels) = gradient_update(case), case.batch(4, 1)
    params = dict(update.model.named_parameters())
    roomy = UpdateJacobian(update, params, inputs, labels)
    tight = UpdateJacobian(update, params, inputs, labels, memory_budget=budget)
    for steps in (100, 5):
        a = estimate_spectrum(roomy, num_probes=2, max_steps=steps).leakage(0.01, 0.5)
        b = estimate_spectrum(tight, num_probes=2, max_steps=steps).leakage(0.01, 0.5)
        for left, right in zip(a, b, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-9)


def test_units_stop_on_their_own_and_spend_no_more_than_the_budget() -> None:
    easy, hard = torch.ones(120).double(), decades(7)[0]
    spectrum = estimate_spectrum(
        prescribed(with_eigenvalues(torch.stack([easy, hard]))), num_probes=2, max_steps=30, ridge=1e-6
    )
    assert spectrum.products[0] <= 4
    assert spectrum.products[1] == 60


@pytest.mark.parametrize("steps", [200, 10], ids=["exact", "sampled"])
def test_a_unit_that_overflows_fails_alone(steps: int) -> None:
    eigenvalues = decades(2, 2, 2)
    matrices = with_eigenvalues(eigenvalues)
    healthy = estimate_spectrum(prescribed(matrices[[0, 2]]), num_probes=2, max_steps=steps)
    matrices[1] *= 1e200  # J is finite, G is not
    spectrum = estimate_spectrum(prescribed(matrices), num_probes=2, max_steps=steps)
    assert spectrum.failed.tolist() == [False, True, False]
    reads: list[Callable[[Spectrum], Tensor]] = [
        lambda s: s.leakage(0.1, 1.0).value,
        lambda s: s.rmse(0.1, 1.0).upper,
        lambda s: s.required_noise_std(0.5, 1.0),
        lambda s: s.largest,
    ]
    for read in reads:
        values = read(spectrum)
        assert values[1].isnan()
        torch.testing.assert_close(values[[0, 2]], read(healthy), rtol=1e-9, atol=0.0)


def test_float32_says_which_ridges_it_resolves() -> None:
    eigenvalues = decades(7)
    matrices = with_eigenvalues(eigenvalues)
    single = estimate_spectrum(prescribed(matrices.float()), num_probes=4, max_steps=200)
    double = estimate_spectrum(prescribed(matrices), num_probes=4, max_steps=200)
    assert single.exact
    assert single.resolved(1e-5).all()
    assert not single.resolved(1e-8).any()
    assert double.resolved(1e-8).all()
    for ridge in (1e-8, 1e-5, 1e-2):  # unresolved or not, the interval holds
        assert encloses(single.leakage_at(ridge), 1 - lost(eigenvalues, ridge))
    unresolved, resolved = single.leakage_at(1e-8), single.leakage_at(1e-4)
    assert (unresolved.upper - unresolved.lower).item() > 5 * (resolved.upper - resolved.lower).item()


@pytest.mark.parametrize("steps", [400, 20], ids=["exact", "sampled"])
def test_float32_interval_contains_the_leakage_of_models(steps: int) -> None:
    case = BY_NAME["lenet"]
    eigenvalues = dense_eigenvalues(case)
    update = gradient_update(case, torch.float32)
    inputs, labels = case.batch(2, 3)
    spectrum = estimate_spectrum(audited(update, inputs.float(), labels, None), num_probes=2, max_steps=steps)
    for sigma in SIGMAS:
        exact = 1 - lost(eigenvalues, (sigma / 0.5) ** 2)
        assert encloses(spectrum.leakage(sigma, 0.5), exact, rounding=1e-6)


def test_per_unit_options() -> None:
    device = torch.device("cpu")
    assert per_unit(2, "ridge", num_units=3, device=device).tolist() == [2.0, 2.0, 2.0]
    assert per_unit(torch.tensor([1.0, 2.0]), "ridge", num_units=2, device=device).tolist() == [1.0, 2.0]
