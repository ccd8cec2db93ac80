"""Leakage against noise: the part of a client's spectrum that a ledger row keeps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fl_privacy.interval import Interval

VERSION = 1
"""Of what `to_dict` writes."""

_NUMBERS = frozenset({int, float, bool})
_DIGITS = 4
"""Decimals of a leakage and significant digits of a noise level in a row."""


@dataclass(frozen=True, kw_only=True)
class LeakageCurve:
    """Leakage of a client's most exposed example at several noise levels, the other examples audited being below it.

    Attributes:
        noise_std: σ, standard deviation per parameter of isotropic noise on the shared update, ascending.
        lower: Bound from below of the leakage at each σ.
        value: Leakage at each σ.
        upper: Bound from above.
    """

    noise_std: tuple[float, ...]
    lower: tuple[float, ...]
    value: tuple[float, ...]
    upper: tuple[float, ...]

    def rmse(self, prior_std: float) -> tuple[float, ...]:
        """Returns the predicted error τ·√(1 − leakage) per input element at each σ, in units of the model's input."""
        return tuple(prior_std * math.sqrt(max(0.0, 1 - value)) for value in self.value)

    def noise_std_at(self, leakage: float) -> float:
        """Returns the σ at which the upper bound comes down to a leakage; 0 for one that is above the whole curve.

        Between two levels log σ is interpolated; below the curve's last bound nothing is known but its last σ.
        """
        pairs = list(zip(self.noise_std, self.upper, strict=True))
        if leakage > pairs[0][1]:
            return 0.0
        for (near, above), (far, below) in itertools.pairwise(pairs):
            if below <= leakage <= above:
                share = 1.0 if above == below else (above - leakage) / (above - below)
                return float(near ** (1 - share) * far**share)
        return pairs[-1][0]

    def most_noise_std_at(self, leakage: float) -> float:
        """Returns the first σ of the curve at which less than a leakage is left; infinite beyond its last one."""
        return min((s for s, u in zip(self.noise_std, self.upper, strict=True) if u < leakage), default=math.inf)

    def leakage_at(self, noise_std: float) -> float:
        """Returns the leakage at a noise level, log σ interpolated; beyond the curve's ends that of its ends."""
        pairs = list(zip(self.noise_std, self.value, strict=True))
        if noise_std <= pairs[0][0]:
            return pairs[0][1]
        for (near, above), (far, below) in itertools.pairwise(pairs):
            if near <= noise_std <= far:
                share = 1.0 if far == near else math.log(noise_std / near) / math.log(far / near)
                return (1 - share) * above + share * below
        return pairs[-1][1]

    def bounds_at(self, noise_std: float) -> Interval[float]:
        """Returns the leakage at a noise level between two bounds that hold: leakage falls with noise.

        They are those at the levels beside it; beyond the last one the lower bound is 0, before the first the upper 1.
        """
        upper = min((u for s, u in zip(self.noise_std, self.upper, strict=True) if s <= noise_std), default=1.0)
        lower = max((low for s, low in zip(self.noise_std, self.lower, strict=True) if s >= noise_std), default=0.0)
        return Interval(lower, min(max(self.leakage_at(noise_std), lower), upper), upper)

    def rounded(self) -> LeakageCurve:
        """Returns the curve in few digits, as rows hold it; the bounds are rounded outwards and still hold."""
        unit = 10.0**_DIGITS
        return LeakageCurve(
            noise_std=tuple(_short(sigma) for sigma in self.noise_std),
            lower=tuple(math.floor(bound * unit) / unit for bound in self.lower),
            value=tuple(round(value, _DIGITS) for value in self.value),
            upper=tuple(math.ceil(bound * unit) / unit for bound in self.upper),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the curve as it stands in a row."""
        return {"version": VERSION, **{name: list(part) for name, part in asdict(self).items()}}

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> LeakageCurve | None:
        """Returns the curve that `to_dict` wrote, `None` for a form that this version does not know.

        Raises:
            ValueError: The four lists are not equally long, or hold something else than finite numbers.
        """
        if written.get("version") != VERSION:
            return None
        parts = {name: _numbers(name, written.get(name)) for name in ("noise_std", "lower", "value", "upper")}
        if len({len(part) for part in parts.values()}) != 1:
            raise ValueError("expected as many bounds and values as noise levels in a leakage curve")
        return cls(**parts)


@dataclass(frozen=True, kw_only=True)
class ExampleLeakage:
    """What one audited example leaks.

    Attributes:
        index: Which of the examples that the client trained on this round.
        label: Its class, `None` where labels are no classes.
        leakage: At the noise that was observed.
        required_noise_std: Noise per parameter that would bring this example to the target.
    """

    index: int
    label: int | None
    leakage: float
    required_noise_std: float

    def rounded(self) -> ExampleLeakage:
        """Returns the same in few digits, as rows hold it."""
        return replace(self, leakage=_short(self.leakage), required_noise_std=_short(self.required_noise_std))

    def to_list(self) -> list[Any]:
        """Returns `[index, label, leakage, noise]`, as it stands in a row."""
        return [self.index, self.label, self.leakage, self.required_noise_std]

    @classmethod
    def from_list(cls, written: Sequence[Any]) -> ExampleLeakage:
        """Returns what `to_list` wrote.

        Raises:
            ValueError: There are not four entries of the right types.
        """
        if not (
            isinstance(written, Sequence)
            and len(written) == 4
            and isinstance(written[0], int)
            and isinstance(written[1], int | None)
        ):
            raise ValueError(f"expected [index, label, leakage, noise] of an example, got {written!r}")
        leakage, noise = _numbers("leakage and noise", written[2:])
        return cls(index=written[0], label=written[1], leakage=leakage, required_noise_std=noise)


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _numbers(name: str, values: object) -> tuple[float, ...]:
    # The few types that are there are checked, and not each value's: a ledger holds millions of them.
    if not (isinstance(values, list | tuple) and {*map(type, values)} <= _NUMBERS and all(map(math.isfinite, values))):
        raise ValueError(f"expected a list of finite numbers for {name}, got {values!r}")
    return tuple(map(float, values))
