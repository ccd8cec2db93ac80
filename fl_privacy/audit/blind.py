"""Audits of updates whose batch the server does not see: at public examples, and at what an attack rebuilds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from fl_privacy.attacks.gauss_newton import GaussNewton
from fl_privacy.attacks.labels import expected_label_counts, recover_label_counts
from fl_privacy.attacks.noise import IsotropicNoise
from fl_privacy.attacks.problem import AttackProblem
from fl_privacy.audit.estimate import LeakageEstimate, Status
from fl_privacy.audit.exposure import psnr_of
from fl_privacy.audit.proxy import COVERAGE, ObservedUpdate, PublicJacobians
from fl_privacy.audit.public import PublicExamples, UpdateTask
from fl_privacy.audit.replay import AuditContext, flat_update, to_tensor, with_buffers
from fl_privacy.audit.task import Array, AuditTask, ClientUpdate, TrainingTrace
from fl_privacy.audit.wording import joined, number_text
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.evaluation import BatchNormMode, has_batch_norm
from fl_privacy.influence.prior import GaussianPrior
from fl_privacy.influence.rounding import rounded_off
from fl_privacy.influence.training import LocalTrainingUpdate
from fl_privacy.influence.update import GradientUpdate

_MANY_ZEROS = 0.5
"""Share of zeros in an update above which its row says that pruning is not in the model."""

_COUNT_ERROR = 0.2
"""Root mean square distance of label counts from whole numbers above which they are not believed."""

_ONE_STEP = "taken for one step of training: after several, up to a quarter more noise is needed"
_BATCH_NORM = "of trained models with batch normalisation the intervals held for 58 to 75 % of clients only"
"""What docs/validation.md measured of public examples in place of private ones."""

CheckTime = Callable[[], None]
"""Raises where the time is up."""


def proxy_rows(
    context: AuditContext,
    params: Mapping[str, Array],
    tasks: Sequence[UpdateTask],
    device: torch.device,
    check_time: CheckTime,
) -> list[LeakageEstimate]:
    """Returns a row per update, audited at public examples: their Jacobians are taken once for all of them."""
    settings, public = context.settings, _public(context)
    assert settings.prior_std is not None
    assert settings.data_range is not None
    dtype = torch.float64 if settings.precision == "float64" else torch.float32
    found = _public_jacobians(context, params, public, device, dtype, check_time)
    middle = found.spectrum.required_noise_std(settings.target_leakage, settings.prior_std) / settings.prior_std
    if settings.precision == "auto" and not found.spectrum.resolved(middle**2).all():
        dtype = torch.float64
        found = _public_jacobians(context, params, public, device, dtype, check_time)
    rows = []
    for task in tasks:
        check_time()
        try:
            row = _proxy_row(context, params, task, found, device, dtype)
        except InvalidInputError as error:  # of this update alone
            row = task.row(Status.AUDIT_FAILED, detail=str(error))
        rows.append(row)
    return rows


def rebuilt_task(
    context: AuditContext, params: Mapping[str, Array], task: UpdateTask, device: torch.device, check_time: CheckTime
) -> tuple[AuditTask | None, str]:
    """Returns the update with what an attack rebuilt of its batch, and how far that may be trusted.

    `None` where the attack failed, with the reason. That says something of the attack, and nothing of the update.
    """
    public = _public(context)
    size = task.num_examples
    if task.lr is None:
        return None, "the learning rate is not known: set PublicExamples(lr=...), or send `lr` in the training config"
    if size is None or not 1 <= size <= public.max_rebuilt:
        return None, f"expected 1 to {public.max_rebuilt} examples behind an update that is attacked, got {size}"
    problem = _problem(context, params, task, device, torch.float64, before_pass=check_time)
    found = GaussNewton(max_steps=public.attack_steps).run(problem)
    matched = f"rebuilt in {int(found.products[0])} products, misfit {float(found.misfit[0]):.3g} (1: noise alone)"
    if not (found.explained & found.converged)[0]:
        return None, (
            f"the attack failed, {matched}, {found.stop[0]}: nothing is known, and a better attack may do better"
        )
    update = found.inputs[0], found.labels[0]
    jacobian = replace(problem, labels=found.labels).jacobian(found.inputs.flatten(1))
    named = problem.update.layout.unflatten(jacobian.update()[0])
    inputs, labels = (part.cpu().numpy() for part in update)
    rebuilt = AuditTask(
        **{field.name: getattr(task, field.name) for field in fields(ClientUpdate)},
        inputs=inputs,
        labels=labels,
        trace=TrainingTrace(optimizer="SGD", batches=(tuple(range(size)),), lr=(task.lr,)),
        captured={name: array.cpu().numpy() for name, array in named.items()},
    )
    return rebuilt, matched


def as_rebuilt(row: LeakageEstimate, how: str) -> LeakageEstimate:
    """Returns the row of an audit at rebuilt inputs as what it is: an indication of what is at the true ones."""
    if not row.status.has_estimate:
        return replace(row, detail=joined(how, row.detail))
    status = Status.APPROXIMATE if row.status is not Status.UNVERIFIED else row.status
    detail = joined(f"at inputs that an attack rebuilt, not at the client's: {how}", row.detail)
    return replace(row, status=status, verified=None, worst_example=None, replay_error=None, examples=(), detail=detail)


def _public(context: AuditContext) -> PublicExamples:
    if context.public is None:
        raise InvalidInputError("expected public examples for an audit without the batch, got None")
    return context.public


def _public_jacobians(
    context: AuditContext,
    params: Mapping[str, Array],
    public: PublicExamples,
    device: torch.device,
    dtype: torch.dtype,
    check_time: CheckTime,
) -> PublicJacobians:
    settings = context.settings
    theta = {name: to_tensor(array, device, dtype) for name, array in params.items()}
    inputs, labels = public.chosen(settings.seed)
    return PublicJacobians.of(
        rounded_off(GradientUpdate(with_buffers(context.model, theta), context.loss), settings.relu_width),
        theta,
        to_tensor(inputs, device, dtype),
        to_tensor(labels, device, dtype),
        num_probes=settings.num_probes,
        rtol=settings.rtol,
        max_steps=settings.max_steps,
        seed=settings.seed,
        memory_budget=settings.memory_budget,
        before_pass=check_time,
    )


def _proxy_row(
    context: AuditContext,
    params: Mapping[str, Array],
    task: UpdateTask,
    found: PublicJacobians,
    device: torch.device,
    dtype: torch.dtype,
) -> LeakageEstimate:
    settings = context.settings
    assert settings.prior_std is not None
    assert settings.data_range is not None
    size = task.num_examples
    if size is None or size < 1:
        raise InvalidInputError(f"expected a client that says on how many examples it trained, got {size}")
    problem = _problem(context, params, task, device, dtype)
    counts, unknown = _label_counts(problem, task)
    layout = problem.update.layout
    observed = ObservedUpdate.of(
        problem.shared[0],
        layout.sizes,
        size=size,
        label_counts=counts,
        noise_std=task.noise_std,
        noise_error=task.noise_error,
    )
    target = settings.target_leakage if task.target_leakage is None else task.target_leakage
    says = found.predict(observed, target_leakage=target, prior_std=settings.prior_std, seed=settings.seed)
    trusted, detail = _limits(observed, task, len(found.labels))
    many = f"{says.batches} public {'examples' if size == 1 else f'batches of {size}'}"
    needed = says.required_noise_std
    about = (
        f"at {many}, not at the client's own; {COVERAGE:.0%} of them leak and need what the intervals say (noise "
        f"{number_text(needed.lower)} to {number_text(needed.upper)})"
    )
    limits = joined(_ONE_STEP, _BATCH_NORM if has_batch_norm(context.model) else "")
    rmse = settings.prior_std * math.sqrt(max(0.0, 1 - says.leakage.value))
    noise_norm = observed.noise_std.value * math.sqrt(layout.dim)
    tight = found.spectrum.gap(10 * found.spectrum.resolution) <= 2 * settings.rtol
    return replace(
        task.row(Status.APPROXIMATE if trusted else Status.UNVERIFIED, detail=joined(detail, unknown, about, limits)),
        unit="example",
        units_audited=len(found.labels),
        leakage=says.leakage,
        rmse=rmse,
        psnr=psnr_of(rmse, settings.data_range),
        update_norm=observed.norm.value,
        perturbation_norm=noise_norm,
        snr_db=20 * math.log10(observed.norm.value / noise_norm) if noise_norm and observed.norm.value else None,
        noise_std=observed.noise_std.value,
        prior_std=settings.prior_std,
        ridge=(observed.noise_std.value / settings.prior_std) ** 2,
        target_leakage=target,
        required_noise_std=needed.upper if observed.drowned else needed.value,
        required_noise_interval=needed,
        required_noise_norm=(needed.upper if observed.drowned else needed.value) * math.sqrt(layout.dim),
        converged=bool(tight.all()),
        input_dim=found.spectrum.input_dim,
        update_dim=layout.dim,
        products=int(found.spectrum.products.sum()),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        batch_norm="eval" if problem.update.batch_norm else "",
    )


def _limits(observed: ObservedUpdate, task: UpdateTask, public: int) -> tuple[bool, str]:
    """Returns whether an update is one for which public examples were found to tell, and what speaks against it."""
    if observed.drowned:
        return False, f"noise drowns the update, whose own norm is at most {number_text(observed.norm.upper)}"
    if observed.size > public / 2:
        return False, f"{observed.size} examples behind the update, too many for {public} public ones to stand in"
    if task.traces.sparsity > _MANY_ZEROS:
        return False, f"{task.traces.sparsity:.0%} of the update is zero, and public updates are not pruned"
    return True, ""


def believed_counts(problem: AttackProblem, counts: Tensor) -> Tensor | None:
    """Returns the label counts of one update, or `None` where they are whole numbers by rounding alone.

    A trained model is sure of some of its examples, and p̄ at the prior mean says nothing of them.
    """
    off = expected_label_counts(problem)[0] - counts
    return counts if float(off.square().mean().sqrt()) <= _COUNT_ERROR else None


def _label_counts(problem: AttackProblem, task: UpdateTask) -> tuple[Tensor | None, str]:
    """Returns how often each class is behind an update, or why that is not known."""
    if problem.num_examples > 1 and task.lr is None:
        return None, "labels of a batch are not recovered without the learning rate"
    try:
        counts = recover_label_counts(problem)[0]
    except InvalidInputError as error:
        return None, f"labels are not recovered: {error}"
    return believed_counts(problem, counts), ""


def _problem(
    context: AuditContext,
    params: Mapping[str, Array],
    task: UpdateTask,
    device: torch.device,
    dtype: torch.dtype,
    before_pass: CheckTime | None = None,
) -> AttackProblem:
    """Returns what the server holds of one update, as an attacker: one step of training on its whole batch."""
    settings, public = context.settings, _public(context)
    assert settings.prior_std is not None
    theta = {name: to_tensor(array, device, dtype) for name, array in params.items()}
    mode: BatchNormMode = "train" if settings.batch_norm == "train" else "eval"
    update = LocalTrainingUpdate(
        with_buffers(context.model, theta), context.loss, lr=task.lr or 1.0, steps=1, batch_norm=mode
    )
    shared = flat_update(update.layout, task.shared, device, dtype)
    size = update.layout.flatten(theta).square().mean().sqrt()
    # Parameters travel as float32: their change is known to a unit of rounding of theirs.
    floor = float(torch.maximum(torch.finfo(torch.float32).eps * size, 1e-6 * shared.square().mean().sqrt()))
    mean = to_tensor(public.inputs.mean(0), device, dtype)
    return AttackProblem(
        update=update,
        params=theta,
        shared=shared[None],
        prior=GaussianPrior(mean, settings.prior_std),
        noise=IsotropicNoise(torch.tensor([max(task.noise_std, floor)], dtype=torch.float64, device=device)),
        num_examples=task.num_examples or 1,
        before_pass=before_pass,
    )
