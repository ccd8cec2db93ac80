"""The ledger keeps what it was given, tells when it was touched, and stands killed and concurrent writers."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import signal
import sqlite3
import tracemalloc
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from sqlalchemy import event

from fl_privacy.audit import ledger as ledger_module
from fl_privacy.audit.chain import GENESIS, seal
from fl_privacy.audit.estimate import LeakageEstimate, Source, Status
from fl_privacy.audit.ledger import Ledger
from fl_privacy.audit.metrics import RoundMetrics
from fl_privacy.errors import LedgerError
from fl_privacy.interval import Interval

CLIENTS = 4


def estimate(server_round: int, client: str, *, leakage: float = 0.5, detail: str = "") -> LeakageEstimate:
    return LeakageEstimate(
        server_round=server_round,
        client=client,
        status=Status.AUDITED,
        source=Source.TRUSTED,
        leakage=Interval(leakage - 0.1, leakage, leakage + 0.1),
        snr_db=math.inf,
        detail=detail,
    )


def round_of(server_round: int, *, clients: int = CLIENTS, detail: str = "") -> list[LeakageEstimate]:
    return [estimate(server_round, str(client), leakage=0.1 + client / 10, detail=detail) for client in range(clients)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of three rounds with four rows each, numbered 1 to 12."""
    path = tmp_path / "new" / "folder" / "ledger.db"
    with Ledger(path) as ledger:
        for server_round in (1, 2, 3):
            ledger.append(round_of(server_round), run_id="first")
    return path


class TestMetrics:
    ROUND = RoundMetrics(server_round=2, origin="server", metrics={"accuracy": 0.5, "loss": math.nan, "steps": 3})

    def test_they_are_links_of_the_chain_and_no_rows(self, path: Path) -> None:
        with Ledger(path) as ledger:
            ledger.append([self.ROUND], run_id="first")
            ledger.append(round_of(4), run_id="first")
            assert ledger.metrics(run_id="second") == []
            (found,) = ledger.metrics(run_id="first")
            assert found == RoundMetrics(server_round=2, origin="server", metrics={"accuracy": 0.5, "steps": 3})
            assert [entry.sequence for entry in ledger.rows()] == [*range(1, 13), 14, 15, 16, 17]
            (run,) = ledger.runs()
            assert (run.rows, run.rounds) == (16, 4)
            assert (ledger.verify().ok, ledger.verify().rows) == (True, 17)

    def test_a_change_to_them_is_found(self, path: Path) -> None:
        with Ledger(path) as ledger:
            ledger.append([self.ROUND], run_id="first")
        raw = sqlite3.connect(path)
        with raw:
            raw.execute("UPDATE fl_privacy_ledger SET payload = replace(payload, '0.5', '0.9') WHERE sequence = 13")
        raw.close()
        with Ledger.open(path) as ledger:
            assert [problem.sequence for problem in ledger.verify().problems] == [13]

    def test_what_is_no_metrics_is_named(self, path: Path) -> None:
        raw = sqlite3.connect(path)
        with raw:
            raw.execute("UPDATE fl_privacy_ledger SET status = 'metrics' WHERE sequence = 3")
        raw.close()
        with (
            Ledger.open(path) as ledger,
            pytest.raises(LedgerError, match=r"row 3 of .* does not hold a round's metrics"),
        ):
            ledger.metrics(run_id="first")


