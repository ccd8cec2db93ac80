"""Hostile clients: whatever arrives, the round goes on, the others are averaged, and nothing a client sent is run."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import json
import math
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import FitIns, FitRes, Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fl_privacy.audit import AuditSettings, PublicExamples, Source, Status
from fl_privacy.flower import InversionAuditMod
from fl_privacy.flower.disclosure import Disclosure
from fl_privacy.flower.older_api import NAMES_KEY
from fl_privacy.flower.records import REPORT_KEY, encode_report
from fl_privacy.flower.request import Request
from fl_privacy.strategies import OlderInversionAudit

from .cases import (
    CLASSES,
    LR,
    SHAPE,
    audited_app,
    new_app,
    new_context,
    new_model,
    report_of,
    through_the_wire,
    train_message,
)
from .test_older_api import Chosen, Proxy, Trainer, audited, own
from .test_records import PAYLOADS, SIZES, TRACES, changed
from .test_strategy import audit, fed_avg

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FEWER = settings(FUZZ, max_examples=30)
HONEST, HOSTILE = (10, 20), 30
SETTINGS = AuditSettings(max_examples=1, max_steps=4, solve_steps=4, prior_std=1.0, data_range=1.0)
BLIND = ("proxy", "reconstructed")
PUBLIC = PublicExamples(
    inputs=np.random.default_rng(0).normal(size=(12, *SHAPE)).astype(np.float32),
    labels=np.arange(12) % CLASSES,
    lr=LR,
    attack_steps=2,
    max_rebuilt=1,
)


class Trap:
    """Whoever unpickles this runs a client's code."""

    def __reduce__(self):
        return pytest.fail, ("ran what a client sent",)


PICKLE = pickle.dumps(Trap())


@functools.cache
def honest_content(node: int, audited: bool):
    app = audited_app() if audited else new_app()
    return app(train_message(), new_context(node)).content


def play(hostile: RecordDict, *, source: str = "trusted", times: int = 1, **changes):
    """Plays one round in which one client answers with the given content; returns the strategy and the result."""
    strategy = audit(
        fed_avg(),
        source=source,
        public=PUBLIC if source in BLIND else None,
        settings=dataclasses.replace(SETTINGS, **changes),
    )
    strategy._sent = sent = [train_message() for _ in (*HONEST, HOSTILE)]
    strategy._requests = {node: strategy._request(node) for node in (*HONEST, HOSTILE)}
    strategy._arrays = ArrayRecord(new_model().state_dict())
    replies = []
    for index, (message, node) in enumerate(zip(sent, (*HONEST, HOSTILE), strict=True)):
        message.metadata.__dict__.update(_message_id=f"m{index}", _dst_node_id=node)
        strategy._note_learning_rate(message)
        content = hostile if node == HOSTILE else RecordDict(dict(honest_content(node, False)))
        answer = through_the_wire(Message(content=content, reply_to=message))
        replies += [answer] * (times if node == HOSTILE else 1)
    return strategy, strategy.aggregate_train(1, replies)


def hostile_row(strategy):
    return next(row for row in strategy.estimates if row.node_id == HOSTILE)


def assert_the_round_went_on(strategy, result, *, nodes=3):
    arrays, metrics = result
    assert len(strategy.estimates) >= nodes
    for node in HONEST:
        (row,) = [row for row in strategy.estimates if row.node_id == node]
        audited = row.status in (Status.APPROXIMATE, Status.UNVERIFIED, Status.AUDIT_FAILED)
        assert audited if strategy.source in BLIND else row.status is Status.UNPROTECTED
        assert row.action == "passed"
    assert metrics is not None
    for name, array in arrays.items():
        assert np.isfinite(array.numpy()).all(), name
    json.dumps([row.to_dict() for row in strategy.estimates], allow_nan=False)


def content_with(**records):
    good = honest_content(HOSTILE, True)
    merged = {**good, **records}
    return RecordDict({name: record for name, record in merged.items() if record is not ...})


def raw(data: bytes, *, dtype="float32", shape=(3,), stype="numpy.ndarray"):
    good = honest_content(HOSTILE, False)["arrays"]
    broken = Array(dtype=dtype, shape=tuple(shape), stype=stype, data=data)
    return content_with(arrays=ArrayRecord({**good, "4.bias": broken}))


def npy(header: str, body: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


def archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3, np.float32))
    return buffer.getvalue()


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.npy", bytes(2**26))
    return buffer.getvalue()


