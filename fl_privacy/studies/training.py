"""Leakage over training rounds: what a client's gradient gives away as the global model learns.

A small federation trains by federated averaging; at some rounds the gradients of single images are audited at the
global parameters. Gradients shrink as images are learned, so that noise of a fixed size hides more; whether the
gradient itself says less shows at noise that is a fixed share of it.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fl_privacy.errors import InvalidInputError
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


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(SceneSettings):
    """A federation, and the rounds at which it is audited."""

    model: str = option("digitsnet", "linear, mlp, lenet, digitsnet, resnet8, resnet18 or vit.")
    initialization: Initialization = option("default", "How parameters are drawn; default: the model's own.")
    rounds: tuple[int, ...] = option((0, 1, 2, 5, 10, 20, 50, 100), "Rounds after which to audit.", minimum=0)
    num_clients: int = option(8, "Clients, which share the training images evenly.", minimum=1)
    local_steps: int = option(5, "Steps of SGD per client and round.", minimum=1)
    batch_size: int = option(32, "Images per step.", minimum=1)
    lr: float = option(0.1, "Learning rate of the clients' SGD.", above=0)
    noise_std: float = option(1e-2, "Fixed noise, standard deviation per parameter.", above=0)
    relative_noise: float = option(1e-3, "Noise per parameter, relative to the gradient's norm.", above=0)
    target_leakage: float = option(0.5, "Leakage for which the noise is asked.", above=0)


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """One image's exposure at the global parameters of one round."""

    round: int
    accuracy: float
    """Of the global model on the test set."""
    image: int
    loss: float
    """Of this image."""
    gradient_norm: float
    leakage: float
    """At the fixed noise."""
    relative_leakage: float
    """At the noise relative to the gradient."""
    required_noise_std: float

    @property
    def required_relative_noise(self) -> float:
        """Required noise over the gradient's norm."""
        return self.required_noise_std / self.gradient_norm


def _portions(settings: TrainingSettings) -> Iterator[Portion[TrainingRow]]:
    scene = Scene.of(settings)
    data = load_dataset(settings.dataset, root=settings.data_root)
    if len(data.train) < settings.num_clients * settings.batch_size:
        raise InvalidInputError(
            f"expected clients and batches for at most {len(data.train)} training images, got "
            f"{settings.num_clients} clients with batches of {settings.batch_size}"
        )
    trajectory: dict[int, dict[str, Tensor]] = {}  # found when it is first needed

    def params_after(number: int) -> dict[str, Tensor]:
        if not trajectory:
            trajectory.update(_trained(settings, scene, data.train))
        return trajectory[number]

    for number in settings.rounds:
        keys = [(number, image) for image in range(settings.num_images)]
        yield Portion(keys, partial(_rows, settings, scene, data.test, number, params_after))


def _rows(
    settings: TrainingSettings,
    scene: Scene,
    test: ImageSet,
    number: int,
    params_after: Callable[[int], dict[str, Tensor]],
) -> Iterator[TrainingRow]:
    params, tau = params_after(number), scene.prior.std
    at_round = dataclasses.replace(scene, params=params)
    group = list(range(settings.num_images))
    norm = at_round.gradients(group).norm(dim=1)
    spectrum = estimate_spectrum(at_round.jacobian(group), max_steps=256)
    leakage = spectrum.leakage(settings.noise_std, tau).value
    relative = spectrum.leakage(settings.relative_noise * norm, tau).value
    required = spectrum.required_noise_std(settings.target_leakage, tau)
    images, labels = scene.select(test, slice(0, 2000))
    with torch.no_grad():
        outputs = functional_call(scene.update.model.eval(), params, (images.double(),))
        losses = nn.functional.cross_entropy(outputs, labels, reduction="none")
    accuracy = float((outputs.argmax(1) == labels).double().mean())
    for image in range(settings.num_images):
        yield TrainingRow(
            round=number,
            accuracy=accuracy,
            image=image,
            loss=float(losses[image]),
            gradient_norm=float(norm[image]),
            leakage=float(leakage[image]),
            relative_leakage=float(relative[image]),
            required_noise_std=float(required[image]),
        )


