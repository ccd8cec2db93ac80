"""What attackers who know more get of inputs behind shaped noise: its mechanism, how pixels vary, or fresh draws.

Who shares u(x) + J·a leaves the manifold of updates, and a search for x and a together finds both. Who shares u(x + a)
does not: x and a enter by their sum alone. Whoever has x + a itself has all there is to be had of x; his best estimate
is the posterior mean

    μ + S(S + H)⁻¹(x + a − μ),    S: his prior's covariance, H = h(G): the noise's,

which leaves tr(S − S(S + H)⁻¹S)/D per pixel where S is true. With S = τ² that is the prediction; with the covariance of
public images it is what leakage against a white prior does not see. Who has T draws of fresh noise on the same image
has their mean, with noise H/T.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fl_privacy.attacks import GaussianPrior, JointInversion
from fl_privacy.attacks.mechanisms import NoDefence
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.recommendation import recommend_noise
from fl_privacy.influence.spectrum import dense_gram, estimate_spectrum
from fl_privacy.studies.results import Portion
from fl_privacy.studies.scene import Scene, SceneSettings
from fl_privacy.studies.settings import option
from fl_privacy.studies.study import Study, Summary, spread_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAPPED, SHIFTED, WHITE, IMAGES = (
    "joint, u(x) + J·a",
    "joint, u(x + a)",
    "x + a, white prior",
    "x + a, pixels' covariance",
)
OTHERS = ("white noise on x, pixels' covariance", "noise on the update, pixels' covariance")
"""The same attacker behind the other families for the same target, the second with the network linear at the image."""
_MOST_JOINT = 256
"""Elements of the largest input that is searched for together with its noise: twice as many columns are formed."""


@dataclass(frozen=True, kw_only=True)
class InformedSettings(SceneSettings):
    """Images behind shaped noise, and who attacks them."""

    targets: tuple[float, ...] = option((0.99, 0.9, 0.75, 0.5, 0.3, 0.1), "Leakage that noise is to leave.", above=0)
    fresh: tuple[int, ...] = option((10, 100), "Draws of fresh noise on the same image that are seen.", minimum=2)
    joint: bool = option(True, "Run the joint attack, which takes small images.")
    num_starts: int = option(3, "Of the joint attack.", minimum=1)


@dataclass(frozen=True, kw_only=True)
class InformedRow:
    """One attack on one image; errors are rmse per pixel."""

    image: int
    label: int
    target: float
    attack: str
    predicted: float
    """What the attack's own prior says that it leaves; of the joint attacks, what the white prior says of x + a."""
    predicted_leakage: float
    """The same, as the share of the pixels' variance that is recovered."""
    error: float
    explained: bool
    """Whether what was found explains what was shared."""


def _portions(settings: InformedSettings) -> Iterator[Portion[InformedRow]]:
    if max(settings.targets) >= 1:
        raise InvalidInputError(f"expected targets below 1, got {settings.targets}")
    scene = Scene.of(settings, coloured=True)
    size = scene.prior.mean.numel()
    if settings.joint and size > _MOST_JOINT:
        raise InvalidInputError(
            f"expected images of at most {_MOST_JOINT} elements for the joint attack, got {size}: pass --no-joint"
        )
    attacks = [*([MAPPED, SHIFTED] if settings.joint else []), WHITE, IMAGES, *OTHERS, *map(_fresh, settings.fresh)]
    for image in range(settings.num_images):
        keys = [(image, target, attack) for target in settings.targets for attack in attacks]
        yield Portion(keys, partial(_rows, settings, scene, image))


def _fresh(count: int) -> str:
    return f"{count} fresh draws"


