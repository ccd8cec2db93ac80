"""`fl-privacy validate` as a user runs it."""

import json

from matplotlib.image import imread
from typer.testing import CliRunner

from fl_privacy.cli import app


def test_a_small_study(tmp_path):
    arguments = ["validate", "--num-images", "2", "--noise", "0.001", "--noise", "0.01", "-o", str(tmp_path)]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "Spearman" in outcome.output
    assert imread(tmp_path / "agreement.png").std() > 0.05
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 5


def test_wrong_words_exit_with_2_and_name_the_right_ones(tmp_path):
    for arguments, named in (
        (["--attack", "magic"], "gauss-newton"),
        (["--model", "lenett"], "lenet"),
        (["--dataset", "emnist"], "mnist"),
        (["--initialization", "zero"], "uniform"),
    ):
        outcome = CliRunner().invoke(app, ["validate", *arguments, "-o", str(tmp_path)])
        assert outcome.exit_code == 2
        assert named in outcome.output


def test_json(tmp_path):
    arguments = ["validate", "--num-images", "2", "--noise", "0.01", "-o", str(tmp_path), "--json"]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    found = json.loads(outcome.stdout)
    assert found["overall"]["runs"] == 2
    assert [level["noise_std"] for level in found["levels"]] == [0.01]
