"""What protection costs in accuracy, at equal leakage over a whole run, in which every share of an example counts.

A federation whose clients hold `batch` examples each, and share the gradient of all of them in every round
(`fl_privacy.rehearsal`). Noise on the input that is drawn once and kept leaks no more in many rounds than in one; drawn
anew in every round it has the information T/h. Where the rule that picks a family is not sure of itself, a rehearsal on
public images (`--rehearse`) decides in its place, and the map says whether it was right.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import grad, vmap

from fl_privacy.attacks import GaussianPrior
from fl_privacy.audit.family import cheaper_family, is_sure, relative_noise
from fl_privacy.errors import InvalidInputError
from fl_privacy.reference import ImageData, build_model, load_dataset
from fl_privacy.rehearsal.federation import Federation, Parameters, mean_leakage, noise_for
from fl_privacy.rehearsal.outcome import (
    MET,
    Outcome,
    fresh_outcome,
    input_law,
    isotropic_outcome,
    kept_outcome,
)
from fl_privacy.rehearsal.rehearse import RehearsedFamily, rehearsed_outcomes
from fl_privacy.studies.results import Portion
from fl_privacy.studies.settings import Settings, option, relu_width_option
from fl_privacy.studies.study import Study, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = ("none", "isotropic", "shaped kept", "shaped fresh", "white kept", "pruning")
_ARM_OF: Mapping[RehearsedFamily, str] = MappingProxyType(
    {"shaped": "shaped kept", "white": "white kept", "isotropic": "isotropic"}
)
REHEARSED: Mapping[RehearsedFamily, str] = MappingProxyType(
    {family: f"rehearsed {arm}" for family, arm in _ARM_OF.items()}
)
"""Arms on public images, by the family that they speak for."""
_TESTED = 2000
"""Images on which accuracy is told, at most."""
_POINTS = (-2, -1, 0, 1, 2, 5, 10, 20, 40, 80)
"""Points of accuracy that are named in the figure."""


@dataclass(frozen=True, kw_only=True)
class AccuracySettings(Settings):
    """A federation, and how it is protected."""

    dataset: str = option("digits", "digits, mnist, fashion-mnist, cifar10 or folder.")
    data_root: str = option("data", "Where the data set's files are.", recorded=False)
    model: str = option("digitsnet", "linear, mlp, lenet, digitsnet, resnet8, resnet18 or vit.")
    num_examples: int = option(512, "Private examples of all clients together.", minimum=1)
    batch_sizes: tuple[int, ...] = option((1, 4, 32), "Examples per client.", minimum=1)
    rounds: tuple[int, ...] = option((10, 100), "Rounds of a run.", minimum=1)
    targets: tuple[float, ...] = option((0.75, 0.5, 0.3, 0.1), "Leakage of an example over the whole run.", above=0)
    lr: float = option(0.5, "Server's learning rate.", above=0)
    momentum: float = option(0.9, "Server's momentum.", minimum=0)
    num_public: int = option(8, "Public examples that shape the noise.", minimum=1)
    num_audited: int = option(4, "Examples whose leakage over the run is followed.", minimum=1)
    checkpoints: int = option(10, "Rounds at which it is followed; those between are interpolated.", minimum=2)
    num_seeds: int = option(3, "Repetitions of noise and initialization.", minimum=1)
    redraw_images: bool = option(
        False, "Begin each repetition's images where the last one's private ones end; those tested on stay."
    )
    relu_width: float = relu_width_option()
    rehearse: bool = option(False, "Rehearse on public images where the rule is not sure of itself.", recorded=False)


@dataclass(frozen=True, kw_only=True)
class AccuracyRow:
    """One run."""

    batch_size: int
    num_rounds: int
    target: float
    """1 for the run without protection."""
    arm: str
    seed: int
    accuracy: float
    """On the test set, after the last round; NaN where the arm cannot meet the target."""
    leakage: float
    """Of the audited examples over the whole run, mean: measured along this very run for isotropic noise, by the law
    for noise on the input. An arm of which it is not the target could not meet it."""
    strength: float
    """σ per parameter of a client's update in the first round; rms of the noise on the input; share of entries kept."""
    relative_noise: float
    """Noise that one share would need at the start, on the average of all clients, over the norm of that average."""


