"""How much less than other defences shaped input noise changes an update, at the same error of the strongest attack.

Every attack knows mechanism and covariance. On noise on the input there are two: Gauss–Newton for x + a followed by the
posterior mean of x, and the posterior mean of an attacker who is given x + a itself, which no attack can beat by the
Gaussian prior alone. On other noise, Gauss–Newton on the posterior, and the posterior mean of the update linearised at
the true input, which no attacker has. A denoiser of images works on either's result, with the strength that serves it
best in hindsight.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fl_privacy.attacks import GaussianPrior, GaussNewton, InputDenoising, IsotropicNoise, Noise
from fl_privacy.attacks.image_prior import Denoiser, denoised
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.i2f import influence
from fl_privacy.influence.lanczos import function_of_gram
from fl_privacy.influence.recommendation import NoiseRecommendation, recommend_noise
from fl_privacy.influence.sampling import draw_input_noise
from fl_privacy.influence.spectrum import Spectrum, dense_gram, estimate_spectrum
from fl_privacy.studies.defences import EXACT, Defence, DenseScene
from fl_privacy.studies.results import Portion
from fl_privacy.studies.scene import Scene, SceneSettings
from fl_privacy.studies.settings import option
from fl_privacy.studies.study import Study, Summary
from fl_privacy.ticks import plain_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ON_UPDATE = ("pruning", "optimal defenses", "soteria", "rank-one")
_NO_ATTACK = "none"
_NOT_RUN = "not run"
_MEANING = {
    True: "Errors: rmse per input element of the strongest attack by the Gaussian prior, and with denoisers of images, "
    "whose strength is the best in hindsight. Advantage: norm of isotropic noise at which the strongest attack errs as "
    "much, over the change, by the spectrum's curve; with denoisers, by what was reached at an image's other targets.",
    False: "No attack was run: errors, rmse per input element, are predicted to first order. Advantage: norm of "
    "isotropic noise for which as much is predicted, over the change.",
}
_DENSE = 1024
"""Inputs of at most so many elements have their eigenvectors computed."""
_STRENGTHS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
_DENOISERS: tuple[Denoiser, ...] = ("total-variation", "non-local-means")


@dataclass(frozen=True, kw_only=True)
class NoiseSettings(SceneSettings):
    """Defences at equal error of the strongest attack."""

    targets: tuple[float, ...] = option((0.99, 0.9, 0.75, 0.5, 0.3), "Target leakages.", above=0)
    others: bool = option(
        True, "Also pruning, Optimal Defenses, Soteria and rank-one noise; forms J, for small inputs."
    )
    searching: bool = option(True, "Also run Gauss-Newton; off, errors are those of the posterior mean alone.")
    attacking: bool = option(True, "Draw noise and attack; off, only the changes to first order that the laws predict.")
    num_probes: int = option(4, "Probes of the spectrum.", minimum=1)
    max_steps: int = option(256, "Lanczos steps per probe.", minimum=1)
    draw_steps: int = option(1024, "Lanczos steps per draw of shaped noise.", minimum=1)
    hops: int = option(1, "Most restarts of Gauss-Newton on noisy inputs.", minimum=0)


@dataclass(frozen=True, kw_only=True)
class NoiseRow:
    """One attack on one defended gradient; errors are rmse per input element."""

    image: int
    label: int
    target: float
    defence: str
    attack: str
    """`posterior mean`, `gauss-newton`, or either with a denoiser after it; `none` where nothing was drawn, and
    change and error are what is predicted."""
    leakage: float
    """Of the best linear-Gaussian attacker; above the target where the defence cannot meet it."""
    predicted: float
    error: float
    explained: bool
    change: float
    """Norm of shared minus undefended update."""
    relative_change: float
    """The same over the norm of the undefended update."""
    equal_change: float
    """Norm of isotropic noise at which the same attack errs as much; NaN where no noise makes it err so little."""

    @property
    def advantage(self) -> float:
        """How many times larger isotropic noise of the same attack error is."""
        return self.equal_change / self.change if self.change else math.nan


def _portions(settings: NoiseSettings) -> Iterator[Portion[NoiseRow]]:
    if max(settings.targets) >= 1:
        raise InvalidInputError(f"expected targets below 1, got {settings.targets}")
    scene = Scene.of(settings)
    # The targets of an image come one after the other, and share its spectrum.
    unit_of = lru_cache(maxsize=1)(partial(_Unit, settings, scene))
    for image in range(settings.num_images):
        for target in settings.targets:
            attacks = _attack_names(settings)
            keys = [(image, target, defence, attack) for defence in _defences(settings) for attack in attacks]
            yield Portion(keys, partial(_rows, settings, scene, unit_of, image, target))


def _attack_names(settings: NoiseSettings) -> list[str]:
    if not settings.attacking:
        return [_NO_ATTACK]
    plain = ["posterior mean", *(["gauss-newton"] if settings.searching else [])]
    return [*plain, *(f"{name}, {denoiser}" for name in plain for denoiser in _DENOISERS)]


def _defences(settings: NoiseSettings) -> list[str]:
    return ["isotropic", "shaped", "white input", *(_ON_UPDATE if settings.others and settings.attacking else ())]


class _Unit:
    """One image: its update, the J that laws and linear attackers take, its spectrum and, where needed, dense J."""

    def __init__(self, settings: NoiseSettings, scene: Scene, image: int) -> None:
        self.settings, self.scene, self.image = settings, scene, image
        self.own, self.jacobian = scene.own_jacobian([image]), scene.jacobian([image])
        self.update = self.own.update()[0]
        self.x = self.jacobian.private_inputs
        self.mu = scene.prior.start(1, 1)
        self.spectrum = estimate_spectrum(
            self.jacobian, num_probes=settings.num_probes, max_steps=settings.max_steps, rtol=1e-3
        )
        self.dense = (
            DenseScene(self.jacobian, self.update, scene.update.model, scene.prior.std, 7 * image)
            if settings.others and settings.attacking
            else None
        )

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor] | None:
        """Eigenvalues and eigenvectors of G, of inputs small enough."""
        if self.jacobian.input_dim > _DENSE:
            return None
        values, vectors = torch.linalg.eigh(dense_gram(self.jacobian, 0))
        return values.clamp(min=0), vectors

    def of_gram(self, f: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """f(G)·v `[1, D]`."""
        if self.eigen is None:
            return function_of_gram(self.jacobian, f, v, self.settings.draw_steps)
        values, vectors = self.eigen
        return (v @ vectors * f(values[None])) @ vectors.T

    @cached_property
    def without_target(self) -> dict[str, Found]:
        """Results against defences that are the same for every target."""
        return {}

    def generator(self, purpose: int) -> torch.Generator:
        return self.scene.generator(self.image, purpose)


def _rows(
    settings: NoiseSettings, scene: Scene, unit_of: Callable[[int], _Unit], image: int, target: float
) -> Iterator[NoiseRow]:
    unit = unit_of(image)
    tau = scene.prior.std
    law = recommend_noise(unit.spectrum, target_leakage=target, prior_std=tau)
    base: dict[str, tuple[float, float]] = {}
    for defence, leakage, change, found in _defended(settings, unit, law, target):
        predicted = tau * math.sqrt(max(0.0, 1 - leakage))
        errors = _errors(scene, image, found) if settings.attacking else [(_NO_ATTACK, predicted, True)]
        for attack, error, explained in errors:
            if defence == "isotropic":
                base[attack] = (error, predicted)
            yield NoiseRow(
                image=image,
                label=int(scene.labels[image, 0]),
                target=target,
                defence=defence,
                attack=attack,
                leakage=leakage,
                predicted=predicted,
                error=error,
                explained=explained,
                change=change,
                relative_change=change / float(torch.linalg.vector_norm(unit.update)),
                equal_change=_equal_isotropic(unit.spectrum, tau, error, *base[attack]),
            )


def _equal_isotropic(spectrum: Spectrum, tau: float, error: float, base_error: float, base_predicted: float) -> float:
    """Norm of isotropic noise with a given attack error, by the spectrum's curve through the one that was measured."""
    leakage = 1 - (error * base_predicted / base_error / tau) ** 2
    if not 0 < leakage < 1:
        return math.nan
    low, high = -40.0, 40.0
    for _ in range(80):  # the middle of the interval, as the change at the target is compared by measured errors
        middle = (low + high) / 2
        leaks = float(spectrum.leakage(math.exp(middle), tau).value) > leakage
        low, high = (middle, high) if leaks else (low, middle)
    return math.exp(high) * math.sqrt(spectrum.update_dim)


