"""A small run of the study of defences."""

from typer.testing import CliRunner

from fl_privacy.cli import app
from fl_privacy.studies.results import read_rows
from fl_privacy.studies.usual_defences import UsualDefencesRow


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
    assert "least squares failed to explain the update in 0%" in (tmp_path / "summary.md").read_text()
