"""The record in which a client reports to the audit, and how it is read.

A report is one `ConfigRecord` of a reply: plain values, and arrays as raw bytes beside their type and shape. There are
two kinds: the batches behind an update, or the scalars of an audit that the client made itself. Reading
one executes nothing, allocates no more than the bytes that arrived, and checks everything it relies on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
from flwr.app import ConfigRecord

from fl_privacy.audit.claims import Defence
from fl_privacy.audit.settings import Covariance
from fl_privacy.audit.task import Array, InputShift, TrainingTrace
from fl_privacy.errors import InvalidInputError, RecordError
from fl_privacy.flower.disclosure import Disclosure

REPORT_KEY = "fl_privacy.report"
"""Name of the report's record in a reply."""
REQUEST_KEY = "fl-privacy-request"
"""Entry of a training message's config by which the server asks for a report."""
BATCHES = "batches"
"""The request for the batches behind an update."""
ESTIMATE = "estimate"
"""The request for the scalars of an audit that the client makes itself."""
CLAIM = "claim"
"""The request for nothing but what a client says of its defence: the server audits the update alone."""

_VERSION = 1
_SHIFT = ("prior_std", "covariance", "kept", "note")
_BOUNDS = ("shift/low", "shift/high")
_MOST_NOISE = 1e30
"""Most noise per parameter that a report may speak of: far beyond use, and its square is still a number."""
_MAX_HEAD = 4 * 1024**2
"""Most characters of a head: lists of nothing take 20 times the memory of their text."""
_DTYPES = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientReport:
    """What a client tells the audit.

    Attributes:
        client: Name to show: the partition id where there is one.
        defence: What the client says it does to its update.
        claim: The same in numbers that an update can be checked for; `None`: none were given.
        refused: Why nothing is handed over; empty if something is.
        inputs: Examples `[N, *shape]`, each once.
        labels: `[N, ...]`.
        trace: How the update was made.
        captured: The update before any defence, by parameter name.
        estimate: The scalars of the client's own audit, in place of all arrays.
        applied_noise_std: Noise per parameter that it put on its update, as it was advised.
        shift: Noise that it put on its inputs, as it was advised; `inputs` are without it.
    """

    client: str
    defence: str = ""
    claim: Defence | None = None
    refused: str = ""
    inputs: Array | None = None
    labels: Array | None = None
    trace: TrainingTrace | None = None
    captured: Mapping[str, Array] | None = None
    estimate: Disclosure | None = None
    applied_noise_std: float | None = None
    shift: InputShift | None = None


def encode_report(report: ClientReport) -> ConfigRecord:
    """Returns the report as the record that travels in a reply."""
    arrays: dict[str, Array] = {}
    if report.inputs is not None and report.labels is not None:
        arrays |= {"inputs": report.inputs, "labels": report.labels}
    arrays |= {f"captured/{name}": array for name, array in (report.captured or {}).items()}
    if report.shift is not None:
        arrays |= {"shift/noise": report.shift.noise, "shift/leakage": report.shift.leakage}
        arrays |= dict(zip(_BOUNDS, report.shift.bounds or (), strict=False))
    head = {
        "version": _VERSION,
        "client": report.client,
        "defence": report.defence,
        "claim": None if report.claim is None else asdict(report.claim),
        "refused": report.refused,
        "trace": None if report.trace is None else asdict(report.trace),
        "estimate": None if report.estimate is None else report.estimate.to_dict(),
        "applied_noise_std": report.applied_noise_std,
        "shift": None if report.shift is None else {name: getattr(report.shift, name) for name in _SHIFT},
        "arrays": {name: [array.dtype.name, list(array.shape)] for name, array in arrays.items()},
    }
    payload = {f"array/{name}": np.ascontiguousarray(array).tobytes() for name, array in arrays.items()}
    return ConfigRecord({"head": json.dumps(head), **payload})


def decode_report(record: Any, *, max_bytes: int) -> ClientReport:
    """Returns the report in a record that arrived from a client, every part of it checked.

    Args:
        record: What the reply holds under `REPORT_KEY`.
        max_bytes: Most bytes to accept.

    Raises:
        RecordError: It is not a report that this version can read.
    """
    if not isinstance(record, ConfigRecord):
        raise RecordError(f"expected a ConfigRecord, got {type(record).__name__}")
    total = sum(len(value) for value in record.values() if isinstance(value, bytes | str))
    if total > max_bytes:
        raise RecordError(f"expected a report of at most {max_bytes} bytes, got {total}")
    head = _head(record)
    listed = _expect(head.get("arrays"), dict, "arrays")
    arrays = {name: _array(record, name, entry) for name, entry in listed.items()}
    trace, estimate, applied = head.get("trace"), head.get("estimate"), head.get("applied_noise_std")
    captured = {name.removeprefix("captured/"): a for name, a in arrays.items() if name.startswith("captured/")}
    return ClientReport(
        client=_text(head, "client"),
        defence=_text(head, "defence"),
        claim=_claim(head.get("claim")),
        refused=_text(head, "refused"),
        inputs=arrays.get("inputs"),
        labels=arrays.get("labels"),
        trace=None if trace is None else _trace(_expect(trace, dict, "trace")),
        captured=captured or None,
        estimate=None if estimate is None else Disclosure.from_dict(_expect(estimate, dict, "estimate")),
        applied_noise_std=None if applied is None else _noise(applied),
        shift=None if head.get("shift") is None else _shift(_expect(head["shift"], dict, "shift"), arrays),
    )


