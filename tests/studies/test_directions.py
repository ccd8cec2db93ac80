"""Noise along single eigenvectors, on one digit."""

import pytest
import torch

from fl_privacy.studies.directions import slope
from fl_privacy.studies.scene import Scene, SceneSettings

from .cases import dense_jacobian


@pytest.fixture(scope="module")
def rows(conducted):
    return conducted("directions", num_images=1, num_directions=5, norms=(1e-3, 5.0))[0]


def test_the_law_holds_where_the_update_is_linear(rows):
    small = [row for row in rows if row.norm == 1e-3]
    assert slope(small) == pytest.approx(-0.5, abs=0.005)
    assert all(row.error == pytest.approx(row.law, rel=0.01) for row in small)
    assert all(row.error == pytest.approx(row.predicted, rel=0.01) for row in small)
    assert min(row.alignment for row in small) > 0.999
    assert max(row.eigenvalue for row in small) > 50 * min(row.eigenvalue for row in small)


def test_it_ends_where_the_prior_holds_the_attacker_back(rows):
    assert all(row.error < 0.5 * row.law for row in rows if row.norm == 5.0)


def test_the_eigenvalues_are_those_of_the_dense_jacobian(rows):
    values = torch.linalg.svdvals(dense_jacobian(Scene.of(SceneSettings(num_images=1)), 0)) ** 2
    for row in rows:
        assert row.eigenvalue == pytest.approx(float(values[row.rank]), rel=1e-4)
