"""Leakage over a short training on digits."""

import statistics

import pytest

from fl_privacy.errors import InvalidInputError
from fl_privacy.studies import load_study


def test_fixed_noise_hides_more_once_the_model_has_learned(conducted):
    rows, _ = conducted("training", num_images=4, rounds=(0, 20), lr=0.2)
    first, last = ([row for row in rows if row.round == number] for number in (0, 20))
    assert first[0].accuracy < 0.3
    assert last[0].accuracy > 0.85
    for quantity in ("gradient_norm", "required_noise_std"):
        before, after = (statistics.median(getattr(row, quantity) for row in part) for part in (first, last))
        assert after < 0.5 * before
    assert statistics.median(row.leakage for row in last) < statistics.median(row.leakage for row in first)


def test_more_clients_than_images_can_serve():
    study = load_study("training")
    with pytest.raises(InvalidInputError, match="clients with batches of 32"):
        list(study.portions(study.settings(num_clients=100)))
