"""What else a ledger says of a round: metrics of the global model, such as its accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

METRICS = "metrics"
"""What the status column of such an entry holds, where an estimate has its status."""

Origin = Literal["clients", "server"]


@dataclass(frozen=True, kw_only=True)
class RoundMetrics:
    """Metrics of one round: an entry in the ledger's chain beside the estimates.

    Attributes:
        server_round: The round after which they were measured; 0: before training.
        origin: Who measured them: the `clients`, as the inner strategy aggregated it, or the `server`.
        metrics: Numbers by name.
    """

    server_round: int
    origin: Origin
    metrics: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Returns the entry as strict JSON holds it; what is not finite, or not a number, is left out."""
        return {
            "server_round": self.server_round,
            "client": "",
            "status": METRICS,
            "source": self.origin,
            "leakage": None,
            "required_noise_std": None,
            "metrics": {
                name: value
                for name, value in self.metrics.items()
                if isinstance(value, int | float) and math.isfinite(value)
            },
        }

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> RoundMetrics:
        """Returns the entry that `to_dict` wrote.

        Raises:
            ValueError: It is none.
            KeyError: A part of it is missing.
        """
        metrics, origin = written["metrics"], written["source"]
        if written["status"] != METRICS or not isinstance(metrics, Mapping) or origin not in ("clients", "server"):
            raise ValueError(f"expected metrics of clients or server, got status {written['status']!r} of {origin!r}")
        return cls(server_round=written["server_round"], origin=origin, metrics=dict(metrics))
