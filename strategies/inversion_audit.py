"""A strategy wrapper that audits what every client shares, before the inner strategy aggregates it."""

from __future__ import annotations

import logging
import math
import traceback
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from logging import INFO, WARNING
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore import log
from torch import nn

from fl_privacy.audit.auditor import AuditedRound, Auditor
from fl_privacy.audit.claims import Defence, Traces, find_traces, logits_layer
from fl_privacy.audit.estimate import LeakageEstimate, Source, Status
from fl_privacy.audit.executor import Executor
from fl_privacy.audit.ledger import Ledger
from fl_privacy.audit.metrics import Origin, RoundMetrics
from fl_privacy.audit.policy import Policy, PolicyAction
from fl_privacy.audit.public import PublicExamples, UpdateTask
from fl_privacy.audit.rounds import RoundsTogether
from fl_privacy.audit.settings import AuditSettings
from fl_privacy.audit.task import Array, AuditTask
from fl_privacy.audit.wording import joined, shortened
from fl_privacy.errors import InvalidInputError, LedgerError
from fl_privacy.flower.advice import Advice
from fl_privacy.flower.protection import InputAdvice
from fl_privacy.flower.records import CLAIM
from fl_privacy.flower.request import Request
from fl_privacy.influence.layout import ParameterLayout
from fl_privacy.influence.update import Loss
from fl_privacy.monitoring.callback import RoundCallback, close_all, notify, notify_pictures
from fl_privacy.strategies.actions import PolicyActions
from fl_privacy.strategies.display import RoundDisplay
from fl_privacy.strategies.replies import Reading, evaluations, read_replies

OnAuditFailure = Literal["continue", "exclude"]
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
SOURCES = (Source.TRUSTED, Source.CLIENT, Source.PROXY, Source.RECONSTRUCTED)
"""Where an audit can take the Jacobian."""
_BLIND = (Source.PROXY, Source.RECONSTRUCTED)
"""Those for which clients hand over nothing but their update."""
_LONGEST_DETAIL = 2000
"""Of what a row says: clients have a hand in it."""

_FAILURES = frozenset(
    {
        Status.UNPROTECTED,
        Status.REFUSED,
        Status.INVALID_REPORT,
        Status.LATE,
        Status.AUDIT_FAILED,
    }
)
"""Outcomes after which nothing is known of a client's leakage."""


