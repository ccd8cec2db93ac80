"""`fl-privacy picture` draws what its numbers say."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image
from typer.testing import CliRunner

from fl_privacy.attacks import GaussNewton
from fl_privacy.cli import app
from fl_privacy.pictures.defended import PictureSettings, defended_picture
from fl_privacy.studies.scene import Scene, SceneSettings

CHEAP = GaussNewton(max_steps=1, max_products=8, rounded_steps=(), rounding=(), hops=0)


def invoke(*arguments):
    return CliRunner().invoke(app, ["picture", *arguments])


def test_noise_leaves_the_predicted_error_and_the_raw_gradient_none(tmp_path):
    path = tmp_path / "new" / "one.png"
    chosen = ("--noise", "1e-2", "--laplace", "2e-2", "--noise-multiplier", "2e-3", "--prune", "0.5", "--bits", "6")
    outcome = invoke(*chosen, "--target-leakage", "0.3", "-o", str(path), "--json")
    assert outcome.exit_code == 0, outcome.output
    found = json.loads(outcome.stdout)
    panels = {panel["name"]: panel for panel in found["panels"]}
    assert list(panels) == [
        *("raw update", "noise 0.01", "Laplace noise 0.02", "clip C, noise 0.002 C", "50% pruned", "6 bits", "float16"),
        *("isotropic for 30%", "shaped for 30%"),
    ]
    assert all(panel["explained"] for panel in panels.values())
    for name in ("raw update", "50% pruned", "float16"):  # the entries that are kept are exact, and more than enough
        assert panels[name]["reached"] < 1e-3
        assert panels[name]["leakage"] > 0.999
    for name in (
        "noise 0.01",
        "Laplace noise 0.02",
        "clip C, noise 0.002 C",
        "6 bits",
        "isotropic for 30%",
        "shaped for 30%",
    ):
        assert 0.7 < panels[name]["reached"] / panels[name]["predicted"] < 1.3
    for name in ("isotropic for 30%", "shaped for 30%"):
        assert 0.28 < panels[name]["leakage"] <= 0.3 + 1e-9
        assert panels[name]["predicted"] == pytest.approx(found["prior_std"] * (1 - panels[name]["leakage"]) ** 0.5)
    assert imread(path).shape[1] == round(130 * 1.75 * 6)  # two rows


def test_noise_after_clipping_leaves_what_noise_in_proportion_to_the_norm_does():
    scene = Scene.of(SceneSettings(model="linear", num_images=1))
    norm = float(scene.gradients([0]).double().norm())
    settings = PictureSettings(model="linear", noise_stds=(0.1 * norm,), noise_multipliers=(0.1,))
    panels = {panel.name: panel for panel in defended_picture(settings, attack=CHEAP).panels}
    plain, after = panels[f"noise {0.1 * norm:g}"], panels["clip C, noise 0.1 C"]
    assert after.predicted.value == pytest.approx(plain.predicted.value)
    assert 0.01 < plain.leakage.value < 0.99


def test_images_too_large_for_an_exact_spectrum_are_drawn_behind_shaped_noise_too(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 24, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = tmp_path / "data" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    outcome = invoke(
        *(
            "--dataset",
            "folder",
            "--data-root",
            str(tmp_path / "data"),
            "--model",
            "mlp",
            "--initialization",
            "default",
        ),
        *("--noise", "1e-2", "--prune", "0.5", "-o", str(tmp_path / "one.png"), "--json"),
    )
    assert outcome.exit_code == 0, outcome.output
    shaped = json.loads(outcome.stdout)["panels"][-1]
    assert shaped["name"] == "shaped for 50%"
    assert 0.4 < shaped["leakage"] <= 0.5 + 1e-9
    assert 0.7 < shaped["reached"] / shaped["predicted"] < 1.3
    for panel in json.loads(outcome.stdout)["panels"]:
        lower, upper = panel["leakage_interval"]
        assert 0 <= lower <= panel["leakage"] <= upper <= 1


def test_behind_relus_the_recommended_noise_is_that_of_its_prediction():
    settings = PictureSettings(model="resnet8", initialization="default", noise_stds=(1e-2,), prune=(0.5,))
    drawn = defended_picture(settings, attack=CHEAP)
    panels = {panel.name: panel for panel in drawn.panels}
    assert panels["isotropic for 50%"].leakage.value == pytest.approx(0.5, abs=0.01)
    assert 0.4 < panels["shaped for 50%"].leakage.value <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target-leakage", "1"), "expected a target leakage below 1, got 1.0"),
        (("--image", "100000"), "expected an image in [0, 359), got 100000"),
        (("--model", "vgg"), "unknown model 'vgg'"),
        (("--prune", "1"), "expected a share in [0, 1), got 1.0"),
        (("--noise", "0"), "expected noise_stds > 0"),
        (("-o", "one.xyz"), "expected a picture's file to end in one of"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    outcome = invoke("-o", str(tmp_path / "no.png"), *arguments)
    assert outcome.exit_code == 2
    assert message in outcome.stderr
    assert not (tmp_path / "no.png").exists()
