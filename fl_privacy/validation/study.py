"""The validation study: for many images and noise levels, the predicted error beside what attacks reach."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from fl_privacy.attacks import Attack
from fl_privacy.influence.i2f import influence_lower_bound
from fl_privacy.influence.spectrum import Spectrum, estimate_spectrum
from fl_privacy.studies.results import Portion, Progress, fill
from fl_privacy.studies.scene import Scene, SceneSettings, groups
from fl_privacy.studies.settings import option


@dataclass(frozen=True, kw_only=True)
class ValidationSettings(SceneSettings):
    """What is validated: gradients of single images, shared with Gaussian noise.

    The default `max_steps` has the exact spectrum of inputs of up to 1,024 elements. Small noise needs it: where all
    but 1e-5 of an input leaks, a leakage to 1 % says little about the error.
    """

    num_images: int = option(50, "Images, the first of the test set.", minimum=1)
    noise_stds: tuple[float, ...] = option(
        (1e-4, 5.6e-4, 3.2e-3, 1.8e-2, 1e-1), "Noise levels, standard deviation per parameter.", above=0
    )
    num_probes: int = option(4, "As estimate_spectrum.", minimum=1)
    max_steps: int = option(256, "As estimate_spectrum.", minimum=1)
    hops: int = option(4, "Most restarts of gauss-newton where it has not converged.", minimum=0)
    precision: Literal["float64", "float32"] = option(
        "float64", "Of all that is computed; float32 is faster, and enough for noise above 1e-3 of the update's size."
    )
    images_at_once: int = option(
        10,
        "Images that are attacked side by side; a finished group is what a resumed study skips.",
        minimum=1,
        recorded=False,
    )


@dataclass(frozen=True, kw_only=True)
class ValidationRow:
    """One attack on one noisy gradient, beside what was predicted for it.

    Errors are root mean squares per input element, in units of the input.
    """

    image: int
    label: int
    noise_std: float
    leakage_lower: float
    leakage: float
    leakage_upper: float
    predicted_lower: float
    predicted: float
    predicted_upper: float
    lower_bound: float
    """‖Jᵀδ‖/λ_max/√D of the very noise (paper, Eq. 5)."""
    attack: str
    error: float
    converged: bool
    explained: bool
    """Whether what was rebuilt explains the gradient up to its noise; if not, the attack failed."""
    products: int
    seconds: float

    @property
    def ratio(self) -> float:
        """Error over prediction."""
        return self.error / self.predicted


def run_validation(
    settings: ValidationSettings,
    attacks: Mapping[str, Attack],
    path: Path,
    *,
    progress: Progress | None = None,
) -> list[ValidationRow]:
    """Returns all rows of a study, of which each is appended to a CSV file as it is done; those there are kept.

    Args:
        settings: What to validate. A file of other settings must not be continued: that is not checked here.
        attacks: Attacks by name.
        path: The CSV file.
        progress: Told (rows done, rows to do).

    Raises:
        InvalidInputError: The file holds something else, or the data set has too few images.
    """
    portions = _portions(settings, attacks)
    return fill(path, ValidationRow, portions, key=("image", "noise_std", "attack"), progress=progress)


def _portions(settings: ValidationSettings, attacks: Mapping[str, Attack]) -> Iterator[Portion[ValidationRow]]:
    scene = Scene.of(settings).to(getattr(torch, settings.precision))
    for group in groups(settings.num_images, settings.images_at_once):
        keys = [(i, std, name) for i in group for std in settings.noise_stds for name in attacks]
        yield Portion(keys, partial(_rows, scene, group, settings, attacks))


def _rows(
    scene: Scene, group: Sequence[int], settings: ValidationSettings, attacks: Mapping[str, Attack]
) -> Iterator[ValidationRow]:
    jacobian = scene.jacobian(group)
    finest = (min(settings.noise_stds) / scene.prior.std) ** 2
    spectrum = estimate_spectrum(
        jacobian, num_probes=settings.num_probes, max_steps=settings.max_steps, ridge=finest, seed=settings.seed
    )
    clean = jacobian.update()
    for level, noise_std in enumerate(settings.noise_stds):
        noise = (noise_std * scene.noise(group, level)).to(clean)
        bound = influence_lower_bound(jacobian, noise) / math.sqrt(jacobian.input_dim)
        problem = scene.problem(group, clean + noise, noise_std)
        for name, attack in attacks.items():
            started = time.perf_counter()
            rebuilt = attack.run(problem)
            seconds = (time.perf_counter() - started) / len(group)
            errors = scene.errors(group, rebuilt.inputs)
            for unit, image in enumerate(group):
                yield ValidationRow(
                    image=image,
                    label=int(scene.labels[image, 0]),
                    noise_std=noise_std,
                    **_prediction(spectrum, noise_std, scene.prior.std, unit),
                    lower_bound=float(bound[unit]),
                    attack=name,
                    error=float(errors[unit]),
                    converged=bool(rebuilt.converged[unit]),
                    explained=bool(rebuilt.explained[unit]),
                    products=int(rebuilt.products[unit]),
                    seconds=seconds,
                )


def _prediction(spectrum: Spectrum, noise_std: float, prior_std: float, unit: int) -> dict[str, float]:
    leakage, rmse = spectrum.leakage(noise_std, prior_std), spectrum.rmse(noise_std, prior_std)
    return {
        "leakage_lower": float(leakage.lower[unit]),
        "leakage": float(leakage.value[unit]),
        "leakage_upper": float(leakage.upper[unit]),
        "predicted_lower": float(rmse.lower[unit]),
        "predicted": float(rmse.value[unit]),
        "predicted_upper": float(rmse.upper[unit]),
    }
