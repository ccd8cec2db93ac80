"""Which ridge ε predicts an attack's error: the paper's 0.1, 1 and 10, or σ²/τ².

The paper adds εI to G for the sake of the solver. For the best linear-Gaussian attacker ε is no choice: it is the
noise's variance over the prior's. His error is then the shift of I²F and, across it, the pull to the prior,

    D·rmse² = ‖(G + ε)⁻¹Jᵀδ‖² + ε²τ² tr((G + ε)⁻²).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from fl_privacy.attacks import GaussNewton
from fl_privacy.influence.i2f import influence
from fl_privacy.influence.spectrum import estimate_spectrum
from fl_privacy.studies.results import Portion
from fl_privacy.studies.scene import Scene, SceneSettings, groups
from fl_privacy.studies.settings import option
from fl_privacy.studies.study import Study, Summary, spread_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CALIBRATED, WITH_BIAS = "σ²/τ²", "σ²/τ², with bias"
_IMAGES_AT_ONCE = 10


@dataclass(frozen=True, kw_only=True)
class RidgeSettings(SceneSettings):
    """Ridges against the ridge that noise and prior dictate."""

    noise_stds: tuple[float, ...] = option(
        (1e-3, 1e-2, 3.16e-2), "Noise levels, standard deviation per parameter.", above=0
    )
    ridges: tuple[float, ...] = option((0.1, 1.0, 10.0), "Fixed ridges to compare.", above=0)


@dataclass(frozen=True, kw_only=True)
class RidgeRow:
    """One prediction of one attack's error; errors are rmse per input element."""

    image: int
    label: int
    noise_std: float
    prediction: str
    """The ridge: its value, or what it is calibrated by."""
    ridge: float
    predicted: float
    residual: float
    """Relative residual of the solve for the shift."""
    error: float
    explained: bool
    """Whether the attack explains the gradient up to its noise; if not, it failed."""

    @property
    def ratio(self) -> float:
        """Predicted over true error."""
        return self.predicted / self.error


def _portions(settings: RidgeSettings) -> Iterator[Portion[RidgeRow]]:
    scene = Scene.of(settings)
    names = [*(f"{ridge:g}" for ridge in settings.ridges), CALIBRATED, WITH_BIAS]
    for group in groups(settings.num_images, _IMAGES_AT_ONCE):
        for level, noise_std in enumerate(settings.noise_stds):
            keys = [(image, noise_std, name) for image in group for name in names]
            yield Portion(keys, partial(_rows, settings, scene, group, level))


def _rows(settings: RidgeSettings, scene: Scene, group: list[int], level: int) -> Iterator[RidgeRow]:
    noise_std, tau = settings.noise_stds[level], scene.prior.std
    jacobian = scene.jacobian(group)
    noise = noise_std * scene.noise(group, level)
    attack = GaussNewton().run(scene.problem(group, scene.gradients(group) + noise, noise_std))
    errors = scene.errors(group, attack.inputs)
    calibrated = (noise_std / tau) ** 2
    dim = jacobian.input_dim
    spectrum = estimate_spectrum(jacobian, max_steps=256, ridge=calibrated)
    for name, ridge in [*((f"{ridge:g}", ridge) for ridge in settings.ridges), (CALIBRATED, calibrated)]:
        shift = influence(jacobian, noise, ridge=ridge, max_steps=2 * dim)
        predictions = {name: shift.norm / math.sqrt(dim)}
        if name == CALIBRATED:
            bias = spectrum.bias(noise_std, tau).value
            predictions[WITH_BIAS] = (predictions[name].square() + bias).sqrt()
        for prediction, predicted in predictions.items():
            for unit, image in enumerate(group):
                yield RidgeRow(
                    image=image,
                    label=int(scene.labels[image, 0]),
                    noise_std=noise_std,
                    prediction=prediction,
                    ridge=ridge,
                    predicted=float(predicted[unit]),
                    residual=float(shift.residual[unit]),
                    error=float(errors[unit]),
                    explained=bool(attack.explained[unit]),
                )


def _summarize(settings: RidgeSettings, rows: Sequence[RidgeRow]) -> Summary:
    lines, deviations = [], {}
    for prediction in dict.fromkeys(row.prediction for row in rows):
        of_ridge = [row for row in rows if row.prediction == prediction]
        deviations[prediction] = statistics.median(abs(math.log10(row.ratio)) for row in of_ridge)
        cells = [spread_text([row.ratio for row in of_ridge if row.noise_std == std]) for std in settings.noise_stds]
        lines.append((prediction, *cells))
    best = min(deviations, key=lambda name: deviations[name])
    factors = ", ".join(f"{name}: {10**value:.3g}" for name, value in deviations.items())
    failed = len({(row.image, row.noise_std) for row in rows if not row.explained})
    return Summary(
        "Predicted over true error, median [least, most], by noise level. Median factor between the two: "
        f"{factors}. Nearest: {best}. "
        f"Attacks that failed: {failed} of {len({(row.image, row.noise_std) for row in rows})}.",
        ("ridge", *(f"σ = {std:g}" for std in settings.noise_stds)),
        tuple(lines),
    )


def _draw(settings: RidgeSettings, rows: Sequence[RidgeRow], figure: Figure) -> None:
    axes = figure.subplots(1, len(settings.noise_stds), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(row.prediction for row in rows))
    for axis, noise_std in zip(axes, settings.noise_stds, strict=True):
        for place, name in enumerate(names):
            ratios = [row.ratio for row in rows if row.noise_std == noise_std and row.prediction == name]
            spread = torch.linspace(-0.15, 0.15, len(ratios)).tolist()
            axis.scatter([place + dx for dx in spread], ratios, s=14)
        axis.axhline(1, color="black", linewidth=1)
        axis.set(yscale="log", title=f"σ = {noise_std:g}")
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes[0].set_ylabel("predicted over true error")


STUDY = Study(
    name="ridge",
    settings=RidgeSettings,
    row=RidgeRow,
    key=("image", "noise_std", "prediction"),
    portions=_portions,
    summarize=_summarize,
    draw=_draw,
    figure_size=(8.4, 4.4),
)
