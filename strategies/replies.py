"""Reading a round's replies: which client each comes from, whether its update can be used, and what it reports."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import Message, MetricRecord

from fl_privacy.audit.claims import Defence, Traces
from fl_privacy.audit.estimate import LeakageEstimate, Source, Status
from fl_privacy.audit.task import Array, AuditTask, ClientUpdate
from fl_privacy.audit.wording import joined
from fl_privacy.errors import FLPrivacyError, RecordError
from fl_privacy.flower.records import CLAIM, ESTIMATE, REPORT_KEY, ClientReport, decode_report
from fl_privacy.flower.request import Request
from fl_privacy.flower.updates import UnusableUpdateError, shared_update, update_norm
from fl_privacy.interval import Interval

Look = Callable[[Mapping[str, Array], int | None], Traces | None]

LARGEST_WEIGHT = 2.0**53
"""Below which whole numbers are exact, and sums of many far from infinity."""
_NORM_RTOL = 0.01
"""How closely the norm that a client audited must be that of what arrived: it is told to three digits."""


@dataclass(eq=False)
class Reading:
    """One client's part of a round, as far as it could be read.

    Attributes:
        node_id: Flower's node id.
        reply: What it sent; `None` if nothing came.
        row: Its row in the ledger, without an estimate until the audit has one.
        task: What is to be audited; `None` where there is nothing.
        shared: Its update, where that alone is to be audited.
        aggregable: Whether the inner strategy can average the update.
        aggregate: Whether what arrived is the mean of several clients' updates, which no policy can tell apart.
        named: Whether the row's client is a name that the client gave.
        mismatch: What tells that a client audited another update than the one that arrived; empty if nothing.
        traces: What the update alone shows of how it was defended.
        claim: What the client says of that.
    """

    node_id: int
    reply: Message | None
    row: LeakageEstimate
    task: ClientUpdate | None = None
    shared: Mapping[str, Array] | None = None
    aggregable: bool = True
    aggregate: bool = False
    named: bool = False
    mismatch: str = ""
    traces: Traces | None = None
    claim: Defence | None = None


def read_replies(
    server_round: int,
    sent: Sequence[Message],
    replies: Sequence[Message],
    expected: Mapping[str, Array],
    trained: Sequence[str],
    *,
    requests: Mapping[int, Request],
    max_report_bytes: int,
    names: dict[int, str],
    look: Look = lambda _, __: None,
    weighted_by: str | None = None,
    expect_aggregates: bool = False,
) -> list[Reading]:
    """Returns a reading of every client that was asked, and takes the audit's records out of the replies.

    Args:
        server_round: Round number.
        sent: The round's training messages.
        replies: What came back.
        expected: The global arrays that were sent, by name.
        trained: Names of the trained parameters.
        requests: By node id, what a client was asked for; anything else it sends is refused.
        max_report_bytes: Most bytes of a client's report to accept.
        names: By node id, the names that clients gave in their reports: a client that later fails keeps its name.
            What is learned of this round is added.
        look: Returns what an update alone shows of how it was defended, given on how many examples it is said to rest.
        weighted_by: Metric by which the inner strategy weighs replies. Flower's averaging raises, and ends the run, if
            one reply has other records or metrics than the rest: such a reply is then left out. `None`: none is.
        expect_aggregates: Whether replies that all carry the same arrays are to be taken for what secure aggregation
            leaves: the mean, in which no client's own update can be seen.
    """
    node_of = {message.metadata.message_id: message.metadata.dst_node_id for message in sent}
    silent = dict.fromkeys(message.metadata.dst_node_id for message in sent)
    readings: list[Reading] = []
    aggregate = expect_aggregates and _are_all_the_same(replies)
    for reply in replies:
        node_id = node_of.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
        request = requests.get(node_id, Request())
        readings.append(_read(server_round, node_id, reply, expected, trained, request, max_report_bytes, look))
        if aggregate and readings[-1].aggregable:
            _mark_aggregate(readings[-1])
        elif readings[-1].mismatch:
            _discredit(readings[-1])
        if node_id in silent:
            del silent[node_id]
        elif node_id in node_of.values():
            _reject(readings[-1], Status.INVALID_UPDATE, "a second reply from the same client")
        elif not reply.has_error():
            _reject(readings[-1], Status.INVALID_UPDATE, "a reply from a node that was not asked")
    if weighted_by is not None:
        _reject_odd_ones(readings, weighted_by, _records_sent(sent))
    for node_id in silent:
        row = _row(server_round, node_id, Status.NO_REPLY, detail="asked, and never answered")
        readings.append(Reading(node_id, None, row))
    for reading in readings:
        _settle_name(reading, names)
    return readings


def _settle_name(reading: Reading, names: dict[int, str]) -> None:
    """Gives a client the name under which it first reported: neither another one later nor somebody else's."""
    node_id, claimed = reading.node_id, reading.row.client
    if node_id not in names and reading.named:
        taken = claimed in names.values()
        names[node_id] = f"{claimed} (node {node_id})" if taken else claimed
    name = names.get(node_id, claimed)
    if name != claimed:
        reading.row = _changed(reading.row, client=name)
        if reading.task is not None:
            reading.task = replace(reading.task, client=name)


