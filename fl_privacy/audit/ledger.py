"""The ledger: an append-only, hash-chained table of leakage estimates in any database that SQLAlchemy speaks to.

Beside the estimates, the rows of its clients, a round may have entries with its metrics, links of the same chain.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, RowMapping, Select, func, insert, inspect, select, update
from sqlalchemy.engine import URL
from sqlalchemy.exc import DatabaseError, IntegrityError, SQLAlchemyError

from fl_privacy.audit.chain import GENESIS, ChainCheck, Verification, canonical_json, seal
from fl_privacy.audit.database import create_database_engine, locate, transaction_options
from fl_privacy.audit.estimate import LeakageEstimate
from fl_privacy.audit.metrics import METRICS, RoundMetrics
from fl_privacy.audit.schema import HEAD, METADATA, NAME_LENGTH, ROWS, column_text, columns_of, missing_parts
from fl_privacy.errors import LedgerError

_PAGE = 500
"""Rows read per transaction: reading holds no lock between pages, however slowly its caller takes the rows."""

_SECOND_LOOKS = (0.0, 0.1, 1.0)
"""Seconds before each new look at a ledger that another process may be creating (a SQLite file's lock rules it out)."""


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One row of a ledger."""

    sequence: int
    """Number of the row, from 1, without gaps."""
    run_id: str
    written_at: str
    """UTC, ISO 8601."""
    estimate: LeakageEstimate
    previous_hash: str
    hash: str


@dataclass(frozen=True, kw_only=True)
class LedgerRecord:
    """One row of a ledger as it is stored, its payload decoded from JSON and not yet made into an estimate."""

    ledger: str
    """Name of the ledger, for errors."""
    sequence: int
    run_id: str
    payload: Mapping[str, Any]

    def estimate(self, *, light: bool = False) -> LeakageEstimate:
        """Returns the estimate; `light`: without the parts that take longest to read (see `from_dict`).

        Raises:
            LedgerError: The row does not hold an estimate.
        """
        try:
            return LeakageEstimate.from_dict(self.payload, light=light)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise LedgerError(
                f"row {self.sequence} of {self.ledger} does not hold an estimate that this version can read: {error}"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a ledger holds of one run."""

    run_id: str
    rows: int
    rounds: int
    started: str
    """When its first row was written (UTC, ISO 8601)."""
    ended: str
    """When its last row was written."""


class Ledger:
    """Opens a ledger to write and read, and creates it if there is none.

    A round is appended in one transaction: a process that is killed leaves every finished round and no half of one.
    Several processes may append at the same time; each waits its turn (SQLite: one write transaction at a time;
    elsewhere: a lock on the head row), so the chain stays one. An instance may be used from several threads and
    survives a fork: it keeps no connection between calls.

    The hash chain proves that the rows agree with one another and with the head record. It proves nothing against
    someone who can write to the database and recomputes every hash from the changed row on, the head included. To
    find that, too, keep `head()` where that person cannot write (a printed log, another machine) and hand it to
    `verify(expected_head=...)`. Nor does it prove that what was written was true.

    Args:
        url: A path, which means a SQLite file there (its folder is created), or any SQLAlchemy URL of a database.

    Raises:
        LedgerError: If the database cannot be reached, or holds something else than a ledger.
    """

    def __init__(self, url: str | Path | URL) -> None:
        self._connect(url, read_only=False)
        self._create()

    @classmethod
    def open(cls, url: str | Path | URL) -> Self:
        """Returns an existing ledger to read: nothing is created, and `append` refuses.

        A ledger that lacks one of its tables opens, so that `verify` can say so.

        Raises:
            LedgerError: If there is no database at `url`, it cannot be reached, or it holds no ledger.
        """
        ledger = cls.__new__(cls)
        ledger._connect(url, read_only=True)
        with ledger._transaction() as connection:
            if len(missing_parts(connection, columns=False)) == len(METADATA.tables):
                raise LedgerError(f"{ledger._name} is a database, but holds no ledger")
        return ledger

    def append(self, rows: Sequence[LeakageEstimate | RoundMetrics], *, run_id: str) -> None:
        """Appends the rows of one round, all of them or, if this raises, none.

        Args:
            rows: The round's estimates, or its metrics, in the order in which they are to be numbered.
            run_id: Name of the run, 1 to 255 printable characters.

        Raises:
            ValueError: If `run_id` is not such a name.
            TypeError: If a row's settings hold something that JSON cannot.
            LedgerError: If the ledger is open to read only, or the database does not take the rows.
        """
        if not 1 <= len(run_id) <= NAME_LENGTH or not run_id.isprintable():
            raise ValueError(f"run_id must be 1 to {NAME_LENGTH} printable characters, got {run_id!r}")
        if self._read_only:
            raise LedgerError(f"{self._name} was opened to read: use Ledger(url) to append to it")
        dicts = [row.to_dict() for row in rows]
        payloads = [canonical_json(row) for row in dicts]
        if not payloads:
            return
        with self._transaction(write=True) as connection:
            connection.execute(update(HEAD).values(sequence=HEAD.c.sequence))  # takes the row's lock in any database
            head = connection.execute(select(HEAD)).mappings().one_or_none()
            if head is None:
                raise LedgerError(f"{self._name} has lost its head record: verify says what happened to it")
            written_at = datetime.now(UTC).isoformat(timespec="microseconds")
            sequence, previous_hash = head["sequence"], head["hash"]
            records: list[dict[str, Any]] = []
            for row, payload in zip(dicts, payloads, strict=True):
                sequence += 1
                link = {
                    "sequence": sequence,
                    "run_id": run_id,
                    "written_at": written_at,
                    "payload": payload,
                    "previous_hash": previous_hash,
                }
                previous_hash = seal(**link)
                records.append({**link, "hash": previous_hash, **columns_of(row)})
            connection.execute(insert(ROWS), records)
            connection.execute(update(HEAD).values(sequence=sequence, hash=previous_hash))

    def head(self) -> str:
        """Returns the hash of the last row, the anchor to keep elsewhere for `verify(expected_head=...)`."""
        with self._transaction() as connection:
            head = connection.execute(select(HEAD.c.hash)).scalar_one_or_none()
        if head is None:
            raise LedgerError(f"{self._name} has lost its head record: verify says what happened to it")
        return str(head)

    def verify(
        self,
        *,
        expected_head: str | None = None,
        visit: Callable[[LedgerRecord], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Verification:
        """Returns whether any row was changed, removed, inserted or moved since it was written, and where.

        Reads in pages, in constant memory, while others may append.

        Args:
            expected_head: A `head()` that was kept elsewhere. The ledger may have grown since, but must still hold that
                row: everything up to it is then as it was when the head was noted.
            visit: Is told of every row that holds an estimate, sound or not: who needs rows and check reads once.
            progress: Is told (rows checked, rows there are) from time to time.

        Raises:
            ValueError: If `expected_head` is not a hash.
            LedgerError: If the database cannot be reached, or a row to `visit` cannot be decoded.
        """
        check = ChainCheck(columns_of, expected_head=expected_head)
        with self._transaction() as connection:
            missing = missing_parts(connection, columns=True)
        if missing:
            for name in sorted(missing):
                check.report(f"{name} is missing")
            return check.finish(None)
        query = select(ROWS).order_by(ROWS.c.sequence).limit(_PAGE)
        last: int | None = None
        while True:
            page_query = query if last is None else query.where(ROWS.c.sequence > last)
            try:
                with self._transaction() as connection:
                    page, count, heads = self._read_page(connection, page_query)
            except LedgerError as error:
                if type(error.__cause__) is not DatabaseError:  # its subclasses: busy, unreachable, not permitted
                    raise
                check.report(f"the file is damaged and cannot be read past row {last or 0}: {error.__cause__.orig}")
                return check.finish(None)
            for row in page:
                payload = check.add(row)
                if visit is not None and row["status"] != METRICS:
                    visit(self._record(row, payload))
            if progress is not None:
                progress(check.rows, count)
            if len(page) < _PAGE or not isinstance(page[-1]["sequence"], int):
                if count != check.rows:
                    check.report(
                        f"the table holds {count} rows, but only {check.rows} in an order that can be followed"
                    )
                return check.finish(heads)
            last = page[-1]["sequence"]

    def rows(
        self, *, run_id: str | None = None, server_round: int | None = None, client: str | None = None
    ) -> Iterator[LedgerEntry]:
        """Yields the estimates that match, in the order in which they were written, a page at a time.

        Rows that are appended while one reads are yielded, too. Hashes are not checked: that is `verify`'s work.

        Raises:
            LedgerError: While iterating, if the database cannot be reached or a row does not hold an estimate.
        """
        query = select(ROWS).where(ROWS.c.status != METRICS).order_by(ROWS.c.sequence).limit(_PAGE)
        if run_id is not None:
            query = query.where(ROWS.c.run_id == run_id)
        if server_round is not None:
            query = query.where(ROWS.c.server_round == server_round)
        if client is not None:
            query = query.where(ROWS.c.client == column_text(client))
        last = 0
        while True:
            with self._transaction() as connection:
                page = connection.execute(query.where(ROWS.c.sequence > last)).mappings().all()
            for row in page:
                entry = self._entry(row)
                if client is None or entry.estimate.client == client:  # the column may hold a shortened name
                    yield entry
            if len(page) < _PAGE:
                return
            last = page[-1]["sequence"]

    def metrics(self, *, run_id: str) -> list[RoundMetrics]:
        """Returns the metrics of a run's rounds, in the order in which they were written; older ledgers hold none.

        Raises:
            LedgerError: The database cannot be reached, or an entry does not hold metrics.
        """
        query = select(ROWS.c.sequence, ROWS.c.payload).where(ROWS.c.status == METRICS, ROWS.c.run_id == run_id)
        with self._transaction() as connection:
            rows = connection.execute(query.order_by(ROWS.c.sequence)).all()
        found = []
        for sequence, payload in rows:
            try:
                found.append(RoundMetrics.from_dict(json.loads(payload)))
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise LedgerError(f"row {sequence} of {self._name} does not hold a round's metrics: {error}") from error
        return found

    def runs(self) -> list[Run]:
        """Returns what runs the ledger holds, in the order in which they began."""
        columns = ROWS.c
        query = (
            select(
                columns.run_id,
                func.count().label("rows"),
                func.count(columns.server_round.distinct()).label("rounds"),
                func.min(columns.written_at).label("started"),
                func.max(columns.written_at).label("ended"),
            )
            .where(columns.status != METRICS)
            .group_by(columns.run_id)
            .order_by(func.min(columns.sequence))
        )
        with self._transaction() as connection:
            return [Run(**row) for row in connection.execute(query).mappings()]

    def close(self) -> None:
        """Closes the ledger; further calls raise `LedgerError`. Closing twice is harmless."""
        self._closed = True
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self, url: str | Path | URL, *, read_only: bool) -> None:
        located = locate(url)
        self._read_only = read_only
        self._closed = False
        self._name = located.render_as_string(hide_password=True)
        self._engine = create_database_engine(located, read_only=read_only)

    def _create(self) -> None:
        """Creates tables and head record unless they are there; another process may be doing the same.

        It may finish between two looks of ours at the catalogue, so that a part of the ledger seems to be missing, or
        before our own creation, which then fails: either way, what counts is what is there a moment later.
        """
        try:
            with self._transaction(write=True) as connection:
                if not self._is_ready(connection):
                    METADATA.create_all(connection)
                    connection.execute(insert(HEAD).values(id=1, sequence=0, hash=GENESIS))
        except LedgerError:
            delays = _SECOND_LOOKS[:1] if self._engine.url.get_backend_name() == "sqlite" else _SECOND_LOOKS
            if not any(self._is_ready_after(delay) for delay in delays):
                raise

    def _is_ready_after(self, delay: float) -> bool:
        time.sleep(delay)
        try:
            with self._transaction() as connection:
                return self._is_ready(connection)
        except LedgerError:
            return False

    def _is_ready(self, connection: Connection) -> bool:
        """Returns whether the ledger is there; raises if something else, or only a part of it, is."""
        missing = missing_parts(connection, columns=True)
        if not missing:
            return True
        if len(missing) < len(METADATA.tables) or not missing.issuperset(f"table {name}" for name in METADATA.tables):
            raise LedgerError(f"{self._name} holds a damaged ledger: {', '.join(sorted(missing))} is missing")
        if connection.dialect.name == "sqlite" and (tables := inspect(connection).get_table_names()):
            raise LedgerError(f"{self._name} is not a ledger: it holds the tables {', '.join(tables)}")
        return False

    @contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[Connection]:
        """Yields a connection in a transaction, and turns what the database raises into `LedgerError`."""
        if self._closed:
            raise LedgerError(f"{self._name} is closed")
        try:
            with self._engine.connect() as connection:
                connection = connection.execution_options(**transaction_options(self._engine.url, write=write))
                with connection.begin():
                    yield connection
        except IntegrityError as error:
            raise LedgerError(
                f"{self._name} refused the rows ({error.orig}): its head does not match its rows, verify says where"
            ) from error
        except DatabaseError as error:
            raise LedgerError(f"cannot use the ledger {self._name}: {error.orig}") from error
        except SQLAlchemyError as error:
            raise LedgerError(f"cannot use the ledger {self._name}: {error}") from error

    @staticmethod
    def _read_page(
        connection: Connection, query: Select[Any]
    ) -> tuple[list[dict[str, Any]], int, list[dict[str, Any]]]:
        """Returns rows, the number of rows in all, and the head records, as they were at one moment."""
        page = [row._asdict() for row in connection.execute(query)]
        count = connection.execute(select(func.count()).select_from(ROWS)).scalar_one()
        return page, count, [row._asdict() for row in connection.execute(select(HEAD))]

    def _record(self, row: Mapping[str, Any] | RowMapping, payload: Mapping[str, Any] | None = None) -> LedgerRecord:
        if payload is None:
            try:
                payload = json.loads(row["payload"])
            except (ValueError, TypeError) as error:
                raise LedgerError(
                    f"row {row['sequence']} of {self._name} does not hold an estimate: {error}"
                ) from error
        return LedgerRecord(ledger=self._name, sequence=row["sequence"], run_id=row["run_id"], payload=payload or {})

    def _entry(self, row: RowMapping) -> LedgerEntry:
        return LedgerEntry(
            sequence=row["sequence"],
            run_id=row["run_id"],
            written_at=row["written_at"],
            estimate=self._record(row).estimate(),
            previous_hash=row["previous_hash"],
            hash=row["hash"],
        )
