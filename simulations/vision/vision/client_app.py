"""The client: trains for a few steps on its own part of the data and shares the outcome."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from torch import nn

from fl_privacy.flower import InversionAuditMod, record_batches
from vision.defences import ARRAYS, defend, describe_defence, noise_seed
from vision.settings import BLIND_SOURCES, Settings
from vision.task import client_seed, load_data, new_model, partition_id, partition_indices
from vision.training import draw_batches
from vision.training import train as train_model


def audited_model(context: Context) -> nn.Module:
    """Returns the model that a client audits itself."""
    settings = Settings.from_run_config(context.run_config)
    return new_model(settings, load_data(settings))


report = InversionAuditMod(hand_over_batches=True, defence=describe_defence, noise_seed=noise_seed)
audit = InversionAuditMod(
    model=audited_model, loss=nn.CrossEntropyLoss(), defence=describe_defence, noise_seed=noise_seed
)


def audit_what_leaves(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Has the client audit itself, in a run whose source is `client`."""
    outside = Settings.from_run_config(context.run_config).audit_source == "client"
    return audit(message, context, call_next) if outside else call_next(message, context)


# The first mod is the outermost: it sees what leaves the client. The last one sees the update that training gave; a
# request that the first has answered does not reach it.
app = ClientApp(mods=[audit_what_leaves, defend, report])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains the global model on this client's examples and replies with the parameters it got to."""
    settings = Settings.from_run_config(context.run_config)
    client = partition_id(context, settings)
    data = load_data(settings)
    indices = partition_indices(settings, client)
    batches = draw_batches(
        data.train,
        indices,
        steps=settings.local_steps,
        batch_size=settings.batch_size,
        seed=client_seed(settings, message, client),
    )
    model = new_model(settings, data)
    model.load_state_dict(message.content.array_records[ARRAYS].to_torch_state_dict())
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    loss = train_model(model, record_batches(batches), learning_rate=settings.learning_rate, momentum=settings.momentum)
    behind = len(indices)
    if settings.audit_source in BLIND_SOURCES:  # such an audit goes by how many examples an update is made of
        behind = min(behind, settings.local_steps * settings.batch_size)
    content = RecordDict(
        {
            ARRAYS: ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"train_loss": loss, "num-examples": behind}),
        }
    )
    return Message(content=content, reply_to=message)