class InversionAudit(Strategy):
    """Wraps a strategy and gives every client a leakage estimate in every round.

    Works by composition: messages and aggregation are the inner strategy's. The wrapper asks clients for the batches
    behind their updates, takes their reports out of the replies, audits, writes the ledger, and passes the replies on.
    It stacks with Flower's differential-privacy wrappers in both orders: outside one, it audits what clients sent,
    inside one, what the wrapper left of it.

    Args:
        strategy: The inner strategy.
        model: The model that clients train. Only its structure is used, and it is not changed.
        loss: (outputs, labels) -> scalar mean loss, the one that clients train with.
        expected_defence: What every client is to do to its update before it shares it. Whether an update shows it is
            seen from the update alone, as is what a client claims (`fl_privacy.audit.claims`); rows say what lacks.
        most_examples: Most examples, times local steps, that can be behind an update, where whoever runs the federation
            knows it. Noise shows beyond the rank that so many explain; a client that says more is not believed, and its
            row says so. `None`: a client's word is all there is.
        source: Where the Jacobian is taken: at batches that clients hand over (`trusted`), or on the clients, which
            audit themselves and send scalars (`client`), either only for clients that allow it; at public examples
            scaled to the update that arrived (`proxy`), or at what an attack rebuilds from it (`reconstructed`), for
            every client that sends an update. The last two are approximate, and their rows say so.
        public: Public examples for the last two, and for a policy by which the server puts on noise that they shape.
        policy: What follows from a client's leakage: nothing but a row (`report`), advice to the client (`advise`),
            noise that the server adds (`perturb`), or leaving its update out (`exclude`). One of these names, or a
            `Policy`, which says more.
        settings: What to measure.
        executor: Who computes: in this process by default, or `RayExecutor(...)`.
        ledger: Path or SQLAlchemy URL of the ledger, `None` for none.
        on_audit_failure: What becomes of an update of whose leakage nothing is known: it is aggregated all the same
            (`continue`) or left out (`exclude`). Default: left out where the policy perturbs or excludes, as refusing
            would be the way round it. An update that cannot be averaged (NaN, other names or shapes) is
            always left out, and always a row.
        time_limit: Seconds for the audit of one round, and for the shaped noise that the policy `perturb` puts on: an
            audit that is late is a row that says so, and noise that is late is isotropic, of which the row says so.
        max_report_bytes: Most bytes of one client's report to accept. What its replay may take is bounded by the
            settings' `memory_budget`.
        show: Whether to print a table after each round and a summary at the end.
        run_id: Name of this run in the ledger. Default: a random one.
        callbacks: Told of every audited round, such as `fl_privacy.monitoring.TensorBoardCallback`.
        examine: Given every audited round with the batches that were handed over, for pictures or studies of one's own.
            It may return the image files that it drew, by client, which callbacks are then given. What it raises
            costs a line in the log.

    Raises:
        InvalidInputError: An option is out of range.
        LedgerError: The ledger cannot be opened.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        model: nn.Module,
        loss: Loss,
        expected_defence: Defence | None = None,
        most_examples: int | None = None,
        source: str | Source = Source.TRUSTED,
        public: PublicExamples | None = None,
        policy: Policy | PolicyAction = "report",
        settings: AuditSettings | None = None,
        executor: Executor | None = None,
        ledger: str | Path | None = "fl_privacy.db",
        on_audit_failure: OnAuditFailure | None = None,
        time_limit: float = 600.0,
        max_report_bytes: int = 1024**3,
        show: bool = True,
        run_id: str | None = None,
        callbacks: Sequence[RoundCallback] = (),
        examine: Callable[[AuditedRound], Mapping[str, Path] | None] | None = None,
    ) -> None:
        super().__init__()
        self.policy = Policy.of(policy)
        if on_audit_failure is None:
            protects = self.policy.action in ("perturb", "exclude") and not self.policy.dry_run
            on_audit_failure = "exclude" if protects else "continue"
        if on_audit_failure not in get_args(OnAuditFailure):
            raise InvalidInputError(
                f"expected on_audit_failure to be one of {', '.join(get_args(OnAuditFailure))}, "
                f"got {on_audit_failure!r}"
            )
        if most_examples is not None and most_examples < 1:
            raise InvalidInputError(f"expected most_examples >= 1, got {most_examples}")
        if source not in SOURCES:
            raise InvalidInputError(f"expected source to be one of {', '.join(SOURCES)}, got {source!r}")
        _check_public(Source(source), self.policy, public, model, loss, settings or AuditSettings())
        self.strategy = strategy
        self.source = Source(source)
        self.run_id = run_id or uuid.uuid4().hex[:12]
        self.estimates: list[LeakageEstimate] = []
        self.callbacks = tuple(callbacks)
        self._examine = examine
        self.result: Result | None = None
        self.expected_defence = expected_defence
        self._most_examples = most_examples
        self._model, self._cross_entropy = model, isinstance(loss, nn.CrossEntropyLoss)
        self.expect_aggregates = False  # whether replies that are all the same mean secure aggregation
        self._lr: dict[int, float] = {}
        self._names: dict[int, str] = {}
        self._requests: dict[int, Request] = {}
        self._rounds = RoundsTogether()
        self._advised: dict[int, Advice | InputAdvice | None] = {}
        self._auditor = Auditor(model, loss, settings=settings, executor=executor, time_limit=time_limit, public=public)
        self._layout = ParameterLayout.of(model)
        self._actions = PolicyActions(
            self.policy,
            target_leakage=self._auditor.settings.target_leakage,
            parameters=self._layout.names,
            auditor=self._auditor,
        )
        if self.policy.floor_std is not None:
            self._check_floor()
        if self.policy.action == "perturb" and self.policy.family == "shaped" and self.source is not Source.TRUSTED:
            log(
                WARNING,
                "shaped noise can be put on by the server only where clients hand over their batches: the noise is "
                "isotropic; let clients put it on themselves with the action advise",
            )
        self._ledger = None if ledger is None else Ledger(ledger)
        self._ledger_name = "" if ledger is None else str(ledger)
        self._unwritten: list[LeakageEstimate | RoundMetrics] = []
        self._on_audit_failure = on_audit_failure
        self._max_report_bytes = max_report_bytes
        self._display = RoundDisplay(enabled=show)
        self._arrays: ArrayRecord | None = None
        self._sent: list[Message] = []
        _join_loggers()

    def summary(self) -> None:
        """Logs the audit's configuration, then the inner strategy's."""
        settings = self._auditor.settings
        log(INFO, "\t├──> Inversion audit (run %s):", self.run_id)
        log(INFO, "\t│\t├── Source: %s", self.source)
        log(INFO, "\t│\t├── Private unit: %s", settings.unit)
        log(INFO, "\t│\t├── Target leakage: %g", settings.target_leakage)
        log(INFO, "\t│\t├── Policy: %s%s", self.policy.action, " (dry run)" if self.policy.dry_run else "")
        log(INFO, "\t│\t├── On audit failure: %s", self._on_audit_failure)
        log(INFO, "\t│\t└── Ledger: %s", self._ledger_name or "none")
        self.strategy.summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Runs the federation as `Strategy.start` does; prints the summary and releases the workers at its end."""
        try:
            self.result = super().start(
                grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, self._noting(evaluate_fn)
            )
        finally:
            self.close()
        if self._unwritten:
            raise LedgerError(
                f"{len(self._unwritten)} rows of run {self.run_id} could not be written to {self._ledger_name}; "
                "the log has the reason; the rows are in this strategy's `estimates`, the trained model in its `result`"
            )
        return self.result

    def close(self) -> None:
        """Ends the audit's workers, writes what is left to write, and prints the summary.

        `start` calls it. Call it yourself where another wrapper around this one is what is started.
        """
        try:
            self._auditor.close()
        finally:
            self._write([])
            close_all(self.callbacks)
        if self.estimates:
            if absent := self._actions.absent(clients := {row.client for row in self.estimates}):
                log(
                    WARNING,
                    "the policy has targets for %s, but no client reported under such a name; clients: %s",
                    ", ".join(absent[:5]),
                    ", ".join(sorted(clients)[:10]),
                )
            head = self._head()
            self._display.summary(self.estimates, ledger=self._ledger_name, run_id=self.run_id, head=head)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns the inner strategy's messages, each with a request for a report."""
        self._check_model(arrays)
        if self._arrays is not None:
            self._actions.choose_families(_distance(self._arrays, arrays, self._layout.names))
        self._arrays = arrays
        self._sent = list(self.strategy.configure_train(server_round, arrays, config, grid))
        for message in self._sent:
            node_id = message.metadata.dst_node_id
            self._note_learning_rate(message)
            self._requests[node_id] = request = self._request(node_id)
            advice = self._actions.advice_for(node_id, self._names.get(node_id, ""))
            self._advised[node_id] = advice
            _add_entries(message, request.entries() | (advice.entries() if advice else {}))
        return self._sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Audits the replies, then has the inner strategy aggregate those that may pass."""
        if self._arrays is None:
            raise InvalidInputError("expected configure_train before aggregate_train: the audit needs what was sent")
        params = {name: array.numpy() for name, array in self._arrays.items()}
        readings = read_replies(
            server_round,
            self._sent,
            list(replies),
            params,
            self._layout.names,
            requests=self._requests,
            max_report_bytes=self._max_report_bytes,
            names=self._names,
            look=self._look,
            weighted_by=_weight_of(self.strategy),
            expect_aggregates=self.expect_aggregates,
        )
        self._audit(readings, params)
        self._actions.prepare([reading for reading in readings if self._may_pass(reading)], params)
        rows = [self._with_rounds(self._act(reading, params), reading) for reading in readings]
        rows = [replace(row, detail=shortened(row.detail, _LONGEST_DETAIL)) for row in rows]
        self.estimates.extend(rows)
        self._write(rows)
        self._display.round(server_round, rows)
        notify(self.callbacks, server_round, rows)
        self._have_examined(server_round, readings, params)
        passed = [
            reading.reply
            for reading, row in zip(readings, rows, strict=True)
            if reading.reply is not None and row.action != "excluded"
        ]
        aggregated, metrics = self.strategy.aggregate_train(server_round, passed)
        return aggregated, _with_leakage(metrics, rows)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns the inner strategy's messages."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Returns the inner strategy's metrics, which go into the ledger; what would end the run is left out."""
        replies, weight = list(replies), _weight_of(self.strategy)
        passed = replies if weight is None else evaluations(replies, weight)
        if len(passed) < len(replies):
            left = len(replies) - len(passed)
            log(WARNING, "fl_privacy: %d of %d evaluations cannot be averaged, and are left out", left, len(replies))
        return self.note_metrics(server_round, "clients", self.strategy.aggregate_evaluate(server_round, passed))

    def _noting(self, evaluate_fn: EvaluateFn | None) -> EvaluateFn | None:
        """Returns the server's evaluation with its metrics going into the ledger."""
        if evaluate_fn is None:
            return None
        return lambda server_round, arrays: self.note_metrics(server_round, "server", evaluate_fn(server_round, arrays))

    def note_metrics(self, server_round: int, origin: Origin, metrics: MetricRecord | None) -> MetricRecord | None:
        """Writes what a round's evaluation gave into the ledger, and returns it."""
        numbers = {name: value for name, value in (metrics or {}).items() if isinstance(value, int | float)}
        if numbers:
            self._write([RoundMetrics(server_round=server_round, origin=origin, metrics=numbers)])
        return metrics

    def _audit(self, readings: Sequence[Reading], params: Mapping[str, Array]) -> None:
        for reading in readings:
            if reading.shared is not None:
                reading.task = self._update_task(reading)
            self._note_what_was_asked(reading)
        tasks = [reading.task for reading in readings if reading.task is not None]
        with self._display.progress(len(tasks)) as advance:
            rows = iter(self._auditor.audit_round(params, tasks, progress=advance))
        for reading in readings:
            if reading.task is not None:
                reading.row = next(rows)
            elif reading.row.leakage is not None:  # the client's own, of what these settings ask
                reading.row = replace(reading.row, settings=self._auditor.settings.to_dict())
            reading.row = self._checked(reading)
            reading.row = self._actions.accounted(reading)

    def _have_examined(self, server_round: int, readings: Sequence[Reading], params: Mapping[str, Array]) -> None:
        if self._examine is None:
            return
        audited = [(reading.task, reading.row) for reading in readings if isinstance(reading.task, AuditTask)]
        try:
            pictures = self._examine(
                AuditedRound(
                    server_round=server_round,
                    context=self._auditor.context,
                    params=params,
                    tasks=[task for task, _ in audited],
                    rows=[row for _, row in audited],
                )
            )
            if pictures:
                notify_pictures(self.callbacks, server_round, pictures)
        except Exception:
            log(WARNING, "the round could not be examined further:\n%s", traceback.format_exc())

    def _request(self, node_id: int) -> Request:
        """Returns what a client is asked to report."""
        if self.source in _BLIND:
            return Request(kind=CLAIM)
        if self.source is not Source.CLIENT:
            return Request()
        target = self._actions.target_of(self._names.get(node_id, ""))
        return Request.for_estimate(replace(self._auditor.settings, target_leakage=target))

    def _with_rounds(self, row: LeakageEstimate, reading: Reading) -> LeakageEstimate:
        """Returns a row with what all rounds tell together; nothing of numbers that are approximate to begin with."""
        task = reading.task
        if isinstance(task, UpdateTask):
            return row
        return self._rounds.add(row, task if isinstance(task, AuditTask) else None, arrived=reading.row)

    def _note_learning_rate(self, message: Message) -> None:
        """Keeps the learning rate that a client is told, where the audit is given none."""
        rates = [config.get("lr") for config in message.content.config_records.values()]
        public = self._auditor.context.public
        given = None if public is None else public.lr
        known = [rate for rate in (given, *rates) if isinstance(rate, int | float) and 0 < rate < math.inf]
        if known:
            self._lr[message.metadata.dst_node_id] = float(known[0])

    def _update_task(self, reading: Reading) -> UpdateTask:
        """Returns what is to be audited of an update whose batch is not handed over."""
        row, claim = reading.row, reading.claim
        assert reading.shared is not None
        assert reading.traces is not None
        claimed = None if claim is None else claim.noise_std
        said = [std for std in (row.applied_noise_std, claimed) if std is not None]
        return UpdateTask(
            server_round=row.server_round,
            client=row.client,
            node_id=reading.node_id,
            shared=reading.shared,
            source=self.source,
            defence=row.defence,
            num_examples=row.num_examples,
            applied_noise_std=row.applied_noise_std,
            traces=reading.traces,
            claimed_noise_std=max(said, default=None),
            lr=self._lr.get(reading.node_id),
        )

    def _note_what_was_asked(self, reading: Reading) -> None:
        advice = self._advised.get(reading.node_id)
        asked: dict[str, float | None] = {
            "advised_noise_std": advice.noise_std if isinstance(advice, Advice) else None,
            "advised_input_leakage": advice.target_leakage if isinstance(advice, InputAdvice) else None,
        }
        reading.row = replace(reading.row, **asked)  # type: ignore[arg-type]
        if reading.task is not None:
            target = self._actions.target_of(reading.row.client)
            reading.task = replace(reading.task, target_leakage=target, **asked)  # type: ignore[arg-type]

    def _act(self, reading: Reading, params: Mapping[str, Array]) -> LeakageEstimate:
        """Applies the policy to one client, and returns its row with what was done."""
        if not self._may_pass(reading):
            return replace(reading.row, action="excluded")
        return self._actions.apply(reading, params)

    def _may_pass(self, reading: Reading) -> bool:
        """Returns whether a client's update can be averaged, and need not be left out as nothing is known of it."""
        failed = reading.row.status in _FAILURES and self._on_audit_failure == "exclude"
        return reading.reply is not None and reading.aggregable and not failed

    def _checked(self, reading: Reading) -> LeakageEstimate:
        """Returns a client's row with what its update shows of the defence that it claims, or should have."""
        row, traces = reading.row, reading.traces
        if traces is None:
            return row
        put_on = row.applied_noise_std
        said = {
            "its claim": reading.claim,
            "what is expected of every client": self.expected_defence,
            "what it says that it put on": None if put_on is None else Defence(kind="noise", noise_std=put_on),
        }
        found = {name: traces.shortfall(defence) for name, defence in said.items() if defence is not None}
        wrong = "; ".join(f"less than {name}: {shortfall}" for name, shortfall in found.items() if shortfall)
        unseen = self._unseen(row, traces) if any(d is not None and d.noise_std for d in said.values()) else ""
        if wrong and row.source is Source.CLIENT and row.status.has_estimate:  # its estimate is its word, too
            row = replace(row, status=Status.UNVERIFIED)
        return replace(
            row,
            observed_noise_std=traces.noise_std,
            observed_sparsity=traces.sparsity,
            claim_holds=not wrong if found else None,
            detail=joined(row.detail, wrong, unseen),
        )

    def _unseen(self, row: LeakageEstimate, traces: Traces) -> str:
        """Returns why an update could not be looked at by rank, where a client's own word is the reason."""
        most = self._most_examples
        if most is not None and row.num_examples is not None and row.num_examples > most:
            return (
                f"it says {row.num_examples} examples, and at most {most} can be behind an update: those were believed"
            )
        if not traces.explained or (row.source is Source.TRUSTED and row.status.has_estimate):  # a replay told
            return ""
        return (
            "noise was not looked for by rank: so many examples explain any, and whether there were so many cannot be "
            "told from the update; InversionAudit(most_examples=...) bounds what is believed"
        )

    def _look(self, shared: Mapping[str, Array], num_examples: int | None) -> Traces:
        most = self._most_examples
        rank = num_examples if most is None or num_examples is None else min(num_examples, most)
        return find_traces(self._model, shared, cross_entropy=self._cross_entropy, rank=rank, logits=self._logits_layer)

    @cached_property
    def _logits_layer(self) -> str | None:
        """The layer that gives the logits, found at public inputs; `None` without them."""
        public = self._auditor.context.public
        if public is None:
            return None
        like = next(self._model.parameters())
        return logits_layer(self._model, torch.from_numpy(np.array(public.inputs[:1])).to(like))

    def _write(self, rows: Sequence[LeakageEstimate | RoundMetrics]) -> None:
        """Appends rows to the ledger; what it does not take now is tried again with the next round's."""
        if self._ledger is None:
            return
        self._unwritten.extend(rows)
        if not self._unwritten:
            return
        try:
            self._ledger.append(self._unwritten, run_id=self.run_id)
        except LedgerError as error:
            log(WARNING, "the ledger did not take %d rows, which are kept: %s", len(self._unwritten), error)
        else:
            self._unwritten = []

    def _head(self) -> str:
        if self._ledger is None or self._unwritten:
            return ""
        try:
            return self._ledger.head()
        except LedgerError as error:
            log(WARNING, "the ledger's head cannot be read: %s", error)
            return ""

    def _check_floor(self) -> None:
        self.policy.epsilon(1)  # raises here, and not after a round, where the accounting is not installed
        changing = [name for name, buffer in self._model.named_buffers() if buffer.is_floating_point()]
        if changing:
            raise InvalidInputError(
                f"expected a model without buffers that training changes, got {changing[0]}: clients share it without "
                "clipping and noise, so there is no ε (use GroupNorm in place of BatchNorm)"
            )

    def _check_model(self, arrays: ArrayRecord) -> None:
        for name, shape in zip(self._layout.names, self._layout.shapes, strict=True):
            if name not in arrays:
                raise InvalidInputError(
                    f"expected the model's parameter {name} among the arrays sent to clients, got {list(arrays)[:5]}: "
                    "the audit's model must be the one that clients train, sent as ArrayRecord(model.state_dict())"
                )
            if tuple(arrays[name].shape) != tuple(shape):
                raise InvalidInputError(
                    f"expected {name} of the model's shape {list(shape)}, got {list(arrays[name].shape)}"
                )


