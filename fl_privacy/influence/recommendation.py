"""How much noise brings a client to its target leakage: on the update, or, better placed, on the input.

Two families from one spectrum. *Isotropic*: n = σ² on every parameter of the shared update. *Shaped*: a ~ N(0, h(G)) on
the private input, of which the client shares the update, u(x + a). All that is shared depends on x through x + a alone,
so that no attacker learns more of x than x + a tells him: under a prior of variance τ² per element,

    leakage of x + a = (1/D) Σ τ²/(τ² + h(λ)),

whatever the model, the number of steps and the attack. To first order the update changes by J·a, ‖J·a‖² = Σ λ h(λ) on
average, and the least change for a target is water-filling: h(λ) = τ²(√(μ/λ) − 1)₊, with μ set by the target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.options import per_unit
from fl_privacy.influence.spectrum import Spectrum
from fl_privacy.interval import Interval

CovarianceSource = Literal["own", "public"]
"""Whose G shapes the noise: the client's own, which tells a little of x, or that of public examples, which does not."""


@dataclass(frozen=True, eq=False, kw_only=True)
class NoiseRecommendation:
    """The noise that brings each of U units to its target leakage, at the upper end of what is known of its spectrum.

    None of this is differential privacy.

    Attributes:
        target_leakage: `[U]`.
        prior_std: τ `[U]`.
        already_met: Units whose undefended update leaks no more than the target, `[U]`: no noise is recommended.
        failed: Units whose spectrum could not be computed, `[U]`: every number of theirs is NaN, and nothing of theirs
            should be shared.
        isotropic_std: σ `[U]`, per parameter of the shared update.
        isotropic_norm: Expected change of the update by it, σ√P `[U]`.
        shaped_norm: Expected change of the update by shaped noise, √(Σ λ h(λ)) `[U]`, to first order.
        white_norm: Expected change of the update by white input noise for the same target, τ√((1/L − 1) tr G) `[U]`,
            to first order.
        leakage: Of x + a with shaped noise, each `[U]`; `upper` is at most the target.
        level: μ `[U]`, the eigenvalue from which on the shaped noise leaves directions alone.
        largest_variance: Cap of h `[U]`.
        covariance: Whose G the shaped noise follows.
    """

    target_leakage: Tensor
    prior_std: Tensor
    already_met: Tensor
    failed: Tensor
    isotropic_std: Tensor
    isotropic_norm: Tensor
    shaped_norm: Tensor
    white_norm: Tensor
    leakage: Interval[Tensor]
    level: Tensor
    largest_variance: Tensor
    covariance: CovarianceSource

    @property
    def num_units(self) -> int:
        """U."""
        return len(self.level)

    @property
    def white_std(self) -> Tensor:
        """Standard deviation `[U]` of white input noise for the same target, τ√(1/L − 1): it needs no spectrum."""
        uniform = self.prior_std * (1 / self.target_leakage - 1).sqrt()
        return torch.where(self.already_met, 0.0, uniform)

    def variance(self, eigenvalue: float | Tensor) -> Tensor:
        """Returns h(λ), the variance of the shaped noise along an eigenvector of G.

        Args:
            eigenvalue: λ ≥ 0, number, `[U]`, or `[..., U, K]` as the nodes of a spectrum are.
        """
        value = torch.as_tensor(eigenvalue, dtype=self.level.dtype, device=self.level.device)
        value = value.expand(self.num_units) if value.ndim == 0 else value
        if value.shape[-2:][0] != self.num_units:
            raise InvalidInputError(
                f"expected eigenvalues of {self.num_units} units [units] or [..., units, eigenvalues], got shape "
                f"{list(value.shape)}"
            )
        law = (self.level, self.prior_std, self.largest_variance)
        return _water_filling(value, *(law if value.ndim == 1 else (part[:, None] for part in law)))

    def select(self, units: Tensor) -> NoiseRecommendation:
        """Returns the recommendation of the given units `[V]` (indices, repeats allowed)."""
        chosen: dict[str, Any] = {name: value[units] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **chosen, leakage=Interval(*(part[units] for part in self.leakage)))


