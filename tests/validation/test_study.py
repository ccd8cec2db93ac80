"""A small study that really attacks, and its resumption."""

import dataclasses
import math

import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import imread

from fl_privacy.attacks import LBFGS, GaussNewton, deep_leakage
from fl_privacy.audit.settings import AuditSettings
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.rounding import rounded_off
from fl_privacy.influence.spectrum import dense_gram
from fl_privacy.studies.results import read_rows
from fl_privacy.studies.scene import Scene
from fl_privacy.validation import (
    ValidationRow,
    ValidationSettings,
    attacks_of,
    run_validation,
    summarize,
    summarize_attacks,
)
from fl_privacy.validation.figure import _draw, draw_agreement
from fl_privacy.validation.study import RAN
from fl_privacy.validation.summary import inapplicable

SETTINGS = ValidationSettings(num_images=4, images_at_once=2, noise_stds=(5.6e-4, 1.8e-2), max_steps=16)


class Counting:
    """The real attack, which remembers how many images it was run on."""

    def __init__(self):
        self.images = 0

    def run(self, problem):
        self.images += problem.num_units
        return GaussNewton().run(problem)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "results.csv"
    return path, run_validation(SETTINGS, {"gauss-newton": GaussNewton()}, path)


class TestStudy:
    def test_attacks_reach_what_was_predicted(self, study):
        _, rows = study
        overall, levels = summarize(rows)
        assert overall.runs == 8
        assert overall.failed == 0
        assert set(levels) == set(SETTINGS.noise_stds)
        assert 0.75 < overall.median_ratio < 1.25
        assert max(row.error for row in rows if row.noise_std == 5.6e-4) < min(
            row.error for row in rows if row.noise_std == 1.8e-2
        )

    def test_no_error_falls_below_the_papers_bound(self, study):
        assert all(row.lower_bound < row.error for row in study[1])

    def test_the_bound_is_that_of_the_dense_jacobian(self, study):
        """J by finite differences of the gradient, and the noise that the study added."""
        scene, step, image = Scene.of(SETTINGS), 1e-5, 2
        x = scene.images[image]

        def gradient(pixels):
            return scene.update.layout.flatten(scene.update(scene.params, pixels, scene.labels[image]))

        shifts = step * torch.eye(x.numel(), dtype=torch.float64).reshape(-1, *x.shape)
        jacobian = torch.stack([(gradient(x + s) - gradient(x - s)) / (2 * step) for s in shifts], dim=1)
        largest = float(torch.linalg.matrix_norm(jacobian, 2)) ** 2
        for level, noise_std in enumerate(SETTINGS.noise_stds):
            noise = noise_std * scene.noise([image], level)[0]
            (found,) = [row for row in study[1] if (row.image, row.noise_std) == (image, noise_std)]
            expected = float((jacobian.T @ noise).norm()) / largest / math.sqrt(x.numel())
            assert found.lower_bound == pytest.approx(expected, rel=1e-3)

    def test_the_file_holds_the_rows(self, study):
        path, rows = study
        assert read_rows(path, ValidationRow) == rows

    def test_a_stopped_study_goes_on_where_it_was(self, study, tmp_path):
        path, rows = study
        lines = path.read_text().splitlines(keepends=True)
        stopped = tmp_path / "results.csv"
        stopped.write_text("".join(lines[:5]))  # the first group of two images, both noise levels
        attack, progress = Counting(), []
        resumed = run_validation(
            SETTINGS, {"gauss-newton": attack}, stopped, progress=lambda done, total: progress.append((done, total))
        )
        assert attack.images == 4  # two images at two levels
        assert progress[-1] == (8, 8)
        assert [dataclasses.replace(row, seconds=0) for row in resumed] == [
            dataclasses.replace(row, seconds=0) for row in rows
        ]

    def test_a_half_written_line_is_done_again(self, study, tmp_path):
        path, rows = study
        lines = path.read_text().splitlines(keepends=True)
        broken = tmp_path / "results.csv"
        broken.write_text("".join(lines[:-1]) + lines[-1][:20])
        assert len(read_rows(broken, ValidationRow)) == len(rows) - 1
        run_validation(SETTINGS, {"gauss-newton": GaussNewton()}, broken)
        assert len(read_rows(broken, ValidationRow)) == len(rows)

    def test_metrics_have_their_units(self, study):
        for row in study[1]:
            assert row.psnr == pytest.approx(-20 * math.log10(row.error))
            assert -1 <= row.ssim <= 1
        levels = sorted(SETTINGS.noise_stds)
        by_level = [[row.ssim for row in study[1] if row.noise_std == level] for level in levels]
        assert min(by_level[0]) > max(by_level[1])  # less noise, more alike

    def test_rows_of_what_is_not_asked_for_stay_in_the_file_and_out_of_the_result(self, study, tmp_path):
        path, rows = study
        copy = tmp_path / "results.csv"
        copy.write_text(path.read_text())
        fewer = dataclasses.replace(SETTINGS, num_images=2, noise_stds=(1.8e-2,))
        found = run_validation(fewer, {"gauss-newton": GaussNewton()}, copy)
        assert [(row.image, row.noise_std) for row in found] == [(0, 1.8e-2), (1, 1.8e-2)]
        assert read_rows(copy, ValidationRow) == rows

    def test_an_attack_that_cannot_be_run_is_a_row_that_says_why(self, tmp_path):
        settings = dataclasses.replace(
            SETTINGS, num_images=1, noise_stds=(1.8e-2,), attacks=("linear-layer", "gauss-newton")
        )
        rows = run_validation(settings, attacks_of(settings), tmp_path / "results.csv")
        assert [row.attack for row in rows] == ["linear-layer", "gauss-newton"]
        assert math.isnan(rows[0].error)
        assert not rows[0].explained
        assert "linear" in inapplicable(rows)["linear-layer"]
        overall, _ = summarize(rows)
        assert overall.runs == 1
        assert set(summarize_attacks(rows)) == {"gauss-newton"}
        with pytest.raises(InvalidInputError, match="that can be run"):
            summarize(rows[:1])

    def test_the_prediction_for_the_very_image_and_with_a_coloured_prior(self, study, tmp_path):
        settings = dataclasses.replace(SETTINGS, prior="images", attacks=("gauss-newton", "gauss-newton-white"))
        rows = run_validation(settings, attacks_of(settings), tmp_path / "results.csv")
        white = {(row.image, row.noise_std): row for row in study[1]}
        coloured = {(row.image, row.noise_std): row for row in rows if row.attack == "gauss-newton"}
        ignorant = {(row.image, row.noise_std): row for row in rows if row.attack == "gauss-newton-white"}
        assert {row.prior for row in rows} == {"images"}
        for key, row in white.items():
            assert coloured[key].predicted < row.predicted  # who knows more errs less
            assert ignorant[key].error == pytest.approx(row.error, rel=0.05)  # the same attack
            for found in (row, coloured[key]):
                assert 0.5 < found.error / found.predicted_own < 1.6

    def test_who_knows_how_pixels_vary_together_is_held_against_a_prediction_that_does_not(self, study, tmp_path):
        settings = dataclasses.replace(SETTINGS, attacks=("gauss-newton-images",))
        knowing = run_validation(settings, attacks_of(settings), tmp_path / "results.csv")
        settings = dataclasses.replace(SETTINGS, prior="images")
        coloured = run_validation(settings, attacks_of(settings), tmp_path / "images.csv")
        for row, same, white in zip(knowing, coloured, study[1], strict=True):
            assert (row.image, row.noise_std) == (same.image, same.noise_std) == (white.image, white.noise_std)
            assert row.predicted == white.predicted > same.predicted
            assert row.error == same.error

    def test_another_file_is_refused(self, tmp_path):
        path = tmp_path / "other.csv"
        path.write_text("a,b\n1,2\n")
        with pytest.raises(InvalidInputError, match="columns of a ValidationRow"):
            read_rows(path, ValidationRow)

    def test_a_figure_is_written_and_wider_where_there_are_several_attacks(self, study, tmp_path):
        again = [dataclasses.replace(row, attack="another") for row in study[1]]
        widths = []
        for rows in (study[1], study[1] + again):
            path = tmp_path / "figures" / "agreement.png"
            draw_agreement(rows, path, title="LeNet, digits")
            picture = imread(path)
            assert picture.std() > 0.05
            widths.append(picture.shape[1])
        assert widths == [832, 1612]  # 6.4 and 12.4 inches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_stds": ()}, "noise_stds to name at least one"),
        ({"noise_stds": (0.0,)}, "noise_stds > 0"),
        ({"num_images": 0}, "num_images >= 1"),
        ({"attacks": ("magic",)}, "gauss-newton"),
        ({"prior": "black"}, "prior to be one of white, images"),
        ({"initialization": "zeros"}, "initialization to be one of default, uniform"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(InvalidInputError, match=message):
        ValidationSettings(**options)


def test_more_images_than_there_are(tmp_path):
    with pytest.raises(InvalidInputError, match="at most"):
        run_validation(ValidationSettings(num_images=10**6), {}, tmp_path / "results.csv")


def row(image, noise_std, predicted, error, *, attack="a", explained=True, status=RAN):
    return ValidationRow(
        image=image,
        label=0,
        noise_std=noise_std,
        prior="white",
        leakage_lower=0.4,
        leakage=0.5,
        leakage_upper=0.6,
        predicted_lower=0.9 * predicted,
        predicted=predicted,
        predicted_upper=1.1 * predicted,
        predicted_own=2 * predicted,
        lower_bound=0.0,
        attack=attack,
        status=status,
        error=error,
        psnr=20.0,
        ssim=0.5,
        converged=True,
        explained=explained,
        products=1,
        seconds=0.0,
    )


class TestSummary:
    def test_exact_numbers(self):
        rows = [
            row(i, 0.1, predicted=1.0 + i, error=(1.0 + i) * factor) for i, factor in enumerate((0.5, 0.9, 1.0, 1.2))
        ]
        overall, _ = summarize(rows)
        assert overall.runs == 4
        assert overall.median_ratio == pytest.approx(0.95)
        assert overall.median_deviation == pytest.approx(0.15)
        assert overall.beaten == 0.25  # 0.5 < 0.8 · 0.9
        assert overall.below == 0.5
        assert overall.spearman.value == pytest.approx(1.0)

    def test_the_best_attack_counts_and_failed_runs_are_told(self):
        rows = [
            row(0, 0.1, 1.0, 2.0, attack="a", explained=False),
            row(0, 0.1, 1.0, 1.5, attack="b", explained=False),
            row(1, 0.1, 2.0, 2.0, attack="a"),
            row(1, 0.1, 2.0, 3.0, attack="b", explained=False),
        ]
        overall, _ = summarize(rows)
        assert overall.runs == 2
        assert overall.median_ratio == pytest.approx(1.25)
        assert overall.failed == 0.5

    def test_an_attack_that_broke_down_does_not_hide_one_that_did_not(self):
        overall, _ = summarize([row(0, 0.1, 1.0, float("nan"), attack="a"), row(0, 0.1, 1.0, 0.2, attack="b")])
        assert overall.median_ratio == pytest.approx(0.2)
        assert overall.beaten == 1.0

    def test_reversed_order_within_a_level_is_reported(self):
        rows = [row(i, level, level * (10 + i), level * (10 - i)) for level in (1.0, 100.0) for i in range(5)]
        overall, levels = summarize(rows)
        assert levels[1.0].spearman.value == pytest.approx(-1.0)
        assert overall.spearman.value > 0

    def test_beating_the_prediction_for_the_very_image_is_told_apart(self):
        overall, _ = summarize([row(0, 0.1, 1.0, 1.5), row(1, 0.1, 1.0, 1.7)])  # for the very image: 2.0
        assert overall.beaten == 0
        assert overall.own_beaten == 0.5
        assert overall.own_ratio == pytest.approx(0.8)

    def test_the_lower_bound_is_held_against_what_was_reached(self):
        rows = [
            dataclasses.replace(row(i, 0.1, 1.0, 2.0), lower_bound=bound) for i, bound in enumerate((0.5, 1.0, 2.5))
        ]
        overall, _ = summarize(rows)
        assert overall.bound == 0.5  # 1.0 beside 2.0
        assert overall.below_bound == pytest.approx(1 / 3)

    def test_no_rows(self):
        with pytest.raises(InvalidInputError, match="got none"):
            summarize([])


RUNS = [
    row(0, 0.1, 1.0, 2.0, attack="a", explained=False),
    row(0, 0.1, 1.0, 3.0, attack="b", explained=False),
    row(1, 0.1, 2.0, 1.5, attack="a"),
    row(1, 0.1, 2.0, 4.0, attack="b", explained=False),
    row(2, 0.1, 5.0, 6.0, attack="a"),
    row(2, 0.1, 5.0, 5.5, attack="b"),
    row(0, 0.2, 3.0, 7.0, attack="a"),
    row(0, 0.2, 3.0, 8.0, attack="b"),
]


RELUS = ValidationSettings(model="resnet8", initialization="default", num_images=1, noise_stds=(1e-3,))


@pytest.fixture(scope="module")
def by_width(tmp_path_factory):
    """The row of a ResNet for each width of its ReLUs, `None` being the default."""
    folder, attack = tmp_path_factory.mktemp("relus"), deep_leakage(optimizer=LBFGS(steps=2))
    found = {}
    for width in (None, 0.0):
        settings = RELUS if width is None else dataclasses.replace(RELUS, relu_width=width)
        (found[width],) = run_validation(settings, {"dgl": attack}, folder / f"{width}.csv")
    return found


class TestReLUs:
    """Predictions are those of an audit, and what is attacked is the network as it is."""

    @pytest.mark.parametrize("width", [None, 0.0])
    def test_the_prediction_is_that_of_the_dense_jacobian(self, by_width, width):
        scene = Scene.of(RELUS)
        smooth = rounded_off(scene.update, AuditSettings().relu_width if width is None else width)
        gram = dense_gram(dataclasses.replace(scene, update=smooth).own_jacobian([0]), 0)
        ridge = (1e-3 / scene.prior.std) ** 2
        shrunk = ridge / (torch.linalg.eigvalsh(gram).clamp(min=0) + ridge)
        assert by_width[width].predicted == pytest.approx(scene.prior.std * math.sqrt(shrunk.mean()), rel=1e-6)

    def test_rounding_predicts_less_error_and_changes_nothing_for_the_attack(self, by_width):
        assert by_width[None].predicted < 0.8 * by_width[0.0].predicted
        assert by_width[None].error == by_width[0.0].error


def drawn(rows):
    figure = Figure()
    _draw(rows, figure, "LeNet", len({found.attack for found in rows}) > 1)
    return figure.axes


def points(axes):
    """Label, places and whether they are filled, of each scatter."""
    return [(c.get_label(), c.get_offsets().tolist(), len(c.get_facecolors()) > 0) for c in axes.collections]


class TestFigure:
    def test_the_best_error_over_the_prediction_and_hollow_where_the_attack_failed(self):
        axes = drawn(RUNS)[0]
        assert points(axes) == [
            ("σ = 0.1", [[2.0, 1.5], [5.0, 5.5]], True),
            ("σ = 0.1, attack failed", [[1.0, 2.0]], False),
            ("σ = 0.2", [[3.0, 7.0]], True),
        ]
        (diagonal,) = axes.lines
        assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == pytest.approx([1.0 / 1.3, 1.3 * 7.0])
        assert axes.get_xlim() == axes.get_ylim() == pytest.approx((1.0 / 1.3, 1.3 * 7.0))
        assert (axes.get_xscale(), axes.get_yscale(), axes.get_title()) == ("log", "log", "LeNet")

    def test_the_corridor_of_medians_and_each_run_beside_it(self):
        axes = drawn(RUNS)[1]
        lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        levels = [0.1, 0.2]
        assert lines == {
            "predicted, for this prior": (levels, [2.0, 3.0]),
            "predicted for the very images": (levels, [4.0, 6.0]),
            "a": (levels, [2.0, 7.0]),
            "b": (levels, [4.0, 8.0]),
        }
        band, *marks = axes.collections
        heights = {x: [y for at, y in band.get_paths()[0].vertices if at == x] for x in levels}
        for level, predicted in zip(levels, (2.0, 3.0), strict=True):
            assert min(heights[level]) == pytest.approx(0.9 * predicted)
            assert max(heights[level]) == pytest.approx(1.1 * predicted)
        ordered = [found for name in "ab" for found in RUNS if found.attack == name]
        assert len(marks) == len(ordered)
        colours = {line.get_label(): line.get_color() for line in axes.lines}
        for mark, found in zip(marks, ordered, strict=True):
            ((place, height),) = mark.get_offsets().tolist()
            assert height == found.error
            assert 1 < place / found.noise_std < 1.2
            assert tuple(mark.get_edgecolors()[0]) == to_rgba(colours[found.attack])
            assert (len(mark.get_facecolors()) > 0) is found.explained

    def test_one_attack_needs_no_corridor(self):
        assert len(drawn([found for found in RUNS if found.attack == "a"])) == 1
