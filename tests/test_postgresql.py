"""The ledger in PostgreSQL: a server of the test's own on loopback, eight writers at once, and one that is killed."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fl_privacy.audit import LeakageEstimate, Ledger, Status
from fl_privacy.errors import LedgerError

psycopg = pytest.importorskip("psycopg", reason="the driver is not installed: pip install '.[postgresql]'")

WRITERS, BATCHES, ROWS = 8, 10, 5
WRITER = """
import sys
from fl_privacy.audit import LeakageEstimate, Ledger, Status

url, name, batches, rows = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with Ledger(url) as ledger:
    print("ready", flush=True)
    sys.stdin.readline()
    for batch in range(batches):
        estimates = [
            LeakageEstimate(server_round=batch, client=f"{name}/{row}", status=Status.NO_REPLY) for row in range(rows)
        ]
        ledger.append(estimates, run_id=name)
        print(batch, flush=True)
"""


def tools() -> Path | None:
    """Where PostgreSQL's programs are: on PATH, or where Debian puts them."""
    found = shutil.which("initdb")
    candidates = [Path(found).parent] if found else []
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((path for path in candidates if (path / "postgres").exists() and (path / "initdb").exists()), None)


def unprivileged() -> dict[str, object]:
    """Options of a process that is not root's: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL does not run as root, and there is no other user to run it as")


def answers(url: str) -> bool:
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError:
        return False
    return True


@pytest.fixture(scope="module")
def server():
    """A PostgreSQL server's URL without a database; it is stopped, by its id, when the tests are done."""
    programs = tools()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    options = unprivileged()
    home = Path(tempfile.mkdtemp(prefix="fl-privacy-postgresql-"))
    home.chmod(0o755)
    data = home / "data"
    data.mkdir(mode=0o700)
    if options:
        os.chown(data, options["user"], options["group"])
        os.chown(home, options["user"], options["group"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C.UTF-8", "HOME": str(home)}
    initdb = [programs / "initdb", "-D", data, "-U", "audit", "-A", "trust", "-E", "UTF8", "--no-sync"]
    made = subprocess.run(initdb, cwd=home, env=environment, capture_output=True, text=True, **options)
    assert made.returncode == 0, made.stderr
    command = [programs / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", home, "-F"]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log, **options)
    try:
        deadline = time.monotonic() + 60
        while not answers(f"postgresql://audit@127.0.0.1:{port}/postgres"):
            assert process.poll() is None, (home / "log").read_text()
            assert time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.1)
        yield f"postgresql+psycopg://audit@127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)  # a fast shutdown
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def url(server, request):
    """A database of the test's own."""
    name = f"ledger_{abs(hash(request.node.name)) % 10**8}"
    with psycopg.connect(server.replace("+psycopg", "") + "/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{server}/{name}"


class Writer:
    """A process that appends to a ledger once it is told to begin."""

    def __init__(self, url: str, name: str, *, batches: int = BATCHES):
        command = [sys.executable, "-c", WRITER, url, name, str(batches), str(ROWS)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait_until_ready(self):
        assert self.process.stdout.readline() == "ready\n"

    def begin(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


def row(client):
    return LeakageEstimate(server_round=1, client=client, status=Status.NO_REPLY)


def test_eight_writers_at_once_lose_nothing_and_leave_one_chain(url):
    writers = [Writer(url, f"w{index}") for index in range(WRITERS)]  # they also create the ledger at once
    try:
        for writer in writers:
            writer.wait_until_ready()
        for writer in writers:
            writer.begin()
        for writer in writers:
            assert writer.process.wait(120) == 0
    finally:
        for writer in writers:
            writer.__exit__()
    with Ledger.open(url) as ledger:
        verification = ledger.verify()
        entries = list(ledger.rows())
    assert verification.ok, verification
    assert [entry.sequence for entry in entries] == list(range(1, WRITERS * BATCHES * ROWS + 1))
    for index in range(WRITERS):
        mine = [e.estimate for e in entries if e.run_id == f"w{index}"]
        assert [(e.server_round, e.client) for e in mine] == [
            (batch, f"w{index}/{number}") for batch in range(BATCHES) for number in range(ROWS)
        ]
    runs = {entry.run_id for entry in entries[: WRITERS * ROWS * 2]}
    assert len(runs) > 1, "the writers took turns"


def test_a_ledger_that_many_create_at_once_is_whole_for_each_of_them(server):
    for attempt in range(8):  # each opens a window of about a millisecond in which a half of the ledger can be seen
        name = f"created_{attempt}"
        with psycopg.connect(server.replace("+psycopg", "") + "/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        together = threading.Barrier(WRITERS)

        def create(index, url=f"{server}/{name}", together=together):
            together.wait(30)
            with Ledger(url) as ledger:
                ledger.append([row(f"c{index}")], run_id="r")

        with ThreadPoolExecutor(WRITERS) as threads:
            list(threads.map(create, range(WRITERS)))
        with Ledger.open(f"{server}/{name}") as ledger:
            assert ledger.verify().ok
            assert len(list(ledger.rows())) == WRITERS


def test_a_ledger_without_one_of_its_tables_is_damaged(url):
    Ledger(url).close()
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        connection.execute("DROP TABLE fl_privacy_ledger")
    with pytest.raises(LedgerError, match="damaged ledger: table fl_privacy_ledger is missing"):
        Ledger(url)


def test_a_writer_that_is_killed_leaves_whole_rounds_and_the_others_go_on(url):
    with Writer(url, "killed", batches=10**6) as victim, Writer(url, "other", batches=30) as other:
        for writer in (victim, other):
            writer.wait_until_ready()
            writer.begin()
        done = [victim.process.stdout.readline() for _ in range(5)]
        victim.process.kill()
        victim.process.wait()
        assert other.process.wait(120) == 0
        told = 5 + len(victim.process.stdout.read().splitlines())
    assert done[-1] == "4\n"
    with Ledger(url) as ledger:
        ledger.append([row("after")], run_id="after")
        assert ledger.verify().ok
        of_victim = list(ledger.rows(run_id="killed"))
        assert len(of_victim) % ROWS == 0, "no half of a round"
        assert told <= len(of_victim) // ROWS <= told + 1, "what it was told is written was written"
        assert len(list(ledger.rows(run_id="other"))) == 30 * ROWS


def test_a_row_that_is_changed_behind_the_ledgers_back_is_found(url):
    with Ledger(url) as ledger:
        ledger.append([row("a"), row("b"), row("c")], run_id="r")
        head = ledger.head()
        assert ledger.verify(expected_head=head).ok
        with psycopg.connect(url.replace("+psycopg", "")) as connection:
            connection.execute("UPDATE fl_privacy_ledger SET payload = replace(payload, 'no-reply', 'audited')")
        assert not ledger.verify(expected_head=head).ok
