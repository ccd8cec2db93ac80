"""What a client reports of a training that was watched. It knows nothing of mods, messages or Flower's two APIs."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from logging import INFO, WARNING
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.supercore import log
from torch import nn

from fl_privacy.audit.claims import Defence
from fl_privacy.audit.estimate import Source, Status
from fl_privacy.audit.self_audit import self_audit
from fl_privacy.audit.settings import AuditSettings
from fl_privacy.audit.task import Array, AuditTask
from fl_privacy.errors import InvalidInputError, RecordError
from fl_privacy.flower.advice import Advice
from fl_privacy.flower.capture import TrainingCapture
from fl_privacy.flower.disclosure import Disclosure
from fl_privacy.flower.options import CONSENTS, LIMITS, VETOES, ClientOptions
from fl_privacy.flower.protection import InputAdvice, InputProtection
from fl_privacy.flower.records import BATCHES, CLAIM, ESTIMATE, ClientReport, encode_report
from fl_privacy.flower.request import Request
from fl_privacy.flower.updates import update_norm
from fl_privacy.influence.layout import ParameterLayout
from fl_privacy.influence.update import Loss

Describe = str | Defence | Callable[[Context], str | Defence]
NewModel = nn.Module | type[nn.Module] | Callable[[Context], nn.Module]
SharedUpdate = Callable[[Sequence[str]], Mapping[str, Array]]
"""Returns, for the names of the trained parameters, the update that the client is about to share."""

_STATE_KEY = "fl_privacy"
"""Record of a client's own state, which stays with it from round to round."""
_SCALES = ("prior_std", "data_range")


class Reporter:
    """Makes a client's reports, as far as the client's own configuration allows them.

    Args:
        model: For audits on the client: the model, its class, or a function of the call's context that returns it.
        loss: (outputs, labels) -> scalar mean loss, the one that the client trains with.
        defence: What the client does to its update: a text, a `Defence` whose numbers the server can check, or a
            function of the context that returns one of these.
        arguments: The options of `ClientOptions` that the app's own code sets; `None` for the others.

    Raises:
        InvalidInputError: Only one of model and loss was given.
    """

    def __init__(
        self, *, model: NewModel | None, loss: Loss | None, defence: Describe, arguments: Mapping[str, Any]
    ) -> None:
        if (model is None) != (loss is None):
            raise InvalidInputError("expected model and loss together: an audit on the client needs both")
        unknown = set(arguments) - {*CONSENTS, *VETOES, *LIMITS}
        if unknown:
            raise InvalidInputError(
                f"expected options among {', '.join((*CONSENTS, *VETOES, *LIMITS))}, got {', '.join(unknown)}"
            )
        self._model = model
        self._loss = loss
        self._defence = defence
        self._arguments = dict(arguments)
        if model is not None and self._arguments.get("send_estimates") is None:
            self._arguments["send_estimates"] = True  # what else would the model be for?

    def watch(self, request: Request, context: Context, sent: Mapping[str, Array]) -> Watch:
        """Returns what is to watch a training that begins, or a refusal that only says why.

        Args:
            request: What the server asks for.
            context: Of the call.
            sent: The arrays that were sent, by name.
        """
        try:
            options = ClientOptions.gather(self._arguments, context)
        except InvalidInputError as error:
            return Watch(self, request, context, sent, options=None, refused=f"the client's configuration: {error}")
        return Watch(self, request, context, sent, options=options, refused=self._refusal(request, options))

    def _refusal(self, request: Request, options: ClientOptions) -> str:
        if request.kind == BATCHES:
            return options.refusal("hand_over_batches", "batches are not handed over")
        if request.kind == CLAIM:
            return ""
        if request.kind != ESTIMATE:
            return f"the server asks for {request.kind[:80]!r}, which this release does not know"
        if self._model is None:
            return "no audit on this client: its app gives it no model and loss"
        return options.refusal("send_estimates", "estimates are not sent")

    def _describe(self, context: Context) -> tuple[str, Defence | None]:
        defence = self._defence if isinstance(self._defence, str | Defence) else self._defence(context)
        return (defence.kind, defence) if isinstance(defence, Defence) else (defence, None)

    def _new_model(self, context: Context) -> nn.Module:
        assert self._model is not None
        if isinstance(self._model, nn.Module):
            return self._model
        new: Callable[..., nn.Module] = self._model
        return new() if isinstance(self._model, type) else new(context)


