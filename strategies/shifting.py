"""Shaped noise that the server puts on: a client's update replaced by the one that its training gives at x + a.

What that takes, a spectrum and two runs of local training, is done where audits are, and within their time limit.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import WARNING

import numpy as np
import torch
from flwr.app import RecordDict
from flwr.supercore import log

from fl_privacy.audit.auditor import Auditor
from fl_privacy.audit.deadline import DeadlineError, check_time
from fl_privacy.audit.executor import Job
from fl_privacy.audit.replay import AuditContext, to_tensor, updates_at
from fl_privacy.audit.settings import Covariance
from fl_privacy.audit.task import Array, AuditTask, Numbers
from fl_privacy.flower.protection import InputAdvice, InputProtection

_SHAPING = 8
"""Public examples, at most, whose mean G shapes noise."""
_LATE = "it was not computed within the time limit"


@dataclass(frozen=True, kw_only=True, eq=False)
class ShiftTask:
    """A client whose update is to be replaced.

    Attributes:
        client: What was audited of it; its training was reproduced.
        advice: What noise.
        bounds: Lowest and highest valid input.
        state: With the noise that is kept for its examples.
        generator: Of new noise.
    """

    client: AuditTask
    advice: InputAdvice
    bounds: tuple[float, float] | None = None
    state: RecordDict
    generator: np.random.Generator


@dataclass(frozen=True, kw_only=True, eq=False)
class Shifted:
    """An update at x + a, and what was measured of it.

    Attributes:
        node_id: Flower's, of the client.
        update: u(x + a) by parameter name.
        rms: Of a, per element.
        change: ‖u(x + a) − u(x)‖.
        leakage: Of x + a, the most of any example; 1 where one met its target without noise.
        covariance: What shaped a.
        note: What was not as asked, for people.
        state: With the noise that is kept for the client's examples.
    """

    node_id: int
    update: Mapping[str, Numbers]
    rms: float
    change: float
    leakage: float
    covariance: Covariance
    note: str
    state: RecordDict


@dataclass(frozen=True, kw_only=True)
class NotShifted:
    """Why there is no update at x + a of a client."""

    node_id: int
    reason: str


def _shift(
    context: AuditContext, params: Mapping[str, Array], chunk: Sequence[ShiftTask], device: str, deadline: float
) -> list[Shifted | NotShifted]:
    results: list[Shifted | NotShifted] = []
    for task in chunk:
        try:
            results.append(_shifted(context, params, task, device, deadline))
        except DeadlineError:
            results.append(_not_shifted(task, _LATE))
        except Exception as error:
            results.append(_not_shifted(task, f"{type(error).__name__}: {error}"))
    return results


def _shifted(
    context: AuditContext, params: Mapping[str, Array], task: ShiftTask, device: str, deadline: float
) -> Shifted:
    model = copy.deepcopy(context.model)
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in params.items()}, strict=False)
    model.to(device)
    state = copy.deepcopy(task.state)  # what is kept changes only where all of this ends well
    protection = InputProtection(
        task.advice,
        state,
        None,
        task.generator,
        memory_budget=context.settings.memory_budget,
        before_pass=lambda: check_time(deadline),
    )
    trained_on = task.client.given
    given, labels = (torch.from_numpy(np.array(part)).to(device) for part in (trained_on, task.client.labels))
    shaping = None
    if context.public is not None:
        inputs, classes = context.public.chosen(context.settings.seed, most=_SHAPING)
        where = torch.device(device)
        shaping = (to_tensor(inputs, where, given.dtype), to_tensor(classes, where, given.dtype))
    with protection.active():
        moved = protection.protect(model, given, labels, loss=context.loss, public=shaping, bounds=task.bounds)
    check_time(deadline)
    shifted = moved.cpu().numpy()
    before, after = updates_at(context, params, task.client, (trained_on, shifted), device=device)
    check_time(deadline)
    return Shifted(
        node_id=task.client.node_id,
        update=after,
        rms=float(np.sqrt(np.mean(np.square(shifted - trained_on, dtype=np.float64)))),
        change=float(np.sqrt(sum(np.square(after[name] - before[name]).sum() for name in after))),
        leakage=protection.leakage,
        covariance=protection.covariance,
        note=protection.note,
        state=state,
    )


def _not_shifted(task: ShiftTask, reason: str) -> Shifted | NotShifted:
    return NotShifted(node_id=task.client.node_id, reason=reason)


_SHIFT = Job(do=_shift, failed=_not_shifted)


class InputShifting:
    """Draws noise for the examples that clients hand over, keeps it by client and example, and trains on x + a.

    Args:
        auditor: Who has it done, and has audited the round.
    """

    def __init__(self, auditor: Auditor) -> None:
        self._auditor = auditor
        self._states: dict[str, RecordDict] = {}

    def shifted(
        self,
        params: Mapping[str, Array],
        clients: Sequence[tuple[AuditTask, InputAdvice, np.random.Generator]],
        *,
        bounds: tuple[float, float] | None = None,
    ) -> dict[int, Shifted | NotShifted]:
        """Returns for each client, by node id, its update at x + a, or why there is none. Nothing is raised.

        Args:
            params: Global arrays of the round by name.
            clients: What was audited of each, what noise it is to get, and where that is drawn from.
            bounds: Lowest and highest valid input, to which x + a is moved.
        """
        tasks = [
            ShiftTask(
                client=task,
                advice=advice,
                bounds=bounds,
                state=self._states.setdefault(task.client, RecordDict()),
                generator=generator,
            )
            for task, advice, generator in clients
        ]
        found: dict[int, Shifted | NotShifted] = {}
        missing = _LATE
        try:
            for result in self._auditor.work(_SHIFT, params, tasks):
                found[result.node_id] = result
        except Exception as error:  # noise that cannot be drawn must not end the training
            log(WARNING, "shaped noise could not be drawn:\n%s", traceback.format_exc())
            missing = f"{type(error).__name__}: {error}"
        for task in tasks:
            result = found.setdefault(task.client.node_id, _not_shifted(task, missing))
            if isinstance(result, Shifted):
                self._states[task.client.client] = result.state
        return found
