"""How well public examples tell the noise that a client's most exposed example needs, to who sees its update alone.

What is tried is what `InversionAudit(source="proxy")` does (`fl_privacy.audit.proxy`), beside simpler forms of it:
public batches of any labels, of the labels that the update shows, and of those the ones whose update is spread over the
layers as the client's is. Clients hold images that the model was trained on, as they do in a federation; public ones it
has never seen.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fl_privacy.attacks import AttackProblem, GaussianPrior, IsotropicNoise, recover_label_counts
from fl_privacy.audit.blind import believed_counts
from fl_privacy.audit.claims import find_traces
from fl_privacy.audit.estimate import Source
from fl_privacy.audit.proxy import ObservedUpdate, PublicJacobians
from fl_privacy.audit.public import UpdateTask
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.rounding import rounded_off
from fl_privacy.influence.spectrum import estimate_spectrum
from fl_privacy.influence.training import LocalTrainingUpdate
from fl_privacy.influence.update import GradientUpdate, UpdateMap
from fl_privacy.reference import load_dataset
from fl_privacy.reference.datasets import ImageSet
from fl_privacy.reference.initialization import Initialization
from fl_privacy.studies.results import Portion
from fl_privacy.studies.scene import Scene, SceneSettings
from fl_privacy.studies.settings import option
from fl_privacy.studies.study import Study, Summary, rank_correlation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GOAL_RANK, _GOAL_ERROR = 0.9, 0.25
"""Spearman's correlation, and the median relative error, that are asked of a proxy."""
_NO_SPREAD = 0.05
"""Standard deviation of log10 σ below which there are no ranks to tell."""
_MOST_EXAMPLES = 8
"""Most examples of a client whose noise is found, as in an audit."""


@dataclass(frozen=True, kw_only=True)
class ProxySettings(SceneSettings):
    """A model at several stages of training, and clients of several batch sizes."""

    model: str = option("digitsnet", "linear, mlp, lenet, digitsnet, resnet8, resnet18 or vit.")
    initialization: Initialization = option("default", "How parameters are drawn; default: the model's own.")
    num_images: int = option(24, "Clients.", minimum=2)
    num_public: int = option(96, "Public examples.", minimum=2)
    steps: tuple[int, ...] = option((0, 100, 600), "Steps of central training after which to compare.", minimum=0)
    batch_sizes: tuple[int, ...] = option((1, 4, 8), "Examples behind an update.", minimum=1)
    noise: tuple[float, ...] = option((0.0, 1.0), "Noise on it, as a multiple of what it needs.", minimum=0)
    local_steps: int = option(1, "Local steps of a client, in which it goes through its examples once.", minimum=1)
    local_lr: float = option(0.1, "Learning rate of those steps.", above=0)
    train_batch: int = option(32, "Images per step of training.", minimum=1)
    lr: float = option(0.1, "Learning rate of that training.", above=0)
    target_leakage: float = option(0.5, "Leakage for which the noise is asked.", above=0)


@dataclass(frozen=True, kw_only=True)
class ProxyRow:
    """One client: the noise that its most exposed example needs, and what public examples say of it."""

    steps: int
    batch_size: int
    noise: float
    """On the update, as a multiple of what it needs."""
    client: int
    labels_recovered: bool
    """Whether the label counts that the update shows are the client's."""
    labels_believed: bool
    """Whether they are near enough to whole numbers to be used."""
    drowned: bool
    """Whether the noise is so strong that the update's own norm is not known; the row of an audit says so."""
    update_norm: float
    required_noise_std: float
    by_norm: float
    """Predicted from public batches of any labels."""
    by_label: float
    """From those of the recovered labels."""
    predicted: float
    """From those of them whose update is spread over the layers as the client's is: what an audit says."""
    lower: float
    """Of the interval that the audit gives."""
    upper: float


@dataclass(frozen=True, eq=False)
class _Stage:
    """A model that has been trained for a while."""

    model: nn.Module
    params: dict[str, Tensor]


def _portions(settings: ProxySettings) -> Iterator[Portion[ProxyRow]]:
    data = load_dataset(settings.dataset, root=settings.data_root)
    most = settings.num_images * max(settings.batch_sizes)
    if len(data.train) < most or len(data.test) < settings.num_public:
        raise InvalidInputError(
            f"expected at most {len(data.train)} images of clients and {len(data.test)} public ones, got "
            f"{settings.num_images} clients with batches of {max(settings.batch_sizes)} and {settings.num_public}"
        )
    odd = [size for size in settings.batch_sizes if size % settings.local_steps]
    if odd:
        raise InvalidInputError(f"expected batch sizes that {settings.local_steps} local steps divide, got {odd[0]}")
    scene = Scene.of(settings, num_images=settings.num_public)
    stages: dict[int, _Stage] = {}  # found when the first is needed

    def stage_after(steps: int) -> _Stage:
        if not stages:
            stages.update(_trained(settings, scene, data.train))
        return stages[steps]

    for steps in settings.steps:
        public: list[PublicJacobians] = []
        for size in settings.batch_sizes:
            keys = [(steps, size, noise, client) for noise in settings.noise for client in range(settings.num_images)]
            yield Portion(keys, partial(_rows, settings, scene, data.train, steps, size, stage_after, public))