def _distance(before: ArrayRecord, after: ArrayRecord, names: Sequence[str]) -> float:
    """Returns the norm of what changed between two rounds in the named arrays."""
    parts = (after[name].numpy().astype(np.float64) - before[name].numpy() for name in names)
    return math.sqrt(sum(float(np.square(part).sum()) for part in parts))


def _check_public(
    source: Source,
    policy: Policy,
    public: PublicExamples | None,
    model: nn.Module,
    loss: Loss,
    settings: AuditSettings,
) -> None:
    shaping = policy.action == "perturb" and policy.family == "shaped" and policy.covariance == "public"
    if (source in _BLIND or shaping) != (public is not None):
        raise InvalidInputError(
            "expected public examples for source proxy or reconstructed, or for the action perturb with family shaped "
            f"and covariance public, and for no other, got source {source} and "
            f"public={'None' if public is None else 'PublicExamples(...)'} with action {policy.action}"
        )
    if public is None:
        return
    public.check(model, loss)
    if source is Source.PROXY and (settings.unit != "example" or settings.batch_norm == "train"):
        raise InvalidInputError(
            "expected unit='example' and batch_norm 'auto' or 'eval' with source proxy, got "
            f"unit={settings.unit!r} and batch_norm={settings.batch_norm!r}: public examples stand in one by one"
        )


