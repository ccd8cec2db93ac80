"""The audit itself: from what clients shared, and the batches behind it, to leakage estimates. Pure functions."""

from __future__ import annotations

import contextlib
import math
import time
import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fl_privacy.audit.blind import as_rebuilt, proxy_rows, rebuilt_task
from fl_privacy.audit.curve import ExampleLeakage, LeakageCurve
from fl_privacy.audit.deadline import DeadlineError, check_time
from fl_privacy.audit.estimate import MAX_EXAMPLES, LeakageEstimate, Source, Status
from fl_privacy.audit.exposure import Exposure, exposure, psnr_of
from fl_privacy.audit.input_noise import leakage_under, shortfall
from fl_privacy.audit.perturbation import NoiseBlocks, noise_blocks, observed_perturbation
from fl_privacy.audit.public import UpdateTask
from fl_privacy.audit.replay import AuditContext, MemoryBudgetError, Replay, flat_update, replay_training, to_tensor
from fl_privacy.audit.settings import AuditSettings
from fl_privacy.audit.task import Array, AuditTask, ClientUpdate
from fl_privacy.audit.wording import joined, nonlinear_text
from fl_privacy.influence.jacobian import UpdateJacobian, rows_of
from fl_privacy.influence.layout import ParameterLayout
from fl_privacy.influence.linearity import change_ratio, likely_error
from fl_privacy.influence.rounding import rounded_off
from fl_privacy.influence.spectrum import Spectrum, estimate_spectrum
from fl_privacy.influence.update import UpdateMap
from fl_privacy.interval import Interval

_CURVE_POINTS, _CURVE_SPAN = 17, 1e-6
"""Noise levels of a row's curve, and how far below the largest the smallest may be."""
_SMALLEST_SHIFT = 0.01
"""Of the shift over which linearity is looked at, relative to the prior's standard deviation."""


def audit_tasks(
    context: AuditContext,
    params: Mapping[str, Array],
    tasks: Sequence[ClientUpdate],
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
    context: AuditContext, params: Mapping[str, Array], group: Sequence[ClientUpdate], device: str, deadline: float
) -> list[LeakageEstimate]:
    try:
        return _audit_group(context, params, group, device, deadline)
    except DeadlineError:
        return [_without_estimate(context, task, Status.LATE, "not audited within the time limit") for task in group]
    except Exception as error:  # a privacy audit must not end a training run: the row says what went wrong
        if len(group) > 1:
            return [row for task in group for row in _audit_or_fail(context, params, [task], device, deadline)]
        detail = str(error) if isinstance(error, MemoryBudgetError) else f"{type(error).__name__}: {error}"
        return [_without_estimate(context, group[0], Status.AUDIT_FAILED, detail)]


def _without_estimate(context: AuditContext, task: ClientUpdate, status: Status, detail: str) -> LeakageEstimate:
    row = task.row(status, detail=detail)
    return replace(row, settings=context.settings.to_dict(), versions=context.versions)


def _audit_group(
    context: AuditContext, params: Mapping[str, Array], group: Sequence[ClientUpdate], device: str, deadline: float
) -> list[LeakageEstimate]:
    settings = context.settings
    started = time.perf_counter()
    blind = [task for task in group if isinstance(task, UpdateTask)]
    if blind:
        rows = _audit_blind(context, params, blind, device, deadline)
    else:
        rows = _audit_batches(
            context, params, [task for task in group if isinstance(task, AuditTask)], device, deadline
        )
    seconds = (time.perf_counter() - started) / len(group)
    return [replace(row, seconds=seconds, settings=settings.to_dict(), versions=context.versions) for row in rows]


def _audit_blind(
    context: AuditContext, params: Mapping[str, Array], group: Sequence[UpdateTask], device: str, deadline: float
) -> list[LeakageEstimate]:
    """Returns a row per update of a group whose batches are not known."""
    if group[0].source is Source.PROXY:
        return proxy_rows(context, params, group, torch.device(device), lambda: check_time(deadline))
    rows = []
    for task in group:
        rebuilt, how = rebuilt_task(context, params, task, torch.device(device), lambda: check_time(deadline))
        if rebuilt is None:
            rows.append(task.row(Status.AUDIT_FAILED, detail=how))
        else:
            rows += [as_rebuilt(row, how) for row in _audit_batches(context, params, [rebuilt], device, deadline)]
    return rows