def _rows(
    settings: ProxySettings,
    scene: Scene,
    private: ImageSet,
    steps: int,
    size: int,
    stage_after: Callable[[int], _Stage],
    known: list[PublicJacobians],
) -> Iterator[ProxyRow]:
    stage = stage_after(steps)
    if not known:
        gradient = rounded_off(GradientUpdate(stage.model, nn.CrossEntropyLoss()), settings.relu_width)
        known.append(PublicJacobians.of(gradient, stage.params, scene.images[:, 0], scene.labels[:, 0]))
    update = _client_update(settings, stage.model, size)
    images, labels = scene.select(private, slice(0, settings.num_images * size))
    images = images.double().reshape(settings.num_images, size, *images.shape[1:])
    labels = labels.reshape(settings.num_images, size)
    shared = UpdateJacobian(update, stage.params, images, labels).update()
    required = _required(settings, scene, update, stage.params, images, labels)
    generator = torch.Generator().manual_seed(settings.seed)
    for noise in settings.noise:
        for client in range(settings.num_images):
            std = noise * float(required[client])
            drawn = torch.randn(shared.shape[1], generator=generator, dtype=torch.float64).to(shared)
            seen = shared[client] + std * drawn
            problem = _problem(settings, scene, stage, seen, size, std)
            counts = recover_label_counts(problem)[0]
            observed = _observed(stage.model, update, seen, believed_counts(problem, counts), size, std)
            anything = dataclasses.replace(observed, label_counts=None)
            predict = partial(
                known[0].predict, target_leakage=settings.target_leakage, prior_std=scene.prior.std, seed=client
            )
            by_norm, by_label = predict(anything, match=False), predict(observed, match=False)
            says = predict(observed).required_noise_std
            yield ProxyRow(
                steps=steps,
                batch_size=size,
                noise=noise,
                client=client,
                labels_recovered=torch.equal(counts, torch.bincount(labels[client], minlength=len(counts))),
                labels_believed=observed.label_counts is not None,
                drowned=observed.drowned,
                update_norm=float(shared[client].norm()),
                required_noise_std=float(required[client]),
                by_norm=by_norm.required_noise_std.value,
                by_label=by_label.required_noise_std.value,
                predicted=says.upper if observed.drowned else says.value,
                lower=says.lower,
                upper=says.upper,
            )


def _client_update(settings: ProxySettings, model: nn.Module, size: int) -> LocalTrainingUpdate:
    """Returns what clients of a batch size share: the change that one pass over their examples makes."""
    part = size // settings.local_steps
    batches = [tuple(range(start, start + part)) for start in range(0, size, part)]
    return LocalTrainingUpdate(model, nn.CrossEntropyLoss(), lr=settings.local_lr, steps=batches)


def _required(
    settings: ProxySettings, scene: Scene, update: UpdateMap, params: dict[str, Tensor], images: Tensor, labels: Tensor
) -> Tensor:
    """Returns the noise that brings each client's most exposed example to the target, `[clients]`."""
    clients, size = labels.shape
    examples = min(size, _MOST_EXAMPLES)
    client_of = torch.arange(clients, device=labels.device).repeat_interleave(examples)
    private = torch.arange(examples, device=labels.device).repeat(clients)
    smooth = rounded_off(update, settings.relu_width)
    jacobian = UpdateJacobian(smooth, params, images[client_of], labels[client_of], private=private)
    required = estimate_spectrum(jacobian).required_noise_std(settings.target_leakage, scene.prior.std)
    return required.reshape(clients, examples).amax(1)


def _problem(
    settings: ProxySettings, scene: Scene, stage: _Stage, shared: Tensor, size: int, noise_std: float
) -> AttackProblem:
    """Returns an update as the server sees it, which takes it for one step."""
    one_step = LocalTrainingUpdate(stage.model, nn.CrossEntropyLoss(), lr=settings.local_lr, steps=1)
    floor = 1e-6 * float(shared.square().mean().sqrt())
    return AttackProblem(
        update=one_step,
        params=stage.params,
        shared=shared[None],
        prior=GaussianPrior(scene.images[:, 0].mean(0), scene.prior.std),
        noise=IsotropicNoise(shared.new_tensor([max(noise_std, floor)])),
        num_examples=size,
    )


def _observed(
    model: nn.Module, update: UpdateMap, shared: Tensor, counts: Tensor | None, size: int, claimed: float
) -> ObservedUpdate:
    """Returns what an audit knows of an update whose client says how much noise is on it."""
    named = {name: part[0].cpu().numpy() for name, part in update.layout.unflatten(shared[None]).items()}
    traces = find_traces(model, named, cross_entropy=True, rank=size)
    task = UpdateTask(
        server_round=0, client="", node_id=0, shared={}, source=Source.PROXY, traces=traces, claimed_noise_std=claimed
    )
    return ObservedUpdate.of(
        shared,
        update.layout.sizes,
        size=size,
        label_counts=counts,
        noise_std=task.noise_std,
        noise_error=task.noise_error,
    )


