"""Rows of results in a CSV file, to which a study that was stopped goes on adding."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, get_type_hints

from fl_privacy.errors import InvalidInputError


class Row(Protocol):
    """A flat dataclass of int, float, str and bool."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


R = TypeVar("R", bound=Row)
Key = tuple[Any, ...]
Progress = Callable[[int, int], None]
"""Told (rows done, rows to do)."""


@dataclass(frozen=True)
class Portion(Generic[R]):
    """A part of a study that is computed at once, and skipped as a whole where all its rows are there.

    Attributes:
        keys: Of its rows: the values of the study's key fields.
        compute: Returns or yields them.
    """

    keys: Sequence[Key]
    compute: Callable[[], Iterable[R]]


def fill(
    path: Path, row_type: type[R], portions: Iterable[Portion[R]], *, key: Sequence[str], progress: Progress | None
) -> list[R]:
    """Returns all rows, each appended to a CSV file as it is done; those that are there are kept.

    Args:
        path: The CSV file.
        row_type: The class of the rows.
        portions: What to compute.
        key: Names of the fields by which a row is known.
        progress: Told how far it is.

    Raises:
        InvalidInputError: The file holds something else.
    """
    parts = list(portions)
    rows = read_rows(path, row_type)

    def key_of(row: R) -> Key:
        return tuple(getattr(row, name) for name in key)

    done = {key_of(row) for row in rows}
    total = sum(len(part.keys) for part in parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".part")
    with whole.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(_kinds(row_type)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
        file.flush()
        whole.replace(path)  # the same file goes on under its own name, without a half-written line
        if progress is not None:
            progress(len(rows), total)
        for part in parts:
            if done.issuperset(part.keys):
                continue
            for row in part.compute():
                if key_of(row) not in done:
                    rows.append(row)
                    writer.writerow(dataclasses.asdict(row))
                    file.flush()
                if progress is not None:
                    progress(len(rows), total)
    return rows


def read_rows(path: Path, row_type: type[R]) -> list[R]:
    """Returns the rows of a CSV file; none if there is no file.

    Raises:
        InvalidInputError: The file is no such CSV.
    """
    if not path.exists() or path.stat().st_size == 0:
        return []
    kinds = _kinds(row_type)
    with path.open(newline="") as file:
        lines = list(file)
    if len(lines) > 1 and not lines[-1].endswith("\n"):
        del lines[-1]  # what a killed run left half written is done again
    reader = csv.DictReader(lines)
    if reader.fieldnames != list(kinds):
        raise InvalidInputError(f"expected {path} to hold the columns of a {row_type.__name__}: {', '.join(kinds)}")
    rows = []
    for number, record in enumerate(reader, start=2):
        try:
            rows.append(row_type(**{name: parse(record[name]) for name, parse in kinds.items()}))
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"expected numbers in line {number} of {path}: {error}") from error
    return rows


def _kinds(row_type: type[R]) -> Mapping[str, Callable[[str], Any]]:
    """Returns what reads each field, in the order of the columns."""
    hints = get_type_hints(row_type)
    return {item.name: _PARSERS[hints[item.name]] for item in dataclasses.fields(row_type)}


def _truth(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError(f"expected True or False, got {text!r}")
    return text == "True"


def _text(text: str | None) -> str:
    if text is None:
        raise TypeError("expected text, got the end of the line")
    return text


_PARSERS: Mapping[type, Callable[[str], Any]] = {int: int, float: float, str: _text, bool: _truth}
