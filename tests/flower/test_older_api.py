"""The older API: its own strategies and clients, audited, in real runs; and what secure aggregation leaves to audit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.client import NumPyClient
from flwr.common import Code, EvaluateIns, EvaluateRes, FitIns, FitRes, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common import Status as FlowerStatus
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg
from torch import nn

from fl_privacy.audit import AuditSettings, Ledger, Policy, PublicExamples, Source, Status
from fl_privacy.errors import InvalidInputError, RecordError
from fl_privacy.flower import AuditedClient, protected_inputs, record_batches
from fl_privacy.flower.advice import ADVICE_KEY, Advice
from fl_privacy.flower.older_api import NAMES_KEY, take_report
from fl_privacy.flower.protection import KeptNoise
from fl_privacy.flower.records import REQUEST_KEY, decode_report
from fl_privacy.flower.request import Request
from fl_privacy.strategies import OlderInversionAudit

from .cases import LR, batches_of, new_context, new_model, step
from .test_policies import PARAMETERS, assert_noise, flat

TESTS = Path(__file__).parents[1]
TARGET = 0.4
SETTINGS = AuditSettings(max_examples=2, prior_std=1.0, data_range=4.0, target_leakage=TARGET)
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
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for inputs, labels in record_batches(batches_of(self.client)):
            step(model, optimizer, (protected_inputs(model, inputs, labels), labels))
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

    @pytest.mark.parametrize("weight", [-8, 0, 2**60])
    def test_a_weight_that_would_end_the_run_or_decide_it_alone_is_left_out(self, weight):
        def hostile(results):
            results[0][1].num_examples = weight
            return results

        strategy, (parameters, _) = run([audited(node) for node in NODES], edit=hostile)
        row = row_of(strategy, NODES[0])
        assert (row.status, row.action) == (Status.INVALID_UPDATE, "excluded")
        assert f"got {weight}" in row.detail
        for ours, theirs in zip(parameters_to_ndarrays(parameters), plain(NODES[1:]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("odd", [{}, {"loss": "low"}, {"other": 1.0}, {"loss": b"1"}])
    @pytest.mark.parametrize("place", range(3))
    def test_metrics_that_the_strategys_function_cannot_take_cost_their_client_the_say_in_them_alone(self, odd, place):
        def change(results):
            _, result = results[place]
            result.metrics = {name: value for name, value in result.metrics.items() if name != "loss"} | odd
            return results

        strategy, proxies = self.averaging()
        initial = ndarrays_to_parameters([value.numpy() for value in new_model().state_dict().values()])
        asked = strategy.configure_fit(1, initial, None)
        parameters, metrics = strategy.aggregate_fit(
            1, change([(proxy, proxy.fit(ins, None, None)) for proxy, ins in asked]), []
        )
        assert metrics["mean-loss"] == 1.0
        for ours, theirs in zip(parameters_to_ndarrays(parameters), plain(NODES), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
        evaluated = [EvaluateRes(FlowerStatus(Code.OK, ""), 0.5, 4, {"loss": 1.0}) for _ in NODES]
        evaluated[place].metrics = odd
        assert strategy.aggregate_evaluate(1, list(zip(proxies, evaluated, strict=True)), [])[1] == {"mean-loss": 1.0}

    def averaging(self):
        """A strategy that averages a metric, as everybody's does: it raises where one client does not give it."""

        def mean(metrics):
            return {"mean-loss": sum(n * own["loss"] for n, own in metrics) / sum(n for n, _ in metrics)}

        proxies = [Proxy(node, audited(node)) for node in NODES]
        inner = Chosen(proxies)
        inner.fit_metrics_aggregation_fn = inner.evaluate_metrics_aggregation_fn = mean
        strategy = OlderInversionAudit(
            inner, model=new_model(), loss=nn.CrossEntropyLoss(), ledger=None, show=False, settings=SETTINGS
        )
        return strategy, proxies

    def test_an_error_in_the_function_itself_is_the_users_to_see(self):
        strategy, proxies = self.averaging()
        strategy.strategy.evaluate_metrics_aggregation_fn = broken = lambda metrics: 1 / 0
        evaluated = [EvaluateRes(FlowerStatus(Code.OK, ""), 0.5, 4, {"loss": 1.0}) for _ in NODES]
        with pytest.raises(ZeroDivisionError):
            strategy.aggregate_evaluate(1, list(zip(proxies, evaluated, strict=True)), [])
        assert strategy.strategy.evaluate_metrics_aggregation_fn is broken

    def test_arrays_of_another_model_are_refused_before_a_client_trains(self):
        strategy = OlderInversionAudit(Chosen([]), model=new_model(), loss=nn.CrossEntropyLoss(), ledger=None)
        with pytest.raises(InvalidInputError, match="expected the 4 arrays of the model's state or its 4 parameters"):
            strategy.configure_fit(1, ndarrays_to_parameters([np.zeros(3)]), None)

    @pytest.mark.parametrize("counts", [(8, -8, 8), (8, 0, 8), (8, 2**53, 8)])
    def test_an_evaluation_that_cannot_be_weighed_is_left_out(self, counts):
        strategy = OlderInversionAudit(FedAvg(), model=new_model(), loss=nn.CrossEntropyLoss(), ledger=None, show=False)
        status = FlowerStatus(Code.OK, "")
        losses = (0.25, 100.0, 0.75)
        results = [
            (Proxy(node, audited(node)), EvaluateRes(status, loss, count, {}))
            for node, (loss, count) in enumerate(zip(losses, counts, strict=True))
        ]
        assert strategy.aggregate_evaluate(1, results, [])[0] == 0.5
        assert strategy.aggregate_evaluate(1, results[1:2], []) == (None, {})

    def test_evaluation_is_the_inner_strategys_and_goes_into_the_ledger(self, tmp_path):
        inner = FedAvg(
            evaluate_fn=lambda server_round, arrays, config: (0.75, {"accuracy": 0.5, "name": "test set"}),
            evaluate_metrics_aggregation_fn=lambda found: {
                "accuracy": sum(m["accuracy"] for _, m in found) / len(found)
            },
        )
        strategy = OlderInversionAudit(
            inner, model=new_model(), loss=nn.CrossEntropyLoss(), ledger=tmp_path / "ledger.db", show=False
        )
        proxies = [Proxy(node, audited(node)) for node in NODES]
        ins = EvaluateIns(ndarrays_to_parameters([]), {})
        results = [(proxy, proxy.client.evaluate(ins)) for proxy in proxies]
        assert strategy.evaluate(1, ins.parameters) == (0.75, {"accuracy": 0.5, "name": "test set"})
        assert strategy.aggregate_evaluate(1, results, []) == (0.5, {"accuracy": 0.25})
        assert strategy.aggregate_evaluate(2, [], []) == (None, {})
        with Ledger.open(tmp_path / "ledger.db") as opened:
            found = opened.metrics(run_id=strategy.audit.run_id)
        assert [(entry.server_round, entry.origin, dict(entry.metrics)) for entry in found] == [
            (1, "server", {"loss": 0.75, "accuracy": 0.5}),
            (1, "clients", {"loss": 0.5, "accuracy": 0.25}),
        ]