def _trained(settings: ProxySettings, scene: Scene, train: ImageSet) -> Iterator[tuple[int, _Stage]]:
    """Yields the numbers of steps to compare after, and the model then."""
    generator = torch.Generator().manual_seed(settings.seed)
    model = copy.deepcopy(scene.update.model).train()
    params = {name: p.float().requires_grad_() for name, p in scene.params.items()}
    optimizer = torch.optim.SGD(params.values(), lr=settings.lr)
    for step in range(max(settings.steps) + 1):
        if step in settings.steps:
            frozen = {name: p.detach().double() for name, p in params.items()}
            yield step, _Stage(copy.deepcopy(model).double().eval(), frozen)
        chosen = torch.randint(len(train), (settings.train_batch,), generator=generator)
        images, labels = scene.select(train, chosen)
        optimizer.zero_grad()
        outputs = functional_call(model, params, (images,))
        torch.autograd.backward(nn.functional.cross_entropy(outputs, labels))
        optimizer.step()


def _summarize(settings: ProxySettings, rows: Sequence[ProxyRow]) -> Summary:
    lines, met = [], 0
    cells = [(s, size, noise) for s in settings.steps for size in settings.batch_sizes for noise in settings.noise]
    for cell in cells:
        members = [row for row in rows if (row.steps, row.batch_size, row.noise) == cell]
        results = [_agreement(members, name) for name in ("by_norm", "by_label", "predicted")]
        rank, error = results[-1]
        spread = statistics.pstdev(torch.tensor([row.required_noise_std for row in members]).log10().tolist())
        reached = error <= _GOAL_ERROR and rank >= _GOAL_RANK
        met += reached
        covered = statistics.mean(row.lower <= row.required_noise_std <= row.upper for row in members)
        lines.append(
            (
                *(f"{number:g}" for number in cell),
                f"{spread:.2f}",
                *(f"{rank:.2f}, {error:.0%}" for rank, error in results),
                f"{statistics.mean(row.labels_recovered for row in members):.0%}",
                f"{statistics.mean(row.labels_believed for row in members):.0%}",
                f"{covered:.0%}",
                f"{statistics.mean(row.drowned for row in members):.0%}",
                "yes" if reached else "no",
            )
        )
    alike = sum(float(line[3]) < _NO_SPREAD for line in lines)
    return Summary(
        f"The goal, Spearman {_GOAL_RANK} and a median error of {_GOAL_ERROR:.0%}, is met in {met} of {len(cells)}. In "
        f"{alike} all clients need nearly the same noise (spread below {_NO_SPREAD}), so that ranks are chance.",
        (
            "steps",
            "batch",
            "noise",
            "spread of log10 σ",
            "norm alone: Spearman, median error",
            "and labels",
            "and layers",
            "labels right",
            "labels used",
            "interval holds",
            "drowned",
            "goal met",
        ),
        tuple(lines),
    )


def _agreement(rows: Sequence[ProxyRow], name: str) -> tuple[float, float]:
    """Returns Spearman's correlation and the median relative error of a prediction."""
    predicted, required = [getattr(row, name) for row in rows], [row.required_noise_std for row in rows]
    error = statistics.median(abs(p / r - 1) for p, r in zip(predicted, required, strict=True))
    return rank_correlation(predicted, required), error


def _draw(settings: ProxySettings, rows: Sequence[ProxyRow], figure: Figure) -> None:
    axes = figure.subplots(1, len(settings.batch_sizes), squeeze=False)[0]
    for axis, size in zip(axes, settings.batch_sizes, strict=True):
        members = [row for row in rows if row.batch_size == size and row.predicted > 0]
        for index, steps in enumerate(settings.steps):
            for noise, marker in zip(settings.noise, "ox^s", strict=False):
                chosen = [row for row in members if (row.steps, row.noise) == (steps, noise)]
                label = f"{steps} steps" + (f", noise {noise:g}" if noise else "")
                axis.scatter(
                    [row.required_noise_std for row in chosen],
                    [row.predicted for row in chosen],
                    s=14,
                    color=f"C{index}",
                    marker=marker,
                    linewidths=0.8,
                    label=label,
                )
        values = [v for row in members for v in (row.required_noise_std, row.predicted)]
        axis.plot([min(values), max(values)], [min(values), max(values)], color="black", linewidth=1)
        axis.set(xscale="log", yscale="log", title=f"batch of {size}", xlabel="σ needed", ylabel="σ predicted by proxy")
    axes[0].legend(fontsize="small")


STUDY = Study(
    name="proxy",
    settings=ProxySettings,
    row=ProxyRow,
    key=("steps", "batch_size", "noise", "client"),
    portions=_portions,
    summarize=_summarize,
    draw=_draw,
    figure_size=(11.0, 4.0),
)
