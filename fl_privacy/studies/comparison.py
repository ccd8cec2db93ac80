"""Initialisations of anybody's model, compared by what its gradients leak."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fl_privacy.attacks import GaussianPrior
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.rounding import rounded_off
from fl_privacy.influence.spectrum import estimate_spectrum
from fl_privacy.influence.update import GradientUpdate
from fl_privacy.reference import DATASETS, load_dataset
from fl_privacy.reference.initialization import INITIALIZATIONS, initialize_
from fl_privacy.studies.results import Progress
from fl_privacy.studies.settings import Settings, option, relu_width_option

Range = tuple[float, float, float]
"""Least, median, most."""


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings(Settings):
    """What is compared, and how precisely."""

    noise_std: float = option(1e-3, "Noise on the gradient, standard deviation per parameter.", above=0)
    target_leakage: float = option(0.5, "Leakage for which the noise is asked.", above=0)
    num_examples: int = option(10, "Examples to audit, the first ones.", minimum=1)
    num_draws: int = option(3, "Draws of each initialization.", minimum=1)
    seed: int = option(0, "Of the first draw.", minimum=0)
    max_steps: int = option(128, "Lanczos steps per probe, where the spectrum is sampled.", minimum=1)
    relu_width: float = relu_width_option()


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs `[n, *shape]`, float64, with labels `[n]`, and what an attacker believes of such inputs."""

    inputs: Tensor
    labels: Tensor
    prior: GaussianPrior


@dataclass(frozen=True, kw_only=True)
class InitializationExposure:
    """What one initialisation gives away, over examples and draws.

    Attributes:
        initialization: Its name.
        gradient_norm: ‖g‖.
        leakage: At the noise asked for.
        required: The noise for the target, standard deviation per parameter.
        relative: That noise over ‖g‖.
    """

    initialization: str
    gradient_norm: Range
    leakage: Range
    required: Range
    relative: Range


def load_examples(data: str, *, root: Path, public: bool = False) -> Examples:
    """Returns test images of a reference data set, or public ones, or arrays `inputs` and `labels` of an .npz file.

    The prior is that of the data set's training images, or of the file's own inputs.

    Raises:
        InvalidInputError: The name is unknown, or the file does not hold what is expected.
    """
    if data in DATASETS:
        images = load_dataset(data, root=root)
        trained, classes = images.train.select(slice(0, 2000))
        inputs, labels = (trained, classes) if public else images.test.select(slice(0, 2000))
        return Examples(inputs.double(), labels, GaussianPrior.from_examples(trained.double()))
    if not data.endswith(".npz"):
        raise InvalidInputError(f"expected one of {', '.join(sorted(DATASETS))} or an .npz file, got {data!r}")
    with np.load(data, allow_pickle=False) as arrays:
        if not {"inputs", "labels"} <= set(arrays):
            raise InvalidInputError(f"expected arrays inputs and labels in {data}, got {', '.join(arrays) or 'none'}")
        x, y = arrays["inputs"], arrays["labels"]
    if not np.issubdtype(x.dtype, np.floating) or not np.issubdtype(y.dtype, np.integer) or y.shape != x.shape[:1]:
        raise InvalidInputError(
            f"expected floating-point inputs [n, ...] and integer labels [n] in {data}, got {x.dtype} {list(x.shape)} "
            f"and {y.dtype} {list(y.shape)}: scale pixels to [0, 1]"
        )
    inputs = torch.from_numpy(x).double()
    return Examples(inputs, torch.from_numpy(y).long(), GaussianPrior.from_examples(inputs))


def compare(
    build: Callable[[], nn.Module],
    examples: Examples,
    settings: ComparisonSettings,
    *,
    progress: Progress | None = None,
) -> list[InitializationExposure]:
    """Returns what each initialisation gives away, the most exposed one first: that which needs the most noise.

    Args:
        build: Returns a new model.
        examples: To audit.
        settings: How.
        progress: Told (draws done, draws to do).

    Raises:
        InvalidInputError: There are too few examples, or the model cannot take them.
        NotTwiceDifferentiableError: From the model.
    """
    if settings.num_examples > len(examples.inputs):
        raise InvalidInputError(f"expected at most {len(examples.inputs)} examples, got {settings.num_examples}")
    found, total = [], settings.num_draws * len(INITIALIZATIONS)
    for place, name in enumerate(INITIALIZATIONS):
        draws = []
        for draw in range(settings.num_draws):
            torch.manual_seed(settings.seed + draw)
            draws.append(_exposed(initialize_(build(), name), examples, settings))
            if progress is not None:
                progress(place * settings.num_draws + draw + 1, total)
        norm, leakage, required = torch.cat(draws, dim=1)
        found.append(
            InitializationExposure(
                initialization=name,
                gradient_norm=_range(norm),
                leakage=_range(leakage),
                required=_range(required),
                relative=_range(required / norm),
            )
        )
    return sorted(found, key=lambda exposure: -exposure.required[1])


def _exposed(model: nn.Module, examples: Examples, settings: ComparisonSettings) -> Tensor:
    """Gradient norm, leakage and required noise of the examples, `[3, n]`."""
    params = {name: p.detach().double() for name, p in model.named_parameters()}
    inputs, labels = examples.inputs[: settings.num_examples, None], examples.labels[: settings.num_examples, None]
    update, tau = GradientUpdate(model.double(), nn.CrossEntropyLoss()), examples.prior.std
    jacobian = UpdateJacobian(rounded_off(update, settings.relu_width), params, inputs, labels)
    spectrum = estimate_spectrum(jacobian, max_steps=settings.max_steps, seed=settings.seed)
    leakage = spectrum.leakage(settings.noise_std, tau).value
    required = spectrum.required_noise_std(settings.target_leakage, tau)
    norm = UpdateJacobian(update, params, inputs, labels).update().norm(dim=1)
    return torch.stack([norm, leakage, required])


def _range(values: Tensor) -> Range:
    numbers = values.tolist()
    return min(numbers), statistics.median(numbers), max(numbers)
