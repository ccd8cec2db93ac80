"""`fl-privacy picture` draws what its numbers say."""

from __future__ import annotations

import json

import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from fl_privacy.cli import app


def invoke(*arguments):
    return CliRunner().invoke(app, ["picture", *arguments])


def test_noise_leaves_the_predicted_error_and_the_raw_gradient_none(tmp_path):
    path = tmp_path / "new" / "one.png"
    outcome = invoke("--noise", "1e-2", "--prune", "0.5", "--target-leakage", "0.3", "-o", str(path), "--json")
    assert outcome.exit_code == 0, outcome.output
    found = json.loads(outcome.stdout)
    panels = {panel["name"]: panel for panel in found["panels"]}
    assert list(panels) == ["raw update", "noise 0.01", "50% pruned", "isotropic for 30%", "shaped for 30%"]
    assert all(panel["explained"] for panel in panels.values())
    for name in ("raw update", "50% pruned"):  # the entries that are kept are exact, and more than enough
        assert panels[name]["reached"] < 1e-3
        assert panels[name]["leakage"] > 0.999
    for name in ("noise 0.01", "isotropic for 30%", "shaped for 30%"):
        assert 0.7 < panels[name]["reached"] / panels[name]["predicted"] < 1.3
    for name in ("isotropic for 30%", "shaped for 30%"):
        assert 0.28 < panels[name]["leakage"] <= 0.3 + 1e-9
        assert panels[name]["predicted"] == pytest.approx(found["prior_std"] * (1 - panels[name]["leakage"]) ** 0.5)
    assert imread(path).shape[1] == round(130 * 1.75 * 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target-leakage", "1"), "expected a target leakage below 1, got 1.0"),
        (("--image", "100000"), "images, got 100001"),
        (("--model", "vgg"), "unknown model 'vgg'"),
        (("--prune", "1"), "expected a share in [0, 1), got 1.0"),
        (("--noise", "0"), "expected noise_stds > 0"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    outcome = invoke(*arguments, "-o", str(tmp_path / "no.png"))
    assert outcome.exit_code == 2
    assert message in outcome.stderr
    assert not (tmp_path / "no.png").exists()