def _read(
    server_round: int,
    node_id: int,
    reply: Message,
    expected: Mapping[str, Array],
    trained: Sequence[str],
    request: Request,
    max_report_bytes: int,
    look: Look,
) -> Reading:
    if reply.has_error():
        lines = reply.error.reason.strip().splitlines() if reply.error.reason else []
        detail = f"error {reply.error.code}: {lines[-1] if lines else 'no reason given'}"
        return Reading(node_id, reply, _row(server_round, node_id, Status.CLIENT_ERROR, detail=detail))
    record = reply.content.pop(REPORT_KEY, None)
    row = _row(server_round, node_id, Status.UNPROTECTED, num_examples=_num_examples(reply))
    reading = Reading(node_id, reply, row)
    problem = ""
    report: ClientReport | None = None
    if record is None:
        reading.row = _changed(row, detail="no report: the client runs without the audit's mod")
    else:
        try:
            report = decode_report(record, max_bytes=max_report_bytes)
        except RecordError as error:
            problem = str(error)
            reading.row = _changed(row, status=Status.INVALID_REPORT, detail=problem)
    if report is not None:
        reading.named = bool(report.client)
        reading.row = _changed(
            reading.row,
            client=report.client or row.client,
            defence=report.defence,
            applied_noise_std=report.applied_noise_std,
        )
    try:
        shared = shared_update(reply.content, expected, trained)
    except UnusableUpdateError as error:
        _reject(reading, Status.INVALID_UPDATE, str(error))
        return reading
    reading.traces = look(shared, _examples_behind(report, row.num_examples))
    reading.claim = None if report is None else report.claim
    if request.kind == CLAIM:  # with a report or without: there is an update
        reading.shared = shared
        return reading
    if report is None:
        return reading
    if report.refused:
        reading.row = _changed(reading.row, status=Status.REFUSED, detail=report.refused)
        return reading
    try:
        if request.kind == ESTIMATE:
            _disclose(reading, report, shared, request)
        else:
            reading.task = _task(reading, report, shared, expected, trained)
    except FLPrivacyError as error:
        reading.row = _changed(reading.row, status=Status.INVALID_REPORT, detail=str(error))
    return reading


def _examples_behind(report: ClientReport | None, said: int | None) -> int | None:
    """Returns how many examples are behind an update: as many as its steps name, where they are told, or as is said."""
    named = sum(map(len, report.trace.batches)) if report is not None and report.trace is not None else 0
    return named or said


def _disclose(reading: Reading, report: ClientReport, shared: Mapping[str, Array], request: Request) -> None:
    """Puts what a client says of its own audit into its row, and sets it against the update that arrived."""
    if any(part is not None for part in (report.inputs, report.labels, report.captured, report.shift)):
        raise RecordError("the report holds a batch, and only an estimate was asked for: it was not looked at")
    estimate = report.estimate
    if estimate is None:
        raise RecordError("the report holds no estimate")
    dim = sum(array.size for array in shared.values())
    if estimate.update_dim not in (None, dim):
        raise RecordError(f"expected an estimate of an update of {dim} parameters, got {estimate.update_dim}")
    for name, wanted in request.fixed.items():
        told = getattr(estimate, name)
        if estimate.leakage is not None and told != wanted:
            raise RecordError(f"expected an estimate for {name} of {wanted}, as asked, got {told}")
    reading.row = estimate.applied(reading.row)
    arrived = update_norm(shared)
    if abs(arrived - estimate.shared_norm) > _NORM_RTOL * arrived:
        reading.mismatch = (
            f"the client audited an update of norm {estimate.shared_norm:.3g} and {arrived:.3g} arrived: "
            "nothing that it found is credited"
        )


