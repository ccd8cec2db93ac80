"""The scalars that leave a client which audits itself: which, how precisely, and how they are checked on arrival.

The list is closed: nothing else of an estimate travels, no text that an exception could have filled, no array, and
every number has three significant digits, rounded to the cautious side. Still, they are computed from private data, and
are not covered by whatever noise the update carries (see docs/deploy.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context
from typing import Any, get_args

from fl_privacy.audit.estimate import LeakageEstimate, Source, Status
from fl_privacy.audit.settings import Covariance
from fl_privacy.audit.wording import joined, nonlinear_text
from fl_privacy.errors import RecordError
from fl_privacy.interval import Interval

DIGITS = 3
"""Significant digits of every number that leaves."""

_STATUSES = (Status.AUDITED, Status.UNVERIFIED, Status.UNCONVERGED, Status.LATE, Status.AUDIT_FAILED)
_DETAILS = {
    Status.UNVERIFIED: "the client could not reproduce its own local training; its log says why",
    Status.UNCONVERGED: "the client's budget of products ran out before the tolerance was met; the interval holds",
    Status.LATE: "the client's audit of itself did not end within its time limit",
    Status.AUDIT_FAILED: "the client's audit of itself failed; its log says why",
}
_TEXTS = {
    "unit": ("example", "batch"),
    "dtype": ("float32", "float64"),
    "batch_norm": ("", "eval", "train"),
    "input_noise": ("", *get_args(Covariance)),
}
_FLAGS = ("verified", "converged", "input_noise_kept")
_COUNTS = ("units_audited", "input_dim", "update_dim", "products")
_SIZES = (
    "leakage_mean",
    "rmse",
    "i2f",
    "lower_bound",
    "noise_std",
    "prior_std",
    "ridge",
    "target_leakage",
    "required_noise_std",
    "residual",
    "replay_error",
    "change_ratio",
    "seconds",
    "input_noise_leakage",
    "input_noise_rms",
    "input_noise_change",
)
_SHARES = ("leakage_mean", "target_leakage", "input_noise_leakage")
_ALWAYS = ("units_audited", "update_dim", "leakage_mean", "noise_std", "prior_std", "target_leakage")
_WORST = ("worst_example", "worst_label")
_MOST_EXAMPLES = 2**31


@dataclass(frozen=True, kw_only=True)
class Disclosure:
    """What a client says of an audit of its own: a closed list of scalars. Names are those of `LeakageEstimate`.

    Attributes:
        shared_norm: Norm of the update that was audited, as it would be shared: the server compares it with what came.
        psnr: May be infinite: an update that gives its input away to the last digit.
    """

    status: Status
    shared_norm: float
    unit: str = "example"
    dtype: str = "float32"
    batch_norm: str = ""
    leakage: Interval[float] | None = None
    psnr: float | None = None
    verified: bool | None = None
    converged: bool | None = None
    units_audited: int | None = None
    input_dim: int | None = None
    update_dim: int | None = None
    products: int | None = None
    leakage_mean: float | None = None
    rmse: float | None = None
    i2f: float | None = None
    lower_bound: float | None = None
    noise_std: float | None = None
    prior_std: float | None = None
    ridge: float | None = None
    target_leakage: float | None = None
    required_noise_std: float | None = None
    residual: float | None = None
    replay_error: float | None = None
    change_ratio: float | None = None
    seconds: float | None = None
    input_noise: str = ""
    input_noise_kept: bool | None = None
    input_noise_leakage: float | None = None
    input_noise_rms: float | None = None
    input_noise_change: float | None = None
    worst_example: int | None = None
    worst_label: int | None = None

    @classmethod
    def of(cls, row: LeakageEstimate, *, shared_norm: float, reveal_worst: bool = False) -> Disclosure:
        """Returns what may leave of a row.

        Args:
            row: The client's own estimate.
            shared_norm: Norm of the update that was audited.
            reveal_worst: Whether index and label of the example that leaks most may leave. They are facts about the
                data, and the label is one that an attacker may be after.
        """
        if row.status not in _STATUSES:
            raise ValueError(f"expected the status of an audit, got {row.status}")
        shared_norm = rounded(shared_norm)
        if row.leakage is None:
            status = row.status if not row.status.has_estimate else Status.AUDIT_FAILED
            return cls(status=status, shared_norm=shared_norm)
        rounding = {
            "required_noise_std": ROUND_CEILING,
            "noise_std": ROUND_FLOOR,
            "leakage_mean": ROUND_CEILING,
            "input_noise_leakage": ROUND_CEILING,
            "input_noise_rms": ROUND_FLOOR,
        }
        sizes: dict[str, Any] = {}
        for name in _SIZES:
            number = getattr(row, name)
            if number is not None and math.isfinite(number):
                sizes[name] = rounded(number, rounding.get(name, ROUND_HALF_EVEN))
            elif name in _ALWAYS:
                return cls(status=Status.AUDIT_FAILED, shared_norm=shared_norm)
        lower, value, upper = row.leakage
        return cls(
            status=row.status,
            shared_norm=shared_norm,
            leakage=Interval(rounded(lower, ROUND_FLOOR), rounded(value), rounded(upper, ROUND_CEILING)),
            psnr=None if row.psnr is None else rounded(row.psnr),
            **{name: getattr(row, name) for name in (*_TEXTS, *_FLAGS, *_COUNTS)},
            **sizes,
            **({name: getattr(row, name) for name in _WORST} if reveal_worst else {}),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the disclosure as values of JSON; what is not known is left out."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["status"] = str(self.status)
        values["leakage"] = None if self.leakage is None else list(self.leakage)
        values["psnr"] = "Infinity" if self.psnr == math.inf else self.psnr
        values["input_noise"] = self.input_noise or None
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Disclosure:
        """Returns the disclosure in what a client sent, every value checked as one that may be forged.

        Raises:
            RecordError: A name is none of the list, or a value has another type or lies out of its range.
        """
        unknown = set(entry) - {item.name for item in fields(cls)}
        if unknown:
            raise RecordError(f"expected the scalars of an estimate, got {sorted(unknown)[0]!r:.40} among them")
        values: dict[str, Any] = {"status": _choice(entry, "status", _STATUSES)}
        values["status"] = Status(values["status"])
        values["shared_norm"] = _number(entry, "shared_norm")
        for name, options in _TEXTS.items():
            if name in entry:
                values[name] = _choice(entry, name, options)
        for name in (*_FLAGS, *_COUNTS, *_SIZES, *_WORST, "psnr", "leakage"):
            if name in entry:
                values[name] = _READERS[name](entry, name)
        disclosure = cls(**values)
        if disclosure.status.has_estimate != (disclosure.leakage is not None):
            raise RecordError(f"expected a leakage with an estimate and with nothing else, got {disclosure.status}")
        missing = [name for name in _ALWAYS if getattr(disclosure, name) is None]
        if disclosure.leakage is not None and missing:
            raise RecordError(f"expected {missing[0]} with an estimate, got none")
        return disclosure

    @property
    def _told_change_ratio(self) -> float | None:
        """Where it is the noise's law that limits what leaks, not the Jacobian, there is nothing to tell of that."""
        law = self.input_noise_leakage
        limited = law is not None and self.leakage is not None and law <= self.leakage.value
        return None if limited else self.change_ratio

    def applied(self, row: LeakageEstimate) -> LeakageEstimate:
        """Returns a row of the server with this disclosure in it, said to come from the client."""
        names = (*_TEXTS, "leakage", "psnr", *_FLAGS, *_COUNTS, *_SIZES, *_WORST)
        known = {} if self.leakage is None else {name: getattr(self, name) for name in names}
        return replace(
            row,
            status=self.status,
            source=Source.CLIENT,
            detail=joined(_DETAILS.get(self.status, ""), nonlinear_text(self._told_change_ratio)),
            required_noise_norm=(
                None
                if self.required_noise_std is None or self.update_dim is None
                else self.required_noise_std * math.sqrt(self.update_dim)
            ),
            **known,
        )


