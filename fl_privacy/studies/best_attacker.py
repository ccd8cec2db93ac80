"""The least error that any attacker can reach, by sampling his posterior, beside what is predicted for him.

Inputs are drawn from the prior itself, so that the mean of the posterior p(x | shared) is the best reconstruction there
is, whatever an attacker does, and each truth is an exact draw of its posterior: Markov chains that begin there need not
find anything.

Chains need not have moved through all of the posterior to say what no attacker can do. Over stationary starts of a
reversible chain, the part of its spectrum at λ adds to the expected squared distance from the start to the mean of the
first T states

    1 + v − 2c = 1 − (1 + (2/T)·Σ t·λᵗ)/T ≤ 1,    as Σ t·λᵗ ≥ −T/2 for |λ| ≤ 1,    t = 1 … T − 1,

times its share of the posterior's variance, v being the variance of that mean and c its covariance with the start. In
expectation the mean therefore errs no more than the best attacker, and as much once the chain has forgotten its start:
a prediction below that is below any attacker's error. (Steps are shaped by J at the truth and sized by a pilot from
there, which the argument does not allow for.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fl_privacy.attacks import AttackProblem, GaussianPrior, IsotropicNoise
from fl_privacy.audit.settings import RELU_WIDTH
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.rounding import rounded_off
from fl_privacy.influence.spectrum import estimate_spectrum
from fl_privacy.influence.update import GradientUpdate, UpdateMap
from fl_privacy.reference import build_model
from fl_privacy.studies.results import Portion
from fl_privacy.studies.scene import groups
from fl_privacy.studies.settings import Settings, option
from fl_privacy.studies.study import Study, Summary
from fl_privacy.ticks import plain_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Network = Literal["tanh", "gelu", "relu", "resnet8", "resnet18"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "gelu": nn.GELU, "relu": nn.ReLU}
_SMOOTH = ("tanh", "gelu")
_CHANNELS, _CLASSES = 6, 3
_PILOT = 0.25
"""Steps of the chains that find the size of steps, as a share of those that are counted."""
_ACCEPTED = 0.25
"""Share of proposals that the size of steps is adapted to."""


@dataclass(frozen=True, kw_only=True)
class BestAttackerSettings(Settings):
    """Inputs drawn from the prior, behind three 3×3 convolutions of six channels and a linear layer, or a ResNet."""

    networks: tuple[Network, ...] = option(
        ("tanh", "relu"), "Networks: resnet8, resnet18, or the activation of three convolutions."
    )
    noise_stds: tuple[float, ...] = option((1e-3, 1e-2, 3e-2), "Noise levels, standard deviation.", above=0)
    side: int = option(4, "Height and width of the inputs.", minimum=2)
    num_inputs: int = option(32, "Inputs, each with noise of its own.", minimum=2)
    prior_std: float = option(0.5, "Standard deviation of the inputs.", above=0)
    num_chains: int = option(4, "Markov chains for each input.", minimum=1)
    steps: int = option(4500, "Steps of each; a quarter as many before them find their size.", minimum=8)
    width: float = option(RELU_WIDTH, "Width of rounded ReLUs, relative to what they see; default: as audits.", above=0)
    seed: int = option(0, "Of everything.", minimum=0)
    inputs_at_once: int = option(
        32, "Inputs whose chains run side by side: memory grows with them.", minimum=1, recorded=False
    )


@dataclass(frozen=True, kw_only=True)
class BestAttackerRow:
    """One input behind one noisy gradient; errors are root mean squares per input element."""

    network: str
    noise_std: float
    input: int
    error: float
    """Of the mean of a chain, root mean square over the chains: in expectation no more than the best attacker's."""
    half_error: float
    """The same of the first half of each. A chain to which that makes a difference has not come to rest."""
    predicted: float
    """By the network's own Jacobian."""
    audited: float
    """By that with the ReLUs rounded off, as an audit takes it."""
    accepted: float
    """Share of the chains' proposals that were accepted."""


def _portions(settings: BestAttackerSettings) -> Iterator[Portion[BestAttackerRow]]:
    for network in settings.networks:
        for noise_std in settings.noise_stds:
            for group in groups(settings.num_inputs, settings.inputs_at_once):
                keys = [(network, noise_std, index) for index in group]
                yield Portion(keys, partial(_rows, settings, network, noise_std, group))


