"""A small run of the study of defences."""

from dataclasses import replace

from typer.testing import CliRunner

from fl_privacy.cli import app
from fl_privacy.studies.results import read_rows
from fl_privacy.studies.usual_defences import STUDY, UsualDefencesRow, UsualDefencesSettings

RANKS = ((0.1, 0.01), (0.2, 0.09), (0.3, 0.02))
"""Predicted and reached errors."""


def test_pruning_gives_away_what_noise_of_equal_power_would_hide(tmp_path):
    arguments = ["study", "usual-defences", "--num-images", "1", "--prune", "0.7", "-o", str(tmp_path)]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    rows = {row.defence: row for row in read_rows(tmp_path / "results.csv", UsualDefencesRow)}
    assert list(rows) == ["prune", "gaussian", "clip and noise", "laplace", "quantise", "half precision", "int8"]
    cosine = rows["prune"].cosine
    for name in ("gaussian", "laplace", "quantise"):
        assert abs(rows[name].cosine - cosine) < 0.1 * (1 - cosine)
    pruned, noise = rows["prune"], rows["gaussian"]
    assert pruned.error < 1e-3 * pruned.equal_power  # the attack that leaves the zeros out has the image exactly
    assert pruned.audited < 1e-3
    assert pruned.audited_leakage > 0.9999
    assert noise.audited == noise.equal_power
    assert 0.6 < noise.error / noise.audited < 1.5
    assert noise.informed_error == noise.error  # Gaussian noise has no shape to use
    for name, gain in (("laplace", 0.5**0.5), ("quantise", 0.2**0.5)):
        shaped = rows[name]
        assert gain < shaped.informed / shaped.equal_power < 1
        assert shaped.informed_error < 0.9 * shaped.error
        assert 0.6 < shaped.informed_error / shaped.informed < 1.5
    summary = (tmp_path / "summary.md").read_text()
    assert "least squares failed to explain the update in 0%" in summary
    assert "correlation" not in summary  # one pruned update has no rank


def test_the_summary_ranks_errors_of_pruned_updates_alone():
    """Of three pruned updates two are in order: 0.5; other defences would make it another number."""
    row = UsualDefencesRow(
        image=0,
        defence="prune",
        level=0.1,
        strength=0.1,
        cosine=1.0,
        equal_power_leakage=0.5,
        equal_power=0.1,
        audited_leakage=0.5,
        audited=0.1,
        informed_leakage=0.5,
        informed=0.1,
        error=0.1,
        informed_error=0.1,
        explained=True,
    )
    rows = [
        replace(row, level=x, audited=x, equal_power=1 - x, informed=x, error=e, informed_error=1.0) for x, e in RANKS
    ]
    others = [replace(row, defence="gaussian", audited=x, error=1 - x) for x in (0.1, 0.2, 0.3)]
    said = STUDY.summarize(UsualDefencesSettings(), [*rows, *others]).sentence
    assert (
        "-0.50 with the prediction for equal power, 0.50 with the audit's and 0.50 with that for a known shape" in said
    )
