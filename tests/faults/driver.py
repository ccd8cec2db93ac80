"""A deployment in which everything is killed that can be, each at a moment at which it is known to be at work.

python driver.py FOLDER

Prints what happened, a line each; tests/test_deployment.py reads them, and the ledger.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

from deployment import Deployment, private_deployment
from processes import adopt_orphans, descendants, stop_descendants

APP = Path(__file__).parent / "app"
SECONDS = 150.0


class Gates:
    """Places in the app at which a process waits, and says which it is, as long as the gate is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def close(self, *names: str) -> None:
        for name in names:
            (self.folder / name).touch()

    def open(self, name: str) -> None:
        (self.folder / name).unlink()

    def who_waits(self, name: str) -> int:
        """Returns the id of the process that waits at a gate, once there is one."""
        written = self.folder / f"{name}.pid"
        wait_until(written.exists, f"nobody came to {name}")
        return int(written.read_text())


def wait_until(condition, problem: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(problem)
        time.sleep(0.05)


def say(*words: object) -> None:
    print("DRIVER", *words, flush=True)


def living() -> set[int]:
    """Returns the ids of what descends from this process and has not ended."""
    found = set()
    for pid in descendants():
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            found |= {pid} - ({pid} if state == "Z" else set())
    return found


def run(deployment: Deployment, folder: Path, rounds: int) -> int:
    config = f'gates="{folder / "gates"}" ledger="{folder / "ledger.db"}" num-server-rounds={rounds}'
    return deployment.link.run(APP, run_config=[config], federation_config=[])


def main(folder: Path) -> None:
    gates = Gates(folder / "gates")
    gates.close("audit", "train-2-1", "train-3-0")
    with private_deployment(state=folder / "state", cwd=folder, nodes=2) as deployment:
        # What is started here ends with the thread that starts it, so that one only watches the run.
        first = threading.Thread(target=run, args=(deployment, folder, 3), daemon=True)
        first.start()

        os.kill(gates.who_waits("audit"), signal.SIGKILL)
        gates.open("audit")
        say("killed a worker in its audit")

        orphan = gates.who_waits("train-2-1")
        deployment.nodes[1].kill()
        deployment.nodes[1].wait()
        gates.open("train-2-1")
        say("killed a SuperNode whose client trains")
        deployment.start_node(1)  # while the SuperLink takes it for online
        say("started again at once it is refused:", deployment.nodes[1].wait(SECONDS) != 0)

        gates.who_waits("train-3-0")
        assert deployment.superlink is not None
        deployment.superlink.kill()
        deployment.superlink.wait()
        first.join()
        deployment.start_superlink()
        gates.open("train-3-0")
        say("killed the SuperLink while a client trains, and started it again")
        wait_until(lambda: deployment.link.status().startswith("finished:"), "the first run does not end")
        say("first run", deployment.link.status())

        deployment.start_node(1)
        deployment.wait_for_nodes()
        code = run(deployment, folder, 1)
        say("second run", code, deployment.link.status())
    # A ClientApp whose SuperNode was killed tries to reach it for ever. All others end with what started them.
    wait_until(lambda: living() <= {orphan}, f"still running beside {orphan}: {living()}")


if __name__ == "__main__":
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        main(Path(sys.argv[1]))
    finally:
        say("left", len(stop_descendants(grace=10.0)))