@dataclass(frozen=True, eq=False)
class _Result:
    """What an attack rebuilt `[1, 1, *shape]`, and what else a denoiser may start from."""

    image: Tensor
    explained: bool = True
    raw: Tensor | None = None


Found = dict[str, _Result]


def _defended(
    settings: NoiseSettings, unit: _Unit, law: NoiseRecommendation, target: float
) -> Iterator[tuple[str, float, float, Found]]:
    """Defence, leakage by the law, norm of the change, and what each attack rebuilds `[1, 1, *shape]`."""
    tau, scene = unit.scene.prior.std, unit.scene
    sigma = float(law.isotropic_std)
    if not settings.attacking:
        yield "isotropic", target, float(law.isotropic_norm), {}
        yield "shaped", float(law.leakage.value), float(law.shaped_norm), {}
        yield "white input", target, float(law.white_norm), {}
        return
    normal = torch.randn(len(unit.update), generator=unit.generator(1), dtype=torch.float64).to(unit.update)
    delta = sigma * normal[None]
    reached = float(unit.spectrum.leakage(sigma, tau).value)
    noise = IsotropicNoise(unit.update.new_full((1,), sigma))
    yield (
        "isotropic",
        reached,
        float(delta.norm()),
        {
            "posterior mean": _Result(_posterior_mean(unit, delta, (sigma / tau) ** 2)),
            **_search(settings, unit, unit.update + delta, noise),
        },
    )
    shaped = draw_input_noise(
        unit.jacobian, law, 10 * unit.image + scene.seed, max_steps=settings.draw_steps, rtol=2e-3
    )
    yield "shaped", *_on_input(settings, unit, shaped.noise, partial(shaped.variance, law))
    z = torch.randn(unit.x.shape, generator=unit.generator(2), dtype=torch.float64).to(unit.x)
    uniform = float(law.white_std) ** 2
    yield (
        "white input",
        *_on_input(settings, unit, math.sqrt(uniform) * z, lambda nodes: torch.full_like(nodes, uniform)),
    )
    if unit.dense is not None:
        for name, defence in _on_update(unit.dense, target):
            yield name, defence.leakage, float(defence.change.norm()), _against(settings, unit, name, defence)


