"""Noise that the server advises a client to put on its update before it shares it, and how a client follows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from logging import WARNING
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.supercore import log

from fl_privacy.audit.task import Numbers
from fl_privacy.errors import RecordError

T = TypeVar("T")

ADVICE_KEY = "fl-privacy-advice"
"""Entry of a training message's config that carries the advice; the app never sees it."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Isotropic noise that brings the client's last update down to its target.

    Attributes:
        noise_std: σ per parameter, in units of the update.
        target_leakage: Leakage that this is for.
        parameters: Names of the trained parameters: buffers carry counters and variances, which noise would ruin.
        clip_norm: Norm that the update is clipped to before; `None`: it is not.
    """

    noise_std: float
    target_leakage: float
    parameters: tuple[str, ...]
    clip_norm: float | None = None

    @classmethod
    def take(cls, config: MutableMapping[str, Any]) -> Advice | None:
        """Removes the advice from a config and returns it; `None` if there is none.

        Raises:
            RecordError: It cannot be read. It is removed all the same.
        """
        advice = taken(config, ADVICE_KEY, cls._read)
        if advice is None:
            return None
        if not (math.isfinite(advice.noise_std) and advice.noise_std >= 0):
            raise RecordError(f"expected advice of finite noise >= 0, got {advice.noise_std}")
        if advice.clip_norm is not None and not (math.isfinite(advice.clip_norm) and advice.clip_norm > 0):
            raise RecordError(f"expected advice of a finite clip_norm > 0, got {advice.clip_norm}")
        return advice

    @classmethod
    def _read(cls, entries: Mapping[str, Any]) -> Advice:
        return cls(
            noise_std=float(entries["noise_std"]),
            target_leakage=float(entries["target_leakage"]),
            parameters=tuple(str(name) for name in entries["parameters"]),
            clip_norm=None if entries.get("clip_norm") is None else float(entries["clip_norm"]),
        )

    def entries(self) -> dict[str, str]:
        """Returns the entry that carries the advice in a config."""
        return {ADVICE_KEY: json.dumps(asdict(self))}

    def follow(self, arrays: ArrayRecord, sent: Mapping[str, Numbers], generator: np.random.Generator) -> ArrayRecord:
        """Returns the arrays with the noise on the trained parameters; names, shapes and types stay.

        Args:
            arrays: To share.
            sent: The global arrays by name, which an update is clipped beside.
            generator: Of the noise.

        Raises:
            RecordError: The arrays lack a trained parameter, or one is not of floating-point numbers.
        """
        missing = [name for name in self.parameters if name not in arrays]
        if missing:
            raise RecordError(f"expected {missing[0]} among the arrays to put noise on, got {list(arrays)[:5]}")
        if self.clip_norm is not None:
            arrays = clipped(arrays, sent, self.parameters, self.clip_norm)
        return noisy(arrays, self.parameters, self.noise_std, generator)


def taken(config: MutableMapping[str, Any], key: str, read: Callable[[Mapping[str, Any]], T]) -> T | None:
    """Removes advice, which is written as JSON, from a config and returns what is read of it; `None` if there is none.

    Raises:
        RecordError: It cannot be read. It is removed all the same.
    """
    written = config.pop(key, None)
    if written is None:
        return None
    try:
        return read(json.loads(written))
    except (ValueError, TypeError, LookupError, RecursionError, OverflowError) as error:
        raise RecordError(f"expected advice from the server, got {written!r:.80}") from error


def readable(take: Callable[[MutableMapping[str, Any]], T | None], config: MutableMapping[str, Any]) -> T | None:
    """Removes one kind of advice from a config and returns it; what cannot be read is none, and the log says so.

    Args:
        take: Of the kind: `Advice.take`, for one.
        config: As it arrived.
    """
    try:
        return take(config)
    except RecordError as error:
        log(WARNING, "fl_privacy: %s", error)
        return None


def clipped(
    arrays: ArrayRecord, sent: Mapping[str, Numbers], parameters: tuple[str, ...], clip_norm: float
) -> ArrayRecord:
    """Returns arrays whose change from those sent, in the named ones, is scaled down to a norm where it is larger.

    Raises:
        RecordError: Arrays do not fit together, or are not finite: nothing is clipped by what is not a number.
    """
    try:
        change = {name: arrays[name].numpy().astype(np.float64) - sent[name] for name in parameters}
    except (KeyError, ValueError, TypeError) as error:
        raise RecordError(f"expected the arrays that were sent, to clip their change: {error}") from error
    norm = math.sqrt(sum(float(np.square(part).sum()) for part in change.values()))
    if not math.isfinite(norm):
        raise RecordError("expected a finite update to clip, got NaN or infinity")
    factor = min(1.0, clip_norm / norm) if norm > 0 else 1.0
    return with_update(arrays, sent, change, factor)


def with_update(
    arrays: ArrayRecord, sent: Mapping[str, Numbers], update: Mapping[str, Numbers], scale: float
) -> ArrayRecord:
    """Returns arrays in which the named ones are those that were sent plus so much of an update; types stay."""
    changed = {name: (sent[name] + scale * part).astype(arrays[name].numpy().dtype) for name, part in update.items()}
    return _replaced(arrays, changed)


def noisy(
    arrays: ArrayRecord, parameters: tuple[str, ...], noise_std: float, generator: np.random.Generator
) -> ArrayRecord:
    """Returns arrays with independent N(0, σ²) on every entry of the named ones.

    Raises:
        RecordError: One of them is not of floating-point numbers, or cannot hold the noise.
    """
    changed = {}
    for name in parameters:
        array = arrays[name].numpy()
        if not np.issubdtype(array.dtype, np.floating):
            raise RecordError(f"expected floating-point numbers in {name} to put noise on, got {array.dtype}")
        with np.errstate(over="ignore"):
            perturbed = (array + noise_std * generator.standard_normal(array.shape)).astype(array.dtype)
        if not np.isfinite(perturbed).all():
            raise RecordError(f"noise of {noise_std:.3g} is more than {array.dtype} holds in {name}")
        changed[name] = perturbed
    return _replaced(arrays, changed)


def _replaced(arrays: ArrayRecord, changed: Mapping[str, Numbers]) -> ArrayRecord:
    return ArrayRecord({name: Array(changed[name]) if name in changed else array for name, array in arrays.items()})
