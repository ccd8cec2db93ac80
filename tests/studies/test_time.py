"""The study of time: what it extrapolates, never how long anything takes."""

import pytest

from fl_privacy.studies import load_study
from fl_privacy.studies.scene import Scene
from fl_privacy.studies.time import ATTACKS, PREDICTIONS, TimeRow, TimeSettings, _attacks, _predictions


def test_every_method_is_timed_and_extrapolation_is_told(conducted):
    rows, folder = conducted("time", num_images=1, timed_steps=2, lbfgs_steps=4, adam_steps=20, inverting_steps=2)
    factors = {row.method: row.factor for row in rows}
    assert tuple(factors) == (*PREDICTIONS, *ATTACKS)
    assert [factors[name] for name in ATTACKS] == [1, 2, 10, 1]
    assert all(row.timed_seconds > 0 and row.gradient_seconds > 0 for row in rows)
    assert (folder / "summary.md").read_text().count("extrapolated by") == 2


@pytest.mark.parametrize("steps", [2, 4])
def test_what_is_timed_spends_the_products_that_it_should(steps):
    settings = TimeSettings(num_images=1, timed_steps=steps)
    scene = Scene.of(settings)
    noise = settings.noise_std * scene.noise([0], 0)
    problem = scene.problem([0], scene.gradients([0]) + noise, settings.noise_std)
    work = {**_predictions(settings, scene, 0, noise), **_attacks(settings, problem)}
    products = {name: int(run().products) for name, (run, _) in work.items() if name != "lower bound"}
    assert products["DGL, Adam"] == steps
    assert products["Inverting Gradients"] == 2 * steps  # of each of two starts
    assert products["spectrum, exact"] == scene.images[0].numel()
    assert products["I²F, ε = σ²/τ²"] < products["spectrum, exact"] == products["spectrum, as audited"]
    assert {name: factor for name, (_, factor) in work.items() if factor != 1} == {
        "DGL, L-BFGS": 300 / steps,
        "DGL, Adam": 24000 / steps,
        "Inverting Gradients": 2000 / steps,
    }


def test_the_table_is_of_medians_and_of_ratios_image_by_image():
    """Attack k takes k + 1 times as long as I²F of the same image, and extrapolation counts."""
    rows = [
        TimeRow(
            image=image,
            method=name,
            attack=name in ATTACKS,
            timed_seconds=busy * (1.0 if name in PREDICTIONS else ATTACKS.index(name) + 2.0) / factor,
            factor=factor,
            gradient_seconds=0.1 * busy,
        )
        for image, busy in enumerate((1.0, 10.0, 2.0))
        for name, factor in [*((name, 1.0) for name in (*PREDICTIONS, ATTACKS[0])), *((n, 4.0) for n in ATTACKS[1:])]
    ]
    summary = load_study("time").summarize(TimeSettings(timed_steps=5), rows)
    assert summary.lines[1] == (PREDICTIONS[1], "2", "10", "1", "measured")
    assert summary.lines[4] == (ATTACKS[0], "4", "20", "2", "measured")
    assert summary.lines[6] == (ATTACKS[2], "8", "40", "4", "extrapolated by 4 from 5 steps")
    assert "cheapest attack, Gauss-Newton, takes 2 times as long as I²F" in summary.sentence
