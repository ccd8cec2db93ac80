"""How much a gradient leaks under different initialisations, at absolute noise and at noise relative to the gradient.

The paper holds the noise fixed and finds uniform weights most at risk, Kaiming and Xavier safest. Small weights make
small gradients, in which the same noise drowns more: at a noise that is a fixed share of the gradient, initialisations
compare otherwise. Both are shown, and the attack's error beside them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fl_privacy.attacks import GaussNewton
from fl_privacy.influence.spectrum import estimate_spectrum
from fl_privacy.reference.initialization import Initialization
from fl_privacy.studies.results import Portion
from fl_privacy.studies.scene import ImageSettings, Scene, SceneSettings
from fl_privacy.studies.settings import option
from fl_privacy.studies.study import Study, Summary, grouped, spread_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class InitializationSettings(ImageSettings):
    """Initialisations of one model, each drawn several times."""

    initializations: tuple[Initialization, ...] = option(
        ("uniform", "normal", "default", "xavier", "kaiming"), "Initialisations to compare."
    )
    num_draws: int = option(3, "Draws of each initialisation.", minimum=1)
    noise_std: float = option(1e-3, "Fixed noise, standard deviation per parameter; attacked, too.", above=0)
    relative_noise: float = option(1e-3, "Noise per parameter, relative to the gradient's norm.", above=0)
    target_leakage: float = option(0.5, "Leakage for which the noise is asked.", above=0)


@dataclass(frozen=True, kw_only=True)
class InitializationRow:
    """One image's exposure at one draw of an initialisation; errors are rmse per input element."""

    initialization: str
    draw: int
    image: int
    gradient_norm: float
    largest: float
    """λ_max(G)."""
    leakage: float
    """At the fixed noise."""
    predicted: float
    error: float
    """Of the attack at the fixed noise."""
    explained: bool
    relative_leakage: float
    """At the noise relative to the gradient."""
    required_noise_std: float

    @property
    def required_relative_noise(self) -> float:
        """Required noise over the gradient's norm."""
        return self.required_noise_std / self.gradient_norm


def _portions(settings: InitializationSettings) -> Iterator[Portion[InitializationRow]]:
    images = range(settings.num_images)
    for name in settings.initializations:
        for draw in range(settings.num_draws):
            yield Portion([(name, draw, image) for image in images], partial(_rows, settings, name, draw))


def _rows(settings: InitializationSettings, name: Initialization, draw: int) -> Iterator[InitializationRow]:
    scene = Scene.of(
        SceneSettings(
            dataset=settings.dataset,
            data_root=settings.data_root,
            model=settings.model,
            initialization=name,
            num_images=settings.num_images,
            seed=settings.seed + draw,
            relu_width=settings.relu_width,
            device=settings.device,
        )
    )
    group, noise_std, tau = list(range(settings.num_images)), settings.noise_std, scene.prior.std
    jacobian = scene.jacobian(group)
    clean = scene.gradients(group)
    norm = clean.norm(dim=1)
    spectrum = estimate_spectrum(jacobian, max_steps=256)
    leakage, predicted = spectrum.leakage(noise_std, tau).value, spectrum.rmse(noise_std, tau).value
    relative = spectrum.leakage(settings.relative_noise * norm, tau).value
    required = spectrum.required_noise_std(settings.target_leakage, tau)
    attack = GaussNewton().run(scene.problem(group, clean + noise_std * scene.noise(group, 0), noise_std))
    errors = scene.errors(group, attack.inputs)
    for unit, image in enumerate(group):
        yield InitializationRow(
            initialization=name,
            draw=draw,
            image=image,
            gradient_norm=float(norm[unit]),
            largest=float(spectrum.largest[unit]),
            leakage=float(leakage[unit]),
            predicted=float(predicted[unit]),
            error=float(errors[unit]),
            explained=bool(attack.explained[unit]),
            relative_leakage=float(relative[unit]),
            required_noise_std=float(required[unit]),
        )


def _summarize(settings: InitializationSettings, rows: Sequence[InitializationRow]) -> Summary:
    by_name = grouped(rows, lambda row: row.initialization)
    predicted = sorted(by_name, key=lambda name: statistics.median(row.predicted for row in by_name[name]))
    reached = sorted(by_name, key=lambda name: statistics.median(row.error for row in by_name[name]))
    relative = sorted(by_name, key=lambda name: -statistics.median(row.relative_leakage for row in by_name[name]))
    agreement = "the attack agrees" if predicted == reached else f"by the attack's error: {', '.join(reached)}"
    failed = sum(not row.explained for row in rows)
    lines = tuple(
        (
            name,
            spread_text([row.gradient_norm for row in members]),
            spread_text([row.leakage for row in members]),
            spread_text([row.predicted for row in members]),
            spread_text([row.error for row in members]),
            spread_text([row.required_noise_std for row in members]),
            spread_text([row.relative_leakage for row in members]),
            spread_text([row.required_relative_noise for row in members]),
        )
        for name, members in by_name.items()
    )
    return Summary(
        f"Most exposed first at σ = {settings.noise_std:g}: {', '.join(predicted)}; {agreement}. At noise of "
        f"{settings.relative_noise:g}·‖g‖ per parameter: {', '.join(relative)}. Attacks that failed: {failed} of "
        f"{len(rows)}. Cells: median [least, most] over {settings.num_images} images and {settings.num_draws} draws.",
        (
            "initialisation",
            "‖g‖",
            f"leakage at σ = {settings.noise_std:g}",
            "predicted error",
            "attack's error",
            f"σ for {settings.target_leakage:g}",
            f"leakage at σ = {settings.relative_noise:g}·‖g‖",
            f"σ/‖g‖ for {settings.target_leakage:g}",
        ),
        lines,
    )


def _draw(settings: InitializationSettings, rows: Sequence[InitializationRow], figure: Figure) -> None:
    left, middle, right = figure.subplots(1, 3)
    by_name = grouped(rows, lambda row: row.initialization)
    names = list(by_name)
    for place, (name, members) in enumerate(by_name.items()):
        left.scatter([row.predicted for row in members], [row.error for row in members], s=14, label=name)
        middle.scatter([place] * len(members), [row.required_noise_std for row in members], s=14)
        right.scatter([place] * len(members), [row.required_relative_noise for row in members], s=14)
    values = [value for row in rows for value in (row.predicted, row.error)]
    ends = [min(values) / 1.2, max(values) * 1.2]
    left.plot(ends, ends, color="black", linewidth=1)
    left.set(xscale="log", yscale="log", xlabel="predicted error, rmse", ylabel="error of the attack, rmse")
    left.set_title(f"σ = {settings.noise_std:g}")
    left.legend(frameon=False, fontsize=8)
    target = f"{settings.target_leakage:g}"
    for axis, title in ((middle, f"σ for leakage {target}"), (right, f"σ/‖g‖ for leakage {target}")):
        axis.set(yscale="log", title=title)
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right")


STUDY = Study(
    name="initialization",
    settings=InitializationSettings,
    row=InitializationRow,
    key=("initialization", "draw", "image"),
    portions=_portions,
    summarize=_summarize,
    draw=_draw,
    figure_size=(11.0, 4.0),
)
