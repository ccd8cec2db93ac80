"""What protection costs in accuracy, at equal leakage over a whole run, in which every share of an example counts.

A federation whose clients hold `batch` examples each, and share the gradient of all of them in every round. Leakage is
of one example, whose rest of the batch the attacker knows, over all rounds together: the information of several shares
adds up, G_1/σ_1² + ... + G_T/σ_T² for isotropic noise, and T/h for input noise that is drawn anew in every round. Noise
on the input that is drawn once and kept leaks no more in many rounds than in one.

Isotropic noise moves the parameters to where gradients, and with them leakage, may be larger. So its σ_t follows the
run: in proportion to what one share would need at this round's parameters, by a factor that is sought until the leakage
of all rounds together, measured along the very run, is the target.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fl_privacy.attacks import GaussianPrior
from fl_privacy.audit.family import cheaper_family, relative_noise
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.operators import GramSum, MeanGram
from fl_privacy.influence.quadrature import eigenvalue_rule
from fl_privacy.influence.recommendation import recommend_noise
from fl_privacy.influence.rounding import rounded_off
from fl_privacy.influence.spectrum import Spectrum, dense_gram, estimate_spectrum
from fl_privacy.influence.update import GradientUpdate
from fl_privacy.reference import build_model, load_dataset
from fl_privacy.studies.results import Portion
from fl_privacy.studies.settings import Settings, option, relu_width_option
from fl_privacy.studies.study import Study, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = ("none", "isotropic", "shaped kept", "shaped fresh", "white kept", "pruning")
_SLACK = 1.02
"""Measured leakage over its target from which on an arm has missed it."""
_TRIES, _STEP = 14, 0.25
"""Most runs in search of the factor on isotropic noise, and the steps in its logarithm."""
_POINTS = (-2, -1, 0, 1, 2, 5, 10, 20, 40, 80)
"""Points of accuracy that are named in the figure."""
_FORMED = 1024
"""Elements of the largest input whose G is formed; of larger ones it is known by products, and leakage is sampled."""


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
    relu_width: float = relu_width_option()


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


@dataclass(frozen=True, eq=False)
class _Federation:
    settings: AccuracySettings
    seed: int

    @cached_property
    def data(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Private, public and test images with their labels."""
        data = load_dataset(self.settings.dataset, root=self.settings.data_root)
        private, public = self.settings.num_examples, max(512, self.settings.num_public)
        if len(data.train) < private + public // 2:
            raise InvalidInputError(f"expected at most {len(data.train) - public // 2} examples, got {private}")
        x, y = data.train.select(slice(0, private))
        px, py = data.train.select(slice(private, private + public))
        tx, ty = data.test.select(slice(0, 2000))
        return x, y, px, py, tx, ty

    @cached_property
    def model(self) -> nn.Module:
        data = load_dataset(self.settings.dataset, root=self.settings.data_root)
        torch.manual_seed(self.seed)
        return build_model(self.settings.model, input_shape=data.input_shape, num_classes=data.num_classes)

    @cached_property
    def prior(self) -> GaussianPrior:
        return GaussianPrior.from_examples(self.data[2].double())

    @cached_property
    def start(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def gradient(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Mean-loss gradient of all examples: the average over clients of one size."""

        def loss(params: dict[str, Tensor]) -> Tensor:
            outputs: Tensor = functional_call(self.model, params, (x,))
            return nn.functional.cross_entropy(outputs, y)

        result: dict[str, Tensor] = grad(loss)(params)
        return result

    def accuracy(self, params: dict[str, Tensor]) -> float:
        *_, x, y = self.data
        with torch.no_grad():
            outputs: Tensor = functional_call(self.model, params, (x,))
        return float((outputs.argmax(1) == y).double().mean())

    def audited(self, params: dict[str, Tensor]) -> _Share:
        """What one share at some parameters tells of the audited examples."""
        x, y, *_ = self.data
        chosen = slice(0, self.settings.num_audited)
        jacobian = self.jacobian(params, x[chosen], y[chosen])
        return _Share(jacobian, _formed(jacobian) if jacobian.input_dim <= _FORMED else None)

    def jacobian(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> UpdateJacobian:
        """Of the gradients of single examples."""
        update = rounded_off(GradientUpdate(self.model, nn.CrossEntropyLoss()), self.settings.relu_width)
        return UpdateJacobian(update, params, x[:, None], y[:, None])

    @cached_property
    def public_law(self) -> tuple[Spectrum, Tensor, Tensor]:
        """Spectrum, eigenvalues and eigenvectors of the public covariance, at the start."""
        _, _, x, y, _, _ = self.data
        n = self.settings.num_public
        jacobian = self.jacobian(self.start, x[:n], y[:n])
        gram = _formed(jacobian).mean(0)
        return _exact_spectrum(gram[None], MeanGram(jacobian).update_dim), *torch.linalg.eigh(gram)


@dataclass(frozen=True, eq=False)
class _Share:
    """G_t of the audited examples at one θ: by products, and formed `[n, D, D]` where inputs are small."""

    jacobian: UpdateJacobian
    gram: Tensor | None


def _formed(jacobian: UpdateJacobian) -> Tensor:
    return torch.stack([dense_gram(jacobian, unit) for unit in range(jacobian.num_units)])


def _exact_spectrum(gram: Tensor, update_dim: int) -> Spectrum:
    rule, (units, dim, _) = eigenvalue_rule(gram), gram.shape
    resolution = torch.finfo(torch.float32).eps * rule.largest
    return Spectrum(rule, rule, dim, update_dim, resolution, torch.full((units,), dim), exact=True)


def _together(shares: Sequence[_Share], noise_stds: Sequence[float]) -> Spectrum:
    """The spectrum of Σ_t G_t/σ_t²."""
    formed = [share.gram for share in shares if share.gram is not None]
    if formed:
        total = sum((gram / std**2 for gram, std in zip(formed, noise_stds, strict=True)), torch.zeros_like(formed[0]))
        return _exact_spectrum(total, sum(share.jacobian.update_dim for share in shares))
    return estimate_spectrum(GramSum([share.jacobian for share in shares], noise_stds=noise_stds))


def _train(
    federation: _Federation,
    num_rounds: int,
    generator: torch.Generator,
    *,
    target: float | None = None,
    factor: float = 0.0,
    dilution: float = 1.0,
    kept: Tensor | None = None,
    fresh: Tensor | None = None,
    pruned: tuple[int, int] | None = None,
) -> tuple[dict[str, Tensor], Spectrum | None]:
    """Returns the parameters after the last round and, with isotropic noise, the spectrum of the audited's Σ G_t/σ_t².

    Args:
        federation: Who trains.
        num_rounds: T.
        generator: Of all noise.
        target: Of isotropic noise, whose σ_t is `factor` times what a share needs for it at the parameters of round t.
        factor: On it.
        dilution: What becomes of the noise of a client of one example on the average of all clients.
        kept: Noise on the inputs `[M, D]`, drawn once.
        fresh: Root of the covariance of noise on the inputs `[D, D]`, drawn anew in every round.
        pruned: (batch size, entries that each client keeps).
    """
    settings = federation.settings
    x, y, *_ = federation.data
    params, velocity = federation.start, {name: torch.zeros_like(p) for name, p in federation.start.items()}
    at = torch.linspace(0, num_rounds - 1, min(settings.checkpoints, num_rounds)).round().long().tolist()
    shown: list[_Share] = []
    stds: list[float] = []
    for t in range(num_rounds):
        if target is not None and t in at:
            shown.append(federation.audited(params))
            stds.append(factor * _noise_for(_together(shown[-1:], [1.0]), target, federation.prior.std))
        noise_std = dilution * stds[-1] if stds else 0.0
        inputs = x
        if kept is not None:
            inputs = x + kept.reshape(x.shape)
        if fresh is not None:
            z = torch.randn(len(x), len(fresh), generator=generator)
            inputs = x + (z @ fresh).reshape(x.shape)
        gradient = (
            federation.gradient(params, inputs, y)
            if pruned is None
            else _pruned_gradient(federation, params, inputs, y, *pruned)
        )
        for name, g in gradient.items():
            noisy = g + noise_std * torch.randn(g.shape, generator=generator) if noise_std else g
            velocity[name] = settings.momentum * velocity[name] + noisy
        params = {name: p - settings.lr * velocity[name] for name, p in params.items()}
    if target is None:
        return params, None
    return params, _together(shown, [weight**-0.5 for weight in _interpolated_weights(stds, at)])


def _interpolated_weights(stds: list[float], at: list[int]) -> list[float]:
    """Of the G_t at some rounds in Σ_t G_t/σ_t² over all: between them G_t is interpolated, and σ_t kept."""
    weights = [0.0] * len(at)
    for index, (first, last) in enumerate(pairwise(at)):
        for t in range(first, last):
            beyond = (t - first) / (last - first)
            weights[index] += (1 - beyond) / stds[index] ** 2
            weights[index + 1] += beyond / stds[index] ** 2
    weights[-1] += 1 / stds[-1] ** 2
    return weights


def _pruned_gradient(
    federation: _Federation, params: dict[str, Tensor], x: Tensor, y: Tensor, batch: int, entries: int
) -> dict[str, Tensor]:
    """Average over clients of their gradients, of each only its largest entries."""

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs: Tensor = functional_call(federation.model, params, (x,))
        return nn.functional.cross_entropy(outputs, y)

    clients = len(x) // batch
    xs, ys = x[: clients * batch].reshape(clients, batch, *x.shape[1:]), y[: clients * batch].reshape(clients, batch)
    total: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in params.items()}
    for chunk in torch.split(torch.arange(clients), 128):
        each = vmap(grad(loss), in_dims=(None, 0, 0))(params, xs[chunk], ys[chunk])
        flat = torch.cat([g.flatten(1) for g in each.values()], 1)
        if entries < flat.shape[1]:
            floor = flat.abs().topk(entries, dim=1).values[:, -1:]
            flat = torch.where(flat.abs() >= floor, flat, 0.0)
        for (name, p), part in zip(
            params.items(), torch.split(flat.sum(0), [p.numel() for p in params.values()]), strict=True
        ):
            total[name] += part.reshape(p.shape) / clients
    return total


def _leakage(spectrum: Spectrum, noise_std: float, tau: float) -> float:
    """Of the audited examples, mean."""
    return float(spectrum.leakage(noise_std, tau).value.mean())


def _noise_for(spectrum: Spectrum, target: float, tau: float) -> float:
    """The σ of a client of one example at which the audited ones leak the target on average, over all rounds."""
    low, high = -40.0, 40.0
    for _ in range(100):
        middle = (low + high) / 2
        leaks = _leakage(spectrum, math.exp(middle), tau) > target
        low, high = (middle, high) if leaks else (low, middle)
    return math.exp(high)


def _portions(settings: AccuracySettings) -> Iterator[Portion[AccuracyRow]]:
    if max(settings.targets) >= 1:
        raise InvalidInputError(f"expected targets below 1, got {settings.targets}")
    if max(settings.batch_sizes) > settings.num_examples:
        raise InvalidInputError(f"expected batches of at most {settings.num_examples}, got {settings.batch_sizes}")
    for seed in range(settings.num_seeds):
        federation = _Federation(settings, seed)
        for num_rounds in settings.rounds:
            keys = [(batch, num_rounds, 1.0, "none", seed) for batch in settings.batch_sizes]
            keys += [
                (batch, num_rounds, target, arm, seed)
                for batch in settings.batch_sizes
                for target in settings.targets
                for arm in ARMS[1:]
            ]
            yield Portion(keys, partial(_rows, federation, num_rounds))


def _rows(federation: _Federation, num_rounds: int) -> Iterator[AccuracyRow]:
    settings, tau = federation.settings, federation.prior.std
    generator = torch.Generator().manual_seed(1_000_003 * federation.seed + num_rounds)
    params, _ = _train(federation, num_rounds, generator)
    x, y, *_ = federation.data
    start = _together([federation.audited(federation.start)], [1.0])
    undefended = _leakage(start, 1e-6, tau)
    mean = federation.gradient(federation.start, x, y)
    norm = math.sqrt(sum(float(g.square().sum()) for g in mean.values()))
    update_dim = sum(g.numel() for g in mean.values())

    def row(batch: int, target: float, arm: str, accuracy: float, leakage: float, strength: float) -> AccuracyRow:
        return AccuracyRow(
            batch_size=batch,
            num_rounds=num_rounds,
            target=target,
            arm=arm,
            seed=federation.seed,
            accuracy=accuracy,
            leakage=leakage,
            strength=strength,
            relative_noise=math.nan
            if target == 1
            else relative_noise(
                _noise_for(start, target, tau) / batch,
                update_dim=update_dim,
                average_norm=norm,
                num_clients=settings.num_examples // batch,
                shares=1,
            ),
        )

    # An example of a batch of N has J/N, and the average over clients divides their noise by the root of their number.
    dilution_of = {batch: 1 / batch / math.sqrt(settings.num_examples // batch) for batch in settings.batch_sizes}
    for batch in settings.batch_sizes:
        yield row(batch, 1.0, "none", federation.accuracy(params), undefended, 0.0)
    for target in settings.targets:
        for arm, accuracy, strength, leakage in _on_inputs(federation, num_rounds, target, generator):
            for batch in settings.batch_sizes:
                yield row(batch, target, arm, accuracy, leakage, strength)
        for batch in settings.batch_sizes:
            yield row(
                batch, target, "isotropic", *_isotropic(federation, num_rounds, target, batch, dilution_of[batch])
            )
            yield row(batch, target, "pruning", *_pruning(federation, num_rounds, target, batch, generator))


def _on_inputs(
    federation: _Federation, num_rounds: int, target: float, generator: torch.Generator
) -> Iterator[tuple[str, float, float, float]]:
    """Arm, accuracy, rms of the noise and total leakage of noise on the inputs."""
    tau, (spectrum, eigenvalues, vectors) = federation.prior.std, federation.public_law
    law = recommend_noise(spectrum, target_leakage=target, prior_std=tau)
    variances = law.variance(eigenvalues.clamp(min=0)[None])[0]
    root = (vectors @ torch.diag(variances.sqrt()) @ vectors.T).float()
    examples, dim = len(federation.data[0]), len(root)
    white = float(law.white_std)
    shaped_leakage = float((tau**2 / (tau**2 + variances)).mean())
    z = torch.randn(examples, dim, generator=generator)
    for arm, noise, leakage in (("shaped kept", z @ root, shaped_leakage), ("white kept", white * z, target)):
        params, _ = _train(federation, num_rounds, generator, kept=noise)
        yield arm, federation.accuracy(params), float(noise.square().mean().sqrt()), leakage
    # T independent draws of variance T·h tell as much as one of variance h.
    params, _ = _train(federation, num_rounds, generator, fresh=math.sqrt(num_rounds) * root)
    yield (
        "shaped fresh",
        federation.accuracy(params),
        math.sqrt(num_rounds) * float(variances.mean().sqrt()),
        shaped_leakage,
    )


def _isotropic(
    federation: _Federation, num_rounds: int, target: float, batch: int, dilution: float
) -> tuple[float, float, float]:
    """Accuracy, leakage along the very run, and σ of a client in its first round."""
    tau, seed = federation.prior.std, 1_000_003 * federation.seed + 7 * num_rounds
    first = _noise_for(_together([federation.audited(federation.start)], [1.0]), target, tau)

    def run(log_factor: float) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(seed)  # the same noise but for its size
        factor = math.exp(log_factor)
        params, followed = _train(federation, num_rounds, generator, target=target, factor=factor, dilution=dilution)
        assert followed is not None
        return federation.accuracy(params), _leakage(followed, 1.0, tau)

    # Upwards to the first factor that meets the target: beyond it, noise may ruin the model, and leakage with it grow.
    tried: list[tuple[float, float, float]] = []
    at, low, high = math.log(num_rounds) / 2 - _STEP, -math.inf, math.inf
    for _ in range(_TRIES):
        accuracy, leakage = run(at)
        tried.append((at, accuracy, leakage))
        if abs(leakage / target - 1) < 0.01:
            break
        low, high = (at, high) if leakage > target else (low, at)
        at = at + _STEP if high == math.inf else at - _STEP if low == -math.inf else (low + high) / 2
    at, accuracy, leakage = min(tried, key=lambda run: abs(math.log(run[2] / target)))
    return accuracy, leakage, math.exp(at) * first / batch


def _pruning(
    federation: _Federation, num_rounds: int, target: float, batch: int, generator: torch.Generator
) -> tuple[float, float, float]:
    """Accuracy, leakage and share kept: E exact entries a round determine E·T of the batch's N·D numbers."""
    dim, update_dim = federation.prior.mean.numel(), sum(p.numel() for p in federation.start.values())
    entries = int(target * dim * batch / num_rounds)
    if entries < 1:
        return math.nan, math.nan, 0.0
    params, _ = _train(federation, num_rounds, generator, pruned=(batch, entries))
    return federation.accuracy(params), entries * num_rounds / (dim * batch), entries / update_dim


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
        if row.leakage <= _SLACK * target and (held is None or row.accuracy > held.accuracy):
            best[row.seed] = row
    met = [row for row in best.values() if row is not None]
    return met if len(met) == len(best) else ()


def _mean(rows: Sequence[AccuracyRow]) -> float:
    return sum(row.accuracy for row in rows) / len(rows) if rows else math.nan


def _recommended(rows: Sequence[AccuracyRow], target: float) -> str:
    """The arm that the library's estimate picks in a cell."""
    relative = statistics.median(row.relative_noise * math.sqrt(row.num_rounds) for row in rows)
    return "isotropic" if cheaper_family(relative, target_leakage=target) == "isotropic" else "shaped kept"


@dataclass(frozen=True)
class _Verdict:
    """A cell of the map: mean accuracy by arm, NaN where the arm cannot meet the target."""

    means: dict[str, float]
    recommended: str

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
                found[batch, num_rounds, target] = _Verdict(means, _recommended(mine["isotropic"], target))
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
        lines.append((*cell, verdict.recommended, behind))
    close = sum(verdict.behind <= 1 for verdict in verdicts.values())
    seeds = len({row.seed for row in rows})
    return Summary(
        f"Accuracy after the last round, {'one seed' if seeds == 1 else f'mean of {seeds} seeds'}, at equal leakage of "
        "an example over all rounds; of isotropic noise, the most accurate run that leaks no more. –: the arm cannot "
        f"meet the target: every run leaks over {_SLACK - 1:.0%} more, or no entry of the update may be kept. Best "
        "protected arm: "
        f"{', '.join(f'{arm} {count}' for arm, count in wins.items() if count)} of {len(lines)} cells. The recommended "
        f"one is within one point of the best in {close} of them; behind: points of accuracy.",
        ("rounds", "batch", "target", *ARMS, "best", "recommended", "behind"),
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
