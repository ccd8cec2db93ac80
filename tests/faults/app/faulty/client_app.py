"""A client that trains for a step, behind a gate of its own in each round."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from faulty.task import new_model, pass_gate
from fl_privacy.flower import InversionAuditMod, record_batches

app = ClientApp(mods=[InversionAuditMod(hand_over_batches=True)])


@app.train()
def train(message: Message, context: Context) -> Message:
    client, server_round = context.node_config["partition-id"], message.content["config"]["server-round"]
    model = new_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(int(client))
    batch = (torch.randn(4, 1, 4, 4, generator=generator), torch.randint(0, 3, (4,), generator=generator))
    for inputs, labels in record_batches([batch]):
        pass_gate(context.run_config["gates"], f"train-{server_round}-{client}")
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": 4})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)
