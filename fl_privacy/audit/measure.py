"""The audit itself: from what clients shared, and the batches behind it, to leakage estimates. Pure functions."""

from __future__ import annotations

import contextlib
import math
import time
import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fl_privacy.audit.curve import ExampleLeakage, LeakageCurve
from fl_privacy.audit.estimate import MAX_EXAMPLES, LeakageEstimate, Status
from fl_privacy.audit.perturbation import observed_perturbation
from fl_privacy.audit.replay import AuditContext, Replay, flat_update, replay_training, to_tensor
from fl_privacy.audit.settings import AuditSettings
from fl_privacy.audit.task import Array, AuditTask
from fl_privacy.influence.i2f import influence, influence_lower_bound
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.layout import ParameterLayout
from fl_privacy.influence.spectrum import Spectrum, estimate_spectrum
from fl_privacy.interval import Interval

_WIDE = 0.05
"""Width of a leakage interval beyond which limited precision sends an audit from float32 to float64."""
_CURVE_POINTS, _CURVE_SPAN = 17, 1e-6
"""Noise levels of a row's curve, and how far below the largest the smallest may be."""


class _DeadlineError(Exception):
    """The time is up."""


def audit_tasks(
    context: AuditContext,
    params: Mapping[str, Array],
    tasks: Sequence[AuditTask],
    *,
    device: str = "cpu",
    deadline: float = math.inf,
) -> list[LeakageEstimate]:
    """Returns one row per task, in order. Tasks of one group share a pass; a task that cannot be audited fails alone.

    Args:
        context: Model, loss and settings.
        params: Global parameters of the round by name.
        tasks: What is known of each client.
        device: Where to compute, a torch device name.
        deadline: `time.monotonic()` at which to stop, looked at before each product with J; what is not done by then
            gets a row that says so.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, task in enumerate(tasks):
        groups.setdefault(task.group, []).append(index)
    rows: dict[int, LeakageEstimate] = {}
    for indices in groups.values():
        group = [tasks[i] for i in indices]
        rows.update(zip(indices, _audit_or_fail(context, params, group, device, deadline), strict=True))
    return [rows[i] for i in range(len(tasks))]


def _audit_or_fail(
    context: AuditContext, params: Mapping[str, Array], group: Sequence[AuditTask], device: str, deadline: float
) -> list[LeakageEstimate]:
    try:
        return _audit_group(context, params, group, device, deadline)
    except _DeadlineError:
        return [_without_estimate(context, task, Status.LATE, "not audited within the time limit") for task in group]
    except Exception as error:  # a privacy audit must not end a training run: the row says what went wrong
        if len(group) > 1:
            return [row for task in group for row in _audit_or_fail(context, params, [task], device, deadline)]
        detail = f"{type(error).__name__}: {error}"
        return [_without_estimate(context, group[0], Status.AUDIT_FAILED, detail)]


def _without_estimate(context: AuditContext, task: AuditTask, status: Status, detail: str) -> LeakageEstimate:
    row = task.row(status, detail=detail)
    return replace(row, settings=context.settings.to_dict(), versions=context.versions)


def _audit_group(
    context: AuditContext, params: Mapping[str, Array], group: Sequence[AuditTask], device: str, deadline: float
) -> list[LeakageEstimate]:
    settings = context.settings
    started = time.perf_counter()
    dtype = torch.float64 if settings.precision == "float64" else torch.float32
    rows, blurred = _measure(context, params, group, torch.device(device), dtype, deadline)
    again = [i for i, blur in enumerate(blurred) if blur and settings.precision == "auto"]
    if again:
        with contextlib.suppress(_DeadlineError):  # a wide interval in time beats none
            chosen = [group[i] for i in again]
            sharper, _ = _measure(context, params, chosen, torch.device(device), torch.float64, deadline)
            for i, row in zip(again, sharper, strict=True):
                rows[i] = row
    seconds = (time.perf_counter() - started) / len(group)
    return [replace(row, seconds=seconds, settings=settings.to_dict(), versions=context.versions) for row in rows]


def _measure(
    context: AuditContext,
    params: Mapping[str, Array],
    group: Sequence[AuditTask],
    device: torch.device,
    dtype: torch.dtype,
    deadline: float,
) -> tuple[list[LeakageEstimate], list[bool]]:
    """Returns a row per task, and for each whether precision, not budget, limits what is known."""
    settings = context.settings
    assert settings.prior_std is not None
    assert settings.data_range is not None
    layout = ParameterLayout.of(context.model)
    theta = {name: to_tensor(array, device, dtype) for name, array in params.items()}
    inputs = torch.stack([to_tensor(task.inputs, device, dtype) for task in group])
    labels = torch.stack([to_tensor(task.labels, device, dtype) for task in group])
    shared = torch.stack([flat_update(layout, task.shared, device, dtype) for task in group])
    _check_time(deadline)
    replay = replay_training(context, theta, group, inputs, labels, shared)
    seen = observed_perturbation(shared, replay.reference)
    # What nothing explains is not credited: an update that was not reproduced counts as undefended.
    credited = torch.where(replay.verified, seen.noise_std, 0.0).double()

    examples = [_chosen_examples(task, settings) for task in group]  # equally many for each client
    units = len(examples[0])
    client_of = torch.arange(len(group), device=device).repeat_interleave(units)
    private = torch.tensor(examples, device=device).reshape(-1) if settings.unit == "example" else None
    jacobian = UpdateJacobian(
        replay.update,
        theta,
        inputs[client_of],
        labels[client_of],
        private=private,
        memory_budget=settings.memory_budget,
        before_pass=lambda: _check_time(deadline),
    )
    spectrum = estimate_spectrum(
        jacobian,
        num_probes=settings.num_probes,
        rtol=settings.rtol,
        max_steps=settings.max_steps,
        seed=settings.seed,
    )
    sigma = credited[client_of]
    epsilon = _ridge(sigma, settings)
    # The scale is known to its standard error: two of them less of noise, or more, are as compatible with what arrived.
    doubt = (2 * seen.scale_error / seen.scale).double()[client_of]
    leakage = Interval(
        spectrum.leakage_at(_ridge(sigma / (1 - doubt).clamp(min=1e-3), settings)).lower,
        spectrum.leakage_at(epsilon).value,
        spectrum.leakage_at(_ridge(sigma / (1 + doubt), settings)).upper,
    )
    required = spectrum.required_noise_std(settings.target_leakage, settings.prior_std)
    # Below what floating point knows of G a smaller ridge changes digits that are not there.
    solvable = torch.maximum(epsilon, 10 * spectrum.resolution)
    delta = seen.delta[client_of]
    solved = influence(jacobian, delta, ridge=solvable, rtol=settings.solve_rtol, max_steps=settings.solve_steps)
    bound = influence_lower_bound(jacobian, delta)
    bias = spectrum.bias(solvable.sqrt() * settings.prior_std, settings.prior_std).value
    rmse = (solved.norm.double() ** 2 / jacobian.input_dim + bias).sqrt()

    curves = _curves(spectrum, client_of, settings.prior_std)
    blurred = ~spectrum.resolved(epsilon) & (leakage.upper - leakage.lower > _WIDE)
    rows = []
    for index, task in enumerate(group):
        mine = (client_of == index).nonzero().squeeze(1)
        # The worst of the client's examples; of equally bad ones, the one that needs the most noise.
        worst = max(mine.tolist(), key=lambda u: (_or(leakage.value[u], -1.0), _or(required[u], -1.0)))
        status, detail = _judge(task, replay, index, spectrum, solved.converged, mine, settings)
        if blurred[mine].any() and dtype == torch.float64:
            detail = _join(detail, "precision limits the interval: the noise is below what float64 resolves")
        example = examples[index][worst % units] if settings.unit == "example" else None
        rows.append(
            replace(
                task.row(status, detail=detail),
                unit=settings.unit,
                units_audited=units,
                leakage=Interval(*(float(part[worst]) for part in leakage)),
                leakage_mean=float(leakage.value[mine].mean()),
                worst_example=example,
                worst_label=_class_of(task, example),
                rmse=float(rmse[worst]),
                psnr=_psnr(float(rmse[worst]), settings.data_range),
                i2f=float(solved.norm[worst]),
                lower_bound=float(bound[worst]),
                curve=curves[index],
                examples=_spread(task, examples[index], leakage.value[mine], required[mine], settings),
                update_norm=float(seen.update_norm[index]),
                perturbation_norm=float(seen.norm[index]),
                cosine=float(seen.cosine[index]),
                snr_db=float(seen.snr_db[index]),
                scale=float(seen.scale[index]),
                noise_std=float(credited[index]),
                prior_std=settings.prior_std,
                ridge=float(epsilon[worst]),
                target_leakage=settings.target_leakage,
                required_noise_std=float(required[mine].max()),
                required_noise_norm=float(required[mine].max()) * math.sqrt(jacobian.update_dim),
                verified=bool(replay.verified[index]),
                converged=bool(solved.converged[mine].all()) and _tight(spectrum, mine, settings),
                residual=float(solved.residual[worst]),
                replay_error=_number(replay.error[index]),
                input_dim=jacobian.input_dim,
                update_dim=jacobian.update_dim,
                products=int((spectrum.products + solved.products)[mine].sum()),
                device=str(device),
                dtype=str(dtype).removeprefix("torch."),
                batch_norm=replay.update.batch_norm,
            )
        )
    return rows, [bool(blurred[client_of == index].any()) for index in range(len(group))]


def _check_time(deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise _DeadlineError


def _ridge(sigma: Tensor, settings: AuditSettings) -> Tensor:
    """ε = σ²/τ² of each unit, unless the settings give one."""
    assert settings.prior_std is not None
    return (sigma / settings.prior_std) ** 2 if settings.ridge is None else torch.full_like(sigma, settings.ridge)


def _curves(spectrum: Spectrum, client_of: Tensor, prior_std: float) -> list[LeakageCurve | None]:
    """Returns for each client the leakage of its most exposed example, from where 99 % leak to where 1 % does."""
    reach = [spectrum.required_noise_std(target, prior_std) for target in (0.99, 0.01)]
    clients = int(client_of.max()) + 1
    low, high = (torch.stack([part[client_of == c].max() for c in range(clients)]) for part in reach)
    low = torch.maximum(low, high * _CURVE_SPAN)  # an update that does not determine the input needs no noise for 0.99
    steps = torch.linspace(0, 1, _CURVE_POINTS, dtype=low.dtype, device=low.device)
    grid = low[:, None] ** (1 - steps) * high[:, None] ** steps  # [C, points]
    known = grid.isfinite().all(1) & (high > 0)
    grid = torch.where(known[:, None], grid, 1.0)
    found = [spectrum.leakage(grid[client_of, point], prior_std) for point in range(_CURVE_POINTS)]
    curves: list[LeakageCurve | None] = []
    for client in range(clients):
        mine = client_of == client
        # The largest lower, middle and upper values bound the largest leakage.
        bounds = [[float(getattr(at, part)[mine].max()) for at in found] for part in Interval._fields]
        lower, value, upper = (tuple(part) for part in bounds)
        curve = LeakageCurve(noise_std=tuple(grid[client].tolist()), lower=lower, value=value, upper=upper)
        curves.append(curve.rounded() if known[client] and all(map(math.isfinite, upper)) else None)
    return curves


def _spread(
    task: AuditTask, examples: Sequence[int], leakage: Tensor, required: Tensor, settings: AuditSettings
) -> tuple[ExampleLeakage, ...]:
    """Returns what each audited example leaks, the most exposed first; nothing where numbers are missing."""
    if settings.unit == "batch" or not (leakage.isfinite().all() and required.isfinite().all()):
        return ()
    found = [
        ExampleLeakage(
            index=example, label=_class_of(task, example), leakage=float(value), required_noise_std=float(std)
        )
        for example, value, std in zip(examples, leakage, required, strict=True)
    ]
    found.sort(key=lambda example: (-example.leakage, -example.required_noise_std))
    return tuple(example.rounded() for example in found[:MAX_EXAMPLES])


def _judge(
    task: AuditTask,
    replay: Replay,
    index: int,
    spectrum: Spectrum,
    solved: Tensor,
    mine: Tensor,
    settings: AuditSettings,
) -> tuple[Status, str]:
    if spectrum.failed[mine].any():
        return Status.AUDIT_FAILED, "products with the Jacobian were not finite: training has diverged"
    if not replay.verified[index]:
        error = _number(replay.error[index])
        found = "nothing was captured to compare with" if error is None else f"replay differs by {error:.1e}"
        return Status.UNVERIFIED, task.trace.problem or f"local training was not reproduced: {found}"
    if not _tight(spectrum, mine, settings):
        return Status.UNCONVERGED, f"stopped after {settings.max_steps} Lanczos steps a probe; the interval holds"
    if not solved[mine].all():
        return Status.AUDITED, f"I²F not solved to {settings.solve_rtol:g} within {settings.solve_steps} products"
    return Status.AUDITED, ""


def _tight(spectrum: Spectrum, mine: Tensor, settings: AuditSettings) -> bool:
    """Whether the two quadrature rules agree to the tolerance wherever floating point can tell them apart."""
    return bool((spectrum.gap(10 * spectrum.resolution)[mine] <= 2 * settings.rtol).all())


def _chosen_examples(task: AuditTask, settings: AuditSettings) -> list[int]:
    """Which of a client's examples are audited: a random choice that depends on nothing but seed, client and round."""
    count = len(task.inputs)
    if settings.unit == "batch":
        return [0]
    if count <= settings.max_examples:
        return list(range(count))
    key = zlib.crc32(f"{task.client}/{task.server_round}".encode())
    chosen = np.random.default_rng([settings.seed, key]).choice(count, settings.max_examples, replace=False)
    return sorted(int(i) for i in chosen)


def _class_of(task: AuditTask, example: int | None) -> int | None:
    if example is None or task.labels.ndim != 1 or not np.issubdtype(task.labels.dtype, np.integer):
        return None
    return int(task.labels[example])


def _psnr(rmse: float, data_range: float) -> float:
    return math.inf if rmse == 0 else 20 * math.log10(data_range / rmse)


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else float(value)


def _or(value: Tensor, default: float) -> float:
    return default if value.isnan() else float(value)


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