def averaged(results):
    """What secure aggregation leaves: one mean in every reply."""
    shared = [parameters_to_ndarrays(result.parameters) for _, result in results]
    mean = ndarrays_to_parameters([np.mean(arrays, axis=0) for arrays in zip(*shared, strict=True)])
    for _, result in results:
        result.parameters = mean
    return results


def advised(clients, policy, *, rounds=2, edit=lambda results: results, **options):
    """Returns the strategy after some rounds, and by round the arrays that were sent and each client's result."""
    proxies = [Proxy(node, client) for node, client in zip(NODES, clients, strict=True)]
    defaults = {"ledger": None, "show": False, "settings": SETTINGS, "policy": policy}
    strategy = OlderInversionAudit(
        Chosen(proxies), model=new_model(), loss=nn.CrossEntropyLoss(), **{**defaults, **options}
    )
    parameters = ndarrays_to_parameters([value.numpy() for value in new_model().state_dict().values()])
    seen = {}
    for server_round in range(1, rounds + 1):
        asked = strategy.configure_fit(server_round, parameters, None)
        results = [(proxy, proxy.fit(ins, None, None)) for proxy, ins in asked]
        seen[server_round] = parameters, {int(proxy.cid): result.parameters for proxy, result in results}
        parameters, _ = strategy.aggregate_fit(server_round, edit(results), [])
    return strategy, seen


