"""The older API: its own strategies and clients, audited, in real runs; and what secure aggregation leaves to audit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.client import NumPyClient
from flwr.common import Code, FitIns, FitRes, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common import Status as FlowerStatus
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg
from torch import nn

from fl_privacy.audit import AuditSettings, Ledger, PublicExamples, Source, Status
from fl_privacy.errors import InvalidInputError
from fl_privacy.flower import AuditedClient
from fl_privacy.strategies import OlderInversionAudit

from .cases import batches_of, new_context, new_model, sgd

TESTS = Path(__file__).parents[1]
SETTINGS = AuditSettings(max_examples=2, prior_std=1.0, data_range=4.0)
NODES = (11, 12, 13)


class Trainer(NumPyClient):
    """What a quickstart of the older API holds."""

    def __init__(self, client: int, *, batch_norm: bool = False):
        self.client, self.batch_norm = client, batch_norm

    def fit(self, parameters, config):
        self.config = config
        model = new_model(batch_norm=self.batch_norm)
        arrays = dict(zip(model.state_dict(), map(torch.from_numpy, parameters), strict=True))
        model.load_state_dict(arrays)
        sgd(model, batches_of(self.client))
        return [value.numpy() for value in model.state_dict().values()], 4, {"loss": 1.0}

    def evaluate(self, parameters, config):
        return 0.5, 4, {"accuracy": 0.25}


class Proxy(ClientProxy):
    """A client in this process, behind the interface that strategies know."""

    def __init__(self, node: int, client):
        super().__init__(str(node))
        self.client = client.to_client()

    def fit(self, ins, timeout, group_id):
        return self.client.fit(ins)

    def evaluate(self, ins, timeout, group_id): ...
    def get_parameters(self, ins, timeout, group_id): ...
    def get_properties(self, ins, timeout, group_id): ...
    def reconnect(self, ins, timeout, group_id): ...


class Chosen(FedAvg):
    """FedAvg that asks a fixed list of clients."""

    def __init__(self, proxies):
        super().__init__(fit_metrics_aggregation_fn=lambda metrics: {"mean-loss": 1.0})
        self.proxies = proxies

    def configure_fit(self, server_round, parameters, client_manager):
        return [(proxy, FitIns(parameters, {"lr": 0.1})) for proxy in self.proxies]


def audited(node, **options):
    return AuditedClient(Trainer(node), new_context(node), **{"hand_over_batches": True, **options})


def own(node, **options):
    return AuditedClient(Trainer(node), new_context(node), model=new_model(), loss=nn.CrossEntropyLoss(), **options)


def run(clients, *, model=new_model, edit=lambda results: results, failures=(), **options):
    proxies = [Proxy(node, client) for node, client in zip(NODES, clients, strict=True)]
    defaults = {"ledger": None, "show": False, "settings": SETTINGS}
    strategy = OlderInversionAudit(
        Chosen(proxies), model=model(), loss=nn.CrossEntropyLoss(), **{**defaults, **options}
    )
    initial = ndarrays_to_parameters([value.numpy() for value in model().state_dict().values()])
    asked = strategy.configure_fit(1, initial, None)
    results = edit([(proxy, proxy.fit(ins, None, None)) for proxy, ins in asked])
    return strategy, strategy.aggregate_fit(1, results, list(failures))


def plain(nodes, *, batch_norm=False):
    model = new_model(batch_norm=batch_norm)
    initial = [value.numpy() for value in model.state_dict().values()]
    results = []
    for node in nodes:
        proxy = Proxy(node, Trainer(node, batch_norm=batch_norm))
        results.append((proxy, proxy.fit(FitIns(ndarrays_to_parameters(initial), {}), None, None)))
    return parameters_to_ndarrays(FedAvg().aggregate_fit(1, results, [])[0])


def row_of(strategy, node):
    (row,) = [row for row in strategy.audit.estimates if row.node_id == node]
    return row


class TestARound:
    @pytest.mark.parametrize(("source", "client"), [("trusted", audited), ("client", own)])
    def test_every_client_is_audited_and_the_model_is_plain_fedavgs(self, source, client):
        strategy, (parameters, metrics) = run([client(node) for node in NODES], source=source)
        for ours, theirs in zip(parameters_to_ndarrays(parameters), plain(NODES), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
        for node in NODES:
            row = row_of(strategy, node)
            assert (row.status, row.source, row.num_examples) == (Status.AUDITED, Source(source), 4)
            assert (row.client, row.detail) == (str(node), "")
            assert row.leakage.value > 0.9
        for proxy in strategy.strategy.proxies:  # the app saw its config as it was
            assert proxy.client.client.numpy_client.config == {"lr": 0.1}
        assert metrics["mean-loss"] == 1.0
        assert metrics["leakage-max"] == max(row.leakage.value for row in strategy.audit.estimates)

    def test_an_audit_at_public_examples_needs_nothing_of_a_client(self):
        rng = np.random.default_rng(0)
        public = PublicExamples(inputs=rng.normal(size=(24, 1, 4, 4)).astype(np.float32), labels=np.arange(24) % 3)
        strategy, _ = run([Trainer(node) for node in NODES], source="proxy", public=public)
        for node in NODES:
            row = row_of(strategy, node)
            assert (row.status, row.source) == (Status.APPROXIMATE, Source.PROXY)
            assert "learning rate" not in row.detail  # `lr` of the clients' config is found

    def test_what_the_inner_strategy_gets_is_what_the_clients_shared(self):
        seen = []

        class Watching(Chosen):
            def aggregate_fit(self, server_round, results, failures):
                seen.extend(results)
                return super().aggregate_fit(server_round, results, failures)

        proxies = [Proxy(node, audited(node)) for node in NODES]
        strategy = OlderInversionAudit(
            Watching(proxies), model=new_model(), loss=nn.CrossEntropyLoss(), ledger=None, show=False, settings=SETTINGS
        )
        initial = ndarrays_to_parameters([value.numpy() for value in new_model().state_dict().values()])
        asked = strategy.configure_fit(1, initial, None)
        strategy.aggregate_fit(1, [(proxy, proxy.fit(ins, None, None)) for proxy, ins in asked], [])
        assert [proxy.cid for proxy, _ in seen] == [str(node) for node in NODES]
        assert [result.metrics for _, result in seen] == [{"loss": 1.0}] * 3

    def test_running_statistics_travel_with_the_parameters(self):
        clients = [
            AuditedClient(Trainer(node, batch_norm=True), new_context(node), hand_over_batches=True) for node in NODES
        ]
        strategy, (parameters, _) = run(clients, model=lambda: new_model(batch_norm=True))
        assert {row.status for row in strategy.audit.estimates} == {Status.AUDITED}
        for ours, theirs in zip(parameters_to_ndarrays(parameters), plain(NODES, batch_norm=True), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)

    def test_a_client_that_is_not_wrapped_may_not_or_fails_is_a_row(self):
        refusing = AuditedClient(Trainer(NODES[1]), new_context(NODES[1]))
        failed = FitRes(FlowerStatus(Code.FIT_NOT_IMPLEMENTED, "no data"), ndarrays_to_parameters([]), 0, {})

        def drop(results):
            return results[:2]

        proxy = Proxy(NODES[2], audited(NODES[2]))
        strategy, (parameters, _) = run(
            [Trainer(NODES[0]), refusing, audited(NODES[2])], edit=drop, failures=[(proxy, failed), OSError("gone")]
        )
        statuses = [row_of(strategy, node).status for node in NODES]
        assert statuses == [Status.UNPROTECTED, Status.REFUSED, Status.CLIENT_ERROR]
        assert row_of(strategy, NODES[2]).detail.endswith("no data")
        assert parameters is not None

    def test_one_that_never_answers(self):
        strategy, _ = run([audited(node) for node in NODES], edit=lambda results: results[1:], failures=[OSError()])
        assert row_of(strategy, NODES[0]).status is Status.NO_REPLY

    @pytest.mark.parametrize(
        ("tensors", "detail"),
        [
            ([b"\x80\x04."], "others or not all"),
            ([b"junk"] * 4, "cannot be read"),
            ([], "others or not all"),
        ],
    )
    def test_bytes_of_a_hostile_client_are_left_out(self, tensors, detail):
        def hostile(results):
            results[0][1].parameters.tensors = tensors
            return results

        strategy, (parameters, _) = run([audited(node) for node in NODES], edit=hostile, on_audit_failure="exclude")
        row = row_of(strategy, NODES[0])
        assert (row.status, row.action) == (Status.INVALID_UPDATE, "excluded")
        assert detail in row.detail
        for ours, theirs in zip(parameters_to_ndarrays(parameters), plain(NODES[1:]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)

    def test_arrays_of_another_model_are_refused_before_a_client_trains(self):
        strategy = OlderInversionAudit(Chosen([]), model=new_model(), loss=nn.CrossEntropyLoss(), ledger=None)
        with pytest.raises(InvalidInputError, match="expected the 4 arrays of the model's state or its 4 parameters"):
            strategy.configure_fit(1, ndarrays_to_parameters([np.zeros(3)]), None)

    def test_evaluation_is_the_clients_own(self):
        client = audited(NODES[0])
        assert client.client.evaluate is not None
        assert OlderInversionAudit(
            Chosen([]), model=new_model(), loss=nn.CrossEntropyLoss(), ledger=None
        ).aggregate_evaluate(1, [], []) == (None, {})


def averaged(results):
    """What secure aggregation leaves: one mean in every reply."""
    shared = [parameters_to_ndarrays(result.parameters) for _, result in results]
    mean = ndarrays_to_parameters([np.mean(arrays, axis=0) for arrays in zip(*shared, strict=True)])
    for _, result in results:
        result.parameters = mean
    return results


class TestSecureAggregation:
    def test_a_server_that_asks_for_batches_says_that_there_is_only_an_aggregate(self):
        strategy, (parameters, _) = run([audited(node) for node in NODES], edit=averaged)
        for row in strategy.audit.estimates:
            assert (row.status, row.leakage, row.action) == (Status.AGGREGATE_ONLY, None, "passed")
        for ours, theirs in zip(parameters_to_ndarrays(parameters), plain(NODES), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)

    def test_clients_that_audit_themselves_are_audited_and_the_row_says_of_what(self):
        strategy, _ = run([own(node) for node in NODES], edit=averaged, source="client")
        for row in strategy.audit.estimates:
            assert (row.status, row.source) == (Status.AUDITED, Source.CLIENT)
            assert row.detail.startswith("aggregate only")
            assert row.leakage.value > 0.9


def test_a_whole_run_under_secagg(tmp_path):
    """`FedAvg` and `NumPyClient` in Flower's simulation engine, with SecAgg+'s own workflow and mod."""
    ledger = tmp_path / "ledger.db"
    environment = {
        **os.environ,
        "PYTHONPATH": str(TESTS),
        "FLWR_HOME": str(tmp_path),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "flower.older_simulated", str(ledger), "secure"]
    finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert finished.returncode == 0, finished.stderr[-4000:]
    with Ledger.open(ledger) as opened:
        assert opened.verify().ok
        rows = [entry.estimate for entry in opened.rows()]
    assert sorted((row.server_round, row.client) for row in rows) == [(r, str(c)) for r in (1, 2) for c in range(3)]
    assert {(row.status, row.source, row.action) for row in rows} == {(Status.AUDITED, Source.CLIENT, "passed")}
    assert all(row.detail.startswith("aggregate only") for row in rows)
