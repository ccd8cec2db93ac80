"""What a client's defences did to its update, seen by comparing what was shared with what was computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Perturbation:
    """The difference between shared and undefended updates, the common scale taken out.

    Clipping multiplies an update by a factor, which an attacker divides out again. With s = ⟨shared, u⟩/⟨u, u⟩ the
    perturbation is δ = shared/s − u, orthogonal to u.

    Attributes:
        delta: δ `[U, P]`.
        scale: s `[U]`; where noise drowns the update, so that s is not two standard errors above zero, those two
            standard errors: the largest signal, and so the most leakage, that is compatible with what arrived.
        scale_error: Standard error of s `[U]`: noise along u, which cannot be told from a change of scale.
        update_norm: ‖u‖ `[U]`.
        cosine: Of shared and u, `[U]`.
    """

    delta: Tensor
    scale: Tensor
    scale_error: Tensor
    update_norm: Tensor
    cosine: Tensor

    @property
    def norm(self) -> Tensor:
        """‖δ‖ `[U]`, in units of the undefended update."""
        norm: Tensor = torch.linalg.vector_norm(self.delta, dim=-1)
        return norm

    @property
    def noise_std(self) -> Tensor:
        """‖δ‖/√P `[U]`: the standard deviation per parameter of noise of that power."""
        return self.norm / math.sqrt(self.delta.shape[-1])

    @property
    def snr_db(self) -> Tensor:
        """20·log10(‖u‖/‖δ‖) `[U]` in dB; infinite without a perturbation."""
        decibels: Tensor = 20 * torch.log10(self.update_norm / self.norm)
        return decibels


def observed_perturbation(shared: Tensor, update: Tensor) -> Perturbation:
    """Returns what stands between undefended updates u and what was shared, both `[U, P]`."""
    power = (update * update).sum(-1)
    inner = (shared * update).sum(-1)
    tiny = torch.finfo(update.dtype).tiny
    projection = inner / power.clamp(min=tiny)
    rest = torch.linalg.vector_norm(shared - projection[:, None] * update, dim=-1)
    error = rest / (update.shape[-1] * power.clamp(min=tiny)).sqrt()
    scale = torch.maximum(projection, 2 * error)
    # An update that was replaced by zeros (error and projection both zero) has no scale to take out.
    scale = torch.where((power > 0) & (scale > 0), scale, torch.ones_like(scale))
    norms = torch.linalg.vector_norm(shared, dim=-1) * power.sqrt()
    cosine = torch.where(norms > 0, inner / norms.clamp(min=tiny), torch.zeros_like(norms))
    return Perturbation(shared / scale[:, None] - update, scale, error, power.sqrt(), cosine)