class TestReading:
    def test_rows_come_back_as_written_and_in_order(self, path: Path) -> None:
        with Ledger.open(path) as ledger:
            entries = list(ledger.rows())
        assert [entry.sequence for entry in entries] == list(range(1, 13))
        assert [entry.estimate for entry in entries] == [row for number in (1, 2, 3) for row in round_of(number)]
        links = [GENESIS, *(entry.hash for entry in entries)]
        assert [entry.previous_hash for entry in entries] == links[:-1]

    def test_filters_combine(self, path: Path) -> None:
        with Ledger(path) as ledger:
            ledger.append(round_of(2), run_id="second")
            found = [entry.sequence for entry in ledger.rows(run_id="first", server_round=2, client="3")]
            assert found == [8]
            assert [entry.sequence for entry in ledger.rows(client="3", server_round=2)] == [8, 16]
            assert not list(ledger.rows(run_id="third"))

    def test_runs_in_the_order_of_their_start(self, path: Path) -> None:
        with Ledger(path) as ledger:
            ledger.append(round_of(1), run_id="a later one")
            ledger.append(round_of(4), run_id="first")
            runs = ledger.runs()
        assert [(run.run_id, run.rows, run.rounds) for run in runs] == [("first", 16, 4), ("a later one", 4, 1)]
        assert runs[0].started < runs[1].started < runs[0].ended

    @pytest.mark.parametrize("page", [1, 5, 12, 13])
    def test_pages_neither_skip_nor_repeat(self, path: Path, page: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ledger_module, "_PAGE", page)
        with Ledger.open(path) as ledger:
            assert [entry.sequence for entry in ledger.rows()] == list(range(1, 13))
            outcome = ledger.verify()
        assert (outcome.ok, outcome.rows) == (True, 12)

    def test_a_slow_reader_does_not_hold_up_a_writer(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ledger_module, "_PAGE", 2)
        with Ledger.open(path) as reader, Ledger(path) as writer:
            rows = reader.rows()
            next(rows)
            writer.append(round_of(4), run_id="first")
            assert len(list(rows)) == 15

    def test_memory_does_not_grow_with_the_ledger(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ledger_module, "_PAGE", 50)
        with Ledger(tmp_path / "ledger.db") as ledger:
            ledger.append(round_of(1, clients=1000, detail="x" * 5000), run_id="run")
            tracemalloc.start()
            try:
                assert sum(1 for _ in ledger.rows()) == 1000
                assert ledger.verify().rows == 1000
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
        assert peak < (tmp_path / "ledger.db").stat().st_size / 4

    def test_names_that_columns_cannot_hold(self, tmp_path: Path) -> None:
        names = ["a" * 300, "a" * 301, "nul\0", "lone \ud800", "日本"]
        with Ledger(tmp_path / "ledger.db") as ledger:
            ledger.append([estimate(1, name) for name in names], run_id="run")
            assert [entry.estimate.client for entry in ledger.rows()] == names
            for name in names:
                assert [entry.estimate.client for entry in ledger.rows(client=name)] == [name]
            assert ledger.verify().ok

    def test_numbers_that_are_not_finite_are_queried_as_null(self, tmp_path: Path) -> None:
        with Ledger(tmp_path / "ledger.db") as ledger:
            ledger.append([estimate(1, "0", leakage=math.nan)], run_id="run")
            assert ledger.verify().ok
        with sqlite3.connect(tmp_path / "ledger.db") as raw:
            assert raw.execute("SELECT leakage FROM fl_privacy_ledger").fetchall() == [(None,)]
        raw.close()


def sql(*statements: str) -> Callable[[sqlite3.Connection], None]:
    def run(connection: sqlite3.Connection) -> None:
        for statement in statements:
            assert connection.execute(statement).rowcount != 0, f"{statement} changed nothing"

    return run


def reseal(connection: sqlite3.Connection, sequence: int, *, onwards: bool = False) -> None:
    """Recomputes hashes as someone does who knows how they are made."""
    connection.row_factory = sqlite3.Row
    query = "SELECT * FROM fl_privacy_ledger WHERE sequence >= ? ORDER BY sequence"
    previous_hash = None
    for row in connection.execute(query, [sequence]).fetchall():
        previous_hash = seal(
            sequence=row["sequence"],
            run_id=row["run_id"],
            written_at=row["written_at"],
            payload=row["payload"],
            previous_hash=previous_hash or row["previous_hash"],
        )
        connection.execute("UPDATE fl_privacy_ledger SET hash = ? WHERE sequence = ?", [previous_hash, row["sequence"]])
        if not onwards:
            return
        connection.execute(
            "UPDATE fl_privacy_ledger SET previous_hash = ? WHERE sequence = ?", [previous_hash, row["sequence"] + 1]
        )
    connection.execute("UPDATE fl_privacy_ledger_head SET hash = ?", [previous_hash])


