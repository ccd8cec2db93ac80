"""An executor that runs audits on Ray actors."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fl_privacy.allocation import keep_freed_memory
from fl_privacy.audit.executor import Executor, Job, R, T
from fl_privacy.audit.replay import AuditContext
from fl_privacy.audit.task import Array
from fl_privacy.errors import FLPrivacyError, InvalidInputError

_log = logging.getLogger(__name__)

_START_SECONDS = 120.0
"""How long workers may take to start: a torch import on a busy machine, not a wait for resources."""
_MAX_ATTEMPTS = 3
"""How often a chunk is tried: a worker that dies twice on the same chunk will die a third time."""


class AuditWorker:
    """The actor: holds the model and the loss, does the work of chunks on the device that Ray gave it."""

    def __init__(self, context: AuditContext, num_threads: int) -> None:
        import torch

        keep_freed_memory()
        torch.set_num_threads(num_threads)
        self._context = context
        has_gpu = bool(ray.get_gpu_ids()) and torch.cuda.is_available()
        self._device = "cuda" if has_gpu else "cpu"

    def device(self) -> str:
        """Returns the torch device on which this worker computes."""
        return self._device

    def work(self, job: Job[T, R], params: Mapping[str, Array], chunk: Sequence[T]) -> list[R]:
        """Returns the results of a chunk. Its deadline is the executor's, which ends workers that are late."""
        return job.do(self._context, params, chunk, self._device, math.inf)


@dataclass
class _Running(Generic[T]):
    worker: Any
    chunk: Sequence[T]
    attempt: int


