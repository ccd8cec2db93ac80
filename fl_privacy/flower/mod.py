"""The client mod: watches local training, and reports to the audit what the client's own configuration allows."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from logging import WARNING

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from flwr.supercore import log

from fl_privacy.audit.task import Array
from fl_privacy.flower.capture import TrainingCapture
from fl_privacy.flower.records import BATCHES, REPORT_KEY, REQUEST_KEY, ClientReport, encode_report

HAND_OVER_KEY = "fl-privacy-hand-over-batches"
"""Entry of a node's own configuration that allows or forbids handing batches over."""
HAND_OVER_VARIABLE = "FL_PRIVACY_HAND_OVER_BATCHES"
"""Environment variable of a client's machine that allows or forbids it."""

Describe = str | Callable[[Context], str]


class InversionAuditMod:
    """Client mod that reports to the server's audit how an update was made.

    Put it last in `ClientApp(mods=[...])`: closest to the training, it sees the undefended update. It works at any
    other place, too. Draw batches from `record_batches(loader)` in the training loop.

    Private batches are handed over only where the server asks for them and this client allows it, by
    `hand_over_batches` here, the environment, or the node's own configuration. Who of the three says no has the last
    word.

    Args:
        hand_over_batches: Whether this app allows batches to be handed over. `None`: it does not say; then the
            environment variable FL_PRIVACY_HAND_OVER_BATCHES or the node configuration's
            `fl-privacy-hand-over-batches` must allow it.
        defence: What this client does to its update, for the report: a text, or a function of the context.
        max_bytes: Most bytes of examples to hand over.
    """

    def __init__(
        self, *, hand_over_batches: bool | None = None, defence: Describe = "", max_bytes: int = 256 * 1024**2
    ) -> None:
        self._hand_over_batches = hand_over_batches
        self._defence = defence
        self._max_bytes = max_bytes

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Runs the app, and adds a report to its reply if the server asked for one."""
        request = _take_request(message)
        if request is None or not message.metadata.message_type.startswith(MessageType.TRAIN):
            return call_next(message, context)
        refusal = self._refusal(context, request)
        if refusal:
            reply = call_next(message, context)
            return _with_report(reply, lambda: self._report(context, refused=refusal))
        capture = TrainingCapture(_arrays(message.content), max_bytes=self._max_bytes)
        with capture.active():
            reply = call_next(message, context)
        return _with_report(reply, lambda: self._report(context, capture=capture))

    def _refusal(self, context: Context, request: str) -> str:
        if request != BATCHES:
            return f"the server asks for {request[:80]!r}, which this release does not know"
        votes = {
            "the app": self._hand_over_batches,
            f"the environment ({HAND_OVER_VARIABLE})": _vote(os.environ.get(HAND_OVER_VARIABLE)),
            f"the node's configuration ({HAND_OVER_KEY})": _vote(context.node_config.get(HAND_OVER_KEY)),
        }
        against = [name for name, vote in votes.items() if vote is False]
        if against:
            return f"batches are not handed over: {against[0]} forbids it"
        return "" if True in votes.values() else "batches are not handed over: nothing on this client allows it"

    def _report(self, context: Context, *, refused: str = "", capture: TrainingCapture | None = None) -> ClientReport:
        client = str(context.node_config.get("partition-id", context.node_id))
        defence = self._defence if isinstance(self._defence, str) else self._defence(context)
        if capture is None:
            return ClientReport(client=client, defence=defence, refused=refused)
        trace = capture.trace()
        if not capture.has_examples:
            return ClientReport(client=client, defence=defence, refused=trace.problem)
        inputs, labels = capture.examples()
        return ClientReport(
            client=client, defence=defence, inputs=inputs, labels=labels, trace=trace, captured=capture.update()
        )


def _take_request(message: Message) -> str | None:
    """Removes the server's request from the message's config, so that the app sees its config as it is."""
    if not message.has_content():
        return None
    for record in message.content.config_records.values():
        if REQUEST_KEY in record:
            return str(record.pop(REQUEST_KEY))
    return None


def _with_report(reply: Message, report: Callable[[], ClientReport]) -> Message:
    """Adds the report to a reply. A report that cannot be made must not cost the client its training."""
    if not reply.has_content():
        return reply
    try:
        record = encode_report(report())
    except Exception as error:
        log(WARNING, "fl_privacy: the report to the audit could not be made:\n%s", traceback.format_exc())
        record = encode_report(ClientReport(client="", refused=f"the client could not make its report: {error}"))
    reply.content = RecordDict({**reply.content, REPORT_KEY: record})
    return reply


def _arrays(content: RecordDict) -> dict[str, Array]:
    return {name: array.numpy() for record in content.array_records.values() for name, array in record.items()}


def _vote(value: object) -> bool | None:
    """Reads a setting as it comes from an environment variable or a node's configuration."""
    if value is None:
        return None
    return str(value).strip().lower() in ("1", "true", "yes", "on")
