"""What a client's defences did to its update, seen by comparing what was shared with what was computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST_BLOCK, _SMALLEST_POOL = 64, 8
"""Entries below which the noise of a block is not measured alone, and that of a pool of such blocks not at all."""
_NEGLIGIBLE = 1e-4
"""Noise, relative to the update, that may be float32's rounding of parameters much larger than their change."""
_ROUNDS = 10
"""Of reweighting, in the search for the scale of an update whose blocks carry different noise."""


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


@dataclass(frozen=True, eq=False)
class NoiseBlocks:
    """Noise that differs from block to block of an update: an attacker leans on the entries that carry least of it.

    A pruned update is exact where it is not zero; noise on one layer leaves the others as they were. Taken for noise of
    the same power everywhere, either looks like far more protection than it is. Blocks are the parameters, and within
    each what was shared as exactly zero and what was not, both of which anyone can see.

    Attributes:
        split: Units whose blocks carry significantly different noise, `[U]`. For the others one figure says it all.
        std: Standard deviation of the noise by entry, `[U, P]`, the scale taken out.
        scale: Common factor of the shared update, judged by the entries with the least noise, `[U]`.
        scale_error: Its standard error, `[U]`.
        zeroed: Share of the entries that were shared as zero although they were not, `[U]`.
    """

    split: Tensor
    std: Tensor
    scale: Tensor
    scale_error: Tensor
    zeroed: Tensor

    @property
    def least(self) -> Tensor:
        """Standard deviation of the noise on the least protected block, `[U]`."""
        least: Tensor = self.std.amin(-1)
        return least

    @property
    def weights(self) -> Tensor:
        """Least standard deviation over that of each entry, `[U, P]` in [0, 1]; ones for units that are not split."""
        least = self.least[:, None]
        ratio = torch.where(self.std > least, least / self.std.clamp(min=torch.finfo(self.std.dtype).tiny), 1.0)
        return torch.where(self.split[:, None], ratio, 1.0)


def noise_blocks(shared: Tensor, update: Tensor, sizes: Sequence[int]) -> NoiseBlocks:
    """Returns the noise on each block of what was shared, both updates `[U, P]`.

    Args:
        shared: As it arrived.
        update: Undefended.
        sizes: Number of entries of each parameter, in order; they add up to P. Small ones are pooled.
    """
    zeroed = (shared == 0) & (update != 0)
    block = _block_index(sizes, update.device) + zeroed * (len(sizes) + 1)
    block = _pool_small(block, zeroed, len(sizes))
    count = 2 * (len(sizes) + 1)
    weight = (~zeroed).double()
    kept, u, s = ~zeroed, update.double(), shared.double()
    floor = torch.finfo(update.dtype).eps * _rms(u)[:, None] + torch.finfo(torch.float64).tiny
    for _ in range(_ROUNDS):
        power = (weight * u * u).sum(-1)
        error = power.clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
        projection = error**2 * (weight * s * u).sum(-1)
        scale = torch.where(projection > 0, projection, torch.ones_like(projection))
        residual = s - scale[:, None] * u
        variance = _block_mean(residual.square(), block, count)
        weight = kept / torch.maximum(variance, floor**2)
    # In units of the undefended update; a scale within two standard errors of zero is taken at those two, as above.
    scale = torch.maximum(scale, 2 * error)
    delta = s / scale[:, None] - u
    variance = _block_mean(delta.square(), block, count)
    exact = variance.sqrt() <= 8 * floor
    std = torch.where(exact, 0.0, variance.sqrt())
    return NoiseBlocks(
        _significantly_different(delta, variance, block, count) & (power > 0) & (_rms(delta) > _NEGLIGIBLE * _rms(u)),
        std,
        scale,
        error,
        zeroed.double().mean(-1),
    )


def _block_index(sizes: Sequence[int], device: torch.device) -> Tensor:
    return torch.repeat_interleave(torch.tensor(sizes, device=device))


def _pool_small(block: Tensor, zeroed: Tensor, num_sizes: int) -> Tensor:
    """Puts blocks of few entries into one, of the zeroed and of the others apart."""
    counts = torch.zeros(len(block), 2 * (num_sizes + 1), device=block.device)
    counts.scatter_add_(1, block, torch.ones_like(block, dtype=counts.dtype))
    pool = num_sizes + zeroed * (num_sizes + 1)
    return torch.where(counts.gather(1, block) < _SMALLEST_BLOCK, pool, block)


def _block_mean(values: Tensor, block: Tensor, count: int) -> Tensor:
    """Mean over each entry's block, `[U, P]`."""
    sums = values.new_zeros(len(values), count).scatter_add_(1, block, values)
    numbers = values.new_zeros(len(values), count).scatter_add_(1, block, torch.ones_like(values))
    return (sums / numbers.clamp(min=1)).gather(1, block)


def _significantly_different(delta: Tensor, variance: Tensor, block: Tensor, count: int) -> Tensor:
    """Whether any block's power differs by a tenth, and by six standard errors, from that of the whole, `[U]`.

    The standard error of the logarithm of a mean of n squares is √((κ − 1)/n), with κ the kurtosis.
    """
    whole = delta.square().mean(-1, keepdim=True)
    entries = delta.new_zeros(len(delta), count).scatter_add_(1, block, torch.ones_like(delta)).gather(1, block)
    tiny = torch.finfo(torch.float64).tiny
    kurtosis = _block_mean((delta.square() / variance.clamp(min=tiny)).square(), block, count).clamp(min=3.0)
    error = ((kurtosis - 1) / entries).sqrt()
    differs = (variance.clamp(min=tiny) / whole.clamp(min=tiny)).log().abs() > torch.clamp(6 * error, min=0.1)
    return (differs & (entries >= _SMALLEST_POOL)).any(-1)


def _rms(vectors: Tensor) -> Tensor:
    return vectors.square().mean(-1).sqrt()
