"""An audit on the device that holds the data, within a budget of its owner's."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from fl_privacy.audit.auditor import Auditor
from fl_privacy.audit.estimate import LeakageEstimate, Status
from fl_privacy.audit.executor import SerialExecutor
from fl_privacy.audit.settings import AuditSettings
from fl_privacy.audit.task import Array, AuditTask
from fl_privacy.influence.update import Loss


def self_audit(
    model: nn.Module,
    loss: Loss,
    params: Mapping[str, Array],
    task: AuditTask,
    *,
    settings: AuditSettings,
    time_limit: float,
    device: str = "cpu",
) -> LeakageEstimate:
    """Returns the row of one client, audited in this process and thread, for as many examples as the time allows.

    One example is audited first, which tells how many more fit; if it alone does not fit, the row says `late`.

    Args:
        model: The model that was trained; only its structure is used.
        loss: (outputs, labels) -> scalar mean loss.
        params: Global parameters by name.
        task: Update and batch of this client.
        settings: What to measure; its `memory_budget` bounds the graphs that are kept.
        time_limit: Seconds.
        device: A torch device name.
    """
    deadline = time.monotonic() + time_limit

    def audited(most: int) -> LeakageEstimate:
        auditor = Auditor(
            model,
            loss,
            settings=replace(settings, max_examples=most),
            executor=SerialExecutor(device=device),
            time_limit=max(deadline - time.monotonic(), 1e-3),
        )
        return auditor.audit_round(params, [task])[0]

    most = min(settings.max_examples, len(task.inputs))
    if settings.unit == "batch" or most == 1:
        return audited(settings.max_examples)
    started = time.monotonic()
    first = audited(1)
    now = time.monotonic()
    # Examples share a pass, so together they take less than this.
    fitting = int((deadline - now) / max(now - started, 1e-3))
    if not first.status.has_estimate or fitting < 2:
        return first
    all_that_fit = audited(min(most, fitting))
    return first if all_that_fit.status is Status.LATE else all_that_fit
