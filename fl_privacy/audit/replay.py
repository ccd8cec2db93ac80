"""Local training run again: the update that a handed-over batch gives, and whether it is the one that was captured."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fl_privacy.audit.public import PublicExamples
from fl_privacy.audit.settings import AuditSettings
from fl_privacy.audit.task import Array, AuditTask, Numbers
from fl_privacy.audit.wording import number_text
from fl_privacy.influence.evaluation import BatchNormMode, has_batch_norm
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.layout import ParameterLayout
from fl_privacy.influence.memory import graph_bytes
from fl_privacy.influence.training import LocalTrainingUpdate
from fl_privacy.influence.update import Loss


@dataclass(frozen=True, kw_only=True)
class AuditContext:
    """What all audits of a run have in common.

    `settings` must have its `prior_std` and `data_range` filled in when `audit_tasks` is called. `public` is what takes
    the place of private batches where clients hand over none.
    """

    model: nn.Module
    loss: Loss
    settings: AuditSettings
    versions: Mapping[str, str]
    public: PublicExamples | None = None


class MemoryBudgetError(Exception):
    """A replay would take more memory than the settings allow; the message says how much."""


@dataclass(frozen=True, eq=False)
class Replay:
    """Local training run again from the handed-over batches, and what it was compared with."""

    update: LocalTrainingUpdate
    error: Tensor
    """‖replayed − captured‖/‖captured‖ `[C]`; NaN where nothing was captured."""
    reference: Tensor
    """The undefended update that the shared one is compared with, `[C, P]`."""
    verified: Tensor


def replay_training(
    context: AuditContext,
    theta: Mapping[str, Tensor],
    group: Sequence[AuditTask],
    inputs: Tensor,
    labels: Tensor,
    shared: Tensor,
    *,
    check_time: Callable[[], None] | None = None,
) -> Replay:
    """Runs local training again; with batch_norm="auto", in the mode that comes closer to what was captured.

    Args:
        context: Model, loss and settings.
        theta: Global arrays of the round by name.
        group: Clients whose shapes and traces are the same.
        inputs: What their models were trained on, `[C, N, *shape]`.
        labels: `[C, N, ...]`.
        shared: The updates that arrived, `[C, P]`.
        check_time: Called before each step; what it raises ends the replay.

    Raises:
        MemoryBudgetError: A replay would take more memory than the settings allow.
    """
    settings, task = context.settings, group[0]
    context = replace(context, model=with_buffers(context.model, theta))
    captured = None
    if task.captured is not None:
        layout = ParameterLayout.of(context.model)
        captured = torch.stack([flat_update(layout, t.captured or {}, inputs.device, inputs.dtype) for t in group])
    modes: tuple[BatchNormMode, ...] = ("eval", "train") if has_batch_norm(context.model) else ("eval",)
    if settings.batch_norm != "auto":
        modes = (settings.batch_norm,)
    best: Replay | None = None
    for mode in modes:
        update = _update_map(context, task, mode, theta, inputs, labels, captured, check_time)
        replayed = UpdateJacobian(update, theta, inputs, labels, memory_budget=settings.memory_budget).update()
        target = shared if captured is None else captured
        error = torch.linalg.vector_norm(replayed - target, dim=-1)
        error = error / torch.linalg.vector_norm(target, dim=-1).clamp(min=torch.finfo(error.dtype).tiny)
        verified = (error <= settings.replay_rtol) & (not task.trace.problem)
        error = error if captured is not None else torch.full_like(error, torch.nan)
        reference = replayed if captured is None else captured
        candidate = Replay(update, error, reference, verified)
        if best is None or candidate.verified.sum() > best.verified.sum():
            best = candidate
        if best.verified.all():
            break
    assert best is not None
    return best


def with_buffers(model: nn.Module, arrays: Mapping[str, Tensor]) -> nn.Module:
    """Returns the model with the round's buffers: what clients normalise with is what they were sent."""
    sent = {name: arrays[name] for name, _ in model.named_buffers() if name in arrays}
    if not sent:
        return model
    copied = copy.deepcopy(model)
    copied.load_state_dict(sent, strict=False)
    return copied


