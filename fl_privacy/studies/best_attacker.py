"""The least error that any attacker can reach, by sampling his posterior, beside what is predicted for him.

Inputs are drawn from the prior itself, so that the mean of the posterior p(x | shared) is the best reconstruction there
is, whatever an attacker does, and each truth is an exact draw of its posterior: Markov chains that begin there need not
find anything. Networks are small enough for chains to move through the whole posterior.
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
from fl_privacy.studies.results import Portion
from fl_privacy.studies.settings import Settings, option
from fl_privacy.studies.study import Study, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Activation = Literal["tanh", "gelu", "relu"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "gelu": nn.GELU, "relu": nn.ReLU}
_SIDE, _CHANNELS, _CLASSES = 4, 6, 3
_WARM_UP = 0.25
"""Share of the steps in which the chains find their stride."""
_ACCEPTED = 0.25
"""Share of proposals that a stride is adapted to."""


@dataclass(frozen=True, kw_only=True)
class BestAttackerSettings(Settings):
    """Three 3×3 convolutions of six channels and a linear layer, on inputs of 4×4 drawn from the prior."""

    activations: tuple[Activation, ...] = option(("tanh", "relu"), "Activations of the networks.")
    noise_stds: tuple[float, ...] = option((1e-3, 1e-2, 3e-2), "Noise levels, standard deviation.", above=0)
    num_inputs: int = option(32, "Inputs, each with noise of its own.", minimum=2)
    prior_std: float = option(0.5, "Standard deviation of the inputs.", above=0)
    num_chains: int = option(4, "Markov chains for each input.", minimum=1)
    steps: int = option(6000, "Steps of each, the first quarter of which finds the stride.", minimum=8)
    width: float = option(RELU_WIDTH, "Width of rounded ReLUs, relative to what they see; default: as audits.", above=0)
    seed: int = option(0, "Of everything.", minimum=0)


@dataclass(frozen=True, kw_only=True)
class BestAttackerRow:
    """One input behind one noisy gradient; errors are root mean squares per input element."""

    activation: str
    noise_std: float
    input: int
    error: float
    """Of the posterior's mean."""
    predicted: float
    """By the network's own Jacobian."""
    audited: float
    """By that with the ReLUs rounded off, as an audit takes it."""
    accepted: float
    """Share of the chains' proposals that were accepted."""


def _portions(settings: BestAttackerSettings) -> Iterator[Portion[BestAttackerRow]]:
    for activation in settings.activations:
        for noise_std in settings.noise_stds:
            keys = [(activation, noise_std, index) for index in range(settings.num_inputs)]
            yield Portion(keys, partial(_rows, settings, activation, noise_std))


def _rows(settings: BestAttackerSettings, activation: str, noise_std: float) -> Iterator[BestAttackerRow]:
    update, params = _network(activation, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.num_inputs, 1, 1, _SIDE, _SIDE)
    x = settings.prior_std * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(_CLASSES, shape[:2], generator=generator)
    jacobian = UpdateJacobian(update, params, x, labels)
    clean = jacobian.update()
    shared = clean + noise_std * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    smooth = UpdateJacobian(rounded_off(update, settings.width), params, x, labels)
    predicted, audited = (
        estimate_spectrum(taken, max_steps=_SIDE**2).rmse(noise_std, settings.prior_std).value
        for taken in (jacobian, smooth)
    )
    problem = AttackProblem(
        update=update,
        params=params,
        shared=shared,
        prior=GaussianPrior(torch.zeros(shape[2:], dtype=torch.float64), settings.prior_std),
        noise=IsotropicNoise(torch.full((settings.num_inputs,), noise_std, dtype=torch.float64)),
        labels=labels,
    )
    mean, accepted = _posterior_mean(problem, x.flatten(1), _covariance_root(smooth, noise_std, settings), settings)
    error = (mean - x.flatten(1)).square().mean(1).sqrt()
    for index in range(settings.num_inputs):
        yield BestAttackerRow(
            activation=activation,
            noise_std=noise_std,
            input=index,
            error=float(error[index]),
            predicted=float(predicted[index]),
            audited=float(audited[index]),
            accepted=float(accepted[index]),
        )


def _network(activation: str, seed: int) -> tuple[UpdateMap, dict[str, Tensor]]:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for channels in (1, _CHANNELS, _CHANNELS):
        layers += [nn.Conv2d(channels, _CHANNELS, 3, padding=1), _ACTIVATIONS[activation]()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(_CHANNELS * _SIDE**2, _CLASSES)).double()
    return GradientUpdate(model, nn.CrossEntropyLoss()), {name: p.detach() for name, p in model.named_parameters()}