def _rows(
    settings: BestAttackerSettings, network: str, noise_std: float, group: list[int]
) -> Iterator[BestAttackerRow]:
    update, params = _network(network, settings)
    generators = [torch.Generator().manual_seed(1_000_003 * settings.seed + index) for index in group]
    shape = (1, 1, settings.side, settings.side)
    x = settings.prior_std * _normal(shape, generators)
    labels = torch.stack([torch.randint(_CLASSES, (1,), generator=generator) for generator in generators])
    jacobian = UpdateJacobian(update, params, x, labels)
    shared = jacobian.update()
    shared += noise_std * _normal(shared.shape[1:], generators)
    smooth = UpdateJacobian(rounded_off(update, settings.width), params, x, labels)
    predicted, audited = (
        estimate_spectrum(taken, max_steps=settings.side**2).rmse(noise_std, settings.prior_std).value
        for taken in (jacobian, smooth)
    )
    problem = AttackProblem(
        update=update,
        params=params,
        shared=shared,
        prior=GaussianPrior(torch.zeros(shape[1:], dtype=torch.float64), settings.prior_std),
        noise=IsotropicNoise(torch.full((len(group),), noise_std, dtype=torch.float64)),
        labels=labels,
    )
    root = _covariance_root(smooth, noise_std, settings)
    found = _sample(problem, x.flatten(1), root, generators, settings)
    error, half_error = (
        (means - x.flatten(1)[:, None]).square().mean((1, 2)).sqrt() for means in (found.means, found.half_means)
    )
    for place, index in enumerate(group):
        yield BestAttackerRow(
            network=network,
            noise_std=noise_std,
            input=index,
            error=float(error[place]),
            half_error=float(half_error[place]),
            predicted=float(predicted[place]),
            audited=float(audited[place]),
            accepted=float(found.accepted[place]),
        )


