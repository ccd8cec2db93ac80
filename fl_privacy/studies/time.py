"""What a prediction costs beside the attack that it spares: seconds, and multiples of one gradient.

Everything is timed one image at a time and in turn, so that a busy machine slows all alike: compare ratios, not
seconds. First-order attacks run for a few steps, and their time is extrapolated to all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fl_privacy.attacks import LBFGS, Adam, Attack, AttackProblem, GaussNewton, deep_leakage, inverting_gradients
from fl_privacy.influence.i2f import influence, influence_lower_bound
from fl_privacy.influence.spectrum import estimate_spectrum
from fl_privacy.studies.results import Portion
from fl_privacy.studies.scene import Scene, SceneSettings
from fl_privacy.studies.settings import device_option, option
from fl_privacy.studies.study import Study, Summary, spread_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GRADIENT_REPEATS = 20
PREDICTIONS = ("lower bound", "I²F, ε = σ²/τ²", "spectrum, as audited", "spectrum, exact")
ATTACKS = ("Gauss-Newton", "DGL, L-BFGS", "DGL, Adam", "Inverting Gradients")


@dataclass(frozen=True, kw_only=True)
class TimeSettings(SceneSettings):
    """Predictions and attacks, one image at a time."""

    num_images: int = option(3, "Images, the first of the test set.", minimum=1)
    noise_std: float = option(1e-2, "Standard deviation of the noise per parameter.", above=0)
    lbfgs_steps: int = option(300, "Steps of a whole L-BFGS attack.", minimum=1)
    adam_steps: int = option(24000, "Steps of a whole Adam attack; the paper's number.", minimum=1)
    inverting_steps: int = option(2000, "Steps of each of two starts of a whole Inverting Gradients attack.", minimum=1)
    timed_steps: int = option(100, "Steps of each of these three that are really run and timed.", minimum=1)
    device: str = device_option(recorded=True)


@dataclass(frozen=True, kw_only=True)
class TimeRow:
    """One method on one image."""

    image: int
    method: str
    attack: bool
    timed_seconds: float
    factor: float
    """Whole steps over timed ones; 1 where nothing is extrapolated."""
    gradient_seconds: float
    """Median of one plain gradient, timed just before."""

    @property
    def seconds(self) -> float:
        """Of the whole method."""
        return self.timed_seconds * self.factor

    @property
    def gradients(self) -> float:
        """How many plain gradients take as long."""
        return self.seconds / self.gradient_seconds


def _portions(settings: TimeSettings) -> Iterator[Portion[TimeRow]]:
    scene = Scene.of(settings)
    for image in range(settings.num_images):
        yield Portion([(image, name) for name in (*PREDICTIONS, *ATTACKS)], partial(_rows, settings, scene, image))


def _rows(settings: TimeSettings, scene: Scene, image: int) -> list[TimeRow]:
    """Returns all of an image's rows at once: those of a stopped run are not set beside another's."""
    noise = settings.noise_std * scene.noise([image], 0)
    problem = scene.problem([image], scene.gradients([image]) + noise, settings.noise_std)
    seconds = partial(_seconds, scene.device)
    seconds(lambda: scene.jacobian([image]).gram(problem.start()))  # what a first use sets up is not timed
    rows = []
    work = {**_predictions(settings, scene, image, noise), **_attacks(settings, problem)}
    for method, (run, factor) in work.items():
        gradient = statistics.median(seconds(partial(_gradient, scene, image)) for _ in range(_GRADIENT_REPEATS))
        rows.append(
            TimeRow(
                image=image,
                method=method,
                attack=method in ATTACKS,
                timed_seconds=seconds(run),
                factor=factor,
                gradient_seconds=gradient,
            )
        )
    return rows


def _predictions(
    settings: TimeSettings, scene: Scene, image: int, noise: Tensor
) -> Mapping[str, tuple[Callable[[], object], float]]:
    ridge = (settings.noise_std / scene.prior.std) ** 2
    dim = scene.images[0].numel()
    runs: tuple[Callable[[], object], ...] = (
        lambda: influence_lower_bound(scene.jacobian([image]), noise),
        lambda: influence(scene.jacobian([image]), noise, ridge=ridge),
        lambda: estimate_spectrum(scene.jacobian([image]), ridge=ridge),  # with an audit's probes and steps
        lambda: estimate_spectrum(scene.jacobian([image]), num_probes=1, max_steps=dim),
    )
    return {name: (run, 1.0) for name, run in zip(PREDICTIONS, runs, strict=True)}


def _attacks(settings: TimeSettings, problem: AttackProblem) -> Mapping[str, tuple[Callable[[], object], float]]:
    timed = settings.timed_steps
    attacks: tuple[tuple[Attack, float], ...] = (
        (GaussNewton(), 1.0),
        (deep_leakage(optimizer=LBFGS(steps=timed)), settings.lbfgs_steps / timed),
        (deep_leakage(optimizer=Adam(steps=timed)), settings.adam_steps / timed),
        (inverting_gradients(steps=timed), settings.inverting_steps / timed),
    )
    return {
        name: (partial(attack.run, problem), max(1.0, factor))
        for name, (attack, factor) in zip(ATTACKS, attacks, strict=True)
    }


def _gradient(scene: Scene, image: int) -> None:
    params = {name: p.clone().requires_grad_() for name, p in scene.params.items()}
    outputs = functional_call(scene.update.model.eval(), params, (scene.images[image],))
    torch.autograd.backward(nn.functional.cross_entropy(outputs, scene.labels[image]))


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":  # which computes while the program goes on
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _summarize(settings: TimeSettings, rows: Sequence[TimeRow]) -> Summary:
    lines = []
    for method in (*PREDICTIONS, *ATTACKS):
        members = [row for row in rows if row.method == method]
        factor = members[0].factor
        lines.append(
            (
                method,
                f"{statistics.median(row.seconds for row in members):.3g}",
                f"{statistics.median(row.gradients for row in members):.3g}",
                _spread(_costs(rows, method, PREDICTIONS[1])),
                "measured" if factor == 1 else f"extrapolated by {factor:g} from {settings.timed_steps} steps",
            )
        )
    cheapest = min(ATTACKS, key=lambda name: statistics.median(_costs(rows, name, PREDICTIONS[1])))

    def beside(method: str) -> str:
        bound, influence = (_spread(_costs(rows, method, other)) for other in PREDICTIONS[:2])
        return f"{influence} times as long as I²F and {bound} times as long as the lower bound"

    return Summary(
        f"Medians over {settings.num_images} images, one at a time, ratios image by image with the least and the most. "
        f"The cheapest attack, {cheapest}, takes {beside(cheapest)}; {ATTACKS[2]} with {settings.adam_steps} steps "
        f"{beside(ATTACKS[2])}.",
        ("method", "seconds", "plain gradients", "times I²F", "how known"),
        tuple(lines),
    )


def _costs(rows: Sequence[TimeRow], method: str, other: str) -> list[float]:
    """Of every image, the time of a method over that of another."""
    reference = {row.image: row.seconds for row in rows if row.method == other}
    return [row.seconds / reference[row.image] for row in rows if row.method == method]


def _spread(values: Sequence[float]) -> str:
    """As `spread_text`; one number where all are alike."""
    least, most = f"{min(values):.3g}", f"{max(values):.3g}"
    return least if least == most else spread_text(values)


def _draw(settings: TimeSettings, rows: Sequence[TimeRow], figure: Figure) -> None:
    axis = figure.subplots()
    methods = [*PREDICTIONS, *ATTACKS]
    medians = [statistics.median(row.gradients for row in rows if row.method == method) for method in methods]
    extrapolated = [any(row.factor != 1 for row in rows if row.method == method) for method in methods]
    bars = axis.barh(range(len(methods)), medians, color=["C0" if name in PREDICTIONS else "C3" for name in methods])
    for bar, guessed in zip(bars, extrapolated, strict=True):
        bar.set_alpha(0.5 if guessed else 1.0)
    axis.set_yticks(range(len(methods)), methods)
    axis.invert_yaxis()
    axis.set(xscale="log", xlim=(1, None), xlabel="time in plain gradients (pale: extrapolated)")


STUDY = Study(
    name="time",
    settings=TimeSettings,
    row=TimeRow,
    key=("image", "method"),
    portions=_portions,
    summarize=_summarize,
    draw=_draw,
    figure_size=(7.0, 3.8),
)
