"""The Lanczos iteration and its quadrature rules, on dense matrices of which everything is known."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fl_privacy.influence.lanczos import Lanczos
from fl_privacy.influence.quadrature import eigenvalue_rule, gauss_radau_rule, gauss_rule

DIM = 40


@dataclass
class DenseOperator:
    """One symmetric matrix per unit, and how many products each call took."""

    matrices: Tensor
    lanes: list[int]

    @classmethod
    def of(cls, matrices: Tensor) -> DenseOperator:
        return cls(matrices, [])

    @property
    def num_units(self) -> int:
        return len(self.matrices)

    def gram(self, vectors: Tensor) -> Tensor:
        self.lanes.append(len(vectors))
        product: Tensor = torch.einsum("ude,ue->ud", self.matrices, vectors)
        return product

    def select(self, units: Tensor) -> DenseOperator:
        return DenseOperator(self.matrices[units], self.lanes)


def never(lanczos: Lanczos) -> Tensor:
    return torch.zeros(len(lanczos.size), dtype=torch.bool)


def matrix(eigenvalues: Tensor, *, seed: int = 0) -> Tensor:
    """Returns a symmetric matrix with the given eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    q: Tensor = torch.linalg.qr(
        torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64)
    )[0]
    return q @ torch.diag(eigenvalues.double()) @ q.T


def spread(decades: float, dim: int = DIM) -> Tensor:
    return torch.logspace(-decades, 0, dim, dtype=torch.float64)


