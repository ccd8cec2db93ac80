"""What an attacker rebuilds of one private example from each of several versions of its update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_privacy.attacks import (
    Attack,
    AttackProblem,
    GaussianPrior,
    GaussNewton,
    IndependentNoise,
    IsotropicNoise,
    KnownBatch,
    Noise,
    rmse,
)
from fl_privacy.attacks.mechanisms import PRECISION
from fl_privacy.audit.perturbation import noise_blocks, observed_perturbation
from fl_privacy.audit.replay import AuditContext, flat_update, replay_training, to_tensor
from fl_privacy.audit.settings import RELU_WIDTH
from fl_privacy.audit.task import Array, AuditTask
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.layout import ParameterLayout
from fl_privacy.influence.rounding import rounded_off
from fl_privacy.influence.spectrum import estimate_spectrum
from fl_privacy.influence.update import UpdateMap
from fl_privacy.interval import Interval

Progress = Callable[[int, int], None]
"""Told (versions done, versions to do)."""

_MAX_STEPS = 256
"""Lanczos steps per probe, of four, for the predicted error: all there is of inputs of up to 1,024 elements."""


@dataclass(frozen=True, eq=False)
class SharedUpdate:
    """One version of a client's update, and what the attacker believes of it.

    Attributes:
        name: For the panel, in a few words.
        shared: `[P]`, any common factor taken out.
        noise: Of one unit.
    """

    name: str
    shared: Tensor
    noise: Noise


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
        found = (attack or GaussNewton()).run(problem)
        leakage, predicted = predicted_recovery(jacobian, version.noise, prior.std)
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
    versions = [SharedUpdate("raw update", undefended, _rounding(undefended))]
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


def observed_version(name: str, shared: Tensor, update: Tensor, sizes: Sequence[int]) -> SharedUpdate:
    """Returns what an attacker holds who sees a defended update `[P]` and knows how strong the defence is where.

    Args:
        name: For the panel.
        shared: As it arrived, `[P]`.
        update: Undefended, `[P]`.
        sizes: Number of entries of each parameter.
    """
    blocks = noise_blocks(shared[None], update[None], sizes)
    least = _rounding(update).std
    if blocks.split[0]:
        std = torch.maximum(blocks.std, least[:, None])
        return SharedUpdate(name, shared / blocks.scale[0].to(shared), IndependentNoise(std))
    seen = observed_perturbation(shared[None], update[None])
    return SharedUpdate(name, shared / seen.scale[0], IsotropicNoise(torch.maximum(seen.noise_std, least)))


def _rounding(update: Tensor) -> IsotropicNoise:
    """An update as it is, known to the precision of float32."""
    rms = update.square().mean().sqrt().double()[None]
    return IsotropicNoise((PRECISION * rms).clamp(min=torch.finfo(torch.float32).tiny))


def predicted_recovery(
    jacobian: UpdateJacobian, noise: Noise, prior_std: float
) -> tuple[Interval[float], Interval[float]]:
    """Returns the predicted leakage and error against an attacker who weighs entries by their noise.

    Of inputs of up to 1,024 elements both are exact; of larger ones the spectrum is sampled.

    Args:
        jacobian: One unit.
        noise: On its shared update, isotropic or independent.
        prior_std: τ.

    Raises:
        InvalidInputError: Noise of another kind.
    """
    if isinstance(noise, IndependentNoise):
        least = noise.std.amin(-1)
        jacobian = jacobian.weighted((least[:, None] / noise.std).to(jacobian.dtype))
    elif isinstance(noise, IsotropicNoise):
        least = noise.std
    else:
        raise InvalidInputError(f"expected isotropic or independent noise, got {type(noise).__name__}")
    ridge = (least / prior_std) ** 2
    spectrum = estimate_spectrum(jacobian, max_steps=_MAX_STEPS, ridge=ridge)
    leakage, error = spectrum.leakage(least, prior_std), spectrum.rmse(least, prior_std)
    return Interval(*map(float, leakage)), Interval(*map(float, error))
