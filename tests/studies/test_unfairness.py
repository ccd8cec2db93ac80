"""One noise on many digits."""

import statistics

import pytest

from fl_privacy.studies.scene import Scene, SceneSettings

from .cases import dense_leakage


def test_worst_images_and_classes_are_named(conducted):
    rows, folder = conducted("unfairness", num_images=12, noise_std=3e-3)
    assert len(rows) == 12
    worst = max(rows, key=lambda row: row.required_noise_std)
    assert f"image {worst.image} (class {worst.label}" in (folder / "summary.md").read_text()
    # Whoever needs more noise leaks more at the same noise, and is rebuilt better.
    scene = Scene.of(SceneSettings(num_images=12))
    for row in (rows[3], worst):
        assert dense_leakage(scene, row.image, row.required_noise_std) == pytest.approx(0.5, rel=1e-4)
        left = dense_leakage(scene, row.image, 3e-3)
        assert row.leakage == pytest.approx(left, rel=1e-4)
        assert row.predicted == pytest.approx(scene.prior.std * (1 - left) ** 0.5, rel=1e-4)
    exposed = sorted(rows, key=lambda row: row.leakage)
    assert exposed[-1].required_noise_std > 1.2 * exposed[0].required_noise_std
    assert 0.7 < statistics.median(row.error / row.predicted for row in rows) < 1.3


def test_without_attacks(conducted):
    rows, _ = conducted("unfairness", num_images=4, attack=False)
    assert all(row.error != row.error and not row.explained for row in rows)
