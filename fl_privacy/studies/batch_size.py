"""Leakage against batch size N and local steps E: of one example whose batch is known, and of the whole batch.

In a gradient's mean over N examples each one's Jacobian shrinks by N, and so does the noise that it needs. Local steps
let the update depend on an example several times. Updates are taken over the learning rate, −(θ_E − θ_0)/lr, so that
one step is the gradient, and noise compares across E.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch

from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.rounding import rounded_off
from fl_privacy.influence.spectrum import estimate_spectrum
from fl_privacy.influence.training import LocalTrainingUpdate
from fl_privacy.studies.results import Portion
from fl_privacy.studies.scene import Scene, SceneSettings
from fl_privacy.studies.settings import option
from fl_privacy.studies.study import Study, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Unit = Literal["example", "batch"]


@dataclass(frozen=True, kw_only=True)
class BatchSizeSettings(SceneSettings):
    """Batches, local steps and what of them is private."""

    num_images: int = option(5, "Batches per size; image i leads batch i and is its private example.", minimum=1)
    batch_sizes: tuple[int, ...] = option((1, 2, 4, 8, 16, 32), "N.", minimum=1)
    local_steps: tuple[int, ...] = option((1, 2, 4, 8), "E, steps of SGD on the whole batch.", minimum=1)
    units: tuple[Unit, ...] = option(
        ("example", "batch"), "What is private: one example of a known batch, or all of it."
    )
    lr: float = option(0.1, "Learning rate of the local steps.", above=0)
    noise_std: float = option(1e-3, "Noise per parameter on the update over the learning rate.", above=0)
    relative_noise: float = option(1e-3, "Noise per parameter, relative to the update's norm.", above=0)
    target_leakage: float = option(0.5, "Leakage for which the noise is asked.", above=0)
    max_steps: int = option(64, "Lanczos steps per probe, where the spectrum is sampled.", minimum=1)


@dataclass(frozen=True, kw_only=True)
class BatchSizeRow:
    """The exposure of one unit; noise is that on the update over the learning rate."""

    unit: str
    batch_size: int
    local_steps: int
    image: int
    """The batch's first."""
    update_norm: float
    leakage_lower: float
    leakage: float
    leakage_upper: float
    relative_leakage: float
    required_noise_std: float

    @property
    def required_relative_noise(self) -> float:
        """Required noise over the update's norm."""
        return self.required_noise_std / self.update_norm


def _portions(settings: BatchSizeSettings) -> Iterator[Portion[BatchSizeRow]]:
    largest = max(settings.batch_sizes)
    # Batch i is image i and what follows the last image: batches share their other members, not their private one.
    scene = Scene.of(settings, num_images=settings.num_images + largest - 1)
    for unit in settings.units:
        for size in settings.batch_sizes:
            for steps in settings.local_steps:
                keys = [(unit, size, steps, image) for image in range(settings.num_images)]
                yield Portion(keys, partial(_rows, settings, scene, unit, size, steps))


def _rows(
    settings: BatchSizeSettings, scene: Scene, unit: Unit, batch_size: int, local_steps: int
) -> Iterator[BatchSizeRow]:
    leaders = torch.arange(settings.num_images)[:, None]
    others = settings.num_images + torch.arange(batch_size - 1)
    members = torch.cat([leaders, others.expand(settings.num_images, -1)], dim=1)
    update = LocalTrainingUpdate(scene.update.model, scene.update.loss, lr=settings.lr, steps=local_steps)
    inputs, labels = scene.images[members, 0], scene.labels[members, 0]
    jacobian = UpdateJacobian(
        rounded_off(update, settings.relu_width),
        scene.params,
        inputs,
        labels,
        private=scene.labels.new_zeros(settings.num_images) if unit == "example" else None,
    )
    tau, lr = scene.prior.std, settings.lr
    norm = UpdateJacobian(update, scene.params, inputs, labels).update().norm(dim=1)
    ridge = (lr * settings.noise_std / tau) ** 2
    spectrum = estimate_spectrum(jacobian, max_steps=settings.max_steps, ridge=ridge, seed=settings.seed)
    leakage = spectrum.leakage(lr * settings.noise_std, tau)
    relative = spectrum.leakage(settings.relative_noise * norm, tau).value
    required = spectrum.required_noise_std(settings.target_leakage, tau) / lr
    for image in range(settings.num_images):
        yield BatchSizeRow(
            unit=unit,
            batch_size=batch_size,
            local_steps=local_steps,
            image=image,
            update_norm=float(norm[image]) / lr,
            leakage_lower=float(leakage.lower[image]),
            leakage=float(leakage.value[image]),
            leakage_upper=float(leakage.upper[image]),
            relative_leakage=float(relative[image]),
            required_noise_std=float(required[image]),
        )


