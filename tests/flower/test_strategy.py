"""The strategy wrapper around Flower's own strategies: a row for every client, and the inner strategy's result."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fl_privacy.audit import AuditSettings, Defence, Ledger, SerialExecutor, Source, Status
from fl_privacy.errors import InvalidInputError, LedgerError
from fl_privacy.flower import InversionAuditMod
from fl_privacy.flower.records import REPORT_KEY, REQUEST_KEY
from fl_privacy.strategies import InversionAudit

from .cases import LocalGrid, audited_app, batches_of, new_app, new_context, new_model, set_array, train_message

GOOD = (10, 20, 30)
"""Node ids of three audited clients; further clients are those that a test is about."""
ODD = 40


def fed_avg(**options):
    return FedAvg(**{"fraction_evaluate": 0.0, "min_train_nodes": 1, "min_available_nodes": 1, **options})


def audit(inner=None, **options):
    defaults = {"ledger": None, "show": False, "settings": AuditSettings(max_examples=2), "model": new_model()}
    return InversionAudit(inner or fed_avg(), loss=nn.CrossEntropyLoss(), **{**defaults, **options})


def grid_of(odd=None, **options):
    apps = {node: audited_app() for node in GOOD}
    return LocalGrid(apps if odd is None else {**apps, ODD: odd}, **options)


def run(strategy, grid, *, rounds=1, model=new_model, **options):
    random.seed(0)  # Flower samples nodes with it, and sums in their order
    return strategy.start(grid, ArrayRecord(model().state_dict()), num_rounds=rounds, **options)


def plain_result(grid, **options):
    return run(fed_avg(), grid, **options).arrays


def assert_same_arrays(ours, theirs):
    assert list(ours) == list(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name].numpy(), theirs[name].numpy())


def row_of(strategy, node=ODD, *, server_round=1):
    (row,) = [r for r in strategy.estimates if (r.node_id, r.server_round) == (node, server_round)]
    return row


def failing_with(error):
    """A mod that answers with an error, whatever the app answered."""

    def mod(message, context, call_next):
        call_next(message, context)
        return Message(error, reply_to=message)

    return mod


def editing(edit):
    """A mod that changes what leaves the client."""

    def mod(message, context, call_next):
        reply = call_next(message, context)
        edit(reply.content)
        return reply

    return mod


class TestUndisturbed:
    def test_every_client_of_every_round_has_an_audited_row_and_the_model_is_plain_fedavgs(self):
        strategy = audit()
        result = run(strategy, grid_of(), rounds=2)
        assert_same_arrays(result.arrays, plain_result(grid_of(), rounds=2))
        assert sorted((row.server_round, row.node_id) for row in strategy.estimates) == [
            (server_round, node) for server_round in (1, 2) for node in GOOD
        ]
        for row in strategy.estimates:
            assert (row.status, row.source, row.action) == (Status.AUDITED, Source.TRUSTED, "passed")
            assert (row.client, row.num_examples, row.units_audited) == (str(row.node_id), 4, 2)
            assert 0 < row.leakage.lower <= row.leakage.value <= row.leakage.upper <= 1
            assert row.noise_std == pytest.approx(0, abs=1e-6)
            assert row.worst_label == batches_of(row.node_id)[0][1][row.worst_example]

    def test_the_rounds_leakage_is_among_its_metrics_with_the_clients_own(self):
        strategy = audit()
        result = run(strategy, grid_of(new_app()))
        metrics = result.train_metrics_clientapp[1]
        values = [row.leakage.value for row in strategy.estimates if row.leakage is not None]
        assert len(values) == 3
        assert metrics["leakage-max"] == max(values)
        assert metrics["leakage-mean"] == pytest.approx(sum(values) / 3)
        assert metrics["clients-without-estimate"] == 1
        assert metrics["loss"] == pytest.approx(1 + (sum(GOOD) + ODD) / 4)

    def test_the_inner_strategy_sees_none_of_our_records(self):
        class Watching(FedAvg):
            contents = ()

            def aggregate_train(self, server_round, replies):
                self.contents = [set(reply.content) for reply in replies]
                return super().aggregate_train(server_round, replies)

        inner = Watching(fraction_evaluate=0.0)
        run(audit(inner), grid_of())
        assert inner.contents == [{"arrays", "metrics"}] * 3

    def test_each_client_is_asked_in_a_config_of_its_own_and_fedavgs_stays_as_it_was(self):
        grid, config = grid_of(), ConfigRecord({"lr": 0.1})
        strategy = audit()
        run(strategy, grid, rounds=2, train_config=config)
        assert dict(config) == {"lr": 0.1, "server-round": 2}
        assert len(grid.sent) == 6
        for message in grid.sent:
            assert dict(message.content["config"]) == {
                "lr": 0.1,
                "server-round": (1 if message in grid.sent[:3] else 2),
                REQUEST_KEY: "batches",
            }
        configs = [message.content["config"] for message in grid.sent[:3]]
        configs[0]["only-mine"] = 1
        assert all("only-mine" not in other for other in configs[1:])

    def test_evaluation_is_the_inner_strategys(self):
        grid = grid_of()
        result = run(audit(fed_avg(fraction_evaluate=1.0)), grid)
        assert result.evaluate_metrics_clientapp[1] == {"accuracy": 0.5}
        evaluations = [m for m in grid.sent if m.metadata.message_type == "evaluate"]
        assert len(evaluations) == 3
        assert all(REQUEST_KEY not in m.content["config"] for m in evaluations)

    def test_running_statistics_and_integer_counters_are_averaged_and_not_audited(self):
        def normalised():
            return new_model(batch_norm=True)

        def grid():
            return LocalGrid({node: audited_app(model=normalised, count=2) for node in GOOD})

        strategy = audit(model=normalised(), settings=AuditSettings(max_examples=1))
        result = run(strategy, grid(), rounds=2, model=normalised)
        assert_same_arrays(result.arrays, plain_result(grid(), rounds=2, model=normalised))
        assert result.arrays["1.num_batches_tracked"].numpy() == pytest.approx(4)
        assert {(row.status, row.batch_norm) for row in strategy.estimates} == {(Status.AUDITED, "train")}
        assert {row.update_dim for row in strategy.estimates} == {sum(p.numel() for p in normalised().parameters())}


def two_array_records(content):
    content["more"] = ArrayRecord([np.zeros(2)])


def no_arrays(content):
    del content["arrays"]


def without_bias(content):
    content["arrays"] = ArrayRecord({n: a for n, a in content["arrays"].items() if n != "4.bias"})


def with_more(content):
    content["arrays"] = ArrayRecord({**content["arrays"], "5.bias": Array(np.zeros(3))})


def garbled(content):
    bias = content["arrays"]["4.bias"]
    broken = Array(dtype=bias.dtype, shape=bias.shape, stype=bias.stype, data=b"\x80\x04nonsense")
    content["arrays"] = ArrayRecord({**content["arrays"], "4.bias": broken})


UNUSABLE = {
    "NaN": (set_array("4.bias", np.float32([0, np.nan, 0])), "NaN or infinity in 4.bias"),
    "infinity": (set_array("4.bias", np.float32([0, -np.inf, 0])), "NaN or infinity in 4.bias"),
    "beyond float32": (set_array("4.bias", np.float64([0, 1e300, 0])), "NaN or infinity in 4.bias"),
    "another shape": (set_array("4.bias", np.zeros(4, np.float32)), "expected 4.bias of shape [3], got [4]"),
    "a shape that would broadcast": (set_array("4.bias", np.zeros((1, 3), np.float32)), "of shape [3], got [1, 3]"),
    "whole numbers": (set_array("4.bias", np.zeros(3, np.int64)), "expected floating-point values in 4.bias"),
    "complex numbers": (
        set_array("4.bias", np.zeros(3, np.complex64)),
        "expected real numbers in 4.bias, got complex64",
    ),
    "texts": (set_array("4.bias", np.array(["a", "b", "c"])), "expected real numbers in 4.bias, got <U1"),
    "bytes that are no array": (garbled, "array 4.bias cannot be read"),
    "an array too few": (without_bias, "others or not all: 4.bias"),
    "an array too many": (with_more, "others or not all: 5.bias"),
    "two array records": (two_array_records, "expected one ArrayRecord in the reply, got 2"),
    "no array record": (no_arrays, "expected one ArrayRecord in the reply, got 0"),
}


class TestUnusableUpdates:
    @pytest.mark.parametrize("name", UNUSABLE)
    def test_it_is_a_row_and_left_out_and_the_others_are_averaged(self, name):
        edit, detail = UNUSABLE[name]
        strategy = audit(on_audit_failure="continue")  # what cannot be averaged is left out all the same
        result = run(strategy, grid_of(audited_app(editing(edit))))
        row = row_of(strategy)
        assert (row.status, row.action, row.leakage) == (Status.INVALID_UPDATE, "excluded", None)
        assert detail in row.detail
        assert_averaged(result, without=ODD, grid=grid_of(audited_app()))

    def test_a_second_reply_of_a_client_does_not_count_twice(self):
        strategy = audit()
        grid = grid_of(audited_app(), twice={ODD})
        result = run(strategy, grid)
        rows = [(row.status, row.action, row.detail) for row in strategy.estimates if row.node_id == ODD]
        assert rows == [
            (Status.AUDITED, "passed", ""),
            (Status.INVALID_UPDATE, "excluded", "a second reply from the same client"),
        ]
        assert_same_arrays(result.arrays, plain_result(grid_of(audited_app())))


def assert_averaged(result, *, grid, without=None):
    """The result is the mean of what the clients of a grid share, one of them left out."""
    shared = [
        app(train_message(request=None), new_context(node)).content["arrays"]
        for node, app in grid.apps.items()
        if node != without
    ]
    for name, array in result.arrays.items():
        np.testing.assert_allclose(
            array.numpy(), np.mean([arrays[name].numpy() for arrays in shared], axis=0), rtol=1e-5, atol=1e-7
        )


def crashing(model, batches):
    raise RuntimeError("the data set is gone")


def forged(content):
    content[REPORT_KEY] = ConfigRecord({"head": "{}"})


def other_labels(content):
    """A report whose labels are of a class that the model does not have."""
    record = content[REPORT_KEY]
    record["array/labels"] = np.full(4, 7, np.int64).tobytes()


def not_of_this_model(content):
    record = content[REPORT_KEY]
    record["head"] = record["head"].replace(
        '"captured/4.bias": ["float32", [3]]', '"captured/4.bias": ["float32", [3, 1]]'
    )


def of_infinite_scale(content):
    record = content[REPORT_KEY]
    data = np.full((4, 1, 4, 4), 1e200)
    record["head"] = record["head"].replace('"inputs": ["float32"', '"inputs": ["float64"')
    record["array/inputs"] = data.tobytes()


MISSING = {
    "the app raises": (audited_app(train=crashing), Status.CLIENT_ERROR, "error 2: RuntimeError: the data set is gone"),
    "an error without a reason": (
        new_app(failing_with(Error(code=9))),
        Status.CLIENT_ERROR,
        "error 9: no reason given",
    ),
    "no mod": (new_app(), Status.UNPROTECTED, "runs without the audit's mod"),
    "a mod that may not": (new_app(InversionAuditMod()), Status.REFUSED, "nothing on this client allows it"),
    "a forged report": (audited_app(editing(forged)), Status.INVALID_REPORT, "expected a report of version 1"),
    "an update of another model": (
        audited_app(editing(not_of_this_model)),
        Status.INVALID_REPORT,
        "captured update of floats [3] for 4.bias",
    ),
    "labels that no model has": (audited_app(editing(other_labels)), Status.AUDIT_FAILED, "labels in [0, 3)"),
    "inputs beyond all scales": (audited_app(editing(of_infinite_scale)), Status.AUDIT_FAILED, ""),
}
NOT_SHARED = {Status.CLIENT_ERROR, Status.NO_REPLY}


class TestClientsOfWhichNothingIsKnown:
    @pytest.mark.parametrize("policy", ["continue", "exclude"])
    @pytest.mark.parametrize("name", MISSING)
    def test_each_is_a_row_and_the_policy_decides(self, name, policy):
        app, status, detail = MISSING[name]
        strategy = audit(on_audit_failure=policy)
        result = run(strategy, grid_of(app))
        row = row_of(strategy)
        assert (row.status, row.leakage) == (status, None)
        assert detail in row.detail
        counted = policy == "continue" and status not in NOT_SHARED
        if status not in NOT_SHARED:
            assert row.action == ("passed" if counted else "excluded")
        assert_averaged(result, without=None if counted else ODD, grid=grid_of(new_app()))
        assert {row_of(strategy, node).status for node in GOOD} == {Status.AUDITED}

    def test_one_that_never_answers(self):
        strategy = audit()
        result = run(strategy, grid_of(audited_app(), silent={ODD}), rounds=2)
        for server_round in (1, 2):
            row = row_of(strategy, server_round=server_round)
            assert (row.status, row.action) == (Status.NO_REPLY, "excluded")
        assert_same_arrays(result.arrays, plain_result(grid_of(audited_app(), silent={ODD}), rounds=2))

    def test_a_round_in_which_nobody_may_pass_leaves_the_model_as_it_is(self):
        strategy = audit(on_audit_failure="exclude")
        result = run(strategy, LocalGrid({node: new_app() for node in GOOD}), rounds=2)
        assert len(result.arrays) == 0
        assert {row.status for row in strategy.estimates} == {Status.UNPROTECTED}
        assert len(strategy.estimates) == 6

    def test_one_whose_audit_is_late(self):
        strategy = audit(on_audit_failure="exclude", time_limit=1e-9)
        result = run(strategy, grid_of())
        assert {(row.status, row.action) for row in strategy.estimates} == {(Status.LATE, "excluded")}
        assert len(result.arrays) == 0

    def test_what_a_client_calls_itself_does_no_harm(self, tmp_path, capsys):
        names = iter(["[/red]", "a\ud800\x1b[2J\x00", "x" * 5000])

        def renamed(content):
            record = content[REPORT_KEY]
            record["head"] = json.dumps({**json.loads(record["head"]), "client": next(names)})

        ledger = tmp_path / "l.db"
        strategy = audit(ledger=ledger, show=True)
        run(strategy, LocalGrid({node: audited_app(editing(renamed)) for node in GOOD}))
        assert Ledger(ledger).verify().ok
        assert {row.status for row in strategy.estimates} == {Status.AUDITED}
        assert "\x1b[2J" not in capsys.readouterr().out


class TestLedger:
    def test_rows_are_written_after_each_round_under_the_runs_name(self, tmp_path):
        path = tmp_path / "ledger.db"
        seen = []

        class Counting(FedAvg):
            def aggregate_train(self, server_round, replies):
                seen.append(len(list(Ledger(path).rows())))
                return super().aggregate_train(server_round, replies)

        strategy = audit(Counting(fraction_evaluate=0.0), ledger=path, run_id="mine")
        run(strategy, grid_of(new_app()), rounds=2)
        assert seen == [4, 8]
        entries = list(Ledger(path).rows())
        assert [entry.estimate for entry in entries] == strategy.estimates
        assert {entry.run_id for entry in entries} == {"mine"}
        assert Ledger(path).verify().ok

    def test_accuracy_goes_into_the_ledger_whoever_measures_it(self, tmp_path):
        path = tmp_path / "ledger.db"
        strategy = audit(fed_avg(fraction_evaluate=1.0), ledger=path, run_id="mine")
        result = run(strategy, grid_of(), rounds=2, evaluate_fn=lambda r, arrays: MetricRecord({"accuracy": 0.1 * r}))
        with Ledger.open(path) as ledger:
            found = [(m.server_round, m.origin, m.metrics["accuracy"]) for m in ledger.metrics(run_id="mine")]
            assert ledger.verify().ok
        assert found == [
            (0, "server", 0.0),
            (1, "clients", 0.5),
            (1, "server", 0.1),
            (2, "clients", 0.5),
            (2, "server", 0.2),
        ]
        assert [m["accuracy"] for m in result.evaluate_metrics_serverapp.values()] == [0.0, 0.1, 0.2]
        assert [m["accuracy"] for m in result.evaluate_metrics_clientapp.values()] == [0.5, 0.5]

    def test_a_ledger_that_fails_loses_no_row_and_fails_the_run_at_its_end(self, tmp_path):
        path = tmp_path / "ledger.db"
        strategy = audit(ledger=path)
        path.unlink()
        path.mkdir()  # there is no file any more that could be written
        with pytest.raises(LedgerError, match=rf"6 rows of run {strategy.run_id} could not be written"):
            run(strategy, grid_of(), rounds=2)
        assert len(strategy.estimates) == 6

    def test_rows_that_were_not_written_come_with_the_next_round(self, tmp_path):
        path = tmp_path / "ledger.db"
        strategy = audit(ledger=path)
        kept = path.read_bytes()

        class Repairing(FedAvg):
            def aggregate_train(self, server_round, replies):
                if server_round == 1:
                    assert len(strategy.estimates) == 3
                    path.rmdir()
                    path.write_bytes(kept)
                return super().aggregate_train(server_round, replies)

        strategy.strategy = Repairing(fraction_evaluate=0.0)
        path.unlink()
        path.mkdir()
        run(strategy, grid_of(), rounds=2)
        assert [entry.estimate for entry in Ledger(path).rows()] == strategy.estimates


class TestCallbacks:
    def test_they_are_told_of_every_round_and_closed_and_may_fail(self):
        told = []

        class Listening:
            def on_round(self, server_round, rows):
                told.append((server_round, list(rows)))

            def close(self):
                told.append("closed")

        class Failing:
            def on_round(self, server_round, rows):
                raise RuntimeError("the disk is full")

        strategy = audit(callbacks=[Failing(), Listening()])
        result = run(strategy, grid_of(), rounds=2)
        assert told == [(1, strategy.estimates[:3]), (2, strategy.estimates[3:]), "closed"]
        assert_same_arrays(result.arrays, plain_result(grid_of(), rounds=2))


class ClosingExecutor(SerialExecutor):
    """Counts how often its workers are ended."""

    closed = 0

    def close(self):
        self.closed += 1


class TestEnds:
    def test_workers_are_released_when_the_run_ends(self):
        executor = ClosingExecutor()
        run(audit(executor=executor), grid_of())
        assert executor.closed == 1

    def test_workers_are_released_when_a_round_raises_and_finished_rows_are_kept(self, tmp_path):
        class Failing(FedAvg):
            def aggregate_train(self, server_round, replies):
                if server_round == 2:
                    raise RuntimeError("no quorum")
                return super().aggregate_train(server_round, replies)

        executor, path = ClosingExecutor(), tmp_path / "ledger.db"
        with pytest.raises(RuntimeError, match="no quorum"):
            run(audit(Failing(fraction_evaluate=0.0), executor=executor, ledger=path), grid_of(), rounds=3)
        assert executor.closed == 1
        assert len(list(Ledger(path).rows())) == 6

    def test_an_audit_that_cannot_run_does_not_end_the_training(self):
        class Broken(SerialExecutor):
            def run(self, context, params, chunks, *, deadline):
                raise MemoryError("no memory for workers")

        strategy = audit(executor=Broken())
        result = run(strategy, grid_of())
        assert {(row.status, row.detail) for row in strategy.estimates} == {
            (Status.AUDIT_FAILED, "MemoryError: no memory for workers")
        }
        assert_same_arrays(result.arrays, plain_result(grid_of()))

    def test_tables_are_printed_when_asked_for(self, capsys):
        run(audit(show=True), grid_of())
        shown = capsys.readouterr().out
        assert "Leakage in round 1" in shown
        assert "Leakage over all rounds" in shown
        run(audit(show=False), grid_of())
        assert "Leakage" not in capsys.readouterr().out


class TestMisuse:
    @pytest.mark.parametrize(
        ("sent", "message"),
        [
            (lambda: ArrayRecord([np.zeros(2)]), "expected the model's parameter 0.weight among the arrays"),
            (
                lambda: ArrayRecord({**new_model().state_dict(), "4.bias": torch.zeros(4)}),
                r"expected 4.bias of the model's shape \[3\], got \[4\]",
            ),
        ],
    )
    def test_arrays_of_another_model_are_refused_before_a_client_trains(self, sent, message):
        grid = grid_of()
        with pytest.raises(InvalidInputError, match=message):
            audit().start(grid, sent(), num_rounds=1)
        assert grid.sent == []

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"on_audit_failure": "stop"}, "on_audit_failure to be one of continue, exclude, got 'stop'"),
            ({"time_limit": 0.0}, "time_limit > 0"),
        ],
    )
    def test_options_out_of_range(self, option, message):
        with pytest.raises(InvalidInputError, match=message):
            audit(**option)

    def test_aggregating_before_anything_was_sent(self):
        with pytest.raises(InvalidInputError, match="expected configure_train before aggregate_train"):
            audit().aggregate_train(1, [])

    def test_the_model_is_not_changed(self):
        model = new_model(batch_norm=True)
        model.train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        strategy = audit(model=model, settings=AuditSettings(max_examples=1))
        grid = LocalGrid({node: audited_app(model=lambda: new_model(batch_norm=True)) for node in GOOD})
        run(strategy, grid, model=lambda: new_model(batch_norm=True, seed=3))
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert all(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_a_metric_record_is_only_added_to_where_there_is_one():
    class Silent(FedAvg):
        def aggregate_train(self, server_round, replies):
            arrays, _ = super().aggregate_train(server_round, replies)
            return arrays, None

    result = run(audit(Silent(fraction_evaluate=0.0)), grid_of())
    assert result.train_metrics_clientapp == {}


class TestClaims:
    """A defence that a client only talks of is seen in its update, with no batch at all."""

    NOISE = 0.05

    def noise(self, std):
        def edit(content):
            rng = np.random.default_rng(0)
            content["arrays"] = ArrayRecord(
                {
                    n: Array((a.numpy() + std * rng.normal(size=a.shape)).astype(np.float32))
                    for n, a in content["arrays"].items()
                }
            )

        return editing(edit)

    def claiming(self, std, **options):
        claim = Defence(kind="local-dp", noise_std=self.NOISE)
        return new_app(self.noise(std), InversionAuditMod(hand_over_batches=True, defence=claim), **options)

    @pytest.mark.parametrize("source", ["trusted", "client"])
    @pytest.mark.parametrize(("std", "holds"), [(NOISE, True), (0.0, False), (NOISE / 4, False)])
    def test_a_claim_is_checked_against_the_update_even_of_a_client_that_hands_nothing_over(self, source, std, holds):
        strategy = audit(source=source)
        run(strategy, grid_of(self.claiming(std)))
        row = row_of(strategy)
        assert (row.defence, row.claim_holds) == ("local-dp", holds)
        assert ("less than its claim: noise of 0.05 was to be there" in row.detail) == (not holds)
        assert row.observed_noise_std == pytest.approx(std, rel=0.3, abs=1e-6)
        assert row_of(strategy, GOOD[0]).claim_holds is None

    def test_raw_updates_of_clients_that_should_have_been_protected_are_named(self):
        strategy = audit(expected_defence=Defence(kind="local-dp", noise_std=self.NOISE))
        run(strategy, grid_of(new_app(self.noise(self.NOISE))))
        assert row_of(strategy).claim_holds
        for node in GOOD:
            row = row_of(strategy, node)
            assert row.claim_holds is False
            assert "less than what is expected of every client" in row.detail

    @pytest.mark.parametrize(
        ("source", "said", "most", "holds", "detail"),
        [
            ("client", 4, None, False, "less than its claim"),
            ("client", 1000, None, True, "noise was not looked for by rank: so many examples explain any"),
            ("client", 1000, 4, False, "it says 1000 examples, and at most 4 can be behind an update"),
            ("trusted", 1000, None, False, "less than its claim"),
        ],
    )
    def test_a_client_that_says_more_examples_than_it_has_hides_noise_that_is_not_there_only_where_nothing_bounds_them(
        self, source, said, most, holds, detail
    ):
        """Noise where the sums of the logits' layer look, and nowhere else."""

        def model():
            torch.manual_seed(0)
            return nn.Sequential(nn.Flatten(), nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 3))

        def last_layer_only(content):
            rng = np.random.default_rng(0)
            arrays = {name: array.numpy() for name, array in content["arrays"].items()}
            for name in ("3.weight", "3.bias"):
                arrays[name] = (arrays[name] + self.NOISE * rng.normal(size=arrays[name].shape)).astype(np.float32)
            content["arrays"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
            content["metrics"]["num-examples"] = said

        claim = Defence(kind="local-dp", noise_std=self.NOISE)
        mod = InversionAuditMod(
            hand_over_batches=True, defence=claim, model=lambda context: model(), loss=nn.CrossEntropyLoss()
        )
        strategy = audit(model=model(), source=source, most_examples=most, settings=AuditSettings(max_examples=1))
        run(strategy, LocalGrid({ODD: new_app(editing(last_layer_only), mod, model=model)}), model=model)
        row = row_of(strategy)
        assert row.claim_holds == holds
        assert detail in row.detail
        if holds:
            assert "InversionAudit(most_examples=...) bounds what is believed" in row.detail

    def test_a_bound_on_examples_is_positive(self):
        with pytest.raises(InvalidInputError, match="most_examples >= 1, got 0"):
            audit(most_examples=0)

    @pytest.mark.parametrize(
        "claim", [[1], {"kind": 3}, {"kind": "x", "noise_std": -1}, {"kind": "x", "sparsity": "all"}]
    )
    def test_a_forged_claim_is_an_invalid_report(self, claim):
        def forge(content):
            record = content[REPORT_KEY]
            record["head"] = json.dumps({**json.loads(record["head"]), "claim": claim})

        strategy = audit()
        run(strategy, grid_of(audited_app(editing(forge))))
        assert row_of(strategy).status is Status.INVALID_REPORT
