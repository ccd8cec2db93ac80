"""What usual defences leave an attacker at equal utility, and whether noise of equal power predicts it.

Utility is the cosine similarity of what is shared and the undefended update. Each share of pruning sets a cosine, and
Gaussian noise, Laplace noise, clipping with noise and quantisation are made as strong as to reach the same; half
precision and int8 are what they are. Three predictions stand side by side: one that takes the perturbation for
isotropic noise of its power, the audit's, which looks at where an update carries less of it, and that for whoever knows
the mechanism and the shape of its noise; and beside them what an attack of his reaches.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fl_privacy.attacks import GaussNewton, IndependentNoise, IsotropicNoise, Noise
from fl_privacy.attacks.mechanisms import PRECISION, AddedNoise, HalfPrecision, Mechanism, Pruning, UniformQuantization
from fl_privacy.audit.observed import observed_version, predicted_recovery
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.studies.results import Portion
from fl_privacy.studies.scene import Scene, SceneSettings
from fl_privacy.studies.settings import option
from fl_privacy.studies.study import BEATEN, FEWEST_RANKED, Study, Summary, rank_correlation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CLIPPED_TO = 0.3
_EXACT = 1 / 512
"""Error below which nothing is left to predict: half a grey level of 256."""
_LEAST_DRAWN = 1e-7
_AT_LEAST = "(below 1e-7: drawn at 1e-7)"


@dataclass(frozen=True, kw_only=True)
class UsualDefencesSettings(SceneSettings):
    """Defences at equal cosine similarity of the shared update."""

    prune: tuple[float, ...] = option(
        (0.1, 0.3, 0.5, 0.7, 0.9), "Shares of pruning; each sets a level of utility.", above=0
    )


@dataclass(frozen=True, kw_only=True)
class UsualDefencesRow:
    """One defence of one gradient; errors are rmse per input element."""

    image: int
    defence: str
    level: float
    """The share of pruning whose utility it has; 0 for what has a utility of its own."""
    strength: float
    """Share pruned, standard deviation, or bits."""
    cosine: float
    equal_power_leakage: float
    equal_power: float
    """Predicted for isotropic noise of the perturbation's power."""
    audited_leakage: float
    audited: float
    """Predicted for noise of the power seen in each block of the update; the audit credits the lower of the two."""
    informed_leakage: float
    informed: float
    """Predicted for Gaussian noise that leaves as much as the known mechanism does to whoever uses its shape."""
    error: float
    """Of the attack that knows how strong the noise is where: by least squares."""
    informed_error: float
    """Of the one that uses the noise's shape; the same where that is Gaussian, or zeros among exact entries."""
    explained: bool

    @property
    def reached(self) -> float:
        """Error of the attack that came closer."""
        return min(self.error, self.informed_error)


@dataclass(frozen=True)
class _Arm:
    name: str
    strength: float
    mechanism: Mechanism


def _arms(update: Tensor, share: float) -> list[_Arm]:
    """Defences of one update `[1, P]` that leave it the cosine that pruning leaves."""
    generator = torch.Generator().manual_seed(0)
    pruning = Pruning(share=share)
    pruned = pruning.apply(update, generator)
    cosine = _cosine(pruned, update)
    tangent = max(float((update - pruned).norm() / pruned.norm()), PRECISION)  # of the angle between the two
    std = float(update.norm()) * tangent / math.sqrt(update.shape[-1])
    bits = _solve(lambda b: _cosine(UniformQuantization(bits=b).apply(update, generator), update), cosine)
    return [
        _Arm("prune", share, pruning),
        _Arm("gaussian", std, AddedNoise(std=std)),
        _Arm("clip and noise", std, AddedNoise(std=std)),
        _Arm("laplace", std, AddedNoise(std=std, laplace=True)),
        _Arm("quantise", bits, UniformQuantization(bits=bits)),
    ]


def _solve(cosine_of: Callable[[float], float], target: float) -> float:
    """Returns about the least number of bits that leave the cosine; it rises with them."""
    low, high = 2.0, 24.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if cosine_of(middle) >= target else (middle, high)
    return high


def _portions(settings: UsualDefencesSettings) -> Iterator[Portion[UsualDefencesRow]]:
    scene = Scene.of(settings)
    names = ("prune", "gaussian", "clip and noise", "laplace", "quantise")
    for image in range(settings.num_images):
        for share in settings.prune:
            keys = [(image, name, share) for name in names]
            yield Portion(keys, partial(_rows, scene, image, share))
        yield Portion([(image, name, 0.0) for name in ("half precision", "int8")], partial(_rows, scene, image, 0.0))


