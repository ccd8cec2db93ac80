"""The command line and its tables, through a terminal-less runner and real processes."""

from __future__ import annotations

import io
import json
import math
import os
import re
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from fl_privacy.audit.estimate import LeakageEstimate, Source, Status
from fl_privacy.audit.ledger import Ledger
from fl_privacy.audit.table import round_table, summary_table
from fl_privacy.cli import app
from fl_privacy.interval import Interval


def audited(server_round: int, client: str, leakage: float) -> LeakageEstimate:
    return LeakageEstimate(
        server_round=server_round,
        client=client,
        status=Status.AUDITED,
        source=Source.TRUSTED,
        defence="LocalDpMod(clip=1.0)",
        num_examples=120,
        leakage=Interval(max(0.0, leakage - 0.0151), leakage, min(1.0, leakage + 0.0151)),
        rmse=0.1234,
        psnr=18.17,
        worst_example=1047,
        worst_label=9,
        snr_db=math.inf,
        target_leakage=0.1,
        required_noise_std=0.00321 * server_round,
    )


def silent(server_round: int, client: str, status: Status, detail: str) -> LeakageEstimate:
    return LeakageEstimate(server_round=server_round, client=client, status=status, detail=detail, action="excluded")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.db"
    with Ledger(path) as ledger:
        for server_round in (1, 2):
            rows = [audited(server_round, "10", 0.93), audited(server_round, "9", 0.2)]
            ledger.append(rows, run_id="first")
        ledger.append([silent(1, "9", Status.NO_REPLY, "no answer within 30 s")], run_id="second")
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def tamper(path: Path) -> None:
    raw = sqlite3.connect(path)
    with raw:
        raw.execute("UPDATE fl_privacy_ledger SET leakage = 0.0 WHERE sequence = 3")
    raw.close()


class TestVerify:
    def test_untouched(self, path: Path) -> None:
        result = invoke("verify", path)
        with Ledger.open(path) as ledger:
            head = ledger.head()
        assert (result.exit_code, result.stdout.splitlines()[1]) == (0, f"head: {head}")
        assert "up to row 5" in invoke("verify", path, "--head", head).stdout

    def test_tampered(self, path: Path) -> None:
        tamper(path)
        result = invoke("verify", path)
        assert result.exit_code == 1
        assert "row 3: column leakage was changed: it says 0.0, the row 0.93" in result.stdout

    def test_another_head(self, path: Path) -> None:
        result = invoke("verify", path, "--head", "ab" * 32)
        assert result.exit_code == 1
        assert "no row has the expected head" in result.stdout

    def test_json(self, path: Path) -> None:
        tamper(path)
        result = invoke("verify", path, "--json")
        outcome = json.loads(result.stdout)
        assert (result.exit_code, outcome["ok"], outcome["rows"]) == (1, False, 5)
        assert [problem["sequence"] for problem in outcome["problems"]] == [3]

    @pytest.mark.parametrize("command", ["verify", "show"])
    def test_a_missing_ledger(self, tmp_path: Path, command: str) -> None:
        result = invoke(command, tmp_path / "none.db")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == f"error: there is no ledger at {tmp_path / 'none.db'}\n"
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "arguments", [["verify"], ["verify", "x", "--nonsense"], ["nonsense"], ["show", "x", "--round", "one"], []]
    )
    def test_wrong_usage(self, arguments: list[str]) -> None:
        assert invoke(*arguments).exit_code == 2

    def test_a_head_that_is_none(self, path: Path) -> None:
        result = invoke("verify", path, "--head", "12")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "64 hexadecimal digits" in result.stderr


