"""Leakage over a short training on digits."""

import statistics

import pytest

from fl_privacy.errors import InvalidInputError
from fl_privacy.studies import load_study
from fl_privacy.studies.scene import Scene

from .cases import dense_leakage


def test_fixed_noise_hides_more_once_the_model_has_learned(conducted):
    rows, _ = conducted("training", num_images=4, rounds=(0, 20), lr=0.2)
    first, last = ([row for row in rows if row.round == number] for number in (0, 20))
    assert first[0].accuracy < 0.3
    assert last[0].accuracy > 0.85
    for quantity in ("gradient_norm", "required_noise_std"):
        before, after = (statistics.median(getattr(row, quantity) for row in part) for part in (first, last))
        assert after < 0.5 * before
    assert statistics.median(row.leakage for row in last) < statistics.median(row.leakage for row in first)
    # Noise that differs 57-fold between images is much the same relative to each one's gradient.
    needed, relative = ([getattr(r, n) for r in rows] for n in ("required_noise_std", "required_relative_noise"))
    assert max(needed) > 30 * min(needed)
    assert max(relative) < 1.3 * min(relative)
    assert all(row.relative_leakage == pytest.approx(0.999, abs=1e-3) for row in rows)
    scene = Scene.of(load_study("training").settings(num_images=4))
    row = first[2]
    for noise_std, leakage in (
        (row.required_noise_std, 0.5),
        (1e-2, row.leakage),
        (1e-3 * row.gradient_norm, row.relative_leakage),
    ):
        assert dense_leakage(scene, row.image, noise_std) == pytest.approx(leakage, rel=1e-4)


def test_more_clients_than_images_can_serve():
    study = load_study("training")
    with pytest.raises(InvalidInputError, match="clients with batches of 32"):
        list(study.portions(study.settings(num_clients=100)))
