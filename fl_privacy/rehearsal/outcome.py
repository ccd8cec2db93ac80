"""What becomes of a federation under one noise that meets a target over the whole run.

Isotropic noise moves the parameters to where gradients, and with them leakage, may be larger. So its σ_t follows the
run: in proportion to what one share would need at this round's parameters, by a factor that is sought until the leakage
of all rounds together, measured along the very run, is the target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_privacy.influence.recommendation import recommend_noise
from fl_privacy.rehearsal.federation import (
    Federation,
    Parameters,
    interpolated_weights,
    mean_leakage,
    noise_for,
    together,
)

MET = 1.02
"""Measured leakage over its target up to which noise has met it."""
_TRIES, _STEP = 14, 0.25
"""Most runs in search of the factor on isotropic noise, and the steps in its logarithm."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run under noise.

    Attributes:
        accuracy: On the test examples, after the last round.
        leakage: Of the audited examples over the whole run, mean: measured along this very run for isotropic noise, by
            the law for noise on the input. Noise of which it is not the target could not meet it.
        strength: σ per parameter of a client's update in the first round; rms of the noise on the input.
        factor: On what one share needs, of isotropic noise: its square is the number of shares to name in a policy.
    """

    accuracy: float
    leakage: float
    strength: float
    factor: float | None = None


@dataclass(frozen=True, eq=False)
class InputLaw:
    """Laws of noise on inputs for one target, by the covariance of public examples at the start.

    Attributes:
        root: Square root of the shaped covariance, `[D, D]`.
        shaped_std: Root of its mean variance.
        shaped_leakage: That of shaped noise, by the law.
        white_std: Of white noise.
    """

    root: Tensor
    shaped_std: float
    shaped_leakage: float
    white_std: float


def input_law(federation: Federation, target: float) -> InputLaw:
    """Returns the laws of noise on inputs for a target."""
    tau, (spectrum, eigenvalues, vectors) = federation.prior.std, federation.public_law
    law = recommend_noise(spectrum, target_leakage=target, prior_std=tau)
    variances = law.variance(eigenvalues.clamp(min=0)[None])[0]
    return InputLaw(
        root=(vectors @ torch.diag(variances.sqrt()) @ vectors.T).float(),
        shaped_std=float(variances.mean().sqrt()),
        shaped_leakage=float((tau**2 / (tau**2 + variances)).mean()),
        white_std=float(law.white_std),
    )


def kept_outcome(federation: Federation, noise: Tensor, leakage: float) -> Outcome:
    """Returns what becomes of a run whose inputs get the same noise `[M, D]` in every round."""
    params = federation.train(inputs=lambda x: x + noise.reshape(x.shape))
    return Outcome(accuracy=federation.accuracy(params), leakage=leakage, strength=float(noise.square().mean().sqrt()))


def fresh_outcome(federation: Federation, law: InputLaw, generator: torch.Generator) -> Outcome:
    """Returns what becomes of a run whose inputs get shaped noise anew in every round.

    T independent draws of variance T·h tell as much as one of variance h.
    """
    growth = math.sqrt(federation.num_rounds)

    def drawn(x: Tensor) -> Tensor:
        z = torch.randn(len(x), len(law.root), generator=generator)
        return x + (z @ (growth * law.root)).reshape(x.shape)

    return Outcome(
        accuracy=federation.accuracy(federation.train(inputs=drawn)),
        leakage=law.shaped_leakage,
        strength=growth * law.shaped_std,
    )


def isotropic_outcome(federation: Federation, target: float, *, num_clients: int, batch: int, seed: int) -> Outcome:
    """Returns what becomes of a run with isotropic noise on each of C clients' gradients of N examples.

    The factor on the noise is sought; of the runs tried, that whose leakage is nearest the target counts.

    Args:
        federation: Who trains.
        target: Leakage of an example over all rounds.
        num_clients: C.
        batch: N. An example of a batch has J/N, so that it needs σ/N.
        seed: Of the noise, the same in all runs but for its size.
    """
    tau, at_rounds = federation.prior.std, federation.checked_rounds
    first = noise_for(federation.start_spectrum, target, tau)
    dilution = 1 / batch / math.sqrt(num_clients)

    def run(log_factor: float) -> tuple[float, float]:
        shown, stds, factor = [], [], math.exp(log_factor)

        def noise_std(t: int, params: Parameters) -> float:
            if t in at_rounds:
                shown.append(federation.audited(params))
                stds.append(factor * noise_for(together(shown[-1:], [1.0]), target, tau))
            return dilution * stds[-1]

        params = federation.train(noise_std=noise_std, generator=torch.Generator().manual_seed(seed))
        followed = together(shown, [weight**-0.5 for weight in interpolated_weights(stds, at_rounds)])
        return federation.accuracy(params), mean_leakage(followed, 1.0, tau)

    # Upwards to the first factor that meets the target: beyond it, noise may ruin the model, and leakage with it grow.
    tried: list[tuple[float, float, float]] = []
    at, low, high = math.log(federation.num_rounds) / 2 - _STEP, -math.inf, math.inf
    for _ in range(_TRIES):
        accuracy, leakage = run(at)
        tried.append((at, accuracy, leakage))
        if abs(leakage / target - 1) < 0.01:
            break
        low, high = (at, high) if leakage > target else (low, at)
        at = at + _STEP if high == math.inf else at - _STEP if low == -math.inf else (low + high) / 2
    at, accuracy, leakage = min(tried, key=lambda run: abs(math.log(run[2] / target)))
    return Outcome(accuracy=accuracy, leakage=leakage, strength=math.exp(at) * first / batch, factor=math.exp(at))