def change_and_reseal(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE fl_privacy_ledger SET payload = replace(payload, 'trusted', 'none') WHERE sequence = 6")
    connection.execute("UPDATE fl_privacy_ledger SET source = 'none' WHERE sequence = 6")
    reseal(connection, 6)


def rewrite_everything(connection: sqlite3.Connection) -> None:
    change_and_reseal(connection)
    reseal(connection, 6, onwards=True)


ROWS, HEAD = "fl_privacy_ledger", "fl_privacy_ledger_head"
EVERY_COLUMN = [
    "run_id",
    "written_at",
    "server_round",
    "client",
    "status",
    "source",
    "leakage",
    "required_noise_std",
    "payload",
    "previous_hash",
    "hash",
]
COPY = f"INSERT INTO {ROWS} SELECT {{}}, {', '.join(EVERY_COLUMN)} FROM {ROWS} WHERE sequence = 6"
TAMPERINGS = {
    **{f"{name} changed": (sql(f"UPDATE {ROWS} SET {name} = 99 WHERE sequence = 6"), 6) for name in EVERY_COLUMN},
    "payload is bytes": (sql(f"UPDATE {ROWS} SET payload = x'00ff' WHERE sequence = 6"), 6),
    "payload is broken text": (sql(f"UPDATE {ROWS} SET payload = CAST(x'7bff' AS TEXT) WHERE sequence = 6"), 6),
    "payload spaced": (sql(f"UPDATE {ROWS} SET payload = payload || ' ' WHERE sequence = 6"), 6),
    "leakage erased": (sql(f"UPDATE {ROWS} SET leakage = NULL WHERE sequence = 6"), 6),
    "first removed": (sql(f"DELETE FROM {ROWS} WHERE sequence = 1"), 2),
    "middle removed": (sql(f"DELETE FROM {ROWS} WHERE sequence BETWEEN 5 AND 7"), 8),
    "middle removed, numbers closed up": (
        sql(f"DELETE FROM {ROWS} WHERE sequence = 12", f"UPDATE {ROWS} SET sequence = 12 WHERE sequence = 11"),
        12,
    ),
    "last removed": (sql(f"DELETE FROM {ROWS} WHERE sequence = 12"), None),
    "all removed": (sql(f"DELETE FROM {ROWS}"), None),
    "inserted past the end": (sql(COPY.format(13)), 13),
    "inserted before the start": (sql(COPY.format(0)), 0),
    "inserted far before the start": (sql(COPY.format(-7)), -7),
    "two rows exchanged": (
        sql(*(f"UPDATE {ROWS} SET sequence = {new} WHERE sequence = {old}" for old, new in [(5, 99), (6, 5), (99, 6)])),
        5,
    ),
    "row changed and resealed": (change_and_reseal, 7),
    "head changed": (sql(f"UPDATE {HEAD} SET hash = '{GENESIS}'"), None),
    "head set back": (sql(f"UPDATE {HEAD} SET sequence = 11"), None),
    "head is text": (sql(f"UPDATE {HEAD} SET sequence = 'last'"), None),
    "head removed": (sql(f"DELETE FROM {HEAD}"), None),
    "second head": (sql(f"INSERT INTO {HEAD} SELECT 2, sequence, hash FROM {HEAD}"), None),
    "head table removed": (sql(f"DROP TABLE {HEAD}"), None),
    "row table removed": (sql(f"DROP TABLE {ROWS}"), None),
    "column removed": (sql(f"ALTER TABLE {ROWS} DROP COLUMN leakage"), None),
    "row without a number in a table without a key": (
        sql(
            f"CREATE TABLE copy AS SELECT * FROM {ROWS}",
            f"INSERT INTO copy SELECT NULL, {', '.join(EVERY_COLUMN)} FROM {ROWS} WHERE sequence = 6",
            f"DROP TABLE {ROWS}",
            f"ALTER TABLE copy RENAME TO {ROWS}",
        ),
        None,
    ),
}


class TestTampering:
    def test_an_untouched_ledger_is_ok(self, path: Path) -> None:
        with Ledger.open(path) as ledger:
            outcome = ledger.verify()
            assert (outcome.ok, outcome.rows, outcome.problems) == (True, 12, ())
            assert outcome.head == ledger.head() == list(ledger.rows())[-1].hash

    @pytest.mark.parametrize("page", [2, 500])
    @pytest.mark.parametrize("kind", TAMPERINGS)
    def test_every_tampering_is_found(self, path: Path, kind: str, page: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ledger_module, "_PAGE", page)
        tamper, row = TAMPERINGS[kind]
        raw = sqlite3.connect(path)
        with raw:
            tamper(raw)
        raw.close()
        with Ledger.open(path) as ledger:
            outcome = ledger.verify()
        assert not outcome.ok
        assert row in {problem.sequence for problem in outcome.problems}, [str(problem) for problem in outcome.problems]
        assert len(outcome.problems) <= 5, "one change must not be reported at every row after it"

    def test_what_is_missing_is_said_by_number(self, path: Path) -> None:
        raw = sqlite3.connect(path)
        with raw:
            raw.execute(f"DELETE FROM {ROWS} WHERE sequence IN (2, 5, 6, 7)")
        raw.close()
        with Ledger.open(path) as ledger:
            problems = [str(problem) for problem in ledger.verify().problems]
        assert problems[:2] == ["row 3: row 2 is missing before it", "row 8: rows 5 to 7 are missing before it"]

    @pytest.mark.parametrize("page", [6, 500])
    def test_a_repeated_row_is_found_also_between_two_pages(
        self, path: Path, page: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ledger_module, "_PAGE", page)
        raw = sqlite3.connect(path)
        with raw:  # a table without a primary key can hold row 6 twice
            raw.execute(f"CREATE TABLE copy AS SELECT * FROM {ROWS} UNION ALL SELECT * FROM {ROWS} WHERE sequence = 6")
            raw.execute(f"DROP TABLE {ROWS}")
            raw.execute(f"ALTER TABLE copy RENAME TO {ROWS}")
        raw.close()
        with Ledger.open(path) as ledger:
            assert len(ledger.verify().problems) == 1

    def test_what_the_chain_cannot_find_an_anchor_does(self, path: Path) -> None:
        with Ledger.open(path) as ledger:
            anchor = ledger.head()
        raw = sqlite3.connect(path)
        with raw:
            rewrite_everything(raw)
        raw.close()
        with Ledger.open(path) as ledger:
            assert ledger.verify().ok
            outcome = ledger.verify(expected_head=anchor)
        assert not outcome.ok
        assert anchor in outcome.problems[0].message

    def test_an_anchor_outlives_growth(self, path: Path) -> None:
        with Ledger(path) as ledger:
            anchor = ledger.head()
            ledger.append(round_of(4), run_id="first")
            outcome = ledger.verify(expected_head=anchor.upper())
        assert (outcome.ok, outcome.anchored, outcome.rows) == (True, 12, 16)

    def test_an_anchor_must_be_a_hash(self, path: Path) -> None:
        with Ledger.open(path) as ledger, pytest.raises(ValueError, match="64 hexadecimal digits"):
            ledger.verify(expected_head="12")

    def test_a_damaged_file_is_a_problem_not_a_crash(self, path: Path) -> None:
        with Ledger(path) as ledger:
            ledger.append(round_of(4, clients=400), run_id="first")
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 40_960] = b"\xff" * 40_960
        path.write_bytes(content)
        with Ledger.open(path) as ledger:
            assert not ledger.verify().ok

    def test_hashes_are_those_of_the_documented_text(self) -> None:
        text = f'{{"payload":"{{}}","previous_hash":"{GENESIS}","run_id":"\\u00e9","sequence":1,"written_at":"t"}}'
        sealed = seal(sequence=1, run_id="é", written_at="t", payload="{}", previous_hash=GENESIS)
        assert sealed == hashlib.sha256(text.encode("ascii")).hexdigest()