class TestShow:
    def test_a_table_per_round(self, path: Path) -> None:
        result = invoke("show", path)
        assert result.exit_code == 0
        titles = [line.strip() for line in result.stdout.splitlines() if line.startswith("run ")]
        assert titles == ["run first, round 1", "run first, round 2", "run second, round 1"]
        assert result.stdout.count("0.93 [0.91, 0.95]") == 2

    def test_the_worst_example_and_its_class_are_named(self, path: Path) -> None:
        assert invoke("show", path).stdout.count("1047 (9)") == 4

    def test_filters(self, path: Path) -> None:
        shown = invoke("show", path, "--run", "first", "--round", 2, "--client", 9).stdout
        assert "run first, round 2" in shown
        assert "round 1" not in shown
        assert "0.93" not in shown

    def test_nothing_matches(self, path: Path) -> None:
        result = invoke("show", path, "--round", 7)
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no rows match\n")

    def test_an_unknown_run_names_the_known(self, path: Path) -> None:
        result = invoke("show", path, "--run", "third")
        assert result.exit_code == 2
        assert result.stderr == "error: --run: the ledger holds no run 'third', but first, second\n"

    def test_json_lines_hold_every_field(self, path: Path) -> None:
        lines = [json.loads(line) for line in invoke("show", path, "--json").stdout.splitlines()]
        with Ledger.open(path) as ledger:
            assert [LeakageEstimate.from_dict(line["estimate"]) for line in lines] == [
                entry.estimate for entry in ledger.rows()
            ]
            assert [line["hash"] for line in lines] == [entry.hash for entry in ledger.rows()]


class TestProcess:
    @staticmethod
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "COLUMNS": "120"}
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)

    def test_exit_codes_reach_the_shell(self, path: Path) -> None:
        script = str(Path(sys.executable).with_name("fl-privacy"))
        assert self.run(script, "verify", str(path)).returncode == 0
        assert self.run(script, "verify", str(path) + "x").returncode == 2
        tamper(path)
        assert self.run(script, "verify", str(path)).returncode == 1

    def test_help_tells_the_exit_codes_and_version_the_version(self) -> None:
        script = str(Path(sys.executable).with_name("fl-privacy"))
        for command in ([], ["verify"], ["show"], ["study", "ridge"]):
            assert "Exit codes: 0" in self.run(script, *command, "--help").stdout
        for command, words in (
            ("verify", "Path of a SQLite ledger"),
            ("audit", "returns the model"),
            ("init", "folder"),
        ):
            arguments = re.search(r"Arguments.*?Options", self.run(script, command, "--help").stdout, re.DOTALL)
            assert arguments is not None
            assert words in arguments.group(0), command
        assert self.run(script, "--version").stdout.startswith("fl-privacy ")

    def test_the_heavy_libraries_stay_out(self) -> None:
        code = "import sys, fl_privacy.cli; print(sorted({'torch', 'ray', 'flwr', 'numpy'} & set(sys.modules)))"
        result = self.run(sys.executable, "-c", code)
        assert (result.stdout, result.stderr) == ("[]\n", "")


def rendered(table: Table, *, width: int = 120) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=width).print(table)
    return output.getvalue().splitlines()


