"""Clients as the auditor sees them: trained for real with torch, on a model small enough for exact references."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from fl_privacy.audit import AuditSettings, AuditTask, TrainingTrace
from fl_privacy.audit.replay import AuditContext

CLASSES = 3
SIDE = 4
PRIOR = 1.0


def new_model(*, batch_norm=False, dropout=0.0):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1)]
    layers += [nn.BatchNorm2d(4)] if batch_norm else []
    layers += [nn.Tanh(), nn.Flatten()]
    layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(4 * SIDE**2, CLASSES))


def params_of(model, dtype=np.float32):
    """The round's global arrays, buffers too."""
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return {n: a.astype(dtype) if np.issubdtype(a.dtype, np.floating) else a for n, a in arrays.items()}


def examples(client, count, dtype=np.float32):
    rng = np.random.default_rng(client)
    return rng.normal(size=(count, 1, SIDE, SIDE)).astype(dtype), rng.integers(0, CLASSES, size=count)


def one_step(count, lr=0.1):
    return TrainingTrace(optimizer="SGD", batches=(tuple(range(count)),), lr=(lr,))


def train(model, inputs, labels, trace, *, optimizer=None):
    """The update of a client that trains as the trace says, by torch's own optimiser."""
    net = copy.deepcopy(model).to(torch.from_numpy(inputs).dtype).train()
    initial = {name: tensor.clone() for name, tensor in net.named_parameters()}
    if optimizer is None:
        options = {"momentum": trace.momentum, "weight_decay": trace.weight_decay, "nesterov": trace.nesterov}
        chosen = torch.optim.SGD(net.parameters(), lr=trace.lr[0], dampening=trace.dampening, **options)
    else:
        chosen = optimizer(net.parameters())
    for step, batch in enumerate(trace.batches):
        if optimizer is None:
            chosen.param_groups[0]["lr"] = trace.lr[step]
        x, y = torch.from_numpy(inputs[list(batch)]), torch.from_numpy(labels[list(batch)])
        chosen.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        chosen.step()
    return {name: (tensor.detach() - initial[name].detach()).numpy() for name, tensor in net.named_parameters()}


def noisy(update, std, seed=0):
    rng = np.random.default_rng(seed)
    return {n: (a + std * rng.normal(size=a.shape)).astype(a.dtype) for n, a in update.items()}


def scaled(update, factor):
    return {n: (a * factor).astype(a.dtype) for n, a in update.items()}


def flat(update):
    return np.concatenate([array.ravel() for array in update.values()])


def new_task(model, *, client=0, count=4, trace=None, dtype=np.float32, defend=None, captured=True, **changes):
    """A client's task; `defend` turns its update into what it shares."""
    inputs, labels = examples(client, count, dtype)
    trace = trace or one_step(count)
    update = train(model, inputs, labels, trace)
    fields = {
        "server_round": 1,
        "client": str(client),
        "node_id": 1000 + client,
        "shared": update if defend is None else defend(update),
        "inputs": inputs,
        "labels": labels,
        "trace": trace,
        "captured": update if captured else None,
        "num_examples": count,
    }
    return AuditTask(**{**fields, **changes})


def new_context(model, **settings):
    defaults = {"prior_std": PRIOR, "data_range": 2.0}
    return AuditContext(
        model=model, loss=nn.CrossEntropyLoss(), settings=AuditSettings(**{**defaults, **settings}), versions={"x": "1"}
    )
