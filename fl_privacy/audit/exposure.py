"""What one attacker recovers of each unit from what was shared, given what he believes of the noise on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fl_privacy.audit.settings import AuditSettings
from fl_privacy.influence.i2f import influence, influence_lower_bound
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.spectrum import Spectrum
from fl_privacy.interval import Interval

_WIDE = 0.05
"""Width of a leakage interval beyond which limited precision sends an audit from float32 to float64."""


@dataclass(frozen=True, eq=False)
class Exposure:
    """Leakage and errors of U units under one belief about the noise; every field is `[U]`.

    Attributes:
        leakage: Share of the private input's variance that is recovered.
        ridge: ε that it was computed with.
        influence: I²F of the perturbation.
        lower_bound: ‖Jᵀδ‖/λ_max(G).
        rmse: Predicted error per input element.
        residual: Relative residual of the I²F solve.
        solved: Whether that is within its tolerance.
        tight: Whether the two quadrature rules agree wherever floating point can tell them apart.
        blurred: Whether precision, not budget, leaves the interval wide.
        failed: Whether products were not finite.
        products: Products with G spent.
    """

    leakage: Interval[Tensor]
    ridge: Tensor
    influence: Tensor
    lower_bound: Tensor
    rmse: Tensor
    residual: Tensor
    solved: Tensor
    tight: Tensor
    blurred: Tensor
    failed: Tensor
    products: Tensor

    def limited(self, leakage: Tensor, prior_std: float) -> Exposure:
        """Returns the numbers of an attacker who learns of x through x + a alone, which tells a share `[U]` of it.

        Both bounds hold, so the lesser one does; I²F, a distance from x + a and not from x, is then not known.
        """
        noisy = leakage < 1
        return replace(
            self,
            leakage=Interval(*(torch.minimum(part, leakage) for part in self.leakage)),
            influence=torch.where(noisy, torch.nan, self.influence),
            lower_bound=torch.where(noisy, torch.nan, self.lower_bound),
            rmse=torch.maximum(self.rmse, prior_std * (1 - leakage).clamp(min=0).sqrt()),
            solved=self.solved | noisy,
            tight=self.tight | (self.leakage.lower >= leakage),
        )

    def worst(self, units: Tensor, other: Exposure) -> Exposure:
        """Returns, for `units`, the numbers of this or of `other`, made of them alone, whichever leaks more.

        Bounds of both hold for the greater of the two leakages, and so does the greater of their bounds.
        """
        more = other.leakage.value >= self.leakage.value[units]
        at, rows = units[more], more.nonzero().squeeze(1)

        def chosen(mine: Tensor, its: Tensor) -> Tensor:
            return mine.index_copy(0, at, its[rows].to(mine.dtype))

        pairs = zip(self.leakage, other.leakage, strict=True)
        leakage = Interval(*(mine.index_copy(0, units, torch.maximum(mine[units], its)) for mine, its in pairs))
        return Exposure(
            leakage=leakage,
            ridge=chosen(self.ridge, other.ridge),
            influence=chosen(self.influence, other.influence),
            lower_bound=chosen(self.lower_bound, other.lower_bound),
            rmse=chosen(self.rmse, other.rmse),
            residual=chosen(self.residual, other.residual),
            solved=chosen(self.solved, other.solved),
            tight=self.tight.index_copy(0, units, self.tight[units] & other.tight),
            blurred=chosen(self.blurred, other.blurred),
            failed=self.failed.index_copy(0, units, self.failed[units] | other.failed),
            products=self.products.index_add(0, units, other.products),
        )


def exposure(
    jacobian: UpdateJacobian,
    spectrum: Spectrum,
    perturbation: Tensor,
    noise_std: Tensor,
    doubt: Tensor,
    settings: AuditSettings,
) -> Exposure:
    """Returns what an attacker recovers who takes the perturbation for noise of one standard deviation.

    Args:
        jacobian: U units.
        spectrum: Theirs.
        perturbation: δ `[U, P]`.
        noise_std: σ `[U]`.
        doubt: Two standard errors of the shared update's scale, relative to it, `[U]`: so much less of noise, or more,
            is as compatible with what arrived.
        settings: With `prior_std`.
    """
    assert settings.prior_std is not None
    ridge = _ridge(noise_std, settings)
    leakage = Interval(
        spectrum.leakage_at(_ridge(noise_std / (1 - doubt).clamp(min=1e-3), settings)).lower,
        spectrum.leakage_at(ridge).value,
        spectrum.leakage_at(_ridge(noise_std / (1 + doubt), settings)).upper,
    )
    # Below what floating point knows of G a smaller ridge changes digits that are not there.
    solvable = torch.maximum(ridge, 10 * spectrum.resolution)
    solved = influence(jacobian, perturbation, ridge=solvable, rtol=settings.solve_rtol, max_steps=settings.solve_steps)
    bias = spectrum.bias(solvable.sqrt() * settings.prior_std, settings.prior_std).value
    return Exposure(
        leakage=leakage,
        ridge=ridge,
        influence=solved.norm,
        lower_bound=influence_lower_bound(jacobian, perturbation),
        # Whoever would miss by more than the prior does keeps to the prior.
        rmse=(solved.norm.double() ** 2 / jacobian.input_dim + bias).sqrt().clamp(max=settings.prior_std),
        residual=solved.residual,
        solved=solved.converged,
        tight=spectrum.gap(10 * spectrum.resolution) <= 2 * settings.rtol,
        blurred=~spectrum.resolved(ridge) & (leakage.upper - leakage.lower > _WIDE),
        failed=spectrum.failed,
        products=spectrum.products + solved.products,
    )


def psnr_of(rmse: float, data_range: float) -> float:
    """Returns the peak signal-to-noise ratio in dB of an error per input element."""
    return math.inf if rmse == 0 else 20 * math.log10(data_range / rmse)


def _ridge(sigma: Tensor, settings: AuditSettings) -> Tensor:
    """ε = σ²/τ² of each unit, unless the settings give one."""
    assert settings.prior_std is not None
    return (sigma / settings.prior_std) ** 2 if settings.ridge is None else torch.full_like(sigma, settings.ridge)
