"""The validation study: for many images and noise levels, the predicted error beside what attacks reach."""

from __future__ import annotations

import csv
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fl_privacy.attacks import Attack, AttackProblem, GaussianPrior, IsotropicNoise
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.i2f import influence_lower_bound
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.spectrum import Spectrum, estimate_spectrum
from fl_privacy.influence.update import GradientUpdate
from fl_privacy.reference import build_model, init_uniform_, load_dataset

Initialization = Literal["uniform", "default"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """What is validated: gradients of single images, shared with Gaussian noise.

    Attributes:
        dataset: Name of a reference data set.
        data_root: Where its files are.
        model: Name of a reference model.
        initialization: `uniform`: every parameter U(−0.5, 0.5), as the paper's experiments. `default`: the model's own.
        noise_stds: Noise levels, standard deviation per parameter.
        num_images: Images, the first of the test set.
        num_probes: As `estimate_spectrum`.
        max_steps: As `estimate_spectrum`; the default has the exact spectrum of inputs of up to 1,024 elements. Small
            noise needs it: where all but 1e-5 of an input leaks, a leakage to 1 % says little about the error.
        images_at_once: Images that are attacked side by side; a finished group is what a resumed study skips.
        seed: Of initialisation and noise.
    """

    dataset: str = "digits"
    data_root: str = "data"
    model: str = "lenet"
    initialization: Initialization = "uniform"
    noise_stds: tuple[float, ...] = (1e-4, 5.6e-4, 3.2e-3, 1.8e-2, 1e-1)
    num_images: int = 50
    num_probes: int = 4
    max_steps: int = 256
    images_at_once: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InvalidInputError where a setting is out of range."""
        if self.initialization not in get_args(Initialization):
            raise InvalidInputError(
                f"expected initialization to be one of {', '.join(get_args(Initialization))}, "
                f"got {self.initialization!r}"
            )
        if not self.noise_stds or not all(math.isfinite(std) and std > 0 for std in self.noise_stds):
            raise InvalidInputError(f"expected noise levels > 0, got {self.noise_stds}")
        for name in ("num_images", "num_probes", "max_steps", "images_at_once"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"expected {name} >= 1, got {getattr(self, name)}")


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

    @classmethod
    def from_text(cls, record: Mapping[str, str]) -> ValidationRow:
        """Returns the row that a line of the study's CSV holds."""
        kinds: dict[str, Callable[[str], Any]] = {
            "int": int,
            "float": float,
            "str": str,
            "bool": lambda text: text == "True",
        }
        return cls(**{field.name: kinds[str(field.type)](record[field.name]) for field in fields(cls)})


def run_validation(
    settings: ValidationSettings,
    attacks: Mapping[str, Attack],
    path: Path,
    *,
    progress: Progress | None = None,
) -> list[ValidationRow]:
    """Returns all rows of a study, of which each is appended to a CSV file as it is done; those there are kept.

    Args:
        settings: What to validate. A file of other settings must not be continued: that is not checked.
        attacks: Attacks by name.
        path: The CSV file.
        progress: Told (rows done, rows to do).

    Raises:
        InvalidInputError: The file holds something else, or the data set has too few images.
    """
    rows = read_rows(path)
    done = {(row.image, row.noise_std, row.attack) for row in rows}
    total = settings.num_images * len(settings.noise_stds) * len(attacks)
    scene = _Scene.of(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".part")
    with whole.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(ValidationRow)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
        file.flush()
        whole.replace(path)  # the same file goes on under its own name, without a half-written line
        for group in _groups(settings):
            wanted = [(i, std, name) for i in group for std in settings.noise_stds for name in attacks]
            if all(key in done for key in wanted):
                continue
            for row in scene.rows(group, settings, attacks):
                if (row.image, row.noise_std, row.attack) not in done:
                    rows.append(row)
                    writer.writerow(dataclasses.asdict(row))
                    file.flush()
                if progress is not None:
                    progress(len(rows), total)
    return rows


def read_rows(path: Path) -> list[ValidationRow]:
    """Returns the rows of a study's CSV file; none if there is no file.

    Raises:
        InvalidInputError: The file is no such CSV.
    """
    if not path.exists() or path.stat().st_size == 0:
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        expected = [field.name for field in fields(ValidationRow)]
        if reader.fieldnames != expected:
            raise InvalidInputError(f"expected {path} to hold the columns of a validation study: {', '.join(expected)}")
        records = list(reader)
    rows = []
    for index, record in enumerate(records):
        try:
            rows.append(ValidationRow.from_text(record))
        except (TypeError, ValueError) as error:
            if index + 1 < len(records):
                raise InvalidInputError(f"expected numbers in line {index + 2} of {path}: {error}") from error
            break  # a line that a killed run left half written is done again
    return rows


def _groups(settings: ValidationSettings) -> Iterator[list[int]]:
    for start in range(0, settings.num_images, settings.images_at_once):
        yield list(range(start, min(start + settings.images_at_once, settings.num_images)))


@dataclass(frozen=True, eq=False)
class _Scene:
    """The model, the images and what an attacker believes of them; float64, in which small noise does not drown."""

    update: GradientUpdate
    params: dict[str, Tensor]
    images: Tensor
    labels: Tensor
    prior: GaussianPrior

    @classmethod
    def of(cls, settings: ValidationSettings) -> _Scene:
        data = load_dataset(settings.dataset, root=settings.data_root)
        if len(data.test) < settings.num_images:
            raise InvalidInputError(f"expected at most {len(data.test)} images, got {settings.num_images}")
        torch.manual_seed(settings.seed)
        model = build_model(settings.model, input_shape=data.input_shape, num_classes=data.num_classes)
        if settings.initialization == "uniform":
            init_uniform_(model)
        images, labels = data.test.select(slice(0, settings.num_images))
        public, _ = data.train.select(slice(0, 2000))
        params = {name: p.detach().double() for name, p in model.named_parameters()}
        prior = GaussianPrior.from_examples(public.double())
        return cls(
            GradientUpdate(model, nn.CrossEntropyLoss()), params, images.double()[:, None], labels[:, None], prior
        )

    def rows(
        self, group: Sequence[int], settings: ValidationSettings, attacks: Mapping[str, Attack]
    ) -> Iterator[ValidationRow]:
        inputs, labels = self.images[group], self.labels[group]
        jacobian = UpdateJacobian(self.update, self.params, inputs, labels)
        finest = (min(settings.noise_stds) / self.prior.std) ** 2
        spectrum = estimate_spectrum(
            jacobian, num_probes=settings.num_probes, max_steps=settings.max_steps, ridge=finest, seed=settings.seed
        )
        clean = jacobian.update()
        for level, noise_std in enumerate(settings.noise_stds):
            noise = torch.stack([noise_std * _noise(settings.seed, image, level, clean.shape[1]) for image in group])
            bound = influence_lower_bound(jacobian, noise) / math.sqrt(jacobian.input_dim)
            problem = AttackProblem(
                update=self.update,
                params=self.params,
                shared=clean + noise,
                prior=self.prior,
                noise=IsotropicNoise(torch.full((len(group),), noise_std, dtype=torch.float64)),
                labels=labels,
            )
            for name, attack in attacks.items():
                started = time.perf_counter()
                rebuilt = attack.run(problem)
                seconds = (time.perf_counter() - started) / len(group)
                errors = (rebuilt.inputs - inputs).flatten(1).square().mean(1).sqrt()
                for unit, image in enumerate(group):
                    yield ValidationRow(
                        image=image,
                        label=int(labels[unit, 0]),
                        noise_std=noise_std,
                        **_prediction(spectrum, noise_std, self.prior.std, unit),
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


def _noise(seed: int, image: int, level: int, dim: int) -> Tensor:
    """Standard normal noise that depends on nothing but its place in the study: `[P]`."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + 1_009 * image + level)
    return torch.randn(dim, generator=generator, dtype=torch.float64)