def _shift(entry: dict[str, Any], arrays: Mapping[str, Array]) -> InputShift:
    noise, leakage = arrays.get("shift/noise"), arrays.get("shift/leakage")
    covariance = _text(entry, "covariance")
    if noise is None or leakage is None or covariance not in get_args(Covariance):
        raise RecordError("expected noise on the inputs with its leakage and its covariance")
    bounds = tuple(arrays[name] for name in _BOUNDS if name in arrays)
    if len(bounds) not in (0, 2):
        raise RecordError("expected both bounds of the inputs, or none")
    try:
        return InputShift(
            noise=noise,
            leakage=leakage,
            prior_std=_finite(entry.get("prior_std"), "prior_std"),
            covariance=covariance,
            kept=_expect(entry.get("kept"), bool, "kept"),
            bounds=(bounds[0], bounds[1]) if bounds else None,
            note=_text(entry, "note"),
        )
    except InvalidInputError as error:
        raise RecordError(str(error)) from error


def _head(record: ConfigRecord) -> dict[str, Any]:
    text = _expect(record.get("head"), str, "head")
    if len(text) > _MAX_HEAD:
        raise RecordError(f"expected a head of at most {_MAX_HEAD} characters, got {len(text)}")
    try:
        head = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"expected a report's head in JSON: {error}") from error
    head = _expect(head, dict, "head")
    if head.get("version") != _VERSION:
        raise RecordError(
            f"expected a report of version {_VERSION}, got {head.get('version')!r}: client and server run different "
            "releases of fl_privacy"
        )
    return head  # type: ignore[no-any-return]


def _array(record: ConfigRecord, name: str, entry: Any) -> Array:
    data = _expect(record.get(f"array/{name}"), bytes, f"array {name}")
    if not isinstance(entry, list) or len(entry) != 2 or entry[0] not in _DTYPES or not isinstance(entry[1], list):
        raise RecordError(f"expected the type and shape of array {name}, got {entry!r:.80}")
    dtype, shape = np.dtype(entry[0]), entry[1]
    if not all(type(size) is int and 0 <= size < 2**63 for size in shape) or len(shape) > 16:
        raise RecordError(f"expected a shape of at most 16 sizes in [0, 2**63) for array {name}, got {entry!r:.80}")
    expected = math.prod(shape) * dtype.itemsize
    if expected != len(data):
        raise RecordError(f"expected {expected} bytes for array {name}, {dtype} {shape!r:.80}, got {len(data)}")
    try:
        return np.frombuffer(data, dtype=dtype).reshape(shape)
    except ValueError as error:  # a shape with a size of zero may have others that no array has
        raise RecordError(f"expected the shape of an array for {name}, got {shape!r:.80}: {error}") from error


def _trace(entry: dict[str, Any]) -> TrainingTrace:
    def indices(value: Any) -> tuple[int, ...]:
        items = _expect(value, list, "batches")
        if not all(type(item) is int and 0 <= item < 2**63 for item in items):
            raise RecordError("expected mini-batches of indices in [0, 2**63)")
        return tuple(items)

    batches = tuple(indices(batch) for batch in _expect(entry.get("batches"), list, "batches"))
    lr = tuple(_finite(rate, "lr") for rate in _expect(entry.get("lr"), list, "lr"))
    if len(lr) != len(batches):
        raise RecordError(f"expected one learning rate for each of {len(batches)} steps, got {len(lr)}")
    return TrainingTrace(
        optimizer=_text(entry, "optimizer"),
        batches=batches,
        lr=lr,
        momentum=_finite(entry.get("momentum"), "momentum"),
        dampening=_finite(entry.get("dampening"), "dampening"),
        weight_decay=_finite(entry.get("weight_decay"), "weight_decay"),
        nesterov=_expect(entry.get("nesterov"), bool, "nesterov"),
        problem=_text(entry, "problem"),
    )


def _finite(value: Any, name: str) -> float:
    number = _expect(value, (int, float), name)
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RecordError(f"expected a finite {name}, got {number}")
    return number


def _claim(entry: Any) -> Defence | None:
    if entry is None:
        return None
    entry = _expect(entry, dict, "claim")
    numbers = {name: entry.get(name) for name in ("noise_std", "sparsity")}
    known = {name: _finite(value, name) for name, value in numbers.items() if value is not None}
    try:
        return Defence(kind=_text(entry, "kind"), **known)
    except InvalidInputError as error:
        raise RecordError(str(error)) from error


def _noise(value: Any) -> float:
    noise = _finite(value, "applied_noise_std")
    if not 0 <= noise <= _MOST_NOISE:
        raise RecordError(f"expected applied_noise_std in [0, {_MOST_NOISE:g}], got {noise}")
    return noise


def _text(head: Mapping[str, Any], name: str) -> str:
    text: str = _expect(head.get(name), str, name)
    # Neither half a surrogate pair nor a null character can be written to a ledger.
    return text[:500].encode(errors="replace").decode().replace("\0", "")


def _expect(value: Any, kind: type | tuple[type, ...], name: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RecordError(f"expected {name} as {kind}, got {type(value).__name__}")
    return value
