"""The client: trains for a few steps on its own part of the data and shares the outcome."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_privacy.flower import InversionAuditMod, record_batches
from vision.defences import ARRAYS, defend, describe_defence, noise_seed
from vision.settings import Settings
from vision.task import client_seed, load_data, new_model, partition_id, partition_indices
from vision.training import draw_batches
from vision.training import train as train_model

# The first mod is the outermost: it changes what leaves the client. The last one sees the update that training gave.
audit = InversionAuditMod(hand_over_batches=True, defence=describe_defence, noise_seed=noise_seed)
app = ClientApp(mods=[defend, audit])


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
    content = RecordDict(
        {
            ARRAYS: ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"train_loss": loss, "num-examples": len(indices)}),
        }
    )
    return Message(content=content, reply_to=message)
