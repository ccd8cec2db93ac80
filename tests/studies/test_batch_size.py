"""Batches and local steps, on digits."""

import pytest

from fl_privacy.studies.batch_size import exponent


@pytest.fixture(scope="module")
def rows(conducted):
    return conducted("batch-size", num_images=2, batch_sizes=(1, 3), local_steps=(1, 2), max_steps=16)[0]


def select(rows, unit, steps):
    return [row for row in rows if row.unit == unit and row.local_steps == steps]


def test_an_examples_noise_falls_like_1_over_n(rows):
    chosen = select(rows, "example", 1)
    assert exponent(chosen) == pytest.approx(-1, abs=1e-6)
    by_size = {(row.batch_size, row.image): row for row in chosen}
    for image in range(2):
        alone, together = by_size[1, image], by_size[3, image]
        assert together.required_noise_std == pytest.approx(alone.required_noise_std / 3, rel=1e-6)
        assert together.leakage < alone.leakage


def test_a_batch_of_one_is_an_example(rows):
    for steps in (1, 2):
        example, batch = ([r for r in select(rows, unit, steps) if r.batch_size == 1] for unit in ("example", "batch"))
        for one, other in zip(example, batch, strict=True):
            assert one.leakage == pytest.approx(other.leakage, rel=1e-9)
            assert one.update_norm == pytest.approx(other.update_norm, rel=1e-9)


def test_more_steps_tell_more(rows):
    def noise(steps):
        return [row.required_noise_std for row in select(rows, "example", steps)]

    assert all(more > less for less, more in zip(noise(1), noise(2), strict=True))