def _discredit(reading: Reading) -> None:
    """Takes a client's own estimate for that of another update than the one that arrived, of which nothing is known."""
    row = _changed(reading.row, detail=joined(reading.row.detail, reading.mismatch))
    if row.leakage is not None:
        unknown = Interval(row.leakage.lower, 1.0, 1.0)
        row = _changed(row, status=Status.UNVERIFIED, verified=False, leakage=unknown, rmse=None, psnr=None)
    reading.row = row


def _task(
    reading: Reading,
    report: ClientReport,
    shared: Mapping[str, Array],
    expected: Mapping[str, Array],
    trained: Sequence[str],
) -> AuditTask:
    """Returns what is to be audited on the server."""
    if report.inputs is None or report.labels is None or report.trace is None:
        raise RecordError("the report holds no batch")
    if not np.issubdtype(report.inputs.dtype, np.floating):
        raise RecordError(f"expected floating-point inputs, got {report.inputs.dtype}")
    # A client that could not tell its parameters apart: its update must then be reproduced from the batch alone.
    captured = report.captured if set(trained) <= set(report.captured or {}) else None
    _check_captured(captured, expected, trained)
    return AuditTask(
        server_round=reading.row.server_round,
        client=reading.row.client,
        node_id=reading.node_id,
        shared=shared,
        inputs=report.inputs,
        labels=report.labels,
        trace=report.trace,
        captured=captured,
        defence=report.defence,
        num_examples=reading.row.num_examples,
        applied_noise_std=report.applied_noise_std,
        shift=report.shift,
        source=Source.TRUSTED,
    )


def _check_captured(
    captured: Mapping[str, Array] | None, expected: Mapping[str, Array], trained: Sequence[str]
) -> None:
    if captured is None:
        return
    for name in trained:
        array = captured[name]
        if array.shape != expected[name].shape or not np.issubdtype(array.dtype, np.floating):
            raise RecordError(
                f"expected a captured update of floats {list(expected[name].shape)} for {name}, "
                f"got {array.dtype} {list(array.shape)}"
            )
        if not np.isfinite(array).all():
            raise RecordError(f"NaN or infinity in the captured update of {name}")


def _records_sent(sent: Sequence[Message]) -> tuple[str, ...]:
    """Returns the names of the array records in a round's messages."""
    return tuple(sent[0].content.array_records) if sent else ()


def _reject_odd_ones(readings: Sequence[Reading], weighted_by: str, sent: tuple[str, ...]) -> None:
    """Leaves out replies without a weight, and those whose records are not shaped as most of the others' are.

    Of shapes that are equally frequent, those count whose arrays have the name under which they were sent. Where only
    metrics tell them apart nobody is left out, but metrics that not all of them hold are. Who answers first decides
    nothing.
    """
    shapes: dict[int, _Shape] = {}
    for index, reading in enumerate(readings):
        if not reading.aggregable or reading.reply is None or reading.reply.has_error():
            continue
        metrics = list(reading.reply.content.metric_records.values())
        weight = metrics[0].get(weighted_by) if len(metrics) == 1 else None
        if not isinstance(weight, int | float) or not 0 < weight < LARGEST_WEIGHT:
            found = f"{len(metrics)} of them" if len(metrics) != 1 else f"{weight!r:.80}"
            large = isinstance(weight, int | float) and math.isfinite(weight) and weight > 0
            wanted = f"{weighted_by} < 2**53" if large else f"{weighted_by} > 0"
            _reject(reading, Status.INVALID_UPDATE, f"expected one MetricRecord with {wanted}, got {found}")
            continue
        shapes[index] = _shape_of(reading.reply)
    if not shapes:
        return
    counts = Counter(shapes.values())
    tied = [shape for shape, count in counts.items() if count == max(counts.values())]
    records = min((shape.records for shape in tied), key=lambda records: (records[0] != sent, records))
    usual = {shape for shape in tied if shape.records == records}
    common = frozenset.intersection(*(shape.metrics for shape in usual))
    for index, shape in shapes.items():
        if shape not in usual:
            detail = "its records or metrics are not those of the other replies: they cannot be averaged together"
            _reject(readings[index], Status.INVALID_UPDATE, detail)
        elif shape.metrics != common:
            _drop_metrics(readings[index], {name for name, _ in shape.metrics - common})


