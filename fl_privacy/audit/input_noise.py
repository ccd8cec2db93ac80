"""Noise on private examples: drawn for a target leakage, and what x + a then tells of x, whatever the model and attack.

An update that is computed at x + a depends on x through x + a alone. Under a prior of variance τ² per element, x + a
tells (1/D) Σ τ²/(τ² + h_i) of x for noise of variances h_i along its axes, and so does no update, of any model, any
number of local steps or any later round that uses the same a, more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fl_privacy.audit.settings import Covariance
from fl_privacy.audit.task import InputShift, Numbers
from fl_privacy.checks import check_share
from fl_privacy.errors import FLPrivacyError, InvalidInputError
from fl_privacy.influence.jacobian import DEFAULT_MEMORY_BUDGET, UpdateJacobian
from fl_privacy.influence.operators import InputOperator, MeanGram
from fl_privacy.influence.recommendation import NoiseRecommendation, recommend_noise
from fl_privacy.influence.sampling import draw_input_noise
from fl_privacy.influence.spectrum import estimate_spectrum
from fl_privacy.influence.update import GradientUpdate


@dataclass(frozen=True, eq=False)
class InputDraw:
    """Noise drawn for n examples.

    Attributes:
        noise: a `[n, *shape]`, 0 where the target is met without.
        leakage: Of x + a, `[n]`, at most the target; 1 where there is no noise: nothing is then credited to it.
        shaped: Whether the covariance that was asked for shaped it, `[n]`; elsewhere it is white, or none.
        note: What was not as asked, for people; empty if nothing was.
    """

    noise: Tensor
    leakage: Tensor
    shaped: Tensor
    note: str = ""


def draw_for_examples(
    update: GradientUpdate,
    params: dict[str, Tensor],
    inputs: Tensor,
    labels: Tensor,
    *,
    target_leakage: float,
    prior_std: float,
    covariance: Covariance = "client",
    public: tuple[Tensor, Tensor] | None = None,
    generator: np.random.Generator,
    once: bool = False,
    num_probes: int = 4,
    max_steps: int = 64,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    before_pass: Callable[[], None] | None = None,
) -> InputDraw:
    """Returns noise for each example by itself, all else being known to the attacker.

    The law is water-filling on G of the gradient at these parameters: only what the noise costs depends on that, not
    what it hides. Where G cannot be had, the noise is white, which needs none and hides as much. So it is where making
    up for what a coarse spectrum does not know costs more than white noise does, and for an example that meets the
    target without noise, as later parameters may tell what these do not.

    Args:
        update: The gradient of the model that is trained.
        params: θ by name.
        inputs: x `[n, *shape]`.
        labels: `[n, ...]`.
        target_leakage: L.
        prior_std: τ.
        covariance: What shapes the noise.
        public: Inputs and labels of public examples, for the covariance `public`.
        generator: Of the draw. Whoever knows its state knows the noise.
        once: Whether these examples are shared once, at these parameters: who meets the target without noise gets none.
        num_probes: Of the spectrum.
        max_steps: Of a probe, and of a draw; fewer steps make for more noise, never less.
        memory_budget: Bytes of graph.
        before_pass: Called before each pass of a product with J; what it raises ends the draw: a time limit's place.

    Raises:
        InvalidInputError: τ or the target is out of range.
    """
    check_share(target_leakage, "target_leakage")
    if not (math.isfinite(prior_std) and prior_std > 0):
        raise InvalidInputError(f"expected prior_std > 0, got {prior_std}: constant inputs have nothing to leak")
    white = _white(inputs, target_leakage, prior_std, generator)
    if covariance == "white":
        return white
    if covariance == "public" and public is None:
        return replace(white, note="no public examples were given: the noise is white")
    own = covariance == "client"
    shaping = (inputs, labels) if own or public is None else public
    try:
        jacobian = UpdateJacobian(
            update,
            params,
            shaping[0][:, None],
            shaping[1][:, None],
            memory_budget=memory_budget,
            before_pass=before_pass,
        )
        operator: InputOperator = jacobian if own else MeanGram(jacobian)
        spectrum = estimate_spectrum(
            operator, num_probes=num_probes, max_steps=max_steps, seed=int(generator.integers(2**31))
        )
        law = recommend_noise(spectrum, target_leakage=target_leakage, prior_std=prior_std)
        effort = num_probes * max_steps
        return _shaped(operator, law, white, own=own, once=once, generator=generator, max_steps=effort)
    except FLPrivacyError as error:
        return replace(white, note=f"the noise is white, as its shape could not be found: {error}")


def _white(inputs: Tensor, target: float, prior_std: float, generator: np.random.Generator) -> InputDraw:
    """Noise of variance τ²(1/L − 1) on every element."""
    std = prior_std * math.sqrt(1 / target - 1)
    noise = torch.from_numpy(std * generator.standard_normal(tuple(inputs.shape))).to(inputs)
    leakage = torch.full((len(inputs),), target, dtype=torch.float64)
    return InputDraw(noise, leakage, torch.zeros(len(inputs), dtype=torch.bool))


def _shaped(
    operator: InputOperator,
    law: NoiseRecommendation,
    white: InputDraw,
    *,
    own: bool,
    once: bool,
    generator: np.random.Generator,
    max_steps: int,
) -> InputDraw:
    """Shaped draws where there is a law, white ones elsewhere; none where the target is met without, if shared once."""
    examples = len(white.noise)
    of_example = torch.arange(examples) if own else torch.zeros(examples, dtype=torch.long)
    of_example = of_example.to(operator.device)
    law = law.select(of_example)
    shaped = torch.zeros_like(law.failed)
    noise, leakage = white.noise.clone(), white.leakage.clone()
    wanted = (~law.failed & ~law.already_met).nonzero().squeeze(1)
    if len(wanted):
        chosen = law.select(wanted)
        draw = draw_input_noise(
            operator.select(of_example[wanted]), chosen, int(generator.integers(2**63)), max_steps=max_steps
        )
        by_law = draw.scale > 0  # white noise alone was the cheaper one, and is of the very target
        noise[wanted] = draw.noise.reshape(noise[wanted].shape).to(noise)
        leakage[wanted] = torch.where(by_law, chosen.leakage.upper, chosen.target_leakage).to(leakage)
        shaped[wanted] = by_law
    notes = []
    dearer = len(wanted) - int(shaped.sum())
    if dearer:
        notes.append(
            f"the noise on {dearer} of {examples} examples is white, which costs the update less than noise shaped by "
            f"a spectrum of {max_steps} products does: raise the audit's max_steps"
        )
    met = law.already_met
    if met.any() and not own:
        notes.append("the noise is white: public examples meet the target without noise, and shape none")
    elif met.any():
        without = f"{int(met.sum())} of {examples} examples meet the target without noise"
        if once:
            noise[met], leakage[met] = 0.0, 1.0
        else:
            without += " at these parameters; they are shared again, so theirs is white"
        notes.append(without)
    failed = int(law.failed.sum())
    if failed:
        notes.append(f"the noise on {failed} of {examples} examples is white: products with G were not finite")
    return InputDraw(noise, leakage, shaped.to(white.shaped), "; ".join(notes))


def topped_up(
    noise: Numbers, leakage: float, *, target_leakage: float, prior_std: float, generator: np.random.Generator
) -> tuple[Numbers, float]:
    """Returns noise that was drawn for a higher leakage with white noise on it that brings it to a target.

    Of x + a + b with b white of variance s² the leakage is (1/D) Σ τ²/(τ² + h_i + s²), which by concavity is at most
    L/(1 + L·s²/τ²), for any a of leakage L: s² = τ²(1/target − 1/L). Whoever saw x + a learns nothing from x + a + b.
    """
    std = prior_std * math.sqrt(1 / target_leakage - 1 / leakage)
    return (noise + std * generator.standard_normal(noise.shape)).astype(noise.dtype), target_leakage


def leakage_under(leakage: Numbers, prior_std: float, other: float) -> Numbers:
    """Returns what noise of a leakage under the prior's τ leaks at most under another one, τ'.

    With r = τ'²/τ², an axis of leakage l has rl/(rl + 1 − l) under the other prior: concave in l for r > 1, so the mean
    over axes is at most that of the mean; and no more than before for r ≤ 1.
    """
    ratio = (other / prior_std) ** 2
    if ratio <= 1:
        return leakage
    changed: Numbers = np.minimum(ratio * leakage / (ratio * leakage + 1 - leakage), 1.0)
    return changed


def shortfall(shift: InputShift) -> str:
    """Returns why noise cannot have the leakage that is said of it; empty if it can.

    Noise of leakage L has a mean square of at least τ²(1/L − 1) per element, the least for white noise. With variances
    up to four times that, n draws of D elements are worth at least k = nD/4 squares of normal numbers, whose mean falls
    below (1 − 2/9k − 4.75 √(2/9k))³ of what it should be one time in 10⁶ (Wilson and Hilferty). What shape the noise
    has cannot be seen from a draw.
    """
    noisy = shift.leakage < 1
    if not noisy.any():
        return ""
    noise = shift.noise[noisy].astype(np.float64)
    least = float(np.mean(shift.prior_std**2 * (1 / np.maximum(shift.leakage[noisy], 1e-12) - 1)))
    there = float(np.mean(np.square(noise)))
    unit = 2 / 9 / (noise.size / 4)
    if there >= least * max(0.0, 1 - unit - 4.75 * math.sqrt(unit)) ** 3:
        return ""
    return (
        f"the client says that noise on its inputs leaves a leakage of {float(shift.leakage[noisy].max()):.3g}, which "
        f"takes an rms of {math.sqrt(least):.3g}, and {math.sqrt(there):.3g} is there: none of it is credited"
    )
