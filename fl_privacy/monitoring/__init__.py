"""Live metrics: what is told of each audited round, and who listens.

Names are imported on first use: TensorBoard and Prometheus come with extras of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fl_privacy.lazy import lazy_names

if TYPE_CHECKING:
    from fl_privacy.monitoring.callback import RoundCallback, RoundSummary, summarize
    from fl_privacy.monitoring.prometheus import PrometheusCallback
    from fl_privacy.monitoring.tensorboard import TensorBoardCallback

__all__ = ["PrometheusCallback", "RoundCallback", "RoundSummary", "TensorBoardCallback", "summarize"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "PrometheusCallback": "prometheus",
        "RoundCallback": "callback",
        "RoundSummary": "callback",
        "TensorBoardCallback": "tensorboard",
        "summarize": "callback",
    },
)