def _audit_batches(
    context: AuditContext, params: Mapping[str, Array], group: Sequence[AuditTask], device: str, deadline: float
) -> list[LeakageEstimate]:
    settings = context.settings
    dtype = torch.float64 if settings.precision == "float64" else torch.float32
    rows, blurred = _measure(context, params, group, torch.device(device), dtype, deadline)
    again = [i for i, blur in enumerate(blurred) if blur and settings.precision == "auto"]
    if again:
        with contextlib.suppress(DeadlineError, MemoryBudgetError):  # a wide interval beats none
            chosen = [group[i] for i in again]
            sharper, _ = _measure(context, params, chosen, torch.device(device), torch.float64, deadline)
            for i, row in zip(again, sharper, strict=True):
                rows[i] = row
    return rows


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
    inputs = torch.stack([to_tensor(task.given, device, dtype) for task in group])
    labels = torch.stack([to_tensor(task.labels, device, dtype) for task in group])
    shared = torch.stack([flat_update(layout, task.shared, device, dtype) for task in group])
    check_time(deadline)
    replay = replay_training(context, theta, group, inputs, labels, shared, check_time=lambda: check_time(deadline))
    seen = observed_perturbation(shared, replay.reference)
    # What nothing explains is not credited: an update that was not reproduced counts as undefended.
    credited = torch.where(replay.verified, seen.noise_std, 0.0).double()
    delta = torch.where(replay.verified[:, None], seen.delta, 0.0)

    examples = [_chosen_examples(task, settings) for task in group]  # equally many for each client
    units = len(examples[0])
    client_of = torch.arange(len(group), device=device).repeat_interleave(units)
    private = torch.tensor(examples, device=device).reshape(-1) if settings.unit == "example" else None

    def jacobian_of(update: UpdateMap, units: Tensor) -> UpdateJacobian:
        return UpdateJacobian(
            update,
            theta,
            rows_of(inputs, client_of[units]),
            rows_of(labels, client_of[units]),
            private=None if private is None else private[units],
            memory_budget=settings.memory_budget,
            before_pass=lambda: check_time(deadline),
        )

    smooth = rounded_off(replay.update, settings.relu_width)
    jacobian = jacobian_of(smooth, torch.arange(len(client_of), device=device))
    spectrum = estimate_spectrum(
        jacobian,
        num_probes=settings.num_probes,
        rtol=settings.rtol,
        max_steps=settings.max_steps,
        seed=settings.seed,
    )
    targets = [settings.target_leakage if task.target_leakage is None else task.target_leakage for task in group]
    required = spectrum.required_noise_std(
        torch.tensor(targets, dtype=torch.float64, device=device)[client_of], settings.prior_std
    )
    # The scale is known to its standard error.
    doubt = (2 * seen.scale_error / seen.scale).double()
    found = exposure(jacobian, spectrum, delta[client_of], credited[client_of], doubt[client_of], settings)
    blocks = noise_blocks(shared, replay.reference, layout.sizes)
    split = blocks.split & replay.verified
    if split.any():
        mine = split[client_of].nonzero().squeeze(1)
        found = found.worst(mine, _leaning(jacobian.select(mine), shared, replay, blocks, client_of[mine], settings))

    shifts = [_read_shift(task, bool(replay.verified[i]), settings.prior_std) for i, task in enumerate(group)]
    law = torch.tensor(
        [share for shift, chosen in zip(shifts, examples, strict=True) for share in shift.of(chosen, settings.unit)],
        dtype=torch.float64,
        device=device,
    )
    if (law < 1).any():
        found = found.limited(law, settings.prior_std)
    worst = [_worst_unit(found, required, client_of == index) for index in range(len(group))]
    at_worst = torch.tensor(worst, device=device)
    taken = jacobian.select(at_worst)
    own = jacobian_of(replay.update, at_worst)
    finest = spectrum.required_noise_std(1 - _SMALLEST_SHIFT**2, settings.prior_std)  # leaves an error of that size
    std = torch.maximum(credited[client_of], finest.nan_to_num(0.0))
    ridge = torch.maximum((std / settings.prior_std) ** 2, 10 * spectrum.resolution.nan_to_num(1.0))
    ratios = _change_ratios(own, taken, found.rmse[at_worst], ridge[at_worst], settings)
    changes = _changes_by_shifts(group, replay, theta, labels, settings.memory_budget)

    curves = _curves(spectrum, client_of, settings.prior_std)
    rows = []
    for index, task in enumerate(group):
        mine = (client_of == index).nonzero().squeeze(1)
        top = worst[index]
        status, detail = _judge(task, replay, index, found, mine, settings)
        detail = joined(
            detail, _doubt_of_noise(task, float(seen.noise_std[index]), jacobian.update_dim, float(doubt[index]))
        )
        if split[index]:
            detail = joined(detail, _uneven(blocks, index))
        detail = joined(detail, shifts[index].detail)
        if found.blurred[mine].any() and dtype == torch.float64:
            detail = joined(detail, "precision limits the interval: the noise is below what float64 resolves")
        ratio = _number(ratios[index])
        if law[top] > found.leakage.value[top]:  # else it is the noise's law that limits what leaks, not the Jacobian
            detail = joined(detail, nonlinear_text(ratio))
        example = examples[index][top % units] if settings.unit == "example" else None
        rows.append(
            replace(
                task.row(status, detail=detail),
                unit=settings.unit,
                units_audited=units,
                leakage=Interval(*(float(part[top]) for part in found.leakage)),
                leakage_mean=float(found.leakage.value[mine].mean()),
                worst_example=example,
                worst_label=_class_of(task, example),
                rmse=float(found.rmse[top]),
                psnr=psnr_of(float(found.rmse[top]), settings.data_range),
                i2f=_number(found.influence[top]) if replay.verified[index] else None,
                lower_bound=_number(found.lower_bound[top]) if replay.verified[index] else None,
                input_noise="" if task.shift is None else task.shift.covariance,
                input_noise_kept=None if task.shift is None else task.shift.kept,
                input_noise_leakage=None if task.shift is None else float(law[mine].max()),
                input_noise_rms=None if task.shift is None else task.shift.rms,
                input_noise_change=changes.get(index),
                curve=curves[index],
                examples=_spread(task, examples[index], found.leakage.value[mine], required[mine], settings),
                update_norm=float(seen.update_norm[index]),
                perturbation_norm=float(seen.norm[index]),
                cosine=float(seen.cosine[index]),
                snr_db=float(seen.snr_db[index]),
                scale=float(seen.scale[index]),
                noise_std=float(credited[index]),
                even_noise=not bool(split[index]),
                prior_std=settings.prior_std,
                ridge=float(found.ridge[top]),
                target_leakage=targets[index],
                required_noise_std=float(required[mine].max()),
                required_noise_norm=float(required[mine].max()) * math.sqrt(jacobian.update_dim),
                verified=bool(replay.verified[index]),
                converged=bool((found.solved & found.tight)[mine].all()),
                residual=float(found.residual[top]),
                change_ratio=ratio,
                replay_error=_number(replay.error[index]),
                input_dim=jacobian.input_dim,
                update_dim=jacobian.update_dim,
                products=int(found.products[mine].sum()),
                device=str(device),
                dtype=str(dtype).removeprefix("torch."),
                batch_norm=replay.update.batch_norm,
            )
        )
    return rows, [bool(found.blurred[client_of == index].any()) for index in range(len(group))]