ARRAYS = {
    "a pickle": PICKLE,
    "an object array": npy("{'descr': '|O', 'fortran_order': False, 'shape': (3,), }", PICKLE),
    "an archive": archive(),
    "an archive that unpacks to much": zip_bomb(),
    "a header of a huge array": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }"),
    "a header of huge elements": npy("{'descr': '|V500000000', 'fortran_order': False, 'shape': (3,), }"),
    "a header of a negative array": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-3,), }"),
    "a header that is code": npy("{'descr': __import__('os').abort(), 'fortran_order': False, 'shape': (3,), }"),
    "a header that is deep": npy("(" * 5000),
    "a magic and no more": b"\x93NUMPY",
    "nothing": b"",
}


class TestArrays:
    @pytest.mark.parametrize("name", ARRAYS)
    def test_it_is_an_invalid_update_and_left_out(self, name):
        strategy, result = play(raw(ARRAYS[name]))
        row = hostile_row(strategy)
        assert (row.status, row.action) == (Status.INVALID_UPDATE, "excluded")
        assert "4.bias" in row.detail
        assert_the_round_went_on(strategy, result)

    def test_no_header_makes_the_server_allocate_what_did_not_arrive(self):
        tracemalloc.start()
        try:
            for name in ("an archive that unpacks to much", "a header of a huge array", "a header of huge elements"):
                play(raw(ARRAYS[name]))
            assert tracemalloc.get_traced_memory()[1] < 2**25
        finally:
            tracemalloc.stop()

    @FUZZ
    @given(
        data=st.binary(max_size=200) | st.builds(npy, st.text(max_size=60), st.binary(max_size=40)),
        dtype=st.sampled_from(["float32", "float64", "int64", "object", "O", "V8", "nonsense", ""]),
        shape=st.lists(st.integers(0, 2**31 - 1), max_size=3),
        stype=st.sampled_from(["numpy.ndarray", "pickle", "torch.tensor", ""]),
    )
    def test_any_bytes(self, data, dtype, shape, stype):
        strategy, result = play(raw(data, dtype=dtype, shape=shape, stype=stype))
        assert hostile_row(strategy).status is Status.INVALID_UPDATE
        assert_the_round_went_on(strategy, result)


BIG = 2**63 - 1
METRICS = {
    "a weight beyond all examples": ({"num-examples": 1e300, "loss": 1.0}, "num-examples < 2**53, got 1e+300"),
    "no metrics": (..., "got 0 of them"),
    "no weight": ({"loss": 1.0}, "got None"),
    "a negative weight": ({"num-examples": -4, "loss": 1.0}, "num-examples > 0, got -4"),
    "a weight of zero": ({"num-examples": 0, "loss": 1.0}, "num-examples > 0, got 0"),
    "a weight that is NaN": ({"num-examples": math.nan, "loss": 1.0}, "num-examples > 0, got nan"),
    "an infinite weight": ({"num-examples": math.inf, "loss": 1.0}, "num-examples > 0, got inf"),
    "a weight that is a list": ({"num-examples": [4], "loss": 1.0}, "num-examples > 0, got [4]"),
    "a metric too many": ({"num-examples": 4, "loss": 1.0, "more": 1.0}, "cannot be averaged together"),
    "a metric too few": ({"num-examples": 4}, "cannot be averaged together"),
    "a metric that is a list": ({"num-examples": 4, "loss": [1.0, 2.0]}, "cannot be averaged together"),
}


@pytest.mark.parametrize("dtype", [np.longdouble, np.float16])
def test_a_type_in_which_the_others_could_not_train_on_is_left_out(dtype):
    """Flower's average has the type of the reply that comes first, and goes to every client."""
    good = honest_content(HOSTILE, False)["arrays"]
    odd = ArrayRecord({name: Array(array.numpy().astype(dtype)) for name, array in good.items()})
    strategy, result = play(content_with(arrays=odd))
    row = hostile_row(strategy)
    assert (row.status, row.action) == (Status.INVALID_UPDATE, "excluded")
    assert f"of float32, float32 or float64, got {np.dtype(dtype)}" in row.detail
    assert {array.dtype for array in result[0].values()} == {"float32"}


