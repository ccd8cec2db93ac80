"""Auditing: what is measured of a round, who computes it, and where it is written down.

Names are imported on first use: the ledger and the estimate work without torch, only the Ray pool needs Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fl_privacy.lazy import lazy_names

if TYPE_CHECKING:
    from fl_privacy.audit.auditor import Auditor
    from fl_privacy.audit.claims import Defence
    from fl_privacy.audit.estimate import LeakageEstimate, Source, Status
    from fl_privacy.audit.executor import Executor, SerialExecutor
    from fl_privacy.audit.ledger import Ledger
    from fl_privacy.audit.policy import Policy
    from fl_privacy.audit.pool import RayExecutor
    from fl_privacy.audit.public import PublicExamples
    from fl_privacy.audit.settings import AuditSettings
    from fl_privacy.audit.task import AuditTask, TrainingTrace

__all__ = [
    "AuditSettings",
    "AuditTask",
    "Auditor",
    "Defence",
    "Executor",
    "LeakageEstimate",
    "Ledger",
    "Policy",
    "PublicExamples",
    "RayExecutor",
    "SerialExecutor",
    "Source",
    "Status",
    "TrainingTrace",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AuditSettings": "settings",
        "AuditTask": "task",
        "Auditor": "auditor",
        "Defence": "claims",
        "Executor": "executor",
        "LeakageEstimate": "estimate",
        "Ledger": "ledger",
        "Policy": "policy",
        "PublicExamples": "public",
        "RayExecutor": "pool",
        "SerialExecutor": "executor",
        "Source": "estimate",
        "Status": "estimate",
        "TrainingTrace": "task",
    },
)
