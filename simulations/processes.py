"""Leaving no process behind: finds and stops everything that this process has started, directly or not.

A SuperLink starts a SuperExec, which starts the simulation, which starts Ray, each in a session of its own. None of
them is stopped by name: only processes that descend from this one are touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_SECONDS = 0.1


def adopt_orphans() -> None:
    """Makes orphaned descendants children of this process, so that they stay in sight (Linux; elsewhere no effect)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_with_parent() -> None:
    """Has this process killed when its parent dies, even if the parent was killed (Linux; for `preexec_fn`).

    To Linux the parent is the thread that started it: start what is to outlive a thread in the main one.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def descendants() -> set[int]:
    """Returns the ids of all processes that descend from this one, with those that ended and were not waited for."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for pid, parent in _process_table():
        children[parent].append(pid)
    found: set[int] = set()
    pending = list(children[os.getpid()])
    while pending:
        pid = pending.pop()
        if pid not in found:
            found.add(pid)
            pending += children[pid]
    return found


def stop_descendants(*, grace: float) -> set[int]:
    """Terminates all descendants, kills those that are left after the grace, and returns those that outlive even that.

    Args:
        grace: Seconds that processes get to end in their own way.
    """
    asked: set[int] = set()
    deadline = time.monotonic() + grace
    while (left := _unreaped_descendants()) and time.monotonic() < deadline:
        for pid in left - asked:
            _send(pid, signal.SIGTERM)
        asked |= left
        time.sleep(POLL_SECONDS)
    deadline = time.monotonic() + grace
    while (left := _unreaped_descendants()) and time.monotonic() < deadline:
        for pid in left:
            _send(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    return left


def _unreaped_descendants() -> set[int]:
    """Returns the descendants, once every child that has ended was waited for: no zombie is left to whoever comes."""
    with contextlib.suppress(ChildProcessError):  # no children at all
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return descendants()


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(pid, number)


def _process_table() -> list[tuple[int, int]]:
    """Returns process id and parent id of every process on this machine."""
    if sys.platform != "linux":
        with subprocess.Popen(["ps", "-axo", "pid=,ppid="], stdout=subprocess.PIPE, text=True) as listing:
            rows = [tuple(map(int, line.split())) for line in listing.communicate()[0].splitlines()]
        return [(pid, parent) for pid, parent in rows if pid != listing.pid]
    table = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            status = (folder / "stat").read_text()
        except OSError:
            continue  # it has ended meanwhile
        parent = status.rpartition(")")[2].split()[1]  # "pid (name) state parent ...": a name may hold anything
        table.append((int(folder.name), int(parent)))
    return table
