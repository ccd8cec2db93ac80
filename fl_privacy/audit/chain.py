"""The hash chain over a ledger's rows: how a row is sealed, and how a changed, removed or inserted row shows.

Row k carries hₖ = SHA-256(canonical JSON of its number, run, time, payload and hₖ₋₁), with h₀ all zeros. A change to
any row breaks its own hash; hiding that by recomputing the hash breaks the next row's link, and so on to the last row,
whose hash a separate head record holds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GENESIS = "0" * 64
"""What the first row gives as the hash of the row before it: the head of an empty ledger."""


def canonical_json(value: object) -> str:
    """Returns the one JSON text of `value`: sorted keys, no spaces, ASCII only, no NaN or infinity.

    Raises:
        ValueError: If a float is not finite.
        TypeError: If a value has no JSON form.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def seal(*, sequence: int, run_id: str, written_at: str, payload: str, previous_hash: str) -> str:
    """Returns the SHA-256, 64 lower case hexadecimal digits, of one row; `payload` is hashed as text, to the byte."""
    sealed = {
        "sequence": sequence,
        "run_id": run_id,
        "written_at": written_at,
        "payload": payload,
        "previous_hash": previous_hash,
    }
    return hashlib.sha256(canonical_json(sealed).encode("ascii")).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with a ledger."""

    sequence: int | None
    """Number of the row it was noticed at; `None` when it concerns the ledger as a whole."""
    message: str

    def __str__(self) -> str:
        return self.message if self.sequence is None else f"row {self.sequence}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a check of a whole ledger found."""

    rows: int
    """Number of rows checked."""
    head: str | None
    """Hash of the last row as the head record has it; `None` when the record itself is gone."""
    anchored: int | None
    """Number of the row that the expected head belongs to, up to which it vouches for the rows."""
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing at all is wrong."""
        return not self.problems


class ChainCheck:
    """Checks rows one at a time, in order of their number, in constant memory.

    Args:
        columns: Returns, for a decoded payload, the values that the row's other columns must repeat.
        expected_head: A head hash kept elsewhere: some row of the chain must have it.

    Raises:
        ValueError: If `expected_head` is not a hash.
    """

    def __init__(
        self, columns: Callable[[Mapping[str, Any]], Mapping[str, Any]], *, expected_head: str | None = None
    ) -> None:
        if expected_head is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", expected_head):
            raise ValueError(f"a head is 64 hexadecimal digits, as verify prints it, got {expected_head!r}")
        self._columns = columns
        self._expected_head = None if expected_head is None else expected_head.lower()
        self._anchored = 0 if self._expected_head == GENESIS else None
        self._problems: list[Problem] = []
        self._rows = 0
        self._sequence = 0
        self._hash: object = GENESIS

    @property
    def rows(self) -> int:
        """Number of rows checked so far."""
        return self._rows

    def report(self, message: str, *, sequence: int | None = None) -> None:
        """Adds a problem that was found outside the chain."""
        self._problems.append(Problem(sequence=sequence, message=message))

    def add(self, row: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Checks the next row: its number, its link to the row before, its hash, and its columns against its payload.

        Returns its decoded payload, `None` where that was not read because the row is no part of the chain.

        The chain is taken up again at each row's stored hash, so one change is reported where it is, not everywhere
        after it.
        """
        self._rows += 1
        sequence = row["sequence"]
        if not isinstance(sequence, int) or sequence <= self._sequence:
            number = sequence if isinstance(sequence, int) else None
            self.report(f"was inserted: number {sequence!r} cannot follow {self._sequence}", sequence=number)
            return None
        payload = None
        if sequence > self._sequence + 1:
            first, last = self._sequence + 1, sequence - 1
            missing = f"row {first} is" if first == last else f"rows {first} to {last} are"
            self.report(f"{missing} missing before it", sequence=sequence)
        elif row["previous_hash"] != self._hash:
            self.report(
                "does not follow from the row before it: one of the two was changed or moved", sequence=sequence
            )
        if not self._sealed(row):
            self.report("was changed: its contents do not match its hash", sequence=sequence)
        else:
            payload = self._check_columns(row)
        self._sequence, self._hash = sequence, row["hash"]
        if self._hash == self._expected_head:
            self._anchored = sequence
        return payload

    def finish(self, heads: Sequence[Mapping[str, Any]] | None) -> Verification:
        """Returns the outcome.

        Args:
            heads: The head records that were read along with the last row: there must be one. `None` when the ledger
                could not be read to its end, which has been reported.
        """
        if heads is None:
            return Verification(rows=self._rows, head=None, anchored=None, problems=tuple(self._problems))
        if len(heads) != 1:
            self.report(f"the head table holds {len(heads)} records instead of one")
        elif heads[0]["sequence"] != self._sequence:
            self.report(
                f"the head says that the last row is {heads[0]['sequence']!r}, but it is {self._sequence}: rows were "
                "removed from the end or added past it"
            )
        elif heads[0]["hash"] != self._hash:
            self.report("the head has another hash than the last row: one of the two was changed")
        if self._expected_head is not None and self._anchored is None:
            self.report(
                f"no row has the expected head {self._expected_head}: the ledger was cut short or rewritten since that "
                "head was noted, or it is another ledger"
            )
        head = heads[0]["hash"] if len(heads) == 1 else None
        return Verification(
            rows=self._rows,
            head=head if isinstance(head, str) else None,
            anchored=self._anchored,
            problems=tuple(self._problems),
        )

    @staticmethod
    def _sealed(row: Mapping[str, Any]) -> bool:
        sealed = {name: row[name] for name in ("run_id", "written_at", "payload", "previous_hash")}
        return all(isinstance(value, str) for value in sealed.values()) and row["hash"] == seal(
            sequence=row["sequence"], **sealed
        )

    def _check_columns(self, row: Mapping[str, Any]) -> Mapping[str, Any] | None:
        try:
            payload: Mapping[str, Any] = json.loads(row["payload"])
            expected = self._columns(payload)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            self.report(f"does not hold an estimate: {error}", sequence=row["sequence"])
            return None
        for name, value in expected.items():
            if row[name] != value:
                message = f"column {name} was changed: it says {row[name]!r}, the row {value!r}"
                self.report(message, sequence=row["sequence"])
        return payload
