"""The predicted error, I²F and its lower bound beside what attacks reach, across architectures.

The paper holds I²F against the error of two attacks in use, which match gradients by their squared (DGL) or cosine
distance (Inverting Gradients). Both descend from a random start and know neither prior nor noise level; where they stay
above the prediction, it is the worst case and they are the practical attack. Gauss–Newton on the attacker's posterior
is set beside them to tell the two reasons apart: that the gradient says no more, or that the descent did not find it;
on networks with kinks, where it does not converge, posterior linearization can be.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from fl_privacy.attacks import LBFGS, Attack, GaussNewton, PosteriorLinearization, deep_leakage, inverting_gradients
from fl_privacy.extras import require
from fl_privacy.influence.i2f import influence, influence_lower_bound
from fl_privacy.influence.spectrum import estimate_spectrum
from fl_privacy.reference.initialization import Initialization
from fl_privacy.studies.results import Portion
from fl_privacy.studies.scene import Scene, SceneSettings, groups
from fl_privacy.studies.settings import Settings, device_option, option, relu_width_option
from fl_privacy.studies.study import BEATEN, FEWEST_RANKED, Study, Summary, rank_correlation
from fl_privacy.ticks import plain_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Architecture = Literal["linear", "mlp", "lenet", "digitsnet", "resnet8", "resnet18", "vit"]
AttackName = Literal["gauss-newton", "posterior-linearization", "dgl", "inverting-gradients"]

_MARKERS: Mapping[str, str] = {
    "linear": "o",
    "mlp": "s",
    "lenet": "^",
    "digitsnet": "v",
    "resnet8": "D",
    "resnet18": "P",
    "vit": "X",
}
_COLOURS: Mapping[str, str] = {
    "gauss-newton": "C0",
    "posterior-linearization": "C3",
    "dgl": "C1",
    "inverting-gradients": "C2",
}
_SIZES: Mapping[str, int] = {
    "inverting-gradients": 75,
    "dgl": 38,
    "posterior-linearization": 22,
    "gauss-newton": 12,
}
"""Largest first: where attacks reach the same, all are seen."""
_IMAGES_AT_ONCE = 10


@dataclass(frozen=True, kw_only=True)
class ArchitecturesSettings(Settings):
    """Architectures side by side on the same images; lenet has weights U(-0.5, 0.5), the others their own."""

    dataset: str = option("digits", "digits, mnist, fashion-mnist, cifar10 or folder.")
    data_root: str = option("data", "Where the data set's files are.", recorded=False)
    models: tuple[Architecture, ...] = option(("linear", "mlp", "lenet", "resnet8", "vit"), "Models to compare.")
    attacks: tuple[AttackName, ...] = option(("gauss-newton", "dgl", "inverting-gradients"), "Attacks to run.")
    num_images: int = option(2, "Images, the first of the test set.", minimum=1)
    noise_stds: tuple[float, ...] = option((1e-3, 1e-2), "Noise levels, standard deviation per parameter.", above=0)
    hops: int = option(1, "Most restarts of gauss-newton where it has not converged.", minimum=0)
    dgl_steps: int = option(300, "Steps of L-BFGS.", minimum=1)
    inverting_steps: int = option(500, "Steps of each of the two starts of inverting-gradients.", minimum=1)
    seed: int = option(0, "Of initialization, noise and starts.", minimum=0)
    relu_width: float = relu_width_option()
    device: str = device_option()


@dataclass(frozen=True, kw_only=True)
class ArchitecturesRow:
    """One attack on one noisy gradient of one model, beside what was predicted for it.

    Errors are root mean squares per input element, in units of the input.
    """

    model: str
    noise_std: float
    image: int
    attack: str
    predicted_lower: float
    predicted: float
    predicted_upper: float
    ridge: float
    """ε = σ²/τ², of I²F."""
    largest: float
    """λ_max(G)."""
    influence: float
    """I²F/√D of the very noise (paper, Eq. 4), by J as audits take it."""
    influence_residual: float
    """Relative residual of its solve."""
    lower_bound: float
    """‖Jᵀδ‖/λ_max/√D of the very noise (paper, Eq. 5), by that J."""
    error: float
    converged: bool
    explained: bool
    """Whether what was rebuilt explains the gradient up to its noise; if not, the attack failed."""

    @property
    def ratio(self) -> float:
        """Error over prediction."""
        return self.error / self.predicted

    @property
    def beats(self) -> bool:
        """Whether the error is more than 20 % below the prediction's lower end."""
        return self.error < BEATEN * self.predicted_lower


