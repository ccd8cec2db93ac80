"""Executors: who does the work of a round. This one does it in the calling process; `pool` has one that uses Ray."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from fl_privacy.audit.estimate import LeakageEstimate, Status
from fl_privacy.audit.measure import audit_tasks
from fl_privacy.audit.replay import AuditContext
from fl_privacy.audit.task import Array, ClientUpdate

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Job(Generic[T, R]):
    """What is done to the tasks of a round.

    Attributes:
        do: (context, global parameters, chunk, torch device name, deadline) -> a result per task of the chunk. It is a
            function of a module, which workers import. Where the deadline has passed, it says so in its results.
        failed: (task, reason) -> the result of a task whose chunk gave none.
    """

    do: Callable[[AuditContext, Mapping[str, Array], Sequence[T], str, float], list[R]]
    failed: Callable[[T, str], R]


def _audit(
    context: AuditContext, params: Mapping[str, Array], chunk: Sequence[ClientUpdate], device: str, deadline: float
) -> list[LeakageEstimate]:
    return audit_tasks(context, params, chunk, device=device, deadline=deadline)


def _not_audited(task: ClientUpdate, reason: str) -> LeakageEstimate:
    return task.row(Status.AUDIT_FAILED, detail=reason)


AUDIT = Job(do=_audit, failed=_not_audited)
"""The audit of clients, a row for each."""


class Executor(ABC):
    """Does the work of a round. An executor may be used for many rounds, and is closed once."""

    @property
    @abstractmethod
    def num_workers(self) -> int:
        """Number of chunks that run at the same time."""

    def run(
        self,
        context: AuditContext,
        params: Mapping[str, Array],
        chunks: Sequence[Sequence[ClientUpdate]],
        *,
        deadline: float,
    ) -> Iterator[list[LeakageEstimate]]:
        """Yields the rows of each chunk of clients as it is audited, as `work` does."""
        return self.work(AUDIT, context, params, chunks, deadline=deadline)

    @abstractmethod
    def work(
        self,
        job: Job[T, R],
        context: AuditContext,
        params: Mapping[str, Array],
        chunks: Sequence[Sequence[T]],
        *,
        deadline: float,
    ) -> Iterator[list[R]]:
        """Yields the results of each chunk as it is done; what is not done at the deadline is left out.

        Args:
            job: What to do.
            context: What all audits of the run have in common.
            params: Global parameters of the round.
            chunks: Tasks, each chunk for one pass.
            deadline: `time.monotonic()` at which to stop.
        """

    def close(self) -> None:  # noqa: B027 - an executor need not hold anything
        """Releases what the executor holds; it can be used again after."""


class SerialExecutor(Executor):
    """Runs audits one after the other in the calling process.

    The time limit is looked at before each product with a Jacobian.

    Args:
        device: A torch device name.
    """

    def __init__(self, *, device: str = "cpu") -> None:
        self._device = device

    @property
    def num_workers(self) -> int:
        """One."""
        return 1

    def work(
        self,
        job: Job[T, R],
        context: AuditContext,
        params: Mapping[str, Array],
        chunks: Sequence[Sequence[T]],
        *,
        deadline: float,
    ) -> Iterator[list[R]]:
        """Yields the results of each chunk in order, until the deadline."""
        for chunk in chunks:
            if time.monotonic() >= deadline:
                return
            yield job.do(context, params, chunk, self._device, deadline)
