"""The study of time: what it extrapolates, never how long anything takes."""

import pytest

from fl_privacy.studies.time import ATTACKS, PREDICTIONS


def test_every_method_is_timed_and_extrapolation_is_told(conducted):
    rows, folder = conducted("time", num_images=1, timed_steps=2, lbfgs_steps=4, adam_steps=20, inverting_steps=2)
    factors = {row.method: row.factor for row in rows}
    assert tuple(factors) == (*PREDICTIONS, *ATTACKS)
    assert [factors[name] for name in ATTACKS] == [1, 2, 10, 1]
    assert all(row.timed_seconds > 0 and row.gradient_seconds > 0 for row in rows)
    adam = next(row for row in rows if row.method == "DGL, Adam")
    assert adam.gradients == pytest.approx(10 * adam.timed_seconds / adam.gradient_seconds)
    assert (folder / "summary.md").read_text().count("extrapolated by") == 2