def rounded(value: float, rounding: str = ROUND_HALF_EVEN) -> float:
    """Returns a number with as many digits as may leave."""
    if not math.isfinite(value):
        return value
    return float(Context(prec=DIGITS, rounding=rounding).create_decimal(repr(float(value))))


def _choice(entry: Mapping[str, Any], name: str, options: tuple[str, ...]) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or value not in options:
        raise RecordError(f"expected {name} to be one of {', '.join(options)}, got {value!r:.80}")
    return str(value)


def _flag(entry: Mapping[str, Any], name: str) -> bool:
    value = entry.get(name)
    if not isinstance(value, bool):
        raise RecordError(f"expected {name} as a boolean, got {value!r:.80}")
    return value


def _count(entry: Mapping[str, Any], name: str) -> int:
    value: Any = entry.get(name)
    if type(value) is not int or not 0 <= value < 2**53:
        raise RecordError(f"expected {name} as a whole number in [0, 2**53), got {value!r:.80}")
    return value


def _index(entry: Mapping[str, Any], name: str) -> int:
    value = _count(entry, name)
    if value >= _MOST_EXAMPLES:
        raise RecordError(f"expected {name} below {_MOST_EXAMPLES}, got {value}")
    return value


def _number(entry: Mapping[str, Any], name: str) -> float:
    return _nonnegative(entry.get(name), name)


def _nonnegative(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1e30:  # NaN compares as false
        raise RecordError(f"expected a finite {name} >= 0 and at most 1e30, got {value!r:.80}")
    return float(value)


def _share(entry: Mapping[str, Any], name: str) -> float:
    value = _number(entry, name)
    if value > 1:
        raise RecordError(f"expected {name} in [0, 1], got {value:g}")
    return value


def _decibels(entry: Mapping[str, Any], name: str) -> float:
    value: Any = entry.get(name)
    if value == "Infinity":
        return math.inf
    if type(value) not in (int, float) or not -1e4 <= value <= 1e4:
        raise RecordError(f"expected {name} in decibels, got {value!r:.80}")
    return float(value)


def _interval(entry: Mapping[str, Any], name: str) -> Interval[float]:
    value = entry.get(name)
    if not isinstance(value, list) or len(value) != 3:
        raise RecordError(f"expected {name} as three numbers, got {value!r:.80}")
    lower, middle, upper = (_nonnegative(part, name) for part in value)
    if not lower <= middle <= upper <= 1:
        raise RecordError(f"expected {name} as an interval within [0, 1], got {value!r:.80}")
    return Interval(lower, middle, upper)


_READERS: dict[str, Callable[[Mapping[str, Any], str], Any]] = {
    **dict.fromkeys(_FLAGS, _flag),
    **dict.fromkeys(_COUNTS, _count),
    **dict.fromkeys(_WORST, _index),
    **dict.fromkeys(_SIZES, _number),
    **dict.fromkeys(_SHARES, _share),
    "psnr": _decibels,
    "leakage": _interval,
}
