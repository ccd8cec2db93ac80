"""How well public examples tell the noise that a private one needs, to who sees nothing but the norm of its update.

A server without the batch can take the Jacobian at public examples of the same kind. σ/‖u‖, the noise that one of them
needs over the norm of its update, varies less than either; its median over public examples times the norm of the update
that a client shared predicts the client's σ. With the label known (one example's can be read off its gradient), public
examples of that label do. In a batch, the private one is the first, and the norm is that of the whole batch's update.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fl_privacy.errors import InvalidInputError
from fl_privacy.extras import require
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.spectrum import estimate_spectrum
from fl_privacy.reference import load_dataset
from fl_privacy.reference.datasets import ImageSet
from fl_privacy.reference.initialization import Initialization
from fl_privacy.studies.results import Portion
from fl_privacy.studies.scene import Scene, SceneSettings
from fl_privacy.studies.settings import option
from fl_privacy.studies.study import Study, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GOAL_RANK, _GOAL_ERROR = 0.9, 0.25
"""Spearman's correlation, and the median relative error, that are asked of a proxy."""


@dataclass(frozen=True, kw_only=True)
class ProxySettings(SceneSettings):
    """A model at several stages of training, and clients of several batch sizes."""

    model: str = option("digitsnet", "linear, mlp, lenet, digitsnet, resnet8, resnet18 or vit.")
    initialization: Initialization = option("default", "How parameters are drawn; default: the model's own.")
    num_images: int = option(24, "Clients, and as many public batches.", minimum=2)
    steps: tuple[int, ...] = option((0, 100, 600), "Steps of central training after which to compare.", minimum=0)
    batch_sizes: tuple[int, ...] = option((1, 4), "Examples behind an update.", minimum=1)
    train_batch: int = option(32, "Images per step of training.", minimum=1)
    lr: float = option(0.1, "Learning rate of that training.", above=0)
    target_leakage: float = option(0.5, "Leakage for which the noise is asked.", above=0)


@dataclass(frozen=True, kw_only=True)
class ProxyRow:
    """One client: the noise that its private example needs, and what public examples say of it."""

    steps: int
    batch_size: int
    client: int
    label: int
    update_norm: float
    required_noise_std: float
    predicted: float
    """From public batches of any label."""
    predicted_by_label: float
    """From those whose private example has the same label, where there are any."""


def _portions(settings: ProxySettings) -> Iterator[Portion[ProxyRow]]:
    most = 2 * settings.num_images * max(settings.batch_sizes)
    data = load_dataset(settings.dataset, root=settings.data_root)
    if len(data.test) < most:
        raise InvalidInputError(
            f"expected clients and batches for at most {len(data.test)} test images, got {settings.num_images} clients "
            f"and as many public batches of {max(settings.batch_sizes)}"
        )
    scene = Scene.of(settings, num_images=most)
    trajectory: dict[int, dict[str, Tensor]] = {}  # found when it is first needed

    def params_after(steps: int) -> dict[str, Tensor]:
        if not trajectory:
            trajectory.update(_trained(settings, scene, data.train))
        return trajectory[steps]

    for steps in settings.steps:
        for size in settings.batch_sizes:
            keys = [(steps, size, client) for client in range(settings.num_images)]
            yield Portion(keys, partial(_rows, settings, scene, steps, size, params_after))


def _rows(
    settings: ProxySettings,
    scene: Scene,
    steps: int,
    size: int,
    params_after: Callable[[int], dict[str, Tensor]],
) -> Iterator[ProxyRow]:
    at = dataclasses.replace(scene, params=params_after(steps))
    count = settings.num_images * size
    norms, required, labels = _measured(settings, at, slice(0, count), size)
    public_norms, public_required, public_labels = _measured(settings, at, slice(count, 2 * count), size)
    ratios = public_required / public_norms
    for client in range(settings.num_images):
        same = ratios[public_labels == labels[client]]
        yield ProxyRow(
            steps=steps,
            batch_size=size,
            client=client,
            label=int(labels[client]),
            update_norm=float(norms[client]),
            required_noise_std=float(required[client]),
            predicted=float(ratios.quantile(0.5) * norms[client]),
            predicted_by_label=float((same if len(same) else ratios).quantile(0.5) * norms[client]),
        )