def _covariance_root(jacobian: UpdateJacobian, noise_std: float, settings: BestAttackerSettings) -> Tensor:
    """Returns L with LLᵀ = (G/σ² + I/τ²)⁻¹, `[U, D, D]`: what proposals are shaped by."""
    units, dim = jacobian.num_units, jacobian.input_dim
    identity = torch.eye(dim, dtype=torch.float64)
    gram = torch.stack([jacobian.gram(unit.expand(units, -1).contiguous()) for unit in identity], dim=-1)
    precision = (gram + gram.mT) / (2 * noise_std**2) + identity / settings.prior_std**2
    root: Tensor = torch.linalg.cholesky(torch.linalg.inv(precision))
    return root


def _posterior_mean(
    problem: AttackProblem, truth: Tensor, root: Tensor, settings: BestAttackerSettings
) -> tuple[Tensor, Tensor]:
    """Returns the posterior's mean `[U, D]` by Metropolis chains from the truth, and what they accepted, `[U]`."""
    chains = torch.arange(problem.num_units).repeat(settings.num_chains)
    problem, root, x = problem.select(chains), root[chains], truth[chains]
    generator = torch.Generator().manual_seed(settings.seed + 1)
    objective, stride = problem.objective(x), torch.full((len(x),), 0.5, dtype=torch.float64)
    total, taken = torch.zeros_like(x), torch.zeros_like(stride)
    warm_up = int(_WARM_UP * settings.steps)
    for step in range(settings.steps):
        move = torch.einsum("uij,uj->ui", root, torch.randn(x.shape, generator=generator, dtype=torch.float64))
        proposal = x + stride[:, None] * move
        proposed = problem.objective(proposal)
        chance = torch.rand(len(x), generator=generator, dtype=torch.float64)
        accepted = 2 * chance.log() < objective - proposed  # the objective is −2 log p
        x = torch.where(accepted[:, None], proposal, x)
        objective = torch.where(accepted, proposed, objective)
        if step < warm_up:
            stride *= torch.exp(0.07 * (accepted.double() - _ACCEPTED))
        else:
            total += x
            taken += accepted
    count = settings.steps - warm_up
    by_chain = (settings.num_chains, -1)
    mean = (total / count).reshape(*by_chain, x.shape[1]).mean(0)
    return mean, (taken / count).reshape(by_chain).mean(0)


def _summarize(settings: BestAttackerSettings, rows: Sequence[BestAttackerRow]) -> Summary:
    lines = []
    for activation in settings.activations:
        for noise_std in settings.noise_stds:
            group = _group(rows, activation, noise_std)
            error, predicted, audited = (
                _rms([getattr(r, n) for r in group]) for n in ("error", "predicted", "audited")
            )
            low, high = _interval([row.error for row in group])
            lines.append(
                (
                    activation,
                    f"{noise_std:g}",
                    f"{error:.4f} [{low:.4f}, {high:.4f}]",
                    f"{predicted:.4f}",
                    f"{predicted / error:.2f}",
                    f"{audited:.4f}",
                    f"{audited / error:.2f}",
                )
            )
    return Summary(
        f"Errors: root mean squares over {settings.num_inputs} inputs, with a 95 % bootstrap interval.",
        ("activation", "noise std", "best attacker", "own J", "over best", "as audited", "over best"),
        tuple(lines),
    )


def _group(rows: Sequence[BestAttackerRow], activation: str, noise_std: float) -> list[BestAttackerRow]:
    return [row for row in rows if row.activation == activation and row.noise_std == noise_std]


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


def _interval(errors: Sequence[float]) -> tuple[float, float]:
    squares = np.square(errors)
    picked = np.random.default_rng(0).integers(len(squares), size=(1000, len(squares)))
    low, high = np.quantile(np.sqrt(squares[picked].mean(1)), [0.025, 0.975])
    return float(low), float(high)


def _draw(settings: BestAttackerSettings, rows: Sequence[BestAttackerRow], figure: Figure) -> None:
    axis = figure.subplots()
    for place, activation in enumerate(settings.activations):
        groups = [_group(rows, activation, noise_std) for noise_std in settings.noise_stds]
        best = [_rms([row.error for row in group]) for group in groups]
        kinds = [("own J", "predicted", "o-")] + ([("as audited", "audited", "s:")] if activation == "relu" else [])
        for label, name, style in kinds:
            ratios = [_rms([getattr(row, name) for row in group]) / b for group, b in zip(groups, best, strict=True)]
            axis.plot(best, ratios, style, color=f"C{place}", label=f"{activation}, {label}")
    axis.axhline(1.0, color="black", linewidth=1)
    axis.set(xscale="log", xlabel="error of the best attacker, rms", ylabel="predicted error over it")
    axis.legend(frameon=False, fontsize=8)


STUDY = Study(
    name="best-attacker",
    settings=BestAttackerSettings,
    row=BestAttackerRow,
    key=("activation", "noise_std", "input"),
    portions=_portions,
    summarize=_summarize,
    draw=_draw,
)