class TestRoundTable:
    def test_a_row_holds_what_the_client_gave_away(self) -> None:
        lines = rendered(round_table([audited(1, "3", 0.93)]))
        cells = ["3", "120", "LocalDpMod(clip=1.0)", "0.93", "[0.91,", "0.95]", "0.123", "18.2", "1047", "(9)"]
        cells += ["0.00321", "audited"]
        assert lines[-1].split() == cells
        assert "for 0.1" in lines[1]

    @pytest.mark.parametrize(
        ("interval", "printed"),
        [
            (Interval(0.287, 0.2949, 0.3001), "0.29 [0.28, 0.31]"),
            (Interval(0.29, 0.57, 0.58), "0.57 [0.29, 0.58]"),  # 0.29 * 100 < 29 and 0.57 * 100 < 57 as floats
            (Interval(0.0, 1.0, 1.0), "1.00 [0.00, 1.00]"),
        ],
    )
    def test_bounds_are_rounded_outwards(self, interval: Interval[float], printed: str) -> None:
        row = LeakageEstimate(**{**vars(audited(1, "3", 0.5)), "leakage": interval})
        assert printed in rendered(round_table([row]))[-1]

    def test_a_small_leakage_is_not_rounded_to_none(self) -> None:
        row = LeakageEstimate(**{**vars(audited(1, "3", 0.5)), "leakage": Interval(0.001, 0.0042, 0.0099)})
        assert "0.004 [0.001, 0.010]" in rendered(round_table([row]))[-1]

    def test_rows_without_an_estimate_show_dashes_and_a_note(self) -> None:
        rows = [silent(1, name, Status.NO_REPLY, "no answer within 30 s") for name in ("12", "7")]
        lines = rendered(round_table([*rows, audited(1, "3", 0.5)]))
        assert [line.split()[0] for line in lines[3:6]] == ["3", "7", "12"]
        assert lines[4].split() == ["7", *"-------", "no-reply,", "excluded"]
        assert lines[-1].strip() == "7, 12: no-reply: no answer within 30 s"

    def test_it_fits_into_120_columns_with_nothing_cut(self) -> None:
        names = ["18446744073709551615", "client-with-a-rather-long-name-indeed", "[bold]x[/bold]"]
        rows = [audited(1, name, 0.0712) for name in names]
        rows.append(silent(1, "4", Status.CLIENT_ERROR, "RuntimeError: " + "x " * 500))
        lines = rendered(round_table(rows, title="run a, round 1"))
        assert max(map(len, lines)) <= 120
        text = "\n".join(lines)
        assert text.count("0.071 [0.056, 0.087]") == 3
        assert "…" not in text
        assert len(lines) < 20

    def test_a_client_cannot_write_to_the_terminal(self) -> None:
        hostile = "a\x1b[2J\x1b]0;owned\x07\r\n\u202eb"
        row = silent(1, hostile, Status.INVALID_UPDATE, hostile)
        output = io.StringIO()
        Console(file=output, width=120, force_terminal=True, color_system=None).print(round_table([row], title=hostile))
        assert not set(output.getvalue()) & {"\x07", "\r", "\u202e"}
        assert "\x1b[2J" not in output.getvalue()
        assert "\x1b]" not in output.getvalue()

    def test_many_different_notes_are_cut_short(self) -> None:
        rows = [silent(1, str(client), Status.CLIENT_ERROR, f"error {client}") for client in range(100)]
        lines = rendered(round_table(rows))
        assert lines[-1].strip() == "and 88 further notes, which the ledger holds in full"

    def test_an_empty_round(self) -> None:
        assert "client" in rendered(round_table([]))[1]


class TestSummaryTable:
    def test_worst_last_and_statuses_of_each_client(self) -> None:
        rows = [
            audited(1, "9", 0.5),
            audited(2, "9", 0.93),
            audited(3, "9", 0.2),
            silent(4, "9", Status.LATE, "too slow"),
            silent(1, "10", Status.UNPROTECTED, "no report"),
        ]
        lines = rendered(summary_table(iter(rows)))
        worst = ["0.93", "[0.91,", "0.95]", "2", "0.20", "[0.18,", "0.22]"]
        assert lines[-2].split() == ["9", "4", *worst, "0.00963", "audited", "3,", "late", "1"]
        assert lines[-1].split() == ["10", "1", "-", "-", "-", "-", "unprotected", "1"]

    def test_what_all_rounds_tell_as_they_arrived_and_as_they_were_passed_on(self) -> None:
        """In a run whose server put noise on updates; where none did, the two are the same number."""
        told = {
            "rounds_leakage": Interval(0.93, 0.99, 1.0),
            "rounds_passed_leakage": Interval(0.2, 0.3, 0.355),
            "passed_leakage": 0.2,
            "applied_noise_std": 0.0125,
        }
        row = replace(audited(2, "client-7", 0.93), action="perturbed", **told)
        lines = rendered(summary_table([row]))
        assert max(map(len, lines)) <= 120
        assert all("\n".join(lines).count(heading) == 1 for heading in ("in all", "last, all"))
        assert (
            "client-7 1 0.93 [0.91, 0.95] 2 0.93 [0.91, 0.95] ≤ 1.00 0.00642 0.0125 ≤ 0.20, 0.36 audited 1"
            in " ".join(lines[-1].split())
        )
        alone = rendered(summary_table([replace(audited(2, "9", 0.5), rounds_leakage=told["rounds_leakage"])]))
        assert not any("last, all" in line for line in alone)

    def test_an_unknown_leakage_is_the_worst(self) -> None:
        rows = [audited(1, "9", 0.5), audited(2, "9", math.nan), audited(3, "9", 0.9)]
        assert "nan" in rendered(summary_table(rows))[-1]