def _against(settings: NoiseSettings, unit: _Unit, name: str, defence: Defence) -> Found:
    if name in unit.without_target:
        return unit.without_target[name]
    found = {
        "posterior mean": _Result(_weighted_mean(unit, defence)),
        **_search(settings, unit, (unit.update + defence.change)[None], defence.noise),
    }
    if name == "soteria":  # which is at its strongest whatever the target
        unit.without_target[name] = found
    return found


def _on_update(dense: DenseScene, target: float) -> Iterator[tuple[str, Defence]]:
    yield "pruning", dense.pruned(target)
    yield "optimal defenses", dense.optimal(target)
    yield "soteria", dense.soteria(1.0)
    yield "rank-one", dense.rank_one(target)


def _on_input(
    settings: NoiseSettings, unit: _Unit, a: Tensor, variance: Callable[[Tensor], Tensor]
) -> tuple[float, float, Found]:
    tau, prior = unit.scene.prior.std, unit.scene.prior
    shared = unit.own.shifted(a).update()

    def share(nodes: Tensor) -> Tensor:
        return tau**2 / (tau**2 + variance(nodes))

    mean = unit.mu + unit.of_gram(share, unit.x + a - unit.mu)
    found: Found = {"posterior mean": _Result(_image(unit, mean), raw=_image(unit, unit.x + a))}
    if settings.searching:
        wide = GaussianPrior(prior.mean, math.sqrt(tau**2 + float(a.square().mean())))
        exact = EXACT * float(unit.update.square().mean().sqrt())
        problem = replace(unit.scene.problem([unit.image], shared, exact), prior=wide)
        attack = InputDenoising(
            attack=GaussNewton(hops=settings.hops),
            covariance=lambda v: unit.of_gram(variance, v),
            prior_std=tau,
        )
        result = attack.run(problem)
        found["gauss-newton"] = _Result(result.inputs, bool(result.explained[0]))
    leakage = float(unit.spectrum.mean(share))
    return leakage, float((shared[0] - unit.update).norm()), found


