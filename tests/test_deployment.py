"""A real deployment on this machine: TLS, node authentication, processes that are killed at work, and the ledger."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fl_privacy.audit import LeakageEstimate, Ledger, Source, Status

ROOT = Path(__file__).parents[1]
SIMULATIONS = ROOT / "simulations"

pytestmark = [pytest.mark.deployment, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

DRIVER = """
import os, signal, sys, threading, time
from pathlib import Path
from deployment import APP, private_deployment
from fl_privacy.audit import Ledger
from processes import adopt_orphans, stop_descendants, descendants

ledger, state = Path(sys.argv[1]), Path(sys.argv[2])
adopt_orphans()

def kill_a_node_after_the_first_round(node):
    while not ledger.exists() or not any(True for _ in Ledger.open(ledger).rows()):
        time.sleep(0.1)
    os.killpg(node.pid, signal.SIGTERM if sys.argv[3] == "TERM" else signal.SIGKILL)
    print("KILLED", flush=True)

with private_deployment(state=state, cwd=state, nodes=2) as deployment:
    config = f'num-clients=2 num-server-rounds=1 local-steps=2 audit-source="client" ledger="{ledger.parent}/client.db"'
    config += " audit-workers=0 audit-max-examples=1 reference-run=false"
    code = deployment.link.run(APP, run_config=[config], federation_config=[])
    print("CLIENT", code, deployment.link.status(), flush=True)
    killer = threading.Thread(target=kill_a_node_after_the_first_round, args=(deployment.nodes[1],), daemon=True)
    killer.start()
    config = f'num-clients=2 num-server-rounds=2 local-steps=1 audit-workers=0 audit-max-examples=1 ledger="{ledger}"'
    code = deployment.link.run(APP, run_config=[config], federation_config=[])
    print("STATUS", code, deployment.link.status(), flush=True)
print("LEFT", len(descendants()), len(stop_descendants(grace=10.0)), flush=True)
"""


def test_the_app_of_the_simulation_runs_deployed_under_two_sources_and_outlives_a_node(tmp_path):
    ledger = tmp_path / "ledger.db"
    environment = {**os.environ, "PYTHONPATH": str(SIMULATIONS)}
    command = [sys.executable, "-c", DRIVER, str(ledger), str(tmp_path / "state"), "TERM"]
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as driver:
        try:
            output, _ = driver.communicate(timeout=280)
        finally:
            driver.kill()
    assert driver.returncode == 0, output[-4000:]
    assert "KILLED" in output
    assert "CLIENT 0 finished:completed" in output, output[-4000:]
    assert "STATUS 0 finished:completed" in output, output[-4000:]

    with Ledger.open(tmp_path / "client.db") as opened:
        told = {entry.estimate.client: entry.estimate for entry in opened.rows()}
    assert {client: (row.source, row.status) for client, row in told.items()} == {
        "0": (Source.CLIENT, Status.AUDITED),
        "1": (Source.CLIENT, Status.AUDITED),
    }
    for row in told.values():
        assert 0 <= row.leakage.lower <= row.leakage.value <= row.leakage.upper <= 1
        assert row.units_audited == 1
    assert told["0"].leakage.value > told["1"].leakage.value, "the second puts noise on its update"

    with Ledger.open(ledger) as opened:
        assert opened.verify().ok
        rows = [entry.estimate for entry in opened.rows()]
    first = {row.client: row for row in rows if row.server_round == 1}
    second = {row.client: row for row in rows if row.server_round == 2}
    assert {client: row.status for client, row in first.items()} == {"0": Status.AUDITED, "1": Status.AUDITED}
    assert second["0"].status is Status.AUDITED
    assert second["1"].status in (Status.CLIENT_ERROR, Status.NO_REPLY)
    assert second["1"].leakage is None
    assert not list((tmp_path / "state").iterdir()), "state and credentials are gone"
    assert output.rstrip().endswith(" 0"), output[-200:]


@pytest.mark.timeout(600)
def test_a_worker_a_supernode_and_the_superlink_are_killed_at_work_and_no_row_is_lost(tmp_path):
    ledger = tmp_path / "ledger.db"
    environment = {**os.environ, "PYTHONPATH": str(SIMULATIONS)}
    command = [sys.executable, str(ROOT / "tests" / "faults" / "driver.py"), str(tmp_path)]
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as driver:
        try:
            output, _ = driver.communicate(timeout=550)
        except subprocess.TimeoutExpired:
            driver.terminate()  # it stops what it started
            raise
    assert driver.returncode == 0, output[-4000:]
    assert [line.removeprefix("DRIVER ") for line in output.splitlines() if line.startswith("DRIVER ")] == [
        "killed a worker in its audit",
        "killed a SuperNode whose client trains",
        "started again at once it is refused: True",
        "killed the SuperLink while a client trains, and started it again",
        "first run finished:completed",
        "second run 0 finished:completed",
        "left 0",
    ]
    assert "an audit worker died" in output

    runs: dict[str, dict[tuple[int, str], LeakageEstimate]] = {}
    with Ledger.open(ledger) as opened:
        for entry in opened.rows():
            row = entry.estimate
            assert runs.setdefault(entry.run_id, {}).setdefault((row.server_round, row.client), row) is row
    first, second = runs.values()
    fates = {asked: row.status for asked, row in first.items()}
    assert fates.pop((2, "1")) is Status.CLIENT_ERROR
    assert "Node Unavailable" in first[2, "1"].detail
    assert fates == dict.fromkeys([(1, "0"), (1, "1"), (2, "0"), (3, "0")], Status.AUDITED)
    assert {asked: row.status for asked, row in second.items()} == dict.fromkeys([(1, "0"), (1, "1")], Status.AUDITED)
    verify = [str(Path(sys.executable).parent / "fl-privacy"), "verify", str(ledger)]
    assert subprocess.run(verify, check=False).returncode == 0
