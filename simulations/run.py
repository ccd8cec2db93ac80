"""Runs the vision simulation to its end and says by its exit code how that went.

    python simulations/run.py [--num-supernodes 8] [--run-config 'key=value ...'] [--federation-config 'key=value ...']

`flwr run` leaves a SuperLink running for everyone on the machine, and exits with 0 also when the run fails. This starts
a SuperLink of its own, waits for the run, and stops whatever was started, however it ends.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tomllib
from pathlib import Path
from types import FrameType

from flwr.common.config import parse_config_args
from processes import adopt_orphans, stop_descendants
from superlink import private_superlink

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "simulations" / "vision"
GRACE_SECONDS = 6.0
COMPLETED = "finished:completed"
CPUS_PER_CLIENT = 2
"""Flower's own default."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the simulation and returns the exit code: 0 only for a run that was completed."""
    options = _parse(arguments)
    num_supernodes, run_config = _agree_on_clients(options.num_supernodes, options.run_config)
    federation_config = _federation_config(num_supernodes, options.federation_config)
    adopt_orphans()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        with private_superlink(state=ROOT / ".flwr", cwd=ROOT) as link:
            try:
                code = link.run(APP, run_config=run_config, federation_config=federation_config)
                status = link.status() if code == 0 else f"not accepted: flwr run exited with {code}"
            finally:
                _stop_everything()
    except KeyboardInterrupt:
        print("Interrupted; everything that was started is stopped.", file=sys.stderr)
        return 130
    except RuntimeError as error:
        print(f"The simulation could not start: {error}", file=sys.stderr)
        return 1
    finally:
        _stop_everything()
    print(f"Run {status}", file=sys.stdout if status == COMPLETED else sys.stderr)
    return 0 if status == COMPLETED else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the vision simulation and wait for its end.")
    parser.add_argument("--num-supernodes", type=int, metavar="N", help="simulated clients (default: num-clients)")
    for name, file in (("--run-config", APP / "pyproject.toml"), ("--federation-config", None)):
        hint = f"; the keys are in {file.relative_to(ROOT)}" if file else ""
        parser.add_argument(name, action="append", default=[], metavar="'K=V ...'", help=f"as for flwr run{hint}")
    return parser.parse_args(arguments)


def _agree_on_clients(num_supernodes: int | None, run_config: list[str]) -> tuple[int, list[str]]:
    """Returns the number of clients, and the run config with that number in it.

    Exits with a message if the number is contradictory, or a key of the run config is not one of the app's.
    """
    known = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    given = parse_config_args(run_config)
    if unknown := sorted(given.keys() - known.keys()):
        sys.exit(f"unknown in --run-config: {', '.join(unknown)}; expected any of {', '.join(known)}")
    number = num_supernodes or int(given.get("num-clients", known["num-clients"]))
    if int(given.get("num-clients", number)) != number:
        sys.exit(f"--num-supernodes {number} contradicts num-clients={given['num-clients']}: give one of the two")
    return number, [*run_config, f"num-clients={number}"]


def _federation_config(num_supernodes: int, given: list[str]) -> list[str]:
    """Returns Flower's options of the simulated federation: those that were given, and the size."""
    keys = parse_config_args(given).keys()
    if "num-supernodes" in keys:
        sys.exit("num-supernodes in --federation-config: give it as --num-supernodes")
    added = [f"num-supernodes={num_supernodes}"]
    if "init-args-num-cpus" not in keys and CPUS_PER_CLIENT * num_supernodes < _usable_cpus():
        # Flower fills all CPUs with client actors before round 1, also with those that no client will ever need.
        added.append(f"init-args-num-cpus={CPUS_PER_CLIENT * num_supernodes}")
    return given + added


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _stop_everything() -> None:
    """Stops all that this process started; a second Ctrl-C does not keep it from doing so."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    left = stop_descendants(grace=GRACE_SECONDS)
    signal.signal(signal.SIGINT, previous)
    if left:
        print(f"could not stop the processes {sorted(left)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
