"""Live metrics: what is told of each audited round, and who listens.

Names are imported on first use: TensorBoard and Prometheus come with extras of their own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fl_privacy.monitoring.callback import RoundCallback, RoundSummary, summarize
    from fl_privacy.monitoring.prometheus import PrometheusCallback
    from fl_privacy.monitoring.tensorboard import TensorBoardCallback

__all__ = ["PrometheusCallback", "RoundCallback", "RoundSummary", "TensorBoardCallback", "summarize"]

_HOMES = {
    "PrometheusCallback": "prometheus",
    "RoundCallback": "callback",
    "RoundSummary": "callback",
    "TensorBoardCallback": "tensorboard",
    "summarize": "callback",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
