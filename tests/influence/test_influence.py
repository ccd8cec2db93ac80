"""I²F equals a dense solve, and the lower bound equals the paper's eigensolver in parameter space."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from fl_privacy import UpdateJacobian, influence, influence_lower_bound

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


def jacobian_of(case: Case, *, training: bool = False, dtype: torch.dtype = torch.float64) -> UpdateJacobian:
    update = LOCAL_TRAINING.update(case, case.model(dtype)) if training else gradient_update(case, dtype)
    inputs, labels = case.batch(2, 3)
    return audited(update, inputs.to(dtype), labels.to(dtype) if case.regression else labels, None)


def dense_of(case: Case, *, training: bool = False) -> tuple[Tensor, Tensor]:
    """Returns (J `[U, P, D]`, G)."""
    j = reference(case.name, LOCAL_TRAINING if training else None, 2, 3)[1]
    return j, torch.einsum("upd,upe->ude", j, j)


def noise(jacobian: UpdateJacobian, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (jacobian.num_units, jacobian.update_dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(jacobian.dtype)


@pytest.mark.parametrize("training", [False, True], ids=["gradient", "training"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_influence_equals_a_dense_solve(case: Case, training: bool) -> None:
    jacobian = jacobian_of(case, training=training)
    delta = noise(jacobian)
    j, g = dense_of(case, training=training)
    eye = torch.eye(g.shape[-1], dtype=torch.float64)
    largest = torch.linalg.eigvalsh(g).amax(-1)
    for share in (1e-3,) if training else (1.0, 1e-2, 1e-4):
        ridge = share * largest
        result = influence(jacobian, delta, ridge=ridge, rtol=1e-9)
        target = torch.einsum("upd,up->ud", j, delta)
        expected = torch.linalg.solve(g + ridge[:, None, None] * eye, target)
        assert result.converged.all()
        torch.testing.assert_close(result.shift, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
        torch.testing.assert_close(result.norm, torch.linalg.vector_norm(expected, dim=-1), rtol=1e-6, atol=0.0)


def test_without_a_ridge_it_is_the_least_squares_solution() -> None:
    """At ε = 0: J⁺δ, also where G is singular."""
    generator = torch.Generator().manual_seed(0)
    for j in (
        torch.randn(2, 30, 12, generator=generator, dtype=torch.float64),
        torch.randn(2, 12, 30, generator=generator, dtype=torch.float64),
    ):
        jacobian = prescribed(j)
        delta = noise(jacobian)
        result = influence(jacobian, delta, ridge=0.0, rtol=1e-8)
        expected = torch.linalg.lstsq(j, delta[..., None], driver="gelsd").solution.squeeze(-1)
        assert result.converged.all()
        torch.testing.assert_close(result.shift, expected, rtol=1e-5, atol=1e-7)


def test_each_unit_has_its_own_ridge() -> None:
    jacobian = prescribed(with_eigenvalues(torch.ones(3, 10)))
    delta = noise(jacobian)
    ridge = torch.tensor([0.0, 1.0, 9.0])
    result = influence(jacobian, delta, ridge=ridge)
    torch.testing.assert_close(result.norm, torch.linalg.vector_norm(delta, dim=-1) / (1 + ridge))


def test_float32_reaches_a_thousandth() -> None:
    case = BY_NAME["lenet"]
    jacobian = jacobian_of(case, dtype=torch.float32)
    delta = noise(jacobian)
    j, g = dense_of(case)
    ridge = 1e-3 * torch.linalg.eigvalsh(g).amax(-1)
    result = influence(jacobian, delta, ridge=ridge, rtol=1e-4)
    eye = torch.eye(g.shape[-1], dtype=torch.float64)
    target = torch.einsum("upd,up->ud", j, delta.double())
    expected = torch.linalg.vector_norm(torch.linalg.solve(g + ridge[:, None, None] * eye, target), dim=-1)
    assert result.converged.all()
    torch.testing.assert_close(result.norm.double(), expected, rtol=1e-3, atol=0.0)


HARD = torch.logspace(-7, 0, 60, dtype=torch.float64)


@pytest.mark.parametrize("max_steps", [1, 5, 20])
def test_residual_is_the_true_one_and_too_few_steps_are_reported(max_steps: int) -> None:
    matrices = with_eigenvalues(HARD[None])
    jacobian = prescribed(matrices)
    delta = noise(jacobian)
    result = influence(jacobian, delta, ridge=1e-7, rtol=1e-6, max_steps=max_steps)
    target = torch.einsum("upd,up->ud", matrices, delta)
    applied = torch.einsum("upd,upe,ue->ud", matrices, matrices, result.shift) + 1e-7 * result.shift
    true = torch.linalg.vector_norm(target - applied, dim=-1) / torch.linalg.vector_norm(target, dim=-1)
    torch.testing.assert_close(result.residual, true, rtol=1e-6, atol=1e-12)
    assert true.item() > 1e-6
    assert not result.converged.any()
    assert result.products.tolist() == [max_steps + 1]


def test_a_residual_that_float32_cannot_reach_is_reported() -> None:
    jacobian = prescribed(with_eigenvalues(HARD[None]).float())
    result = influence(jacobian, noise(jacobian), ridge=0.0, rtol=1e-7)
    assert not result.converged.any()
    assert result.residual.item() > 1e-7


def test_nothing_was_perturbed() -> None:
    jacobian = jacobian_of(BY_NAME["mlp"])
    delta = noise(jacobian)
    delta[0] = 0
    result = influence(jacobian, delta, ridge=0.1)
    assert result.norm[0] == 0
    assert result.residual[0] == 0
    assert result.converged.all()
    assert result.norm[1] > 0
    bound = influence_lower_bound(jacobian, delta)
    assert bound[0] == 0
    assert bound[1] > 0


def test_a_unit_that_overflows_fails_alone() -> None:
    matrices = with_eigenvalues(torch.logspace(-2, 0, 20, dtype=torch.float64).repeat(3, 1))
    delta = noise(prescribed(matrices))
    healthy = prescribed(matrices[[0, 2]])
    expected = influence(healthy, delta[[0, 2]], ridge=0.1)
    expected_bound = influence_lower_bound(healthy, delta[[0, 2]])
    matrices[1] *= 1e200
    result = influence(prescribed(matrices), delta, ridge=0.1)
    assert result.converged.tolist() == [True, False, True]
    assert result.norm.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(result.norm[[0, 2]], expected.norm, rtol=1e-9, atol=0.0)
    bound = influence_lower_bound(prescribed(matrices), delta)
    assert bound.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(bound[[0, 2]], expected_bound, rtol=1e-6, atol=0.0)


def parameter_space_bound(jacobian: UpdateJacobian, delta: Tensor) -> Tensor:
    """‖Jᵀδ‖/λ_max(JJᵀ) by SciPy's Lanczos on vectors of parameters, unit by unit: the paper's way."""
    bounds = []
    for unit in range(jacobian.num_units):
        one = jacobian.select(torch.tensor([unit]))

        def product(w: np.ndarray, one: UpdateJacobian = one) -> np.ndarray:
            flat = torch.from_numpy(np.ascontiguousarray(w, dtype=np.float64).reshape(1, -1))
            return one.jvp(one.vjp(flat))[0].numpy()

        dim = jacobian.update_dim
        operator = LinearOperator((dim, dim), matvec=product, dtype=np.float64)
        largest = eigsh(operator, k=1, return_eigenvectors=False)[0]
        bounds.append(torch.linalg.vector_norm(one.vjp(delta[unit, None])).item() / largest)
    return torch.tensor(bounds, dtype=torch.float64)


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_lower_bound_equals_the_parameter_space_eigensolver(name: str) -> None:
    case = BY_NAME[name]
    jacobian = jacobian_of(case, training=name == "mlp")
    delta = noise(jacobian)
    expected = parameter_space_bound(jacobian, delta)
    bound = influence_lower_bound(jacobian, delta)
    torch.testing.assert_close(bound, expected, rtol=1e-3, atol=0.0)
    assert (bound <= expected * (1 + 1e-9)).all()
    single = influence_lower_bound(jacobian_of(case, training=name == "mlp", dtype=torch.float32), delta.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-3, atol=0.0)


def test_lower_bound_on_spectra_that_are_hard_for_lanczos() -> None:
    """A dense top, and one that a start vector barely touches: below the exact bound, and by no more than 2·rtol."""
    clustered = torch.linspace(0.9, 1.0, 60, dtype=torch.float64)
    decaying = torch.logspace(-7, 0, 60, dtype=torch.float64)
    hidden = torch.cat([torch.ones(59), torch.tensor([1.5])]).double()
    eigenvalues = torch.stack([clustered, decaying, hidden])
    jacobian = prescribed(with_eigenvalues(eigenvalues))
    delta = noise(jacobian)
    delta[2] = torch.where(torch.arange(60) < 59, delta[2], 0.0)  # δ orthogonal to the leading direction
    exact = torch.linalg.vector_norm(jacobian.vjp(delta), dim=-1) / eigenvalues.amax(-1)
    bound = influence_lower_bound(jacobian, delta)
    assert (bound <= exact * (1 + 1e-9)).all()
    torch.testing.assert_close(bound, exact, rtol=1e-3, atol=0.0)
    assert (bound <= influence(jacobian, delta, ridge=0.0, max_steps=100).norm).all()
