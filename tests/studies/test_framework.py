"""Settings, results and their command, with a small study whose answers are known."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import click
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from fl_privacy.cli import app
from fl_privacy.commands.study import CommaSeparated, StudyCommand
from fl_privacy.errors import InvalidInputError
from fl_privacy.studies import STUDIES, Portion, Settings, Study, Summary, conduct, load_study, option
from fl_privacy.studies.results import read_rows
from fl_privacy.studies.settings import settings_of


@dataclass(frozen=True, kw_only=True)
class Squares(Settings):
    """Which numbers are squared."""

    numbers: tuple[float, ...] = option((1.0, 2.5), "What to square.", above=0)
    name: str = option("plain", "Of the study.")
    rounding: Literal["none", "down"] = option("none", "Of results.")
    repeats: int = option(2, "Rows per number.", minimum=1)
    loud: bool = option(False, "Whether to shout.", recorded=False)


@dataclass(frozen=True, kw_only=True)
class Square:
    number: float
    repeat: int
    square: float
    exact: bool
    note: str


COMPUTED: list[float] = []
DRAWN: list[float] = []


def portions(settings):
    def rows(number):
        COMPUTED.append(number)
        for repeat in range(settings.repeats):
            yield Square(number=number, repeat=repeat, square=number**2, exact=number == 1, note=f'a "{repeat}", b')

    for number in settings.numbers:
        yield Portion([(number, i) for i in range(settings.repeats)], lambda number=number: rows(number))


SQUARES = Study(
    name="squares",
    settings=Squares,
    row=Square,
    key=("number", "repeat"),
    portions=portions,
    summarize=lambda settings, rows: Summary("Done.", ("|x|", "x²"), tuple((str(r.number), "1") for r in rows)),
    draw=lambda settings, rows, figure: DRAWN.extend(
        figure.subplots().plot([row.square for row in rows])[0].get_ydata()
    ),
)


@pytest.fixture(autouse=True)
def _forget():
    COMPUTED.clear()
    DRAWN.clear()


class TestConduct:
    def test_writes_everything_and_reads_it_back(self, tmp_path):
        rows = conduct(SQUARES, Squares(numbers=(0.1, 1.0)), tmp_path)
        assert [row.square for row in rows] == DRAWN == [0.1**2, 0.1**2, 1.0, 1.0]
        assert read_rows(tmp_path / "results.csv", Square) == rows
        assert imread(tmp_path / "figure.png").std() > 0.05
        assert (tmp_path / "summary.md").read_text().startswith("| \\|x\\| | x² |\n| --- | --- |\n| 0.1 | 1 |")
        assert json.loads((tmp_path / "settings.json").read_text())["settings"] == {
            "numbers": [0.1, 1.0],
            "name": "plain",
            "rounding": "none",
            "repeats": 2,
        }

    @pytest.mark.parametrize("left", [3, -2], ids=["half a line", "a last number cut short"])
    def test_a_stopped_one_computes_only_what_is_missing(self, tmp_path, left):
        told: list[tuple[int, int]] = []
        rows = conduct(SQUARES, Squares(numbers=(1.0, 2.0, 3.0)), tmp_path)
        results = tmp_path / "results.csv"
        lines = results.read_text().splitlines(keepends=True)
        results.write_text("".join(lines[:4]) + lines[4][:left])  # one and a half numbers, and a line cut short
        COMPUTED.clear()
        settings = Squares(numbers=(1.0, 2.0, 3.0), loud=True)  # what is not recorded may differ
        resumed = conduct(SQUARES, settings, tmp_path, progress=lambda done, total: told.append((done, total)))
        assert COMPUTED == [2.0, 3.0]
        assert resumed == rows == read_rows(results, Square)
        assert (told[0], told[-1]) == ((3, 6), (6, 6))
        COMPUTED.clear()
        conduct(SQUARES, settings, tmp_path)
        assert COMPUTED == []

    def test_other_settings_are_refused(self, tmp_path):
        conduct(SQUARES, Squares(), tmp_path)
        with pytest.raises(InvalidInputError, match=r"repeats 2 there and 3 now\): name another folder with -o"):
            conduct(SQUARES, Squares(repeats=3), tmp_path)
        with pytest.raises(InvalidInputError, match=r"of the study 'cubes', .* is of 'squares'"):
            conduct(dataclasses.replace(SQUARES, name="cubes"), Squares(), tmp_path)
        assert len(read_rows(tmp_path / "results.csv", Square)) == 4

    def test_settings_that_came_to_nothing_do_not_hold_the_folder(self, tmp_path):
        def refuse(settings):
            raise InvalidInputError("no such image")

        with pytest.raises(InvalidInputError, match="no such image"):
            conduct(dataclasses.replace(SQUARES, portions=refuse), Squares(repeats=1000), tmp_path)
        assert len(conduct(SQUARES, Squares(), tmp_path)) == 4

    def test_settings_that_are_somebody_elses_are_left_alone(self, tmp_path):
        (tmp_path / "settings.json").write_text('{"mine": 1}')
        with pytest.raises(InvalidInputError, match="got something else"):
            conduct(SQUARES, Squares(), tmp_path)
        assert (tmp_path / "settings.json").read_text() == '{"mine": 1}'

    def test_results_of_unknown_settings_are_refused(self, tmp_path):
        conduct(SQUARES, Squares(), tmp_path)
        (tmp_path / "settings.json").write_text("[1]")
        with pytest.raises(InvalidInputError, match="got something else"):
            conduct(SQUARES, Squares(), tmp_path)
        (tmp_path / "settings.json").unlink()
        with pytest.raises(InvalidInputError, match=r"settings.json beside its results.csv"):
            conduct(SQUARES, Squares(), tmp_path)

    @pytest.mark.parametrize("line", ["1.0,0,x,True,a", "1.0,0,1.0,yes,a", "1.0,0"])
    def test_a_spoilt_line_is_named(self, tmp_path, line):
        conduct(SQUARES, Squares(), tmp_path)
        results = tmp_path / "results.csv"
        lines = results.read_text().splitlines()
        results.write_text("\n".join([lines[0], line, *lines[2:], ""]))
        with pytest.raises(InvalidInputError, match=r"line 2 of"):
            conduct(SQUARES, Squares(), tmp_path)


class TestSettings:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"numbers": ()}, "numbers to name at least one"),
            ({"numbers": (1.0, 0.0)}, "numbers > 0, got 0"),
            ({"numbers": (float("nan"),)}, "finite numbers, got nan"),
            ({"repeats": 0}, "repeats >= 1, got 0"),
            ({"repeats": 1.5}, "repeats of type int, got 1.5"),
            ({"repeats": True}, "repeats of type int, got True"),
            ({"rounding": "up"}, "rounding to be one of none, down, got 'up'"),
        ],
    )
    def test_what_is_not_allowed(self, values, message):
        with pytest.raises(InvalidInputError, match=message):
            Squares(**values)

    @pytest.mark.parametrize("name", STUDIES)
    def test_every_study_describes_its_options_by_its_settings(self, name):
        study = load_study(name)
        assert study.name == name
        command = StudyCommand(name, callback=print)
        with command.make_context(name, []) as context:
            defaults = {key: value for key, value in context.params.items() if key not in ("output", "as_json")}
        assert study.settings(**defaults) == study.settings()
        assert all(setting.help.endswith(".") for setting in settings_of(study.settings))
        assert set(study.key) <= {item.name for item in dataclasses.fields(study.row)}


class TestCommand:
    def test_unknown_names_list_the_valid_ones(self):
        outcome = CliRunner().invoke(app, ["study", "rigde"])
        assert outcome.exit_code == 2
        assert all(name in outcome.output for name in STUDIES)
        with pytest.raises(InvalidInputError, match="ridge"):
            load_study("rigde")

    def test_help_lists_every_study(self):
        outcome = CliRunner().invoke(app, ["study", "--help"])
        assert outcome.exit_code == 0
        assert all(name in outcome.output for name in STUDIES)

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["--noise-stds", "0.1,zero"], "zero"),
            (["--noise-stds", "-1"], "noise_stds > 0"),
            (["--num-images", "0"], "num_images >= 1"),
            (["--initialization", "zeros"], "kaiming"),
            (["--dataset", "emnist"], "mnist"),
        ],
    )
    def test_wrong_values_exit_with_2_and_name_what_is_expected(self, tmp_path, arguments, named):
        outcome = CliRunner().invoke(app, ["study", "ridge", *arguments, "-o", str(tmp_path / "new")])
        assert outcome.exit_code == 2
        assert named in outcome.output

    def test_comma_separated_values(self):
        kind = CommaSeparated(float)
        assert kind.convert("1e-3, 2", None, None) == (1e-3, 2.0)
        assert kind.convert((1.0,), None, None) == (1.0,)
        with pytest.raises(click.BadParameter, match="'x' is not a valid float"):
            kind.convert("1,x", None, None)

    def test_torch_is_not_needed_to_list_the_studies(self):
        code = (
            "import sys; from typer.testing import CliRunner; from fl_privacy.cli import app; "
            "CliRunner().invoke(app, ['study', '--help']); print('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.strip() == "False"