def rows_of(strategy, node):
    return [row for row in strategy.audit.estimates if row.node_id == node]


def change(sent, shared):
    """A client's update, of the trained parameters in one vector."""
    pairs = zip(parameters_to_ndarrays(shared), parameters_to_ndarrays(sent), strict=True)
    return flat(dict(zip(new_model().state_dict(), (a - b for a, b in pairs), strict=True)))


def undefended(node, sent):
    return change(sent, Proxy(node, Trainer(node)).fit(FitIns(sent, {}), None, None).parameters)


class TestAdvice:
    @pytest.mark.parametrize(("source", "client"), [("trusted", audited), ("client", own)])
    def test_clients_put_the_advised_noise_on_what_they_share_from_the_second_round(self, source, client):
        clients = [client(node, noise_seed=lambda _ins, context: context.node_id) for node in NODES]
        strategy, seen = advised(clients, "advise", source=source)
        for node in NODES:
            first, second = rows_of(strategy, node)
            assert (first.advised_noise_std, first.applied_noise_std) == (None, None)
            assert second.advised_noise_std == pytest.approx(1.25 * first.required_noise_std)
            assert second.applied_noise_std == second.advised_noise_std
            assert second.status is Status.AUDITED
            # Four examples explain the rank of a layer of three classes, and without a batch nothing else tells.
            assert second.detail[:32] == ("" if source == "trusted" else "noise was not looked for by rank")
            assert second.leakage.value < first.leakage.value / 1.5
            sent, shared = seen[2][0], seen[2][1][node]
            emitted = change(sent, shared) - undefended(node, sent)
            assert_noise(emitted, second.applied_noise_std)
            np.testing.assert_allclose(change(seen[1][0], seen[1][1][node]), undefended(node, seen[1][0]), atol=1e-7)
        for proxy in strategy.strategy.proxies:  # neither the app nor its metrics see any of it
            assert proxy.client.client.numpy_client.config == {"lr": 0.1}

    @pytest.mark.parametrize(("source", "client"), [("trusted", audited), ("client", own)])
    def test_clients_whose_training_asks_train_on_x_plus_a_and_keep_a(self, source, client):
        clients = [client(node) for node in NODES]
        strategy, seen = advised(clients, Policy(action="advise", family="shaped"), source=source)
        for node, audited_client in zip(NODES, clients, strict=True):
            kept = KeptNoise.read(audited_client._context.state)
            assert len(kept.draws) == 4
            for server_round, row in enumerate(rows_of(strategy, node), start=1):
                assert row.advised_input_leakage == TARGET
                assert (row.input_noise, row.input_noise_kept, row.detail) == ("client", True, "")
                assert row.leakage.upper == pytest.approx(row.input_noise_leakage, rel=2e-3)  # told to three digits
                assert 0.9 * TARGET < row.leakage.upper < TARGET * 1.01
                sent, shared = seen[server_round][0], seen[server_round][1][node]
                moved = np.linalg.norm(change(sent, shared) - undefended(node, sent))
                assert row.input_noise_change == pytest.approx(moved, rel=0.01)

    def test_a_floor_is_clipped_to_and_accounted(self):
        policy = Policy(action="advise", clip_norm=0.05, noise_multiplier=1.0)
        strategy, seen = advised([audited(node) for node in NODES], policy)
        for node in NODES:
            rows = rows_of(strategy, node)
            assert [row.applied_noise_std for row in rows] == [policy.floor_std] * 2
            assert 0 < rows[0].epsilon < rows[1].epsilon < np.inf
            sent, shared = seen[1][0], seen[1][1][node]
            clipped = undefended(node, sent)
            clipped *= 0.05 / np.linalg.norm(clipped)
            assert_noise(change(sent, shared) - clipped, policy.floor_std)

    def test_a_client_that_says_no_shares_as_before_and_its_row_says_so(self):
        clients = [audited(NODES[0], follow_advice=False), *(audited(node) for node in NODES[1:])]
        strategy, seen = advised(clients, "advise")
        _, second = rows_of(strategy, NODES[0])
        assert second.applied_noise_std is None
        assert second.advised_noise_std > 0
        assert second.detail == "the client did not put the advised noise on its update"
        sent, shared = seen[2][0], seen[2][1][NODES[0]]
        np.testing.assert_allclose(change(sent, shared), undefended(NODES[0], sent), atol=1e-7)

    @pytest.mark.parametrize("written", ["{", '{"noise_std": 1}'])
    def test_advice_that_cannot_be_read_costs_neither_training_nor_report(self, written):
        sent = ndarrays_to_parameters([value.numpy() for value in new_model().state_dict().values()])
        config = {REQUEST_KEY: "batches", ADVICE_KEY: written, NAMES_KEY: "[]"}
        result = audited(NODES[0]).fit(FitIns(sent, config))
        assert result.status.code == Code.OK
        assert any("report" in key for key in result.metrics)
        np.testing.assert_allclose(change(sent, result.parameters), undefended(NODES[0], sent), atol=1e-7)

    class Short(Trainer):
        def fit(self, parameters, config):
            arrays, *rest = super().fit(parameters, config)
            return arrays[:2], *rest

    def test_a_client_that_returns_other_arrays_than_it_was_sent_ends_no_round(self):
        short = AuditedClient(self.Short(NODES[0]), new_context(NODES[0]), hand_over_batches=True)
        strategy, _ = advised([short, *(audited(node) for node in NODES[1:])], "advise")
        assert {row.status for row in rows_of(strategy, NODES[0])} == {Status.INVALID_UPDATE}
        assert {row.status for row in rows_of(strategy, NODES[1])} == {Status.AUDITED}

    @pytest.mark.parametrize("clip_norm", [None, 0.05])
    def test_its_arrays_are_shared_as_they_are_but_under_a_floor_not_at_all(self, clip_norm):
        short = AuditedClient(self.Short(NODES[0]), new_context(NODES[0]), hand_over_batches=True)
        advice = Advice(noise_std=0.03, target_leakage=TARGET, parameters=PARAMETERS, clip_norm=clip_norm)
        config = {**Request.for_estimate(SETTINGS).entries(), **advice.entries(), NAMES_KEY: json.dumps(PARAMETERS)}
        sent = ndarrays_to_parameters([value.numpy() for value in new_model().state_dict().values()])
        if clip_norm is not None:
            with pytest.raises(RecordError, match="nothing is shared, as the floor could not be put on the update"):
                short.fit(FitIns(sent, config))
        else:
            assert len(short.fit(FitIns(sent, config)).parameters.tensors) == 2


