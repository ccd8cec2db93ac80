"""What the figures of studies show, drawn from the results that are stored with the code."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path

import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from fl_privacy.studies import load_study
from fl_privacy.studies.results import read_rows

STORED = Path(__file__).parents[2] / "studies"


def drawn(name):
    """The settings, rows and axes of a stored study."""
    kept = json.loads((STORED / name / "settings.json").read_text())
    study = load_study(kept["study"])
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in kept["settings"].items()}
    settings, rows = study.settings(**values), read_rows(STORED / name / "results.csv", study.row)
    figure = Figure()
    study.draw(settings, rows, figure)
    return settings, rows, figure.axes


def points(axes, *, filled=None):
    """How often each place is marked by scatters, or by those that are filled or hollow."""
    return Counter(
        tuple(place)
        for marks in axes.collections
        if filled is None or (len(marks.get_facecolors()) > 0) is filled
        for place in marks.get_offsets().tolist()
    )


def places(rows, x, y):
    return Counter((x(row), y(row)) for row in rows)


def named(name):
    return lambda row: getattr(row, name)


def assert_diagonal(axes, *, log):
    """One line y = x, from below all points to above them."""
    (line,) = axes.lines
    assert list(line.get_xdata()) == list(line.get_ydata())
    values = [value for place in points(axes) for value in place]
    assert line.get_xdata()[0] <= min(values)
    assert line.get_xdata()[1] >= max(values)
    assert axes.get_xscale() == axes.get_yscale() == ("log" if log else "linear")


def test_architectures():
    _, rows, axes = drawn("architectures")
    for axis, quantity in zip(axes, ("predicted", "influence", "lower_bound"), strict=True):
        for explained in (True, False):
            chosen = [row for row in rows if row.explained is explained]
            assert points(axis, filled=explained) == places(chosen, named(quantity), named("error"))
        assert points(axis, filled=False)
        assert_diagonal(axis, log=True)


def test_usual_defences():
    _, rows, axes = drawn("usual-defences")
    assert [axis.get_title() for axis in axes] == [
        "predicted for noise of equal power",
        "predicted by the audit",
        "predicted for whoever knows the noise's shape",
    ]
    for axis, quantity in zip(axes, ("equal_power", "audited", "informed"), strict=True):
        expected = places(
            rows,
            lambda row, quantity=quantity: max(1e-7, getattr(row, quantity)),
            lambda row: max(1e-7, min(row.error, row.informed_error)),
        )
        assert points(axis) == expected
        assert sum(count for (_, y), count in expected.items() if y == 1e-7) > 10
        assert "below 1e-7: drawn at 1e-7" in axis.get_xlabel()
        assert_diagonal(axis, log=True)
    assert "below 1e-7: drawn at 1e-7" in axes[0].get_ylabel()
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == list(
        dict.fromkeys(row.defence for row in rows)
    )


def test_language():
    settings, rows, (words, errors) = drawn("language")
    for explained in (True, False):
        chosen = [row for row in rows if row.explained is explained]
        assert chosen
        assert points(words, filled=explained) == places(chosen, named("leakage"), named("anywhere"))
        assert points(errors, filled=explained) == places(chosen, named("predicted"), named("error"))
    assert_diagonal(errors, log=False)
    legend = words.get_legend()
    assert "hollow:\nattack failed" in legend.get_title().get_text()
    assert [text.get_text() for text in legend.get_texts()] == [f"{std:g}" for std in settings.relative_stds]


def test_unfairness():
    _, rows, (left, right) = drawn("unfairness")
    assert points(right) == places(rows, named("predicted"), named("error"))
    assert_diagonal(right, log=False)
    for marks, label in zip(right.collections, sorted({row.label for row in rows}), strict=True):
        mine = [(row.predicted, row.error) for row in rows if row.label == label]
        assert sorted(map(tuple, marks.get_offsets())) == sorted(mine)
        assert tuple(marks.get_facecolors()[0]) == to_rgba(f"C{label % 10}")
    by_class = {}
    for row in rows:
        by_class.setdefault(row.label, []).append(row.leakage)
    order = sorted(by_class, key=lambda label: -statistics.fmean(by_class[label]))
    assert [label.get_text() for label in left.get_xticklabels()] == [str(label) for label in order]
    flat = [line.get_ydata()[0] for line in left.lines if len(set(line.get_ydata())) == 1]
    for label in order:  # ends of whiskers, and the median
        for value in (min(by_class[label]), statistics.median(by_class[label]), max(by_class[label])):
            assert any(value == pytest.approx(at) for at in flat)


def test_initialization():
    settings, rows, (left, middle, right) = drawn("initialization")
    assert points(left) == places(rows, named("predicted"), named("error"))
    assert_diagonal(left, log=True)
    names = [label.get_text() for label in middle.get_xticklabels()]
    assert names == list(settings.initializations)
    for axis, quantity in ((middle, "required_noise_std"), (right, "required_relative_noise")):
        assert points(axis) == places(rows, lambda row: names.index(row.initialization), named(quantity))
        assert axis.get_yscale() == "log"


def test_training():
    settings, rows, axes = drawn("training")
    for axis, quantity in zip(axes, ("leakage", "relative_leakage", "required_noise_std"), strict=True):
        *single, median = [list(line.get_ydata()) for line in axis.lines]
        by_round = [[getattr(row, quantity) for row in rows if row.round == n] for n in settings.rounds]
        assert single == [list(line) for line in zip(*by_round, strict=True)]
        assert median == [statistics.median(values) for values in by_round]
        assert [label.get_text() for label in axis.get_xticklabels()] == [str(n) for n in settings.rounds]
    assert axes[2].get_yscale() == "log"


def test_directions():
    settings, rows, (axis,) = drawn("directions")
    for explained in (True, False):
        chosen = [row for row in rows if row.explained is explained]
        assert points(axis, filled=explained) == places(chosen, named("eigenvalue"), named("error"))
    lines = [(line.get_linestyle(), list(line.get_ydata())) for line in axis.lines]
    expected = []
    for norm in settings.norms:
        for image in range(settings.num_images):
            mine = sorted((r for r in rows if (r.norm, r.image) == (norm, image)), key=lambda row: row.eigenvalue)
            expected += [(":", [row.law for row in mine]), ("-", [row.predicted for row in mine])]
    assert lines == expected
    assert axis.get_xscale() == axis.get_yscale() == "log"


def test_ridge():
    settings, rows, axes = drawn("ridge")
    for axis, noise_std in zip(axes, settings.noise_stds, strict=True):
        names = [label.get_text() for label in axis.get_xticklabels()]
        assert names == list(dict.fromkeys(row.prediction for row in rows))
        for marks, name in zip(axis.collections, names, strict=True):
            x, y = marks.get_offsets().T
            assert list(y) == [row.ratio for row in rows if (row.noise_std, row.prediction) == (noise_std, name)]
            assert max(abs(x - names.index(name))) < 0.5
        (one,) = axis.lines
        assert set(one.get_ydata()) == {1}
        assert axis.get_yscale() == "log"


def test_proxy():
    settings, rows, axes = drawn("proxy")
    for axis, size in zip(axes, settings.batch_sizes, strict=True):
        chosen = [row for row in rows if row.batch_size == size and row.predicted > 0]
        assert points(axis) == places(chosen, named("required_noise_std"), named("predicted"))
        assert_diagonal(axis, log=True)


def test_linearity():
    settings, rows, (axis,) = drawn("linearity")
    lines = {line.get_label(): list(line.get_ydata()) for line in axis.lines if not line.get_label().startswith("_")}
    assert set(lines) == {row.model for row in rows}
    for model, found in lines.items():
        mine = [row for row in rows if row.model == model]
        assert found == [statistics.median(r.ratio for r in mine if r.shift == shift) for shift in settings.shifts]


def test_batch_size():
    settings, rows, axes = drawn("batch-size")
    panels = [(u, q) for u in settings.units for q in ("required_noise_std", "leakage", "relative_leakage")]
    for axis, (unit, quantity) in zip(axes, panels, strict=True):
        for line, steps in zip(axis.lines, settings.local_steps, strict=True):
            for size, height in zip(line.get_xdata(), line.get_ydata(), strict=True):
                mine = [r for r in rows if (r.unit, r.local_steps, r.batch_size) == (unit, steps, size)]
                assert height == statistics.median(getattr(row, quantity) for row in mine)


def test_best_attacker():
    settings, rows, (axis,) = drawn("best-attacker")
    lines = {line.get_label(): line for line in axis.lines}

    def squares(name, network, noise_std):
        mine = [row for row in rows if (row.network, row.noise_std) == (network, noise_std)]
        return sum(getattr(row, name) ** 2 for row in mine) / len(mine)

    shown = [(a, "own J", "predicted") for a in settings.networks] + [("relu", "as audited", "audited")]
    for network, label, name in shown:
        line = lines[f"{network}, {label}"]
        for x, y, std in zip(line.get_xdata(), line.get_ydata(), settings.noise_stds, strict=True):
            best = squares("error", network, std)
            assert x == pytest.approx(best**0.5)
            assert y == pytest.approx((squares(name, network, std) / best) ** 0.5)


def test_noise():
    settings, rows, (left, right) = drawn("noise")
    strongest = {}
    for row in rows:
        if "," not in row.attack:  # without a denoiser
            strongest.setdefault((row.defence, row.image, row.target), []).append(row)
    best = {key: min(found, key=lambda row: row.error) for key, found in strongest.items()}
    assert points(left) == places(best.values(), named("relative_change"), named("error"))
    lines = {line.get_label(): list(line.get_ydata()) for line in right.lines}
    for defence in ("isotropic", "shaped", "white input"):
        assert lines[defence] == [
            statistics.median(row.error for (d, _, t), row in best.items() if (d, t) == (defence, target))
            for target in settings.targets
        ]
        assert all(a <= b for a, b in zip(lines[f"{defence}, denoised"], lines[defence], strict=True))


def test_time():
    _, rows, (axis,) = drawn("time")
    names = [label.get_text() for label in axis.get_yticklabels()]
    for bar, name in zip(axis.patches, names, strict=True):
        mine = [row for row in rows if row.method == name]
        assert bar.get_width() == pytest.approx(statistics.median(row.gradients for row in mine))
        assert bar.get_alpha() == (1.0 if mine[0].factor == 1 else 0.5)
    assert axis.get_xscale() == "log"
