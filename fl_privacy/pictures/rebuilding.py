"""What an attacker rebuilds of one private example from each of several versions of its update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_privacy.attacks import (
    Attack,
    AttackProblem,
    GaussianPrior,
    GaussNewton,
    KnownBatch,
    rmse,
)
from fl_privacy.audit.observed import SharedUpdate, observed_version, predicted_recovery, rounding_noise
from fl_privacy.audit.replay import AuditContext, flat_update, replay_training, to_tensor
from fl_privacy.audit.settings import RELU_WIDTH
from fl_privacy.audit.task import Array, AuditTask
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.layout import ParameterLayout
from fl_privacy.influence.rounding import rounded_off
from fl_privacy.influence.update import UpdateMap
from fl_privacy.interval import Interval
from fl_privacy.studies.results import Progress


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """What was rebuilt from one version of the update.

    Errors are root mean squares per input element, in units of the input.

    Attributes:
        name: Of the version.
        rebuilt: The example `[*shape]`.
        leakage: Predicted share of its variance that is recovered, with what is known of it.
        predicted: Predicted error, with what is known of it.
        reached: The attack's error.
        explained: Whether what was rebuilt explains the update; if not, the attack failed and shows nothing.
    """

    name: str
    rebuilt: Tensor
    leakage: Interval[float]
    predicted: Interval[float]
    reached: float
    explained: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """The private example and a panel for each version of its update.

    Attributes:
        original: `[*shape]`.
        prior_mean: What an attacker believes it is before he sees an update, `[*shape]`.
        prior_std: The error of that belief, rmse per element, as the prior has it.
        panels: In the order of the versions.
    """

    original: Tensor
    prior_mean: Tensor
    prior_std: float
    panels: tuple[Panel, ...]


def rebuild(
    update: UpdateMap,
    params: Mapping[str, Tensor],
    inputs: Tensor,
    labels: Tensor,
    versions: Sequence[SharedUpdate],
    *,
    example: int = 0,
    prior: GaussianPrior,
    attack: Attack | None = None,
    relu_width: float = RELU_WIDTH,
    progress: Progress | None = None,
) -> Picture:
    """Returns what is rebuilt of one example from each version of the update, the rest of its batch being known.

    Args:
        update: How the client made its update.
        params: Global parameters by name.
        inputs: The batch `[N, *shape]`.
        labels: `[N, ...]`.
        versions: Of the update.
        example: Index of the private example.
        prior: What the attacker believes of it, in the dtype of the inputs.
        attack: Who rebuilds. Default: `GaussNewton()`.
        relu_width: Of the ReLUs in predictions, as `AuditSettings.relu_width`.
        progress: Told (versions done, versions to do).

    Raises:
        InvalidInputError: There is no version or no such example.
    """
    if not versions or not 0 <= example < len(inputs):
        raise InvalidInputError(
            f"expected at least one version and an example in [0, {len(inputs)}), got {len(versions)} and {example}"
        )
    private = torch.tensor([example], device=inputs.device)
    smooth = rounded_off(update, relu_width)
    jacobian = UpdateJacobian(smooth, params, inputs[None], labels[None], private=private)
    truth = inputs[example][None, None]
    panels = []
    for done, version in enumerate(versions):
        if progress is not None:
            progress(done, len(versions))
        problem = AttackProblem(
            update=update,
            params=params,
            shared=version.shared[None],
            prior=prior,
            noise=version.noise,
            labels=labels[None],
            num_examples=len(inputs),
            known=KnownBatch(inputs[None], private),
        )
        found = (version.attack or attack or GaussNewton()).run(problem)
        leakage, predicted = predicted_recovery(jacobian, version.equivalent or version.noise, prior.std)
        panels.append(
            Panel(
                name=version.name,
                rebuilt=found.inputs[0, 0],
                leakage=leakage,
                predicted=predicted,
                reached=float(rmse(found.inputs, truth)),
                explained=bool(found.explained),
            )
        )
    return Picture(original=inputs[example], prior_mean=prior.mean, prior_std=prior.std, panels=tuple(panels))


def rebuild_client(
    context: AuditContext,
    params: Mapping[str, Array],
    task: AuditTask,
    *,
    example: int = 0,
    prior: GaussianPrior,
    shared: Mapping[str, Mapping[str, Array]] | None = None,
    attack: Attack | None = None,
    device: str = "cpu",
) -> Picture:
    """Returns what is rebuilt of one example of an audited client, from its undefended update and from what it shared.

    The attacker knows the mechanism: its common factor, and how strong its noise is on which entries.

    Args:
        context: Model, loss and settings.
        params: Global parameters of the round by name, with the buffers.
        task: The client, with its batch.
        example: Index of the private example, such as a row's `worst_example`.
        prior: What the attacker believes of it, for example `GaussianPrior.from_examples(public examples)`.
        shared: Updates by name (shared minus global parameters), under a title for each. Default: what arrived, under
            the name of the client's defence. The undefended update always comes first.
        attack: Who rebuilds. Default: `GaussNewton()`.
        device: Where to compute.

    Raises:
        InvalidInputError: There is no such example, or the client's training was not reproduced from its batch: an
            attack on another computation would show nothing.
    """
    where, dtype = torch.device(device), torch.float64
    layout = ParameterLayout.of(context.model)
    theta = {name: to_tensor(array, where, dtype) for name, array in params.items()}
    inputs, labels = to_tensor(task.inputs, where, dtype)[None], to_tensor(task.labels, where, dtype)[None]
    given = {task.defence or "as shared": task.shared} if shared is None else shared
    updates = torch.stack([flat_update(layout, arrays, where, dtype) for arrays in given.values()])
    replay = replay_training(context, theta, [task], inputs, labels, updates[:1])
    if not replay.verified[0] and task.captured is not None:
        raise InvalidInputError(
            f"expected local training that the batch reproduces, got one that differs by {float(replay.error[0]):.1e} "
            f"{task.trace.problem}".rstrip()
        )
    undefended = UpdateJacobian(replay.update, theta, inputs, labels).update()[0]
    versions = [SharedUpdate("raw update", undefended, rounding_noise(undefended))]
    for name, update in zip(given, updates, strict=True):
        versions.append(observed_version(name, update, undefended, layout.sizes))
    return rebuild(
        replay.update,
        theta,
        inputs[0],
        labels[0],
        versions,
        example=example,
        prior=prior.to(dtype, where),
        attack=attack,
        relu_width=context.settings.relu_width,
    )
