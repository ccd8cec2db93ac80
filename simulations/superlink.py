"""A Flower SuperLink of one's own: private port, private state, gone when its block ends."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import end_with_parent

NAME = "private"
START_SECONDS = 60.0
FINISH_SECONDS = 60.0


@dataclass(frozen=True)
class SuperLink:
    """A running SuperLink in simulation mode.

    Attributes:
        environment: Environment in which the `flwr` command reaches it under `NAME`.
        log_file: What it logs.
    """

    environment: dict[str, str]
    log_file: Path

    def run(self, app: Path, *, run_config: Sequence[str], federation_config: Sequence[str]) -> int:
        """Runs the app to its end, streams its log to standard output and returns the exit code of `flwr run`.

        The exit code says whether the run was accepted; `status` says what became of it.
        """
        options = [item for value in run_config for item in ("--run-config", value)]
        options += [item for value in federation_config for item in ("--federation-config", value)]
        command = [tool("flwr"), "run", str(app), NAME, "--stream", *options]
        return subprocess.run(command, env=self.environment, preexec_fn=end_with_parent, check=False).returncode

    def status(self) -> str:
        """Returns the status of the run that was started last, such as `finished:completed`, once it is final."""
        command = [tool("flwr"), "ls", NAME, "--limit", "1", "--format", "json"]
        deadline = time.monotonic() + FINISH_SECONDS
        while True:
            listing = subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True)
            answer = json.loads(listing.stdout)
            runs = answer.get("runs", [])
            status = str(runs[0]["status"]) if runs else str(answer.get("error-message", "no run was started"))
            if status.startswith("finished:") or time.monotonic() > deadline:
                return status


@contextmanager
def private_superlink(*, state: Path, cwd: Path) -> Iterator[SuperLink]:
    """Starts a SuperLink on a free local port, and removes its state when the block ends.

    Its process is a child of this one; whoever called stops it with all other children.

    Args:
        state: Folder for the state, in a new folder below it.
        cwd: Working directory of the app's server and clients: relative paths in a run config start there.

    Raises:
        RuntimeError: It did not come up; the message has the end of its log.
    """
    state.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="simulation-", dir=state))
    try:
        port = free_port()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        link = SuperLink(environment_of(home), home / "superlink.log")
        with link.log_file.open("wb") as log:
            process = subprocess.Popen(
                [tool("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)],
                env=link.environment,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is ours to handle
                preexec_fn=end_with_parent,
            )
        _wait_until_healthy(process, port, link.log_file)
        yield link
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log_file: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1.0):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    fate = "did not answer" if process.returncode is None else f"ended with exit code {process.returncode}"
    tail = "".join(log_file.read_text(errors="replace").splitlines(keepends=True)[-20:])
    raise RuntimeError(f"the SuperLink on 127.0.0.1:{port} {fate}; its log ends with\n{tail}")


def free_port() -> int:
    """Returns a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tool(name: str) -> str:
    """Returns the path of a command that is installed beside the running interpreter."""
    return str(Path(sys.executable).parent / name)


def environment_of(home: Path) -> dict[str, str]:
    """Returns the environment of Flower's commands and of what they start, with their state in a folder."""
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's tip about a future release, once per run
        "PYTHONWARNINGS": ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:Tip:FutureWarning"])),
        # a proxy must not get between the CLI and a SuperLink on this machine
        "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1", "localhost"])),
        "COLUMNS": str(shutil.get_terminal_size((160, 24)).columns),
        "PYTHONUNBUFFERED": "1",
    }