class TestMetrics:
    """Flower's averaging raises on these, which would end the run for everyone."""

    @pytest.mark.parametrize("name", METRICS)
    def test_a_reply_that_cannot_be_averaged_with_the_others_is_left_out(self, name):
        metrics, detail = METRICS[name]
        strategy, result = play(content_with(metrics=metrics if metrics is ... else MetricRecord(metrics)))
        row = hostile_row(strategy)
        assert (row.status, row.action) == (Status.INVALID_UPDATE, "excluded")
        assert detail in row.detail
        assert_the_round_went_on(strategy, result)

    @pytest.mark.parametrize("name", METRICS)
    @pytest.mark.parametrize("place", [0, 2])
    def test_an_evaluation_that_cannot_be_averaged_with_the_others_ends_no_run(self, name, place):
        metrics, _ = METRICS[name]
        strategy = audit(fed_avg())
        contents = [RecordDict({"metrics": MetricRecord({"num-examples": 4, "loss": 1.0})}) for _ in range(2)]
        odd = RecordDict() if metrics is ... else RecordDict({"metrics": MetricRecord(metrics)})
        contents.insert(place, odd)
        asked = train_message(kind="evaluate", request=None)
        replies = [through_the_wire(Message(content=content, reply_to=asked)) for content in contents]
        assert strategy.aggregate_evaluate(1, replies) == {"loss": 1.0}

    def test_a_record_by_another_name_too(self):
        good = honest_content(HOSTILE, True)
        content = content_with(metrics=..., others=good["metrics"])
        strategy, result = play(content)
        assert hostile_row(strategy).status is Status.INVALID_UPDATE
        assert_the_round_went_on(strategy, result)

    @FUZZ
    @given(
        metrics=st.dictionaries(
            st.sampled_from(["num-examples", "loss", "x", ""]),
            st.integers(-BIG, BIG) | st.floats() | st.lists(st.floats(), max_size=2),
            max_size=3,
        ),
        more=st.dictionaries(
            st.sampled_from(["a", "arrays2", REPORT_KEY]), st.just(MetricRecord({"a": 1})), max_size=2
        ),
    )
    def test_any_metrics(self, metrics, more):
        strategy, result = play(content_with(metrics=MetricRecord(metrics), **more))
        assert_the_round_went_on(strategy, result)


class TestTies:
    """As many replies of one shape as of another: who comes first must not decide."""

    def tied(self, *pairs):
        """Plays a round of clients that answer with (metrics, name of the arrays' record); returns rows and result."""
        strategy = audit(fed_avg())
        strategy._sent = sent = [train_message() for _ in pairs]
        strategy._arrays = ArrayRecord(new_model().state_dict())
        replies = []
        for node, (message, (metrics, name)) in enumerate(zip(sent, pairs, strict=True)):
            message.metadata.__dict__.update(_message_id=f"m{node}", _dst_node_id=node)
            content = RecordDict({name: honest_content(HOSTILE, False)["arrays"], "metrics": MetricRecord(metrics)})
            replies.append(through_the_wire(Message(content=content, reply_to=message)))
        arrays, averaged = strategy.aggregate_train(1, replies)
        return {row.node_id: row for row in strategy.estimates}, set(arrays), averaged

    PLAIN = ({"num-examples": 4, "loss": 1.0}, "arrays")

    @pytest.mark.parametrize("first", [0, 1])
    @pytest.mark.parametrize(
        "other", [{"num-examples": 4, "x": 1.0}, {"num-examples": 4, "loss": [1.0, 2.0]}, {"num-examples": 4}]
    )
    def test_metrics_that_only_half_of_them_hold_are_not_averaged_and_every_update_is(self, other, first):
        pairs = [self.PLAIN, (other, "arrays")]
        rows, _, averaged = self.tied(*(pairs[::-1] if first else pairs))
        assert {row.action for row in rows.values()} == {"passed"}
        assert not {"loss", "x"} & set(averaged)
        row = rows[1 if first else 0]
        assert "not averaged: its metrics loss, which as many other replies do not hold" in row.detail

    @pytest.mark.parametrize("first", [0, 1])
    def test_arrays_go_by_the_name_under_which_they_were_sent(self, first):
        pairs = [self.PLAIN, (self.PLAIN[0], "a-name-of-its-own")]
        rows, _, averaged = self.tied(*(pairs[::-1] if first else pairs))
        odd = rows[0 if first else 1]
        assert (odd.status, odd.action) == (Status.INVALID_UPDATE, "excluded")
        assert rows[1 if first else 0].action == "passed"
        assert averaged["loss"] == 1.0

    def test_a_majority_that_names_them_otherwise_is_the_apps_own_choice(self):
        rows, names, _ = self.tied(*[(self.PLAIN[0], "weights")] * 2, self.PLAIN)
        assert [row.action for row in rows.values()] == ["passed", "passed", "excluded"]
        assert names == set(new_model().state_dict())


NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)


class TestUpdates:
    """Arrays and weights that can be averaged, whatever they hold."""

    @pytest.mark.parametrize("source", ["trusted", "client", *BLIND])
    @FEWER
    @given(
        fill=st.dictionaries(st.sampled_from(sorted(new_model().state_dict())), NUMBERS | st.none(), max_size=4),
        scale=st.sampled_from([0.0, 1e-40, 1e-20, 1.0, 1e10, 1e30]),
        count=st.integers(1, 2**53 - 1) | st.floats(min_value=1e-300, max_value=9e15) | st.just(1),
        claim=st.none()
        | st.fixed_dictionaries({"kind": st.text(max_size=5), "noise_std": st.floats(), "sparsity": NUMBERS}),
    )
    def test_any_numbers(self, source, fill, scale, count, claim):
        good = honest_content(HOSTILE, True)
        arrays = {name: scale * array.numpy() for name, array in good["arrays"].items()}
        for name, value in fill.items():
            arrays[name] = arrays[name] if value is None else np.full_like(arrays[name], value)
        head = {**json.loads(good[REPORT_KEY]["head"]), "claim": claim}
        strategy, result = play(
            content_with(
                arrays=ArrayRecord({name: Array(array.astype(np.float32)) for name, array in arrays.items()}),
                metrics=MetricRecord({"num-examples": count, "loss": 1.0}),
                **{REPORT_KEY: ConfigRecord({**good[REPORT_KEY], "head": json.dumps(head)})},
            ),
            source=source,
        )
        assert_the_round_went_on(strategy, result)
        row = hostile_row(strategy)
        if row.leakage is not None:
            assert 0 <= row.leakage.lower <= row.leakage.value <= row.leakage.upper <= 1


@functools.cache
def honest_estimate():
    """A client's answer with the scalars of its own audit."""
    app = new_app(InversionAuditMod(model=lambda context: new_model(), loss=nn.CrossEntropyLoss()))
    return app(train_message(**Request.for_estimate(SETTINGS).entries(), request=None), new_context(HOSTILE)).content


class TestEstimates:
    @FUZZ
    @given(
        changes=st.dictionaries(
            st.sampled_from([field.name for field in dataclasses.fields(Disclosure)]) | st.text(max_size=5),
            st.floats()
            | st.integers()
            | st.booleans()
            | st.none()
            | st.text(max_size=8)
            | st.lists(st.floats(), max_size=4),
            max_size=4,
        ),
        scale=st.sampled_from([0.0, 0.5, 1.0, 2.0, 1e20]),
    )
    def test_any_numbers_that_a_client_tells_of_its_own_audit(self, changes, scale):
        good = honest_estimate()
        head = json.loads(good[REPORT_KEY]["head"])
        head["estimate"] |= changes
        sent = new_model().state_dict()
        arrays = {
            name: sent[name].numpy() + scale * (a.numpy() - sent[name].numpy()) for name, a in good["arrays"].items()
        }
        content = RecordDict(
            {
                "arrays": ArrayRecord({name: Array(array.astype(np.float32)) for name, array in arrays.items()}),
                "metrics": good["metrics"],
                REPORT_KEY: ConfigRecord({"head": json.dumps(head)}),
            }
        )
        strategy, result = play(content, source="client")
        assert_the_round_went_on(strategy, result)
        row = hostile_row(strategy)
        if not changes and scale == 1.0:
            assert (row.status, row.source) == (Status.AUDITED, Source.CLIENT)
        if row.leakage is not None and scale in (0.0, 1e20) and "shared_norm" not in changes:
            assert (row.status, row.leakage.upper) == (Status.UNVERIFIED, 1.0)