class Watch:
    """Watches one training and reports it."""

    def __init__(
        self,
        reporter: Reporter,
        request: Request,
        context: Context,
        sent: Mapping[str, Array],
        *,
        options: ClientOptions | None,
        refused: str,
    ) -> None:
        self._reporter = reporter
        self._request = request
        self._context = context
        self._sent = sent
        self._refused = refused
        self._options = options
        self._applied_noise_std: float | None = None
        self._capture = None
        if options is not None and not refused and request.kind != CLAIM:
            self._capture = TrainingCapture(sent, max_bytes=options.max_bytes)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Records what this thread does inside the block, unless the report is to be a refusal."""
        if self._capture is None:
            yield
            return
        with self._capture.active():
            yield

    @contextmanager
    def protecting(self, advice: InputAdvice | None, generator: np.random.Generator) -> Iterator[None]:
        """Lets `protected_inputs` put the advised noise on inputs inside the block, unless this client forbids it."""
        options, against = self._options, self._against_advice()
        if advice is None or options is None or against:
            if advice is not None:
                log(INFO, "fl_privacy: the advised noise is not put on the inputs: %s", against)
            yield
            return
        protection = InputProtection(
            advice,
            self._context.state,
            self._capture,
            generator,
            memory_budget=options.memory_budget,
            time_limit=options.time_limit,
        )
        with protection.active():
            yield

    def _against_advice(self) -> str:
        return self._options.vetoed_by("follow_advice") if self._options else "its configuration cannot be read"

    def follow(self, advice: Advice, arrays: ArrayRecord, generator: np.random.Generator) -> ArrayRecord:
        """Returns the arrays to share with the advised noise on them; unchanged where this client forbids it.

        Raises:
            RecordError: The arrays cannot be clipped and get the noise of a floor for differential privacy, which
                nothing else stands in for.
        """
        against = self._against_advice()
        if against:
            log(INFO, "fl_privacy: the advised noise is not put on the update: %s", against)
            return arrays
        try:
            changed = advice.follow(arrays, self._sent, generator)
        except RecordError as error:
            self.cannot_follow(advice, error)
            return arrays
        self._applied_noise_std = advice.noise_std
        return changed

    def cannot_follow(self, advice: Advice, error: Exception) -> None:
        """Logs why an update is shared without the advised noise, which must not cost the training.

        Raises:
            RecordError: It is that of a floor for differential privacy: then nothing is shared.
        """
        if advice.clip_norm is not None and not self._against_advice():
            raise RecordError(f"nothing is shared, as the floor could not be put on the update: {error}") from error
        log(WARNING, "fl_privacy: the advised noise could not be put on the update: %s", error)

    def record(self, shared: SharedUpdate) -> ConfigRecord:
        """Returns the report as it travels. One that cannot be made says so: it must not cost the training."""
        try:
            return encode_report(self._report(shared))
        except Exception as error:
            log(WARNING, "fl_privacy: the report to the audit could not be made:\n%s", traceback.format_exc())
            # An error's text may hold what the data are: it leaves only where they do themselves.
            handed_over = self._request.kind == BATCHES and not self._refused
            reason = str(error) if handed_over else type(error).__name__
            return encode_report(ClientReport(client="", refused=f"the client could not make its report: {reason}"))

    def _report(self, shared: SharedUpdate) -> ClientReport:
        context, capture = self._context, self._capture
        defence, claim = self._reporter._describe(context)
        report = ClientReport(
            client=str(context.node_config.get("partition-id", context.node_id)),
            defence=defence,
            claim=claim,
            refused=self._refused,
            applied_noise_std=self._applied_noise_std,
        )
        if capture is None:
            return report
        trace = capture.trace()
        if self._request.kind == ESTIMATE:
            if not capture.has_examples:
                log(WARNING, "fl_privacy: there is nothing to audit: %s", trace.problem)
                return replace(report, refused="no batch was recorded on the client; its log says why")
            return replace(report, estimate=self._estimate(report, capture, shared))
        if not capture.has_examples:
            return replace(report, refused=trace.problem)
        inputs, labels = capture.examples()
        return replace(
            report, inputs=inputs, labels=labels, trace=trace, captured=capture.update(), shift=capture.shift
        )

    def _estimate(self, report: ClientReport, capture: TrainingCapture, shared: SharedUpdate) -> Disclosure:
        assert self._options is not None
        assert self._reporter._loss is not None
        model = self._reporter._new_model(self._context)
        names = ParameterLayout.of(model).names
        inputs, labels = capture.examples()
        captured, update = capture.update(), shared(names)
        task = AuditTask(
            server_round=0,
            client=report.client,
            node_id=self._context.node_id,
            shared=update,
            inputs=inputs,
            labels=labels,
            trace=capture.trace(),
            captured=captured if set(names) <= set(captured or {}) else None,
            source=Source.CLIENT,
            shift=capture.shift,
        )
        row = self_audit(
            model,
            self._reporter._loss,
            self._sent,
            task,
            settings=self._with_scales(self._request.settings_for(self._options), inputs),
            time_limit=self._options.time_limit,
            device=self._options.device,
        )
        if row.status is not Status.AUDITED:
            log(INFO, "fl_privacy: the audit of this update: %s: %s", row.status, row.detail)
        reveal = not self._options.refusal("reveal_worst", "")
        return Disclosure.of(row, shared_norm=update_norm(update), reveal_worst=reveal)

    def _with_scales(self, settings: AuditSettings, inputs: Array) -> AuditSettings:
        """Fills in prior and data range from this client's own inputs, once: rounds are to be comparable."""
        state = self._context.state.config_records.get(_STATE_KEY, ConfigRecord())
        measured = {"prior_std": float(inputs.std(dtype="float64")), "data_range": float(inputs.max() - inputs.min())}
        chosen: dict[str, Any] = {}
        for name in _SCALES:
            if getattr(settings, name) is None and measured[name] > 0:
                chosen[name] = float(cast(float, state.setdefault(name, measured[name])))
        self._context.state[_STATE_KEY] = state
        return replace(settings, **chosen)
