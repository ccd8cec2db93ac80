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
from torch import Tensor

from fl_privacy.attacks import (
    ATTACKS,
    LBFGS,
    Adam,
    Attack,
    AttackProblem,
    GaussNewton,
    Reconstruction,
    WithPrior,
    WithWhitePrior,
    deep_leakage,
    inverting_gradients,
    psnr,
    ssim,
)
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.bias import own_bias
from fl_privacy.influence.i2f import influence_lower_bound
from fl_privacy.influence.spectrum import Spectrum, estimate_spectrum
from fl_privacy.reference import load_dataset
from fl_privacy.studies.results import Portion, Progress, fill
from fl_privacy.studies.scene import PUBLIC_IMAGES, Scene, SceneSettings, groups
from fl_privacy.studies.settings import option

Prior = Literal["white", "images"]
_RTOL = 2e-3
"""As estimate_spectrum: of a leakage near one the rest, which is the error, is to be known, too."""
INFORMED = "gauss-newton-images"
"""Gauss–Newton by one who knows how pixels vary together, whatever the prediction knows of that."""
KNOWN = (*ATTACKS, INFORMED)
"""Names of attacks."""
RAN = "ran"
"""The status of a row whose attack could be run; any other says why it could not."""


@dataclass(frozen=True, kw_only=True)
class ValidationSettings(SceneSettings):
    """What is validated: gradients of single images, shared with Gaussian noise.

    The default `max_steps` has the exact spectrum of inputs of up to 1,024 elements. Small noise needs it: where all
    but 1e-5 of an input leaks, a leakage to 1 % says little about the error. Predictions are made in float64 always:
    with the covariance of images float32 does not know them where noise is small.
    """

    num_images: int = option(50, "Images, the first of the test set.", minimum=1)
    noise_stds: tuple[float, ...] = option(
        (1e-4, 5.6e-4, 3.2e-3, 1.8e-2, 1e-1), "Noise levels, standard deviation per parameter.", above=0
    )
    prior: Prior = option(
        "white", "What prediction and attacks know of images: nothing but mean and spread, or their covariance, too."
    )
    public_images: int = option(PUBLIC_IMAGES, "Images of the training set that the prior is made from.", minimum=2)
    attacks: tuple[str, ...] = option(("gauss-newton",), f"Attacks, among {', '.join(KNOWN)}.")
    attack_steps: int = option(0, "Steps of the first-order attacks; 0: as many as is usual for each.", minimum=0)
    num_probes: int = option(4, "As estimate_spectrum.", minimum=1)
    max_steps: int = option(256, "As estimate_spectrum.", minimum=1)
    hops: int = option(4, "Most restarts of gauss-newton where it has not converged.", minimum=0)
    precision: Literal["float64", "float32"] = option(
        "float64", "Of the attacks; float32 is faster, and enough for noise above 1e-3 of the update's size."
    )
    images_at_once: int = option(
        10,
        "Images that are attacked side by side, of which some attacks' last digits and restarts depend; a finished "
        "group is what a resumed study skips.",
        minimum=1,
    )

    def __post_init__(self) -> None:
        """Raises InvalidInputError where a setting is out of range, or an attack unknown."""
        super().__post_init__()
        unknown = [name for name in self.attacks if name not in KNOWN]
        if unknown:
            raise InvalidInputError(f"expected attacks among {', '.join(KNOWN)}, got {', '.join(unknown)}")


@dataclass(frozen=True, kw_only=True)
class ValidationRow:
    """One attack on one noisy gradient, beside what was predicted for it.

    Errors are root mean squares per input element, in units of the input.
    """

    image: int
    label: int
    noise_std: float
    prior: str
    """What prediction and attack know of images: `white` or `images`."""
    leakage_lower: float
    leakage: float
    leakage_upper: float
    predicted_lower: float
    predicted: float
    predicted_upper: float
    predicted_own: float
    """For this very image, where `predicted` is for the mean over all that the prior holds possible."""
    lower_bound: float
    """‖Jᵀδ‖/λ_max/√D of the very noise (paper, Eq. 5), by J as audits take it."""
    attack: str
    status: str
    """`ran`, or why the attack cannot be run on such gradients: then the rest is NaN."""
    error: float
    psnr: float
    """Of what was rebuilt, in dB, for inputs in [0, 1]."""
    ssim: float
    """Structural similarity of what was rebuilt, at most 1."""
    converged: bool
    explained: bool
    """Whether what was rebuilt explains the gradient up to its noise; if not, the attack failed."""
    products: int
    seconds: float

    @property
    def ratio(self) -> float:
        """Error over prediction."""
        return self.error / self.predicted


def attacks_of(settings: ValidationSettings) -> dict[str, Attack]:
    """Returns the attacks that settings name, with their options."""
    steps = settings.attack_steps
    made: dict[str, Attack] = {
        "gauss-newton": GaussNewton(hops=settings.hops),
        "gauss-newton-white": WithWhitePrior(GaussNewton(hops=settings.hops)),
        INFORMED: GaussNewton(hops=settings.hops),  # `run_validation` gives it a prior with the covariance of images
    }
    if steps:
        made |= {
            "dgl": deep_leakage(optimizer=LBFGS(steps=steps)),
            "dgl-adam": deep_leakage(optimizer=Adam(steps=steps)),
            "inverting-gradients": inverting_gradients(steps=steps),
        }
    return {name: made[name] if name in made else ATTACKS[name]() for name in settings.attacks}


