"""How much more an update changes over a shift of its input than its Jacobian says, across architectures.

I²F and everything made from it take the update for linear over the distance by which an attacker errs. Smooth networks
are nearly so. The gradient of a ReLU network jumps wherever a unit switches, and its Jacobian, taken between two jumps,
does not see them. Each network with ReLUs is set beside itself with GELUs in their place (the same weights, smooth) and
beside the Jacobian of itself with its ReLUs rounded off, which is what an audit takes.

A shift is white, or like the error of the best linear-Gaussian attacker who errs as much: that lies where J is small,
and there what J does not say weighs most.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fl_privacy.audit.settings import RELU_WIDTH
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.linearity import change_ratio, likely_error
from fl_privacy.influence.rounding import has_relus, rounded_off, with_relus_replaced
from fl_privacy.influence.spectrum import estimate_spectrum
from fl_privacy.studies.architectures import Architecture, initialization_of
from fl_privacy.studies.results import Portion
from fl_privacy.studies.scene import Scene, SceneSettings
from fl_privacy.studies.settings import Settings, device_option, option
from fl_privacy.studies.study import Study, Summary, grouped, spread_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMOOTH, _AUDITED = " with GELU", ", J rounded off"


@dataclass(frozen=True, kw_only=True)
class LinearitySettings(Settings):
    """Architectures side by side on the same images; lenet has weights U(-0.5, 0.5), the others their own."""

    dataset: str = option("digits", "digits, mnist, fashion-mnist, cifar10 or folder.")
    data_root: str = option("data", "Where the data set's files are.", recorded=False)
    models: tuple[Architecture, ...] = option(
        ("digitsnet", "mlp", "lenet", "vit", "resnet8", "resnet18"), "Models to compare."
    )
    num_images: int = option(5, "Images, the first of the test set.", minimum=1)
    shifts: tuple[float, ...] = option(
        (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3), "Random shifts, root mean square per input element.", above=0
    )
    direction: Literal["white", "likely"] = option(
        "white", "Of shifts: white, or likely, as an attacker errs; of those only what is less than the inputs' spread."
    )
    width: float = option(RELU_WIDTH, "Width of rounded ReLUs, relative to what they see; default: as audits.", above=0)
    seed: int = option(0, "Of initialization and shifts.", minimum=0)
    device: str = device_option()


@dataclass(frozen=True, kw_only=True)
class LinearityRow:
    """One image shifted at random by one distance."""

    model: str
    image: int
    shift: float
    """Root mean square per input element."""
    prior_std: float
    ratio: float
    """‖u(x + a) − u(x)‖/‖J·a‖."""


def _portions(settings: LinearitySettings) -> Iterator[Portion[LinearityRow]]:
    for model in settings.models:
        scene = Scene.of(
            SceneSettings(
                dataset=settings.dataset,
                data_root=settings.data_root,
                model=model,
                initialization=initialization_of(model),
                num_images=settings.num_images,
                seed=settings.seed,
                device=settings.device,
            )
        )
        variants: dict[str, tuple[Scene, Scene]] = {model: (scene, scene)}
        if has_relus(scene.update):
            gelu = replace(scene, update=with_relus_replaced(scene.update, nn.GELU))
            variants[model + _SMOOTH] = (gelu, gelu)
            variants[model + _AUDITED] = (scene, replace(scene, update=rounded_off(scene.update, settings.width)))
        for name, (changing, linear) in variants.items():
            keys = [(name, image, shift) for image in range(settings.num_images) for shift in settings.shifts]
            yield Portion(keys, partial(_rows, settings, name, changing, linear))


def _rows(settings: LinearitySettings, name: str, scene: Scene, linear: Scene) -> Iterator[LinearityRow]:
    for image in range(settings.num_images):
        jacobian, taken = scene.own_jacobian([image]), linear.own_jacobian([image])
        for shift, direction in zip(settings.shifts, _directions(settings, scene, taken, image), strict=True):
            ratio = float(change_ratio(jacobian, shift * direction, linear=taken))
            yield LinearityRow(model=name, image=image, shift=shift, prior_std=scene.prior.std, ratio=ratio)


def _directions(settings: LinearitySettings, scene: Scene, taken: UpdateJacobian, image: int) -> Iterator[Tensor]:
    """A direction `[1, D]` with an rms of about 1 for each shift."""
    seed, tau = 1_000_003 * settings.seed + image, scene.prior.std
    if settings.direction == "white":
        generator = torch.Generator().manual_seed(seed)
        white = torch.randn(1, taken.input_dim, generator=generator, dtype=torch.float64).to(taken.device)
        yield from (white for _ in settings.shifts)
        return
    if max(settings.shifts) >= tau:
        raise InvalidInputError(f"expected shifts below {tau:.3g}, the inputs' spread, got {settings.shifts}")
    spectrum = estimate_spectrum(taken)
    for shift in settings.shifts:
        ridge = (spectrum.required_noise_std(1 - (shift / tau) ** 2, tau) / tau) ** 2  # at which an attacker errs so
        yield likely_error(taken, ridge=torch.maximum(ridge, 10 * spectrum.resolution), seed=seed)


def _summarize(settings: LinearitySettings, rows: Sequence[LinearityRow]) -> Summary:
    by_model = grouped(rows, lambda row: row.model)
    lines = tuple(
        (name, *(spread_text([row.ratio for row in members if row.shift == shift], ".2f") for shift in settings.shifts))
        for name, members in by_model.items()
    )
    audited = [row.ratio for row in rows if row.model.endswith(_AUDITED)]
    kinked = [row.ratio for row in rows if row.model + _AUDITED in by_model]
    smooth = [r.ratio for r in rows if r.model + _AUDITED not in by_model and not r.model.endswith(_AUDITED)]
    sentences = []
    if smooth:
        sentences.append(f"Smooth networks: {min(smooth):.2f} to {max(smooth):.2f} times what the Jacobian says.")
    if kinked:
        sentences.append(
            f"Networks with ReLUs: {min(kinked):.2g} to {max(kinked):.2g} times, and {min(audited):.2f} to "
            f"{max(audited):.2f} times what the Jacobian says with the ReLUs rounded off."
        )
    return Summary(
        f"{' '.join(sentences)} Cells: median [least, most] over {settings.num_images} images, one shift each, "
        f"{'white' if settings.direction == 'white' else 'as an attacker errs'}.",
        ("model", *(f"{shift:g}" for shift in settings.shifts)),
        lines,
    )


def _draw(settings: LinearitySettings, rows: Sequence[LinearityRow], figure: Figure) -> None:
    axis = figure.subplots()
    by_model = grouped(rows, lambda row: row.model)
    base = {name: name.removesuffix(_SMOOTH).removesuffix(_AUDITED) for name in by_model}
    colours = {name: f"C{place}" for place, name in enumerate(dict.fromkeys(base.values()))}
    for name, members in by_model.items():
        middle = [statistics.median(row.ratio for row in members if row.shift == s) for s in settings.shifts]
        style = "--" if name.endswith(_SMOOTH) else ":" if name.endswith(_AUDITED) else "-"
        axis.plot(settings.shifts, middle, style, marker="o", markersize=4, color=colours[base[name]], label=name)
    axis.axhline(1.0, color="black", linewidth=1)
    axis.axvline(rows[0].prior_std, color="grey", linewidth=1, linestyle=":")
    axis.annotate(
        "spread of the inputs",
        (rows[0].prior_std, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-3, -4),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="top",
        color="grey",
        fontsize=8,
    )
    axis.set(xscale="log", yscale="log", xlabel="shift of the input, rms", ylabel="change of the update over ‖J·a‖")
    kind = "white shifts" if settings.direction == "white" else "shifts as an attacker errs"
    axis.set_title(f"{settings.dataset}, {kind}: is the update linear?")
    axis.legend(frameon=False, fontsize=8, handlelength=4, loc="center left", bbox_to_anchor=(1.0, 0.5))


STUDY = Study(
    name="linearity",
    settings=LinearitySettings,
    row=LinearityRow,
    key=("model", "image", "shift"),
    portions=_portions,
    summarize=_summarize,
    draw=_draw,
)
