"""The update that a reply shares: its arrays minus those that were sent, once they are seen to fit."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import RecordDict

from fl_privacy.audit.task import Array


class UnusableUpdateError(Exception):
    """An update that cannot be averaged with others; the message says what is wrong with it."""


def shared_update(content: RecordDict, expected: Mapping[str, Array], trained: Sequence[str]) -> dict[str, Array]:
    """Returns shared minus global parameters by name, from a reply whose arrays fit those that were sent.

    Args:
        content: The reply's content.
        expected: The arrays that were sent.
        trained: Names of the trained parameters; the others are checked, and not part of the update.

    Raises:
        UnusableUpdateError: The arrays have other names, shapes or types than those sent, or hold NaN or infinity.
    """
    records = list(content.array_records.values())
    if len(records) != 1:
        raise UnusableUpdateError(f"expected one ArrayRecord in the reply, got {len(records)}")
    record = records[0]
    if set(record) != set(expected):
        odd = sorted(set(record) ^ set(expected))[:3]
        raise UnusableUpdateError(f"expected the arrays that were sent, got others or not all: {', '.join(odd)}")
    update: dict[str, Array] = {}
    for name, known in expected.items():
        try:
            shape, dtype = _announced(record[name].data)
            array = record[name].numpy() if shape == known.shape and dtype.kind in "biuf" else None
        except Exception as error:  # whatever a client's bytes can provoke
            raise UnusableUpdateError(f"array {name} cannot be read: {error}") from error
        if shape != known.shape:
            raise UnusableUpdateError(f"expected {name} of shape {list(known.shape)}, got {list(shape)}")
        if array is None:
            raise UnusableUpdateError(f"expected real numbers in {name}, got {dtype}")
        if array.dtype.kind == "f" and array.dtype not in (np.float32, np.float64, known.dtype):
            # What is averaged has the type of the first reply, and is sent to every client in the next round.
            raise UnusableUpdateError(f"expected {name} of {known.dtype}, float32 or float64, got {array.dtype}")
        with np.errstate(over="ignore"):
            finite = bool(np.isfinite(array).all()) and bool(np.isfinite(array.astype(known.dtype)).all())
        if not finite:
            raise UnusableUpdateError(f"NaN or infinity in {name}, read as {known.dtype}")
        if name in trained:
            if not np.issubdtype(array.dtype, np.floating):
                raise UnusableUpdateError(f"expected floating-point values in {name}, got {array.dtype}")
            update[name] = np.subtract(array, known, dtype=known.dtype)
    return update


def _announced(data: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Returns shape and type in an array's header: NumPy's reader would allocate it first, and takes archives, too."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"expected NumPy's format 1.0 or 2.0, got {version}")
    shape, _, dtype = readers[version](stream)
    return tuple(shape), dtype


def update_norm(update: Mapping[str, Array]) -> float:
    """Returns ‖u‖ over all parameters of an update."""
    return float(np.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in update.values())))
