"""Executors: who runs audits. This one runs them in the calling process; `pool` has one that uses Ray."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from fl_privacy.audit.estimate import LeakageEstimate
from fl_privacy.audit.measure import audit_tasks
from fl_privacy.audit.replay import AuditContext
from fl_privacy.audit.task import Array, ClientUpdate


class Executor(ABC):
    """Runs the audits of a round. An executor may be used for many rounds, and is closed once."""

    @property
    @abstractmethod
    def num_workers(self) -> int:
        """Number of chunks that run at the same time."""

    @abstractmethod
    def run(
        self,
        context: AuditContext,
        params: Mapping[str, Array],
        chunks: Sequence[Sequence[ClientUpdate]],
        *,
        deadline: float,
    ) -> Iterator[list[LeakageEstimate]]:
        """Yields the rows of each chunk as it is done; what is not done at the deadline is left out.

        Args:
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

    def run(
        self,
        context: AuditContext,
        params: Mapping[str, Array],
        chunks: Sequence[Sequence[ClientUpdate]],
        *,
        deadline: float,
    ) -> Iterator[list[LeakageEstimate]]:
        """Yields the rows of each chunk in order, until the deadline."""
        for chunk in chunks:
            if time.monotonic() >= deadline:
                return
            yield audit_tasks(context, params, chunk, device=self._device, deadline=deadline)
