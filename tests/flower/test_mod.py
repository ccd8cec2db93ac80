"""The client mod in real client apps with real training: what it reports, what it refuses, and what it leaves alone."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Error, Message
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from fl_privacy.flower import InversionAuditMod, record_batch, record_batches
from fl_privacy.flower.capture import TrainingCapture
from fl_privacy.flower.records import BATCHES, REPORT_KEY, REQUEST_KEY

from .cases import (
    LR,
    audited_app,
    batches_of,
    change_of,
    new_app,
    new_context,
    new_model,
    report_of,
    step,
    train_message,
)

VARIABLE = "FL_PRIVACY_HAND_OVER_BATCHES"
NODE_KEY = "fl-privacy-hand-over-batches"


def report_after(train, *, count=1, **options):
    return report_of(audited_app(train=train, count=count, **options)(train_message(), new_context(2)))


def train_with(make_optimizer):
    def train(model, batches):
        optimizer = make_optimizer(model)
        for batch in record_batches(batches):
            step(model, optimizer, batch)

    return train


class TestReport:
    def test_it_holds_each_example_once_in_the_order_first_seen_and_which_step_used_which(self):
        def two_epochs(model, batches):
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            for batch in [*record_batches(batches), *record_batches(batches[1:])]:
                step(model, optimizer, batch)

        report = report_after(two_epochs, count=2)
        inputs, labels = (torch.cat(parts) for parts in zip(*batches_of(2, count=2), strict=True))
        np.testing.assert_array_equal(report.inputs, inputs.numpy())
        np.testing.assert_array_equal(report.labels, labels.numpy())
        assert report.labels.dtype == np.int64
        assert report.trace.batches == ((0, 1, 2, 3), (4, 5, 6, 7), (4, 5, 6, 7))

    def test_the_same_example_with_another_label_is_another_example(self):
        def relabelled(model, batches):
            inputs, labels = batches[0]
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            for batch in record_batches([(inputs, labels), (inputs, (labels + 1) % 3)]):
                step(model, optimizer, batch)

        assert report_after(relabelled).trace.batches == ((0, 1, 2, 3), (4, 5, 6, 7))

    def test_the_trace_is_what_the_optimiser_was_told(self):
        def scheduled(model, batches):
            optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=0.01, nesterov=True)
            schedule = LambdaLR(optimizer, lambda done: 1 / (1 + done))
            for batch in record_batches(batches):
                step(model, optimizer, batch)
                schedule.step()

        trace = report_after(scheduled, count=3).trace
        assert (trace.optimizer, trace.problem) == ("SGD", "")
        assert trace.lr == pytest.approx([LR, LR / 2, LR / 3])
        assert (trace.momentum, trace.dampening, trace.weight_decay, trace.nesterov) == (0.9, 0.0, 0.01, True)

    def test_dampening_is_told_too(self):
        trace = report_after(
            train_with(lambda model: torch.optim.SGD(model.parameters(), lr=LR, momentum=0.5, dampening=0.25))
        ).trace
        assert (trace.momentum, trace.dampening, trace.nesterov) == (0.5, 0.25, False)

    @pytest.mark.parametrize("batch_norm", [False, True])
    def test_the_captured_update_is_bit_for_bit_what_an_undefended_client_shares(self, batch_norm):
        initial = new_model(batch_norm=batch_norm).state_dict()
        app = audited_app(model=lambda: new_model(batch_norm=batch_norm, seed=1), count=2)
        reply = app(train_message(initial), new_context(2))
        change, captured = change_of(reply, initial), report_of(reply).captured
        assert set(captured) == {name for name, _ in new_model(batch_norm=batch_norm).named_parameters()}
        for name, array in captured.items():
            np.testing.assert_array_equal(array, change[name].numpy())
        assert all(np.abs(captured[name]).max() > 0 for name in ("0.weight", "4.weight", "4.bias"))

    def test_a_report_names_the_partition_and_what_the_client_says_of_its_defence(self):
        mod = InversionAuditMod(
            hand_over_batches=True, defence=lambda context: f"noise on {context.node_config['num-partitions']}"
        )
        report = report_of(new_app(mod)(train_message(), new_context(3)))
        assert (report.client, report.defence) == ("3", "noise on 4")

    def test_batches_recorded_by_hand_are_those_the_model_was_given(self):
        def augmented(model, batches):
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            for inputs, labels in batches:
                step(model, optimizer, record_batch(-inputs, labels))

        np.testing.assert_array_equal(report_after(augmented).inputs, -batches_of(2)[0][0].numpy())

    @pytest.mark.parametrize("keys", [("img", "label"), ("label", "img")])
    def test_dictionaries_are_told_apart_by_type(self, keys):
        def from_dictionaries(model, batches):
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            named = [dict(sorted({"img": x, "label": y}.items(), key=lambda kv: keys.index(kv[0]))) for x, y in batches]
            for batch in record_batches(named):
                step(model, optimizer, (batch["img"], batch["label"]))

        report = report_after(from_dictionaries)
        np.testing.assert_array_equal(report.inputs, batches_of(2)[0][0].numpy())
        assert report.trace.problem == ""

    def test_one_client_after_the_other_in_one_process_does_not_mix_them(self):
        app = audited_app()
        reports = [report_of(app(train_message(), new_context(node))) for node in (0, 1, 0)]
        for report, node in zip(reports, (0, 1, 0), strict=True):
            np.testing.assert_array_equal(report.inputs, batches_of(node)[0][0].numpy())
            assert len(report.trace.batches) == 1


class TestWhatCannotBeReplayed:
    """Training goes on, and the report says why its trace cannot be used."""

    def test_another_optimiser(self):
        report = report_after(train_with(lambda model: torch.optim.Adam(model.parameters())))
        assert "only torch.optim.SGD is replayed, the client used Adam" in report.trace.problem
        assert report.inputs is not None
        assert set(report.captured) == set(dict(new_model().named_parameters()))

    def test_parameter_groups_that_differ(self):
        def grouped(model):
            head, rest = list(model[4].parameters()), list(model[0].parameters())
            return torch.optim.SGD([{"params": rest}, {"params": head, "lr": 0.5}], lr=LR)

        assert "parameter groups differently" in report_after(train_with(grouped)).trace.problem

    def test_parameter_groups_that_agree_are_no_problem(self):
        def grouped(model):
            return torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[4].parameters()}], lr=LR)

        report = report_after(train_with(grouped))
        assert report.trace.problem == ""
        assert set(report.captured) == set(dict(new_model().named_parameters()))

    def test_gradients_accumulated_over_batches(self):
        def accumulating(model, batches):
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            for inputs, labels in record_batches(batches):
                nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()

        assert report_after(accumulating, count=2).trace.problem == "2 batches were recorded for 1 optimiser steps"

    def test_settings_that_change_between_steps(self):
        def drifting(model, batches):
            optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.5)
            for batch in record_batches(batches):
                step(model, optimizer, batch)
                optimizer.param_groups[0]["momentum"] = 0.9

        assert "other than the learning rate changed" in report_after(drifting, count=2).trace.problem

    def test_an_optimiser_that_maximises(self):
        report = report_after(train_with(lambda model: torch.optim.SGD(model.parameters(), lr=LR, maximize=True)))
        assert report.trace.problem == "the optimiser maximises"

    def test_batches_that_were_not_recorded(self):
        def unrecorded(model, batches):
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            for batch in batches:
                step(model, optimizer, batch)

        report = report_after(unrecorded)
        assert report.refused == "no batch was recorded: draw them from record_batches(loader)"
        assert report.inputs is None

    def test_no_batch_at_all(self):
        report = report_of(audited_app(count=0, edit=one_example)(train_message(), new_context(2)))
        assert report.refused == "no torch optimiser took a step"

    def test_more_bytes_than_are_handed_over(self):
        of_one_batch = 4 * (16 * 4 + 8)
        app = new_app(InversionAuditMod(hand_over_batches=True, max_bytes=of_one_batch), count=3)
        report = report_of(app(train_message(), new_context(2)))
        assert report.trace.problem == f"the examples exceed {of_one_batch} bytes, the most that is handed over"
        assert report.inputs.nbytes + report.labels.nbytes <= of_one_batch
        tighter = new_app(InversionAuditMod(hand_over_batches=True, max_bytes=of_one_batch - 1))
        report = report_of(tighter(train_message(), new_context(2)))
        assert report.inputs is None
        assert "exceed" in report.refused

    @pytest.mark.parametrize(
        ("recorded", "problem"),
        [
            (lambda x, y: [(x, y, x)], "expected batches of two tensors"),
            (lambda x, y: [(x, y[:3])], "4 inputs and 3 labels"),
            (lambda x, y: [(x.bfloat16(), y)], "could not be recorded"),
            (lambda x, y: [(x, y), (x[:, :, :2], y)], r"examples differ in shape: [1, 4, 4] and [1, 2, 4]"),
        ],
    )
    def test_batches_of_another_kind_do_not_cost_the_client_its_training(self, recorded, problem):
        def train(model, batches):
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            for _ in record_batches(recorded(*batches[0])):
                step(model, optimizer, batches[0])

        report = report_after(train)
        assert problem in (report.refused or report.trace.problem)

    def test_parameters_of_another_kind_do_not_cost_the_client_its_training(self):
        def in_bfloat16(model, batches):
            half = new_model().bfloat16()
            optimizer = torch.optim.SGD(half.parameters(), lr=LR)
            for inputs, labels in record_batches(batches):
                step(half, optimizer, (inputs.bfloat16(), labels))

        report = report_after(in_bfloat16)
        assert "could not be recorded" in report.trace.problem
        assert report.captured is None


class TestReplies:
    def test_the_training_is_the_same_with_and_without_a_request(self):
        replies = [audited_app()(train_message(request=request), new_context(2)) for request in (BATCHES, None)]
        first, second = (change_of(reply, new_model().state_dict()) for reply in replies)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert [REPORT_KEY in reply.content for reply in replies] == [True, False]

    def test_the_app_sees_its_config_without_the_request(self):
        seen = []
        audited_app(seen=seen)(train_message(proximal=0.5), new_context())
        assert dict(seen[0].content["config"]) == {"server-round": 1, "proximal": 0.5}

    def test_evaluation_is_left_alone(self):
        seen = []
        reply = audited_app(seen=seen)(train_message(kind="evaluate"), new_context())
        assert list(reply.content) == ["metrics"]
        assert REQUEST_KEY not in seen[0].content["config"]

    def test_a_report_that_fails_does_not_lose_the_training(self):
        def broken(context):
            raise RuntimeError("no idea what I defend with")

        reply = new_app(InversionAuditMod(hand_over_batches=True, defence=broken))(train_message(), new_context(2))
        assert change_of(reply, new_model().state_dict())["4.bias"].abs().max() > 0
        report = report_of(reply)
        assert report.refused == "the client could not make its report: no idea what I defend with"
        assert report.inputs is None

    def test_an_errors_text_leaves_no_client_that_keeps_its_data(self):
        def broken(context):
            raise RuntimeError("label 7 of patient X")

        reply = new_app(InversionAuditMod(hand_over_batches=False, defence=broken))(train_message(), new_context(2))
        assert report_of(reply).refused == "the client could not make its report: RuntimeError"

    def test_the_error_of_an_inner_mod_passes(self):
        def failing(message, context, call_next):
            return Message(Error(code=42, reason="no data today"), reply_to=message)

        reply = new_app(InversionAuditMod(hand_over_batches=True), failing)(train_message(), new_context())
        assert (reply.error.code, reply.error.reason) == (42, "no data today")

    def test_an_exception_of_the_app_passes_and_stops_the_recording(self):
        def broken(model, batches):
            next(iter(record_batches(batches)))
            raise RuntimeError("out of memory")

        with pytest.raises(RuntimeError, match="out of memory"):
            audited_app(train=broken)(train_message(), new_context())
        report = report_of(audited_app()(train_message(), new_context(2)))
        np.testing.assert_array_equal(report.inputs, batches_of(2)[0][0].numpy())


def one_example(content):
    """Lets a client without examples answer all the same."""
    content["metrics"]["num-examples"] = 1


class TestConsent:
    @pytest.mark.parametrize(
        ("app", "environment", "node", "against"),
        [
            (None, None, None, "nothing on this client allows it"),
            (False, None, None, "the app forbids it"),
            (False, "1", True, "the app forbids it"),
            (True, "0", None, "the environment"),
            (None, "no", True, "the environment"),
            (True, None, False, "the node's configuration"),
            (True, "true", "false", "the node's configuration"),
            (None, "maybe", None, ""),
        ],
    )
    def test_one_no_is_enough_and_silence_is_no_yes(self, monkeypatch, app, environment, node, against):
        report = report_of(self.reply(monkeypatch, app, environment, node))
        assert report.refused.startswith("batches are not handed over")
        assert against in report.refused
        assert (report.inputs, report.labels, report.captured, report.trace) == (None, None, None, None)

    @pytest.mark.parametrize(
        ("app", "environment", "node"),
        [(True, None, None), (None, "1", None), (None, None, True), (None, None, "yes"), (True, "true", True)],
    )
    def test_one_yes_without_a_no_allows_it(self, monkeypatch, app, environment, node):
        assert report_of(self.reply(monkeypatch, app, environment, node)).inputs is not None

    def test_a_request_of_another_release_is_refused(self):
        report = report_of(audited_app()(train_message(request="gradients"), new_context()))
        assert "asks for 'gradients', which this release does not know" in report.refused
        assert report.inputs is None

    def reply(self, monkeypatch, app, environment, node):
        if environment is not None:
            monkeypatch.setenv(VARIABLE, environment)
        context = new_context(0, **({} if node is None else {NODE_KEY: node}))
        return new_app(InversionAuditMod(hand_over_batches=app))(train_message(), context)


class TestRecordedBatches:
    def test_a_loader_stays_the_loader_it_was(self):
        loader = DataLoader(TensorDataset(*batches_of(0)[0]), batch_size=3)
        recorded = record_batches(loader)
        assert len(recorded) == 2
        assert recorded.batch_size == 3
        assert recorded.dataset is loader.dataset
        for ours, theirs in zip(recorded, loader, strict=True):
            assert torch.equal(ours[0], theirs[0])
        with pytest.raises(AttributeError):
            _ = recorded.no_such_thing

    def test_nothing_is_recorded_and_nothing_is_checked_where_no_audit_runs(self):
        assert list(record_batches(["any", "thing"])) == ["any", "thing"]


def with_mod(*mods, **config):
    """Runs an app whose mods are given, outermost first, and returns its reply."""
    return new_app(*mods)(train_message(**config), new_context(2))


class TestStackedWithFlowersMods:
    """At either end of the stack the report holds the undefended update, and the other mod does its work."""

    def mods(self, other, outermost):
        ours = InversionAuditMod(hand_over_batches=True)
        return (ours, other) if outermost else (other, ours)

    @pytest.mark.parametrize("outermost", [True, False])
    def test_local_differential_privacy(self, outermost):
        np.random.seed(0)
        noise = 0.01
        epsilon = float(np.sqrt(2 * np.log(1.25 / 1e-5)) / noise)
        reply = with_mod(*self.mods(LocalDpMod(1e-3, 1.0, epsilon, 1e-5), outermost))
        shared = flat(change_of(reply, new_model().state_dict()))
        assert shared.std() == pytest.approx(noise, rel=0.15)
        self.assert_undefended(reply)

    @pytest.mark.parametrize("outermost", [True, False])
    @pytest.mark.parametrize("clipping", [fixedclipping_mod, adaptiveclipping_mod])
    def test_clipping(self, clipping, outermost):
        reply = with_mod(*self.mods(clipping, outermost), clipping_norm=1e-3)
        assert np.linalg.norm(flat(change_of(reply, new_model().state_dict()))) == pytest.approx(1e-3, rel=1e-3)
        self.assert_undefended(reply)

    def assert_undefended(self, reply):
        plain = change_of(new_app()(train_message(request=None), new_context(2)), new_model().state_dict())
        captured = report_of(reply).captured
        for name, array in captured.items():
            np.testing.assert_array_equal(array, plain[name].numpy())
        assert isinstance(reply.content["arrays"], ArrayRecord)


def flat(change):
    return torch.cat([tensor.flatten() for tensor in change.values()]).numpy()


def test_what_is_recorded_takes_time_in_proportion_to_the_examples():
    """Twenty thousand batches of one: looking through all that were seen for each would take many times as long."""
    capture = TrainingCapture({}, max_bytes=2**30)
    inputs, labels = torch.arange(20_000.0)[:, None, None], torch.zeros(20_000, 1, dtype=torch.long)
    started = time.process_time()
    for x, y in zip(inputs, labels, strict=True):
        capture.add_batch(x, y)
    assert time.process_time() - started < 1.5
    assert len(capture.examples()[0]) == 20_000
