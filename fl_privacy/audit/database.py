"""Where a ledger's database is, and an engine that opens it with the transactions a ledger needs."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.pool import NullPool

from fl_privacy.errors import LedgerError

_BUSY_SECONDS = 60
"""How long a SQLite writer waits for its turn."""

_SNAPSHOT = {"postgresql": "REPEATABLE READ", "mysql": "REPEATABLE READ", "mariadb": "REPEATABLE READ"}
"""The isolation level at which a reader sees one moment; databases that are not listed get SERIALIZABLE."""


def locate(url: str | Path | URL) -> URL:
    """Returns the database URL that `url`, a path of a SQLite file or a database URL, stands for.

    Raises:
        LedgerError: If it is no database URL, or one of a SQLite database that is not a file.
    """
    if isinstance(url, Path) or (isinstance(url, str) and "://" not in url):
        if not str(url).strip():
            raise LedgerError("the path of the ledger is empty: expected a file or a database URL")
        return URL.create("sqlite", database=str(Path(url).expanduser()))
    try:
        located = make_url(url)
    except ArgumentError as error:
        raise LedgerError(f"{url!r} is neither a path nor a database URL such as postgresql://host/name") from error
    if located.get_backend_name() == "sqlite" and (
        located.database in (None, "", ":memory:") or str(located.database).startswith("file:")
    ):
        raise LedgerError(f"a ledger must outlive its process: expected a SQLite file by its plain path, got {url!s}")
    return located


def create_database_engine(url: URL, *, read_only: bool) -> Engine:
    """Returns an engine that opens a connection for each use and keeps none.

    SQLite's journal mode stays the default, so that a ledger is one file: it can be copied, archived, kept on a network
    drive and read from a read-only disk.

    Args:
        url: What `locate` returned.
        read_only: The SQLite file must exist, and statements that write are refused.

    Raises:
        LedgerError: If the dialect is unknown, its driver is not installed, or a SQLite file cannot be there.
    """
    name = url.render_as_string(hide_password=True)
    sqlite = url.get_backend_name() == "sqlite"
    if sqlite:
        _check_file(Path(str(url.database)), must_exist=read_only)
    options: dict[str, Any] = {"connect_args": {"timeout": _BUSY_SECONDS}} if sqlite else {}
    try:
        engine = create_engine(url, poolclass=NullPool, **options)
    except NoSuchModuleError as error:
        raise LedgerError(
            f"{name} names an unknown database, {url.drivername!r}: expected sqlite, postgresql, mysql, mariadb, "
            "oracle, mssql or one that an installed SQLAlchemy dialect adds"
        ) from error
    except ModuleNotFoundError as error:
        raise LedgerError(f"{name} needs the driver {error.name!r}, which is not installed: pip install it") from error
    if not sqlite:
        return engine

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # the driver begins no transaction: `begin` below does
        connection.text_factory = _decode  # damaged text must reach the hash check, not end the read
        if read_only:
            connection.execute("PRAGMA query_only = ON")  # unlike mode=ro, still rolls back what a killed writer left

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("ledger_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def transaction_options(url: URL, *, write: bool) -> dict[str, Any]:
    """Returns the execution options of a connection for one transaction.

    A reader sees one moment. A writer takes its lock first (SQLite: the file's, as it begins; elsewhere: a row's) and
    must then see what the writer before it left, so it never reads from an older snapshot.
    """
    if url.get_backend_name() == "sqlite":
        return {"ledger_write": write}
    snapshot = _SNAPSHOT.get(url.get_backend_name(), "SERIALIZABLE")
    return {"isolation_level": "READ COMMITTED" if write else snapshot}


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


def _check_file(path: Path, *, must_exist: bool) -> None:
    if path.is_dir():
        raise LedgerError(f"{path} is a folder: expected the file of a ledger")
    if must_exist:
        if not path.exists():
            raise LedgerError(f"there is no ledger at {path}")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LedgerError(f"cannot create the folder of the ledger {path}: {error}") from error