def _worst_unit(found: Exposure, required: Tensor, mine: Tensor) -> int:
    """Returns the worst of a client's examples; of equally bad ones, the one that needs the most noise."""
    units: list[int] = mine.nonzero().squeeze(1).tolist()
    return max(units, key=lambda u: (_or(found.leakage.value[u], -1.0), _or(required[u], -1.0)))


def _change_ratios(
    own: UpdateJacobian, taken: UpdateJacobian, rmse: Tensor, ridge: Tensor, settings: AuditSettings
) -> Tensor:
    """Returns how much more each unit's update changes over an error as predicted than the J taken says, `[U]`."""
    assert settings.prior_std is not None
    size = rmse.double().nan_to_num(0.0).clamp(min=_SMALLEST_SHIFT * settings.prior_std)
    error = likely_error(taken, ridge=ridge, seed=settings.seed, max_steps=settings.max_steps).nan_to_num(0.0)
    return change_ratio(own, size[:, None].to(error) * error, linear=taken)


def _leaning(
    jacobian: UpdateJacobian,
    shared: Tensor,
    replay: Replay,
    blocks: NoiseBlocks,
    client_of: Tensor,
    settings: AuditSettings,
) -> Exposure:
    """Returns what an attacker recovers who leans on the entries that carry the least noise: J and δ weighted so."""
    weights = blocks.weights[client_of].to(jacobian.dtype)
    leaning = jacobian.weighted(weights)
    delta = shared / blocks.scale[:, None].to(shared) - replay.reference
    doubt = (2 * blocks.scale_error / blocks.scale)[client_of]
    spectrum = estimate_spectrum(
        leaning,
        num_probes=settings.num_probes,
        rtol=settings.rtol,
        max_steps=settings.max_steps,
        seed=settings.seed,
    )
    return exposure(leaning, spectrum, weights * delta[client_of], blocks.least[client_of], doubt, settings)


