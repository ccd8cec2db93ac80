"""Pictures of a client: rebuilt from what it really shared, with numbers that the audit's agree with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from fl_privacy.attacks import GaussianPrior, IndependentNoise, IsotropicNoise
from fl_privacy.audit.observed import observed_version, predicted_recovery
from fl_privacy.errors import InvalidInputError
from fl_privacy.interval import Interval
from fl_privacy.pictures import draw_picture, rebuild_client
from fl_privacy.pictures.drawing import reached_text, span_text
from tests.audit.cases import PRIOR, SIDE, flat, new_context, new_model, new_task, noisy, params_of, scaled
from tests.influence.cases import prescribed, with_eigenvalues

BELIEF = GaussianPrior(torch.zeros(1, SIDE, SIDE), PRIOR)


def pruned(update, share=0.5):
    threshold = np.quantile(np.abs(flat(update)), share)
    return {name: np.where(np.abs(array) >= threshold, array, 0) for name, array in update.items()}


@pytest.fixture(scope="module")
def picture():
    model = new_model()
    task = new_task(model, dtype=np.float64)
    shared = {
        "clipped": scaled(task.captured, 0.1),
        "pruned": pruned(task.captured),
        "noise": noisy(scaled(task.captured, 0.5), 2e-3),
    }
    return rebuild_client(
        new_context(model), params_of(model, np.float64), task, example=2, prior=BELIEF, shared=shared
    )


def test_the_raw_update_gives_the_example_away_and_so_do_clipping_and_pruning(picture):
    for panel in picture.panels[:3]:
        torch.testing.assert_close(panel.rebuilt, picture.original, atol=1e-2, rtol=0)
        assert panel.leakage.lower > 0.999
        assert panel.reached < 1e-2
        assert panel.explained


def test_noise_leaves_the_error_that_was_predicted(picture):
    noise = picture.panels[3]
    assert (picture.panels[0].name, noise.name) == ("raw update", "noise")
    assert 0.2 < noise.leakage.value < 0.95
    assert noise.predicted.value == pytest.approx((1 - noise.leakage.value) ** 0.5 * PRIOR, rel=0.02)
    assert 0.5 < noise.reached / noise.predicted.value < 2
    assert noise.reached == pytest.approx(float((noise.rebuilt - picture.original).square().mean().sqrt()))


def test_the_prediction_of_inputs_of_up_to_a_thousand_elements_is_exact():
    eigenvalues = torch.logspace(-9, 0, 784, dtype=torch.float64)[None]
    for sigma in (1e-6, 1e-3):
        noise = IsotropicNoise(torch.tensor([sigma], dtype=torch.float64))
        leakage, error = predicted_recovery(prescribed(with_eigenvalues(eigenvalues)), noise, PRIOR)
        left = ((sigma / PRIOR) ** 2 / (eigenvalues + (sigma / PRIOR) ** 2)).mean()
        assert error.value == pytest.approx(PRIOR * float(left) ** 0.5, rel=1e-4)
        assert error.upper - error.lower < 1e-3 * error.value
        assert leakage.value == pytest.approx(1 - float(left), rel=1e-6)


def test_what_is_known_of_a_prediction_is_printed_with_it():
    assert span_text(Interval(0.301, 0.302, 0.303), "{:.0%}") == "30%"
    assert span_text(Interval(0.2, 0.302, 0.4), "{:.0%}") == "30% [20%, 40%]"


def test_by_default_it_is_what_arrived_under_the_clients_own_words():
    model = new_model()
    task = new_task(model, dtype=np.float64, defend=lambda update: noisy(update, 1e-2), defence="noise 0.01")
    panels = rebuild_client(new_context(model), params_of(model, np.float64), task, prior=BELIEF).panels
    assert [panel.name for panel in panels] == ["raw update", "noise 0.01"]


def test_beliefs_follow_the_mechanism():
    update = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cut = observed_version("", 0.1 * torch.where(update.abs() > 1, update, 0.0), update, [2000])
    assert isinstance(cut.noise, IndependentNoise)
    torch.testing.assert_close(cut.shared[update.abs() > 1], update[update.abs() > 1])
    assert (cut.noise.std[0][update.abs() > 1] < 1e-5).all()
    assert (cut.noise.std[0][update.abs() <= 1] > 0.1).all()
    plain = observed_version("", 3 * (update + 0.1 * torch.ones_like(update)), update, [2000])
    assert isinstance(plain.noise, IsotropicNoise)


def test_a_training_that_is_not_reproduced_is_refused():
    model = new_model()
    task = new_task(model, dtype=np.float64)
    other = new_task(model, dtype=np.float64, client=1)
    wrong = new_task(model, dtype=np.float64, captured=False)
    wrong = type(task)(**{**wrong.__dict__, "captured": other.captured})
    with pytest.raises(InvalidInputError, match="differs by"):
        rebuild_client(new_context(model), params_of(model, np.float64), wrong, prior=BELIEF)
    with pytest.raises(InvalidInputError, match="got 2 and 9"):
        rebuild_client(new_context(model), params_of(model, np.float64), task, example=9, prior=BELIEF)


def test_it_is_drawn_with_a_panel_for_each_version(picture, tmp_path):
    draw_picture(picture, tmp_path / "one" / "client.png", title="client 0, round 1")
    drawn = imread(tmp_path / "one" / "client.png")
    assert drawn.shape[1] == round(130 * 1.75 * 6)
    assert drawn[..., :3].std() > 0.1
    flat_example = type(picture)(
        original=torch.zeros(7), prior_mean=torch.zeros(7), prior_std=1.0, panels=picture.panels
    )
    with pytest.raises(InvalidInputError, match="expected an image"):
        draw_picture(flat_example, tmp_path / "no.png")


def test_an_error_that_needs_no_update_is_no_success_of_an_attack(picture):
    panel = replace(picture.panels[0], explained=True, reached=0.9 * picture.prior_std)
    assert reached_text(picture, panel) == f"reached {panel.reached:.3g}"
    worse = replace(panel, reached=1.1 * picture.prior_std)
    assert reached_text(picture, worse) == f"reached {worse.reached:.3g}\nmore than before any update"
    failed = replace(worse, explained=False)
    assert reached_text(picture, failed) == f"attack failed at {worse.reached:.3g}"