def exponent(rows: Sequence[BatchSizeRow]) -> float:
    """Returns the power of N that the noise an image needs follows, by least squares over log N, the median image."""
    slopes: list[float] = []
    for image in {row.image for row in rows}:
        points = [(math.log(r.batch_size), math.log(r.required_noise_std)) for r in rows if r.image == image]
        x, y = zip(*points, strict=True)
        slopes.append(float(statistics.linear_regression(x, y).slope) if len(set(x)) > 1 else math.nan)
    return statistics.median(slopes)


def _summarize(settings: BatchSizeSettings, rows: Sequence[BatchSizeRow]) -> Summary:
    lines, findings = [], []
    for unit in settings.units:
        for steps in settings.local_steps:
            chosen = [row for row in rows if row.unit == unit and row.local_steps == steps]
            required = [_median(chosen, size, "required_noise_std") for size in settings.batch_sizes]
            lines.append((unit, str(steps), *(f"{value:.3g}" for value in required), f"{exponent(chosen):.2f}"))
        first, last = min(settings.local_steps), max(settings.local_steps)
        size = max(settings.batch_sizes)
        before, after = (
            _median([row for row in rows if row.unit == unit and row.local_steps == steps], size, "required_noise_std")
            for steps in (first, last)
        )
        findings.append(
            f"{unit}: from E = {first} to {last}, the noise at N = {size} changes by a factor of {after / before:.3g}"
        )
    return Summary(
        f"Noise on the update over lr that brings leakage to {settings.target_leakage:g}, median over "
        f"{settings.num_images} batches, by batch size N; last the power of N that it follows. {'; '.join(findings)}.",
        ("private", "local steps", *(f"N = {size}" for size in settings.batch_sizes), "power of N"),
        tuple(lines),
    )


def _median(rows: Sequence[BatchSizeRow], size: int, name: str) -> float:
    return float(statistics.median(getattr(row, name) for row in rows if row.batch_size == size))


def _draw(settings: BatchSizeSettings, rows: Sequence[BatchSizeRow], figure: Figure) -> None:
    panels = figure.subplots(len(settings.units), 3, squeeze=False)
    quantities = (
        ("required_noise_std", f"σ for leakage {settings.target_leakage:g}"),
        ("leakage", f"leakage at σ = {settings.noise_std:g}"),
        ("relative_leakage", f"leakage at σ = {settings.relative_noise:g}·‖u‖"),
    )
    for unit, axes in zip(settings.units, panels, strict=True):
        for axis, (name, title) in zip(axes, quantities, strict=True):
            for steps in settings.local_steps:
                chosen = [row for row in rows if row.unit == unit and row.local_steps == steps]
                values = [_median(chosen, size, name) for size in settings.batch_sizes]
                axis.plot(settings.batch_sizes, values, marker="o", markersize=4, label=f"E = {steps}")
            axis.set(xscale="log", xlabel="batch size N", title=f"{unit}: {title}")
            axis.set_xticks(settings.batch_sizes, [str(size) for size in settings.batch_sizes])
            axis.minorticks_off()
            if name == "required_noise_std":
                axis.set_yscale("log")
            else:
                axis.set_ylim(0, 1.02)
    panels[0][0].legend(frameon=False, fontsize=8)


STUDY = Study(
    name="batch-size",
    settings=BatchSizeSettings,
    row=BatchSizeRow,
    key=("unit", "batch_size", "local_steps", "image"),
    portions=_portions,
    summarize=_summarize,
    draw=_draw,
    figure_size=(11.0, 6.6),
)
