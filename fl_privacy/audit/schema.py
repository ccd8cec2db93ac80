"""The two tables of a ledger: the rows, each with its whole estimate as JSON, and the head record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sqlalchemy import BigInteger, Column, Connection, Double, Index, Integer, MetaData, String, Table, Text, inspect

NAME_LENGTH = 255
"""Most characters of a name (a run's, a client's) that a column holds."""

METADATA = MetaData()
ROWS = Table(
    "fl_privacy_ledger",
    METADATA,
    Column("sequence", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False),
    Column("run_id", String(NAME_LENGTH), nullable=False),
    Column("written_at", String(40), nullable=False),
    Column("server_round", BigInteger, nullable=False),
    Column("client", String(NAME_LENGTH), nullable=False),
    Column("status", String(40), nullable=False),
    Column("source", String(40), nullable=False),
    Column("leakage", Double),
    Column("required_noise_std", Double),
    Column("payload", Text, nullable=False),
    Column("previous_hash", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
    Index("ix_fl_privacy_ledger_run_round", "run_id", "server_round"),
    Index("ix_fl_privacy_ledger_client", "client"),
)
HEAD = Table(
    "fl_privacy_ledger_head",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("sequence", BigInteger, nullable=False),
    Column("hash", String(64), nullable=False),
)


def missing_parts(connection: Connection, *, columns: bool) -> set[str]:
    """Returns the tables, and of those present the columns if asked, that a ledger needs and the database lacks."""
    inspector = inspect(connection)
    missing: set[str] = set()
    for table in METADATA.sorted_tables:
        if not inspector.has_table(table.name):
            missing.add(f"table {table.name}")
        elif columns:
            present = {column["name"] for column in inspector.get_columns(table.name)}
            missing.update(f"column {column}" for column in table.columns if column.name not in present)
    return missing


def columns_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the queried columns repeat of a row; a float that is not finite becomes NULL there."""
    leakage = row["leakage"]
    return {
        "server_round": row["server_round"],
        "client": column_text(row["client"]),
        "status": row["status"],
        "source": row["source"],
        "leakage": None if leakage is None else _finite(leakage[1]),
        "required_noise_std": _finite(row["required_noise_std"]),
    }


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def column_text(text: str) -> str:
    """Returns `text` as any database takes it: what UTF-8 lacks and NUL escaped, cut to the column's length."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")[:NAME_LENGTH]