def _search(settings: NoiseSettings, unit: _Unit, shared: Tensor, noise: Noise) -> Found:
    if not settings.searching:
        return {}
    problem = replace(unit.scene.problem([unit.image], shared, 1.0), noise=noise)
    result = GaussNewton(hops=0).run(problem)
    return {"gauss-newton": _Result(result.inputs, bool(result.explained[0]))}


def _posterior_mean(unit: _Unit, delta: Tensor, ridge: float) -> Tensor:
    """μ + (G + ε)⁻¹Jᵀ(J(x − μ) + δ), of the update linearised at x."""
    seen = unit.jacobian.jvp(unit.x - unit.mu) + delta
    steps = min(unit.jacobian.input_dim, unit.settings.draw_steps)
    return _image(unit, unit.mu + influence(unit.jacobian, seen, ridge=ridge, rtol=1e-3, max_steps=steps).shift)


def _weighted_mean(unit: _Unit, defence: Defence) -> Tensor:
    """μ + (JᵀC⁻¹J + 1/τ²)⁻¹JᵀC⁻¹(J(x − μ) + δ): a change that is no noise, such as pruning, is what C takes it for."""
    assert unit.dense is not None
    j, tau = unit.dense.j, unit.scene.prior.std
    weighed = defence.noise.precision(j.T)
    seen = j @ (unit.x - unit.mu)[0] + defence.change
    m = weighed @ j
    target = defence.noise.precision(seen[None])[0] @ j
    solved = torch.linalg.solve(m + torch.eye(len(m), dtype=m.dtype, device=m.device) / tau**2, target)
    return _image(unit, unit.mu + solved[None])


def _image(unit: _Unit, flat: Tensor) -> Tensor:
    return flat.reshape(1, 1, *unit.scene.prior.mean.shape)


def _errors(scene: Scene, image: int, found: Found) -> Iterator[tuple[str, float, bool]]:
    """Attack, error and whether it explains the update; denoisers have the strength that is best in hindsight."""

    def error(rebuilt: Tensor) -> float:
        return float(scene.errors([image], rebuilt)[0])

    for name, result in found.items():
        yield name, error(result.image), result.explained
    for name, result in found.items():
        starts = [result.image, *([] if result.raw is None else [result.raw])]
        for denoiser in _DENOISERS:
            smoothed = [denoised(start, denoiser, strength) for start in starts for strength in _STRENGTHS]
            yield f"{name}, {denoiser}", min(map(error, smoothed)), result.explained


def _strongest(rows: Sequence[NoiseRow], *, denoisers: bool = False) -> dict[tuple[int, float, str], NoiseRow]:
    """The attack with the least error on each defended update."""
    best: dict[tuple[int, float, str], NoiseRow] = {}
    for row in rows:
        key = (row.image, row.target, row.defence)
        if (denoisers or "," not in row.attack) and (key not in best or row.error < best[key].error):
            best[key] = row
    return best


def _advantage_denoised(
    strongest: Mapping[tuple[int, float, str], NoiseRow], image: int, target: float, defence: str
) -> float:
    """Isotropic noise at which the strongest attack of all errs as much, over the change; NaN where none was near it.

    Whoever denoises best after isotropic noise need not be who does after other noise. So it is read off the errors
    that were reached at this image's targets, between which the logarithm of the change is taken for linear.
    """
    row = strongest[image, target, defence]
    known = sorted(
        (r.error, math.log(r.change)) for (i, _, d), r in strongest.items() if (i, d) == (image, "isotropic")
    )
    if len(known) < 2 or not row.change > 0:
        return math.nan
    errors, changes = zip(*known, strict=True)
    after = min(max(bisect.bisect(errors, row.error), 1), len(known) - 1)
    beyond = (row.error - errors[after - 1]) / max(errors[after] - errors[after - 1], 1e-12)
    if not -1 <= beyond <= 2:
        return math.nan
    at = changes[after - 1] + beyond * (changes[after] - changes[after - 1])
    return math.exp(at) / row.change