def _rows(settings: InformedSettings, scene: Scene, image: int) -> Iterator[InformedRow]:
    jacobian, own, prior = scene.jacobian([image]), scene.own_jacobian([image]), scene.prior
    update = own.update()
    spectrum = estimate_spectrum(jacobian, max_steps=256)
    values, vectors = torch.linalg.eigh(dense_gram(jacobian, 0))
    truth, mean = scene.images[image].flatten(), prior.mean.flatten()
    for level, target in enumerate(settings.targets):
        law = recommend_noise(spectrum, target_leakage=target, prior_std=prior.std)
        if law.already_met[0]:
            raise InvalidInputError(
                f"expected targets that need noise, got {target}, which image {image} meets without"
            )
        root = vectors @ torch.diag(law.variance(values.clamp(min=0)[None])[0].sqrt()) @ vectors.T
        z = torch.randn(len(root), generator=scene.generator(image, level), dtype=torch.float64).to(root)
        a = root @ z
        row = partial(InformedRow, image=image, label=int(scene.labels[image, 0]), target=target)
        by_law = prior.std * math.sqrt(1 - float(law.leakage.upper[0]))
        if settings.joint:
            for attack, shared in (
                (MAPPED, update + own.jvp(a[None])),
                (SHIFTED, own.shifted(a[None]).update()),
            ):
                problem = replace(
                    scene.problem([image], shared, 1.0), prior=prior.white, noise=NoDefence().noise(shared)
                )
                mechanism = JointInversion(
                    mechanism="mapped" if attack == MAPPED else "shifted", root=root, num_starts=settings.num_starts
                )
                found = mechanism.run(problem)
                yield row(
                    attack=attack,
                    predicted=by_law,
                    predicted_leakage=float(law.leakage.upper[0]),
                    error=float(scene.errors([image], found.inputs)),
                    explained=bool(found.explained),
                )
        noise, white = root @ root, float(law.white_std[0])
        # What noise on the update leaves of x is x with noise of covariance σ²G⁻¹; a ridge keeps it finite.
        floor = 1e-12 * values.max()
        spread = float(law.isotropic_std[0]) * vectors / values.clamp(min=floor).sqrt()
        arms = [
            (WHITE, prior.white, noise, a),
            (IMAGES, prior, noise, a),
            (OTHERS[0], prior, white**2 * torch.eye(len(z)).to(noise), white * z),
            (OTHERS[1], prior, spread @ spread.T, spread @ z),
            *((_fresh(n), prior.white, noise / n, a / math.sqrt(n)) for n in settings.fresh),
        ]
        for attack, belief, covariance, drawn in arms:
            estimate, predicted = _posterior(belief, covariance, truth + drawn - mean)
            error = (mean + estimate - truth).square().mean().sqrt()
            leakage = 1 - (predicted / prior.std) ** 2
            yield row(attack=attack, predicted=predicted, predicted_leakage=leakage, error=float(error), explained=True)


def _posterior(prior: GaussianPrior, noise: Tensor, seen: Tensor) -> tuple[Tensor, float]:
    """Returns the posterior mean of x − μ given x + a − μ, and the rmse that the prior says it has."""
    root = prior.std * prior.root(torch.eye(len(seen), dtype=seen.dtype, device=seen.device))  # τKᵀ, row by row
    s = root.T @ root
    gain = torch.linalg.solve(s + noise, s).T
    left = torch.trace(s - gain @ s) / len(seen)
    return gain @ seen, math.sqrt(max(0.0, float(left)))


def _summarize(settings: InformedSettings, rows: Sequence[InformedRow]) -> Summary:
    attacks = list(dict.fromkeys(row.attack for row in rows))
    shown = [attack for attack in attacks if attack in (MAPPED, SHIFTED, WHITE, IMAGES)]
    told = [attack for attack in attacks if attack not in (MAPPED, SHIFTED, WHITE)]
    lines = []
    for target in settings.targets:
        mine = {attack: [row for row in rows if (row.target, row.attack) == (target, attack)] for attack in attacks}
        if not all(mine.values()):
            continue  # of a study that is not complete
        predicted = statistics.median(row.predicted for row in mine[WHITE])
        errors = [spread_text([row.error for row in mine[attack]], ".2g") for attack in shown]
        leakages = [f"{statistics.median(row.predicted_leakage for row in mine[attack]):.2f}" for attack in told]
        lines.append((f"{target:g}", f"{predicted:.3g}", *errors, *leakages))
    count = len({row.image for row in rows})
    return Summary(
        f"Error, rmse per pixel, median [least, most] of {count} images behind shaped noise, beside what is predicted "
        "with a white prior; leaks: what the attack's own law says that it recovers, median. Joint attacks that "
        f"explain nothing: {sum(not row.explained for row in rows)}.",
        ("target", "predicted", *shown, *(f"{attack}: leaks" for attack in told)),
        tuple(lines),
    )


def _draw(settings: InformedSettings, rows: Sequence[InformedRow], figure: Figure) -> None:
    targets = [target for target in settings.targets if any(row.target == target for row in rows)]
    white = [statistics.median(r.predicted for r in rows if (r.target, r.attack) == (t, WHITE)) for t in targets]
    attacks = list(dict.fromkeys(row.attack for row in rows))
    joint = [attack for attack in attacks if attack in (MAPPED, SHIFTED)]
    sides = [side for side in (joint, [attack for attack in attacks if attack not in joint]) if side]
    places = figure.subplots(1, len(sides), squeeze=False)[0]
    for axis, side in zip(places, sides, strict=True):
        axis.plot(range(len(targets)), white, color="black", linewidth=1, label="predicted, white prior")
        for index, attack in enumerate(side):
            mine = [row for row in rows if row.attack == attack]
            at = [targets.index(row.target) + 0.1 * (index - (len(side) - 1) / 2) for row in mine]
            axis.scatter(at, [row.error for row in mine], s=10, marker="osD^vP*X"[index % 8], label=attack)
        axis.set(yscale="log", xlabel="leakage that the noise is to leave")
        axis.set_xticks(range(len(targets)), [f"{target:g}" for target in targets])
        axis.legend(frameon=False, fontsize=8)
    places[0].set_ylabel("error, rmse per pixel")


STUDY = Study(
    name="informed-attackers",
    settings=InformedSettings,
    row=InformedRow,
    key=("image", "target", "attack"),
    portions=_portions,
    summarize=_summarize,
    draw=_draw,
    figure_size=(10.4, 4.4),
)