def _trained(settings: TrainingSettings, scene: Scene, train: ImageSet) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yields the rounds to audit and the global parameters after them, by federated averaging."""
    generator = torch.Generator().manual_seed(settings.seed)
    parts = torch.randperm(len(train), generator=generator).tensor_split(settings.num_clients)
    params = {name: p.float() for name, p in scene.params.items()}
    for number in range(max(settings.rounds) + 1):
        if number in settings.rounds:
            yield number, {name: p.double() for name, p in params.items()}
        clients = [_local_steps(settings, scene, params, train, part, generator) for part in parts]
        params = {name: torch.stack([client[name] for client in clients]).mean(0) for name in params}


def _local_steps(
    settings: TrainingSettings,
    scene: Scene,
    params: dict[str, Tensor],
    train: ImageSet,
    part: Tensor,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    local = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = torch.optim.SGD(local.values(), lr=settings.lr)
    for _ in range(settings.local_steps):
        chosen = part[torch.randint(len(part), (settings.batch_size,), generator=generator)]
        images, labels = scene.select(train, chosen)
        optimizer.zero_grad()
        outputs = functional_call(scene.update.model.train(), local, (images,))
        torch.autograd.backward(nn.functional.cross_entropy(outputs, labels))
        optimizer.step()
    return {name: p.detach() for name, p in local.items()}


def _summarize(settings: TrainingSettings, rows: Sequence[TrainingRow]) -> Summary:
    lines = []
    for number in settings.rounds:
        members = [row for row in rows if row.round == number]
        lines.append(
            (
                str(number),
                f"{members[0].accuracy:.3f}",
                *(
                    _spread([getattr(row, name) for row in members])
                    for name in (
                        "gradient_norm",
                        "leakage",
                        "required_noise_std",
                        "relative_leakage",
                        "required_relative_noise",
                    )
                ),
            )
        )
    first = [row for row in rows if row.round == min(settings.rounds)]
    last = [row for row in rows if row.round == max(settings.rounds)]
    return Summary(
        f"From round {min(settings.rounds)} to round {max(settings.rounds)} accuracy goes from {first[0].accuracy:.2f} "
        f"to {last[0].accuracy:.2f}, the median gradient norm by a factor of "
        f"{_change(first, last, 'gradient_norm')}, the noise for leakage {settings.target_leakage:g} by "
        f"{_change(first, last, 'required_noise_std')}, and that noise relative to the gradient by "
        f"{_change(first, last, 'required_relative_noise')}; between images it spreads by a factor of "
        f"{_range(first):.3g} at first and {_range(last):.3g} at last. Cells: median [least, most] over images.",
        (
            "round",
            "accuracy",
            "‖g‖",
            f"leakage at σ = {settings.noise_std:g}",
            f"σ for {settings.target_leakage:g}",
            f"leakage at σ = {settings.relative_noise:g}·‖g‖",
            f"σ/‖g‖ for {settings.target_leakage:g}",
        ),
        tuple(lines),
    )


def _change(first: Sequence[TrainingRow], last: Sequence[TrainingRow], name: str) -> str:
    before, after = (statistics.median(getattr(row, name) for row in rows) for rows in (first, last))
    return f"{after / before:.3g}"


def _range(rows: Sequence[TrainingRow]) -> float:
    required = [row.required_noise_std for row in rows]
    return max(required) / min(required)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} [{min(values):.2g}, {max(values):.2g}]"


def _draw(settings: TrainingSettings, rows: Sequence[TrainingRow], figure: Figure) -> None:
    left, middle, right = figure.subplots(1, 3)
    quantities = (
        (left, "leakage", f"leakage at σ = {settings.noise_std:g}"),
        (middle, "relative_leakage", f"leakage at σ = {settings.relative_noise:g}·‖g‖"),
        (right, "required_noise_std", f"σ for leakage {settings.target_leakage:g}"),
    )
    places = range(len(settings.rounds))
    for axis, name, title in quantities:
        for image in range(settings.num_images):
            values = {row.round: getattr(row, name) for row in rows if row.image == image}
            line = [values[number] for number in settings.rounds]
            axis.plot(places, line, color="C0", alpha=0.4, linewidth=0.8, marker=".")
        medians = [statistics.median(getattr(r, name) for r in rows if r.round == number) for number in settings.rounds]
        axis.plot(places, medians, color="black", linewidth=1.5)
        axis.set(title=title, xlabel="round")
        axis.set_xticks(places, [str(number) for number in settings.rounds])
    left.set_ylim(0, 1)
    middle.set_ylim(0, 1)
    right.set_yscale("log")


STUDY = Study(
    name="training",
    settings=TrainingSettings,
    row=TrainingRow,
    key=("round", "image"),
    portions=_portions,
    summarize=_summarize,
    draw=_draw,
    figure_size=(11.0, 3.8),
)