def _portions(settings: ArchitecturesSettings) -> Iterator[Portion[ArchitecturesRow]]:
    for model in settings.models:
        for group in groups(settings.num_images, _IMAGES_AT_ONCE):
            for level, noise_std in enumerate(settings.noise_stds):
                keys = [(model, noise_std, image, attack) for attack in settings.attacks for image in group]
                yield Portion(keys, partial(_rows, settings, model, group, level))


def _rows(settings: ArchitecturesSettings, model: str, group: list[int], level: int) -> Iterator[ArchitecturesRow]:
    scene = Scene.of(_scene_settings(settings, model))
    noise_std, tau = settings.noise_stds[level], scene.prior.std
    jacobian = scene.jacobian(group)
    noise = noise_std * scene.noise(group, level)
    ridge, root = (noise_std / tau) ** 2, math.sqrt(jacobian.input_dim)
    spectrum = estimate_spectrum(jacobian, max_steps=256, ridge=ridge, seed=settings.seed)
    predicted = spectrum.rmse(noise_std, tau)
    shift = influence(jacobian, noise, ridge=ridge, max_steps=min(2 * jacobian.input_dim, 1024))
    bound = influence_lower_bound(jacobian, noise) / root
    problem = scene.problem(group, scene.gradients(group) + noise, noise_std)
    for name, attack in _attacks(settings).items():
        rebuilt = attack.run(problem)
        errors = scene.errors(group, rebuilt.inputs)
        for unit, image in enumerate(group):
            yield ArchitecturesRow(
                model=model,
                noise_std=noise_std,
                image=image,
                attack=name,
                predicted_lower=float(predicted.lower[unit]),
                predicted=float(predicted.value[unit]),
                predicted_upper=float(predicted.upper[unit]),
                ridge=ridge,
                largest=float(spectrum.largest[unit]),
                influence=float(shift.norm[unit]) / root,
                influence_residual=float(shift.residual[unit]),
                lower_bound=float(bound[unit]),
                error=float(errors[unit]),
                converged=bool(rebuilt.converged[unit]),
                explained=bool(rebuilt.explained[unit]),
            )


def initialization_of(model: str) -> Initialization:
    """Returns the paper's initialisation for its LeNet, and for others, which under it nobody trains, their own."""
    return "uniform" if model == "lenet" else "default"


def _scene_settings(settings: ArchitecturesSettings, model: str) -> SceneSettings:
    return SceneSettings(
        dataset=settings.dataset,
        data_root=settings.data_root,
        model=model,
        initialization=initialization_of(model),
        num_images=settings.num_images,
        seed=settings.seed,
        relu_width=settings.relu_width,
        device=settings.device,
    )


def _attacks(settings: ArchitecturesSettings) -> Mapping[str, Attack]:
    known: Mapping[AttackName, Attack] = {
        "gauss-newton": GaussNewton(hops=settings.hops, seed=settings.seed),
        "posterior-linearization": PosteriorLinearization(seed=settings.seed),
        "dgl": deep_leakage(optimizer=LBFGS(steps=settings.dgl_steps), seed=settings.seed),
        "inverting-gradients": inverting_gradients(steps=settings.inverting_steps, seed=settings.seed),
    }
    return {name: known[name] for name in settings.attacks}


def best_rows(rows: Sequence[ArchitecturesRow]) -> list[ArchitecturesRow]:
    """Returns, for every model, noise level and image, the row of the attack that came closest."""
    best: dict[tuple[str, float, int], ArchitecturesRow] = {}
    for row in rows:
        key = (row.model, row.noise_std, row.image)
        if key not in best or row.error < best[key].error:
            best[key] = row
    return list(best.values())


