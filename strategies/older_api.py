"""The audit around a strategy of Flower's older API: the same auditor, the same ledger, the same rows."""

from __future__ import annotations

import contextlib
import functools
import json
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from logging import WARNING
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, Metadata, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    MetricsAggregationFn,
    Parameters,
    Scalar,
    ndarrays_to_parameters,
)
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy as OlderStrategy
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log
from torch import nn

from fl_privacy.audit.metrics import Origin
from fl_privacy.errors import InvalidInputError
from fl_privacy.flower.older_api import NAMES_KEY, take_report
from fl_privacy.flower.records import REPORT_KEY
from fl_privacy.influence.update import Loss
from fl_privacy.strategies.inversion_audit import InversionAudit
from fl_privacy.strategies.replies import LARGEST_WEIGHT

_ARRAYS, _CONFIG, _METRICS, _WEIGHT = "arrays", "config", "metrics", "num-examples"

ClientMetrics = list[tuple[int, dict[str, Scalar]]]
FitResult = tuple[ClientProxy, FitRes]
Failure = FitResult | BaseException


class OlderInversionAudit(OlderStrategy):
    """Wraps a `flwr.server.strategy.Strategy` and gives every client a leakage estimate in every round.

    Clients report if they are wrapped in `fl_privacy.flower.AuditedClient`. Everything else is `InversionAudit`, which
    is there as `audit`: its `estimates`, `run_id` and `close()`, which prints the summary and ends the workers; call it
    after the run. A round's messages are put into the form that it reads, and its replies back into the older form.

    Under SecAgg+ all replies carry the same arrays, the mean: then no client's own update arrived, and rows say
    `aggregate-only`, unless clients audited themselves (`source="client"`). Those follow advice; the policies `perturb`
    and `exclude` are not applied, and rows say so.

    Args:
        strategy: The inner strategy.
        model: As for `InversionAudit`; its state is what the clients' arrays hold, in order, or its parameters are.
        loss: As there.
        options: As there.
    """

    def __init__(self, strategy: OlderStrategy, *, model: nn.Module, loss: Loss, **options: Any) -> None:
        super().__init__()
        self.strategy = strategy
        self._bridge = _Bridge(strategy, model)
        self.audit = InversionAudit(self._bridge, model=model, loss=loss, **options)
        self.audit.expect_aggregates = True

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Returns the inner strategy's."""
        return self.strategy.initialize_parameters(client_manager)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Returns the inner strategy's instructions, each with a request and with advice in a config of its own."""
        self._bridge.instructions = self.strategy.configure_fit(server_round, parameters, client_manager)
        arrays = self._bridge.record_of(parameters)
        arrays = ArrayRecord({name: Array(array.numpy()) for name, array in arrays.items()})  # with their shapes
        messages = self.audit.configure_train(server_round, arrays, ConfigRecord(), None)  # type: ignore[arg-type]
        names = json.dumps(list(arrays))
        return [
            (proxy, FitIns(ins.parameters, {**message.content.config_records[_CONFIG], NAMES_KEY: names}))  # type: ignore[dict-item]
            for (proxy, ins), message in zip(self._bridge.instructions, messages, strict=True)
        ]

    def aggregate_fit(
        self, server_round: int, results: list[FitResult], failures: list[Failure]
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Audits the results, then has the inner strategy aggregate those that may pass."""
        self._bridge.failures = failures
        _, metrics = self.audit.aggregate_train(server_round, self._bridge.replies(results))
        parameters, own = self._bridge.aggregated
        leakage = {name: value for name, value in (metrics or {}).items() if isinstance(value, int | float)}
        return parameters, {**own, **leakage}

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Returns the inner strategy's."""
        return self.strategy.configure_evaluate(server_round, parameters, client_manager)

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Returns the inner strategy's, which goes into the ledger, too; but for clients that no average can weigh."""
        counted = [(client, result) for client, result in results if 0 < result.num_examples < LARGEST_WEIGHT]
        if len(counted) < len(results):
            log(
                WARNING,
                "round %d: %d of %d evaluations are left out: expected num_examples in (0, 2**53), which weigh them",
                server_round,
                len(results) - len(counted),
                len(results),
            )
        with _guarded(self.strategy, "evaluate_metrics_aggregation_fn"):
            loss, metrics = self.strategy.aggregate_evaluate(server_round, counted, failures)
        self._note(server_round, "clients", loss, metrics)
        return loss, metrics

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, dict[str, Scalar]] | None:
        """Returns the inner strategy's, which goes into the ledger, too."""
        evaluated = self.strategy.evaluate(server_round, parameters)
        if evaluated is not None:
            self._note(server_round, "server", *evaluated)
        return evaluated

    def close(self) -> None:
        """Ends the audit's workers and prints the summary."""
        self.audit.close()

    def _note(self, server_round: int, origin: Origin, loss: float | None, metrics: dict[str, Scalar]) -> None:
        every: dict[str, Scalar | None] = {"loss": loss, **metrics}
        numbers = MetricRecord()
        numbers.update({name: value for name, value in every.items() if isinstance(value, int | float)})
        self.audit.note_metrics(server_round, origin, numbers)


