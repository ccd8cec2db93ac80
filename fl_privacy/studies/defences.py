"""Defences to compare: what each does to an update, and what an attacker who knows it takes the difference for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_privacy.attacks import IndependentNoise, IsotropicNoise, Noise
from fl_privacy.influence.jacobian import UpdateJacobian

EXACT = 1e-6
"""Precision to which undefended entries are known, relative to the update's root mean square."""


@dataclass(frozen=True, eq=False)
class RankOneNoise(Noise):
    """C = s²I + c²qqᵀ of one unit.

    Attributes:
        std: s `[1]`.
        amplitude: c.
        direction: q `[P]`, of norm 1.
    """

    std: Tensor
    amplitude: float
    direction: Tensor

    @property
    def num_units(self) -> int:
        """1."""
        return 1

    def precision(self, residual: Tensor) -> Tensor:
        """Returns C⁻¹r = (r − c²/(s² + c²)·q qᵀr)/s²."""
        variance = float(self.std[0]) ** 2
        share = self.amplitude**2 / (variance + self.amplitude**2)
        along = residual @ self.direction
        return (residual - share * along[:, None] * self.direction) / variance

    def select(self, units: Tensor) -> RankOneNoise:
        """Returns the noise of the unit."""
        return self


@dataclass(frozen=True, eq=False)
class Defence:
    """A defended update of one unit.

    Attributes:
        change: Shared minus undefended update, `[P]`.
        noise: What an attacker takes it for who knows the mechanism.
        leakage: Of the best linear-Gaussian attacker.
    """

    change: Tensor
    noise: Noise
    leakage: float


class DenseScene:
    """One unit with its Jacobian as a matrix, on which every linear defence can be tuned to a leakage.

    Args:
        jacobian: One unit, of an input of at most a thousand elements or so.
        update: Its undefended update `[P]`; behind ReLUs J may be that of the rounded network.
        model: Whose last linear layer Soteria prunes.
        prior_std: τ.
        seed: Of all noise.
    """

    def __init__(self, jacobian: UpdateJacobian, update: Tensor, model: nn.Module, prior_std: float, seed: int) -> None:
        self.update = update
        identity = torch.eye(jacobian.input_dim, dtype=jacobian.dtype, device=jacobian.device)
        lanes = jacobian.select(torch.zeros(64, dtype=torch.long, device=jacobian.device))
        padded = torch.cat([identity, identity.new_zeros(-len(identity) % 64, jacobian.input_dim)])
        rows = torch.cat([lanes.jvp(part) for part in torch.split(padded, 64)])
        self.j = rows[: len(identity)].T.contiguous()  # [P, D]
        self.tau = prior_std
        self.exact = EXACT * float(self.update.square().mean().sqrt())
        self.seed = seed
        self._last = _last_linear(model)

    def leakage(self, precision: Tensor) -> float:
        """(1/D) Σ m/(m + 1/τ²) of the eigenvalues m of Jᵀ·diag(precision)·J, for precision `[P]`."""
        kept = precision > 0
        rows = self.j[kept] * precision[kept].sqrt()[:, None]
        gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
        m = torch.linalg.eigvalsh(gram).clamp(min=0)
        return float((m / (m + 1 / self.tau**2)).sum()) / self.j.shape[1]

    def pruned(self, target: float) -> Defence:
        """Global magnitude pruning, of as few entries as bring leakage down to the target."""
        order = self.update.abs().argsort(descending=True)
        low, high = 0, 4 * self.j.shape[1]  # entries kept: more than D of them determine the input
        while high - low > max(1, self.j.shape[1] // 50):
            middle = (low + high) // 2
            low, high = (middle, high) if self._keeping(order[:middle]).leakage <= target else (low, middle)
        return self._keeping(order[:low])

    def soteria(self, share: float) -> Defence:
        """Soteria at a share of pruned features: their columns of the last layer's gradient are not shared.

        Pruned are the features with the least |r|/‖∂r/∂x‖, which tell most of the input for their size.
        """
        weight, features = self._last
        columns = torch.arange(weight.stop - weight.start, device=self.j.device).reshape(-1, features)
        norms = self.j[weight].reshape(-1, features, self.j.shape[1]).square().sum((0, 2)).sqrt()
        sizes = self.update[weight].reshape(-1, features).abs().sum(0)
        gone = (sizes / norms.clamp(min=1e-300)).argsort()[: round(share * features)]
        kept = torch.ones_like(self.update, dtype=torch.bool)
        kept[weight.start + columns[:, gone].reshape(-1)] = False
        return self._keeping(kept.nonzero().squeeze(1))

    def _keeping(self, entries: Tensor) -> Defence:
        std = torch.full_like(self.update, torch.inf)
        std[entries] = self.exact
        change = -self.update.clone()
        change[entries] = 0.0
        return Defence(change, IndependentNoise(std[None]), self.leakage(1 / std**2))

    def isotropic(self, noise_std: float) -> Defence:
        """White noise on the update."""
        std = self.j.new_full((1,), noise_std)
        noise = IsotropicNoise(std)
        return Defence(
            noise_std * self._normal(len(self.update)), noise, self.leakage(1 / std.expand(len(self.update)) ** 2)
        )

    def optimal(self, target: float) -> Defence:
        """Noise of variance ∝ ‖J_i‖/|u_i| per parameter ("Optimal Defenses"), as strong as the target asks."""
        size = self.update.abs().clamp(min=1e-3 * float(self.update.abs().mean()))
        shape = (torch.linalg.vector_norm(self.j, dim=1) / size).clamp(min=1e-12)
        shape = shape / shape.mean()
        rows = self.j / shape.sqrt()[:, None]
        m = torch.linalg.eigvalsh(rows.T @ rows).clamp(min=0)
        low, high = -60.0, 60.0
        for _ in range(100):
            middle = (low + high) / 2
            leaks = float((m / (m + math.exp(middle) / self.tau**2)).mean()) > target
            low, high = (middle, high) if leaks else (low, middle)
        std = (math.exp(high) * shape).sqrt()
        return Defence(std * self._normal(len(std)), IndependentNoise(std[None]), target)

    def rank_one(self, target: float) -> Defence:
        """Noise along the one direction that plain I²F fears most, as strong as it says the target needs.

        The shift of I²F without ridge for δ = c·Jv/‖Jv‖ along the eigenvector v of the least eigenvalue is c/√λ_min.
        """
        gram = self.j.T @ self.j
        values, vectors = torch.linalg.eigh(gram)
        d = len(values)
        amplitude = self.tau * math.sqrt((1 - target) * d * float(values[0].clamp(min=0)))
        q = self.j @ vectors[:, 0]
        q = q / torch.linalg.vector_norm(q)
        noise = RankOneNoise(self.j.new_full((1,), self.exact), amplitude, q)
        share = amplitude**2 / (self.exact**2 + amplitude**2)
        pulled = self.j.T @ q
        m = torch.linalg.eigvalsh((gram - share * torch.outer(pulled, pulled)) / self.exact**2).clamp(min=0)
        return Defence(amplitude * q, noise, float((m / (m + 1 / self.tau**2)).mean()))

    def _normal(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(count, generator=generator, dtype=torch.float64).to(self.j)


def _last_linear(model: nn.Module) -> tuple[slice, int]:
    """Place of the last linear layer's weight in the flat update, and its number of features."""
    start, found = 0, None
    linear = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in linear:
            found = slice(start, start + parameter.numel()), linear[name].in_features
        start += parameter.numel()
    assert found is not None, "a classifier ends in a linear layer"
    return found
