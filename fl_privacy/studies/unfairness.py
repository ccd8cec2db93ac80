"""How unevenly one noise level protects: per example and per class.

The same noise on every gradient leaves some images nearly untouched and hides others. The spread is in G, so that it is
known without an attack; the attack on every image is there to check it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from fl_privacy.attacks import GaussNewton
from fl_privacy.influence.spectrum import estimate_spectrum
from fl_privacy.studies.results import Portion
from fl_privacy.studies.scene import Scene, SceneSettings, groups
from fl_privacy.studies.settings import option
from fl_privacy.studies.study import Study, Summary, rank_correlation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_IMAGES_AT_ONCE = 20
_NAMED = 5
"""Examples that the summary names."""


@dataclass(frozen=True, kw_only=True)
class UnfairnessSettings(SceneSettings):
    """Many images under one noise."""

    num_images: int = option(200, "Images, the first of the test set.", minimum=2)
    noise_std: float = option(3.16e-2, "Standard deviation of the noise per parameter.", above=0)
    target_leakage: float = option(0.5, "Leakage for which each image's noise is asked.", above=0)
    attack: bool = option(True, "Whether every image is attacked, too.")


@dataclass(frozen=True, kw_only=True)
class UnfairnessRow:
    """What the noise leaves of one image; errors are rmse per input element."""

    image: int
    label: int
    gradient_norm: float
    leakage: float
    predicted: float
    required_noise_std: float
    error: float
    """Of the attack; NaN without one."""
    explained: bool


def _portions(settings: UnfairnessSettings) -> Iterator[Portion[UnfairnessRow]]:
    scene = Scene.of(settings)
    for group in groups(settings.num_images, _IMAGES_AT_ONCE):
        yield Portion([(image,) for image in group], partial(_rows, settings, scene, group))


def _rows(settings: UnfairnessSettings, scene: Scene, group: list[int]) -> Iterator[UnfairnessRow]:
    noise_std, tau = settings.noise_std, scene.prior.std
    jacobian = scene.jacobian(group)
    clean = scene.gradients(group)
    spectrum = estimate_spectrum(jacobian, max_steps=256, ridge=(noise_std / tau) ** 2)
    leakage, predicted = spectrum.leakage(noise_std, tau).value, spectrum.rmse(noise_std, tau).value
    required = spectrum.required_noise_std(settings.target_leakage, tau)
    errors = torch.full_like(predicted, torch.nan)
    explained = torch.zeros_like(errors, dtype=torch.bool)
    if settings.attack:
        attack = GaussNewton().run(scene.problem(group, clean + noise_std * scene.noise(group, 0), noise_std))
        errors, explained = scene.errors(group, attack.inputs), attack.explained
    for unit, image in enumerate(group):
        yield UnfairnessRow(
            image=image,
            label=int(scene.labels[image, 0]),
            gradient_norm=float(clean[unit].norm()),
            leakage=float(leakage[unit]),
            predicted=float(predicted[unit]),
            required_noise_std=float(required[unit]),
            error=float(errors[unit]),
            explained=bool(explained[unit]),
        )


def _summarize(settings: UnfairnessSettings, rows: Sequence[UnfairnessRow]) -> Summary:
    classes = _by_class(rows)
    worst = sorted(rows, key=lambda row: -row.required_noise_std)[:_NAMED]
    named = ", ".join(f"image {row.image} (class {row.label}, {row.required_noise_std:.3g})" for row in worst)
    leakages, required = [row.leakage for row in rows], [row.required_noise_std for row in rows]
    sentence = (
        f"At σ = {settings.noise_std:g}, leakage is {statistics.fmean(leakages):.2f} in the mean, from "
        f"{min(leakages):.2f} to {max(leakages):.2f}; the noise that brings it to {settings.target_leakage:g} differs "
        f"by a factor of {max(required) / min(required):.3g} between images. Most exposed, with the noise that each "
        f"needs: {named}. Most exposed class: {next(iter(classes))}."
    )
    if settings.attack:
        errors = [row.error for row in rows]
        rank = rank_correlation([row.predicted for row in rows], errors)
        sentence += (
            f" Attack: squared error {statistics.fmean(e**2 for e in errors):.3g} in the mean, from "
            f"{min(errors) ** 2:.3g} to {max(errors) ** 2:.3g}; Spearman with the prediction {rank:.2f}; "
            f"failed: {sum(not row.explained for row in rows)} of {len(rows)}."
        )
    lines = tuple(
        (
            str(label),
            str(len(members)),
            _spread([row.leakage for row in members]),
            _spread([row.required_noise_std for row in members]),
            _spread([row.predicted for row in members]),
            f"{statistics.fmean(row.error for row in members):.3g}",
        )
        for label, members in classes.items()
    )
    headings = ("class", "images", "leakage", "required σ", "predicted error", "attack's error, mean")
    return Summary(f"{sentence} Cells: mean [least, most].", headings, lines)


def _by_class(rows: Sequence[UnfairnessRow]) -> dict[int, list[UnfairnessRow]]:
    """Returns the rows of each class, the most exposed class in the mean first."""
    classes: dict[int, list[UnfairnessRow]] = {}
    for row in rows:
        classes.setdefault(row.label, []).append(row)
    return dict(sorted(classes.items(), key=lambda item: -statistics.fmean(row.leakage for row in item[1])))


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def _draw(settings: UnfairnessSettings, rows: Sequence[UnfairnessRow], figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    classes = _by_class(rows)
    left.boxplot([[row.leakage for row in members] for members in classes.values()], whis=(0, 100))
    left.set_xticks(range(1, len(classes) + 1), [str(label) for label in classes])
    left.set(xlabel="class, most exposed first", ylabel=f"leakage at σ = {settings.noise_std:g}")
    across, up = ("predicted", "error") if settings.attack else ("gradient_norm", "leakage")
    for label in sorted(classes):
        mine = classes[label]
        x, y = ([getattr(row, name) for row in mine] for name in (across, up))
        right.scatter(x, y, s=28, marker=f"${label}$", color=f"C{label % 10}", linewidths=0.3)
    if settings.attack:
        values = [value for row in rows for value in (row.predicted, row.error)]
        ends = [min(values), max(values)]
        right.plot(ends, ends, color="black", linewidth=1)
        right.set(xlabel="predicted error, rmse (each image its class)", ylabel="error of the attack, rmse")
    else:
        right.set(xlabel="gradient norm (each image its class)", ylabel="leakage", xscale="log")


STUDY = Study(
    name="unfairness",
    settings=UnfairnessSettings,
    row=UnfairnessRow,
    key=("image",),
    portions=_portions,
    summarize=_summarize,
    draw=_draw,
    figure_size=(9.0, 4.2),
)
