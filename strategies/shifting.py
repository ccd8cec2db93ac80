"""Shaped noise that the server puts on: a client's update replaced by the one that its training gives at x + a."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import RecordDict

from fl_privacy.audit.replay import AuditContext, update_at
from fl_privacy.audit.task import AuditTask, Numbers
from fl_privacy.flower.protection import InputAdvice, InputProtection


@dataclass(frozen=True, kw_only=True)
class Shifted:
    """An update at x + a, and what was measured of it.

    Attributes:
        update: u(x + a) by parameter name.
        rms: Of a, per element.
        change: ‖u(x + a) − u(x)‖.
        leakage: Of x + a, the most of any example that got noise; `None`: every one met its target without.
    """

    update: Mapping[str, Numbers]
    rms: float
    change: float
    leakage: float | None


class InputShifting:
    """Draws noise for the examples that clients hand over, keeps it by client and example, and trains on x + a."""

    def __init__(self) -> None:
        self._states: dict[str, RecordDict] = {}

    def shifted(
        self,
        context: AuditContext,
        params: Mapping[str, Numbers],
        task: AuditTask,
        advice: InputAdvice,
        generator: np.random.Generator,
    ) -> Shifted:
        """Returns the update at x + a of a client whose training was reproduced.

        Args:
            context: Of the audit.
            params: Global arrays of the round by name.
            task: The client's.
            advice: What noise.
            generator: Of the noise.
        """
        model = copy.deepcopy(context.model)
        model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in params.items()}, strict=False)
        state = self._states.setdefault(task.client, RecordDict())
        budget = context.settings.memory_budget
        protection = InputProtection(advice, state, None, generator, memory_budget=budget)
        given, labels = (torch.from_numpy(np.array(part)) for part in (task.given, task.labels))
        with protection.active():
            moved = protection.protect(model, given, labels, loss=context.loss, public=None, bounds=None).numpy()
        before = update_at(context, params, task, task.given)
        after = update_at(context, params, task, moved)
        return Shifted(
            update=after,
            rms=float(np.sqrt(np.mean(np.square(moved - task.given, dtype=np.float64)))),
            change=float(np.sqrt(sum(np.square(after[name] - before[name]).sum() for name in after))),
            leakage=protection.leakage,
        )
