"""`fl-privacy init`: the app that it writes runs, as messages and under `flwr run`."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fl_privacy.audit import Ledger, Status
from fl_privacy.cli import app

ROOT = Path(__file__).parents[1]

PROGRAM = """
import sys
sys.path.insert(0, "simulations")
from pathlib import Path
from processes import adopt_orphans, stop_descendants
from superlink import private_superlink

adopt_orphans()
folder = Path(sys.argv[1])
try:
    with private_superlink(state=folder / "state", cwd=folder) as link:
        code = link.run(
            folder / "my-first.app",
            run_config=["num-server-rounds=1 num-clients=2"],
            federation_config=["num-supernodes=2 init-args-num-cpus=4"],
        )
        print("STATUS", code, link.status())
finally:
    stop_descendants(grace=6.0)
"""


@pytest.fixture
def folder(tmp_path):
    outcome = CliRunner().invoke(app, ["init", str(tmp_path / "my-first.app")])
    assert outcome.exit_code == 0, outcome.output
    assert "flwr run" in outcome.stdout
    return tmp_path / "my-first.app"


def test_it_runs_under_flwr_and_has_a_row_for_every_client(folder):
    command = [sys.executable, "-c", PROGRAM, str(folder.parent)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert "STATUS 0 finished:completed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    with Ledger.open(folder.parent / "audit.db") as ledger:
        rows = [entry.estimate for entry in ledger.rows()]
        (run,) = ledger.runs()
        metrics = ledger.metrics(run_id=run.run_id)
        assert ledger.verify().ok
    assert sorted((row.server_round, row.client, row.status) for row in rows) == [
        (1, client, Status.AUDITED) for client in ("0", "1")
    ]
    assert all(row.curve is not None for row in rows)
    assert [(entry.server_round, *entry.metrics) for entry in metrics] == [(0, "accuracy"), (1, "accuracy")]


def test_what_it_writes(folder):
    config = tomllib.loads((folder / "pyproject.toml").read_text())
    components = config["tool"]["flwr"]["app"]["components"]
    assert components == {"serverapp": "my_first_app.server_app:app", "clientapp": "my_first_app.client_app:app"}
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--ignore", "I", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout


def test_nothing_is_overwritten(folder):
    before = (folder / "pyproject.toml").read_text()
    outcome = CliRunner().invoke(app, ["init", str(folder)])
    assert outcome.exit_code == 2
    assert "holds something" in outcome.stderr
    assert (folder / "pyproject.toml").read_text() == before


@pytest.mark.parametrize("name", ["1st", "class", "---"])
def test_a_name_that_is_no_package_is_refused(tmp_path, name):
    outcome = CliRunner().invoke(app, ["init", "--", str(tmp_path / name)])
    assert outcome.exit_code == 2
    assert "such as my_app" in outcome.stderr
    assert not (tmp_path / name).exists()


def test_json(tmp_path):
    outcome = CliRunner().invoke(app, ["init", str(tmp_path / "app"), "--json"])
    assert [Path(path).name for path in json.loads(outcome.stdout)["written"]] == [
        "README.md",
        "__init__.py",
        "client_app.py",
        "server_app.py",
        "task.py",
        "pyproject.toml",
    ]
