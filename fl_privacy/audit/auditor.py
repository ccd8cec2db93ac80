"""The auditor: takes the tasks of a round, has them run, and returns a row for each."""

from __future__ import annotations

import logging
import math
import platform
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata

import numpy as np
from torch import nn

from fl_privacy.audit.estimate import LeakageEstimate, Status
from fl_privacy.audit.executor import Executor, Job, R, SerialExecutor, T
from fl_privacy.audit.public import PublicExamples
from fl_privacy.audit.replay import AuditContext
from fl_privacy.audit.settings import AuditSettings
from fl_privacy.audit.task import Array, AuditTask, ClientUpdate
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.update import Loss

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (clients audited, clients to audit) as a round's audit goes on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AuditedRound:
    """A round after its audit, with the private batches behind it: what pictures and further studies start from.

    Attributes:
        server_round: Round number.
        context: Model, loss and settings of the audit.
        params: Global arrays of the round by name.
        tasks: What was known of each client that could be audited at its own batch.
        rows: What was found, one per task, in order.
    """

    server_round: int
    context: AuditContext
    params: Mapping[str, Array]
    tasks: Sequence[AuditTask]
    rows: Sequence[LeakageEstimate]


_CLIENTS_PER_CHUNK = 8
"""Most clients in one pass: enough to fill it, few enough that progress and time limits mean something."""

_REPEATS = 8
"""Most times that the examples of a client fit into one of its mini-batches: drawing with replacement repeats some."""


class Auditor:
    """Audits the clients of one round after the other.

    Args:
        model: The model that clients train; only its structure and buffers are used.
        loss: (outputs, labels) -> scalar mean loss, the one that clients train with.
        settings: What to measure.
        executor: Who computes; serial in this process by default.
        time_limit: Seconds for the audit of one round, with what else is done in it (`work`).
        public: Public examples, for updates whose batch is not handed over.

    Raises:
        InvalidInputError: The time limit is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        settings: AuditSettings | None = None,
        executor: Executor | None = None,
        time_limit: float = 600.0,
        public: PublicExamples | None = None,
    ) -> None:
        if not time_limit > 0:
            raise InvalidInputError(f"expected time_limit > 0 seconds, got {time_limit}")
        self.settings = settings or AuditSettings()
        self._context = AuditContext(
            model=model, loss=loss, settings=self.settings, versions=_versions(), public=public
        )
        self._executor = executor or SerialExecutor()
        self._time_limit = time_limit
        self._deadline = math.inf

    def audit_round(
        self, params: Mapping[str, Array], tasks: Sequence[ClientUpdate], *, progress: Progress | None = None
    ) -> list[LeakageEstimate]:
        """Returns one row per task, in order; a task that is not done within the time limit gets a row that says so.

        Args:
            params: Global parameters of the round by name.
            tasks: What is known of each client; each client at most once.
            progress: Told how far the audit is.
        """
        if not tasks:
            return []
        tasks = [
            _bounded(task, self.settings.max_local_steps) if isinstance(task, AuditTask) else task for task in tasks
        ]
        context = self._context_for(tasks)
        rows: dict[tuple[int, str], LeakageEstimate] = {}
        self._deadline = deadline = time.monotonic() + self._time_limit
        try:
            for chunk_rows in self._executor.run(context, params, list(self._chunks(tasks)), deadline=deadline):
                rows.update({(row.node_id or 0, row.client): row for row in chunk_rows})
                if progress is not None:
                    progress(len(rows), len(tasks))
            missing, detail = Status.LATE, f"not audited within {self._time_limit:g} s"
        except Exception as error:  # an audit that cannot run must not end the training: the rows say why
            _log.exception("the audit of the round failed")
            missing, detail = Status.AUDIT_FAILED, f"{type(error).__name__}: {error}"
        return [
            rows.get((task.node_id, task.client))
            or replace(task.row(missing, detail=detail), settings=self.settings.to_dict(), versions=context.versions)
            for task in tasks
        ]

    def work(self, job: Job[T, R], params: Mapping[str, Array], tasks: Sequence[T]) -> Iterator[R]:
        """Yields what a job gives for tasks, in any order, in what the last round's audit left of its time limit.

        Args:
            job: What to do.
            params: Global parameters of the round by name.
            tasks: Each is done by itself. Those that are not done in time have no result.
        """
        if not tasks or time.monotonic() >= self._deadline:
            return
        for results in self._executor.work(job, self._context, params, [[t] for t in tasks], deadline=self._deadline):
            yield from results

    @property
    def context(self) -> AuditContext:
        """What all audits have in common; after the first audited round with the scales that were taken from it."""
        return self._context

    def close(self) -> None:
        """Releases the executor's workers."""
        self._executor.close()

    def _context_for(self, tasks: Sequence[ClientUpdate]) -> AuditContext:
        """Fills in the prior's scale and the data range, once, from the first round's inputs.

        Of what clients hand over the median counts, so that one client cannot set the scale for all. Where they hand
        over nothing, public examples say it.
        """
        settings = self._context.settings
        if settings.prior_std is None or settings.data_range is None:
            with np.errstate(over="ignore", invalid="ignore"):
                handed = [task.inputs for task in tasks if isinstance(task, AuditTask)]
                if not handed and self._context.public is not None:
                    handed = [self._context.public.inputs]
                spread = float(np.median([values.std(dtype=np.float64) for values in handed]))
                width = float(np.median([float(values.max()) - float(values.min()) for values in handed]))
            settings = replace(
                settings,
                prior_std=settings.prior_std or _scale(spread),
                data_range=settings.data_range or _scale(width),
            )
            self._context = replace(self._context, settings=settings)
        return self._context

    def _chunks(self, tasks: Sequence[ClientUpdate]) -> Iterator[list[ClientUpdate]]:
        """Cuts the tasks into chunks of one group, as even as possible, with work for every worker."""
        groups: dict[Hashable, list[ClientUpdate]] = {}
        for task in tasks:
            groups.setdefault(task.group, []).append(task)
        share = -(-len(tasks) // self._executor.num_workers)
        for group in groups.values():
            if not isinstance(group[0], AuditTask):
                yield group
                continue
            # A chunk that has begun may have to be finished: the longer the training, the fewer clients in one.
            steps = max(1, len(group[0].trace.batches))
            count = -(-len(group) // min(share, max(1, _CLIENTS_PER_CHUNK * 4 // max(4, steps))))
            for start in range(count):
                yield group[start::count]


def _bounded(task: AuditTask, max_steps: int) -> AuditTask:
    """Returns the task with a trace that is not longer than is replayed: what a client says costs it no effort."""
    batches = task.trace.batches
    largest = max(map(len, batches), default=0)
    problem = ""
    if len(batches) > max_steps:
        problem = f"{len(batches)} local steps, more than the {max_steps} that are replayed"
    elif largest > _REPEATS * len(task.inputs):
        problem = f"a mini-batch of {largest} of {len(task.inputs)} examples, each more than {_REPEATS} times"
    return replace(task, trace=replace(task.trace, batches=(), lr=(), problem=problem)) if problem else task


def _scale(measured: float) -> float:
    """Returns a measured scale, or 1 where it is none: inputs that are constant, or that a client made up."""
    return measured if 0 < measured < math.inf else 1.0


def _versions() -> dict[str, str]:
    names = ("fl-privacy", "torch", "flwr", "ray", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