class TestSecureAggregation:
    def test_clients_that_audit_themselves_follow_advice_before_anything_is_averaged(self):
        clients = [own(node, noise_seed=lambda _ins, context: context.node_id) for node in NODES]
        strategy, seen = advised(clients, "advise", edit=averaged, source="client")
        for node in NODES:
            first, second = rows_of(strategy, node)
            assert second.applied_noise_std == pytest.approx(1.25 * first.required_noise_std)
            assert second.detail == "aggregate only: what the client audited never arrived but as part of a mean"
            sent, shared = seen[2][0], seen[2][1][node]
            assert_noise(change(sent, shared) - undefended(node, sent), second.applied_noise_std)

    def test_arrays_that_arrive_as_float64_which_secagg_makes_of_them_are_told_apart(self):
        sent = [value.numpy().astype(np.float64) / 3 for value in new_model().state_dict().values()]
        client = own(NODES[0], noise_seed=lambda _ins, context: context.node_id)
        advice = Advice(noise_std=0.03, target_leakage=TARGET, parameters=PARAMETERS)
        config = {**Request.for_estimate(SETTINGS).entries(), **advice.entries(), NAMES_KEY: json.dumps(PARAMETERS)}
        report = take_report(client.fit(FitIns(ndarrays_to_parameters(sent), config)).metrics)
        estimate = decode_report(report, max_bytes=1 << 20).estimate
        assert (estimate.status, estimate.verified) == (Status.AUDITED, True)
        assert estimate.noise_std == pytest.approx(0.03, rel=0.5)

    @pytest.mark.parametrize("action", ["perturb", "exclude"])
    def test_what_a_server_would_do_to_an_update_it_cannot_do_to_a_mean_and_says_so(self, action):
        strategy, (parameters, _) = run([own(node) for node in NODES], edit=averaged, source="client", policy=action)
        for row in strategy.audit.estimates:
            assert row.action == "passed"
            assert row.detail.endswith(f"the policy ({action}) was not applied: no client's own update arrived")
        for ours, theirs in zip(parameters_to_ndarrays(parameters), plain(NODES), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)

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