def _normal(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Returns standard normal numbers `[U, *shape]`, those of an input from its own generator."""
    return torch.stack([torch.randn(*shape, generator=generator, dtype=torch.float64) for generator in generators])


def _network(name: str, settings: BestAttackerSettings) -> tuple[UpdateMap, dict[str, Tensor]]:
    torch.manual_seed(settings.seed)
    if name in _ACTIVATIONS:
        layers: list[nn.Module] = []
        for channels in (1, _CHANNELS, _CHANNELS):
            layers += [nn.Conv2d(channels, _CHANNELS, 3, padding=1), _ACTIVATIONS[name]()]
        model: nn.Module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(_CHANNELS * settings.side**2, _CLASSES))
    else:
        model = build_model(name, input_shape=(1, settings.side, settings.side), num_classes=_CLASSES)
    model = model.double()
    return GradientUpdate(model, nn.CrossEntropyLoss()), {name: p.detach() for name, p in model.named_parameters()}


def _covariance_root(jacobian: UpdateJacobian, noise_std: float, settings: BestAttackerSettings) -> Tensor:
    """Returns L with LLᵀ = (G/σ² + I/τ²)⁻¹, `[U, D, D]`: what proposals are shaped by."""
    units, dim = jacobian.num_units, jacobian.input_dim
    identity = torch.eye(dim, dtype=torch.float64)
    gram = torch.stack([jacobian.gram(unit.expand(units, -1).contiguous()) for unit in identity], dim=-1)
    precision = (gram + gram.mT) / (2 * noise_std**2) + identity / settings.prior_std**2
    root: Tensor = torch.linalg.cholesky(torch.linalg.inv(precision))
    return root


@dataclass(frozen=True)
class _Sampled:
    """What the chains of U units came to: means `[U, chains, D]` over their states, and accepted shares `[U]`."""

    means: Tensor
    half_means: Tensor
    accepted: Tensor


def _sample(
    problem: AttackProblem,
    truth: Tensor,
    root: Tensor,
    generators: Sequence[torch.Generator],
    settings: BestAttackerSettings,
) -> _Sampled:
    """Walks at random through each posterior from the truth `[U, D]`, by steps L·z with L `[U, D, D]`."""
    units, dim = truth.shape
    chains = settings.num_chains
    repeated = problem.select(torch.arange(units).repeat_interleave(chains))
    start = truth.repeat_interleave(chains, 0)
    size = torch.full((units,), 0.5, dtype=torch.float64)

    def step(x: Tensor, objective: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the next states, their objectives, and the share of each unit's chains that moved."""
        moves = torch.einsum("uij,ucj->uci", size[:, None, None] * root, _normal((chains, dim), generators))
        proposal = x + moves.flatten(0, 1)
        proposed = repeated.objective(proposal)
        chance = [torch.rand(chains, generator=generator, dtype=torch.float64) for generator in generators]
        moved = 2 * torch.cat(chance).log() < objective - proposed  # the objective is −2 log p
        x, objective = torch.where(moved[:, None], proposal, x), torch.where(moved, proposed, objective)
        return x, objective, moved.double().reshape(units, chains).mean(1)

    at_start = repeated.objective(start)
    x, objective = start, at_start
    for _ in range(int(_PILOT * settings.steps)):
        x, objective, moved = step(x, objective)
        size *= torch.exp(0.07 * (moved - _ACCEPTED))
    x, objective = start, at_start
    total, half, accepted = start.clone(), start, torch.zeros(units, dtype=torch.float64)
    for count in range(1, settings.steps):  # the start is the first state
        x, objective, moved = step(x, objective)
        total += x
        accepted += moved
        if count == settings.steps // 2 - 1:
            half = total / (count + 1)
    means, half_means = (one.reshape(units, chains, dim) for one in (total / settings.steps, half))
    return _Sampled(means, half_means, accepted / (settings.steps - 1))


def _summarize(settings: BestAttackerSettings, rows: Sequence[BestAttackerRow]) -> Summary:
    lines = []
    for network in settings.networks:
        for noise_std in settings.noise_stds:
            group = _group(rows, network, noise_std)
            error, half_error, predicted, audited = (
                _rms([getattr(r, n) for r in group]) for n in ("error", "half_error", "predicted", "audited")
            )
            low, high = _interval([row.error for row in group])
            lines.append(
                (
                    network,
                    f"{noise_std:g}",
                    f"{error:.4f} [{low:.4f}, {high:.4f}]",
                    f"{half_error:.4f}",
                    f"{predicted:.4f}",
                    f"{predicted / error:.2f}",
                    f"{audited:.4f}",
                    f"{audited / error:.2f}",
                )
            )
    return Summary(
        f"Errors: root mean squares over {settings.num_inputs} inputs, with a 95 % bootstrap interval. The chains' is "
        "in expectation at most the best attacker's, and equal to it once they have forgotten where they began.",
        (
            "network",
            "noise std",
            "best attacker, at least",
            "by half the steps",
            "own J",
            "over it",
            "as audited",
            "over it",
        ),
        tuple(lines),
    )


def _group(rows: Sequence[BestAttackerRow], network: str, noise_std: float) -> list[BestAttackerRow]:
    return [row for row in rows if row.network == network and row.noise_std == noise_std]


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


def _interval(errors: Sequence[float]) -> tuple[float, float]:
    squares = np.square(errors)
    picked = np.random.default_rng(0).integers(len(squares), size=(1000, len(squares)))
    low, high = np.quantile(np.sqrt(squares[picked].mean(1)), [0.025, 0.975])
    return float(low), float(high)


def _draw(settings: BestAttackerSettings, rows: Sequence[BestAttackerRow], figure: Figure) -> None:
    axis = figure.subplots()
    for place, network in enumerate(settings.networks):
        levels = [_group(rows, network, noise_std) for noise_std in settings.noise_stds]
        best = [_rms([row.error for row in level]) for level in levels]
        kinds = [("own J", "predicted", "o-")] + ([("as audited", "audited", "s:")] if network not in _SMOOTH else [])
        for label, name, style in kinds:
            ratios = [_rms([getattr(row, name) for row in level]) / b for level, b in zip(levels, best, strict=True)]
            axis.plot(best, ratios, style, color=f"C{place}", label=f"{network}, {label}")
    axis.axhline(1.0, color="black", linewidth=1)
    axis.set(xscale="log", xlabel="error of the best attacker, at least; rms", ylabel="predicted error over it")
    plain_ticks(axis.xaxis)
    axis.legend(frameon=False, fontsize=8)


STUDY = Study(
    name="best-attacker",
    settings=BestAttackerSettings,
    row=BestAttackerRow,
    key=("network", "noise_std", "input"),
    portions=_portions,
    summarize=_summarize,
    draw=_draw,
)