def recommend_noise(
    spectrum: Spectrum,
    *,
    target_leakage: float | Tensor,
    prior_std: float | Tensor,
    public: Spectrum | None = None,
    largest_ratio: float = 4.0,
) -> NoiseRecommendation:
    """Returns the noise of either family that brings leakage down to a target, from spectra alone.

    A target counts as met only where the upper end of the leakage's interval meets it: what a coarse spectrum does not
    know is paid for with noise.

    Args:
        spectrum: Of the units' own G.
        target_leakage: L, strictly between 0 and 1, number or `[U]`.
        prior_std: τ, standard deviation per element of the inputs' prior, number or `[U]`.
        public: Of the G of public examples (`MeanGram`), one unit or U: the shaped noise follows it in place of the
            own G, where a whole batch is private example by example. What x + a leaks depends on the noise's covariance
            only, so the target is met all the same; what the noise costs is then known only as far as the own G
            resembles the public one: `shaped_norm` is the public examples', scaled to the own trace.
        largest_ratio: Cap of h in multiples of τ²(1/L − 1), the level of white noise for the same target. More is
            cheaper to first order, and further from it.

    Raises:
        InvalidInputError: A target outside (0, 1), a prior_std that is not positive, a cap that could not meet the
            target, or spectra of a coloured prior or that do not belong together.
    """
    if spectrum.coloured or (public is not None and public.coloured):
        raise InvalidInputError(
            "expected the spectrum of a white prior: noise on the input is shaped in input space; for noise on the "
            "update ask a coloured spectrum's required_noise_std"
        )
    target = spectrum.check_target(target_leakage)
    tau = per_unit(prior_std, "prior_std", num_units=spectrum.num_units, device=spectrum.resolution.device)
    if not (tau > 0).all():
        raise InvalidInputError(f"expected prior_std > 0, got {prior_std}: constant inputs have nothing to leak")
    if not (math.isfinite(largest_ratio) and largest_ratio > 1):
        raise InvalidInputError(f"expected largest_ratio > 1, got {largest_ratio}: white noise is at 1 everywhere")
    shaping = _matching(spectrum, public)
    uniform = tau**2 * (1 / target - 1)
    cap = largest_ratio * uniform

    def share(level: Tensor) -> Interval[Tensor]:
        return shaping.mean_of_increasing(
            lambda nodes: (
                _per_node(tau) ** 2 / (_per_node(tau) ** 2 + _water_filling(nodes, *map(_per_node, (level, tau, cap))))
            )
        )

    level = shaping.smallest_meeting(lambda level: share(level).upper <= target)
    met, failed = spectrum.meets(target), spectrum.failed | shaping.failed

    def unless(value: Tensor, when_met: Tensor | float) -> Tensor:
        return torch.where(failed, torch.nan, torch.where(met, when_met, value))

    scale = 1.0 if public is None else _mean_eigenvalue(spectrum) / _mean_eigenvalue(shaping)
    squares = shaping.mean(lambda nodes: nodes * _water_filling(nodes, *map(_per_node, (level, tau, cap))))
    undefended = spectrum.leakage_at(torch.zeros_like(target))
    sigma = unless(spectrum.required_noise_std(target, tau), 0.0)
    return NoiseRecommendation(
        target_leakage=target,
        prior_std=tau,
        already_met=met & ~failed,
        failed=failed,
        isotropic_std=sigma,
        isotropic_norm=sigma * math.sqrt(spectrum.update_dim),
        shaped_norm=unless((scale * spectrum.input_dim * squares).sqrt(), 0.0),
        white_norm=unless((uniform * spectrum.input_dim * _mean_eigenvalue(spectrum)).sqrt(), 0.0),
        leakage=Interval(*(unless(a, b) for a, b in zip(share(level), undefended, strict=True))),
        level=unless(level, 0.0),
        largest_variance=unless(cap, 0.0),
        covariance="own" if public is None else "public",
    )


def _water_filling(eigenvalue: Tensor, level: Tensor, tau: Tensor, cap: Tensor) -> Tensor:
    """h(λ) = min(τ²(√(μ/λ) − 1)₊, cap); the cap at λ = 0."""
    ratio = level / eigenvalue.clamp(min=torch.finfo(torch.float64).tiny)
    variance: Tensor = torch.minimum(tau**2 * (ratio.sqrt() - 1).clamp(min=0.0), cap)
    return variance


def _matching(spectrum: Spectrum, public: Spectrum | None) -> Spectrum:
    if public is None:
        return spectrum
    if spectrum.input_dim % public.input_dim or public.num_units not in (1, spectrum.num_units):
        raise InvalidInputError(
            f"expected a public spectrum of one unit or {spectrum.num_units}, of examples that make up inputs of "
            f"{spectrum.input_dim} elements, got {public.num_units} units of {public.input_dim}"
        )
    return public if public.num_units == spectrum.num_units else public.expand(spectrum.num_units)


def _mean_eigenvalue(spectrum: Spectrum) -> Tensor:
    return spectrum.mean(lambda nodes: nodes)


def _per_node(values: Tensor) -> Tensor:
    return values[None, :, None]