def _median(values: Sequence[float]) -> float:
    kept = [value for value in values if not math.isnan(value)]
    return statistics.median(kept) if kept else math.nan


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"


def _summarize(settings: NoiseSettings, rows: Sequence[NoiseRow]) -> Summary:
    plain, any_attack = _strongest(rows), _strongest(rows, denoisers=True)
    lines = []
    for target in settings.targets:
        for defence in _defences(settings):
            mine = [row for (_, t, d), row in plain.items() if (t, d) == (target, defence)]
            if not mine:
                continue
            best = [row for (_, t, d), row in any_attack.items() if (t, d) == (target, defence)]
            gap = [row for row in mine if row.leakage > 1.02 * target]
            lines.append(
                (
                    f"{target:g}",
                    defence,
                    f"{_median([row.relative_change for row in mine]):.3g}",
                    f"{_median([row.predicted for row in mine]):.3g}",
                    *(
                        f"{_median([row.error for row in found]):.3g}" if settings.attacking else _NOT_RUN
                        for found in (mine, best)
                    ),
                    "cannot meet the target"
                    if len(gap) == len(mine)
                    else f"{_median([r.advantage for r in mine]):.3g}",
                    _number(
                        _median([_advantage_denoised(any_attack, r.image, target, defence) for r in mine])
                        if settings.attacking and len(gap) < len(mine)
                        else math.nan
                    ),
                )
            )
    shaped = [row for (_, _, defence), row in plain.items() if defence == "shaped"]
    worst = min((row.advantage for row in shaped if not math.isnan(row.advantage)), default=math.nan)
    images = {row.image for row in rows}
    over = f"Medians over {len(images)} images" if len(images) > 1 else "One image"
    return Summary(
        f"{over}. Change: norm of shared minus undefended update over that of the update. "
        f"{_MEANING[settings.attacking]} Shaped noise: least advantage of any image and target {worst:.3g}.",
        ("target", "defence", "change", "predicted error", "error", "with denoisers", "advantage", "with denoisers"),
        tuple(lines),
    )


def _draw(settings: NoiseSettings, rows: Sequence[NoiseRow], figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    plain, any_attack = _strongest(rows), _strongest(rows, denoisers=True)
    for index, defence in enumerate(_defences(settings)):
        mine = [row for (_, _, d), row in plain.items() if d == defence]
        left.scatter(
            [r.relative_change for r in mine], [r.error for r in mine], s=16, marker="osD^vPX"[index], label=defence
        )
        if defence in ("isotropic", "shaped", "white input"):
            for found, style in ((plain, "-"), (any_attack, ":")) if settings.attacking else ((plain, "-"),):
                errors = [
                    _median([r.error for (_, t, d), r in found.items() if (t, d) == (target, defence)])
                    for target in settings.targets
                ]
                label = defence + ("" if style == "-" else ", denoised")
                right.plot(
                    settings.targets, errors, style, marker="osD"[index], color=f"C{index}", markersize=4, label=label
                )
    predicted = [
        _median([r.predicted for r in rows if (r.target, r.defence) == (t, "isotropic")]) for t in settings.targets
    ]
    if settings.attacking:
        right.plot(settings.targets, predicted, color="black", linewidth=1, label="predicted")
    error = "rmse of the strongest attack" if settings.attacking else "rmse, predicted; no attack was run"
    left.set(xscale="log", xlabel="change of the update, relative", ylabel=error)
    plain_ticks(left.xaxis)
    right.set(xlabel="target leakage", ylabel=error)
    right.set_xticks(settings.targets, [f"{target:g}" for target in settings.targets])
    right.invert_xaxis()
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=7)


STUDY = Study(
    name="noise",
    settings=NoiseSettings,
    row=NoiseRow,
    key=("image", "target", "defence", "attack"),
    portions=_portions,
    summarize=_summarize,
    draw=_draw,
    figure_size=(9.6, 4.4),
)
