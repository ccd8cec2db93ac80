"""Two architectures on digits."""

import math

import pytest
import torch

from fl_privacy import influence, influence_lower_bound
from fl_privacy.studies.architectures import best_rows
from fl_privacy.studies.scene import Scene, SceneSettings

from .cases import dense_jacobian


@pytest.fixture(scope="module")
def rows(conducted):
    return conducted("architectures", models=("linear", "mlp"), inverting_steps=30)[0]


def select(rows, attack):
    return [row for row in rows if row.attack == attack]


def test_gauss_newton_reaches_what_is_predicted(rows):
    found = select(rows, "gauss-newton")
    assert len(found) == 2 * 2 * 2
    assert all(row.converged and row.explained for row in found)
    assert all(row.error == pytest.approx(row.predicted, rel=0.3) for row in found)


def scene_of(model):
    return Scene.of(SceneSettings(model=model, initialization="default", num_images=2))


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_bound_and_i2f_are_those_of_the_dense_jacobian(rows, model):
    scene, image = scene_of(model), 1
    jacobian = dense_jacobian(scene, image)
    gram, root = jacobian.T @ jacobian, math.sqrt(scene.images[image].numel())
    largest = float(torch.linalg.eigvalsh(gram)[-1])
    for level, noise_std in enumerate((1e-3, 1e-2)):
        found = [row for row in rows if (row.model, row.image, row.noise_std) == (model, image, noise_std)]
        assert len(found) == 3
        pulled = jacobian.T @ (noise_std * scene.noise([image], level)[0])
        ridge = (noise_std / scene.prior.std) ** 2
        shift = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), pulled)
        for row in found:
            assert row.ridge == pytest.approx(ridge)
            assert row.largest == pytest.approx(largest, rel=1e-3)
            assert row.influence_residual <= 1e-3
            assert row.influence == pytest.approx(float(shift.norm()) / root, rel=5e-3)
            assert row.lower_bound == pytest.approx(float(pulled.norm()) / largest / root, rel=1e-3)


def test_along_the_top_eigenvector_the_bound_is_i2f():
    scene = scene_of("linear")
    left, values, _ = torch.linalg.svd(dense_jacobian(scene, 0), full_matrices=False)
    along, jacobian = left[None, :, 0], scene.jacobian([0])
    exact = 1 / float(values[0])
    assert influence_lower_bound(jacobian, along).item() == pytest.approx(exact, rel=1e-3)
    assert influence(jacobian, along, ridge=0.0).norm.item() == pytest.approx(exact, rel=1e-3)


def test_matching_gradients_finds_the_same_and_cut_short_it_fails(rows):
    assert all(row.error == pytest.approx(row.predicted, rel=0.3) for row in select(rows, "dgl"))
    cut_short = [row for row in select(rows, "inverting-gradients") if row.noise_std == 1e-3]
    assert cut_short
    assert not any(row.explained for row in cut_short)
    assert all(row.error > 2 * row.predicted for row in cut_short)


def test_the_best_attack_of_a_run_is_one_of_its_own(rows):
    best = best_rows(rows)
    assert len(best) == len(select(rows, "gauss-newton"))
    for row in best:
        run = [r for r in rows if (r.model, r.noise_std, r.image) == (row.model, row.noise_std, row.image)]
        assert len(run) == 3
        assert row.error == min(r.error for r in run)
