"""The client mod: watches local training, and reports to the audit what the client's own configuration allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, TypeVar

import numpy as np
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from fl_privacy.audit.task import Array
from fl_privacy.flower.advice import Advice, readable
from fl_privacy.flower.protection import InputAdvice
from fl_privacy.flower.records import REPORT_KEY
from fl_privacy.flower.reporter import Describe, NewModel, Reporter
from fl_privacy.flower.request import Request
from fl_privacy.flower.updates import shared_update
from fl_privacy.influence.update import Loss

T = TypeVar("T")


class InversionAuditMod:
    """Client mod that reports to the server's audit how an update was made, or how much of its data it gives away.

    Draw batches from `record_batches(loader)` in the training loop. What leaves the client is what the server asks for
    and this client allows, no more:

    - Private batches, for an audit on the server, only with `hand_over_batches`. Put the mod last in
      `ClientApp(mods=[...])`, closest to the training; any other place works, too.
    - The scalars of an audit that is made here, with `model` and `loss`. Put the mod first, outside of whatever
      protects the update: it audits the update as it passes here, and what changes it later is not credited.

    Where the server advises noise on the update, the mod puts it on the trained parameters before it reports, and says
    so. Where it advises noise on the inputs, the training code gets them from one call, `protected_inputs`. Set
    `follow_advice` to no to go without either.

    Every option that is `None` can be set where the client runs instead, by an environment variable or in the node's
    configuration: see `ClientOptions`, and the table in docs/deploy.md. Who says no to something that leaves has the
    last word, whoever says yes.

    Args:
        hand_over_batches: Whether private batches may be handed over.
        send_estimates: Whether scalars may be sent. If it is not set, giving a model and a loss allows it.
        reveal_worst: Whether an estimate may say which example leaks most, by index and label.
        follow_advice: Whether to put the noise that the server advises on the update, or on the inputs. Done unless
            someone says no.
        noise_seed: Seed of that noise for a call, for repeatable simulations only: whoever can find it out can
            subtract the noise. Default: from the operating system.
        model: For audits on the client: the model that is trained, its class, or a function of the context.
        loss: For audits on the client: (outputs, labels) -> scalar mean loss, the one that it trains with.
        defence: What this client does to its update, for the report: a text, a `fl_privacy.audit.Defence`, whose
            numbers the server checks against the update, or a function of the context that returns one of these.
        time_limit: Seconds that an audit on the client may take (60).
        memory_budget: Bytes of graph that it may keep (1 GiB).
        max_examples: Most examples that it audits (8).
        max_bytes: Most bytes of examples to keep for the audit, or to hand over (256 MiB).
        device: Where an audit on the client computes, a torch device name (`cpu`).

    Raises:
        InvalidInputError: Only one of model and loss is given.
    """

    def __init__(
        self,
        *,
        hand_over_batches: bool | None = None,
        send_estimates: bool | None = None,
        reveal_worst: bool | None = None,
        follow_advice: bool | None = None,
        noise_seed: Callable[[Message, Context], int] | None = None,
        model: NewModel | None = None,
        loss: Loss | None = None,
        defence: Describe = "",
        time_limit: float | None = None,
        memory_budget: int | None = None,
        max_examples: int | None = None,
        max_bytes: int | None = None,
        device: str | None = None,
    ) -> None:
        arguments = {
            "hand_over_batches": hand_over_batches,
            "send_estimates": send_estimates,
            "reveal_worst": reveal_worst,
            "follow_advice": follow_advice,
            "time_limit": time_limit,
            "memory_budget": memory_budget,
            "max_examples": max_examples,
            "max_bytes": max_bytes,
            "device": device,
        }
        self._reporter = Reporter(model=model, loss=loss, defence=defence, arguments=arguments)
        self._noise_seed = noise_seed

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Runs the app, follows advice, and adds a report to the reply if the server asked for one."""
        request = _take_request(message)
        advice, input_advice = _take_advice(message, Advice.take), _take_advice(message, InputAdvice.take)
        if request is None or not message.metadata.message_type.startswith(MessageType.TRAIN):
            return call_next(message, context)
        sent = _arrays(message.content)
        watch = self._reporter.watch(request, context, sent)
        seed = None if self._noise_seed is None else self._noise_seed(message, context)
        generator = np.random.default_rng(seed)
        with watch.active(), watch.protecting(input_advice, generator):
            reply = call_next(message, context)
        if not reply.has_content():
            return reply
        if advice is not None:
            for key, arrays in reply.content.array_records.items():
                reply.content[key] = watch.follow(advice, arrays, generator)

        def shared(names: Sequence[str]) -> Mapping[str, Array]:
            return shared_update(reply.content, sent, names)

        reply.content = RecordDict({**reply.content, REPORT_KEY: watch.record(shared)})
        return reply


def _take_request(message: Message) -> Request | None:
    """Removes the server's request from the message's config, so that the app sees its config as it is."""
    if not message.has_content():
        return None
    for record in message.content.config_records.values():
        request = Request.take(record)
        if request is not None:
            return request
    return None


def _take_advice(message: Message, take: Callable[[MutableMapping[str, Any]], T | None]) -> T | None:
    """Removes one kind of advice from the message's config; what cannot be read is none."""
    found: T | None = None
    for record in message.content.config_records.values() if message.has_content() else ():
        found = found or readable(take, record)
    return found


def _arrays(content: RecordDict) -> dict[str, Array]:
    return {name: array.numpy() for record in content.array_records.values() for name, array in record.items()}
