"""The pool on real Ray: the same numbers, workers that die, hang or find no place, and nothing left behind.

Starting a worker takes seconds, so the first class is one story on one pool; its tests run in order.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import replace

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import nn

from fl_privacy.audit import Auditor, AuditSettings, RayExecutor, SerialExecutor, Status
from fl_privacy.audit import pool as pool_module
from fl_privacy.errors import InvalidInputError

from .cases import new_model, new_task, noisy, params_of
from .trouble import DIES, HANGS, TroubledModel, place_of

LOGGER = "fl_privacy.audit.pool"
STORE = 100 * 2**20


@pytest.fixture(scope="module")
def cluster():
    """One cluster for the tests that need no other: 2 CPUs, and a GPU in name only."""
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=STORE,
    )
    yield
    ray.shutdown()


def new_auditor(model, executor, *, time_limit=100.0, **settings):
    defaults = {"max_examples": 1, "prior_std": 1.0, "data_range": 2.0}
    return Auditor(
        model,
        nn.CrossEntropyLoss(),
        settings=AuditSettings(**{**defaults, **settings}),
        executor=executor,
        time_limit=time_limit,
    )


def marked(task, mark):
    inputs = task.inputs.copy()
    inputs[0, 0, 0, 0] = mark
    return replace(task, inputs=inputs)


def places(executor):
    return ray.get([worker.__ray_call__.remote(place_of) for worker in executor.workers])


def wait_until(holds, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def is_running(pid):
    return os.path.exists(f"/proc/{pid}")


def can_place_on(node):
    """Whether the cluster knows the node well enough to place something there: a new one takes a moment."""
    there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    try:
        return ray.get(ray.remote(num_cpus=0)(lambda: True).options(scheduling_strategy=there).remote())
    except ray.exceptions.RayError:
        return False


class Pool:
    """Two workers, and a model that makes trouble in them."""

    def __init__(self, hung):
        self.hung = hung
        self.model = TroubledModel(hung)
        self.executor = RayExecutor(num_workers=2)
        self.auditor = new_auditor(self.model, self.executor, max_examples=2)

    def tasks(self, **marks):
        """Three clients of different shapes, so that each is a chunk of its own; some marked."""
        tasks = [new_task(self.model, client=c, count=2 + c) for c in range(3)]
        for client, mark in marks.items():
            index = int(client.removeprefix("client"))
            tasks[index] = marked(tasks[index], mark)
        return tasks

    def audit(self, tasks, *, time_limit=100.0, **options):
        self.auditor._time_limit = time_limit
        return self.auditor.audit_round(params_of(self.model), tasks, **options)


@pytest.fixture(scope="module")
def pool(cluster, tmp_path_factory):
    pool = Pool(tmp_path_factory.mktemp("pool") / "hung")
    yield pool
    pool.executor.close()


class TestOnePool:
    def test_ray_and_serial_give_the_same_rows_and_theta_is_put_once_a_round(self, pool, monkeypatch):
        put, real, seen = [], ray.put, []
        monkeypatch.setattr(ray, "put", lambda value: put.append(type(value).__name__) or real(value))
        assert pool.executor.workers == []  # nothing is started before there is something to audit
        tasks = [replace(t, shared=noisy(t.shared, 1e-3, seed=i)) for i, t in enumerate(pool.tasks())]
        tasks[1] = replace(tasks[1], labels=tasks[1].labels + 10)
        rows = pool.audit(tasks, progress=lambda done, total: seen.append((done, total)))
        serial = new_auditor(pool.model, SerialExecutor(), max_examples=2).audit_round(params_of(pool.model), tasks)
        assert [row.status for row in rows] == [Status.AUDITED, Status.AUDIT_FAILED, Status.AUDITED]
        for ours, theirs in zip(rows, serial, strict=True):
            assert (ours.client, ours.status, ours.detail) == (theirs.client, theirs.status, theirs.detail)
            if ours.leakage is not None:
                assert tuple(ours.leakage) == pytest.approx(tuple(theirs.leakage), rel=1e-5)
                for name in ("leakage_mean", "rmse", "i2f", "lower_bound", "required_noise_std", "noise_std"):
                    assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-5), name
        assert seen == [(1, 3), (2, 3), (3, 3)]
        pool.audit(pool.tasks())
        assert put == ["AuditContext", "dict", "dict"]
        assert len(pool.executor.workers) == 2

    def test_a_worker_that_is_killed_mid_audit_is_replaced_and_every_row_arrives(self, pool, caplog):
        pool.audit(pool.tasks())
        before = pool.executor.workers

        def kill_the_sleeper():
            wait_until(lambda: pool.hung.exists() and pool.hung.read_text())
            sleeper = int(pool.hung.read_text())
            os.kill(sleeper, 9)

        killer = threading.Thread(target=kill_the_sleeper)
        killer.start()
        with caplog.at_level(logging.WARNING, LOGGER):
            rows = pool.audit(pool.tasks(client1=HANGS))
        killer.join()
        assert [row.leakage is not None for row in rows] == [True, True, True]
        assert "an audit worker died" in caplog.text
        assert len(set(pool.executor.workers) & set(before)) == 1

    def test_what_hangs_is_late_its_worker_is_ended_and_the_next_round_is_not_late(self, pool):
        pool.audit(pool.tasks())
        pool.hung.unlink()
        rows = pool.audit(pool.tasks(client1=HANGS), time_limit=5.0)
        assert [row.status for row in rows] == [Status.AUDITED, Status.LATE, Status.AUDITED]
        assert rows[1].detail == "not audited within 5 s"
        sleeper = int(pool.hung.read_text())
        wait_until(lambda: not is_running(sleeper))
        rows = pool.audit(pool.tasks(client1=HANGS))
        assert [row.leakage is not None for row in rows] == [True, True, True]

    def test_a_client_that_kills_every_worker_fails_alone(self, pool):
        rows = pool.audit(pool.tasks(client1=DIES))
        assert [row.status for row in rows] == [Status.AUDITED, Status.AUDIT_FAILED, Status.AUDITED]
        assert "3 workers died while working on it" in rows[1].detail
        assert {row.status for row in pool.audit(pool.tasks())} == {Status.AUDITED}

    def test_no_worker_is_left_when_it_is_closed_and_the_cluster_is(self, pool):
        pids = [pid for _, pid in places(pool.executor)]
        assert all(map(is_running, pids))
        pool.executor.close()
        pool.executor.close()
        assert pool.executor.workers == []
        wait_until(lambda: not any(map(is_running, pids)))
        assert ray.is_initialized()  # it was not ours to end


@pytest.mark.usefixtures("cluster")
class TestResources:
    def audit_with(self, executor, caplog):
        """Audits one client, closes the executor, and returns the row and the number of its workers."""
        model = new_model()
        try:
            with caplog.at_level(logging.WARNING, LOGGER):
                (row,) = new_auditor(model, executor).audit_round(params_of(model), [new_task(model)])
            return row, len(executor.workers)
        finally:
            executor.close()

    def test_a_gpu_in_name_only_is_shared_and_the_audit_runs_on_cpu_with_one_line(self, caplog):
        row, workers = self.audit_with(RayExecutor(num_workers=3, num_gpus=0.5), caplog)
        assert (row.status, row.device, workers) == (Status.AUDITED, "cpu", 2)
        about_fit, about_gpu = caplog.messages
        assert about_fit == "2 of 3 audit workers fit into what is free in the cluster"
        assert about_gpu.startswith("audit workers run on CPU: torch finds no GPU")
        wait_until(lambda: ray.available_resources().get("GPU") == 1)

    def test_what_is_not_free_is_not_waited_for_and_each_is_said_once(self, caplog):
        @ray.remote(num_cpus=2)
        class Client:
            def ready(self):
                return True

        client = Client.remote()
        try:
            assert ray.get(client.ready.remote())
            row, workers = self.audit_with(RayExecutor(num_workers=1, num_cpus=1, num_gpus=4), caplog)
        finally:
            ray.kill(client)
        assert (row.status, row.device, workers) == (Status.AUDITED, "cpu", 1)
        about_gpu, about_cpu = caplog.messages
        assert about_gpu.startswith("audit workers run on CPU: each asks for num_gpus=4, and 1 of")
        assert about_cpu.startswith("audit workers share the clients' CPUs: each asks for num_cpus=1, and 0 are free")

    @pytest.mark.parametrize("options", [{"num_workers": 0}, {"num_gpus": -0.5}, {"num_cpus": -1}])
    def test_numbers_out_of_range_are_refused(self, options):
        with pytest.raises(InvalidInputError, match="expected num_workers >= 1"):
            RayExecutor(**options)


class TestClusters:
    @pytest.fixture(autouse=True)
    def _no_cluster(self, monkeypatch):
        ray.shutdown()
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        yield
        ray.shutdown()

    def test_its_own_is_started_and_ended(self):
        model, executor = new_model(), RayExecutor(num_workers=1)
        assert not ray.is_initialized()
        rows = new_auditor(model, executor).audit_round(params_of(model), [new_task(model)])
        assert [row.status for row in rows] == [Status.AUDITED]
        assert ray.is_initialized()
        executor.close()
        assert not ray.is_initialized()

    def test_two_nodes_share_the_work_and_what_fits_on_neither_falls_back(self, monkeypatch, caplog):
        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            second = cluster.add_node(num_cpus=1, object_store_memory=STORE)
            cluster.connect()
            wait_until(lambda: can_place_on(second))
            ray.shutdown()
            monkeypatch.setenv("RAY_ADDRESS", cluster.address)
            model, executor = new_model(), RayExecutor(num_workers=2)
            tasks = [new_task(model, client=c, count=1 + c) for c in range(4)]
            auditor = new_auditor(model, executor)
            rows = auditor.audit_round(params_of(model), tasks)
            assert [(row.status, row.detail) for row in rows] == [(Status.AUDITED, "")] * 4
            nodes = {node for node, _ in places(executor)}
            assert nodes == {cluster.head_node.node_id, second.node_id}

            cluster.remove_node(second)  # its worker is lost, and the other's node does its work
            rows = auditor.audit_round(params_of(model), tasks)
            assert [(row.status, row.detail) for row in rows] == [(Status.AUDITED, "")] * 4
            assert {node for node, _ in places(executor)} == {cluster.head_node.node_id}

            cluster.add_node(num_cpus=1, object_store_memory=STORE)
            wait_until(lambda: ray.available_resources().get("CPU") == 2)
            # Two CPUs are free, one on each node: there is no place for a worker that wants both.
            monkeypatch.setattr(pool_module, "_START_SECONDS", 12.0)
            greedy = RayExecutor(num_workers=1, num_cpus=2)
            with caplog.at_level(logging.WARNING, LOGGER):
                rows = new_auditor(model, greedy).audit_round(params_of(model), tasks[:1])
            assert [row.status for row in rows] == [Status.AUDITED]
            assert "audit workers reserve nothing" in caplog.text

            ray.shutdown()  # the cluster is lost: there is nothing to end, and nothing must be started for it
            executor.close()
            greedy.close()
            assert not ray.is_initialized()
        finally:
            ray.shutdown()
            cluster.shutdown()