def _measured(settings: ProxySettings, scene: Scene, part: slice, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns norm of the update, σ of the private example and its label, of each batch of a part of the images."""
    images = scene.images[part].reshape(settings.num_images, size, *scene.images.shape[2:])
    labels = scene.labels[part].reshape(settings.num_images, size)
    first = torch.zeros(settings.num_images, dtype=torch.long)
    jacobian = UpdateJacobian(scene.update, scene.params, images, labels, private=first)
    spectrum = estimate_spectrum(jacobian, max_steps=64)
    required = spectrum.required_noise_std(settings.target_leakage, scene.prior.std)
    return jacobian.update().norm(dim=1), required, labels[:, 0]


def _trained(settings: ProxySettings, scene: Scene, train: ImageSet) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yields the numbers of steps to compare after, and the parameters then."""
    generator = torch.Generator().manual_seed(settings.seed)
    params = {name: p.float().requires_grad_() for name, p in scene.params.items()}
    optimizer = torch.optim.SGD(params.values(), lr=settings.lr)
    for step in range(max(settings.steps) + 1):
        if step in settings.steps:
            yield step, {name: p.detach().double() for name, p in params.items()}
        images, labels = train.select(torch.randint(len(train), (settings.train_batch,), generator=generator))
        optimizer.zero_grad()
        outputs = functional_call(scene.update.model.train(), params, (images,))
        torch.autograd.backward(nn.functional.cross_entropy(outputs, labels))
        optimizer.step()


def _summarize(settings: ProxySettings, rows: Sequence[ProxyRow]) -> Summary:
    lines, met = [], 0
    cells = [(steps, size) for steps in settings.steps for size in settings.batch_sizes]
    for steps, size in cells:
        members = [row for row in rows if (row.steps, row.batch_size) == (steps, size)]
        results = [_agreement(members, name) for name in ("predicted", "predicted_by_label")]
        best = any(rank >= _GOAL_RANK and error <= _GOAL_ERROR for rank, error in results)
        met += best
        spread = statistics.pstdev(torch.tensor([row.required_noise_std for row in members]).log10().tolist())
        numbers = [f"{value:.2f}" for result in results for value in result]
        lines.append((str(steps), str(size), f"{spread:.2f}", *numbers, "yes" if best else "no"))
    return Summary(
        f"The goal, Spearman {_GOAL_RANK} and a median error of {_GOAL_ERROR:.0%}, is met in {met} of {len(cells)}.",
        (
            "steps",
            "batch",
            "spread of log10 σ",
            "Spearman",
            "median error",
            "Spearman, label known",
            "median error, label known",
            "goal met",
        ),
        tuple(lines),
    )


def _agreement(rows: Sequence[ProxyRow], name: str) -> tuple[float, float]:
    """Returns Spearman's correlation and the median relative error of a prediction."""
    stats: Any = require("scipy.stats")
    predicted, required = [getattr(row, name) for row in rows], [row.required_noise_std for row in rows]
    error = statistics.median(abs(p / r - 1) for p, r in zip(predicted, required, strict=True))
    return float(stats.spearmanr(predicted, required).statistic), error


def _draw(settings: ProxySettings, rows: Sequence[ProxyRow], figure: Figure) -> None:
    axes = figure.subplots(1, len(settings.batch_sizes), squeeze=False)[0]
    for axis, size in zip(axes, settings.batch_sizes, strict=True):
        members = [row for row in rows if row.batch_size == size]
        for index, steps in enumerate(settings.steps):
            chosen = [row for row in members if row.steps == steps]
            required = [row.required_noise_std for row in chosen]
            predicted = [row.predicted_by_label for row in chosen]
            axis.scatter(required, predicted, s=14, color=f"C{index}", label=f"after {steps} steps")
        values = [v for row in members for v in (row.required_noise_std, row.predicted_by_label)]
        axis.plot([min(values), max(values)], [min(values), max(values)], color="black", linewidth=1)
        axis.set(xscale="log", yscale="log", title=f"batch of {size}", xlabel="σ needed", ylabel="σ predicted by proxy")
        axis.legend()


STUDY = Study(
    name="proxy",
    settings=ProxySettings,
    row=ProxyRow,
    key=("steps", "batch_size", "client"),
    portions=_portions,
    summarize=_summarize,
    draw=_draw,
    figure_size=(9.0, 4.2),
)
