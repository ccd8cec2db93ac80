"""What an attacker holds who sees a defended update, and what is predicted for him."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_privacy.attacks import Attack, IndependentNoise, IsotropicNoise, Noise
from fl_privacy.attacks.mechanisms import PRECISION
from fl_privacy.audit.perturbation import noise_blocks, observed_perturbation
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.spectrum import estimate_spectrum
from fl_privacy.interval import Interval

_MAX_STEPS = 256
"""Lanczos steps per probe, of four, for the predicted error: all there is of inputs of up to 1,024 elements."""


@dataclass(frozen=True, eq=False)
class SharedUpdate:
    """One version of a client's update, and what the attacker believes of it.

    Attributes:
        name: For the panel, in a few words.
        shared: `[P]`, any common factor taken out.
        noise: Of one unit, by its power: the weights of least squares.
        equivalent: Gaussian noise that leaves as much to whoever uses the shape of this one, too; `None`: `noise`.
        attack: Who does; `None`: whoever attacks the other versions.
    """

    name: str
    shared: Tensor
    noise: Noise
    equivalent: Noise | None = None
    attack: Attack | None = None


def observed_version(name: str, shared: Tensor, update: Tensor, sizes: Sequence[int]) -> SharedUpdate:
    """Returns what an attacker holds who sees a defended update `[P]` and knows how strong the defence is where.

    Args:
        name: For the panel.
        shared: As it arrived, `[P]`.
        update: Undefended, `[P]`.
        sizes: Number of entries of each parameter.
    """
    blocks = noise_blocks(shared[None], update[None], sizes)
    least = rounding_noise(update).std
    if blocks.split[0]:
        std = torch.maximum(blocks.std, least[:, None])
        return SharedUpdate(name, shared / blocks.scale[0].to(shared), IndependentNoise(std))
    seen = observed_perturbation(shared[None], update[None])
    return SharedUpdate(name, shared / seen.scale[0], IsotropicNoise(torch.maximum(seen.noise_std, least)))


def rounding_noise(update: Tensor) -> IsotropicNoise:
    """Returns the noise of an update `[P]` as it is, known to the precision of float32."""
    rms = update.square().mean().sqrt().double()[None]
    return IsotropicNoise((PRECISION * rms).clamp(min=torch.finfo(torch.float32).tiny))


def predicted_recovery(
    jacobian: UpdateJacobian, noise: Noise, prior_std: float
) -> tuple[Interval[float], Interval[float]]:
    """Returns the predicted leakage and error against an attacker who weighs entries by their noise.

    Of inputs of up to 1,024 elements both are exact; of larger ones the spectrum is sampled.

    Args:
        jacobian: One unit.
        noise: On its shared update, isotropic or independent.
        prior_std: τ.

    Raises:
        InvalidInputError: Noise of another kind.
    """
    if isinstance(noise, IndependentNoise):
        least = noise.std.amin(-1)
        jacobian = jacobian.weighted((least[:, None] / noise.std).to(jacobian.dtype))
    elif isinstance(noise, IsotropicNoise):
        least = noise.std
    else:
        raise InvalidInputError(f"expected isotropic or independent noise, got {type(noise).__name__}")
    ridge = (least / prior_std) ** 2
    spectrum = estimate_spectrum(jacobian, max_steps=_MAX_STEPS, ridge=ridge)
    leakage, error = spectrum.leakage(least, prior_std), spectrum.rmse(least, prior_std)
    return Interval(*map(float, leakage)), Interval(*map(float, error))
