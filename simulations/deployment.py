"""A deployment of one's own on this machine: a SuperLink with TLS and node authentication, and its SuperNodes.

    python simulations/deployment.py [--num-supernodes 2] [--run-config 'key=value ...']

The same app as the simulation, but each SuperNode is a process that could be anywhere, known by its key. Everything
that was started is stopped, by process id, however this ends.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from credentials import Credentials, create_credentials
from processes import adopt_orphans, end_with_parent, stop_descendants
from superlink import NAME, START_SECONDS, SuperLink, environment_of, free_port, tool

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "simulations" / "vision"
GRACE_SECONDS = 10.0
COMPLETED = "finished:completed"


@dataclass(frozen=True)
class Deployment:
    """A running deployment.

    Attributes:
        link: Its SuperLink.
        nodes: The processes of its SuperNodes.
    """

    link: SuperLink
    nodes: tuple[subprocess.Popen[bytes], ...]


def main(arguments: list[str] | None = None) -> int:
    """Runs the app in a deployment and returns the exit code: 0 only for a run that was completed."""
    parser = argparse.ArgumentParser(description="Run the vision app in a deployment with TLS and node authentication.")
    parser.add_argument("--num-supernodes", type=int, default=2, metavar="N", help="SuperNodes (default: 2)")
    parser.add_argument("--run-config", action="append", default=[], metavar="'K=V ...'", help="as for flwr run")
    options = parser.parse_args(arguments)
    adopt_orphans()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    try:
        with private_deployment(state=ROOT / ".flwr", cwd=ROOT, nodes=options.num_supernodes) as deployment:
            run_config = [*options.run_config, f"num-clients={options.num_supernodes}"]
            code = deployment.link.run(APP, run_config=run_config, federation_config=[])
            status = deployment.link.status() if code == 0 else f"not accepted: flwr run exited with {code}"
    except RuntimeError as error:
        print(f"The deployment could not start: {error}", file=sys.stderr)
        return 1
    finally:
        left = stop_descendants(grace=GRACE_SECONDS)
        if left:
            print(f"could not stop the processes {sorted(left)}", file=sys.stderr)
    print(f"Run {status}", file=sys.stdout if status == COMPLETED else sys.stderr)
    return 0 if status == COMPLETED else 1


@contextmanager
def private_deployment(*, state: Path, cwd: Path, nodes: int) -> Iterator[Deployment]:
    """Starts a SuperLink and SuperNodes on free local ports, waits until they know each other, and stops them after.

    Args:
        state: Folder for state, credentials and logs, in a new folder below it that is removed when the block ends.
        cwd: Working directory of the app: relative paths in a run config start there.
        nodes: Number of SuperNodes; the i-th has `partition-id=i`.

    Raises:
        RuntimeError: They did not come up; the message has the end of a log.
    """
    state.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="deployment-", dir=state))
    processes: list[subprocess.Popen[bytes]] = []
    try:
        credentials = create_credentials(home, nodes=nodes)
        port = free_port()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]\naddress = "127.0.0.1:{port}"\n'
            f'root-certificates = "{credentials.ca}"\n'
        )
        link = SuperLink(environment_of(home), home / "superlink.log")
        processes.append(_start(_superlink_command(credentials, port), link, cwd, link.log_file))
        _wait(lambda: _supernodes(link) is not None, processes, link.log_file)
        for index, key in enumerate(credentials.nodes):
            _flwr(link, "supernode", "register", str(key.with_suffix(".pub")), NAME)
            command = _supernode_command(credentials, port, key, f"partition-id={index} num-partitions={nodes}")
            processes.append(_start(command, link, cwd, home / f"supernode-{index}.log"))
        _wait(lambda: (_supernodes(link) or []).count("online") == nodes, processes, home / "supernode-0.log")
        yield Deployment(link, tuple(processes[1:]))
    finally:
        for process in reversed(processes):  # the nodes first, so that they can say goodbye
            process.terminate()
        for process in processes:
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(home, ignore_errors=True)


def _superlink_command(credentials: Credentials, port: int) -> list[str]:
    return [
        *(tool("flower-superlink"), "--host", "127.0.0.1", "--port", str(port), "--enable-supernode-auth"),
        *("--ssl-ca-certfile", str(credentials.ca)),
        *("--ssl-certfile", str(credentials.certificate), "--ssl-keyfile", str(credentials.key)),
        "--disable-runtime-dependency-installation",
    ]


def _supernode_command(credentials: Credentials, port: int, key: Path, node_config: str) -> list[str]:
    return [
        *(tool("flower-supernode"), "--superlink", f"127.0.0.1:{port}", "--root-certificates", str(credentials.ca)),
        *("--auth-supernode-private-key", str(key), "--host", "127.0.0.1", "--port", str(free_port())),
        *("--node-config", node_config),
    ]


def _start(command: list[str], link: SuperLink, cwd: Path, log_file: Path) -> subprocess.Popen[bytes]:
    with log_file.open("wb") as log:
        return subprocess.Popen(
            command,
            env=link.environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal is ours to handle
            preexec_fn=end_with_parent,
        )


def _flwr(link: SuperLink, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool("flwr"), *arguments], env=link.environment, capture_output=True, text=True, check=False, timeout=60
    )


def _supernodes(link: SuperLink) -> list[str] | None:
    """Returns the statuses of the SuperNodes that the SuperLink knows; `None` if it does not answer."""
    listing = _flwr(link, "supernode", "list", NAME, "--format", "json")
    try:
        return [str(node["status"]) for node in json.loads(listing.stdout)["nodes"]]
    except (ValueError, KeyError):
        return None


def _wait(condition: Callable[[], bool], processes: list[subprocess.Popen[bytes]], log_file: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        dead = [process for process in processes if process.poll() is not None]
        if dead or time.monotonic() > deadline:
            tail = "".join(log_file.read_text(errors="replace").splitlines(keepends=True)[-20:])
            fate = f"ended with exit code {dead[0].returncode}" if dead else "did not come up"
            raise RuntimeError(f"{fate}; {log_file.name} ends with\n{tail}")
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