@dataclass(frozen=True, eq=False)
class _ShiftRead:
    """What a client's noise on its inputs is credited with.

    Attributes:
        leakage: Of x + a, `[N]`; ones where nothing is credited.
        detail: What there is to say of it.
    """

    leakage: Array
    detail: str = ""

    def of(self, chosen: Sequence[int], unit: str) -> list[float]:
        """Returns the leakage of each audited unit; that of a batch is the mean of its examples'."""
        return [float(self.leakage.mean())] if unit == "batch" else self.leakage[list(chosen)].tolist()


def _read_shift(task: AuditTask, verified: bool, prior_std: float) -> _ShiftRead:
    """Returns what noise on the inputs leaves of each example, where training on x + a gives what was captured."""
    nothing = np.ones(len(task.inputs))
    shift = task.shift
    if shift is None:
        return _ShiftRead(nothing)
    if not verified:
        return _ShiftRead(nothing, "noise on the inputs is not credited, as training with it was not reproduced")
    if problem := shortfall(shift):
        return _ShiftRead(nothing, problem)
    return _ShiftRead(leakage_under(shift.leakage, shift.prior_std, prior_std), shift.note)


def _changes_by_shifts(
    group: Sequence[AuditTask], replay: Replay, theta: Mapping[str, Tensor], labels: Tensor, memory_budget: int
) -> dict[int, float]:
    """Returns ‖u(x + a) − u(x)‖ of the clients that put noise on their inputs."""
    shifted = [index for index, task in enumerate(group) if task.shift is not None]
    if not shifted:
        return {}
    at, dtype, device = torch.tensor(shifted, device=labels.device), replay.reference.dtype, labels.device
    inputs = torch.stack([to_tensor(group[i].inputs, device, dtype) for i in shifted])
    without = UpdateJacobian(replay.update, theta, inputs, labels[at], memory_budget=memory_budget).update()
    change = torch.linalg.vector_norm(replay.reference[at] - without, dim=-1)
    return dict(zip(shifted, change.tolist(), strict=True))


def _uneven(blocks: NoiseBlocks, index: int) -> str:
    zeroed, least = float(blocks.zeroed[index]), float(blocks.least[index])
    found = f"{zeroed:.0%} of the entries were zeroed" if zeroed > 0 else "noise differs between layers"
    rest = f"carries noise of {least:.2g} each" if least else "is exact"
    return f"{found}: an attacker leans on the rest, which {rest}"


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
    task: AuditTask, replay: Replay, index: int, found: Exposure, mine: Tensor, settings: AuditSettings
) -> tuple[Status, str]:
    if found.failed[mine].any():
        return Status.AUDIT_FAILED, "products with the Jacobian were not finite: training has diverged"
    if not replay.verified[index]:
        error = _number(replay.error[index])
        compared = "nothing was captured to compare with" if error is None else f"replay differs by {error:.1e}"
        return Status.UNVERIFIED, task.trace.problem or f"local training was not reproduced: {compared}"
    if not found.tight[mine].all():
        return Status.UNCONVERGED, f"stopped after {settings.max_steps} Lanczos steps a probe; the interval holds"
    if not found.solved[mine].all():
        return Status.AUDITED, f"I²F not solved to {settings.solve_rtol:g} within {settings.solve_steps} products"
    return Status.AUDITED, ""


def _doubt_of_noise(task: AuditTask, measured: float, update_dim: int, scale_doubt: float) -> str:
    """Says so where less noise was measured on an update than its client says it put there.

    The measured standard deviation of P normal numbers is within 5/√(2P) of the true one, but for one time in 10⁶; with
    the doubt about the scale that was taken out on top.
    """
    claimed = task.applied_noise_std
    if claimed is None or measured * (1 + 2 * scale_doubt) >= claimed * (1 - 5 / math.sqrt(2 * update_dim)):
        return ""
    return f"the client says it put noise of {claimed:.3g} per parameter on its update, and {measured:.3g} is there"


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


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else float(value)


def _or(value: Tensor, default: float) -> float:
    return default if value.isnan() else float(value)
