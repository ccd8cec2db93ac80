"""A small run of the study of ridges."""

import statistics

from typer.testing import CliRunner

from fl_privacy.cli import app
from fl_privacy.studies.results import read_rows
from fl_privacy.studies.ridge import CALIBRATED, WITH_BIAS, RidgeRow


def test_the_calibrated_ridge_predicts_and_the_papers_does_not(tmp_path):
    arguments = ["study", "ridge", "--num-images", "2", "--noise-stds", "1e-3,1e-2", "-o", str(tmp_path)]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    rows = read_rows(tmp_path / "results.csv", RidgeRow)
    assert len(rows) == 2 * 2 * 5
    ratios = {name: [row.ratio for row in rows if row.prediction == name] for name in ("1", CALIBRATED, WITH_BIAS)}
    assert max(ratios["1"]) < 0.05
    assert min(ratios[CALIBRATED]) > 0.3
    assert abs(statistics.median(ratios[WITH_BIAS]) - 1) < 0.25
    assert max(row.residual for row in rows) <= 1e-3
    assert "Nearest: σ²/τ², with bias" in (tmp_path / "summary.md").read_text()