def run_validation(
    settings: ValidationSettings,
    attacks: Mapping[str, Attack],
    path: Path,
    *,
    progress: Progress | None = None,
) -> list[ValidationRow]:
    """Returns the rows of a study, of which each is appended to a CSV file as it is done; those there are kept.

    Args:
        settings: What to validate. A file of other settings must not be continued: that is not checked here.
        attacks: Attacks by name; `attacks_of` makes those of the settings.
        path: The CSV file. Rows of other attacks, images or noise levels stay in it and are not returned.
        progress: Told (rows done, rows to do).

    Raises:
        InvalidInputError: The file holds something else, or the data set has too few images.
    """
    portions = list(_portions(settings, attacks))
    asked = {key for portion in portions for key in portion.keys}
    rows = fill(path, ValidationRow, portions, key=("image", "noise_std", "attack"), progress=progress)
    return [row for row in rows if (row.image, row.noise_std, row.attack) in asked]


def _portions(settings: ValidationSettings, attacks: Mapping[str, Attack]) -> Iterator[Portion[ValidationRow]]:
    data = load_dataset(settings.dataset, root=settings.data_root)
    scene_of = partial(Scene.of, settings, num_public=settings.public_images, data=data)
    scene = scene_of(coloured=settings.prior == "images")
    if INFORMED in attacks:
        prior = scene_of(coloured=True).to(getattr(torch, settings.precision)).prior
        attacks = {**attacks, INFORMED: WithPrior(attacks[INFORMED], prior)}
    for group in groups(settings.num_images, settings.images_at_once):
        keys = [(i, std, name) for i in group for std in settings.noise_stds for name in attacks]
        yield Portion(keys, partial(_rows, scene, group, settings, attacks))


def _rows(
    scene: Scene, group: Sequence[int], settings: ValidationSettings, attacks: Mapping[str, Attack]
) -> Iterator[ValidationRow]:
    jacobian, prior = scene.jacobian(group), scene.prior
    finest = (min(settings.noise_stds) / prior.std) ** 2
    spectrum = estimate_spectrum(
        jacobian,
        num_probes=settings.num_probes,
        rtol=_RTOL,
        max_steps=settings.max_steps,
        ridge=finest,
        seed=settings.seed,
        prior=prior,
    )
    biases = own_bias(jacobian, prior, settings.noise_stds, max_steps=settings.max_steps)
    clean = scene.gradients(group)
    attacked = scene.to(getattr(torch, settings.precision))
    for level, noise_std in enumerate(settings.noise_stds):
        noise = noise_std * scene.noise(group, level)
        bound = influence_lower_bound(jacobian, noise) / math.sqrt(jacobian.input_dim)
        problem = attacked.problem(group, (clean + noise).to(attacked.prior.mean.dtype), noise_std)
        own = _own_error(spectrum, noise_std, prior.std, biases[level])
        for name, attack in attacks.items():
            started = time.perf_counter()
            rebuilt, status = _attacked(attack, problem)
            seconds = (time.perf_counter() - started) / len(group)
            for unit, image in enumerate(group):
                yield ValidationRow(
                    image=image,
                    label=int(scene.labels[image, 0]),
                    noise_std=noise_std,
                    prior=settings.prior,
                    **_prediction(spectrum, noise_std, prior.std, unit),
                    predicted_own=float(own[unit]),
                    lower_bound=float(bound[unit]),
                    attack=name,
                    status=status,
                    **_reached(rebuilt, scene.images[[image]], unit),
                    converged=rebuilt is not None and bool(rebuilt.converged[unit]),
                    explained=rebuilt is not None and bool(rebuilt.explained[unit]),
                    products=0 if rebuilt is None else int(rebuilt.products[unit]),
                    seconds=seconds,
                )


def _attacked(attack: Attack, problem: AttackProblem) -> tuple[Reconstruction | None, str]:
    """What an attack rebuilds, and `RAN`; or nothing, and why it cannot be run."""
    try:
        return attack.run(problem), RAN
    except InvalidInputError as error:
        return None, " ".join(str(error).split())


def _reached(rebuilt: Reconstruction | None, truth: Tensor, unit: int) -> dict[str, float]:
    if rebuilt is None:
        return {"error": math.nan, "psnr": math.nan, "ssim": math.nan}
    found = rebuilt.inputs[unit, None]
    error = (found - truth).square().mean().sqrt()
    return {
        "error": float(error),
        "psnr": float(psnr(found, truth, data_range=1.0)),
        "ssim": float(ssim(found, truth, data_range=1.0)),
    }


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


def _own_error(spectrum: Spectrum, noise_std: float, prior_std: float, bias: Tensor) -> Tensor:
    """The error for each very image: what noise does, which does not depend on it, and its own pull to the prior."""
    mean_square = spectrum.rmse(noise_std, prior_std).value ** 2
    noise = (mean_square - spectrum.bias(noise_std, prior_std).value).clamp(min=0)
    return (noise + bias).sqrt()