def _weight_of(strategy: Strategy) -> str | None:
    """Returns the metric by which a strategy, perhaps inside others, says that it weighs replies; else `None`."""
    while isinstance(inner := getattr(strategy, "strategy", None), Strategy):
        strategy = inner
    key = getattr(strategy, "weighted_by_key", None)
    return key if isinstance(key, str) else None


def _add_entries(message: Message, entries: Mapping[str, str]) -> None:
    """Adds entries to a message's config, in a record of its own: clients share what the inner strategy built."""
    key, config = next(iter(message.content.config_records.items()), ("config", ConfigRecord()))
    message.content = RecordDict({**message.content, key: ConfigRecord({**config, **entries})})


def _with_leakage(metrics: MetricRecord | None, rows: Sequence[LeakageEstimate]) -> MetricRecord | None:
    """Adds the round's leakage to the aggregated metrics, so that it is logged and kept in the run's result."""
    values = [row.leakage.value for row in rows if row.leakage is not None]
    found = [value for value in values if math.isfinite(value)]
    if metrics is None or not found:
        return metrics
    return MetricRecord(
        {
            **metrics,
            "leakage-max": max(found),
            "leakage-mean": sum(found) / len(found),
            "clients-without-estimate": len(rows) - len(found),
        }
    )


def _join_loggers() -> None:
    """Lets the library's log lines through where Flower's go: other loggers show only warnings there."""
    ours, flower = logging.getLogger("fl_privacy"), logging.getLogger("flwr")
    if not ours.handlers and flower.handlers:
        ours.parent = flower
        ours.setLevel(flower.level)