class _Bridge(Strategy):
    """The older strategy as the audit sees it: a round in the form of messages, and back."""

    def __init__(self, strategy: OlderStrategy, model: nn.Module) -> None:
        super().__init__()
        self._older = strategy
        self._names = (list(model.state_dict()), [name for name, _ in model.named_parameters()])
        self._answered: dict[str, FitResult] = {}
        self.weighted_by_key = _WEIGHT
        self.instructions: list[tuple[ClientProxy, FitIns]] = []
        self.failures: list[Failure] = []
        self.aggregated: tuple[Parameters | None, dict[str, Scalar]] = (None, {})

    def record_of(self, parameters: Parameters) -> ArrayRecord:
        """Returns unnamed arrays by the model's names; nothing of their bytes is read.

        Raises:
            InvalidInputError: There are neither as many as the model's state holds, nor as its parameters.
        """
        arrays = parameters.tensors
        names = next((names for names in self._names if len(names) == len(arrays)), None)
        if names is None:
            state, trained = map(len, self._names)
            raise InvalidInputError(
                f"expected the {state} arrays of the model's state or its {trained} parameters, got {len(arrays)}: the "
                "audit's model must be the one that clients train"
            )
        kind = parameters.tensor_type
        return ArrayRecord(
            {name: Array(dtype="", shape=(), stype=kind, data=data) for name, data in zip(names, arrays, strict=True)}
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns a message for each of the round's instructions."""
        return [
            _message(
                RecordDict({_ARRAYS: arrays, _CONFIG: ConfigRecord(dict(ins.config))}),
                message_id=str(index),
                dst_node_id=_node_id(proxy),
            )
            for index, (proxy, ins) in enumerate(self.instructions)
        ]

    def replies(self, results: Sequence[FitResult]) -> list[Message]:
        """Returns results, and failures of which it is known whose they are, as replies to the round's messages."""
        sent = {_node_id(proxy): str(index) for index, (proxy, _) in enumerate(self.instructions)}
        self._answered = {}
        replies = []
        for index, (proxy, result) in enumerate(results):
            node = _node_id(proxy)
            reply_id = f"reply-{index}"
            self._answered[reply_id] = (proxy, result)
            replies.append(
                _message(_content(self, result), message_id=reply_id, src_node_id=node, reply_to=sent.get(node, ""))
            )
        for failure in self.failures:
            if isinstance(failure, BaseException):
                continue  # it does not say whose: who did not answer is a row in any case
            proxy, result = failure
            node = _node_id(proxy)
            error = Error(code=int(result.status.code.value), reason=result.status.message)
            replies.append(_message(error, message_id="", src_node_id=node, reply_to=sent.get(node, "")))
        return replies

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Has the older strategy aggregate the replies that the audit lets pass, with the arrays that it leaves."""
        results = []
        for reply in replies:
            if reply.has_error():
                continue
            proxy, result = self._answered[reply.metadata.message_id]
            arrays = [array.numpy() for array in reply.content.array_records[_ARRAYS].values()]
            kept = FitRes(result.status, ndarrays_to_parameters(arrays), result.num_examples, result.metrics)
            results.append((proxy, kept))
        with _guarded(self._older, "fit_metrics_aggregation_fn"):
            self.aggregated = self._older.aggregate_fit(server_round, results, self.failures)
        return None, MetricRecord()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns nothing: the older strategy is asked itself."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Returns nothing: the older strategy is asked itself."""
        return None

    def summary(self) -> None:
        """Logs nothing: strategies of the older API have no summary."""


@contextlib.contextmanager
def _guarded(strategy: OlderStrategy, name: str) -> Iterator[None]:
    """Lets a strategy's function of all clients' metrics see to it that one client's do not end the run.

    Where it raises, and clients' metrics differ in name or kind, it is given those that most of them have, and the log
    says so; what it raises then, or where they do not differ, is its own.
    """
    held = [(inner, fn) for inner in _nested(strategy) if callable(fn := getattr(inner, name, None))]
    for inner, fn in held:
        setattr(inner, name, functools.partial(_aggregated_metrics, fn))
    try:
        yield
    finally:
        for inner, fn in held:
            setattr(inner, name, fn)


def _nested(strategy: object) -> Iterator[object]:
    """Yields a strategy, and those that it wraps."""
    while isinstance(strategy, OlderStrategy):
        yield strategy
        strategy = getattr(strategy, "strategy", None)


def _aggregated_metrics(aggregate: MetricsAggregationFn, metrics: ClientMetrics) -> dict[str, Scalar]:
    try:
        return aggregate(metrics)
    except Exception as error:
        kinds = [frozenset((name, _kind(value)) for name, value in (own or {}).items()) for _, own in metrics]
        counts = Counter(kinds)
        if len(counts) < 2:
            raise
        most = max(counts.values())
        usual = min(
            (kind for kind, count in counts.items() if count == most), key=lambda kind: (-len(kind), sorted(kind))
        )
        kept = [own for own, kind in zip(metrics, kinds, strict=True) if kind == usual]
        log(
            WARNING,
            "fl_privacy: the function of the clients' metrics failed (%s: %s); it is given those of the %d of %d "
            "clients that agree on names and kinds",
            type(error).__name__,
            error,
            len(kept),
            len(metrics),
        )
        return aggregate(kept)


def _kind(value: Scalar) -> str:
    return "number" if isinstance(value, int | float) else type(value).__name__


def _content(bridge: _Bridge, result: FitRes) -> RecordDict:
    """Returns what a client shared as records; its report is taken out of its metrics."""
    result.metrics = dict(result.metrics or {})
    report = take_report(result.metrics)
    try:
        arrays = bridge.record_of(result.parameters)
    except InvalidInputError:  # other arrays than were sent: the audit says so of what they are called
        numbered = enumerate(result.parameters.tensors)
        kind = result.parameters.tensor_type
        arrays = ArrayRecord({str(i): Array(dtype="", shape=(), stype=kind, data=data) for i, data in numbered})
    records: dict[str, Any] = {_ARRAYS: arrays, _METRICS: MetricRecord({_WEIGHT: result.num_examples})}
    return RecordDict(records if report is None else {**records, REPORT_KEY: report})


def _message(
    content: RecordDict | Error, *, message_id: str, src_node_id: int = 0, dst_node_id: int = 0, reply_to: str = ""
) -> Message:
    metadata = Metadata(
        run_id=0,
        message_id=message_id,
        src_node_id=src_node_id,
        dst_node_id=dst_node_id,
        reply_to_message_id=reply_to,
        group_id="",
        created_at=time.time(),
        ttl=3600.0,
        message_type=MessageType.TRAIN,
    )
    if isinstance(content, Error):
        return make_message(metadata, error=content)
    return make_message(metadata, content)


def _node_id(proxy: ClientProxy) -> int:
    """Returns a client's number: its node id where the proxy has one, else one that its name gives."""
    try:
        return int(proxy.cid)
    except ValueError:
        return zlib.crc32(proxy.cid.encode())
