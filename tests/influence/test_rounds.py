"""What several rounds tell together, and which directions of the input noise protects: against dense references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fl_privacy import (
    GramSum,
    MeanGram,
    UpdateJacobian,
    draw_input_noise,
    estimate_spectrum,
    protected_directions,
    recommend_noise,
)
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.spectrum import dense_gram

from .cases import BY_NAME, gradient_update, parameters_of, prescribed, with_eigenvalues

PRIOR = 0.4


def rounds(count: int, *, units: int = 2) -> list[UpdateJacobian]:
    """The same private inputs at the parameters of several rounds."""
    case = BY_NAME["lenet"]
    update, (inputs, labels) = gradient_update(case), case.batch(units, 1)
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        noise = {
            n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in update.model.named_parameters()
        }
        params = {name: p + 0.3 * noise[name] for name, p in parameters_of(update.model).items()}
        found.append(UpdateJacobian(update, params, inputs, labels))
    return found


def dense_leakage(information: Tensor) -> Tensor:
    """(1/D) tr M(M + 1/τ²)⁻¹ `[U]`."""
    m = torch.linalg.eigvalsh(information).clamp(min=0)
    return (m / (m + 1 / PRIOR**2)).mean(-1)


def information(terms: list[UpdateJacobian], stds: list[float]) -> Tensor:
    return torch.stack(
        [
            sum((dense_gram(term, unit) / std**2 for term, std in zip(terms, stds, strict=True)), torch.zeros(36, 36))
            for unit in range(terms[0].num_units)
        ]
    )


def test_leakage_of_all_rounds_is_that_of_the_summed_information() -> None:
    terms, stds = rounds(3), [0.05, 0.1, 0.2]
    together = GramSum(terms, noise_stds=stds)
    v = torch.randn(2, 36, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense = information(terms, stds)
    torch.testing.assert_close(together.gram(v), torch.einsum("ude,ue->ud", dense, v))
    leakage = estimate_spectrum(together).leakage(1.0, PRIOR)
    torch.testing.assert_close(leakage.value, dense_leakage(dense), rtol=1e-7, atol=0)
    for term, std in zip(terms, stds, strict=True):  # more than any round alone
        assert (leakage.value > estimate_spectrum(term).leakage(std, PRIOR).value + 1e-3).all()
    sampled = estimate_spectrum(together, num_probes=2, max_steps=12).leakage(1.0, PRIOR)
    assert (sampled.lower <= leakage.value).all()
    assert (leakage.value <= sampled.upper).all()


def test_the_best_linear_attacker_on_all_rounds_misses_by_what_the_sum_says() -> None:
    terms, stds = rounds(2, units=1), [0.05, 0.1]
    j = torch.cat([term.select(torch.zeros(36, dtype=torch.long)).jvp(torch.eye(36).double()).T for term in terms])
    precision = torch.cat([torch.full((term.update_dim,), std**-2) for term, std in zip(terms, stds, strict=True)])
    posterior = torch.linalg.inv(j.T @ (precision.double()[:, None] * j) + torch.eye(36) / PRIOR**2)
    leakage = estimate_spectrum(GramSum(terms, noise_stds=stds)).leakage(1.0, PRIOR).value
    assert 1 - float(posterior.trace()) / 36 / PRIOR**2 == pytest.approx(float(leakage), rel=1e-7)


@pytest.mark.parametrize("count", [1, 4])
def test_equal_rounds_need_the_root_of_their_number_more_noise(count: int) -> None:
    (term,) = rounds(1)
    sigma = estimate_spectrum(term).required_noise_std(0.5, PRIOR)
    repeated = GramSum([term] * count, noise_stds=[sigma * count**0.5] * count)
    torch.testing.assert_close(
        estimate_spectrum(repeated).leakage(1.0, PRIOR).value, torch.full((2,), 0.5).double(), rtol=1e-4, atol=0
    )


def test_noise_for_a_sum_of_rounds_is_recommended_and_drawn_like_any_other() -> None:
    together = GramSum(rounds(2), noise_stds=[1.0, 1.0])
    noise = recommend_noise(estimate_spectrum(together), target_leakage=0.4, prior_std=PRIOR)
    drawn = draw_input_noise(together, noise, 0)
    assert drawn.noise.shape == (2, 36)
    assert drawn.converged.all()


def test_sums_keep_their_weights_with_the_units_that_are_chosen() -> None:
    terms = rounds(2)
    per_unit = [torch.tensor([0.1, 0.2], dtype=torch.float64), torch.tensor([0.3, 0.4], dtype=torch.float64)]
    together = GramSum(terms, noise_stds=per_unit)
    v = torch.ones(2, 36, dtype=torch.float64)
    chosen = together.select(torch.tensor([1, 1]))
    torch.testing.assert_close(chosen.gram(v), together.gram(v)[[1, 1]])
    parts = list(together.chunks(terms[0].memory_budget))
    assert [units.tolist() for _, units in parts] == [[0], [1]]
    torch.testing.assert_close(parts[1][0].gram(v[:1]), together.gram(v)[1:])


def test_bad_sums_are_named() -> None:
    terms = rounds(2)
    for match, call in {
        "one noise std": lambda: GramSum(terms, noise_stds=[1.0]),
        "at least one term": lambda: GramSum([], noise_stds=[]),
        "same units": lambda: GramSum([terms[0], terms[1].select(torch.tensor([0]))], noise_stds=[1.0, 1.0]),
        "noise stds > 0": lambda: GramSum(terms, noise_stds=[1.0, 0.0]),
    }.items():
        with pytest.raises(InvalidInputError, match=match):
            call()


def test_directions_are_the_eigenvectors_that_protect_most_at_least_cost() -> None:
    eigenvalues = torch.logspace(-3, 0, 20, dtype=torch.float64).expand(2, -1)
    jacobian = prescribed(with_eigenvalues(eigenvalues))
    noise = recommend_noise(estimate_spectrum(jacobian), target_leakage=0.5, prior_std=PRIOR, largest_ratio=1e9)
    found = protected_directions(jacobian, noise, 5)
    torch.testing.assert_close(found.eigenvalues, eigenvalues[:, :5], rtol=1e-8, atol=0)
    torch.testing.assert_close(found.std, noise.variance(eigenvalues[:, :5]).sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.leakage, (eigenvalues[:, :5] / noise.level[:, None]).sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.cost, (eigenvalues[:, :5].sqrt() * found.std), rtol=1e-6, atol=0)
    for unit in range(2):
        v = found.vectors[unit]
        torch.testing.assert_close(v @ v.T, torch.eye(5).double(), rtol=0, atol=1e-9)
        gram = dense_gram(jacobian, unit)
        torch.testing.assert_close(gram @ v.T, v.T * eigenvalues[unit, :5], rtol=0, atol=1e-9)
    # Protection bought per squared cost falls from one to the next.
    gain = (1 - found.leakage) / found.cost**2
    assert (gain.diff(dim=1) < 0).all()


def test_short_iterations_give_orthonormal_directions_with_their_own_cost() -> None:
    jacobian = prescribed(with_eigenvalues(torch.logspace(-5, 0, 60, dtype=torch.float64)[None]))
    noise = recommend_noise(estimate_spectrum(jacobian), target_leakage=0.5, prior_std=PRIOR)
    found = protected_directions(jacobian, noise, 3, max_steps=12)
    v, gram = found.vectors[0], dense_gram(jacobian, 0)
    torch.testing.assert_close(v @ v.T, torch.eye(3).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close((v @ gram * v).sum(1), found.eigenvalues[0], rtol=1e-6, atol=1e-12)
    left = torch.linalg.vector_norm(v @ gram - found.eigenvalues[0][:, None] * v, dim=1)
    torch.testing.assert_close(found.residual[0] * torch.linalg.eigvalsh(gram)[-1], left, rtol=1e-2, atol=1e-12)


def test_directions_of_a_public_covariance() -> None:
    case = BY_NAME["lenet"]
    update = gradient_update(case)
    inputs, labels = case.batch(3, 1, seed=5)
    public = MeanGram(UpdateJacobian(update, parameters_of(update.model), inputs, labels))
    own = UpdateJacobian(update, parameters_of(update.model), *case.batch(1, 1))
    noise = recommend_noise(
        estimate_spectrum(own), target_leakage=0.5, prior_std=PRIOR, public=estimate_spectrum(public)
    )
    found = protected_directions(public, noise, 2)
    lowest = torch.linalg.eigvalsh(dense_gram(public, 0))[:2].clamp(min=0)
    torch.testing.assert_close(found.eigenvalues[0], lowest, rtol=1e-3, atol=1e-9)
    with pytest.raises(InvalidInputError, match="k <= 36"):
        protected_directions(public, noise, 37)