def _summarize(settings: ArchitecturesSettings, rows: Sequence[ArchitecturesRow]) -> Summary:
    lines = []
    for model in settings.models:
        for noise_std in settings.noise_stds:
            members = [row for row in rows if row.model == model and row.noise_std == noise_std]
            lines.append(
                (
                    model,
                    f"{noise_std:g}",
                    *(_median(members, quantity) for quantity in ("predicted", "influence", "lower_bound")),
                    *(_reached([row for row in members if row.attack == name]) for name in settings.attacks),
                )
            )
    best = best_rows(rows)
    by_attack = [
        f"{name} {statistics.median(row.ratio for row in of_attack):.3g} of the prediction in the median, "
        f"{sum(row.beats for row in of_attack)} of {len(of_attack)} beat it, "
        f"{sum(not row.explained for row in of_attack)} failed"
        for name in settings.attacks
        if (of_attack := [row for row in rows if row.attack == name])
    ]
    order = ", ".join(f"{_spearman(best, x):.3f} with {label}" for x, label in _AGAINST.items())
    order = f"; its rank correlation over all models and levels is {order}" if len(best) >= FEWEST_RANKED else ""
    return Summary(
        f"Reached error: {'; '.join(by_attack)}. The best attack of each run is below the lower bound in "
        f"{sum(row.error < row.lower_bound for row in best)} of {len(best)} runs{order}. Cells: medians over "
        f"{settings.num_images} image(s), with the number of attacks that failed.",
        ("model", "noise std", "predicted", "I²F/√D", "bound/√D", *settings.attacks),
        tuple(lines),
    )


_AGAINST: Mapping[str, str] = {
    "predicted": "the predicted error",
    "influence": "I²F/√D",
    "lower_bound": "the lower bound/√D",
}
"""What the reached error is held against."""


def _median(rows: Sequence[ArchitecturesRow], quantity: str) -> str:
    return f"{statistics.median(getattr(row, quantity) for row in rows):.3g}"


def _reached(rows: Sequence[ArchitecturesRow]) -> str:
    failed = sum(not row.explained for row in rows)
    return _median(rows, "error") + (f" ({failed} of {len(rows)} failed)" if failed else "")


def _spearman(rows: Sequence[ArchitecturesRow], quantity: str) -> float:
    return rank_correlation([getattr(row, quantity) for row in rows], [row.error for row in rows])


def _draw(settings: ArchitecturesSettings, rows: Sequence[ArchitecturesRow], figure: Figure) -> None:
    axes = figure.subplots(1, len(_AGAINST), sharey=True)
    for axis, (quantity, label) in zip(axes, _AGAINST.items(), strict=True):
        for row in sorted(rows, key=lambda row: -_SIZES[row.attack]):
            colour = _COLOURS[row.attack]
            axis.scatter(
                getattr(row, quantity),
                row.error,
                s=_SIZES[row.attack],
                marker=_MARKERS[row.model],
                facecolors=colour if row.explained else "none",
                edgecolors=colour,
                linewidths=0.9,
            )
        values = [value for row in rows for value in (getattr(row, quantity), row.error)]
        ends = [min(values) / 1.3, max(values) * 1.3]
        axis.plot(ends, ends, color="black", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel=f"{label.removeprefix('the ')}, rmse")
        plain_ticks(axis.xaxis)
        axis.tick_params(axis="x", labelsize=8)
    reached = [row.error for row in rows]
    axes[0].set_ylim(min(reached) / 1.5, max(reached) * 1.5)
    plain_ticks(axes[0].yaxis)
    axes[0].set_ylabel("error of the attack, rmse")
    _legend(settings, axes[-1])


def _legend(settings: ArchitecturesSettings, axis: Axes) -> None:
    line = require("matplotlib.lines").Line2D
    entries = [line([], [], linestyle="", marker="o", color=_COLOURS[name], label=name) for name in settings.attacks]
    entries += [line([], [], linestyle="", marker=_MARKERS[name], color="grey", label=name) for name in settings.models]
    entries.append(line([], [], linestyle="", marker="o", color="grey", markerfacecolor="none", label="attack failed"))
    axis.legend(handles=entries, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


STUDY = Study(
    name="architectures",
    settings=ArchitecturesSettings,
    row=ArchitecturesRow,
    key=("model", "noise_std", "image", "attack"),
    portions=_portions,
    summarize=_summarize,
    draw=_draw,
    figure_size=(12.0, 4.2),
)