def _are_all_the_same(replies: Sequence[Message]) -> bool:
    """Whether several clients answered with one and the same arrays."""
    bodies = [
        tuple(array.data for record in reply.content.array_records.values() for array in record.values())
        for reply in replies
        if not reply.has_error()
    ]
    return len(bodies) > 1 and all(body == bodies[0] for body in bodies)


def _mark_aggregate(reading: Reading) -> None:
    """Says that what arrived is no client's own; an audit that the client made of its own update stands."""
    reading.task = reading.traces = reading.shared = None
    reading.aggregate = True
    if reading.row.source is Source.CLIENT:
        detail = "aggregate only: what the client audited never arrived but as part of a mean"
        reading.row = _changed(reading.row, detail=detail)
    elif reading.row.status is Status.UNPROTECTED:
        detail = "aggregate only, and no report: all replies carry the same arrays"
        reading.row = _changed(reading.row, status=Status.AGGREGATE_ONLY, detail=detail)
    elif reading.row.status not in (Status.REFUSED, Status.INVALID_REPORT):
        reading.row = _changed(reading.row, status=Status.AGGREGATE_ONLY)


def evaluations(replies: Sequence[Message], weighted_by: str) -> list[Message]:
    """Returns an evaluation's replies, but for those that the inner strategy cannot average with the others.

    Args:
        replies: What came back, errors among it, which stay.
        weighted_by: As for `read_replies`.
    """
    readings = [Reading(0, reply, _row(0, 0, Status.UNPROTECTED)) for reply in replies]
    _reject_odd_ones(readings, weighted_by, ())
    return [reply for reply, reading in zip(replies, readings, strict=True) if reading.aggregable]


def _drop_metrics(reading: Reading, names: set[str]) -> None:
    """Takes metrics out of a reply that as many other replies do not hold."""
    assert reading.reply is not None
    ((key, metrics),) = reading.reply.content.metric_records.items()
    reading.reply.content[key] = MetricRecord({name: value for name, value in metrics.items() if name not in names})
    listed = ", ".join(f"{name:.80}" for name in sorted(names)[:3])
    detail = f"not averaged: its metrics {listed}, which as many other replies do not hold or hold in another length"
    reading.row = _changed(reading.row, detail=joined(reading.row.detail, detail))


@dataclass(frozen=True)
class _Shape:
    """What replies must have in common to be averaged: records by name, metrics by name and length (-1: a number)."""

    records: tuple[tuple[str, ...], str]
    metrics: frozenset[tuple[str, int]]


def _shape_of(reply: Message) -> _Shape:
    (name, metrics), *_ = reply.content.metric_records.items()
    lengths = {key: len(value) if isinstance(value, list) else -1 for key, value in metrics.items()}
    return _Shape((tuple(reply.content.array_records), name), frozenset(lengths.items()))


def _num_examples(reply: Message) -> int | None:
    for record in reply.content.metric_records.values():
        value = record.get("num-examples")
        if isinstance(value, int | float) and np.isfinite(value):
            return int(value)
    return None


def _reject(reading: Reading, status: Status, detail: str) -> None:
    reading.row = _changed(reading.row, status=status, detail=detail)
    reading.task = reading.shared = None
    reading.aggregable = False


def _row(
    server_round: int, node_id: int, status: Status, *, detail: str = "", num_examples: int | None = None
) -> LeakageEstimate:
    return LeakageEstimate(
        server_round=server_round,
        client=str(node_id),
        node_id=node_id,
        status=status,
        detail=detail,
        num_examples=num_examples,
    )


def _changed(row: LeakageEstimate, **changes: object) -> LeakageEstimate:
    return replace(row, **changes)  # type: ignore[arg-type]