def _update_map(
    context: AuditContext,
    task: AuditTask,
    batch_norm: BatchNormMode,
    theta: Mapping[str, Tensor],
    inputs: Tensor,
    labels: Tensor,
    captured: Tensor | None,
    check_time: Callable[[], None] | None,
) -> LocalTrainingUpdate:
    """Returns the client's local training; for one that cannot be replayed, a gradient step of the same length."""
    trace = task.trace

    def local_training(**options: Any) -> LocalTrainingUpdate:
        training = LocalTrainingUpdate(
            context.model, context.loss, batch_norm=batch_norm, before_step=check_time, **options
        )
        _check_memory(training, theta, inputs, labels, context.settings)
        return training

    if trace.problem or not trace.batches:
        gradient = local_training(lr=1.0, steps=1)
        if captured is None:
            return gradient
        stepped = UpdateJacobian(gradient, theta, inputs, labels).update()
        length = float(torch.linalg.vector_norm(captured) / torch.linalg.vector_norm(stepped))
        return local_training(lr=length if math.isfinite(length) else 1.0, steps=1)
    everything = tuple(range(len(task.inputs)))
    return local_training(
        lr=trace.lr,
        steps=1 if trace.batches == (everything,) else trace.batches,
        momentum=trace.momentum,
        dampening=trace.dampening,
        weight_decay=trace.weight_decay,
        nesterov=trace.nesterov,
    )


def _check_memory(
    training: LocalTrainingUpdate, theta: Mapping[str, Tensor], inputs: Tensor, labels: Tensor, settings: AuditSettings
) -> None:
    """Raises MemoryBudgetError where a replay and what follows it would take more than the budget."""
    clients, examples = inputs.shape[:2]
    size = training.largest_batch(labels[:1]).shape[1]
    # A pass takes as many clients as fit. What that leaves: one graph, the parameters after each step, the examples as
    # they came and on their device, and those of several clients once more for each that is audited.
    copies = 3 if clients == 1 else 2 + settings.max_examples
    trajectory = training.num_graphs * training.layout.dim * inputs.element_size()
    needed = graph_bytes(training, theta, inputs[:1], labels[:1]) + trajectory + copies * inputs.nbytes
    if needed > settings.memory_budget:
        raise MemoryBudgetError(
            f"expected a replay within {number_text(settings.memory_budget / 2**20)} MiB, and {training.num_graphs} "
            f"steps on up to {size} of {examples} examples take about {number_text(needed / 2**20)} MiB: raise "
            "AuditSettings(memory_budget=...), or have clients train on less at once"
        )


def updates_at(
    context: AuditContext,
    params: Mapping[str, Array],
    task: AuditTask,
    inputs: Sequence[Array],
    *,
    device: str = "cpu",
) -> list[dict[str, Numbers]]:
    """Returns the update that a client's local training gives at each of several inputs, by parameter name.

    Args:
        context: Model, loss and settings.
        params: Global arrays of the round by name.
        task: A client's, whose training can be reproduced.
        inputs: Each `[N, *shape]`, in place of those that its model was trained on.
        device: Where to compute, a torch device name.
    """
    layout = ParameterLayout.of(context.model)
    place, dtype = torch.device(device), torch.float64
    theta = {name: to_tensor(array, place, dtype) for name, array in params.items()}
    given, labels = (to_tensor(part, place, dtype)[None] for part in (task.given, task.labels))
    shared = flat_update(layout, task.shared, place, dtype)[None]
    replay = replay_training(context, theta, [task], given, labels, shared)
    updates = []
    for chosen in inputs:
        other = to_tensor(chosen, place, dtype)[None]
        at_other = UpdateJacobian(replay.update, theta, other, labels, memory_budget=context.settings.memory_budget)
        parts = layout.unflatten(at_other.update().cpu())
        updates.append({name: part[0].numpy() for name, part in parts.items()})
    return updates


def to_tensor(array: Array, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns an array on a device, floating-point values in the given type."""
    tensor = torch.from_numpy(np.array(array))  # a copy: what Ray hands out is read-only
    # Losses take class indices of no other integer type.
    return tensor.to(device, dtype if tensor.is_floating_point() else torch.int64)


def flat_update(
    layout: ParameterLayout, arrays: Mapping[str, Array], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Returns an update by parameter name as one vector `[P]`."""
    return layout.flatten({name: to_tensor(arrays[name], device, dtype) for name in layout.names if name in arrays})
