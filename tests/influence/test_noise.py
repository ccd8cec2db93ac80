"""Recommended noise against dense water-filling, and draws of it against their law."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fl_privacy import (
    InputNoise,
    MeanGram,
    NoiseRecommendation,
    Spectrum,
    UpdateJacobian,
    draw_input_noise,
    estimate_spectrum,
    recommend_noise,
    sample_input_noise,
)
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.spectrum import dense_gram

from .cases import (
    BY_NAME,
    LOCAL_TRAINING,
    Sgd,
    audited,
    columns_of,
    gradient_update,
    prescribed,
    reference,
    with_eigenvalues,
)

TARGETS = (0.99, 0.9, 0.5, 0.1)
PRIOR = 0.4


def lenet(examples: int = 2, *, training: bool = False, dtype: torch.dtype = torch.float64) -> UpdateJacobian:
    case = BY_NAME["lenet"]
    inputs, labels = case.batch(2, 3 if training else examples)
    update = LOCAL_TRAINING.update(case, case.model(dtype)) if training else gradient_update(case, dtype)
    return audited(update, inputs.to(dtype), labels, None)


def log_uniform(*decades: float, dim: int = 60) -> Tensor:
    """Eigenvalues `[U, D]` over so many decades below 1."""
    return torch.stack([torch.logspace(-span, 0, dim, dtype=torch.float64) for span in decades])


def leakage_of(variances: Tensor, prior: float = PRIOR) -> Tensor:
    return (prior**2 / (prior**2 + variances)).mean(-1)


def covariance_leakage(covariance: Tensor, prior: float = PRIOR) -> float:
    """(1/D) tr τ²(τ² + S)⁻¹ of any covariance S, the share that the best linear-Gaussian attacker on x + a recovers."""
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
    return float(leakage_of(eigenvalues, prior))


def root(recommendation: NoiseRecommendation, gram: Tensor) -> Tensor:
    """h(G)^½ of dense matrices `[U, D, D]`."""
    values, vectors = torch.linalg.eigh(gram)
    variances = recommendation.variance(values.clamp(min=0))
    result: Tensor = vectors @ torch.diag_embed(variances.sqrt()) @ vectors.mT
    return result


def unmargined(noise: InputNoise, seed: int) -> Tensor:
    """The draw before white noise and scale were added to it."""
    generator = torch.Generator().manual_seed(seed)
    _, white = (torch.randn(noise.noise.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (noise.noise - noise.white_std[:, None] * white) / noise.scale[:, None]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("training", [False, True], ids=["gradient", "training"])
def test_target_and_norms_equal_the_dense_law(target: float, training: bool) -> None:
    jacobian = lenet(training=training)
    j = reference("lenet", LOCAL_TRAINING if training else None, 2, 3 if training else 2)[1]
    eigenvalues = torch.linalg.eigvalsh(j.mT @ j).clamp(min=0)
    target = target * min(1.0, j.shape[1] / j.shape[2])  # no more than P numbers can leak
    noise = recommend_noise(estimate_spectrum(jacobian), target_leakage=target, prior_std=PRIOR)
    variances = noise.variance(eigenvalues)
    torch.testing.assert_close(leakage_of(variances), torch.full((2,), target).double(), rtol=1e-2, atol=0)
    assert (leakage_of(variances) <= target + 1e-7).all()
    torch.testing.assert_close(noise.shaped_norm, (eigenvalues * variances).sum(-1).sqrt(), rtol=1e-6, atol=0)
    white = PRIOR * math.sqrt(1 / target - 1)
    torch.testing.assert_close(noise.white_norm, white * eigenvalues.sum(-1).sqrt(), rtol=1e-6, atol=0)
    sigma = noise.isotropic_std
    torch.testing.assert_close(noise.isotropic_norm, sigma * math.sqrt(jacobian.update_dim))
    dense_isotropic = (eigenvalues / (eigenvalues + (sigma[:, None] / PRIOR) ** 2)).mean(-1)
    torch.testing.assert_close(dense_isotropic, torch.full((2,), target).double(), rtol=1e-2, atol=0)


def test_the_law_takes_the_nodes_of_a_spectrum_of_several_probes() -> None:
    operator = prescribed(with_eigenvalues(log_uniform(3, 7)))
    spectrum = estimate_spectrum(operator, num_probes=3, max_steps=12)
    noise = recommend_noise(spectrum, target_leakage=0.4, prior_std=PRIOR)
    nodes = spectrum.gauss.nodes
    assert nodes.shape[:2] == (3, 2)
    of_each = torch.stack([noise.select(torch.tensor([unit])).variance(nodes[:, unit, None]) for unit in range(2)], 1)
    assert torch.equal(noise.variance(nodes), of_each.squeeze(2))
    leaks = spectrum.mean(lambda at: PRIOR**2 / (PRIOR**2 + noise.variance(at)))
    assert ((noise.leakage.lower <= leaks) & (leaks <= noise.leakage.upper)).all()
    drawn = draw_input_noise(operator, noise, 0, max_steps=8)
    assert (drawn.scale > 1).all()
    for unit in range(2):
        expected = drawn.scale[unit] ** 2 * noise.variance(nodes)[:, unit] + drawn.white_std[unit] ** 2
        torch.testing.assert_close(drawn.variance(noise, nodes)[:, unit], expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("ratio", [1.5, 4.0, 1e9])
def test_no_law_of_the_same_leakage_and_cap_changes_the_update_less(target: float, ratio: float) -> None:
    """The optimum of the convex programme min Σ λh, (1/D) Σ τ²/(τ² + h) ≤ L, 0 ≤ h ≤ cap, by its KKT conditions."""
    eigenvalues = log_uniform(3, 7)
    spectrum = estimate_spectrum(prescribed(with_eigenvalues(eigenvalues)))
    noise = recommend_noise(spectrum, target_leakage=target, prior_std=PRIOR, largest_ratio=ratio)
    h = noise.variance(eigenvalues)
    cap = noise.largest_variance[:, None]
    torch.testing.assert_close(cap, torch.full_like(cap, ratio * PRIOR**2 * (1 / target - 1)))
    # Protection bought per cost, τ²/(τ² + h)²/λ, is one number where h is free; less at 0 and no less at the cap.
    rate = PRIOR**2 / (PRIOR**2 + h) ** 2 / eigenvalues
    for unit in range(2):
        free = (h[unit] > 0) & (h[unit] < cap[unit])
        assert free.any()
        price = rate[unit, free].mean()
        torch.testing.assert_close(rate[unit, free], price.expand(int(free.sum())), rtol=1e-5, atol=0)
        assert (rate[unit, h[unit] == 0] <= price * (1 + 1e-6)).all()
        assert (rate[unit, h[unit] == cap[unit]] >= price * (1 - 1e-6)).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_steps", [4, 10, 25])
def test_a_coarse_spectrum_asks_for_more_noise_never_for_less(max_steps: int, seed: int) -> None:
    eigenvalues = log_uniform(1, 4, 7, dim=150)
    spectrum = estimate_spectrum(
        prescribed(with_eigenvalues(eigenvalues)), num_probes=2, max_steps=max_steps, rtol=1e-9, seed=seed
    )
    assert not spectrum.exact
    for target in TARGETS:
        noise = recommend_noise(spectrum, target_leakage=target, prior_std=PRIOR)
        reached = leakage_of(noise.variance(eigenvalues))
        assert (reached <= target).all()
        assert (noise.leakage.lower <= reached).all()
        assert (reached <= noise.leakage.upper + 1e-9).all()
        torch.testing.assert_close(noise.leakage.upper, torch.full((3,), target).double(), rtol=1e-3, atol=0)


def test_more_steps_close_in_on_the_target() -> None:
    eigenvalues = log_uniform(4, dim=150)
    jacobian = prescribed(with_eigenvalues(eigenvalues))
    reached = []
    for max_steps in (6, 20, 60):
        spectrum = estimate_spectrum(jacobian, num_probes=2, max_steps=max_steps, rtol=1e-9)
        noise = recommend_noise(spectrum, target_leakage=0.5, prior_std=PRIOR)
        reached.append(float(leakage_of(noise.variance(eigenvalues))))
    assert reached == sorted(reached)
    assert 0.4 < reached[-1] <= 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", TARGETS)
def test_draws_are_the_root_of_the_law_times_normal_numbers(target: float, dtype: torch.dtype) -> None:
    jacobian = lenet(dtype=dtype)
    noise = recommend_noise(estimate_spectrum(jacobian), target_leakage=target / 2, prior_std=PRIOR)
    gram = torch.stack([dense_gram(jacobian, unit) for unit in range(2)])
    drawn = draw_input_noise(jacobian, noise, 5, rtol=1e-12)
    assert drawn.noise.dtype == dtype
    z = torch.randn(2, jacobian.input_dim, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    exact = torch.einsum("ude,ue->ud", root(noise, gram), z)
    # In float32 the kink of h meets eigenvalues that are known to 1e-7 of the largest.
    tolerance = 1e-6 if dtype == torch.float64 else 2e-2
    assert (torch.linalg.vector_norm(unmargined(drawn, 5) - exact, dim=-1) <= tolerance * exact.norm(dim=-1)).all()


@pytest.mark.parametrize("private", [None, 1], ids=["batch", "example"])
@pytest.mark.parametrize("sgd", [None, LOCAL_TRAINING], ids=["gradient", "local training"])
def test_sampled_covariance_of_a_model_equals_the_law_by_its_dense_jacobian(
    sgd: Sgd | None, private: int | None
) -> None:
    case = BY_NAME["mlp"]
    inputs, labels = case.batch(1, 3)
    chosen = None if private is None else torch.tensor([private])
    update = gradient_update(case) if sgd is None else sgd.update(case, case.model())
    jacobian = audited(update, inputs, labels, chosen)
    _, plain = reference("mlp", sgd, 1, 3)
    dense = columns_of(plain, chosen, 3)[0]
    noise = recommend_noise(estimate_spectrum(jacobian), target_leakage=0.5, prior_std=PRIOR)
    copies = torch.zeros(4000, dtype=torch.long)
    a = draw_input_noise(jacobian.select(copies), noise.select(copies), 3, rtol=1e-9).noise
    law = root(noise, (dense.T @ dense)[None])[0]
    values, vectors = torch.linalg.eigh(law)
    kept = values > 1e-6
    whitened = (a @ vectors)[:, kept] / values[kept]
    covariance = whitened.T @ whitened / len(copies)
    assert (covariance - torch.eye(int(kept.sum()))).abs().max() < 5 * math.sqrt(2 / len(copies))
    assert ((a @ vectors)[:, ~kept].abs() < 1e-4).all()
    assert covariance_leakage(law @ law) == pytest.approx(0.5, rel=0.01)


def test_sampled_covariance_equals_the_law() -> None:
    eigenvalues = log_uniform(2, dim=12)
    jacobian = prescribed(with_eigenvalues(eigenvalues))
    noise = recommend_noise(estimate_spectrum(jacobian), target_leakage=0.5, prior_std=PRIOR)
    draws = 3000
    many = jacobian.select(torch.zeros(draws, dtype=torch.long))
    a = sample_input_noise(many, noise.select(torch.zeros(draws, dtype=torch.long)), 0)
    law = root(noise, dense_gram(jacobian, 0)[None])[0]
    # Whitened draws have covariance I, each entry's standard error being √2/√n on the diagonal and 1/√n off it.
    kept = torch.linalg.eigvalsh(law) > 1e-9
    values, vectors = torch.linalg.eigh(law)
    whitened = (a @ vectors)[:, kept] / values[kept]
    covariance = whitened.T @ whitened / draws
    assert (covariance - torch.eye(int(kept.sum()))).abs().max() < 5 * math.sqrt(2 / draws)
    assert (a @ vectors)[:, ~kept].abs().max() < 1e-6
    measured = (a @ dense_gram(jacobian, 0) * a).sum(-1).mean().sqrt()
    torch.testing.assert_close(measured, noise.shaped_norm[0], rtol=0.05, atol=0)


@pytest.mark.parametrize("target", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("max_steps", [6, 12, 24])
def test_a_truncated_iteration_protects_more_and_says_by_how_much(target: float, max_steps: int) -> None:
    eigenvalues = log_uniform(4, dim=80)
    jacobian = prescribed(with_eigenvalues(eigenvalues))
    noise = recommend_noise(estimate_spectrum(jacobian), target_leakage=target, prior_std=PRIOR)
    gram, copies = dense_gram(jacobian, 0), torch.zeros(2000, dtype=torch.long)
    drawn = draw_input_noise(jacobian.select(copies), noise.select(copies), 1, max_steps=max_steps, rtol=1e-3)
    assert not drawn.converged.any()
    assert (drawn.products <= max_steps).all()
    covariance = drawn.noise.T @ drawn.noise / len(copies)
    # The sample covariance of so many draws overstates leakage by about (D/n)·Σ s²τ²/(τ² + s²)²/D < 1e-2.
    assert covariance_leakage(covariance) <= target + 80 / len(copies) / 4
    change = torch.einsum("nd,de,ne->n", drawn.noise, gram, drawn.noise).mean().sqrt()
    torch.testing.assert_close(change, drawn.expected_norm.square().mean().sqrt(), rtol=0.1, atol=0)
    assert (drawn.expected_norm > noise.shaped_norm).all()
    assert (drawn.expected_norm <= noise.white_norm).all()
    # What is reported bounds the true error of the draw.
    shaped = drawn.scale > 0
    z = torch.randn(len(copies), 80, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = z @ root(noise, gram[None])[0]
    error = (unmargined(drawn, 1) - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert (error <= drawn.residual)[shaped].all()


@pytest.mark.parametrize("target", [0.5, 0.3])
def test_a_single_step_says_nothing_and_is_made_up_for(target: float) -> None:
    jacobian = prescribed(with_eigenvalues(torch.tensor([[1.0, 1e-4]], dtype=torch.float64)))
    noise = recommend_noise(estimate_spectrum(jacobian), target_leakage=target, prior_std=PRIOR)
    copies = torch.zeros(20000, dtype=torch.long)
    drawn = draw_input_noise(jacobian.select(copies), noise.select(copies), 1, max_steps=1)
    assert not drawn.converged.any()
    assert (drawn.residual == 1).all()
    assert covariance_leakage(drawn.noise.T @ drawn.noise / len(copies)) <= 1.02 * target


def test_of_a_batch_drawn_example_by_example_no_more_noise_is_said_than_each_has() -> None:
    (public, batches), (_, single) = public_and_own(3), public_and_own(1)
    operator, drawn = MeanGram(public), []
    for own in (batches, single.select(torch.zeros(6, dtype=torch.long))):
        spectra = (estimate_spectrum(own), estimate_spectrum(operator))
        law = recommend_noise(spectra[0], target_leakage=0.5, prior_std=PRIOR, public=spectra[1])
        drawn.append(draw_input_noise(own, law, 7, public=operator, max_steps=4))
    together, each = drawn
    torch.testing.assert_close(together.noise, each.noise.reshape(2, -1))
    for name in ("scale", "white_std"):
        of_each = getattr(each, name).reshape(2, 3)
        assert (of_each.amax(1) > of_each.amin(1)).all()
        assert torch.equal(getattr(together, name), of_each.amin(1))


def test_draws_are_deterministic_for_a_seed_and_new_without_one() -> None:
    jacobian = lenet()
    noise = recommend_noise(estimate_spectrum(jacobian), target_leakage=0.3, prior_std=PRIOR)
    first = sample_input_noise(jacobian, noise, 3)
    assert torch.equal(first, sample_input_noise(jacobian, noise, 3))
    others = [sample_input_noise(jacobian, noise, 4), *(sample_input_noise(jacobian, noise) for _ in range(2))]
    assert all(not torch.allclose(first, other) for other in others)
    assert not torch.allclose(others[1], others[2])


def test_units_are_drawn_alike_whatever_fits_into_one_pass() -> None:
    case = BY_NAME["lenet"]
    update, (inputs, labels) = gradient_update(case), case.batch(3, 2)
    params = dict(update.model.named_parameters())
    spectrum = estimate_spectrum(UpdateJacobian(update, params, inputs, labels))
    noise = recommend_noise(spectrum, target_leakage=0.3, prior_std=PRIOR)
    together = sample_input_noise(UpdateJacobian(update, params, inputs, labels), noise, 0)
    apart = sample_input_noise(UpdateJacobian(update, params, inputs, labels, memory_budget=1), noise, 0)
    torch.testing.assert_close(together, apart, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("training", [False, True], ids=["gradient", "training"])
@pytest.mark.parametrize("private", [None, [1, 0]], ids=["batch", "example"])
def test_shifted_jacobian_is_the_jacobian_of_the_shifted_inputs(private: list[int] | None, training: bool) -> None:
    case = BY_NAME["lenet"]
    inputs, labels = case.batch(2, 3)
    update = LOCAL_TRAINING.update(case, case.model()) if training else gradient_update(case)
    slots = None if private is None else torch.tensor(private)
    jacobian = audited(update, inputs, labels, slots)
    a = torch.randn(2, jacobian.input_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = inputs.clone()
    for unit in range(2):
        if private is None:
            moved[unit] += a[unit].reshape(moved[unit].shape)
        else:
            moved[unit, private[unit]] += a[unit].reshape(moved[unit, 0].shape)
    expected, got = audited(update, moved, labels, slots), jacobian.shifted(a)
    torch.testing.assert_close(got.update(), expected.update())
    torch.testing.assert_close(got.gram(a), expected.gram(a))
    torch.testing.assert_close(got.private_inputs, expected.private_inputs)
    torch.testing.assert_close(got.select(torch.tensor([1])).update(), expected.update()[1:])
    torch.testing.assert_close(jacobian.update(), audited(update, inputs, labels, slots).update())  # unchanged
    # To first order the update moves by J·a.
    small = 1e-6 * a
    torch.testing.assert_close(
        jacobian.shifted(small).update() - jacobian.update(), jacobian.jvp(small), rtol=1e-3, atol=1e-10
    )


def test_bounds_keep_shifted_inputs_valid_and_depend_on_x_plus_a_alone() -> None:
    case = BY_NAME["lenet"]
    inputs, labels = case.batch(1, 1)
    update = gradient_update(case)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(inputs.shape, generator=generator, dtype=torch.float64)
    a = torch.randn(1, x.numel(), generator=generator, dtype=torch.float64)
    shifted = audited(update, x, labels, None).shifted(a, bounds=(0.0, 1.0))
    torch.testing.assert_close(shifted.private_inputs, (x.reshape(1, -1) + a).clamp(0, 1))
    # Another input with the same x + a: what is shared cannot tell them apart.
    other = torch.rand(inputs.shape, generator=generator, dtype=torch.float64)
    same_sum = audited(update, other, labels, None).shifted(a + (x - other).reshape(1, -1), bounds=(0.0, 1.0))
    torch.testing.assert_close(same_sum.update(), shifted.update(), rtol=1e-12, atol=1e-14)
    per_channel = torch.tensor([[[0.25]]]), torch.tensor([[[0.75]]])
    inside = audited(update, x.clamp(0.25, 0.75), labels, None).shifted(a, bounds=per_channel)
    assert inside.private_inputs.min() == 0.25
    assert inside.private_inputs.max() == 0.75


def public_and_own(examples: int) -> tuple[UpdateJacobian, UpdateJacobian]:
    case = BY_NAME["lenet"]
    update = gradient_update(case)
    public, labels = case.batch(4, 1, seed=9)
    return audited(update, public, labels, None), audited(update, *case.batch(2, examples), None)


def test_mean_gram_is_the_mean_and_has_its_spectrum() -> None:
    public, _ = public_and_own(1)
    mean = torch.stack([dense_gram(public, unit) for unit in range(4)]).mean(0)
    operator = MeanGram(public, num_units=3)
    v = torch.randn(3, operator.input_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(operator.gram(v), v @ mean)
    torch.testing.assert_close(dense_gram(MeanGram(public), 0), mean)
    exact = estimate_spectrum(MeanGram(public))
    torch.testing.assert_close(exact.gauss.nodes[0, 0], torch.linalg.eigvalsh(mean).clamp(min=0), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("examples", [1, 3])
def test_public_covariance_meets_the_target_without_the_private_input(examples: int) -> None:
    public, own = public_and_own(examples)
    operator = MeanGram(public)
    noise = recommend_noise(
        estimate_spectrum(own), target_leakage=0.4, prior_std=PRIOR, public=estimate_spectrum(operator)
    )
    assert noise.covariance == "public"
    law = root(noise, dense_gram(operator, 0).expand(2, -1, -1))
    assert covariance_leakage(law[0] @ law[0]) == pytest.approx(0.4, rel=1e-2)
    drawn = draw_input_noise(own, noise, 7, public=operator, rtol=1e-12)
    z = torch.randn(2 * examples, 36, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    torch.testing.assert_close(drawn.noise, (z @ law[0]).reshape(2, -1), rtol=1e-5, atol=1e-7)
    # No product with the client's own G is taken: the covariance is the same whatever x is.
    moved = own.shifted(torch.ones(2, own.input_dim, dtype=torch.float64))
    assert torch.equal(
        sample_input_noise(moved, noise, 7, public=operator), sample_input_noise(own, noise, 7, public=operator)
    )
    # The estimated cost has the right size: public and own G are alike up to scale here.
    own_gram = torch.stack([dense_gram(own, unit) for unit in range(2)])
    blocks = torch.stack([torch.block_diag(*[law[0] @ law[0]] * examples)] * 2)
    true_norm = torch.einsum("ude,ued->u", own_gram, blocks).sqrt()
    assert ((noise.shaped_norm / true_norm) < 3).all()
    assert ((noise.shaped_norm / true_norm) > 1 / 3).all()


def test_one_target_or_one_per_unit() -> None:
    spectrum = estimate_spectrum(lenet())
    both = recommend_noise(spectrum, target_leakage=torch.tensor([0.4, 0.2], dtype=torch.float64), prior_std=PRIOR)
    for unit, target in enumerate((0.4, 0.2)):
        alone = recommend_noise(spectrum, target_leakage=target, prior_std=PRIOR)
        for name in ("isotropic_std", "shaped_norm", "level", "white_std"):
            torch.testing.assert_close(getattr(both, name)[unit], getattr(alone, name)[unit])
    chosen = both.select(torch.tensor([1]))
    assert chosen.target_leakage.tolist() == [0.2]
    assert chosen.leakage.upper.tolist() == both.leakage.upper[1:].tolist()


def test_a_target_that_is_met_gets_no_noise_and_says_so() -> None:
    wide = prescribed(
        torch.randn(1, 3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )  # P/D < 0.1
    noise = recommend_noise(estimate_spectrum(wide), target_leakage=0.1, prior_std=PRIOR)
    assert noise.already_met.tolist() == [True]
    for number in (noise.isotropic_std, noise.isotropic_norm, noise.shaped_norm, noise.white_std, noise.variance(0.0)):
        assert number.tolist() == [0.0]
    assert noise.leakage.upper.item() <= 0.1
    drawn = draw_input_noise(wide, noise, 0)
    assert not drawn.noise.any()
    assert drawn.products.tolist() == [0]
    just_over = recommend_noise(estimate_spectrum(wide), target_leakage=0.07, prior_std=PRIOR)
    assert not just_over.already_met.any()
    assert sample_input_noise(wide, just_over, 0).any()


def broken() -> Spectrum:
    matrices = with_eigenvalues(log_uniform(1, 1, dim=6))
    matrices[1] *= 1e200  # J is finite, G is not
    return estimate_spectrum(prescribed(matrices))


def test_a_unit_without_a_spectrum_gets_no_number_and_no_draw() -> None:
    noise = recommend_noise(broken(), target_leakage=0.5, prior_std=PRIOR)
    assert noise.failed.tolist() == [False, True]
    assert not noise.already_met.any()
    for number in (noise.isotropic_std, noise.shaped_norm, noise.level, noise.leakage.upper):
        assert number.isnan().tolist() == [False, True]
    jacobian = prescribed(with_eigenvalues(log_uniform(1, 1, dim=6)))
    with pytest.raises(InvalidInputError, match=r"got none for units \[1\]"):
        sample_input_noise(jacobian, noise, 0)
    assert sample_input_noise(jacobian.select(torch.tensor([0])), noise.select(torch.tensor([0])), 0).any()


def test_an_iteration_too_short_to_find_what_needs_noise_gives_way_to_white_noise() -> None:
    jacobian = prescribed(with_eigenvalues(log_uniform(6, dim=80)))
    noise = recommend_noise(estimate_spectrum(jacobian), target_leakage=0.99, prior_std=PRIOR)
    drawn = draw_input_noise(jacobian, noise, 0, max_steps=2)
    assert not drawn.converged.any()
    assert drawn.scale.tolist() == [0.0]
    assert torch.equal(drawn.white_std, noise.white_std)
    assert torch.equal(drawn.expected_norm, noise.white_norm)
    assert covariance_leakage(torch.eye(80) * drawn.white_std**2) == pytest.approx(0.99)


@pytest.mark.parametrize("target", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_targets_outside_zero_and_one_are_refused(target: float) -> None:
    with pytest.raises(InvalidInputError, match="target_leakage"):
        recommend_noise(estimate_spectrum(lenet()), target_leakage=target, prior_std=PRIOR)


def test_other_bad_input_is_named() -> None:
    public, own = public_and_own(1)
    spectrum, operator = estimate_spectrum(own), MeanGram(public)
    noise = recommend_noise(spectrum, target_leakage=0.5, prior_std=PRIOR)
    shaped = recommend_noise(spectrum, target_leakage=0.5, prior_std=PRIOR, public=estimate_spectrum(operator))
    other = prescribed(with_eigenvalues(log_uniform(1, dim=5)))
    for match, call in {
        "prior_std > 0": lambda: recommend_noise(spectrum, target_leakage=0.5, prior_std=0.0),
        "largest_ratio > 1": lambda: recommend_noise(spectrum, target_leakage=0.5, prior_std=1.0, largest_ratio=1.0),
        "one per unit": lambda: recommend_noise(spectrum, target_leakage=torch.full((3,), 0.5), prior_std=1.0),
        "public spectrum of one unit": lambda: recommend_noise(
            spectrum, target_leakage=0.5, prior_std=1.0, public=estimate_spectrum(other)
        ),
        "recommendation for 1 units": lambda: sample_input_noise(other, noise, 0),
        "covariance is 'public'": lambda: sample_input_noise(own, shaped, 0),
        "covariance is 'own'": lambda: sample_input_noise(own, noise, 0, public=operator),
        "eigenvalues of 2 units": lambda: noise.variance(torch.ones(3)),
        "rtol > 0": lambda: draw_input_noise(own, noise, 0, rtol=0.0),
        "shift of shape": lambda: own.shifted(torch.zeros(2, 3)),
        "finite shift": lambda: own.shifted(torch.full((2, 36), math.nan, dtype=torch.float64)),
        "within the bounds": lambda: own.shifted(torch.zeros(2, 36, dtype=torch.float64), bounds=(0.0, 1.0)),
        "below its upper": lambda: own.shifted(torch.zeros(2, 36, dtype=torch.float64), bounds=(1.0, 1.0)),
        "broadcast": lambda: own.shifted(torch.zeros(2, 36, dtype=torch.float64), bounds=(torch.zeros(7), 9.0)),
    }.items():
        with pytest.raises(InvalidInputError, match=match):
            call()