class TestReports:
    @pytest.mark.parametrize("source", ["trusted", "client", *BLIND])
    @FUZZ
    @given(head=st.text(max_size=40) | st.binary(max_size=40), payload=PAYLOADS)
    def test_any_record(self, source, head, payload):
        record = ConfigRecord({"head": head, **payload})
        strategy, result = play(content_with(**{REPORT_KEY: record}), source=source)
        row = hostile_row(strategy)
        if source not in BLIND:  # they need no report
            assert row.status is Status.INVALID_REPORT
        assert_the_round_went_on(strategy, result)

    @FUZZ
    @given(entries=TRACES, sizes=st.lists(SIZES, max_size=3))
    def test_any_trace_and_any_shape_in_a_record_that_is_else_in_order(self, entries, sizes):
        head = json.loads(honest_content(HOSTILE, True)[REPORT_KEY]["head"])
        trace = {**head["trace"], **entries}
        arrays = {**head["arrays"], "inputs": ["float32", sizes or [4, 1, 4, 4]]}
        record = ConfigRecord(
            {
                **honest_content(HOSTILE, True)[REPORT_KEY],
                "head": json.dumps({**head, "trace": trace, "arrays": arrays}),
            }
        )
        strategy, result = play(content_with(**{REPORT_KEY: record}))
        row = hostile_row(strategy)
        assert row.status in (Status.INVALID_REPORT, Status.UNVERIFIED, Status.AUDITED, Status.AUDIT_FAILED)
        assert_the_round_went_on(strategy, result)

    @pytest.mark.parametrize("dtype", ["int64", "uint8", "bool"])
    def test_inputs_that_are_whole_numbers_are_not_blown_up_to_floats(self, dtype):
        head = json.loads(honest_content(HOSTILE, True)[REPORT_KEY]["head"])
        size = 4 * 16 * 4 // np.dtype(dtype).itemsize
        head["arrays"]["inputs"] = [dtype, [4, size // 4]]
        record = ConfigRecord({**honest_content(HOSTILE, True)[REPORT_KEY], "head": json.dumps(head)})
        strategy, _ = play(content_with(**{REPORT_KEY: record}))
        row = hostile_row(strategy)
        assert (row.status, row.detail) == (Status.INVALID_REPORT, f"expected floating-point inputs, got {dtype}")

    @pytest.mark.parametrize(
        ("batches", "problem"),
        [
            ([[0]] * 2000, "2000 local steps, more than the 1024 that are replayed"),
            ([[0] * 5000], "a mini-batch of 5000 of 4 examples, each more than 8 times"),
        ],
    )
    def test_training_of_any_length_can_be_claimed_and_is_not_replayed(self, batches, problem):
        head = json.loads(honest_content(HOSTILE, True)[REPORT_KEY]["head"])
        head["trace"] |= {"batches": batches, "lr": [0.1] * len(batches)}
        record = ConfigRecord({**honest_content(HOSTILE, True)[REPORT_KEY], "head": json.dumps(head)})
        strategy, _ = play(content_with(**{REPORT_KEY: record}))
        row = hostile_row(strategy)
        assert (row.status, row.detail, row.noise_std) == (Status.UNVERIFIED, problem, 0)

    def test_a_replay_that_would_take_more_than_the_budget_is_a_row_that_says_by_how_much(self):
        record, count = honest_content(HOSTILE, True)[REPORT_KEY], 200_000
        head = json.loads(record["head"])
        head["trace"] |= {"batches": [], "lr": [], "problem": "only torch.optim.SGD is replayed"}
        head["arrays"] |= {"inputs": ["float32", [count, *SHAPE]], "labels": ["int64", [count]]}
        arrays = {"array/inputs": bytes(4 * count * math.prod(SHAPE)), "array/labels": bytes(8 * count)}
        content = content_with(**{REPORT_KEY: ConfigRecord({**record, **arrays, "head": json.dumps(head)})})
        strategy, result = play(content, memory_budget=2**26)
        row = hostile_row(strategy)
        assert (row.status, row.action) == (Status.AUDIT_FAILED, "passed")
        assert row.detail.startswith("expected a replay within 64 MiB, and 1 steps on up to 200000 of 200000 examples")
        assert_the_round_went_on(strategy, result)

    def test_a_head_of_nothing_but_brackets_is_not_read(self):
        record = changed()
        record["head"] = "[" + "[]," * (2 * 1024**2) + "[]]"
        tracemalloc.start()
        try:
            strategy, _ = play(content_with(**{REPORT_KEY: record}))
            assert tracemalloc.get_traced_memory()[1] < 2**27
        finally:
            tracemalloc.stop()
        assert "expected a head of at most" in hostile_row(strategy).detail

    def test_a_report_cannot_speak_for_another_client(self):
        """A forged record of ours: the name is the client's to choose, the node it is charged to is not."""
        report = report_of(type("R", (), {"has_error": lambda s: False, "content": honest_content(HOSTILE, True)})())
        stolen = encode_report(type(report)(**{**report.__dict__, "client": str(HONEST[0])}))
        strategy, result = play(content_with(**{REPORT_KEY: stolen}))
        assert [row.node_id for row in strategy.estimates] == [*HONEST, HOSTILE]
        assert hostile_row(strategy).client == str(HONEST[0])
        assert_the_round_went_on(strategy, result)

    @pytest.mark.parametrize("times", [2, 5])
    def test_replies_that_come_again_count_once(self, times):
        strategy, result = play(content_with(), times=times)
        rows = [row for row in strategy.estimates if row.node_id == HOSTILE]
        assert [row.action for row in rows] == ["passed"] + ["excluded"] * (times - 1)
        assert_the_round_went_on(strategy, result)

    def test_a_reply_to_nothing_that_was_sent_is_not_averaged(self):
        strategy, _ = play(content_with())
        stranger = through_the_wire(Message(content=content_with(), reply_to=train_message()))
        stranger.metadata.__dict__["_src_node_id"] = 999
        strategy.estimates.clear()
        strategy.aggregate_train(1, [stranger])
        row = next(row for row in strategy.estimates if row.node_id == 999)
        assert (row.action, row.detail) == ("excluded", "a reply from a node that was not asked")


SCALARS = st.integers(-(2**63), BIG) | st.floats() | st.text(max_size=20) | st.binary(max_size=20) | st.booleans()


@functools.cache
def honest_fit(node: int, kind: str) -> FitRes:
    """What a client of the older API answers, with a report that the server may have asked for, or without one."""
    client = {"plain": Trainer, "batches": audited, "estimate": own}[kind](node)
    request = Request() if kind != "estimate" else Request.for_estimate(SETTINGS)
    config = {"lr": LR, NAMES_KEY: json.dumps(list(new_model().state_dict())), **request.entries()}
    return Proxy(node, client).fit(FitIns(initial_parameters(), config), None, None)


def initial_parameters():
    return ndarrays_to_parameters([tensor.numpy() for tensor in new_model().state_dict().values()])


class TestTheOlderApi:
    @pytest.mark.parametrize("source", ["trusted", "client", *BLIND])
    @FEWER
    @given(
        kind=st.sampled_from(["plain", "batches", "estimate"]),
        tensors=st.none()
        | st.lists(st.binary(max_size=80) | st.builds(npy, st.text(max_size=60), st.binary(max_size=40)), max_size=5),
        tensor_type=st.sampled_from(["numpy.ndarray", "pickle", ""]),
        count=st.integers(-(2**63), BIG) | st.integers(1, 20),
        metrics=st.dictionaries(
            st.sampled_from(["loss", "x", "fl_privacy.report/head", "fl_privacy.report/array/inputs", "fl-privacy", ""])
            | st.text(max_size=5),
            SCALARS,
            max_size=3,
        ),
        kept=st.booleans(),
    )
    def test_any_result(self, source, kind, tensors, tensor_type, count, metrics, kept):
        proxies = [Proxy(node, Trainer(node)) for node in (*HONEST, HOSTILE)]
        inner = Chosen(proxies)
        inner.fit_metrics_aggregation_fn = lambda given: {
            "mean-loss": sum(own["loss"] for _, own in given) / len(given)
        }
        strategy = OlderInversionAudit(
            inner,
            model=new_model(),
            loss=nn.CrossEntropyLoss(),
            source=source,
            public=PUBLIC if source in BLIND else None,
            settings=SETTINGS,
            ledger=None,
            show=False,
        )
        strategy.configure_fit(1, initial_parameters(), None)
        good = honest_fit(HOSTILE, kind)
        hostile = FitRes(
            good.status,
            Parameters(good.parameters.tensors if tensors is None else tensors, tensor_type),
            count,
            {**(good.metrics if kept else {}), **metrics},
        )
        results = [copy.deepcopy(honest_fit(node, "plain")) for node in HONEST] + [hostile]
        parameters, averaged = strategy.aggregate_fit(1, list(zip(proxies, results, strict=True)), [])
        for array in parameters_to_ndarrays(parameters):
            assert np.isfinite(array).all()
        assert "mean-loss" in averaged
        rows = {row.node_id: row for row in strategy.audit.estimates}
        assert all(rows[node].action == "passed" for node in HONEST)
        if tensors is not None or not 0 < count < 2**53:
            assert rows[HOSTILE].action == "excluded"
        json.dumps([row.to_dict() for row in rows.values()], allow_nan=False)
