"""Settings of studies: frozen dataclasses whose fields say what they mean and what they may be.

From them come the options of a study's command, the checks, and the file that tells a resumed study from another one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from fl_privacy.audit.settings import RELU_WIDTH
from fl_privacy.errors import InvalidInputError

T = TypeVar("T")


def option(
    default: T, help: str, *, minimum: float | None = None, above: float | None = None, recorded: bool = True
) -> T:
    """Returns a field of a settings dataclass.

    Args:
        default: Its default.
        help: What it means, one sentence.
        minimum: The least that it, or each of its elements, may be.
        above: What it, or each of its elements, must exceed.
        recorded: Whether results depend on it, so that a study with another value is another study.
    """
    metadata = {"help": help, "minimum": minimum, "above": above, "recorded": recorded}
    value: T = field(default=default, metadata=metadata)
    return value


def device_option(*, recorded: bool = False) -> str:
    """Returns the field that says where tensors are; rounding aside, seconds are all that depends on it."""
    return option("cpu", "Where to compute: cpu, cuda, cuda:1 or whatever torch can use here.", recorded=recorded)


def relu_width_option() -> float:
    """Returns the field that says whose J predictions take; attacks are on the network as it is."""
    return option(
        RELU_WIDTH, "Width of rounded ReLUs in predictions, as audits have it; 0: the network's own J.", minimum=0
    )


@dataclass(frozen=True)
class Setting:
    """One field of a settings dataclass.

    Attributes:
        name: Of the field.
        kind: `int`, `float`, `str` or `bool`, of the field or of each of its elements.
        several: Whether the field is a tuple.
        choices: All values that it may have; empty where its type does not say.
        default: Its default.
        help: What it means.
        minimum: The least that it may be, if anything.
        above: What it must exceed, if anything.
        recorded: Whether results depend on it.
    """

    name: str
    kind: type
    several: bool
    choices: tuple[str, ...]
    default: Any
    help: str
    minimum: float | None
    above: float | None
    recorded: bool

    def check(self, value: object) -> None:
        """Raises InvalidInputError where the value, or an element of it, is not allowed."""
        elements = value if self.several and isinstance(value, tuple) else (value,)
        if not elements:
            raise InvalidInputError(f"expected {self.name} to name at least one value, got none")
        for element in elements:
            self._check_element(element)

    def _check_element(self, value: object) -> None:
        kinds = (int, float) if self.kind is float else (self.kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.kind is not bool):
            raise InvalidInputError(f"expected {self.name} of type {self.kind.__name__}, got {value!r}")
        if self.choices and value not in self.choices:
            raise InvalidInputError(f"expected {self.name} to be one of {', '.join(self.choices)}, got {value!r}")
        if isinstance(value, int | float):
            if not math.isfinite(value):
                raise InvalidInputError(f"expected a finite {self.name}, got {value}")
            if self.minimum is not None and value < self.minimum:
                raise InvalidInputError(f"expected {self.name} >= {self.minimum:g}, got {value}")
            if self.above is not None and value <= self.above:
                raise InvalidInputError(f"expected {self.name} > {self.above:g}, got {value}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings: checks every field against what `option` allows.

    Raises:
        InvalidInputError: A value is of another type, or out of range.
    """

    def __post_init__(self) -> None:
        for setting in settings_of(type(self)):
            setting.check(getattr(self, setting.name))


def settings_of(kind: type[Settings]) -> Iterator[Setting]:
    """Yields the fields of a settings dataclass, all of which `option` made."""
    hints = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint, metadata = hints[item.name], item.metadata
        several = get_origin(hint) is tuple
        inner = get_args(hint)[0] if several else hint
        choices = get_args(inner) if get_origin(inner) is Literal else ()
        yield Setting(
            name=item.name,
            kind=str if choices else inner,
            several=several,
            choices=choices,
            default=item.default,
            help=metadata["help"],
            minimum=metadata["minimum"],
            above=metadata["above"],
            recorded=metadata["recorded"],
        )


def claim_folder(folder: Path, name: str, settings: Settings) -> None:
    """Writes settings.json into a study's folder; one that is there must say the same, once there are results.

    Raises:
        InvalidInputError: The folder holds results of other settings, or of unknown ones.
    """
    path = folder / "settings.json"
    values = {s.name: getattr(settings, s.name) for s in settings_of(type(settings)) if s.recorded}
    text = json.dumps({"study": name, "settings": values}, indent=2)
    if path.exists():
        complaint = _complaint(path, text)
        if not complaint:
            return
        if _has_rows(folder / "results.csv"):
            raise InvalidInputError(complaint)
    elif (folder / "results.csv").exists():
        raise InvalidInputError(f"expected {path} beside its results.csv: name another folder with -o, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def _has_rows(results: Path) -> bool:
    return results.exists() and len(results.read_text().splitlines()) > 1


def _complaint(path: Path, text: str) -> str:
    """Returns how written settings differ from others; empty if they do not."""
    advice = "name another folder with -o, or remove this one"
    wanted = json.loads(text)
    try:
        there = json.loads(path.read_text())
        name, values = there["study"], dict(there["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"expected the settings of a study in {path}, got something else: {advice}") from error
    if name != wanted["study"]:
        return f"expected a folder of the study {wanted['study']!r}, {path} is of {name!r}: {advice}"
    asked = wanted["settings"]
    differing = sorted(key for key in {*values, *asked} if values.get(key) != asked.get(key))
    changes = ", ".join(f"{key} {values.get(key)} there and {asked.get(key)} now" for key in differing)
    return f"expected the settings in {path}, got others ({changes}): {advice}" if differing else ""
