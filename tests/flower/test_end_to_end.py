"""The whole of it under Flower's simulation engine, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from fl_privacy.audit import Ledger, Source, Status

TESTS = Path(__file__).parents[1]


def test_an_audited_simulation_has_a_row_for_everyone_and_the_model_of_a_plain_one(tmp_path):
    ledger, output = tmp_path / "ledger.db", tmp_path / "arrays.npz"
    environment = {
        **os.environ,
        "PYTHONPATH": str(TESTS),
        "FLWR_HOME": str(tmp_path),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": "local",  # not a cluster that somebody else runs on this machine
    }
    command = [sys.executable, "-m", "flower.simulated", str(ledger), str(output)]
    run = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "Leakage in round 2" in run.stdout

    with Ledger.open(ledger) as opened:
        assert opened.verify().ok
        rows = [entry.estimate for entry in opened.rows()]
    assert sorted((row.server_round, row.client) for row in rows) == [(r, str(c)) for r in (1, 2) for c in range(3)]
    assert {(row.status, row.source, row.action) for row in rows} == {(Status.AUDITED, Source.TRUSTED, "passed")}

    arrays = np.load(output)
    assert arrays["attached"]  # the auditor used the simulation's cluster, and left it as it was
    names = [name.removeprefix("plain/") for name in arrays if name.startswith("plain/")]
    assert len(names) == 4
    for name in names:
        np.testing.assert_allclose(arrays[f"audited/{name}"], arrays[f"plain/{name}"], rtol=1e-5, atol=1e-7)
