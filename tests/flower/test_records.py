"""The report's record: what goes in comes out, and whatever else arrives is a RecordError."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_privacy.audit import TrainingTrace
from fl_privacy.errors import RecordError
from fl_privacy.flower.records import REPORT_KEY, ClientReport, decode_report, encode_report

LIMIT = 1 << 20
TRACE = TrainingTrace(
    optimizer="SGD",
    batches=((0, 1), (1, 2)),
    lr=(0.1, 0.05),
    momentum=0.9,
    dampening=0.0,
    weight_decay=1e-4,
    nesterov=True,
)


def report_with(*, dtype="float32", labels="int64", shape=(3, 2, 2)):
    rng = np.random.default_rng(0)
    return ClientReport(
        client="Zürich 3",
        defence="prune 90%",
        inputs=rng.normal(size=shape).astype(dtype),
        labels=rng.integers(0, 2, size=shape[0]).astype(labels),
        trace=TRACE,
        captured={"a.weight": rng.normal(size=(2, 3)).astype(dtype), "b": np.float32(1.5)},
    )


def over_the_wire(record):
    content = recorddict_from_proto(recorddict_to_proto(RecordDict({REPORT_KEY: record})))
    return decode_report(content[REPORT_KEY], max_bytes=LIMIT)


def changed(**head):
    """A good record whose head has other entries; an entry of `...` is left out."""
    record = encode_report(report_with())
    merged = {**json.loads(record["head"]), **head}
    record["head"] = json.dumps({key: value for key, value in merged.items() if value is not ...})
    return record


def changed_trace(**entries):
    return changed(trace={**json.loads(encode_report(report_with())["head"])["trace"], **entries})


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    @pytest.mark.parametrize("labels", ["int64", "int32", "uint8", "bool", "float64"])
    def test_every_array_comes_back_bit_for_bit(self, dtype, labels):
        report = report_with(dtype=dtype, labels=labels)
        back = over_the_wire(encode_report(report))
        pairs = [(back.inputs, report.inputs), (back.labels, report.labels)]
        pairs += [(back.captured[name], report.captured[name]) for name in report.captured]
        for ours, theirs in pairs:
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert ours.tobytes() == theirs.tobytes()
        assert (back.client, back.defence, back.refused, back.trace) == ("Zürich 3", "prune 90%", "", TRACE)
        assert set(back.captured) == {"a.weight", "b"}

    def test_arrays_that_are_not_contiguous_keep_their_order(self):
        turned = np.arange(12, dtype=np.float32).reshape(3, 4).T
        report = replace(report_with(), inputs=turned, labels=np.zeros(4, np.int64))
        np.testing.assert_array_equal(over_the_wire(encode_report(report)).inputs, turned)

    def test_a_refusal_comes_back_without_arrays(self):
        back = over_the_wire(encode_report(ClientReport(client="3", refused="the app forbids it")))
        assert (back.refused, back.inputs, back.labels, back.trace, back.captured) == (
            "the app forbids it",
            None,
            None,
            None,
            None,
        )

    def test_numbers_of_the_trace_keep_every_digit(self):
        trace = replace(TRACE, lr=(0.1 + 1e-17, 1 / 3))
        assert over_the_wire(encode_report(replace(report_with(), trace=trace))).trace == trace


BIG = 10**400
ARRAY = {"inputs": ["float32", [3, 2, 2]], "labels": ["int64", [3]]}
FORGED = {
    "another version": changed(version=2),
    "no version": changed(version=...),
    "an array that is not there": changed(arrays={**ARRAY, "extra": ["float32", [1]]}),
    "arrays that are a list": changed(arrays=[1]),
    "a negative size": changed(arrays={"inputs": ["float32", [-3, -2, 2]]}),
    "a fractional size": changed(arrays={"inputs": ["float32", [3.0, 4]]}),
    "a boolean size": changed(arrays={"labels": ["int64", [True, 3]]}),
    "a size beyond memory": changed(arrays={"inputs": ["float32", [2**40, 2**20]]}),
    "sizes whose product wraps around": changed(arrays={"inputs": ["float32", [2**32, 2**32, 12]]}),
    "sizes with more digits than are printed": changed(arrays={"inputs": ["float32", [BIG] * 16]}),
    "more sizes than an array has": changed(arrays={"inputs": ["float32", [1] * 40 + [12]]}),
    "bytes too few": changed(arrays={"inputs": ["float64", [3, 2, 2]]}),
    "bytes too many": changed(arrays={"inputs": ["float32", [3, 2]]}),
    "objects": changed(arrays={"inputs": ["object", [6]]}),
    "a type with fields": changed(arrays={"inputs": ["f4,f4", [6]]}),
    "a type that is a list": changed(arrays={"inputs": [["float32"], [12]]}),
    "a client that is a number": changed(client=3),
    "a trace that is a list": changed(trace=[]),
    "NaN as a learning rate": changed_trace(lr=[float("nan"), 0.1]),
    "an infinite momentum": changed_trace(momentum=float("inf")),
    "a learning rate beyond floats": changed_trace(lr=[BIG, 0.1]),
    "a momentum beyond floats": changed_trace(momentum=BIG),
    "a learning rate too few": changed_trace(lr=[0.1]),
    "an index that is a float": changed_trace(batches=[[0.0], [1]]),
    "an index that is a boolean": changed_trace(batches=[[True], [1]]),
    "nesterov that is a number": changed_trace(nesterov=1),
    "a head that is no JSON": ConfigRecord({"head": "{"}),
    "a head that is a list": ConfigRecord({"head": "[]"}),
    "a head that is deep": ConfigRecord({"head": "[" * 100_000}),
    "a head with a number that is long": ConfigRecord({"head": "1" * 10_000}),
    "a head that is bytes": ConfigRecord({"head": b"{}"}),
    "no head": ConfigRecord({}),
    "an array record": ArrayRecord([np.zeros(2)]),
    "a metric record": MetricRecord({"head": 1}),
    "nothing": None,
}
EMPTY = {"array/inputs": b"", "array/labels": b""}
for name, sizes in {"huge": [0, 10**30], "overflowing": [0, 2**62, 2**62], "fitting": [0, 2**63 - 1, 8]}.items():
    record = changed(arrays={"inputs": ["float32", sizes]})
    record["array/inputs"] = b""
    FORGED[f"nothing, of {name} shape"] = record


class TestForgeries:
    @pytest.mark.parametrize("name", FORGED)
    def test_it_is_a_record_error_that_says_what_was_expected(self, name):
        with pytest.raises(RecordError, match="expected"):
            decode_report(FORGED[name], max_bytes=LIMIT)

    def test_more_bytes_than_are_accepted(self):
        record = encode_report(report_with())
        sent = sum(len(value) for key, value in record.items() if key != "head")
        assert decode_report(record, max_bytes=sent + len(record["head"])).client == "Zürich 3"
        with pytest.raises(RecordError, match=f"at most {sent - 1} bytes"):
            decode_report(record, max_bytes=sent - 1)

    def test_a_head_that_is_all_of_the_bytes_counts_too(self):
        with pytest.raises(RecordError, match="at most 1000 bytes"):
            decode_report(changed(defence="x" * 2000, arrays={}), max_bytes=1000)

    def test_a_pickle_is_bytes_and_stays_bytes(self):
        class Trap:
            def __reduce__(self):
                return pytest.fail, ("unpickled what a client sent",)

        data = pickle.dumps(Trap())
        record = changed(arrays={"inputs": ["uint8", [len(data)]]})
        record["array/inputs"] = data
        assert decode_report(record, max_bytes=LIMIT).inputs.tobytes() == data
        with pytest.raises(RecordError):
            decode_report(ConfigRecord({"head": data, "array/inputs": data}), max_bytes=LIMIT)

    def test_long_texts_are_cut_and_what_no_database_holds_is_taken_out(self):
        report = decode_report(changed(client="a\ud800b\x00c", defence="x" * 10_000), max_bytes=LIMIT)
        assert len(report.defence) == 500
        report.client.encode()
        assert "\x00" not in report.client

    @pytest.mark.parametrize("name", [name for name in FORGED if "memory" in name or "shape" in name or "deep" in name])
    def test_no_claim_allocates_more_than_arrived(self, name):
        tracemalloc.start()
        try:
            with pytest.raises(RecordError):
                decode_report(FORGED[name], max_bytes=LIMIT)
            assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
        finally:
            tracemalloc.stop()


SIZES = st.integers(-2, 5) | st.integers() | st.sampled_from([2**31, 2**62, 2**63, 2**64, BIG])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(BIG),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.tuples(
    st.sampled_from(["float32", "int8", "bool", "object", "O", "V8", "<U4"]), st.lists(SIZES, max_size=4)
)
HEADS = st.fixed_dictionaries(
    {},
    optional={
        "version": st.sampled_from([1, 1.0, True, 2, None]),
        "client": JSON,
        "defence": JSON,
        "refused": JSON,
        "trace": JSON | st.none(),
        "arrays": st.dictionaries(st.sampled_from(["inputs", "labels", "captured/a", ""]), ENTRIES | JSON, max_size=3),
    },
)
TRACES = st.fixed_dictionaries(
    {},
    optional={
        "batches": st.lists(st.lists(SIZES, max_size=3), max_size=3) | JSON,
        "lr": st.lists(st.floats() | st.just(BIG), max_size=3) | JSON,
        "momentum": st.floats() | JSON,
        "dampening": st.floats() | JSON,
        "weight_decay": st.floats() | JSON,
        "nesterov": JSON,
        "optimizer": JSON,
        "problem": JSON,
    },
)
VALUES = st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=20) | st.binary(max_size=20) | st.booleans()
PAYLOADS = st.dictionaries(
    st.sampled_from(["array/inputs", "array/labels", "array/captured/a", "array/", "other"]), VALUES, max_size=3
)


def decodes_or_refuses(record):
    try:
        report = decode_report(record, max_bytes=LIMIT)
    except RecordError:
        return
    assert isinstance(report, ClientReport)
    report.client.encode()


class TestFuzz:
    @settings(max_examples=150, deadline=None)
    @given(head=HEADS, payload=PAYLOADS)
    def test_a_good_record_with_other_entries(self, head, payload):
        record = changed(**head)
        for key, value in payload.items():
            record[key] = value
        decodes_or_refuses(record)

    @settings(max_examples=150, deadline=None)
    @given(entries=TRACES)
    def test_a_good_record_with_another_trace(self, entries):
        decodes_or_refuses(changed_trace(**entries))

    @settings(max_examples=100, deadline=None)
    @given(head=JSON | st.text() | st.binary(), payload=PAYLOADS)
    def test_any_record(self, head, payload):
        text = head if isinstance(head, str | bytes) else json.dumps(head)
        decodes_or_refuses(ConfigRecord({"head": text, **payload}))

    @settings(max_examples=100, deadline=None)
    @given(position=st.integers(0, 10**6), character=st.characters())
    def test_a_good_record_with_a_flipped_character(self, position, character):
        record = encode_report(report_with())
        head = record["head"]
        at = position % len(head)
        record["head"] = head[:at] + character + head[at + 1 :]
        decodes_or_refuses(record)
