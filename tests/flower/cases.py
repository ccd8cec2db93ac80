"""A small federation that runs in this process: real client apps, real messages through Flower's own serialisation."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid
from torch import Tensor, nn

from fl_privacy.flower import InversionAuditMod, record_batches
from fl_privacy.flower.records import BATCHES, REPORT_KEY, REQUEST_KEY, ClientReport, decode_report

CLASSES = 3
SHAPE = (1, 4, 4)
LR = 0.1
NORM_LAYERS = {False: nn.Identity, True: lambda: nn.BatchNorm2d(4)}

Train = Callable[[nn.Module, Sequence[tuple[Tensor, Tensor]]], None]
Edit = Callable[[RecordDict], None]


def new_model(*, batch_norm: bool = False, seed: int = 0) -> nn.Module:
    """A convolutional net of a few hundred parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        NORM_LAYERS[batch_norm](),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 16, CLASSES),
    )


def batches_of(client: int, *, count: int = 1, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    """A client's own batches, the same whenever it is asked."""
    generator = torch.Generator().manual_seed(100 + client)
    return [
        (torch.randn(size, *SHAPE, generator=generator), torch.randint(0, CLASSES, (size,), generator=generator))
        for _ in range(count)
    ]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    """One optimiser step on a batch."""
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def sgd(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    """What a plain quickstart app does."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for batch in record_batches(batches):
        step(model, optimizer, batch)


def new_app(
    *mods: Callable[..., Message],
    train: Train = sgd,
    model: Callable[[], nn.Module] = new_model,
    count: int = 1,
    edit: Edit | None = None,
    seen: list[Message] | None = None,
) -> ClientApp:
    """A client app that loads what it is sent, trains, and shares its state.

    Args:
        mods: Outermost first.
        train: Trains the model in place.
        model: Makes the model.
        count: Number of batches.
        edit: Changes the reply's content, as the app itself might do.
        seen: Collects the messages that reach the app.
    """
    app = ClientApp(mods=list(mods))

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        if seen is not None:
            seen.append(message)
        net = model()
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        net.train()
        batches = batches_of(int(context.node_config["partition-id"]), count=count)
        train(net, batches)
        examples = sum(len(labels) for _, labels in batches)
        metrics = MetricRecord({"num-examples": examples, "loss": 1.0 + context.node_id})
        content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
        if edit is not None:
            edit(content)
        return Message(content=content, reply_to=message)

    @app.evaluate()
    def _evaluate(message: Message, context: Context) -> Message:
        if seen is not None:
            seen.append(message)
        metrics = MetricRecord({"num-examples": 4, "accuracy": 0.5})
        return Message(content=RecordDict({"metrics": metrics}), reply_to=message)

    return app


def audited_app(*outer: Callable[..., Message], **options) -> ClientApp:
    """The same with our mod nearest to the training."""
    return new_app(*outer, InversionAuditMod(hand_over_batches=True), **options)


def new_context(node_id: int = 0, **node_config) -> Context:
    config = {"partition-id": node_id, "num-partitions": 4, **node_config}
    return Context(run_id=1, node_id=node_id, node_config=config, state=RecordDict(), run_config={})


def train_message(
    arrays: Mapping[str, Tensor] | None = None,
    *,
    request: str | None = BATCHES,
    kind: str = MessageType.TRAIN,
    **config,
) -> Message:
    """The message that a wrapped FedAvg sends, with or without our request."""
    entries = {"server-round": 1, **config} | ({} if request is None else {REQUEST_KEY: request})
    record = ArrayRecord(new_model().state_dict() if arrays is None else arrays)
    content = RecordDict({"arrays": record, "config": ConfigRecord(entries)})
    return Message(content=content, dst_node_id=7, message_type=kind)


def report_of(reply: Message) -> ClientReport:
    assert not reply.has_error(), reply.error
    return decode_report(reply.content[REPORT_KEY], max_bytes=1 << 30)


def change_of(reply: Message, initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shared minus global arrays."""
    return {n: torch.from_numpy(a.numpy()) - initial[n] for n, a in reply.content["arrays"].items()}


def through_the_wire(message: Message) -> Message:
    return message_from_proto(message_to_proto(message))


@dataclass
class LocalGrid(Grid):
    """Runs every message's client app at once, as SuperNodes would: an app that raises becomes an error reply.

    Args:
        apps: Client app by node id.
        silent: Nodes that never answer, from the round in which they are named.
        twice: Nodes that answer twice.
    """

    apps: Mapping[int, ClientApp]
    silent: set[int] = field(default_factory=set)
    twice: set[int] = field(default_factory=set)
    sent: list[Message] = field(default_factory=list)
    contexts: dict[int, Context] = field(default_factory=dict)
    _ids: itertools.count = field(default_factory=itertools.count)

    def set_run(self, run) -> None: ...

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.apps)

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{next(self._ids)}"
            self.sent.append(message)
            node = message.metadata.dst_node_id
            if node in self.silent:
                continue
            answers = 2 if node in self.twice else 1
            replies += [through_the_wire(self._answer(node, through_the_wire(message))) for _ in range(answers)]
        return replies

    def _answer(self, node: int, message: Message) -> Message:
        context = self.contexts.setdefault(node, new_context(node))
        try:
            return self.apps[node](message, context)
        except Exception:
            return Message(Error(code=2, reason=traceback.format_exc()), reply_to=message)


def set_array(name: str, value) -> Edit:
    """An edit that replaces one array of the reply."""

    def edit(content: RecordDict) -> None:
        content["arrays"] = ArrayRecord({**content["arrays"], name: Array(value)})

    return edit
