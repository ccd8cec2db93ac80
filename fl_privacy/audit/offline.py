"""An audit outside of a federation: one model, one batch, and the gradient or update that it gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from fl_privacy.audit.auditor import Auditor
from fl_privacy.audit.estimate import LeakageEstimate, Status
from fl_privacy.audit.settings import AuditSettings
from fl_privacy.audit.task import Array, AuditTask, TrainingTrace
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.layout import ParameterLayout
from fl_privacy.influence.update import GradientUpdate, Loss

_MULTIPLE_RTOL = 1e-4


def audit_gradient(
    model: nn.Module,
    loss: Loss,
    inputs: Array,
    labels: Array,
    *,
    shared: Mapping[str, Array] | None = None,
    clean: Mapping[str, Array] | None = None,
    defended: bool = False,
    settings: AuditSettings | None = None,
    name: str = "batch",
) -> LeakageEstimate:
    """Returns what a gradient gives away of the batch behind it.

    The gradient is that of the mean loss over the batch, at the model's parameters. Multiplied by a common factor, such
    as a learning rate or a clipping factor, it leaks the same: an attacker divides the factor out.

    Args:
        model: With the parameters at which the gradient was taken.
        loss: (outputs, labels) -> scalar mean loss.
        inputs: `[N, *shape]`.
        labels: `[N, ...]`.
        shared: What was shared, by parameter name. `None`: the gradient itself, undefended.
        clean: The gradient before any defence, if it was kept: it must be reproduced, or the row is `unverified`.
        defended: Whether `shared` was perturbed on purpose, so that its difference from the batch's own gradient is
            credited as protection. If not, a difference means that it is another model's, loss's or batch's gradient.
        settings: What to measure.
        name: What to call the row's client.

    Raises:
        InvalidInputError: `clean` or `defended` without `shared`, both of them, or arrays that do not fit together.
    """
    if shared is None and (clean is not None or defended):
        raise InvalidInputError("expected a shared gradient along with a clean one, or with defended=True")
    if clean is not None and defended:
        raise InvalidInputError(
            "expected a clean gradient or defended=True, not both: the clean one says what was added"
        )
    task = AuditTask(
        server_round=0,
        client=name,
        node_id=0,
        shared={},
        inputs=inputs,
        labels=labels,
        # A gradient is minus one step of SGD at learning rate 1.
        trace=TrainingTrace(optimizer="SGD", batches=(tuple(range(len(inputs))),), lr=(1.0,)),
        num_examples=len(inputs),
    )
    own = _gradient(model, loss, task)
    seen = own if shared is None else shared
    if not all(np.isfinite(array).all() for array in seen.values()):
        raise InvalidInputError("expected a finite gradient, got NaN or infinity: training has diverged")
    if not any(np.any(array) for array in seen.values()):
        raise InvalidInputError("expected a gradient, got zeros alone: is this the file that was shared?")
    before = own if clean is None and (defended or _is_multiple(seen, own)) else clean
    task = replace(task, shared=_negated(seen), captured=None if before is None else _negated(before))
    params = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    (row,) = Auditor(model, loss, settings=settings).audit_round(params, [task])
    if row.status is Status.UNVERIFIED:
        what = "this is not the batch's gradient" if clean is None else "the clean gradient is not the batch's"
        hint = (
            ""
            if clean is not None
            else "; if it was perturbed on purpose, give the clean one too, or say that it is defended"
        )
        row = replace(row, detail=f"{what}: other weights, another loss, or another batch{hint}")
    return row


def _is_multiple(update: Mapping[str, Array], gradient: Mapping[str, Array]) -> bool:
    """Whether an update is the gradient times a factor, to the precision of float32 sums."""
    u, g = (
        np.concatenate([np.ravel(part[name]).astype(np.float64) for name in gradient]) for part in (update, gradient)
    )
    if not np.isfinite(u).all() or not np.any(g):
        return False
    return bool(np.linalg.norm(u - (u @ g) / (g @ g) * g) <= _MULTIPLE_RTOL * np.linalg.norm(u))


def _gradient(model: nn.Module, loss: Loss, task: AuditTask) -> dict[str, Array]:
    theta = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dtype = next(iter(theta.values())).dtype
    inputs = torch.as_tensor(task.inputs)[None]
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    jacobian = UpdateJacobian(GradientUpdate(model, loss), theta, inputs, torch.as_tensor(task.labels)[None])
    flat = jacobian.update()[0]
    layout = ParameterLayout.of(model)
    parts = torch.split(flat, [theta[name].numel() for name in layout.names])
    return {name: part.reshape(theta[name].shape).numpy() for name, part in zip(layout.names, parts, strict=True)}


def _negated(update: Mapping[str, Array]) -> dict[str, Array]:
    return {name: np.negative(array) for name, array in update.items()}
