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
from pathlib import Path

from credentials import Credentials, create_credentials
from processes import adopt_orphans, end_with_parent, stop_descendants
from superlink import NAME, START_SECONDS, SuperLink, environment_of, free_port, tool

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "simulations" / "vision"
GRACE_SECONDS = 10.0
COMPLETED = "finished:completed"


class Deployment:
    """A SuperLink and its SuperNodes. The SuperLink's state is in a file, so that it can be started again.

    Attributes:
        link: Its SuperLink.
        superlink: The SuperLink's process, once it was started.
        nodes: The processes of its SuperNodes, as many as were started.
    """

    def __init__(self, home: Path, cwd: Path, nodes: int) -> None:
        self._home, self._cwd = home, cwd
        self._credentials = create_credentials(home, nodes=nodes)
        self._port = free_port()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]\naddress = "127.0.0.1:{self._port}"\n'
            f'root-certificates = "{self._credentials.ca}"\n'
        )
        self.link = SuperLink(environment_of(home), home / "superlink.log")
        self.superlink: subprocess.Popen[bytes] | None = None
        self.nodes: list[subprocess.Popen[bytes]] = []

    def start_superlink(self) -> None:
        """Starts the SuperLink, or starts it again with the state that it had, and waits until it answers.

        Raises:
            RuntimeError: It did not come up; the message has the end of its log.
        """
        command = _superlink_command(self._credentials, self._port, self._home / "superlink.db")
        self.superlink = _start(command, self.link, self._cwd, self.link.log_file)
        _wait(lambda: _supernodes(self.link) is not None, [self.superlink], self.link.log_file)

    def register_nodes(self) -> None:
        """Lets the SuperNodes' keys in."""
        for key in self._credentials.nodes:
            _flwr(self.link, "supernode", "register", str(key.with_suffix(".pub")), NAME)

    def start_node(self, index: int) -> None:
        """Starts a SuperNode, or starts it again: to the SuperLink, who has its key is the same node."""
        key, number = self._credentials.nodes[index], len(self._credentials.nodes)
        command = _supernode_command(
            self._credentials, self._port, key, f"partition-id={index} num-partitions={number}"
        )
        self.nodes[index : index + 1] = [_start(command, self.link, self._cwd, self._log_of(index))]

    def wait_for_nodes(self) -> None:
        """Returns once all SuperNodes are connected.

        Raises:
            RuntimeError: They are not, after a while; the message has the end of the last one's log.
        """
        assert self.superlink is not None
        number = len(self.nodes)
        _wait(
            lambda: (_supernodes(self.link) or []).count("online") == number,
            [self.superlink, *self.nodes],
            self._log_of(number - 1),
        )

    def stop(self) -> None:
        """Ends all processes, the nodes first, so that they can say goodbye."""
        processes = [*reversed(self.nodes), *([self.superlink] if self.superlink else [])]
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _log_of(self, index: int) -> Path:
        return self._home / f"supernode-{index}.log"


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
    try:
        deployment = Deployment(home, cwd, nodes)
        try:
            deployment.start_superlink()
            deployment.register_nodes()
            for index in range(nodes):
                deployment.start_node(index)
            deployment.wait_for_nodes()
            yield deployment
        finally:
            deployment.stop()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _superlink_command(credentials: Credentials, port: int, database: Path) -> list[str]:
    return [
        *(tool("flower-superlink"), "--host", "127.0.0.1", "--port", str(port), "--enable-supernode-auth"),
        *("--ssl-ca-certfile", str(credentials.ca)),
        *("--ssl-certfile", str(credentials.certificate), "--ssl-keyfile", str(credentials.key)),
        *("--database", str(database), "--disable-runtime-dependency-installation"),
    ]


def _supernode_command(credentials: Credentials, port: int, key: Path, node_config: str) -> list[str]:
    return [
        *(tool("flower-supernode"), "--superlink", f"127.0.0.1:{port}", "--root-certificates", str(credentials.ca)),
        *("--auth-supernode-private-key", str(key), "--host", "127.0.0.1", "--port", str(free_port())),
        *("--node-config", node_config),
    ]


def _start(command: list[str], link: SuperLink, cwd: Path, log_file: Path) -> subprocess.Popen[bytes]:
    with log_file.open("ab") as log:
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