def write_rounds(path: str, run_id: str, rounds: int, start: Event) -> None:
    start.wait()
    with Ledger(path) as ledger:
        for server_round in range(1, rounds + 1):
            ledger.append(round_of(server_round), run_id=run_id)


def die_between_rows_and_head(path: str) -> None:
    with Ledger(path) as ledger:

        @event.listens_for(ledger._engine, "after_cursor_execute")
        def die(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            if statement.startswith("INSERT INTO fl_privacy_ledger"):
                os.kill(os.getpid(), signal.SIGKILL)

        ledger.append(round_of(9, clients=3000, detail="x" * 2000), run_id="killed")


class TestProcesses:
    def test_concurrent_writers_make_one_chain(self, tmp_path: Path) -> None:
        path = tmp_path / "ledger.db"  # not there yet: the writers create it at the same moment
        context = multiprocessing.get_context("spawn")
        start = context.Event()
        writers = [
            context.Process(target=write_rounds, args=(str(path), f"run {number}", 25, start)) for number in range(4)
        ]
        victim = context.Process(target=write_rounds, args=(str(path), "killed", 100_000, start))
        for process in (*writers, victim):
            process.start()
        start.set()
        for process in writers:
            process.join(timeout=120)
        assert victim.is_alive()
        victim.kill()
        victim.join(timeout=60)
        assert [process.exitcode for process in writers] == [0, 0, 0, 0]
        with Ledger(path) as ledger:
            outcome = ledger.verify()
            assert outcome.ok, outcome.problems
            runs = {run.run_id: run for run in ledger.runs()}
            for number in range(4):
                assert (runs[f"run {number}"].rows, runs[f"run {number}"].rounds) == (25 * CLIENTS, 25)
            assert runs["killed"].rows == runs["killed"].rounds * CLIENTS > 0
            entries = list(ledger.rows())
        blocks = [entries[first : first + CLIENTS] for first in range(0, len(entries), CLIENTS)]
        assert all(len({(entry.run_id, entry.estimate.server_round) for entry in block}) == 1 for block in blocks)

    def test_a_round_half_written_by_a_killed_process_is_undone(self, path: Path) -> None:
        process = multiprocessing.get_context("spawn").Process(target=die_between_rows_and_head, args=(str(path),))
        process.start()
        process.join(timeout=120)
        assert process.exitcode == -signal.SIGKILL
        assert path.with_name("ledger.db-journal").exists(), "the round never reached the file: nothing was tested"
        with Ledger.open(path) as ledger:
            outcome = ledger.verify()
        assert (outcome.ok, outcome.rows) == (True, 12)
        with Ledger(path) as ledger:
            ledger.append(round_of(4), run_id="first")
            assert ledger.verify().rows == 16


class TestErrors:
    def test_reading_creates_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(LedgerError, match="there is no ledger at"):
            Ledger.open(tmp_path / "new" / "ledger.db")
        assert not list(tmp_path.iterdir())

    def test_a_reader_cannot_append(self, path: Path) -> None:
        with Ledger.open(path) as ledger, pytest.raises(LedgerError, match="opened to read"):
            ledger.append(round_of(4), run_id="first")

    @pytest.mark.parametrize("content", [b"client,leakage\n1,0.5\n" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
    @pytest.mark.parametrize("opening", [Ledger, Ledger.open])
    def test_a_file_that_is_no_database(
        self, tmp_path: Path, content: bytes, opening: Callable[[Path], Ledger]
    ) -> None:
        path = tmp_path / "data.csv"
        path.write_bytes(content)
        with pytest.raises(LedgerError, match=r"cannot use the ledger .*data.csv"):
            opening(path)
        assert path.read_bytes() == content

    @pytest.mark.parametrize(
        ("opening", "words"), [(Ledger, "holds the tables other"), (Ledger.open, "holds no ledger")]
    )
    def test_a_database_that_is_no_ledger(self, tmp_path: Path, opening: Callable[[Path], Ledger], words: str) -> None:
        path = tmp_path / "other.db"
        raw = sqlite3.connect(path)
        raw.execute("CREATE TABLE other (id INTEGER)")
        raw.close()
        before = path.read_bytes()
        with pytest.raises(LedgerError, match=words):
            opening(path)
        assert path.read_bytes() == before

    def test_a_damaged_ledger_is_not_repaired_in_silence(self, path: Path) -> None:
        raw = sqlite3.connect(path)
        raw.execute(f"DROP TABLE {ROWS}")
        raw.close()
        with pytest.raises(LedgerError, match="damaged ledger: table fl_privacy_ledger is missing"):
            Ledger(path)

    def test_a_head_that_was_set_back_stops_the_writer(self, path: Path) -> None:
        raw = sqlite3.connect(path)
        with raw:
            raw.execute(f"UPDATE {HEAD} SET sequence = 11")
        raw.close()
        with Ledger(path) as ledger:
            with pytest.raises(LedgerError, match="its head does not match its rows"):
                ledger.append(round_of(4), run_id="first")
            assert len(list(ledger.rows())) == 12

    @pytest.mark.parametrize(
        ("url", "words"),
        [
            ("", "is empty"),
            ("nosuchdb://host/name", "unknown database, 'nosuchdb'"),
            ("://", "neither a path nor a database URL"),
            ("sqlite://", "must outlive its process"),
            ("sqlite:///:memory:", "must outlive its process"),
            ("sqlite:///file:x.db?uri=true", "must outlive its process"),
        ],
    )
    def test_an_unusable_url(self, url: str, words: str) -> None:
        with pytest.raises(LedgerError, match=words):
            Ledger(url)

    def test_a_password_is_not_printed(self) -> None:
        with pytest.raises(LedgerError) as caught:
            Ledger("nosuchdb://user:secret@host/name")
        assert "secret" not in str(caught.value)

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(LedgerError, match="is a folder"):
            Ledger(tmp_path)

    def test_a_file_where_the_folder_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(LedgerError, match="cannot create the folder"):
            Ledger(tmp_path / "file" / "ledger.db")

    def test_a_closed_ledger(self, path: Path) -> None:
        ledger = Ledger.open(path)
        ledger.close()
        ledger.close()
        with pytest.raises(LedgerError, match="is closed"):
            ledger.verify()

    @pytest.mark.parametrize("run_id", ["", "a\nb", "x" * 256])
    def test_a_run_needs_a_printable_name(self, path: Path, run_id: str) -> None:
        with Ledger(path) as ledger, pytest.raises(ValueError, match="1 to 255 printable characters"):
            ledger.append(round_of(4), run_id=run_id)

    def test_a_round_with_one_bad_row_is_not_written(self, path: Path) -> None:
        bad = LeakageEstimate(server_round=4, client="9", status=Status.AUDITED, settings={"model": object()})
        with Ledger(path) as ledger:
            with pytest.raises(TypeError, match=r"settings\['model'\] is a object"):
                ledger.append([*round_of(4), bad], run_id="first")
            assert ledger.verify().rows == 12

    def test_a_row_that_cannot_be_read_is_named(self, path: Path) -> None:
        raw = sqlite3.connect(path)
        with raw:
            raw.execute(f"UPDATE {ROWS} SET payload = ? WHERE sequence = 6", [json.dumps({"status": "audited"})])
        raw.close()
        with Ledger.open(path) as ledger, pytest.raises(LedgerError, match="row 6 of"):
            list(ledger.rows())

    def test_a_url_and_a_path_are_the_same_ledger(self, path: Path) -> None:
        with Ledger.open(f"sqlite:///{path}") as ledger:
            assert ledger.verify().rows == 12