def _federation(settings: AccuracySettings, data: ImageData, seed: int, *, rehearsed: bool = False) -> Federation:
    """Returns the federation of one seed.

    Args:
        settings: Of the study. The number of rounds is that of its first.
        data: The data set of the settings.
        seed: Of the initialization; and where images are redrawn, of the place in the data set where they begin, for
            each seed where the private ones of the last end.
        rehearsed: Whether public images train in place of private ones, and others of them are tested on.
    """
    private, public = settings.num_examples, max(512, settings.num_public)
    if len(data.train) < private + public // 2:
        raise InvalidInputError(f"expected at most {len(data.train) - public // 2} examples, got {private}")
    order = torch.arange(len(data.train)).roll(-seed * private if settings.redraw_images else 0)
    x, y = data.train.select(order[private : private + public])
    shaping, prior = (x[: settings.num_public], y[: settings.num_public]), GaussianPrior.from_examples(x.double())
    trained = data.train.select(order[:private])
    tested = data.test.select(slice(0, _TESTED))
    if rehearsed:
        trained = x[settings.num_public :], y[settings.num_public :]
        tested = data.train.select(order[private + public : private + public + _TESTED])
        if min(len(tested[0]), len(trained[0])) < max(32, settings.num_audited):
            raise InvalidInputError(f"expected public images enough to rehearse on, got {len(x)} and {len(tested[0])}")
    torch.manual_seed(seed)
    return Federation(
        model=build_model(settings.model, input_shape=data.input_shape, num_classes=data.num_classes),
        private=trained,
        public=shaping,
        test=tested,
        prior=prior,
        num_rounds=settings.rounds[0],
        lr=settings.lr,
        momentum=settings.momentum,
        num_audited=settings.num_audited,
        checkpoints=settings.checkpoints,
        relu_width=settings.relu_width,
    )


def _pruned_gradient(
    federation: Federation, batch: int, entries: int, params: Parameters, x: Tensor, y: Tensor
) -> Parameters:
    """Average over clients of their gradients, of each only its largest entries."""
    clients = len(x) // batch
    xs, ys = x[: clients * batch].reshape(clients, batch, *x.shape[1:]), y[: clients * batch].reshape(clients, batch)
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    for chunk in torch.split(torch.arange(clients), 128):
        each = vmap(grad(federation.loss), in_dims=(None, 0, 0))(params, xs[chunk], ys[chunk])
        flat = torch.cat([g.flatten(1) for g in each.values()], 1)
        if entries < flat.shape[1]:
            floor = flat.abs().topk(entries, dim=1).values[:, -1:]
            flat = torch.where(flat.abs() >= floor, flat, 0.0)
        for (name, p), part in zip(
            params.items(), torch.split(flat.sum(0), [p.numel() for p in params.values()]), strict=True
        ):
            total[name] += part.reshape(p.shape) / clients
    return total


def _portions(settings: AccuracySettings) -> Iterator[Portion[AccuracyRow]]:
    if max(settings.targets) >= 1:
        raise InvalidInputError(f"expected targets below 1, got {settings.targets}")
    if max(settings.batch_sizes) > settings.num_examples:
        raise InvalidInputError(f"expected batches of at most {settings.num_examples}, got {settings.batch_sizes}")
    data = load_dataset(settings.dataset, root=settings.data_root)
    federations = [_federation(settings, data, seed) for seed in range(settings.num_seeds)]
    for seed, federation in enumerate(federations):
        for num_rounds in settings.rounds:
            keys = [(batch, num_rounds, 1.0, "none", seed) for batch in settings.batch_sizes]
            keys += [
                (batch, num_rounds, target, arm, seed)
                for batch in settings.batch_sizes
                for target in settings.targets
                for arm in ARMS[1:]
            ]
            yield Portion(keys, partial(_rows, settings, federation, seed, num_rounds))
    if settings.rehearse:
        for num_rounds, batch, target in _unsure(settings, federations):
            for seed in range(settings.num_seeds):
                keys = [(batch, num_rounds, target, arm, seed) for arm in REHEARSED.values()]
                yield Portion(keys, partial(_rehearsed_rows, settings, data, seed, num_rounds, batch, target))