def start(units: int, dim: int = DIM, *, seed: int = 0) -> Tensor:
    return torch.randn(units, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
@pytest.mark.parametrize("decades", [1, 8, 14])
def test_basis_stays_orthonormal_and_decomposes_the_matrix(
    decades: float, dtype: torch.dtype, tolerance: float
) -> None:
    steps = 30
    g = torch.stack([matrix(spread(decades), seed=1), matrix(spread(decades).flip(0) ** 2, seed=2)]).to(dtype)
    lanczos = Lanczos(DenseOperator.of(g), start(2).to(dtype), max_steps=steps)
    lanczos.run(never)
    t, coupling = lanczos.tridiagonal()
    for unit in range(2):
        size = int(lanczos.size[unit])
        q = lanczos.basis[:size, unit].double()
        assert torch.linalg.matrix_norm(q @ q.T - torch.eye(size)).item() < tolerance * size
        left = g[unit].double() @ q.T - q.T @ t[unit, :size, :size]
        left[:, -1] -= coupling[unit] * lanczos.basis[size, unit]
        assert torch.linalg.matrix_norm(left).item() < tolerance * size


def test_in_d_steps_the_whole_spectrum_is_found() -> None:
    eigenvalues = spread(3, 12)
    lanczos = Lanczos(DenseOperator.of(matrix(eigenvalues)[None]), start(1, 12), max_steps=100)
    lanczos.run(never)
    t, coupling = lanczos.tridiagonal()
    assert lanczos.size.tolist() == [12]
    assert coupling.tolist() == [0.0]
    torch.testing.assert_close(torch.linalg.eigvalsh(t[0]), eigenvalues, rtol=1e-10, atol=1e-14)


def test_a_low_rank_ends_early() -> None:
    """From a start outside the range rank + 1 steps, the null space being one more eigenvalue; rounding may add one."""
    ranks = [0, 1, 3, 7]
    eigenvalues = torch.stack([torch.cat([torch.zeros(DIM - r), torch.arange(1.0, r + 1)]) for r in ranks]).double()
    g = torch.stack([matrix(values, seed=i) for i, values in enumerate(eigenvalues)])
    lanczos = Lanczos(DenseOperator.of(g), start(len(ranks)), max_steps=20)
    lanczos.run(never)
    assert all(rank + 1 <= size <= rank + 2 for rank, size in zip(ranks, lanczos.size.tolist(), strict=True))
    assert not lanczos.failed.any()


def test_an_eigenvector_is_exhausted_at_once() -> None:
    g = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
    lanczos = Lanczos(DenseOperator.of(g[None]), torch.eye(5, dtype=torch.float64)[2:3] * 7, max_steps=5)
    lanczos.run(never)
    t, coupling = lanczos.tridiagonal()
    assert lanczos.size.tolist() == [1]
    assert t.flatten().tolist() == [3.0]
    assert coupling.tolist() == [0.0]
    assert lanczos.start_norm.tolist() == [7.0]


def test_a_zero_start_takes_no_step() -> None:
    g = matrix(spread(1))[None].repeat(2, 1, 1)
    vectors = start(2)
    vectors[0] = 0
    operator = DenseOperator.of(g)
    lanczos = Lanczos(operator, vectors, max_steps=5)
    lanczos.run(never)
    assert lanczos.size.tolist() == [0, 5]
    assert not lanczos.failed.any()
    assert lanczos.basis[:, 0].abs().max() == 0


@pytest.mark.parametrize("bad", ["operator", "start", "overflow"])
def test_a_unit_that_is_not_finite_fails_alone(bad: str) -> None:
    g = torch.stack([matrix(spread(2), seed=i) for i in range(3)])
    vectors = start(3)
    reference = Lanczos(DenseOperator.of(g), vectors, max_steps=10)
    reference.run(never)
    g, vectors = g.clone(), vectors.clone()
    if bad == "operator":
        g[1, 3, 4] = torch.nan
    elif bad == "start":
        vectors[1, 0] = torch.inf
    else:  # a finite product of infinite norm
        g[1] *= 1e200
    lanczos = Lanczos(DenseOperator.of(g), vectors, max_steps=10)
    lanczos.run(never)
    assert lanczos.failed.tolist() == [False, True, False]
    assert gauss_rule(lanczos, 1).weights[0, 1].isnan().all()
    t, expected = lanczos.tridiagonal()[0], reference.tridiagonal()[0]
    for unit in (0, 2):
        assert lanczos.size[unit] == reference.size[unit]
        assert torch.equal(t[unit], expected[unit])


def test_units_stop_one_by_one_and_idle_ones_leave_the_products() -> None:
    wanted = torch.tensor([2, 4, 9, 9])
    g = torch.stack([matrix(spread(2), seed=i) for i in range(4)])
    operator = DenseOperator.of(g)
    lanczos = Lanczos(operator, start(4), max_steps=20)
    lanczos.run(lambda state: state.size >= wanted, check_every=1)
    assert lanczos.size.tolist() == wanted.tolist()
    assert operator.lanes == [4, 4, 4, 4, 2, 2, 2, 2, 2]
    for unit in range(4):  # each as if it had been alone
        alone = Lanczos(DenseOperator.of(g[unit, None]), start(4)[unit, None], max_steps=int(wanted[unit]))
        alone.run(never)
        size = int(wanted[unit])
        t, coupling = lanczos.tridiagonal()
        torch.testing.assert_close(t[unit, :size, :size], alone.tridiagonal()[0][0], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(coupling[unit], alone.tridiagonal()[1][0], rtol=1e-10, atol=1e-14)


def quadratic_form(g: Tensor, z: Tensor, epsilon: float, power: int) -> float:
    """zᵀ(ε/(G + ε))^power z for unit z."""
    values, vectors = torch.linalg.eigh(g)
    z = z / torch.linalg.vector_norm(z)
    return float(((vectors.T @ z) ** 2 * (epsilon / (values.clamp(min=0) + epsilon)) ** power).sum())


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("decades", [1, 4, 7])
def test_gauss_and_gauss_radau_enclose_the_quadratic_form(decades: float, power: int) -> None:
    g, z = matrix(spread(decades), seed=3), start(1, seed=4)
    for epsilon in (1e-6, 1e-3, 1.0):
        exact = quadratic_form(g, z[0], epsilon, power)
        widths = []
        for steps in (1, 2, 5, 12, 25, DIM):
            lanczos = Lanczos(DenseOperator.of(g[None]), z, max_steps=steps)
            lanczos.run(never)
            gauss, radau = gauss_rule(lanczos, 1), gauss_radau_rule(lanczos, 1)
            low, high = (rule.mean((epsilon / (rule.nodes + epsilon)) ** power).item() for rule in (gauss, radau))
            assert low <= exact + 1e-10
            assert high >= exact - 1e-10
            widths.append(high - low)
        assert all(after <= before + 1e-12 for before, after in itertools.pairwise(widths))
        assert widths[-1] < 1e-9


def test_rules_integrate_polynomials_exactly() -> None:
    """K Gauss nodes are exact to degree 2K − 1; with the node at 0, K + 1 of them to degree 2K."""
    g, z = matrix(spread(1), seed=3), start(1, seed=4)
    unit = z[0] / torch.linalg.vector_norm(z)
    lanczos = Lanczos(DenseOperator.of(g[None]), z, max_steps=4)
    lanczos.run(never)
    gauss, radau = gauss_rule(lanczos, 1), gauss_radau_rule(lanczos, 1)
    for degree in range(10):
        exact = unit @ torch.linalg.matrix_power(g, degree) @ unit
        for rule, limit in ((gauss, 7), (radau, 8)):
            error = abs(rule.mean(rule.nodes**degree).item() / exact.item() - 1)
            assert (error < 1e-12) == (degree <= limit), (degree, limit, error)
    assert radau.nodes.amin() < 1e-14


def test_eigenvalue_rule_weighs_every_eigenvalue_alike() -> None:
    eigenvalues = torch.stack([spread(2, 6), torch.tensor([0, 0, 0, 1, 2, 3]).double()])
    broken = torch.full((1, 6, 6), torch.inf, dtype=torch.float64)
    rule = eigenvalue_rule(torch.cat([torch.stack([matrix(values) for values in eigenvalues]), broken]))
    torch.testing.assert_close(rule.nodes[0, :2], eigenvalues, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(rule.mean(rule.nodes)[:2], eigenvalues.mean(-1))
    assert rule.mean(rule.nodes)[2].isnan()