class RayExecutor(Executor):
    """Runs audits on a pool of Ray actors.

    Inside a Flower simulation it attaches to the simulation's cluster; elsewhere it starts or joins one of its own.
    Actors are created when the first round is audited, not before: Flower sizes its own pool from the cluster's totals
    when the simulation starts. Audits run while clients are idle, so by default workers ask Ray for no CPU; asking for
    what the clients hold would wait forever, so what is free is looked at first.

    Args:
        num_workers: Actors.
        num_gpus: GPUs per actor, fractions too. Where none is free, workers run on CPU, and the log says so.
        num_cpus: CPUs that each actor reserves.
        address: Of a Ray cluster, for use outside a simulation. Default: `RAY_ADDRESS`, else a cluster of its own on
            this machine.

    Raises:
        InvalidInputError: A number is out of range.
    """

    def __init__(
        self, *, num_workers: int = 2, num_gpus: float = 0.0, num_cpus: float = 0.0, address: str | None = None
    ) -> None:
        if num_workers < 1 or num_gpus < 0 or num_cpus < 0:
            raise InvalidInputError(
                "expected num_workers >= 1, num_gpus >= 0 and num_cpus >= 0, "
                f"got {num_workers}, {num_gpus} and {num_cpus}"
            )
        self._wanted = num_workers
        self._num_gpus = num_gpus
        self._num_cpus = num_cpus
        self._address = address
        self._owns_cluster = False
        self._context: AuditContext | None = None
        self._context_ref: Any = None
        self._workers: list[Any] = []
        self._options: dict[str, Any] = {}
        self._num_threads = 1

    @property
    def num_workers(self) -> int:
        """Number of actors asked for."""
        return self._wanted

    @property
    def workers(self) -> list[Any]:
        """Handles of the actors that exist now."""
        return list(self._workers)

    def work(
        self,
        job: Job[T, R],
        context: AuditContext,
        params: Mapping[str, Array],
        chunks: Sequence[Sequence[T]],
        *,
        deadline: float,
    ) -> Iterator[list[R]]:
        """Yields the results of each chunk as workers finish. A dead worker's chunk is done by another."""
        if not chunks:
            return
        self._open(context)
        theta = ray.put(dict(params))  # once per round, however many chunks
        waiting = deque((chunk, 1) for chunk in chunks)
        idle = list(self._workers)
        running: dict[Any, _Running[T]] = {}
        try:
            while waiting or running:
                while waiting and idle:
                    (chunk, attempt), worker = waiting.popleft(), idle.pop()
                    running[worker.work.remote(job, theta, list(chunk))] = _Running(worker, chunk, attempt)
                left = deadline - time.monotonic()
                done, _ = ray.wait(list(running), num_returns=1, timeout=max(0.0, left))
                if not done:
                    return  # out of time; what is late is the caller's to report
                ended = running.pop(done[0])
                try:
                    results: list[R] = ray.get(done[0])
                except RayTaskError as error:  # the worker lives; it is the job that failed
                    idle.append(ended.worker)
                    results = _failed(job, ended.chunk, f"{type(error.cause).__name__}: {error.cause}")
                except RayError as error:
                    _log.warning("an audit worker died (%s); another does its work", _first_line(error))
                    idle.append(self._replace(ended.worker))
                    if ended.attempt < _MAX_ATTEMPTS:
                        waiting.append((ended.chunk, ended.attempt + 1))
                        continue
                    results = _failed(
                        job, ended.chunk, f"{_MAX_ATTEMPTS} workers died while working on it: {_first_line(error)}"
                    )
                else:
                    idle.append(ended.worker)
                yield results
        finally:
            # A worker that is still busy would hold up the next round.
            for late in running.values():
                self._replace(late.worker)

    def close(self) -> None:
        """Ends all actors, and the cluster if this executor started it."""
        if ray.is_initialized():  # else they are gone with their cluster, and ray.kill would start another
            for worker in self._workers:
                _kill(worker)
        self._workers, self._context, self._context_ref = [], None, None
        if self._owns_cluster and ray.is_initialized():
            ray.shutdown()
        self._owns_cluster = False

    def _open(self, context: AuditContext) -> None:
        if self._context is context and ray.is_initialized():
            return
        self.close()
        if not ray.is_initialized():
            # "local" rather than no address: the latter joins whatever cluster is left over on the machine.
            address = self._address or os.environ.get("RAY_ADDRESS") or "local"
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
            self._owns_cluster = True
        self._context_ref = ray.put(context)
        count = self._fit()
        self._num_threads = max(1, (os.cpu_count() or 1) // count)
        self._workers = self._create_spread(count)
        try:
            self._keep_started()
        except BaseException:
            self.close()
            raise
        self._context = context

    def _keep_started(self) -> None:
        """Waits for the workers, and goes on with those that started.

        Raises:
            FLPrivacyError: None did.
        """
        replies = {worker.device.remote(): worker for worker in self._workers}
        answered, _ = ray.wait(list(replies), num_returns=len(replies), timeout=_START_SECONDS)
        started: dict[Any, str] = {}
        for reply, worker in replies.items():
            try:
                if reply in answered:
                    started[worker] = ray.get(reply)
            except RayError as error:
                _log.warning("an audit worker did not start: %s", _first_line(error))
            if worker not in started:
                self._workers.remove(worker)
                _kill(worker)
        if not started and (self._options["num_gpus"] > 0 or self._options["num_cpus"] > 0):
            _log.warning(
                "audit workers reserve nothing, and run on CPU: no node has num_gpus=%g and num_cpus=%g free for one",
                self._options["num_gpus"],
                self._options["num_cpus"],
            )
            self._options |= {"num_gpus": 0.0, "num_cpus": 0.0}
            self._workers = self._create_spread(len(replies))
            self._keep_started()
            return
        if not started:
            raise FLPrivacyError(
                f"expected audit workers to start within {_START_SECONDS:g} s, none of {len(replies)} did: free "
                "resources of the Ray cluster, or ask for less with num_gpus and num_cpus"
            )
        if len(started) < len(replies):
            _log.warning("%d of %d audit workers started", len(started), len(replies))
        if self._options["num_gpus"] > 0 and "cuda" not in started.values():
            _log.warning("audit workers run on CPU: torch finds no GPU where Ray gave them num_gpus=%g", self._num_gpus)

    def _fit(self) -> int:
        """Looks at what is free and sets the actors' options so that they can be placed; returns how many fit."""
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        gpus, cpus = self._num_gpus, self._num_cpus
        if gpus > 0 and free.get("GPU", 0.0) < gpus:
            _log.warning(
                "audit workers run on CPU: each asks for num_gpus=%g, and %g of the cluster's GPUs are free",
                gpus,
                free.get("GPU", 0.0),
            )
            gpus = 0.0
        if cpus > 0 and free.get("CPU", 0.0) < cpus:
            _log.warning(
                "audit workers share the clients' CPUs: each asks for num_cpus=%g, and %g are free",
                cpus,
                free.get("CPU", 0.0),
            )
            cpus = 0.0
        count = self._wanted
        for name, share in (("GPU", gpus), ("CPU", cpus)):
            if share > 0:
                count = min(count, int(free[name] / share))
        if count < self._wanted:
            _log.warning("%d of %d audit workers fit into what is free in the cluster", count, self._wanted)
        # The model's class may live where only this process looks: in the folder of a Flower app.
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._options = {
            "num_gpus": gpus,
            "num_cpus": cpus,
            "runtime_env": {"env_vars": {"PYTHONPATH": path}},
            "max_restarts": 0,
        }
        return count

    def _create_spread(self, count: int) -> list[Any]:
        """Creates workers, those that reserve nothing in turn on every node: Ray might put all of them on one."""
        if self._options["num_gpus"] > 0 or self._options["num_cpus"] > 0:
            return [self._create() for _ in range(count)]
        # A soft affinity is one that Ray 2.55 does not always keep.
        nodes = itertools.islice(itertools.cycle(_computing_nodes()), count)
        return [self._create(NodeAffinitySchedulingStrategy(node, soft=False)) for node in nodes]

    def _create(self, place: NodeAffinitySchedulingStrategy | None = None) -> Any:
        options = self._options if place is None else {**self._options, "scheduling_strategy": place}
        return ray.remote(AuditWorker).options(**options).remote(self._context_ref, self._num_threads)

    def _replace(self, worker: Any) -> Any:
        _kill(worker)
        new = self._create()
        self._workers[self._workers.index(worker)] = new
        return new


def _kill(worker: Any) -> None:
    with contextlib.suppress(RayError):  # a handle of a cluster that was shut down
        ray.kill(worker)


def _computing_nodes() -> list[str]:
    """Returns the ids of the cluster's nodes, without those that are there to manage it (no CPU)."""
    everything: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node for node in everything if node["Alive"]]
    return [n["NodeID"] for n in nodes if n["Resources"].get("CPU", 0) > 0] or [n["NodeID"] for n in nodes]


def _failed(job: Job[T, R], chunk: Sequence[T], reason: str) -> list[R]:
    return [job.failed(task, reason) for task in chunk]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