def _unsure(settings: AccuracySettings, federations: Sequence[Federation]) -> Iterator[tuple[int, int, float]]:
    """Yields rounds, batch size and target of the cells in which a rehearsal is to decide."""
    for target in _ordered(settings):
        for num_rounds, batch in product(settings.rounds, settings.batch_sizes):
            clients = settings.num_examples // batch
            quotients = [_quotient(federation, target, batch, clients) for federation in federations]
            relative = statistics.median(quotients) * math.sqrt(num_rounds)
            if not is_sure(relative, target_leakage=target):
                yield num_rounds, batch, target


def _quotient(federation: Federation, target: float, batch: int, num_clients: int) -> float:
    """Returns the noise that one share would need at the start, on the average of all clients, over its norm."""
    mean = federation.gradient(federation.start, *federation.private)
    return relative_noise(
        noise_for(federation.start_spectrum, target, federation.prior.std) / batch,
        update_dim=sum(g.numel() for g in mean.values()),
        average_norm=math.sqrt(sum(float(g.square().sum()) for g in mean.values())),
        num_clients=num_clients,
        shares=1,
    )


def _rows(settings: AccuracySettings, base: Federation, seed: int, num_rounds: int) -> Iterator[AccuracyRow]:
    federation = replace(base, num_rounds=num_rounds)
    generator = torch.Generator().manual_seed(1_000_003 * seed + num_rounds)
    row = partial(_row, settings, seed, num_rounds)
    undefended = mean_leakage(federation.start_spectrum, 1e-6, federation.prior.std)
    clean = Outcome(accuracy=federation.accuracy(federation.train()), leakage=undefended, strength=0.0)
    quotients = {
        (batch, target): _quotient(federation, target, batch, settings.num_examples // batch)
        for batch in settings.batch_sizes
        for target in settings.targets
    }
    for batch in settings.batch_sizes:
        yield row(batch, 1.0, "none", clean, math.nan)
    for target in settings.targets:
        for arm, outcome in _on_inputs(federation, target, generator):
            for batch in settings.batch_sizes:
                yield row(batch, target, arm, outcome, quotients[batch, target])
        for batch in settings.batch_sizes:
            isotropic = isotropic_outcome(
                federation,
                target,
                num_clients=settings.num_examples // batch,
                batch=batch,
                seed=1_000_003 * seed + 7 * num_rounds,
            )
            yield row(batch, target, "isotropic", isotropic, quotients[batch, target])
            yield row(batch, target, "pruning", _pruning(federation, target, batch), quotients[batch, target])


def _row(
    settings: AccuracySettings,
    seed: int,
    num_rounds: int,
    batch: int,
    target: float,
    arm: str,
    outcome: Outcome,
    quotient: float,
) -> AccuracyRow:
    return AccuracyRow(
        batch_size=batch,
        num_rounds=num_rounds,
        target=target,
        arm=arm,
        seed=seed,
        accuracy=outcome.accuracy,
        leakage=outcome.leakage,
        strength=outcome.strength,
        relative_noise=quotient,
    )


def _rehearsed_rows(
    settings: AccuracySettings, data: ImageData, seed: int, num_rounds: int, batch: int, target: float
) -> Iterator[AccuracyRow]:
    federation = replace(_federation(settings, data, seed, rehearsed=True), num_rounds=num_rounds)
    clients = settings.num_examples // batch
    quotient = _quotient(federation, target, batch, clients)
    found = rehearsed_outcomes(federation, target, num_clients=clients, batch=batch, seed=seed)
    for family, outcome in found:
        yield _row(settings, seed, num_rounds, batch, target, REHEARSED[family], outcome, quotient)


def _on_inputs(federation: Federation, target: float, generator: torch.Generator) -> Iterator[tuple[str, Outcome]]:
    """Arm and outcome of noise on the inputs."""
    law = input_law(federation, target)
    z = torch.randn(len(federation.private[0]), len(law.root), generator=generator)
    yield "shaped kept", kept_outcome(federation, z @ law.root, law.shaped_leakage)
    yield "white kept", kept_outcome(federation, law.white_std * z, target)
    yield "shaped fresh", fresh_outcome(federation, law, generator)


def _pruning(federation: Federation, target: float, batch: int) -> Outcome:
    """What becomes of a run in which E exact entries a round determine E·T of the batch's N·D numbers."""
    dim, update_dim = federation.prior.mean.numel(), sum(p.numel() for p in federation.start.values())
    entries = int(target * dim * batch / federation.num_rounds)
    if entries < 1:
        return Outcome(accuracy=math.nan, leakage=math.nan, strength=0.0)
    params = federation.train(gradient=partial(_pruned_gradient, federation, batch, entries))
    return Outcome(
        accuracy=federation.accuracy(params),
        leakage=entries * federation.num_rounds / (dim * batch),
        strength=entries / update_dim,
    )


def _cells(
    settings: AccuracySettings, rows: Sequence[AccuracyRow]
) -> dict[tuple[int, int, float, str], list[AccuracyRow]]:
    cells: dict[tuple[int, int, float, str], list[AccuracyRow]] = {}
    for row in rows:
        cells.setdefault((row.batch_size, row.num_rounds, row.target, row.arm), []).append(row)
    return cells


def _meeting(rows: Sequence[AccuracyRow], target: float) -> Sequence[AccuracyRow]:
    """Of each seed the run that is as accurate as any that leaks no more than the target; none where a seed has none.

    Leakage along a run with isotropic noise is no monotone function of the noise, so that the search for a lower target
    may come upon less noise than that for a higher one: what meets the lower one meets this one, too.
    """
    best: dict[int, AccuracyRow | None] = dict.fromkeys(row.seed for row in rows)
    for row in rows:
        held = best[row.seed]
        if row.leakage <= MET * target and (held is None or row.accuracy > held.accuracy):
            best[row.seed] = row
    met = [row for row in best.values() if row is not None]
    return met if len(met) == len(best) else ()


def _mean(rows: Sequence[AccuracyRow]) -> float:
    return sum(row.accuracy for row in rows) / len(rows) if rows else math.nan


def _recommended(
    cells: Mapping[tuple[int, int, float, str], Sequence[AccuracyRow]], cell: tuple[int, int, float]
) -> tuple[str, bool]:
    """The arm that the library picks in a cell, and whether by a rehearsal; where there is none, by its rule."""
    batch, num_rounds, target = cell
    rehearsed = {family: cells.get((*cell, arm), ()) for family, arm in REHEARSED.items()}
    if all(rehearsed.values()):
        means = {family: _mean(_meeting(rows, target)) for family, rows in rehearsed.items()}
        family = max(means, key=lambda family: -1.0 if math.isnan(means[family]) else means[family])
        return _ARM_OF[family], True
    rows = cells[batch, num_rounds, target, "isotropic"]
    relative = statistics.median(row.relative_noise * math.sqrt(row.num_rounds) for row in rows)
    return _ARM_OF[cheaper_family(relative, target_leakage=target)], False


@dataclass(frozen=True)
class _Verdict:
    """A cell of the map: mean accuracy by arm, NaN where the arm cannot meet the target."""

    means: dict[str, float]
    recommended: str
    rehearsed: bool

    @property
    def best(self) -> str:
        return max(self.means, key=lambda arm: -1.0 if math.isnan(self.means[arm]) else self.means[arm])

    @property
    def behind(self) -> float:
        """Points of accuracy by which the recommended arm is behind the best one."""
        return 100 * (self.means[self.best] - self.means[self.recommended])


def _ordered(settings: AccuracySettings) -> list[float]:
    return sorted(settings.targets, reverse=True)


def _verdicts(settings: AccuracySettings, rows: Sequence[AccuracyRow]) -> dict[tuple[int, int, float], _Verdict]:
    cells, found = _cells(settings, rows), {}
    for num_rounds in settings.rounds:
        for batch in settings.batch_sizes:
            for target in _ordered(settings):
                mine = {arm: cells.get((batch, num_rounds, target, arm), []) for arm in ARMS[1:]}
                if not all(mine.values()):
                    continue  # of a study that is not complete
                means = {arm: _mean(_meeting(of_arm, target)) for arm, of_arm in mine.items()}
                searched = [
                    row for at in settings.targets for row in cells.get((batch, num_rounds, at, "isotropic"), [])
                ]
                means["isotropic"] = _mean(_meeting(searched, target))
                found[batch, num_rounds, target] = _Verdict(
                    means,
                    *_recommended(cells, (batch, num_rounds, target)),
                )
    return found


def _summarize(settings: AccuracySettings, rows: Sequence[AccuracyRow]) -> Summary:
    cells, verdicts = _cells(settings, rows), _verdicts(settings, rows)
    lines, wins = [], dict.fromkeys(ARMS[1:], 0)
    for (batch, num_rounds, target), verdict in verdicts.items():
        wins[verdict.best] += 1
        shown = ["–" if math.isnan(value) else f"{value:.3f}" for value in verdict.means.values()]
        clean = f"{_mean(cells.get((batch, num_rounds, 1.0, 'none'), [])):.3f}"
        behind = "–" if math.isnan(verdict.behind) else f"{verdict.behind:.1f}"
        cell = (str(num_rounds), str(batch), f"{target:g}", clean, *shown, verdict.best)
        by = "rehearsal" if verdict.rehearsed else "rule"
        lines.append((*cell, verdict.recommended, by, behind))
    close = sum(verdict.behind <= 1 for verdict in verdicts.values())
    seeds = len({row.seed for row in rows})
    return Summary(
        f"Accuracy after the last round, {'one seed' if seeds == 1 else f'mean of {seeds} seeds'}, at equal leakage of "
        "an example over all rounds; of isotropic noise, the most accurate run that leaks no more. –: the arm cannot "
        f"meet the target: every run leaks over {MET - 1:.0%} more, or no entry of the update may be kept. Best "
        "protected arm: "
        f"{', '.join(f'{arm} {count}' for arm, count in wins.items() if count)} of {len(lines)} cells. The recommended "
        f"one is within one point of the best in {close} of them; behind: points of accuracy.",
        ("rounds", "batch", "target", *ARMS, "best", "recommended", "by", "behind"),
        tuple(lines),
    )


def _draw(settings: AccuracySettings, rows: Sequence[AccuracyRow], figure: Figure) -> None:
    cells, verdicts = _cells(settings, rows), _verdicts(settings, rows)
    batches, targets = sorted(settings.batch_sizes), _ordered(settings)
    axes = figure.subplots(len(settings.rounds), len(batches), sharex=True, sharey=True, squeeze=False)
    alone = len(targets) == 1
    for down, num_rounds in enumerate(settings.rounds):
        for across, batch in enumerate(batches):
            axis = axes[down][across]
            clean = _mean(cells.get((batch, num_rounds, 1.0, "none"), []))
            axis.axhspan(-1, 1, color="black", alpha=0.08, linewidth=0)
            axis.axhline(0, color="black", linewidth=1, label="no protection")
            mine = [verdicts.get((batch, num_rounds, target)) for target in targets]
            for index, arm in enumerate(ARMS[1:]):
                lost = [math.nan if verdict is None else 100 * (clean - verdict.means[arm]) for verdict in mine]
                # Side by side, as arms of the same accuracy would hide each other.
                at = [place + (index if alone else 0.08 * (index - 2)) for place in range(len(targets))]
                axis.plot(at, lost, marker="osD^v"[index], markersize=4, linewidth=0.8, label=arm)
                chosen = [
                    (x, y) for x, y, v in zip(at, lost, mine, strict=True) if v is not None and v.recommended == arm
                ]
                if chosen:
                    style = {"markersize": 11, "fillstyle": "none", "color": "black", "linestyle": ""}
                    axis.plot(*zip(*chosen, strict=True), marker="o", label="recommended", **style)
            axis.set(title=f"{num_rounds} rounds, batch {batch}")
            axis.set_yscale("symlog", linthresh=2, linscale=1)
            axis.set_yticks(_POINTS, [f"{points:g}" for points in _POINTS])
            axis.minorticks_off()
            if alone:
                axis.set_xticks(range(len(ARMS) - 1), ARMS[1:], rotation=30, ha="right")
            else:
                axis.set_xticks(range(len(targets)), [f"{target:g}" for target in targets])
    axes[0][0].invert_yaxis()
    handles, labels = axes[0][0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=7, frameon=False, fontsize=8)
    leakage = "leakage of an example over the whole run"
    figure.supxlabel(f"{leakage}: {targets[0]:g}" if alone else leakage)
    figure.supylabel("points of accuracy below no protection")


STUDY = Study(
    name="noise-accuracy",
    settings=AccuracySettings,
    row=AccuracyRow,
    key=("batch_size", "num_rounds", "target", "arm", "seed"),
    portions=_portions,
    summarize=_summarize,
    draw=_draw,
    figure_size=(9.6, 4.4),
)