def simulated(tmp_path, kind):
    """The rows of runs in Flower's simulation engine, with `FedAvg` and `NumPyClient`, by name of the run."""
    ledger = tmp_path / "ledger.db"
    environment = {
        **os.environ,
        "PYTHONPATH": str(TESTS),
        "FLWR_HOME": str(tmp_path),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": "local",  # not a cluster that somebody else runs on this machine
    }
    command = [sys.executable, "-m", "flower.older_simulated", str(ledger), kind]
    finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert finished.returncode == 0, finished.stderr[-4000:]
    runs: dict[str, list] = {}
    with Ledger.open(ledger) as opened:
        assert opened.verify().ok
        for entry in opened.rows():
            runs.setdefault(entry.run_id, []).append(entry.estimate)
    for rows in runs.values():
        assert sorted((row.server_round, row.client) for row in rows) == [(r, str(c)) for r in (1, 2) for c in range(3)]
    return runs


def test_a_whole_run_under_secagg(tmp_path):
    """SecAgg+'s own workflow and mod, with clients that audit themselves and put noise on what is then averaged."""
    (rows,) = simulated(tmp_path, "secure").values()
    assert {(row.status, row.source, row.action) for row in rows} == {(Status.AUDITED, Source.CLIENT, "passed")}
    assert all(row.detail.startswith("aggregate only") for row in rows)
    for row in rows:
        assert row.applied_noise_std == row.advised_noise_std
        assert (row.applied_noise_std is None) == (row.server_round == 1)


def test_whole_runs_in_which_clients_follow_advice(tmp_path):
    runs = simulated(tmp_path, "advised")
    for row in runs["isotropic"]:
        assert (row.status, row.detail) == (Status.AUDITED, "")
        assert row.applied_noise_std == row.advised_noise_std
        if row.server_round == 1:
            assert row.applied_noise_std is None
            assert row.leakage.lower > 0.9
        else:  # the server's own replay finds that much noise on the update, before it divides the common factor out
            assert row.scale * row.noise_std == pytest.approx(row.applied_noise_std, rel=0.3)
            assert row.leakage.upper < 0.7
    for row in runs["shaped"]:
        assert (row.status, row.detail, row.input_noise, row.applied_noise_std) == (Status.AUDITED, "", "client", None)
        assert row.advised_input_leakage == TARGET
        assert 0.9 * TARGET < row.leakage.upper <= TARGET * (1 + 1e-6)
    rms = {(row.client, row.server_round): row.input_noise_rms for row in runs["shaped"]}
    for client in ("0", "1", "2"):  # kept in the client's own state, from round to round
        assert rms[client, 2] == pytest.approx(rms[client, 1], rel=1e-6)
