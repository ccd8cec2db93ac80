"""What the server asks of a client's mod: entries of a training message's config, which the app never sees."""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from fl_privacy.audit.settings import AuditSettings
from fl_privacy.errors import FLPrivacyError, RecordError
from fl_privacy.flower.disclosure import rounded
from fl_privacy.flower.options import ClientOptions
from fl_privacy.flower.records import BATCHES, ESTIMATE, REQUEST_KEY

SETTINGS_KEY = "fl-privacy-settings"
"""Entry by which the server says what an estimate is to be of."""

_ASKED = (
    "unit",
    "target_leakage",
    "prior_std",
    "data_range",
    "ridge",
    "max_examples",
    "batch_norm",
    "relu_width",
    "seed",
)
"""Settings that are the server's to choose. How exactly and how long to compute is the client's."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for a report.

    Attributes:
        kind: `batches`, `estimate` or `claim`.
        settings: For an estimate, JSON of what it is to be of.
    """

    kind: str = BATCHES
    settings: str = ""

    @classmethod
    def for_estimate(cls, settings: AuditSettings) -> Request:
        """Returns the request for a client's own estimate, of what the server's settings say."""
        chosen = {name: value for name, value in settings.to_dict().items() if name in _ASKED}
        return cls(kind=ESTIMATE, settings=json.dumps(chosen))

    @classmethod
    def take(cls, config: MutableMapping[str, Any]) -> Request | None:
        """Removes the request from a config and returns it; `None` if there is none."""
        kind, settings = config.pop(REQUEST_KEY, None), config.pop(SETTINGS_KEY, "")
        return None if kind is None else cls(kind=str(kind), settings=str(settings))

    def entries(self) -> dict[str, str]:
        """Returns the entries that carry the request in a config."""
        return {REQUEST_KEY: self.kind} | ({SETTINGS_KEY: self.settings} if self.settings else {})

    @property
    def fixed(self) -> dict[str, Any]:
        """What an estimate must be of, as the client will round it when it tells: the scales only where one was set."""
        asked = json.loads(self.settings or "{}")
        return {
            name: rounded(value) if isinstance(value, float) else value
            for name in ("unit", "target_leakage", "prior_std")
            if (value := asked.get(name)) is not None
        }

    def settings_for(self, options: ClientOptions) -> AuditSettings:
        """Returns settings of an audit on the client: what the server asks, at no more than the client allows.

        Raises:
            RecordError: The server's part cannot be read.
        """
        try:
            asked = json.loads(self.settings or "{}")
            chosen = {name: value for name, value in asked.items() if name in _ASKED}
            most = min(int(chosen.pop("max_examples", options.max_examples)), options.max_examples)
            return AuditSettings(**chosen, max_examples=most, memory_budget=options.memory_budget)
        except (ValueError, TypeError, AttributeError, RecursionError, OverflowError, FLPrivacyError) as error:
            raise RecordError(f"expected settings of an audit from the server, got {self.settings[:80]!r}") from error