def _rows(scene: Scene, image: int, share: float) -> Iterator[UsualDefencesRow]:
    jacobian = scene.jacobian([image])
    update = scene.gradients([image])
    fixed = [_Arm("half precision", 16.0, HalfPrecision()), _Arm("int8", 8.0, UniformQuantization(bits=8))]
    for arm in _arms(update, share) if share else fixed:
        generator = torch.Generator().manual_seed(1_009 * image + scene.seed)
        shared = arm.mechanism.apply(update, generator)
        seen = _CLIPPED_TO * shared if arm.name == "clip and noise" else shared
        version = observed_version(arm.name, seen[0], update[0], scene.update.layout.sizes)
        belief: Noise = version.noise if arm.name == "clip and noise" else arm.mechanism.noise(shared)
        scaled = version.shared[None] if arm.name == "clip and noise" else shared
        problem = replace(scene.problem([image], scaled, 1.0), noise=belief)
        found = GaussNewton().run(problem)
        shaped = arm.mechanism.attack(shared, GaussNewton())
        sharper = found if isinstance(shaped, GaussNewton) else shaped.run(problem)
        rms = float((shared - update).norm()) / math.sqrt(update.shape[-1])
        least = PRECISION * float(update.norm()) / math.sqrt(update.shape[-1])
        power = IsotropicNoise(torch.tensor([max(rms, least)], device=update.device))
        equal = _recovery(scene, jacobian, power)
        leaning = isinstance(version.noise, IndependentNoise)
        audited = _recovery(scene, jacobian, version.noise) if leaning else equal
        audited = max(equal, audited)  # by leakage, the first of the pair
        informed = _recovery(scene, jacobian, arm.mechanism.equivalent(shared))
        yield UsualDefencesRow(
            image=image,
            defence=arm.name,
            level=share,
            strength=arm.strength,
            cosine=_cosine(shared, update),
            equal_power_leakage=equal[0],
            equal_power=equal[1],
            audited_leakage=audited[0],
            audited=audited[1],
            informed_leakage=informed[0],
            informed=informed[1],
            error=float(scene.errors([image], found.inputs)),
            informed_error=float(scene.errors([image], sharper.inputs)),
            explained=bool(found.explained),
        )


def _recovery(scene: Scene, jacobian: UpdateJacobian, noise: Noise) -> tuple[float, float]:
    """Predicted leakage and error."""
    leakage, error = predicted_recovery(jacobian, noise, scene.prior.std)
    return leakage.value, error.value


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=-1))


def _summarize(settings: UsualDefencesSettings, rows: Sequence[UsualDefencesRow]) -> Summary:
    lines = []
    for level, name in dict.fromkeys((row.level, row.defence) for row in rows):
        chosen = [row for row in rows if (row.level, row.defence) == (level, name)]
        numbers = [
            statistics.median(getattr(row, field) for row in chosen)
            for field in ("cosine", "equal_power", "audited", "informed", "error", "informed_error")
        ]
        lines.append((f"{level:g}" if level else "own", name, *(f"{number:.3g}" for number in numbers)))
    beaten = {what: _beaten(rows, what) for what in ("equal_power", "audited", "informed")}
    pruned = [row for row in rows if row.defence == "prune" and row.reached > _EXACT]
    order = {what: f"{_spearman(pruned, what):.2f}" for what in ("equal_power", "audited", "informed")}
    ranked = (
        f" Over the {len(pruned)} pruned updates of which no attack comes below half a grey level the error has a "
        f"Spearman correlation of {order['equal_power']} with the prediction for equal power, {order['audited']} with "
        f"the audit's and {order['informed']} with that for a known shape."
    )
    return Summary(
        f"Medians over {len({row.image for row in rows})} images, at equal cosine similarity of the shared update. An "
        f"attack comes more than 20 % below noise of equal power in {beaten['equal_power']} runs, below the "
        f"audit's prediction in {beaten['audited']} and below that for whoever knows the noise's shape in "
        f"{beaten['informed']}, of those in which it is more than half a grey level; least squares failed to explain "
        f"the update in "
        f"{sum(not row.explained for row in rows) / len(rows):.0%}.{ranked if len(pruned) >= FEWEST_RANKED else ''}",
        (
            "as pruning",
            "defence",
            "cosine",
            "predicted, equal power",
            "predicted, audit",
            "predicted, shape known",
            "least squares",
            "attack by shape",
        ),
        tuple(lines),
    )


def _beaten(rows: Sequence[UsualDefencesRow], what: str) -> str:
    """In how many runs an attack beats a prediction by more than 20 %, of those in which something is predicted."""
    able = [row for row in rows if getattr(row, what) > _EXACT]
    return f"{sum(row.reached < BEATEN * getattr(row, what) for row in able)} of {len(able)}"


def _spearman(rows: Sequence[UsualDefencesRow], what: str) -> float:
    predicted, reached = [getattr(row, what) for row in rows], [row.reached for row in rows]
    return rank_correlation(predicted, reached)


def _draw(settings: UsualDefencesSettings, rows: Sequence[UsualDefencesRow], figure: Figure) -> None:
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    panels = (
        ("equal_power", "for noise of equal power"),
        ("audited", "by the audit"),
        ("informed", "for whoever knows the noise's shape"),
    )
    reached = {row: _drawn_at(row.reached) for row in rows}
    lowest = min(*reached.values(), *(_drawn_at(getattr(row, what)) for row in rows for what, _ in panels))
    ends = [0.5 * lowest, 1.0]
    for axis, (what, title) in zip(axes, panels, strict=True):
        for marker, name in zip("os^Dv*X", dict.fromkeys(row.defence for row in rows), strict=False):
            chosen = [row for row in rows if row.defence == name]
            axis.scatter(
                [_drawn_at(getattr(row, what)) for row in chosen],
                [reached[row] for row in chosen],
                s=16,
                marker=marker,
                label=name,
                alpha=0.7,
            )
        axis.plot(ends, ends, color="black", linewidth=1)
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, title=f"predicted {title}")
        axis.set_xlabel(f"predicted error {_AT_LEAST}")
    axes[0].set_ylabel(f"error of the best attack that knows the mechanism\n{_AT_LEAST}")
    axes[0].legend(frameon=False, fontsize=8)


def _drawn_at(error: float) -> float:
    return max(error, _LEAST_DRAWN)


STUDY = Study(
    name="usual-defences",
    settings=UsualDefencesSettings,
    row=UsualDefencesRow,
    key=("image", "defence", "level"),
    portions=_portions,
    summarize=_summarize,
    draw=_draw,
    figure_size=(13.0, 4.6),
)
